"""Scheduler on a null chip, which checks that each row reads exactly the context it continues."""

from __future__ import annotations

import contextlib
import hashlib
import itertools

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.actors.sampling import SamplingParams
from chipbus.actors.scheduler import DEPTH, Batch, BatchRow, Scheduler, SchedulerConfig, TokenEvent, uniform
from chipbus.errors import ContextTooLong, KernelError, Overloaded, RequestInvalid
from chipbus.kernels.dispatch import Completion
from chipbus.kernels.null import NullChip, null_token
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import Limits, ModelPrograms, SampledToken, build_step, chosen_token, read_step

VOCAB = 64
EOS = (3, 5)


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "seed": 1, "max_tokens": 5} | fields))  # type: ignore[arg-type]


def config(*, prefix_cache: bool = True, **changes: int) -> SchedulerConfig:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 40, "page_size": 4, "num_pages": 20}
    others = {"prefill_chunk_tokens": 8, "max_waiting": 50}
    return SchedulerConfig(
        limits=Limits(**{name: changes.get(name, size) for name, size in sizes.items()}),
        vocab_size=VOCAB,
        eos_token_ids=EOS,
        prefix_cache=prefix_cache,
        **{name: changes.get(name, size) for name, size in others.items()},
    )


def prompt(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


class Core:
    """A replica core in miniature: scheduler and null chip, integrity checked after every move."""

    def __init__(self, *, is_uniform: bool = False, **changes: int) -> None:
        self.config = config(**changes)
        self.scheduler = Scheduler(self.config)
        self.scheduler.is_uniform = is_uniform
        spec = ModelSpec(
            path="none", dtype="float32", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=1,
            num_heads=2, num_kv_heads=1, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True,
            attention_bias=False, max_context=4096, eos_token_ids=EOS, fingerprint="",
        )  # fmt: skip
        self.programs = ModelPrograms.build(spec, self.config.limits)
        self.chip = NullChip()
        for tensor in self.programs.tensors:
            self.chip.alloc(tensor)
        for program in self.programs.programs:
            self.chip.register(program)
        self.depth = 1  # steps in flight while it runs
        self.in_flight: list[Batch] = []
        self.dispatch_ids = itertools.count(1, 10)
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, tuple[str, int | None]] = {}
        self.batches: list[Batch] = []

    def add(
        self,
        request_id: str,
        ids: np.ndarray,
        params_: SamplingParams | None = None,
        priority: int = 0,
        generated: list[int] | None = None,
    ) -> None:
        had = generated or []
        self.scheduler.add(request_id, ids, params_ or params(), np.array(had, np.int32), priority=priority)
        self.tokens[request_id] = list(had)
        self.scheduler.check_integrity()

    def begin(self) -> Batch | None:
        ran = {request.request_id for request in self.scheduler._running}
        batch = self.scheduler.next_batch()
        self.scheduler.check_integrity()
        if batch is not None:
            assert not batch.record.preempted or ran >= {row.request_id for row in batch.record.rows}
            assert ran >= set(batch.record.preempted), "admitted only to be preempted"
            assert not batch.record.preempted or not self.in_flight, "preempted while a step writes its pages"
            self.batches.append(batch)
            self.in_flight.append(batch)
            self.check(batch)
        return batch

    def compute(self, batch: Batch) -> list[Completion]:
        dispatches = build_step(self.programs, batch.step, next(self.dispatch_ids))
        return [self.chip.launch(dispatch) for dispatch in dispatches]

    def drop(self, batch: Batch) -> None:
        self.in_flight.remove(batch)
        self.scheduler.drop(batch)
        self.scheduler.check_integrity()

    def end(self, batch: Batch) -> tuple[TokenEvent, ...]:
        self.in_flight.remove(batch)
        events = self.scheduler.apply(batch, read_step(batch.step, self.compute(batch)))
        self.scheduler.check_integrity()
        for event in events:
            assert event.request_id not in self.ends
            assert event.token_index == len(self.tokens[event.request_id])
            self.tokens[event.request_id].append(event.token.token_id)
            if event.ending:
                self.ends[event.request_id] = (event.ending.finish_reason, event.ending.stop_token_id)
        return events

    def step(self) -> Batch | None:
        """Begin as many as may be in flight, and end the oldest; None if there is nothing to do."""
        while len(self.in_flight) < self.depth and self.begin() is not None:
            pass
        batch = self.in_flight[0] if self.in_flight else None
        if batch is not None:
            self.end(batch)
        return batch

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if self.step() is None:
                assert self.scheduler.num_running == self.scheduler.num_waiting == 0
                assert self.scheduler.pages_free == self.scheduler.pages_total
                assert self.scheduler.pending_tokens == 0
                return
        raise AssertionError(f"requests are left after {limit} steps")

    def computed(self, request_id: str) -> list[tuple[str, int, int]]:
        """Every row of a request: kind, start, length."""
        rows = [row for batch in self.batches for row in batch.record.rows if row.request_id == request_id]
        return [(str(row.kind), row.start, row.length) for row in rows]

    def check(self, batch: Batch) -> None:
        """The record and the chip input say the same, within all limits."""
        limits = self.config.limits
        rows = batch.record.rows
        assert sum(row.length for row in rows) <= limits.max_num_batched_tokens
        assert len({row.request_id for row in rows}) == len(rows) <= limits.max_num_seqs
        assert all(row.length <= self.config.prefill_chunk_tokens for row in rows if row.kind == "prefill")
        decodes = [row for row in rows if row.kind == "decode"]
        assert [row.start for row in decodes] == [row.position for row in batch.step.decodes]
        prefills = [(row.start, row.length) for row in rows if row.kind == "prefill"]
        assert prefills == [(row.start, len(row.tokens)) for row in batch.step.prefills]
        assert len(batch.step.samples) == sum(row.samples for row in rows)
        assert batch.record.step_id == batch.step.step_id
        used = {row.request_id: row.length for row in rows}
        starts = {row.request_id: row.start for row in rows if row.kind == "prefill"}
        for request in self.scheduler._running:
            if (start := starts.get(request.request_id)) is not None:
                first = start // limits.page_size
                keys = request.keys[first : min(request.computed, request.num_prefill - 1) // limits.page_size][:1]
                own = request.pages[first : first + len(keys)]
                assert self.scheduler._pool.find(keys) == own, "a page is computed that was there to be found"
            left = request.num_prefill - request.computed  # behind this step
            if left > 0 and used.get(request.request_id, 0) < self.config.prefill_chunk_tokens:
                assert sum(used.values()) == limits.max_num_batched_tokens, "tokens were left over"


def expected(ids: np.ndarray, params_: SamplingParams, context: int = 40) -> tuple[list[int], tuple[str, int | None]]:
    """What a null chip generates for one request alone, from the definition of every setting."""
    ends = set(params_.stop_token_ids) | set(() if params_.ignore_eos else EOS)
    forbidden = set(params_.stop_token_ids) | set(EOS)
    out: list[int] = []
    while True:
        before = [*ids.tolist(), *out]
        token = null_token(before[-1], len(before) - 1, VOCAB)
        while len(out) < params_.min_tokens and token in forbidden:
            token = (token + 1) % VOCAB
        out.append(token)
        if token in ends and len(out) > params_.min_tokens:
            return out, ("stop", None if token in EOS and not params_.ignore_eos else token)
        if len(out) == params_.max_tokens or len(before) + 1 == context:
            return out, ("length", None)


def test_decodes_come_first_and_chunks_of_a_long_prompt_fill_the_step():
    core = Core()
    core.add("a", prompt(20, 21, 22))
    core.step()
    core.add("b", prompt(*range(16, 46)), params(max_tokens=1))
    core.add("c", prompt(30, 31))
    rows = [core.step().record.rows for _ in range(4)]
    assert rows[0] == (
        BatchRow("a", "decode", 3, 1, True),
        BatchRow("b", "prefill", 0, 8, False),
        BatchRow("c", "prefill", 0, 2, True),
    )
    assert rows[1] == (
        BatchRow("a", "decode", 4, 1, True),
        BatchRow("c", "decode", 2, 1, True),
        BatchRow("b", "prefill", 8, 8, False),
    )
    assert rows[3][-1] == BatchRow("b", "prefill", 24, 6, True)


@pytest.mark.guarantee("R1")
def test_a_long_prompt_does_not_stop_decode_and_decode_does_not_starve_a_prompt():
    core = Core(max_num_seqs=4, max_num_batched_tokens=4, max_model_len=80, num_pages=80)
    for name in "abc":
        core.add(name, prompt(20), params(max_tokens=60))
    for _ in range(3):
        core.step()
    core.add("long", prompt(*[16] * 30), params(max_tokens=1))
    steps = 0
    while "long" not in core.ends:
        rows = core.step().record.rows
        steps += 1
        assert [row.request_id for row in rows] == ["a", "b", "c", "long"]
        assert [row.kind for row in rows] == ["decode"] * 3 + ["prefill"]
    assert steps == 30


@pytest.mark.guarantee("R8")
@pytest.mark.parametrize("depth", range(1, DEPTH + 1))
def test_when_pages_run_out_the_youngest_waits_and_its_tokens_do_not_change(depth):
    core = Core(num_pages=6, max_model_len=24)
    core.depth = depth
    requests = {name: (prompt(20 + i, 21 + i, 22), params(max_tokens=12)) for i, name in enumerate("abc")}
    for name, (ids, params_) in requests.items():
        core.add(name, ids, params_)
    core.run()
    preempted = [name for batch in core.batches for name in batch.record.preempted]
    assert preempted
    assert "a" not in preempted, "the oldest is never preempted"
    for name, (ids, params_) in requests.items():
        assert (core.tokens[name], core.ends[name]) == expected(ids, params_, 24)


@pytest.mark.guarantee("R7")
def test_a_generated_token_stays_a_decode_row_when_it_is_computed_again():
    core = Core(num_pages=4, max_model_len=16, max_num_seqs=2)
    for name in "ab":
        core.add(name, prompt(20, 21, 22, 23, 24), params(max_tokens=8))
    core.run()
    assert any(batch.record.preempted == ("b",) for batch in core.batches)
    rows = [row for batch in core.batches for row in batch.record.rows if row.request_id == "b"]
    assert all(row.start + row.length <= 5 for row in rows if row.kind == "prefill")
    assert all(row.start >= 5 for row in rows if row.kind == "decode")
    again = [row.start for row in rows if row.kind == "decode" and not row.samples]
    assert again, "tokens generated before the preemption are computed, not chosen, again"


@pytest.mark.guarantee("R74")
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_on_a_uniform_chip_generated_tokens_are_computed_again_in_chunks(prefix_cache):
    core = Core(num_pages=4, max_model_len=16, max_num_seqs=2, is_uniform=True, prefix_cache=prefix_cache)
    ids = {"a": prompt(20, 21, 22, 23, 24), "b": prompt(30, 31, 32, 33, 34)}
    for name in "ab":
        core.add(name, ids[name], params(max_tokens=8))
    core.run()
    assert any(batch.record.preempted == ("b",) for batch in core.batches)
    rows = [row for batch in core.batches for row in batch.record.rows if row.request_id == "b"]
    assert all(row.samples for row in rows if row.kind == "decode"), "a row of its own has only a token that is new"
    again = [row for row in rows[1:] if row.kind == "prefill"]
    assert again[0].start == (4 if prefix_cache else 0)
    assert again[-1].start + again[-1].length > 5, "tokens that were generated are in a chunk"
    for name in "ab":
        assert (core.tokens[name], core.ends[name]) == expected(ids[name], params(max_tokens=8), 16)


@pytest.mark.parametrize("is_uniform", [True, False])
def test_a_request_of_an_earlier_life_goes_on_behind_its_tokens(is_uniform):
    core, ids = Core(is_uniform=is_uniform), prompt(20, 21, 22)
    tokens, end = expected(ids, params(max_tokens=20, ignore_eos=True))
    core.add("a", ids, params(max_tokens=20, ignore_eos=True), generated=tokens[:13])
    core.run()
    assert (core.tokens["a"], core.ends["a"]) == (tokens, end)
    chunks = [("prefill", 0, 8), ("prefill", 8, 8)] if is_uniform else [("prefill", 0, 3), ("decode", 3, 1)]
    assert core.computed("a")[:2] == chunks
    assert core.scheduler.prefix_queries == 3


def test_a_request_is_admitted_only_if_its_prompt_fits_beside_what_running_ones_still_need():
    core = Core(num_pages=5, prefill_chunk_tokens=4)
    for name, first in (("a", 20), ("b", 40)):
        core.add(name, prompt(*range(first, first + 12)), params(max_tokens=1))
    core.run()
    assert [row.request_id for batch in core.batches for row in batch.record.rows] == ["a"] * 3 + ["b"] * 3


def test_after_a_preemption_nothing_is_admitted_in_the_same_step():
    core = Core(num_pages=6, max_model_len=24)
    for name in "abcd":
        core.add(name, prompt(20, 21, 22), params(max_tokens=12))
    core.run()
    running: set[str] = set()
    for batch in core.batches:
        now = {row.request_id for row in batch.record.rows}
        if batch.record.preempted:
            assert now <= running
        running = now


@pytest.mark.guarantee("R3")
@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"max_tokens": 3}, ("length", None)),
        ({"max_tokens": 1000}, ("length", None)),
        ({"stop_token_ids": (45,)}, ("stop", 45)),
        ({"stop_token_ids": (3, 45)}, ("stop", 45)),
        ({"stop_token_ids": (45,), "min_tokens": 5}, ("length", None)),
    ],
)
def test_a_request_ends_at_its_limit_or_at_a_stop_id(fields, end):
    ids = prompt(20, 21)
    first = null_token(21, 1, VOCAB)
    second = null_token(first, 2, VOCAB)
    fields = {
        k: tuple(second if v == 45 else v for v in vs) if isinstance(vs, tuple) else vs for k, vs in fields.items()
    }
    end = (end[0], second if end[1] == 45 else end[1])
    core = Core()
    core.add("a", ids, params(**fields))
    core.run()
    assert (core.tokens["a"], core.ends["a"]) == expected(ids, params(**fields))
    assert core.ends["a"] == end


