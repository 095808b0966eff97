"""What a replica core computes next: continuous batching over paged KV memory. Pure policy: no clock, no bus, no chip.

Owns: the requests of one replica core, their order, and its ``PagePool``. Thread: the core's bus loop.

    add ──▶ waiting ──admit──▶ running ──apply──▶ finished
               ▲                  │
               └──── preempt ─────┘   the last in rank, when pages run out; its tokens are computed again later

Rank is priority, lower first, and then arrival. One step: first one token of every sequence that decodes, then chunks
of prompts in order of rank, then new requests. The first in rank of those running always gets its tokens and pages, so
among equal priorities every request ends.

A step may be decided while the one before it is computed. The token which that one will choose stands in it as a
placeholder that the chip fills in; who needs to know it (penalties count tokens) or has no further to come sits out.
While a step is in flight nobody is preempted: if pages run out, the next step is decided once that one has ended.

Prefix cache: a page filled with prompt tokens is found by other prompts that begin with the same tokens, from the
moment the step that fills it is decided. Whoever is to compute a prompt looks there first, at every step. So prompts
that are computed at the same time share, within one step too: who comes to a page first computes it, and who comes next
goes on behind it. Nobody waits for that, because a chip computes steps, and the rows of a step, in order. If a step is
dropped, what it was to fill is found no more, and who went on behind it is set back.

On a chip that is uniform pages with generated tokens are found, too, once their step was applied, and generated tokens
that have to be computed again are computed like a prompt.
"""

from __future__ import annotations

import bisect
import enum
import hashlib
import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ContextTooLong, Overloaded, RequestInvalid
from ..kernels.qwen3.step import (
    DecodeRow,
    Limits,
    PrefillRow,
    SampledToken,
    SampleRow,
    StepInput,
    chosen_token,
)
from .pages import PagePool, page_keys
from .sampling import SamplingParams

