"""How many requests, how many tokens, how long: counted once per request and once per delta, in about a microsecond.

Owns: the counts of one engine since its start, and those of its requests that are open. Thread: the bus thread; others
read what ``latencies`` and ``recent`` return, which is frozen. Time is told, in nanoseconds of the bus clock.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

import attrs

from ..bus import Series
from ..errors import ChipbusError
from .messages.serving import TextDone
from .report import MOST_ROWS, Latencies, RequestRow
from .window import Window

__all__ = ["Meter", "OpenRequest", "Recent"]

# vLLM's, so that what was made for its histograms can be used, and finer ones below: a small model is faster.
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


@attrs.define(eq=False)
class OpenRequest:
    """One completion under way. Times in nanoseconds of the bus clock, 0 before they are known."""

    request_id: str
    began_ns: int
    first_ns: int = 0  # when its first token came
    last_ns: int = 0  # when its last one so far came
    prompt_tokens: int = 0
    output_tokens: int = 0
    attempt: int = 1
    replica: int | None = None  # known with its first token

    @property
    def ttft_s(self) -> float | None:
        """Seconds to its first token; None before that."""
        return (self.first_ns - self.began_ns) / 1e9 if self.first_ns else None

    def age_s(self, now_ns: int) -> float:
        """Seconds since it was asked for."""
        return (now_ns - self.began_ns) / 1e9


@attrs.frozen
class Recent:
    """What came in a sliding window."""

    seconds: float
    latencies: Latencies
    prompt_tokens: int
    output_tokens: int


class Meter:
    """Counts what the engine's end of the bus sees of requests. Each opens once, and ends in exactly one way."""

    def __init__(self, now_ns: int) -> None:
        self.requests = self.retries = self.prompt_tokens = self.output_tokens = 0
        self.finished: Counter[str] = Counter()  # by finish reason
        self.failed: Counter[str] = Counter()  # by name of the error class
        self._open: dict[OpenRequest, None] = {}  # in order of arrival
        self._ttft, self._inter_token, self._per_token = Series(_TTFT_S), Series(_TOKEN_S), Series(_TOKEN_S)
        self._e2e, self._queued, self._prefill, self._decode = (Series(_REQUEST_S) for _ in range(4))
        self._window = Window(now_ns, self._total())

    # What happens to a request.

    def begin(self, request_id: str, now_ns: int) -> OpenRequest:
        """A completion was asked for."""
        self.requests += 1
        request = OpenRequest(request_id, now_ns)
        self._open[request] = None
        return request

    def encoded(self, request: OpenRequest, num_tokens: int, now_ns: int) -> None:
        """Its prompt's length is known; later words on it are ignored."""
        if not request.prompt_tokens:
            self._move(now_ns)
            request.prompt_tokens = num_tokens
            self.prompt_tokens += num_tokens

    def delta(self, request: OpenRequest, num_tokens: int, now_ns: int) -> None:
        """So many further tokens reached the caller."""
        if not num_tokens:
            return
        self._move(now_ns)
        if request.first_ns:
            self._inter_token.observe((now_ns - request.last_ns) / 1e9)
        else:
            request.first_ns = now_ns
        request.last_ns = now_ns
        request.output_tokens += num_tokens
        self.output_tokens += num_tokens

    def retry(self, request: OpenRequest, attempt: int) -> None:
        """It is in its n-th life, on the first of which it counts as one request."""
        self.retries += max(0, attempt - request.attempt)
        request.attempt = max(attempt, request.attempt)

    def finish(self, request: OpenRequest, done: TextDone, now_ns: int) -> None:
        """It ended well."""
        self._move(now_ns)
        del self._open[request]
        self.finished[done.finish_reason] += 1
        ttft_s = request.ttft_s
        if ttft_s is not None:  # one that was lost with its last word alone may end without a delta
            self._ttft.observe(ttft_s)
        if request.output_tokens > 1:
            self._per_token.observe((request.last_ns - request.first_ns) / 1e9 / (request.output_tokens - 1))
        self._e2e.observe(request.age_s(now_ns))
        self._queued.observe(done.tokens.queued_s)
        self._prefill.observe(done.tokens.prefill_s)
        self._decode.observe(done.tokens.decode_s)

    def fail(self, request: OpenRequest, error: ChipbusError) -> None:
        """It ended with an error, or was aborted."""
        del self._open[request]
        self.failed[type(error).__name__] += 1

    # What it comes to.

    @property
    def num_open(self) -> int:
        """Completions under way."""
        return len(self._open)

    def rows(self, now_ns: int) -> tuple[RequestRow, ...]:
        """The oldest completions under way."""
        return tuple(
            RequestRow(
                request_id=request.request_id,
                replica=request.replica,
                state="running" if request.first_ns else "waiting",
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                ttft_s=request.ttft_s,
                age_s=request.age_s(now_ns),
                attempt=request.attempt,
            )
            for request in islice(self._open, MOST_ROWS)
        )

    def latencies(self) -> Latencies:
        """Since the start."""
        return Latencies(
            time_to_first_token=self._ttft.read(),
            inter_token=self._inter_token.read(),
            per_output_token=self._per_token.read(),
            e2e=self._e2e.read(),
            queued=self._queued.read(),
            prefill=self._prefill.read(),
            decode=self._decode.read(),
        )

    def recent(self, now_ns: int) -> Recent:
        """In the last minute."""
        self._move(now_ns)
        began_ns, (latencies, prompt_tokens, output_tokens) = self._window.since(now_ns)
        return Recent(
            (now_ns - began_ns) / 1e9,
            self.latencies().since(latencies),
            self.prompt_tokens - prompt_tokens,
            self.output_tokens - output_tokens,
        )

    def _move(self, now_ns: int) -> None:
        if now_ns >= self._window.next_ns:
            self._window.mark(now_ns, self._total())

    def _total(self) -> tuple[Latencies, int, int]:
        return self.latencies(), self.prompt_tokens, self.output_tokens