def scripted(params_: SamplingParams, tokens: list[int]) -> tuple[list[int], tuple[str, int | None], list[list[int]]]:
    """Feed given tokens to one request; its tokens, its end, and the ids forbidden at each of its tokens."""
    scheduler = Scheduler(config())
    scheduler.add("a", prompt(20), params_)
    out, banned = [], []
    for token in tokens:
        batch = scheduler.next_batch()
        banned.append(batch.step.samples[0].banned.tolist())
        (event,) = scheduler.apply(batch, [SampledToken(token)])
        out.append(event.token.token_id)
        if event.ending:
            assert scheduler.pages_free == scheduler.pages_total
            return out, (event.ending.finish_reason, event.ending.stop_token_id), banned
    raise AssertionError("not ended")


def test_the_models_own_end_has_no_stop_id_and_can_be_ignored():
    assert scripted(params(), [20, 5, 20])[:2] == ([20, 5], ("stop", None))
    assert scripted(params(stop_token_ids=(5,)), [20, 5])[:2] == ([20, 5], ("stop", None))
    assert scripted(params(ignore_eos=True, max_tokens=3), [20, 5, 3])[:2] == ([20, 5, 3], ("length", None))
    assert scripted(params(ignore_eos=True, stop_token_ids=(5,)), [3, 5])[:2] == ([3, 5], ("stop", 5))


