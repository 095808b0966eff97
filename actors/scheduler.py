"""What a replica core computes next: continuous batching over paged KV memory. Pure policy: no clock, no bus, no chip.

Owns: the requests of one replica core, their order, and its ``PagePool``. Thread: the core's bus loop.

    add ──▶ waiting ──admit──▶ running ──apply──▶ finished
               ▲                  │
               └──── preempt ─────┘   the youngest, when pages run out; its tokens are computed again later

One step: first one token of every sequence that decodes, then chunks of prompts in order of arrival, then new requests.
The oldest request always gets its tokens and pages, so every request ends.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import struct
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ContextTooLong, Overloaded, RequestInvalid
from ..kernels.qwen3.step import DecodeRow, Limits, PrefillRow, SampledToken, SampleRow, StepInput
from .pages import PagePool
from .sampling import SamplingParams

__all__ = [
    "Batch",
    "BatchRecord",
    "BatchRow",
    "Ending",
    "RowKind",
    "Scheduler",
    "SchedulerConfig",
    "TokenEvent",
    "check_prompt_length",
    "stop_ids",
    "uniform",
]

Int32 = NDArray[np.int32]
_NO_IDS: Int32 = np.zeros(0, np.int32)


@attrs.frozen(kw_only=True)
class SchedulerConfig:
    """What one replica core is sized for."""

    limits: Limits
    """Fewer tokens per step than sequences lowers the number of sequences running at once to the tokens."""
    prefill_chunk_tokens: int
    """Longest piece of one prompt in one step."""
    max_waiting: int
    """Requests waiting before ``Overloaded``."""
    vocab_size: int
    """Of the model: token ids lie in [0, vocab_size)."""
    eos_token_ids: tuple[int, ...]
    """The model's own ends of text."""

    def __attrs_post_init__(self) -> None:
        for name in ("prefill_chunk_tokens", "max_waiting", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


class RowKind(enum.StrEnum):
    """How a row is computed.

    A token keeps its kind for life: a generated one is decoded also when it is computed again after a preemption, so
    that the same program gives the same keys and values, bit by bit.
    """

    PREFILL = "prefill"  # tokens of the prompt
    DECODE = "decode"  # one generated token


@attrs.frozen
class BatchRow:
    """One request's part of a step: tokens at positions ``start`` … ``start + length - 1``."""

    request_id: str
    kind: RowKind
    start: int
    length: int
    samples: bool
    """Whether the next token is chosen from it."""


@attrs.frozen
class BatchRecord:
    """One batch decision, as it is recorded."""

    step_id: int
    rows: tuple[BatchRow, ...]
    preempted: tuple[str, ...]
    """Requests sent back to waiting before this step, youngest first."""


@attrs.frozen(eq=False)
class Batch:
    """A step to be carried out: the decision, and the same as input for the chip."""

    record: BatchRecord
    step: StepInput
    _planned: tuple[_Planned, ...] = attrs.field(repr=False)
    _held: tuple[int, ...] = attrs.field(repr=False)  # pages the step writes, kept from being used for anything else


@attrs.frozen
class Ending:
    """Why a request has all its tokens."""

    finish_reason: str  # "stop" | "length"
    stop_token_id: int | None = None  # the id out of ``stop_token_ids`` that ended it; None for the model's own end


@attrs.frozen
class TokenEvent:
    """One token of one request; the last one says why it is the last."""

    request_id: str
    token_index: int  # counts the request's generated tokens from 0
    token: SampledToken
    ending: Ending | None = None


@attrs.define(eq=False)
class _Request:
    request_id: str
    arrival: int
    prompt: Int32
    params: SamplingParams
    seed: int
    max_new_tokens: int  # max_tokens, or what the context leaves
    stops: frozenset[int]  # ids that end it
    banned: Int32  # ids not to be chosen before min_tokens
    generated: list[int] = attrs.field(factory=list)
    computed: int = 0  # leading tokens whose keys and values are in the pages
    pages: list[int] = attrs.field(factory=list)
    block_table: Int32 = _NO_IDS  # the pages as an array; replaced, never changed, since steps in flight refer to it

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def decodes(self) -> bool:
        """Whether the next token to compute is a generated one."""
        return self.computed >= len(self.prompt)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens to compute plus tokens it may still generate."""
        return max(len(self.prompt) - self.computed, 0) + self.max_new_tokens - len(self.generated)


@attrs.frozen(eq=False)
class _Planned:
    """One request's tokens ``start`` … ``start + length - 1`` of the step being decided."""

    request: _Request
    start: int
    length: int

    @property
    def samples(self) -> bool:
        return self.start + self.length == self.request.num_tokens


@attrs.define(eq=False)
class _StepPlan:
    """The step being decided."""

    budget: int  # tokens it can still take
    rows: dict[_Request, _Planned] = attrs.field(factory=dict)
    preempted: list[_Request] = attrs.field(factory=list)

    def preempt(self, request: _Request) -> None:
        """Take a request out again; tokens planned for it return to the budget."""
        self.preempted.append(request)
        planned = self.rows.pop(request, None)
        self.budget += planned.length if planned else 0


def uniform(seed: int, token_index: int) -> float:
    """The random number in [0, 1) for one token: a pure function, so every replica and every replay draws the same.

    The top 53 bits of BLAKE2b-64 over seed and index, each 8 bytes little-endian, personalised "chipbus.uniform".
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed, token_index), digest_size=8, person=b"chipbus.uniform").digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def check_prompt_length(num_tokens: int, max_model_len: int) -> None:
    """Raise ``RequestInvalid`` for an empty prompt, ``ContextTooLong`` for one that leaves no room in the context.

    A prompt may fill the context up to the one token that is generated at least.
    """
    if not num_tokens:
        raise RequestInvalid("the prompt is empty; it must have at least 1 token")
    if num_tokens >= max_model_len:
        raise ContextTooLong(
            f"the prompt has {num_tokens} tokens; with max_model_len {max_model_len} it may have at most"
            f" {max_model_len - 1}, so that one token can follow"
        )


def stop_ids(params: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Token ids that end a request once it has ``min_tokens`` tokens."""
    return frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids)