__all__ = [
    "DEPTH",
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
_UNIFORM = hashlib.blake2b(digest_size=8, person=b"chipbus.uniform")  # a copy of it takes half the time of a new one

DEPTH = 2
"""Steps in flight at once. A placeholder reaches one step back, so more would need more than one."""


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
    prefix_cache: bool = True
    """Whether prompts that begin alike share pages, at the same time or later."""

    def __attrs_post_init__(self) -> None:
        for name in ("prefill_chunk_tokens", "max_waiting", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


class RowKind(enum.StrEnum):
    """How a row is computed.

    Where ``Chip.is_uniform`` does not hold, a token keeps its kind for life: a generated one is decoded also when it is
    computed again after a preemption, so that the same program gives the same keys and values, bit by bit.
    """

    PREFILL = "prefill"  # tokens of the prompt, or that were generated before
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
    """Requests sent back to waiting before this step, last in rank first."""


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
    rank: tuple[int, int]  # priority, arrival: who comes first in everything
    prompt: Int32
    params: SamplingParams
    seed: int
    max_new_tokens: int  # max_tokens, or what the context leaves
    stops: frozenset[int]  # ids that end it
    banned: Int32  # ids not to be chosen before min_tokens
    generated: list[int]
    has_penalties: bool
    keys: list[bytes] = attrs.field(factory=list)  # of its first whole pages, as many as were wanted so far
    is_running: bool = False
    is_new: bool = True  # until it has to compute again what it had
    unknown: int = 0  # tokens that steps in flight choose, one each
    row: int = -1  # buffer row that its last token was chosen from
    num_prefill: int = 0  # leading tokens that are computed as a prompt; decided when it is admitted
    computed: int = 0  # leading tokens whose keys and values are in the pages, once the steps in flight have ended
    pages: list[int] = attrs.field(factory=list)
    block_table: Int32 = _NO_IDS  # the pages as an array; replaced, never changed, since steps in flight refer to it

    @property
    def num_generated(self) -> int:
        return len(self.generated) + self.unknown

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.generated) + self.unknown

    @property
    def can_go_on(self) -> bool:
        """Whether its next row can be decided now: no end is in sight, and nothing depends on a token not known yet."""
        return not self.unknown or (self.num_generated < self.max_new_tokens and not self.has_penalties)

    @property
    def decodes(self) -> bool:
        """Whether the next token to compute has a row of its own."""
        return self.computed >= self.num_prefill

    def tokens(self, start: int, end: int) -> Int32:
        """Those at positions ``start`` … ``end - 1``, all of them known."""
        begin = len(self.prompt)
        if end <= begin:
            return self.prompt[start:end]
        generated = np.array(self.generated[max(start - begin, 0) : end - begin], np.int32)
        return generated if start >= begin else np.concatenate([self.prompt[start:], generated])

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
    samples: bool
    row_before: int  # buffer row that the token before it was chosen from


@attrs.define(eq=False)
class _StepPlan:
    """The step being decided."""

    budget: int  # tokens it can still take
    rows: dict[_Request, _Planned] = attrs.field(factory=dict)
    preempted: list[_Request] = attrs.field(factory=list)
    is_short: bool = False  # of pages, while a step in flight holds some
    spare_pages: int | None = None  # free, and promised to nobody who runs; counted when somebody wants to be admitted

    def preempt(self, request: _Request) -> None:
        """Take a request out again; tokens planned for it return to the budget."""
        self.preempted.append(request)
        planned = self.rows.pop(request, None)
        self.budget += planned.length if planned else 0


def uniform(seed: int, token_index: int) -> float:
    """The random number in [0, 1) for one token: a pure function, so every replica and every replay draws the same.

    The top 53 bits of BLAKE2b-64 over seed and index, each 8 bytes little-endian, personalised "chipbus.uniform".
    """
    hasher = _UNIFORM.copy()
    hasher.update(struct.pack("<QQ", seed, token_index))
    return float((int.from_bytes(hasher.digest(), "little") >> 11) * 2.0**-53)


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

    The core calls ``next_batch``, has the step computed, and calls ``apply`` (or ``drop``, if it failed); up to
    ``DEPTH`` steps may be in flight, computed one after another.
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
        self._running: list[_Request] = []  # by rank
        self._waiting: list[_Request] = []  # by rank
        self._waiting_tokens = 0  # the pending tokens of these
        self._in_flight: list[Batch] = []  # in the order in which they are computed
        self._arrivals = 0
        self._steps = 0
        self.is_uniform = False
        """``Chip.is_uniform`` of the chip that computes the steps. Changed only while it holds no pages."""
        self.preemptions = 0
        """Requests sent back to waiting because pages ran out."""
        self.prefix_queries = 0
        """Prompt tokens of requests admitted for the first time."""
        self.prefix_hits = 0
        """Of these, found in the prefix cache, then or until they were computed."""

    @property
    def pages_total(self) -> int:
        """KV pages of the replica."""
        return self._pool.num_pages

    @property
    def pages_free(self) -> int:
        """KV pages no request holds; all of them when there is none. Some a step in flight may still write."""
        held = Counter(page for batch in self._in_flight for page in batch._held)
        return self._pool.num_free + sum(self._pool.references(page) == count for page, count in held.items())

    @property
    def pages_cached(self) -> int:
        """Of the free pages, those that hold the beginning of a prompt."""
        return self._pool.num_idle

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
        return self._waiting_tokens + sum(request.pending_tokens for request in self._running)

    def add(
        self,
        request_id: str,
        prompt: Int32,
        params: SamplingParams,
        generated: Int32 = _NO_IDS,
        *,
        priority: int = 0,
        is_admitted: bool = False,
    ) -> Ending | None:
        """Queue a request. Nothing is kept if it raises, nor if it turns out to have ended already.

        prompt: (tokens,) int32, ids in [0, vocab_size). ``params.seed`` is resolved, never None.
        generated: (tokens,) int32, tokens of its answer that an earlier life has delivered; it goes on behind them.
        priority: lower goes first; equal ones in order of arrival.
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
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._config.vocab_size:
                outside = np.flatnonzero((ids < 0) | (ids >= self._config.vocab_size))
                raise RequestInvalid(
                    f"token id {ids[outside[0]]} at position {outside[0]} of {what} is outside the vocabulary,"
                    f" [0, {self._config.vocab_size})"
                )
        if request_id in self._requests:
            raise RequestInvalid(f"request id {request_id!r} is being served already; ids must differ")
        banned = _NO_IDS
        if params.min_tokens:
            ends = {*params.stop_token_ids, *self._config.eos_token_ids}
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
            rank=(priority, self._arrivals + 1),
            prompt=prompt,
            params=params,
            seed=params.seed,
            max_new_tokens=min(params.max_tokens, self._context - len(prompt)),
            stops=stop_ids(params, self._config.eos_token_ids),
            banned=banned,
            generated=generated.tolist(),
            has_penalties=(params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1),
        )
        if len(generated) > request.max_new_tokens:
            raise RequestInvalid(
                f"{len(generated)} tokens were generated before; at most {request.max_new_tokens} may be in all"
            )
        ending = self._ending(request)
        if ending is None:
            self._arrivals += 1
            self._requests[request_id] = request
            self._wait(request)
        return ending

    def abort(self, request_id: str) -> bool:
        """Forget a request in whatever state; False if it is unknown (it may have ended).

        Its pages are free at once. Those a step in flight writes are given out again when it is applied or dropped.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.is_running:
            _remove(self._running, request)
            self._free_pages(request)
        else:
            _remove(self._waiting, request)
            self._waiting_tokens -= request.pending_tokens
        return True

    def next_batch(self) -> Batch | None:
        """Decide the next step; None if there is nothing to compute, or nothing before a step in flight has ended."""
        assert len(self._in_flight) < DEPTH, f"{len(self._in_flight)} steps are in flight"
        plan = _StepPlan(budget=self._limits.max_num_batched_tokens)
        going_on = [request for request in self._running if request.can_go_on]
        prompts = [request for request in going_on if not request.decodes]
        for request in itertools.chain((r for r in going_on if r.decodes) if prompts else going_on, prompts):
            if request.is_running:  # not preempted for one before it
                self._plan(plan, request)
        if plan.is_short:
            self._withdraw(itertools.chain.from_iterable(map(self._filled, plan.rows.values())))
            return None
        while plan.budget and not plan.preempted and (admitted := self._admit(plan)) is not None:
            self._plan(plan, admitted)
        self.preemptions += len(plan.preempted)
        if not plan.rows:
            return None
        self._steps += 1
        batch = self._batch(plan)
        self._in_flight.append(batch)
        return batch

    def apply(self, batch: Batch, tokens: Sequence[SampledToken]) -> tuple[TokenEvent, ...]:
        """The oldest step was computed; ``tokens`` as ``read_step`` gives them. Who was aborted meanwhile has no event.

        A request whose event has an ending is forgotten, and its pages are free.
        """
        assert batch is self._in_flight[0], "this step is not the oldest in flight"
        chosen = iter(tokens)
        events = []
        for plan in batch._planned:
            token = next(chosen) if plan.samples else None
            request = plan.request
            is_live = self._requests.get(request.request_id) is request  # not aborted; its id may be in use again
            if is_live and self.is_uniform and plan.start >= request.num_prefill:
                self._enter_answer(request, plan.start + plan.length)
            if is_live and token is not None:
                events.append(self._advance(request, token))
        self._forget(batch)
        return tuple(events)

    def drop(self, batch: Batch) -> None:
        """The step will never be computed, or does not count. Its requests are again as they were before it.

        Those that cannot go on must have been aborted. Steps behind it went on from what it would have left: they must
        be dropped too, before or after it, and none be decided until they are.
        """
        for plan in batch._planned:
            request, start = plan.request, plan.start
            if self._requests.get(request.request_id) is request:
                request.unknown -= plan.samples
                request.row = plan.row_before
                # The page a prompt's row began in the middle of may have been given up since for one that is found.
                self._set_back(request, start if start >= request.num_prefill else start - start % self._page_size)
        self._withdraw(batch._held)
        self._forget(batch)

    def _forget(self, batch: Batch) -> None:
        self._in_flight.remove(batch)
        self._pool.release(batch._held)

    def lose_pages(self) -> None:
        """The chip lost its memory: all requests wait, and their tokens so far will be computed again."""
        assert not self._in_flight, "a step is in flight"
        while self._running:
            self._preempt_last()
        self._pool.forget()

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        self._pool.check_integrity()
        assert sorted(map(id, [*self._running, *self._waiting])) == sorted(map(id, self._requests.values()))
        for requests in (self._running, self._waiting):
            ranks = [request.rank for request in requests]
            assert ranks == sorted(set(ranks)), "a request is out of its place"
            assert all(request.is_running == (requests is self._running) for request in requests)
        assert len(self._running) <= self._max_running
        for request in self._requests.values():
            assert request.computed < request.num_tokens <= self._context
            assert request.computed <= len(request.pages) * self._page_size
            assert request.block_table.tolist() == request.pages
            choosing = [p for batch in self._in_flight for p in batch._planned if p.request is request and p.samples]
            assert request.unknown == len(choosing)
            assert request.num_generated <= request.max_new_tokens
        for request in self._waiting:
            assert not request.pages
            assert not request.computed
            assert not request.unknown
        assert self._waiting_tokens == sum(request.pending_tokens for request in self._waiting)
        self._check_pages()

    def _check_pages(self) -> None:
        """Every reference has its holder, and only pages that nobody writes any more are shared."""
        holders = Counter(page for request in self._running for page in request.pages)
        held = Counter(page for batch in self._in_flight for page in batch._held)
        assert self.pages_free == self._pool.num_pages - len(holders), "a page is held by no request and not free"
        for page in range(self._pool.num_pages):
            assert self._pool.references(page) == holders[page] + held[page], f"page {page} is held by nobody known"
            assert holders[page] <= 1 or self._pool.key(page) is not None, f"page {page} is owned twice"
        for request in self._running:
            for position, page in enumerate(request.pages):
                key = self._pool.key(page)
                assert key is None or request.keys[position : position + 1] == [key], f"page {page} holds other tokens"
                assert key is None or (position + 1) * self._page_size <= request.computed
        written: list[tuple[int, int]] = []  # page and offset
        for batch in self._in_flight:
            step = batch.step
            spans = [(row.block_table, row.start, row.start + len(row.tokens)) for row in step.prefills]
            spans += [(row.block_table, row.position, row.position + 1) for row in step.decodes]
            slots = [
                (table[at // self._page_size], at % self._page_size)
                for table, begin, end in spans
                for at in range(begin, end)
            ]
            assert len(slots) == len(set(slots)) <= self._limits.max_num_batched_tokens
            assert {page for page, _ in slots} == set(batch._held), "a step writes a page that is not kept for it"
            assert len(batch._held) == len(set(batch._held)), "two rows write to one page"
            written += slots
        assert len(written) == len(set(written)), "a step writes what another one does"
        full = {page for page, offset in written if offset == self._page_size - 1}
        assert all(page in full for page in held if self._pool.key(page) is not None), "a step writes a full page"

    def _plan(self, plan: _StepPlan, request: _Request) -> None:
        """Give a running request its tokens of this step, and the pages for them, at the cost of those behind it."""
        is_prompt, length = not request.decodes, 1
        if is_prompt:
            self._take_over(request, self._find(request))
            left = request.num_prefill - request.computed
            length = min(left, self._config.prefill_chunk_tokens, plan.budget)
        end = request.computed + length
        if length and (end <= len(request.pages) * self._page_size or self._grow(plan, request, end)):
            samples = end == request.num_tokens
            plan.rows[request] = row = _Planned(request, request.computed, length, samples, request.row)
            plan.budget -= length
            if is_prompt:
                first, filled = row.start // self._page_size, self._filled(row)
                for page, key in zip(filled, self._keys(request, first + len(filled))[first:], strict=False):
                    self._pool.enter(page, key)

    def _grow(self, plan: _StepPlan, request: _Request, num_tokens: int) -> bool:
        """Make the pages of ``request`` cover ``num_tokens``, preempting from the last; False if it gets none now."""
        missing = self._pages_for(num_tokens) - len(request.pages)
        while (pages := self._pool.allocate(missing, request.pages[-1] if request.pages else None)) is None:
            if self._in_flight:
                plan.is_short = True
                return False
            victim = self._preempt_last()
            plan.preempt(victim)
            if victim is request:
                return False
        request.pages += pages
        request.block_table = np.array(request.pages, np.int32)
        return True

    def _admit(self, plan: _StepPlan) -> _Request | None:
        """Let the first waiting request run, with those of its first pages that are there; None if it may not yet.

        Besides what running ones still need there must be pages for all of its tokens so far; otherwise it would soon
        be preempted, and its part of the work done twice.
        """
        if not self._waiting or len(self._running) >= self._max_running:
            return None
        request = self._waiting[0]
        request.num_prefill = request.num_tokens if self.is_uniform else len(request.prompt)
        found = self._find(request)
        shared = sum(self._pool.references(page) > 0 for page in found)  # these are not among the free ones
        if plan.spare_pages is None:
            promised = sum(self._pages_for(other.num_tokens) - len(other.pages) for other in self._running)
            plan.spare_pages = self._pool.num_free - promised
        needed = self._pages_for(request.num_tokens) - shared
        if needed > plan.spare_pages:
            return None
        plan.spare_pages -= needed
        del self._waiting[0]
        self._waiting_tokens -= request.pending_tokens
        _insert(self._running, request)
        request.is_running = True
        if request.is_new:
            self.prefix_queries += len(request.prompt)
        self._take_over(request, found)
        return request

    def _find(self, request: _Request) -> list[int]:
        """The pages with what it goes on with. One token at least is left to compute as a prompt, for its logits."""
        first, last = request.computed // self._page_size, (request.num_prefill - 1) // self._page_size
        return self._pool.find(self._keys(request, last)[first:])

    def _keys(self, request: _Request, num_pages: int) -> Sequence[bytes]:
        """Of its first pages, all of whose tokens are known; none if nothing is to be shared."""
        if not self._config.prefix_cache:
            return ()
        keys = request.keys
        if len(keys) < num_pages:
            tokens = request.tokens(len(keys) * self._page_size, num_pages * self._page_size)
            keys += page_keys(tokens, self._page_size, keys[-1] if keys else b"")
        return keys[:num_pages]

    def _take_over(self, request: _Request, found: list[int]) -> None:
        """Go on behind pages that others have filled, or that rows fill which are computed before its next one."""
        if not found:
            return
        first = request.computed // self._page_size
        last = first + len(found)
        self._pool.share(found)
        self._pool.release(request.pages[first:last])  # what it has not filled
        request.pages[first:last] = found
        request.block_table = np.array(request.pages, np.int32)
        if request.is_new:
            end = len(request.prompt)
            self.prefix_hits += min(last * self._page_size, end) - min(request.computed, end)
        request.computed = last * self._page_size

    def _enter_answer(self, request: _Request, end: int) -> None:
        """If the generated token before position ``end`` has filled up a page, let later prompts find it."""
        num_pages, rest = divmod(end, self._page_size)
        if not rest and (keys := self._keys(request, num_pages)):
            self._pool.enter(request.pages[num_pages - 1], keys[-1])

    def _filled(self, row: _Planned) -> list[int]:
        """The pages that a row of the step being decided fills up."""
        return row.request.pages[row.start // self._page_size : (row.start + row.length) // self._page_size]

    def _withdraw(self, pages: Iterable[int]) -> None:
        """What these pages are found by they will not hold: set back all who went on behind one of them."""
        withdrawn = self._pool.withdraw(pages)
        for request in self._running if withdrawn else ():
            behind = request.pages[: request.computed // self._page_size]
            first = next((position for position, page in enumerate(behind) if page in withdrawn), None)
            if first is not None:
                self._set_back(request, first * self._page_size)

    def _set_back(self, request: _Request, num_tokens: int) -> None:
        """Of a running request only the first ``num_tokens`` tokens, if there are more, are computed after all."""
        request.computed = min(request.computed, num_tokens)
        kept = self._pages_for(request.computed)
        self._pool.release(request.pages[kept:])
        del request.pages[kept:]
        request.block_table = np.array(request.pages, np.int32)
        request.is_new = False

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _preempt_last(self) -> _Request:
        victim = self._running.pop()
        self._free_pages(victim)
        self._wait(victim)
        return victim

    def _wait(self, request: _Request) -> None:
        _insert(self._waiting, request)
        self._waiting_tokens += request.pending_tokens

    def _free_pages(self, request: _Request) -> None:
        self._pool.release(request.pages)
        request.pages = []
        request.block_table = _NO_IDS
        request.computed = 0
        request.is_running = request.is_new = False

    def _advance(self, request: _Request, token: SampledToken) -> TokenEvent:
        """Take one more generated token, and end the request if it is the last."""
        request.generated.append(token.token_id)
        request.unknown -= 1
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
        """The decision as record and as chip input. Buffer rows are numbered in the order of the step's rows.

        From here on the requests count as computed so far.
        """
        prefills, decodes, samples, record, held = [], [], [], [], []
        buffer_rows = itertools.count()
        for planned in plan.rows.values():
            request, start, end = planned.request, planned.start, planned.start + planned.length
            kind = RowKind.DECODE if request.decodes else RowKind.PREFILL
            if kind is RowKind.DECODE:
                row, index = next(buffer_rows), start - len(request.prompt)
                is_known = index < len(request.generated)
                token = request.generated[index] if is_known else chosen_token(request.row)
                decodes.append(DecodeRow(token=token, position=start, block_table=request.block_table, row=row))
            else:
                row = next(buffer_rows) if planned.samples else -1
                tokens = request.tokens(start, end)
                prefills.append(PrefillRow(tokens=tokens, start=start, block_table=request.block_table, row=row))
            if planned.samples:
                samples.append(_sample_row(request, row))
                request.unknown, request.row = request.unknown + 1, row
            request.computed = end
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


def _rank(request: _Request) -> tuple[int, int]:
    return request.rank


def _insert(requests: list[_Request], request: _Request) -> None:
    """Where its rank puts it."""
    bisect.insort(requests, request, key=_rank)


def _remove(requests: list[_Request], request: _Request) -> None:
    del requests[bisect.bisect_left(requests, request.rank, key=_rank)]


def _sample_row(request: _Request, row: int) -> SampleRow:
    params, index, has_penalties = request.params, request.num_generated, request.has_penalties
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