@pytest.mark.guarantee("R9")
def test_before_min_tokens_no_end_is_chosen_nor_obeyed():
    out, end, banned = scripted(params(min_tokens=2, stop_token_ids=(9, 10**6)), [20, 5, 9])
    assert (out, end) == ([20, 5, 9], ("stop", 9))
    assert banned == [[3, 5, 9], [3, 5, 9], []]


def test_the_context_limit_ends_a_request_with_length_also_where_the_pages_set_it():
    for changes, total in (({"max_model_len": 10}, 10), ({"num_pages": 2, "max_model_len": 40}, 8)):
        core = Core(**changes)
        core.add("a", prompt(20, 21, 22), params(max_tokens=1000))
        core.run()
        assert core.ends["a"] == ("length", None)
        assert len(core.tokens["a"]) == total - 3


@pytest.mark.guarantee("R4")
@pytest.mark.parametrize(
    ("ids", "changes", "error", "says"),
    [
        ([], {}, RequestInvalid, "the prompt is empty"),
        (
            [20, 64, 65],
            {},
            RequestInvalid,
            "token id 64 at position 1 of the prompt is outside the vocabulary, [0, 64)",
        ),
        ([-1], {}, RequestInvalid, "token id -1 at position 0"),
        ([20] * 40, {}, ContextTooLong, "the prompt has 40 tokens; with max_model_len 40 it may have at most 39"),
        ([20] * 9, {"num_pages": 2}, ContextTooLong, "9 tokens; 2 KV pages of 4 tokens hold a context of 8, so it may"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_its_numbers(ids, changes, error, says):
    core = Core(**changes)
    with pytest.raises(error) as caught:
        core.add("a", prompt(*ids))
    assert type(caught.value) is error
    assert says in str(caught.value)
    assert core.step() is None


@pytest.mark.guarantee("R13")
def test_a_full_queue_refuses_and_keeps_what_it_has():
    core = Core(max_waiting=2)
    core.add("a", prompt(20))
    core.add("b", prompt(20))
    with pytest.raises(Overloaded, match=r"2 requests are waiting; at most 2 may \(max_waiting\)"):
        core.add("c", prompt(20))
    with pytest.raises(RequestInvalid, match="request id 'a' is being served already"):
        core.add("a", prompt(20))
    core.run()
    assert set(core.ends) == {"a", "b"}


def test_forbidding_every_token_is_refused():
    with pytest.raises(RequestInvalid, match="names all 64 tokens"):
        Core().add("a", prompt(20), params(min_tokens=1, stop_token_ids=tuple(range(64))))


@pytest.mark.guarantee("R5")
def test_pages_of_an_aborted_request_stay_taken_while_a_step_writes_them():
    core = Core(num_pages=2, max_model_len=8)
    core.add("a", prompt(20, 21, 22, 23, 24))
    batch = core.begin()
    assert core.scheduler.abort("a")
    core.scheduler.check_integrity()
    assert (core.scheduler.pages_free, core.scheduler._pool.num_free) == (2, 0)
    core.add("b", prompt(20))
    assert core.begin() is None, "no page can be given to another request"
    assert core.end(batch) == ()
    assert core.scheduler._pool.num_free == 2
    assert [row.request_id for row in core.begin().record.rows] == ["b"]
    assert not core.scheduler.abort("a")


def test_an_id_may_be_used_again_while_the_step_of_an_aborted_request_is_in_flight():
    core = Core()
    core.add("a", prompt(20, 21))
    batch = core.begin()
    core.scheduler.abort("a")
    core.add("a", prompt(30))
    assert core.end(batch) == ()
    core.run()
    assert core.tokens["a"] == expected(prompt(30), params())[0]


def test_a_dropped_step_is_decided_again():
    core = Core()
    core.add("a", prompt(20, 21))
    first = core.begin()
    core.drop(first)
    again = core.step()
    assert again.record == attrs.evolve(first.record, step_id=2)
    core.run()
    assert core.tokens["a"] == expected(prompt(20, 21), params())[0]


def test_a_step_decided_again_goes_on_from_the_row_that_the_step_in_flight_chooses_for():
    core = Core()
    core.add("x", prompt(20), params(max_tokens=2))
    core.step()
    core.add("a", prompt(21, 22))
    first, second = core.begin(), core.begin()
    assert [[row.row for row in batch.step.samples] for batch in (first, second)] == [[0, 1], [0]]
    core.drop(second)
    assert [row.token for row in core.begin().step.decodes] == [chosen_token(1)]
    core.run()
    assert core.tokens["a"] == expected(prompt(21, 22), params())[0]


def test_load_counts_prompt_tokens_to_compute_and_tokens_to_come():
    core = Core()
    core.add("a", prompt(*range(20, 30)), params(max_tokens=7))
    core.add("b", prompt(20), params(max_tokens=1000))
    assert core.scheduler.pending_tokens == (10 + 7) + (1 + 39)
    core.step()  # 8 of a's prompt, and b's prompt with its first token
    assert core.scheduler.pending_tokens == (2 + 7) + 38
    core.step()
    assert core.scheduler.pending_tokens == 6 + 37


def test_fewer_tokens_per_step_than_sequences_runs_fewer_at_once():
    core = Core(max_num_batched_tokens=2, max_num_seqs=4)
    for name in "abcd":
        core.add(name, prompt(20, 21, 22))
    core.run()
    assert set(core.ends) == set("abcd")


@pytest.mark.guarantee("R6")
def test_the_random_number_of_a_token_is_a_function_of_seed_and_index():
    message = (7).to_bytes(8, "little") + (3).to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8, person=b"chipbus.uniform").digest()
    assert uniform(7, 3) == (int.from_bytes(digest, "little") >> 11) / 2**53
    draws = np.array([uniform(seed, index) for seed in range(40) for index in range(50)])
    assert len(set(draws)) == len(draws)
    assert ((draws >= 0) & (draws < 1)).all()
    assert abs(np.histogram(draws, 10, (0, 1))[0] - 200).max() < 60  # 4.5 standard deviations


def test_a_sample_row_carries_the_settings_and_history_only_for_penalties():
    scheduler = Scheduler(config())
    settings_ = params(
        temperature=0.5, seed=9, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=-0.5, logprobs=2,
    )  # fmt: skip
    scheduler.add("with", prompt(20, 21), settings_)
    scheduler.add("without", prompt(30), params(temperature=0.5, seed=9))
    scheduler.apply(scheduler.next_batch(), [SampledToken(40), SampledToken(50)])
    batch = scheduler.next_batch()
    row, plain = batch.step.samples
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        assert getattr(row, name) == getattr(settings_, name)
    assert (row.logprobs, plain.logprobs) == (2, None)
    assert (row.history.tolist(), row.prompt_tokens) == ([20, 21, 40], 2)
    assert (plain.history.tolist(), plain.prompt_tokens) == ([], 0)
    assert row.uniform == plain.uniform == uniform(9, 1)


@st.composite
def traffic(draw: st.DrawFn) -> tuple[dict[str, int], bool, int, list[tuple[object, ...]]]:
    page_size = draw(st.integers(1, 5))
    changes = {
        "page_size": page_size,
        "num_pages": draw(st.integers(2, 12)),
        "max_num_seqs": draw(st.integers(1, 4)),
        "max_num_batched_tokens": draw(st.integers(1, 12)),
        "prefill_chunk_tokens": draw(st.integers(1, 9)),
        "max_model_len": draw(st.integers(4, 40)),
    }
    room = min(changes["max_model_len"], changes["num_pages"] * page_size)
    longest = max(room - 1, 1)
    ids = st.one_of(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=longest),
        st.builds(  # of few different pages, so that some are found again, and some only look like it
            lambda pages, tail: [*np.repeat(pages, page_size).tolist(), *tail][:longest],
            st.lists(st.integers(20, 21), min_size=1, max_size=4),
            st.lists(st.integers(20, 21), max_size=2),
        ),
    )
    wants = st.builds(
        lambda tokens, least, stop, ignore: params(
            max_tokens=tokens, min_tokens=min(least, tokens), stop_token_ids=stop, ignore_eos=ignore
        ),
        st.integers(1, 30),
        st.integers(0, 6),
        st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple),
        st.booleans(),
    )
    moves = st.one_of(
        st.tuples(st.just("add"), ids, wants, st.integers(-1, 1), st.one_of(st.just(0), st.integers(0, 20))),
        st.tuples(st.just("steps"), st.integers(1, 9)),
        st.tuples(st.just("begin")),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("drop")),
        st.tuples(st.just("fail")),
        st.tuples(st.just("lose pages")),
    )
    return changes, draw(st.booleans()), draw(st.integers(1, DEPTH)), draw(st.lists(moves, max_size=30))


