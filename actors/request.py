"""One prompt on its way: written by the bus thread, read by the caller's. Deltas coalesce while nobody reads.

Owns: the text and tokens so far of one prompt's completions, under one lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import attrs

from ..bus import unpack_tokens
from ..errors import BadFrame, ChipbusError
from .messages.serving import Encoded, LogprobRow, TextDelta, TextDone
from .outputs import CompletionOutput, RequestOutput, Timing

__all__ = ["RequestState"]


@attrs.define
class _Completion:
    text: list[str] = attrs.field(factory=list)
    token_ids: list[int] = attrs.field(factory=list)
    logprobs: list[LogprobRow] = attrs.field(factory=list)
    drained_text: int = 0  # pieces of text already handed out
    drained_tokens: int = 0
    first_token_s: float | None = None
    done: TextDone | None = None
    finish_drained: bool = False


class RequestState:
    """What is known of one prompt. ``on_change`` is called on the bus thread after every change, outside the lock."""

    def __init__(
        self, request_id: str, num_completions: int, wants_logprobs: bool, on_change: Callable[[], None]
    ) -> None:
        self.request_id = request_id
        self._wants_logprobs = wants_logprobs
        self._on_change = on_change
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        self._ended_s: float | None = None
        self._prompt = ""
        self._prompt_token_ids: tuple[int, ...] = ()
        self._completions = [_Completion() for _ in range(num_completions)]
        self._error: ChipbusError | None = None

    # Written on the bus thread.

    def token_ids(self, index: int) -> Sequence[int]:
        """Everything of completion ``index`` that has come."""
        return self._completions[index].token_ids

    def encoded(self, item: Encoded) -> None:
        """The prompt as the model sees it; what the first attempt said of it holds."""
        with self._lock:
            if self._prompt_token_ids:
                return
            self._prompt = item.prompt
            self._prompt_token_ids = tuple(unpack_tokens(item.prompt_token_ids).tolist())

    def delta(self, index: int, item: TextDelta) -> None:
        """More of completion ``index``. Raises ``BadFrame`` if it does not begin where the last one ended."""
        with self._lock:
            completion = self._completions[index]
            ids = unpack_tokens(item.token_ids).tolist()
            if item.token_index != len(completion.token_ids):
                came = f"token {item.token_index} of request {self.request_id} came"
                raise BadFrame(f"{came} where token {len(completion.token_ids)} was expected")
            if completion.first_token_s is None and ids:
                completion.first_token_s = time.monotonic()
            completion.token_ids += ids
            completion.logprobs += item.logprobs
            if item.text:
                completion.text.append(item.text)
        self._on_change()

    def done(self, index: int, item: TextDone) -> None:
        """Completion ``index`` ended."""
        with self._lock:
            completion = self._completions[index]
            if item.text:
                completion.text.append(item.text)
            completion.done = item
            if all(c.done for c in self._completions):
                self._ended_s = time.monotonic()
        self._on_change()

    def failed(self, error: ChipbusError) -> None:
        """The request failed. The first error is the one the caller gets."""
        with self._lock:
            if self._error is None and self._ended_s is None:
                self._error = error
        self._on_change()

    # Read on the caller's side.

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        with self._lock:
            return self._error is not None or self._ended_s is not None

    def whole(self) -> RequestOutput:
        """Everything so far. Raises the request's error."""
        return self._output(lambda _: (0, 0), keep_empty=True)

    def drain(self) -> RequestOutput | None:
        """What is new since the last call, None if nothing. Raises the request's error."""

        def since(completion: _Completion) -> tuple[int, int]:
            start = (completion.drained_text, completion.drained_tokens)
            completion.drained_text, completion.drained_tokens = len(completion.text), len(completion.token_ids)
            return start

        output = self._output(since, keep_empty=False)
        return output if output.outputs else None

    def _output(self, since: Callable[[_Completion], tuple[int, int]], *, keep_empty: bool) -> RequestOutput:
        with self._lock:
            if self._error is not None:
                raise self._error
            outputs = []
            for index, completion in enumerate(self._completions):
                text_from, tokens_from = since(completion)
                ends_now = completion.done is not None and not completion.finish_drained
                if not keep_empty:
                    completion.finish_drained = completion.done is not None
                    if text_from == len(completion.text) and tokens_from == len(completion.token_ids) and not ends_now:
                        continue
                outputs.append(self._completion_output(index, completion, text_from, tokens_from))
            last = next((c.done for c in self._completions if c.done), None)
            return RequestOutput(
                request_id=self.request_id,
                prompt=self._prompt,
                prompt_token_ids=self._prompt_token_ids,
                outputs=tuple(outputs),
                finished=self._ended_s is not None,
                num_cached_tokens=last.tokens.num_cached_tokens if last else 0,
                replica=last.tokens.replica if last else None,
                dp_rank=last.tokens.dp_rank if last else None,
                chosen_by=last.tokens.chosen_by if last else None,
                attempt=max((c.done.tokens.attempt for c in self._completions if c.done), default=1),
                timing=self._timing(last),
            )

    def _completion_output(
        self, index: int, completion: _Completion, text_from: int, tokens_from: int
    ) -> CompletionOutput:
        rows = completion.logprobs if self._wants_logprobs else None
        return CompletionOutput(
            index=index,
            text="".join(completion.text[text_from:]),
            token_ids=tuple(completion.token_ids[tokens_from:]),
            logprobs=None if rows is None else tuple(rows[tokens_from:]),
            cumulative_logprob=None if rows is None else sum(row.logprob for row in rows),
            finish_reason=completion.done.finish_reason if completion.done else None,
            stop_reason=completion.done.stop_reason if completion.done else None,
        )

    def _timing(self, last: TextDone | None) -> Timing:
        first = min((c.first_token_s for c in self._completions if c.first_token_s is not None), default=None)
        return Timing(
            queued_s=last.tokens.queued_s if last else 0.0,
            prefill_s=last.tokens.prefill_s if last else 0.0,
            decode_s=last.tokens.decode_s if last else 0.0,
            ttft_s=first - self._began_s if first is not None else 0.0,
            e2e_s=(self._ended_s if self._ended_s is not None else time.monotonic()) - self._began_s,
        )
