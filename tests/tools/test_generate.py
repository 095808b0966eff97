"""``bus-run generate`` without an engine: prompts, deltas joined, the JSON object, views of progress."""

from __future__ import annotations

import io
import json

import pytest

from chipbus.actors.messages.serving import LogprobRow
from chipbus.actors.outputs import CompletionOutput, RequestOutput, Timing
from chipbus.bus import Progress
from chipbus.errors import ConfigError, RequestInvalid
from chipbus.tools.generate import DEMO_PROMPT, as_object, as_text, joined, read_prompts
from chipbus.tools.progress import LineProgress, LiveProgress, amount, progress_view


def output(*completions: CompletionOutput, finished: bool = True) -> RequestOutput:
    return RequestOutput(
        request_id="req-1", prompt="cat", prompt_token_ids=(1,), outputs=completions, finished=finished, replica=1,
        timing=Timing(queued_s=0.1, prefill_s=0.2, decode_s=0.3, ttft_s=0.4, e2e_s=0.5),
    )  # fmt: skip


def part(text: str, *ids: int, index: int = 0, reason: str | None = None, rows: int = -1) -> CompletionOutput:
    logprobs = tuple(LogprobRow(i, -1.0, (i, 9), (-1.0, -2.0)) for i in ids) if rows >= 0 else None
    return CompletionOutput(index=index, text=text, token_ids=ids, finish_reason=reason, logprobs=logprobs)


def test_plain_generate_asks_the_demo_model_for_a_word_it_knows() -> None:
    assert read_prompts((), "demo") == [DEMO_PROMPT]


def test_another_model_needs_a_prompt() -> None:
    with pytest.raises(ConfigError, match="no prompt was given for model '/m'; give at least one with -p TEXT"):
        read_prompts((), "/m")


def test_a_dash_is_one_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("zwei\nZeilen é\n\n".encode())))

    assert read_prompts(("a", "-", "b"), "demo") == ["a", "zwei\nZeilen é\n", "b"]
    with pytest.raises(RequestInvalid, match="-p - is given 2 times; stdin holds one prompt"):
        read_prompts(("-", "-"), "demo")


def test_bytes_that_are_no_text_are_refused_with_their_place() -> None:
    with pytest.raises(RequestInvalid, match="prompt 2 is no UTF-8 text at character 1"):
        read_prompts(("a", b"x\xff".decode(errors="surrogateescape")), "demo")


def test_joined_deltas_are_the_whole_output() -> None:
    deltas = [
        output(part("a", 1, rows=1), part("x", 5, index=1, rows=1), finished=False),
        output(part("b", 2, 3, rows=1), finished=False),
        output(part("", reason="stop", rows=1), part("y", 6, index=1, reason="length", rows=1)),
    ]

    whole = joined(deltas)

    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in whole.outputs] == [
        (0, "ab", (1, 2, 3), "stop"),
        (1, "xy", (5, 6), "length"),
    ]
    assert [row.token_id for row in whole.outputs[0].logprobs or ()] == [1, 2, 3]
    assert whole.finished


def test_one_object_has_exactly_these_keys() -> None:
    result = as_object(output(part(" sat", 4, 5, reason="stop")))

    assert result == {
        "prompt": "cat",
        "text": " sat",
        "token_ids": [4, 5],
        "finish_reason": "stop",
        "replica": 1,
        "timing": {"queued_s": 0.1, "ttft_s": 0.4, "e2e_s": 0.5},
    }
    assert json.loads(json.dumps(result)) == result


def test_more_is_in_the_object_only_if_asked_for() -> None:
    result = as_object(output(part("a", 1, reason="stop", rows=1), part("b", 2, index=1, reason="stop", rows=1)))

    assert [c["text"] for c in result["completions"]] == ["a", "b"]
    assert result["logprobs"] == [{"logprob": -1.0, "top": {"1": -1.0, "9": -2.0}}]


def test_text_is_prompt_and_continuation() -> None:
    assert as_text(output(part(" sat"), part(" ran", index=1))) == "cat sat\ncat ran"


def test_plain_progress_says_each_phase_first_and_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    with LineProgress() as view:
        for step in range(101):
            now_s = step * 0.03
            view.show(Progress(phase="weights", done=step * 1e6, total=100e6, unit="bytes"))
        view.show(Progress(phase="weights", done=100e6, total=100e6, unit="bytes"))
        view.result("text")

    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "weights: 0 of 100 MB", "weights: 34 of 100 MB", "weights: 68 of 100 MB", "weights: 100 of 100 MB",
    ]  # fmt: skip
    assert shown.out == "text\n"


def test_live_progress_keeps_results_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveProgress() as view:
        view.show(Progress(phase="weights", done=1, total=2, unit="steps"))
        view.say("ready [in] 3 s")
        view.result("text [x]")
        view.show(Progress(phase="weights", done=2, total=2, unit="steps"))

    shown = capsys.readouterr()
    assert shown.out == "text [x]\n"
    assert "ready [in] 3 s" in shown.err


def test_without_a_terminal_progress_is_plain() -> None:
    assert isinstance(progress_view(), LineProgress)


def test_amounts_without_a_total_say_what_there_is() -> None:
    assert amount(Progress(phase="p", done=1234, total=0, unit="tokens")) == "1,234 tokens"
