"""The same from asyncio: requests run side by side, and a cancelled one frees its pages."""

import asyncio

from chipbus import AsyncEngine, SamplingParams


async def main() -> None:
    """Stream two completions at once."""
    greedy = SamplingParams(temperature=0, max_tokens=48)
    async with AsyncEngine("demo") as engine:

        async def complete(prompt: str) -> str:
            return prompt + "".join([d.outputs[0].text async for d in engine.stream(prompt, greedy)])

        for line in await asyncio.gather(complete("router"), complete("supervisor")):
            print(line)


asyncio.run(main())