@pytest.mark.guarantee("R2")
@given(traffic())
@settings(max_examples=200, deadline=None, print_blob=True)
def test_every_request_gets_the_tokens_it_would_get_alone(case):
    changes, is_uniform, depth, moves = case
    core = Core(is_uniform=is_uniform, **changes)
    core.depth = depth
    context = min(changes["max_model_len"], changes["num_pages"] * changes["page_size"])
    wanted: dict[str, tuple[np.ndarray, SamplingParams]] = {}
    aborted: set[str] = set()

    def abort(number: int) -> None:
        name = f"r{number}"
        is_live = name in wanted and name not in core.ends and name not in aborted
        assert core.scheduler.abort(name) == is_live, name
        if is_live:
            aborted.add(name)
        core.scheduler.check_integrity()

    for move in moves:
        if move[0] == "add":
            name = f"r{len(wanted)}"
            ids = np.array(move[1], np.int32)
            if len(ids) >= context:
                with pytest.raises(ContextTooLong):
                    core.add(name, ids, move[2], move[3])
            else:  # it may come from an earlier life, with some of its tokens
                core.add(name, ids, move[2], move[3], expected(ids, move[2], context)[0][:-1][: move[4]])
                wanted[name] = (ids, move[2])
        elif move[0] == "steps":
            for _ in range(move[1]):
                core.step()
        elif move[0] == "abort":
            abort(move[1])
        elif move[0] == "begin":
            if len(core.in_flight) < depth:
                core.begin()
        elif move[0] == "lose pages":
            for batch in reversed(core.in_flight):
                core.drop(batch)
            core.scheduler.lose_pages()
            core.scheduler.check_integrity()
            assert core.scheduler.pages_free == core.scheduler.pages_total
            assert core.scheduler.pages_cached == 0
        elif core.in_flight and move[0] == "drop":
            core.drop(core.in_flight[-1])
        elif core.in_flight:  # the oldest fails: its requests end, and what is behind it does not count
            failed, *behind = core.in_flight
            for row in failed.record.rows:
                abort(int(row.request_id[1:]))
            core.drop(failed)
            for batch in behind:
                with contextlib.suppress(KernelError):
                    core.compute(batch)
                core.drop(batch)
    core.run()
    for name, (ids, params_) in wanted.items():
        tokens, end = expected(ids, params_, context)
        if name in aborted:
            assert core.tokens[name] == tokens[: len(core.tokens[name])]
        else:
            assert (core.tokens[name], core.ends[name]) == (tokens, end)