class Scheduler:
    """Batch decisions of one replica core. Same calls, same decisions.

    The core calls ``next_batch``, has the step computed, and calls ``apply`` (``drop``, if it failed) before the next.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._limits = config.limits
        self._page_size = config.limits.page_size
        self._pool = PagePool(config.limits.num_pages)
        self._max_running = min(config.limits.max_num_seqs, config.limits.max_num_batched_tokens)
        # A sequence that outgrows all pages could never end; so the pages, too, bound the context.
        self._context = min(config.limits.max_model_len, config.limits.num_pages * config.limits.page_size)
        self._requests: dict[str, _Request] = {}
        self._running: list[_Request] = []  # by arrival; all of them older than all waiting ones
        self._waiting: deque[_Request] = deque()  # by arrival
        self._in_flight: Batch | None = None
        self._arrivals = 0
        self._steps = 0

    @property
    def pages_total(self) -> int:
        """KV pages of the replica."""
        return self._pool.num_pages

    @property
    def pages_free(self) -> int:
        """KV pages nobody holds; all of them when there is no request and no step in flight."""
        return self._pool.num_free

    @property
    def num_running(self) -> int:
        """Requests admitted."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def pending_tokens(self) -> int:
        """Load: prompt tokens not computed yet plus tokens that may still be generated, over all requests."""
        return sum(request.pending_tokens for request in self._requests.values())

    def add(
        self,
        request_id: str,
        prompt: Int32,
        params: SamplingParams,
        generated: Int32 = _NO_IDS,
        *,
        is_admitted: bool = False,
    ) -> Ending | None:
        """Queue a request. Nothing is kept if it raises, nor if it turns out to have ended already.

        prompt: (tokens,) int32, ids in [0, vocab_size). ``params.seed`` is resolved, never None.
        generated: (tokens,) int32, tokens of its answer that an earlier life has delivered; it goes on behind them.
        is_admitted: it was taken once, so a full queue is no reason to refuse it.
        Raises ``RequestInvalid`` (empty prompt, id outside the vocabulary, id in use, every token forbidden, more
        generated than asked for), ``ContextTooLong`` (no room for one token in the context or in all pages),
        ``Overloaded`` (queue full).
        """
        check_prompt_length(len(prompt), self._limits.max_model_len)
        if len(prompt) >= self._context:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens; {self._limits.num_pages} KV pages of {self._page_size} tokens"
                f" hold a context of {self._context}, so it may have at most {self._context - 1}"
            )
        for what, ids in (("the prompt", prompt), ("the tokens generated before", generated)):
            outside = np.flatnonzero((ids < 0) | (ids >= self._config.vocab_size))
            if len(outside):
                raise RequestInvalid(
                    f"token id {ids[outside[0]]} at position {outside[0]} of {what} is outside the vocabulary,"
                    f" [0, {self._config.vocab_size})"
                )
        if request_id in self._requests:
            raise RequestInvalid(f"request id {request_id!r} is being served already; ids must differ")
        ends = {*params.stop_token_ids, *self._config.eos_token_ids} if params.min_tokens else set()
        banned = np.array(sorted(token for token in ends if token < self._config.vocab_size), np.int32)
        if len(banned) == self._config.vocab_size:
            raise RequestInvalid(
                f"min_tokens is {params.min_tokens} and stop_token_ids names all {len(banned)} tokens there are;"
                " one must stay allowed"
            )
        if len(self._waiting) >= self._config.max_waiting and not is_admitted:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting; at most {self._config.max_waiting} may (max_waiting)"
            )
        assert params.seed is not None
        request = _Request(
            request_id=request_id,
            arrival=self._arrivals + 1,
            prompt=prompt,
            params=params,
            seed=params.seed,
            max_new_tokens=min(params.max_tokens, self._context - len(prompt)),
            stops=stop_ids(params, self._config.eos_token_ids),
            banned=banned,
            generated=generated.tolist(),
        )
        if len(generated) > request.max_new_tokens:
            raise RequestInvalid(
                f"{len(generated)} tokens were generated before; at most {request.max_new_tokens} may be in all"
            )
        ending = self._ending(request)
        if ending is None:
            self._arrivals += 1
            self._requests[request_id] = request
            self._waiting.append(request)
        return ending

    def abort(self, request_id: str) -> bool:
        """Forget a request in whatever state; False if it is unknown (it may have ended).

        Its pages are free at once, except those a step in flight writes: they, when that step is applied or dropped.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request in self._running:
            self._running.remove(request)
            self._free_pages(request)
        else:
            self._waiting.remove(request)
        return True

    def next_batch(self) -> Batch | None:
        """Decide the next step; None if there is nothing to compute. The one before was applied or dropped."""
        assert self._in_flight is None, "a step is in flight"
        plan = _StepPlan(budget=self._limits.max_num_batched_tokens)
        for decodes in (True, False):
            for request in tuple(self._running):
                if request.decodes == decodes and request not in plan.preempted:
                    self._plan(plan, request)
        while plan.budget and self._can_admit():  # never a request preempted above: fewer pages are free than it needs
            request = self._waiting.popleft()
            self._running.append(request)
            self._plan(plan, request)
        if not plan.rows:
            return None
        self._steps += 1
        self._in_flight = self._batch(plan)
        return self._in_flight

    def apply(self, batch: Batch, tokens: Sequence[SampledToken]) -> tuple[TokenEvent, ...]:
        """The step was computed; ``tokens`` as ``read_step`` gives them. Requests aborted meanwhile have no event.

        A request whose event has an ending is forgotten, and its pages are free.
        """
        chosen = iter(tokens)
        events = []
        for plan in batch._planned:
            token = next(chosen) if plan.samples else None
            request = plan.request
            if self._requests.get(request.request_id) is not request:  # aborted; its id may be in use again
                continue
            request.computed += plan.length
            if token is not None:
                events.append(self._advance(request, token))
        self.drop(batch)
        return tuple(events)

    def drop(self, batch: Batch) -> None:
        """The step will never be computed. Its requests stay as they were before it; abort those that cannot go on."""
        assert batch is self._in_flight, "this step is not in flight"
        self._in_flight = None
        self._pool.release(batch._held)

    def lose_pages(self) -> None:
        """The chip lost its memory: all requests wait, and their tokens so far will be computed again."""
        assert self._in_flight is None, "a step is in flight"
        while self._running:
            self._preempt_youngest()

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        self._pool.check_integrity()
        holders = [page for request in self._running for page in request.pages]
        assert len(holders) == len(set(holders)), "a page is owned twice"
        counts = Counter(holders + list(self._in_flight._held if self._in_flight else ()))
        for page in range(self._pool.num_pages):
            assert self._pool.references(page) == counts[page], f"page {page} is held by nobody known"
        assert sorted(map(id, [*self._running, *self._waiting])) == sorted(map(id, self._requests.values()))
        arrivals = [request.arrival for request in [*self._running, *self._waiting]]
        assert arrivals == sorted(arrivals), "a younger request overtook an older one"
        assert len(self._running) <= self._max_running
        for request in self._requests.values():
            assert request.computed < request.num_tokens <= self._context
            assert request.computed <= len(request.pages) * self._page_size
            assert request.block_table.tolist() == request.pages
        for request in self._waiting:
            assert not request.pages
            assert not request.computed

    def _plan(self, plan: _StepPlan, request: _Request) -> None:
        """Give a running request its tokens of this step, and the pages for them, at the cost of younger requests."""
        length = 1
        if not request.decodes:
            left = len(request.prompt) - request.computed
            length = min(left, self._config.prefill_chunk_tokens, plan.budget)
        if length and self._grow(plan, request, request.computed + length):
            plan.rows[request] = _Planned(request, request.computed, length)
            plan.budget -= length

    def _grow(self, plan: _StepPlan, request: _Request, num_tokens: int) -> bool:
        """Make the pages of ``request`` cover ``num_tokens``, preempting the youngest; False if that is itself."""
        missing = self._pages_for(num_tokens) - len(request.pages)
        if missing <= 0:
            return True
        while (pages := self._pool.allocate(missing, request.pages[-1] if request.pages else None)) is None:
            victim = self._preempt_youngest()
            plan.preempt(victim)
            if victim is request:
                return False
        request.pages += pages
        request.block_table = np.array(request.pages, np.int32)
        return True

    def _can_admit(self) -> bool:
        """Whether the oldest waiting request may run.

        Besides what running ones still need there must be pages for all of its tokens so far; otherwise it would soon
        be preempted, and its part of the work done twice.
        """
        if not self._waiting or len(self._running) >= self._max_running:
            return False
        promised = sum(self._pages_for(request.num_tokens) - len(request.pages) for request in self._running)
        return self._pages_for(self._waiting[0].num_tokens) <= self._pool.num_free - promised

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _preempt_youngest(self) -> _Request:
        victim = self._running.pop()
        self._free_pages(victim)
        self._waiting.appendleft(victim)
        return victim

    def _free_pages(self, request: _Request) -> None:
        self._pool.release(request.pages)
        request.pages = []
        request.block_table = _NO_IDS
        request.computed = 0

    def _advance(self, request: _Request, token: SampledToken) -> TokenEvent:
        """Take one more generated token, and end the request if it is the last."""
        request.generated.append(token.token_id)
        ending = self._ending(request)
        if ending is not None:
            self.abort(request.request_id)
        return TokenEvent(request.request_id, len(request.generated) - 1, token, ending)

    def _ending(self, request: _Request) -> Ending | None:
        """Why its last token is the last one; None if it is not."""
        if not request.generated:
            return None
        last = request.generated[-1]
        if last in request.stops and len(request.generated) > request.params.min_tokens:
            is_own_end = last in self._config.eos_token_ids and not request.params.ignore_eos
            return Ending("stop", None if is_own_end else last)
        return Ending("length") if len(request.generated) == request.max_new_tokens else None

    def _batch(self, plan: _StepPlan) -> Batch:
        """The decision as record and as chip input. Buffer rows are numbered in the order of the step's rows."""
        prefills, decodes, samples, record, held = [], [], [], [], []
        buffer_rows = itertools.count()
        for planned in plan.rows.values():
            request, start, end = planned.request, planned.start, planned.start + planned.length
            if request.decodes:
                row = next(buffer_rows)
                token = request.generated[start - len(request.prompt)]
                decodes.append(DecodeRow(token=token, position=start, block_table=request.block_table, row=row))
            else:
                row = next(buffer_rows) if planned.samples else -1
                tokens = request.prompt[start:end]
                prefills.append(PrefillRow(tokens=tokens, start=start, block_table=request.block_table, row=row))
            if planned.samples:
                samples.append(_sample_row(request, row))
            kind = RowKind.DECODE if request.decodes else RowKind.PREFILL
            record.append(BatchRow(request.request_id, kind, start, planned.length, planned.samples))
            held += request.pages[start // self._page_size : self._pages_for(end)]
        self._pool.share(held)
        return Batch(
            record=BatchRecord(self._steps, tuple(record), tuple(r.request_id for r in plan.preempted)),
            step=StepInput(
                step_id=self._steps, prefills=tuple(prefills), decodes=tuple(decodes), samples=tuple(samples)
            ),
            planned=tuple(plan.rows.values()),
            held=tuple(held),
        )


def _sample_row(request: _Request, row: int) -> SampleRow:
    params, index = request.params, len(request.generated)
    has_penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1)
    return SampleRow(
        row=row,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        uniform=uniform(request.seed, index) if params.temperature else 0.0,
        history=np.concatenate([request.prompt, np.array(request.generated, np.int32)]) if has_penalties else _NO_IDS,
        prompt_tokens=len(request.prompt) if has_penalties else 0,
        banned=request.banned if index < params.min_tokens else _NO_IDS,
        logprobs=params.logprobs,
    )
