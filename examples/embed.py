"""Embed chipbus in a program of your own: text in, text out, nothing left behind."""

from chipbus import Engine, SamplingParams

with Engine("demo") as engine:
    greedy = SamplingParams(temperature=0, max_tokens=48)
    for output in engine.generate(["replica", "incarnation"], greedy):
        print(output.prompt + output.outputs[0].text)
    for delta in engine.stream("page", greedy):
        print(delta.outputs[0].text, end="", flush=True)
    print()