def test_same_calls_give_same_decisions():
    def records() -> list[object]:
        core = Core(num_pages=6, max_model_len=24)
        for index, name in enumerate("abcd"):
            core.add(name, prompt(20 + index, 21, 22), params(max_tokens=12))
        core.run()
        return [batch.record for batch in core.batches]

    assert records() == records()


PREFIX = tuple(range(20, 32))  # three pages of four


@pytest.mark.guarantee("R50")
def test_of_a_prompt_that_begins_like_an_earlier_one_only_the_rest_is_computed():
    core = Core()
    core.add("first", prompt(*PREFIX, 50), params(max_tokens=1))
    core.run()
    core.add("longer", prompt(*PREFIX, 51, 52, 53))
    core.add("equal", prompt(*PREFIX))
    core.add("other", prompt(*PREFIX[:8], 1, *PREFIX[9:]))
    core.run()
    assert [core.computed(name)[0] for name in ("first", "longer", "equal", "other")] == [
        ("prefill", 0, 8),
        ("prefill", 12, 3),
        ("prefill", 8, 4),  # one token at least is computed, so the last page is
        ("prefill", 8, 4),
    ]
    for name, ids in (("longer", (*PREFIX, 51, 52, 53)), ("equal", PREFIX), ("other", (*PREFIX[:8], 1, *PREFIX[9:]))):
        assert (core.tokens[name], core.ends[name]) == expected(prompt(*ids), params())
    assert (core.scheduler.prefix_queries, core.scheduler.prefix_hits) == (13 + 15 + 12 + 12, 12 + 8 + 8)


