"""``bus-run generate``: prompts in, text out, through a whole engine that is gone afterwards.

Owns: the engine while it runs. stdout gets results only; what is going on goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import attrs

from ..actors.config import EngineConfig
from ..actors.engine import Engine
from ..actors.logs import configure_logging
from ..actors.outputs import CompletionOutput, RequestOutput
from ..actors.sampling import SamplingParams
from ..bus import Progress
from ..errors import ConfigError, RequestInvalid
from .progress import ProgressView, progress_view

__all__ = ["DEMO_PROMPT", "as_object", "generate", "joined", "read_prompts"]

DEMO_PROMPT = "replica"
"""A word the demo model was taught the meaning of, so that ``bus-run generate`` alone prints a sentence."""


def read_prompts(given: Sequence[str], model: str) -> list[str]:
    """The prompts of a command line, "-" replaced by what stdin holds; raises ``ConfigError`` or ``RequestInvalid``."""
    if not given:
        if model != "demo":
            raise ConfigError(f"no prompt was given for model {model!r}; give at least one with -p TEXT")
        return [DEMO_PROMPT]
    if given.count("-") > 1:
        raise RequestInvalid(f"-p - is given {given.count('-')} times; stdin holds one prompt")
    prompts = [_from_stdin() if text == "-" else text for text in given]
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes that are no UTF-8 arrive as lone surrogates
            raise RequestInvalid(f"prompt {number} is no UTF-8 text at character {error.start}") from None
    return prompts


def _from_stdin() -> str:
    return sys.stdin.buffer.read().decode(errors="surrogateescape").removesuffix("\n")


def generate(config: EngineConfig, prompts: Sequence[str], params: SamplingParams, *, as_json: bool) -> None:
    """Serve the prompts at once and print their outputs in order, each as soon as it and those before it are done.

    Raises the engine's own errors; the engine is closed then too.
    """
    configure_logging(config.log_level, "host")
    is_live = sys.stdout.isatty() and not as_json and params.n == 1
    began_s = time.monotonic()
    with progress_view() as view, _engine(config, view) as engine:
        view.say(f"ready in {time.monotonic() - began_s:.1f} s")
        began_s = time.monotonic()
        num_tokens = 0
        for number, stream in enumerate([engine.stream(prompt, params) for prompt in prompts]):
            deltas = []
            for delta in stream:
                deltas.append(delta)
                num_tokens += sum(len(output.token_ids) for output in delta.outputs)
                if is_live:
                    view.result(("" if len(deltas) > 1 else delta.prompt) + delta.outputs[0].text, end="")
                else:
                    unit = f"prompts, {num_tokens} tokens"
                    view.show(Progress(phase="generating", done=number, total=len(prompts), unit=unit))
            output = joined(deltas)
            if is_live:
                view.result("")
            else:
                view.result(json.dumps(as_object(output), ensure_ascii=False) if as_json else as_text(output))
        seconds = time.monotonic() - began_s
        view.say(f"{num_tokens} tokens of {len(prompts)} prompts in {seconds:.2f} s")


def _engine(config: EngineConfig, view: ProgressView) -> Engine:
    return Engine(on_progress=view.show, **attrs.asdict(config))


def joined(deltas: Sequence[RequestOutput]) -> RequestOutput:
    """A stream's deltas as the one output ``Engine.generate`` would have given."""
    parts: dict[int, list[CompletionOutput]] = {}
    for delta in deltas:
        for part in delta.outputs:
            parts.setdefault(part.index, []).append(part)
    return attrs.evolve(deltas[-1], outputs=tuple(_joined_completion(parts[index]) for index in sorted(parts)))


def _joined_completion(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    rows = [row for part in parts for row in part.logprobs or ()]
    return attrs.evolve(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=None if parts[-1].logprobs is None else tuple(rows),
    )


def as_text(output: RequestOutput) -> str:
    """Prompt and continuation as one text; several completions one after another."""
    return "\n".join(output.prompt + completion.text for completion in output.outputs)


def as_object(output: RequestOutput) -> dict[str, Any]:
    """One prompt's result for ``--json``. ``logprobs`` and ``completions`` are there only if asked for.

    text, token_ids and finish_reason are the first completion's; with ``--n`` above 1, ``completions`` lists all.
    """
    completions = [_completion_object(completion) for completion in output.outputs]
    first = completions[0]
    result = {
        "prompt": output.prompt,
        **first,
        "replica": output.replica,
        "timing": {
            "queued_s": output.timing.queued_s,
            "ttft_s": output.timing.ttft_s,
            "e2e_s": output.timing.e2e_s,
        },
    }
    return result if len(completions) == 1 else {**result, "completions": completions}


def _completion_object(completion: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        result["logprobs"] = [
            {"logprob": row.logprob, "top": dict(zip(map(str, row.top_ids), row.top_logprobs, strict=True))}
            for row in completion.logprobs
        ]
    return result