@pytest.mark.guarantee("R52")
def test_a_page_is_found_once_its_step_is_decided_and_no_more_when_that_is_dropped_or_the_chip_has_lost_it():
    core = Core(max_num_batched_tokens=32, prefill_chunk_tokens=32)
    core.add("a", prompt(*PREFIX, 50), params(max_tokens=1))
    first = core.begin()
    core.add("behind", prompt(*PREFIX, 51), params(max_tokens=1))
    second = core.begin()
    assert core.computed("behind") == [("prefill", 12, 1)]
    for batch in (second, first):
        core.drop(batch)
    for name in ("a", "behind"):
        core.scheduler.abort(name)
    core.add("b", prompt(*PREFIX, 52), params(max_tokens=1))
    core.run()
    core.scheduler.lose_pages()
    core.add("c", prompt(*PREFIX, 53), params(max_tokens=1))
    core.run()
    assert core.computed("b") == core.computed("c") == [("prefill", 0, 13)]


def test_pages_of_an_aborted_request_are_found_while_the_step_that_fills_them_is_in_flight():
    core = Core(num_pages=5, max_model_len=20, max_num_batched_tokens=32, prefill_chunk_tokens=32)
    core.add("a", prompt(*PREFIX, 50), params(max_tokens=1))
    first = core.begin()
    core.scheduler.abort("a")
    core.add("b", prompt(*PREFIX, 51), params(max_tokens=1))
    second = core.begin()
    for batch in (first, second):
        core.end(batch)
    core.run()
    assert core.computed("b") == [("prefill", 12, 1)]
    assert (core.tokens["b"], core.ends["b"]) == expected(prompt(*PREFIX, 51), params(max_tokens=1), 20)


LONG = tuple(range(16, 48))  # eight pages of four


@pytest.mark.guarantee("R70")
@pytest.mark.parametrize("depth", range(1, DEPTH + 1))
def test_of_prompts_computed_at_the_same_time_each_page_is_computed_once_and_nobody_waits(depth):
    core = Core(max_num_batched_tokens=26, num_pages=40)
    core.depth = depth
    prompts = {
        "one": prompt(*LONG, 50),
        "same": prompt(*LONG, 50),
        "part": prompt(*LONG[:4], *range(50, 60)),
        "other": prompt(60, 61),
    }
    for name, ids in prompts.items():
        core.add(name, ids, params(max_tokens=1))
    core.run()
    assert core.batches[0].record.rows == (
        BatchRow("one", "prefill", 0, 8, False),
        BatchRow("same", "prefill", 8, 8, False),
        BatchRow("part", "prefill", 4, 8, False),
        BatchRow("other", "prefill", 0, 2, True),
    )
    assert [start for _, start, _ in core.computed("one")] == [0, 16, 32]
    assert [start for _, start, _ in core.computed("same")] == [8, 24, 32]
    for name, ids in prompts.items():
        assert (core.tokens[name], core.ends[name]) == expected(ids, params(max_tokens=1))
    computed = sum(length for name in prompts for _, _, length in core.computed(name))
    assert computed == len(LONG) + 1 + 1 + 10 + 2
    assert (core.scheduler.prefix_queries, core.scheduler.prefix_hits) == (33 + 33 + 14 + 2, 82 - computed)


def test_a_page_filled_in_part_is_given_up_for_one_that_is_found():
    core = Core(prefill_chunk_tokens=6)
    for name in ("one", "same"):
        core.add(name, prompt(*LONG), params(max_tokens=1))
    core.run()
    starts = {name: [start for _, start, _ in core.computed(name)] for name in ("one", "same")}
    assert starts == {"one": [0, 8, 16, 24, 30], "same": [4, 12, 20, 28]}
    for name in starts:
        assert (core.tokens[name], core.ends[name]) == expected(prompt(*LONG), params(max_tokens=1))


@pytest.mark.guarantee("R71")
def test_who_went_on_behind_pages_of_a_step_that_is_dropped_is_set_back_to_before_them():
    core = Core(max_num_batched_tokens=10)
    core.add("before", prompt(*LONG[:4], 60), params(max_tokens=1))
    core.run()
    core.add("a", prompt(*LONG), params(max_tokens=3))
    first = core.begin()
    core.add("b", prompt(*LONG), params(max_tokens=3))
    second = core.begin()
    assert [core.computed(name) for name in "ab"] == [[("prefill", 4, 8), ("prefill", 12, 8)], [("prefill", 20, 2)]]
    core.scheduler.abort("a")
    core.drop(first)
    core.drop(second)
    core.run()
    assert core.computed("b")[1] == ("prefill", 4, 8), "the page that was there before is there"
    assert (core.tokens["b"], core.ends["b"]) == expected(prompt(*LONG), params(max_tokens=3))


def test_a_page_taken_over_from_a_step_that_is_dropped_counts_for_nothing_of_ones_own():
    core = Core(prefill_chunk_tokens=1)
    core.add("ahead", prompt(*LONG[:9]))
    core.step()
    core.add("first", prompt(*LONG[:9]), priority=-1)
    core.step()
    core.step()
    batches = core.begin(), core.begin()
    assert core.computed("first")[-2:] == [("prefill", 2, 1), ("prefill", 4, 1)], "its page is given up for the other's"
    for batch in reversed(batches):
        core.drop(batch)
    core.run()
    for name in core.tokens:
        assert core.tokens[name] == expected(prompt(*LONG[:9]), params())[0]


def test_a_step_that_is_not_to_be_for_want_of_pages_leaves_nothing_to_be_found():
    core = Core(prefill_chunk_tokens=2)
    for name in "ab":
        core.add(name, prompt(*LONG[:9]))
    first = core.begin()
    pool = core.scheduler._pool
    others = pool.allocate(pool.num_free)
    assert core.scheduler.next_batch() is None, "b has a's page, and none for what comes behind it"
    pool.release(others)
    core.scheduler.check_integrity()
    core.scheduler.abort("a")
    core.end(first)
    core.run()
    assert core.computed("b")[:3] == [("prefill", 0, 2), ("prefill", 0, 2), ("prefill", 2, 2)]
    assert core.tokens["b"] == expected(prompt(*LONG[:9]), params())[0]


@pytest.mark.guarantee("R53")
def test_a_generated_token_is_computed_as_prompt_once_before_a_later_prompt_finds_it():
    core = Core()
    core.add("a", prompt(20, 21, 22), params(max_tokens=12))
    core.run()
    turn = prompt(20, 21, 22, *core.tokens["a"], 40)
    for name in ("b", "c"):
        core.add(name, turn, params(max_tokens=1))
        core.run()
    assert core.computed("b")[0] == ("prefill", 0, 8), "no page of the first request is wholly prompt"
    assert core.computed("c")[0] == ("prefill", 12, 4)


@pytest.mark.guarantee("R75")
def test_on_a_uniform_chip_a_later_prompt_finds_the_pages_of_an_answer():
    core = Core(is_uniform=True)
    core.add("a", prompt(20, 21, 22), params(max_tokens=12, ignore_eos=True))
    core.run()
    turn = (20, 21, 22, *core.tokens["a"])
    core.add("all", prompt(*turn, 40, 41), params(max_tokens=1))
    core.add("less", prompt(*turn[:10], 60, 61), params(max_tokens=1))
    core.run()
    assert core.computed("all") == [("prefill", 12, 5)], "its last token was never computed, nor the page it is in"
    assert core.computed("less") == [("prefill", 8, 4)]
    for name, ids in (("all", (*turn, 40, 41)), ("less", (*turn[:10], 60, 61))):
        assert (core.tokens[name], core.ends[name]) == expected(prompt(*ids), params(max_tokens=1))


@pytest.mark.guarantee("R54")
def test_a_preempted_request_finds_its_own_prompt_again_and_counts_as_computed_by_itself():
    core = Core(num_pages=7, max_model_len=28, max_num_seqs=2)
    for name, first in (("a", 20), ("b", 40)):
        core.add(name, prompt(*range(first, first + 9)), params(max_tokens=12))
    core.run()
    assert core.scheduler.preemptions > 0
    assert [start for kind, start, _ in core.computed("b") if kind == "prefill"].count(8) == 2, "the page is found"
    assert [start for kind, start, _ in core.computed("b") if kind == "prefill"].count(0) == 1
    assert core.scheduler.prefix_hits == 0


@pytest.mark.guarantee("R55")
def test_without_a_prefix_cache_no_page_is_found():
    core = Core(prefix_cache=False)
    for names in ("a", "b", "cd"):
        for name in names:
            core.add(name, prompt(*PREFIX[:7]), params(max_tokens=1))
        core.run()
    assert [core.computed(name) for name in "abcd"] == [[("prefill", 0, 7)]] * 4
    assert core.scheduler.pages_cached == core.scheduler.prefix_hits == 0


@pytest.mark.guarantee("R56")
def test_lower_priorities_go_first_and_equal_ones_by_arrival():
    core = Core(max_num_seqs=1)
    for name, priority in (("a", 0), ("late", 5), ("b", 0), ("first", -1), ("c", 0)):
        core.add(name, prompt(20, 21), params(max_tokens=2, ignore_eos=True), priority)
    core.run()
    assert list(core.ends) == ["first", "a", "b", "c", "late"]


@pytest.mark.guarantee("R57")
def test_the_last_in_priority_then_in_arrival_is_preempted_and_goes_back_to_its_place():
    core = Core(num_pages=9, max_model_len=24)
    wants = params(max_tokens=12, ignore_eos=True)
    for name, priority in (("x", 3), ("a", 0), ("b", 0), ("y", 3)):
        core.add(name, prompt(*range(20 + len(core.tokens), 23 + len(core.tokens))), wants, priority)
    while not (batch := core.step()).record.preempted:
        pass
    core.add("z", prompt(30, 31, 32), wants, 3)
    assert batch.record.preempted[0] == "y"
    core.run()
    preempted = [name for batch in core.batches for name in batch.record.preempted]
    assert "x" in preempted, "the longest served, and yet behind both others"
    assert not {"a", "b"} & set(preempted)
    assert list(core.ends) == ["a", "b", "x", "y", "z"]


def test_one_more_of_equal_priority_does_not_keep_those_before_it_waiting():
    core = Core(max_num_seqs=2, num_pages=6, max_model_len=24)
    core.add("large", prompt(*range(20, 40)), params(max_tokens=2))
    for number in range(40):
        core.add(f"small {number}", prompt(50, 51), params(max_tokens=2))
        core.step()
    assert "large" in core.ends
    core.run()


@pytest.mark.guarantee("R61")
def test_a_step_decided_ahead_goes_on_from_tokens_that_are_not_known_yet():
    core = Core()
    prompts = {"a": prompt(20, 21, 22), "b": prompt(*range(30, 40))}
    for name, ids in prompts.items():
        core.add(name, ids)
    first, second = core.begin(), core.begin()
    assert [row.token for row in second.step.decodes] == [chosen_token(first.step.samples[0].row)]
    core.end(first)
    third = core.begin()
    assert [row.token for row in third.step.decodes] == [chosen_token(row.row) for row in second.step.samples]
    core.depth = DEPTH
    core.run()
    for name, ids in prompts.items():
        assert (core.tokens[name], core.ends[name]) == expected(ids, params())


@pytest.mark.guarantee("R62")
def test_who_must_know_a_token_first_or_has_its_last_one_coming_sits_out():
    core = Core()
    wants = {
        "plain": params(max_tokens=3),
        "counts": params(presence_penalty=0.5),
        "weighs": params(repetition_penalty=1.1),
        "ends": params(max_tokens=1),
    }
    for name, params_ in wants.items():
        core.add(name, prompt(20, 21), params_)
    first, second = core.begin(), core.begin()
    assert [row.request_id for row in first.record.rows] == list(wants)
    assert [row.request_id for row in second.record.rows] == ["plain"]
    core.end(first)
    third = core.begin()
    assert [row.request_id for row in third.record.rows] == ["plain", "counts", "weighs"]
    assert third.step.samples[1].history.tolist() == [20, 21, core.tokens["counts"][0]]
    core.run()
    for name, params_ in wants.items():
        assert (core.tokens[name], core.ends[name]) == expected(prompt(20, 21), params_)


@pytest.mark.guarantee("R63")
def test_what_was_decided_ahead_for_a_request_that_has_ended_is_dropped_and_its_page_kept_until_then():
    core = Core(num_pages=3, max_model_len=12)
    core.add("a", prompt(20, 21, 22), params(stop_token_ids=(null_token(22, 2, VOCAB),)))
    first, second = core.begin(), core.begin()
    [event] = core.end(first)
    assert event.ending.finish_reason == "stop"
    core.add("b", prompt(*range(30, 39)))
    assert (core.scheduler.pages_free, core.scheduler._pool.num_free) == (3, 2)
    assert core.begin() is None
    assert core.end(second) == ()
    core.run()
    assert core.tokens["b"] == expected(prompt(*range(30, 39)), params(), 12)[0]


@pytest.mark.guarantee("R64")
def test_an_aborted_request_is_in_no_further_step_whatever_is_in_flight():
    core = Core()
    core.add("a", prompt(20, 21))
    core.add("b", prompt(30, 31))
    first, second = core.begin(), core.begin()
    core.scheduler.abort("a")
    assert [event.request_id for event in core.end(first)] == ["b"]
    third = core.begin()
    assert [row.request_id for row in third.record.rows] == ["b"]
    assert [event.request_id for event in core.end(second)] == ["b"]
    core.depth = DEPTH
    core.run()
    assert core.tokens["a"] == []


@pytest.mark.guarantee("R68")
def test_pages_that_run_out_are_fought_over_only_when_no_step_is_in_flight():
    core = Core(num_pages=3, max_model_len=12)
    for name in "ab":
        core.add(name, prompt(20, 21, 22), params(max_tokens=9))
    first, second = core.begin(), core.begin()
    core.end(first)
    assert core.begin() is None, "there is a page for one of them"
    core.end(second)
    third = core.begin()
    assert ([row.request_id for row in third.record.rows], third.record.preempted) == (["a"], ("b",))
    core.depth = DEPTH
    core.run()
    for name in "ab":
        assert (core.tokens[name], core.ends[name]) == expected(prompt(20, 21, 22), params(max_tokens=9), 12)
