"""Counting requests: windows, histograms, events, totals over lives. Pure functions and one-owner objects, no bus."""

from __future__ import annotations

from itertools import pairwise

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipbus.actors.busy import BusyTime
from chipbus.actors.event_log import EventLog, ProcessLog, changes, restart_reason
from chipbus.actors.lives import NodeLives, ReplicaLives
from chipbus.actors.messages.serving import TextDone, TokensDone
from chipbus.actors.messages.tree import ChildRecord, ProgramStatistics, ReplicaStatistics
from chipbus.actors.meter import Meter
from chipbus.actors.report import MOST_EVENTS, MOST_ROWS
from chipbus.actors.reporter import is_ready
from chipbus.actors.window import SLOT_NS, WINDOW_NS
from chipbus.bus import UNOBSERVED, Histogram, NodeReport
from chipbus.errors import WorkerDied

S = 1_000_000_000
STEPS_NS = st.one_of(st.integers(0, S), st.integers(0, 3 * SLOT_NS), st.integers(0, 3 * WINDOW_NS), st.just(SLOT_NS))


@pytest.mark.guarantee("M2")
@given(st.integers(1, 10 * S), st.lists(STEPS_NS, max_size=60))
def test_the_recent_numbers_are_those_of_the_seconds_that_the_report_names(began_ns: int, steps: list[int]) -> None:
    meter = Meter(began_ns)
    request = meter.begin("req-1", began_ns)
    deltas: list[int] = []
    now_ns = began_ns
    for step in steps:
        now_ns += step
        meter.delta(request, 1, now_ns)
        deltas.append(now_ns)
        now_ns += step // 7
        recent = meter.recent(now_ns)
        width_ns = round(recent.seconds * 1e9)
        assert width_ns < WINDOW_NS + SLOT_NS
        assert width_ns >= min(WINDOW_NS, now_ns - began_ns)
        assert recent.output_tokens == sum(at_ns >= now_ns - width_ns for at_ns in deltas)
        gaps = [at_ns for at_ns in deltas[1:] if at_ns >= now_ns - width_ns]
        assert sum(recent.latencies.inter_token.counts) == len(gaps)


@given(st.lists(st.floats(0, 1e4), max_size=50))
def test_each_observation_is_in_the_one_bucket_that_holds_it(values: list[float]) -> None:
    meter = Meter(0)
    for value in values:
        request = meter.begin("r", 0)
        meter.finish(request, done(queued_s=value), 1)

    histogram = meter.latencies().queued
    edges = (-1.0, *histogram.bounds, float("inf"))
    assert histogram.counts == tuple(sum(low < value <= high for value in values) for low, high in pairwise(edges))
    assert histogram.total == pytest.approx(sum(values))


def done(*, reason: str = "length", attempt: int = 1, queued_s: float = 0.0) -> TextDone:
    tokens = TokensDone(finish_reason=reason, attempt=attempt, queued_s=queued_s, prefill_s=0.25, decode_s=0.5)
    return TextDone(text="", finish_reason=reason, tokens=tokens)


def test_times_of_a_request_are_what_its_caller_saw() -> None:
    meter = Meter(0)
    request = meter.begin("req-1", 10 * S)
    meter.encoded(request, 7, 10 * S)
    meter.encoded(request, 7, 10 * S)  # a second attempt says so again
    for at_s, tokens in ((12, 1), (12.5, 1), (14, 3)):
        meter.delta(request, tokens, int(at_s * S))
    meter.retry(request, 3)
    meter.retry(request, 2)
    meter.finish(request, done(attempt=3, queued_s=0.125), 15 * S)

    seen = meter.latencies()
    assert [(sum(h.counts), h.total) for h in (seen.time_to_first_token, seen.inter_token, seen.per_output_token)] == [
        (1, 2.0), (2, 2.0), (1, 0.5),
    ]  # fmt: skip
    assert [(sum(h.counts), h.total) for h in (seen.e2e, seen.queued, seen.prefill, seen.decode)] == [
        (1, 5.0), (1, 0.125), (1, 0.25), (1, 0.5),
    ]  # fmt: skip
    assert (meter.requests, meter.retries, meter.prompt_tokens, meter.output_tokens) == (1, 2, 7, 5)
    assert (dict(meter.finished), meter.num_open) == ({"length": 1}, 0)


def test_a_report_shows_the_oldest_open_requests_and_says_how_many_there_are() -> None:
    meter = Meter(0)
    requests = [meter.begin(f"req-{number}", number) for number in range(MOST_ROWS + 5)]
    meter.fail(requests[0], WorkerDied("gone"))
    meter.delta(requests[1], 2, 4 * S)

    rows = meter.rows(5 * S)

    assert [row.request_id for row in rows] == [f"req-{number}" for number in range(1, MOST_ROWS + 1)]
    assert meter.num_open == MOST_ROWS + 4
    assert (rows[0].state, rows[0].output_tokens, rows[0].ttft_s) == ("running", 2, pytest.approx(4.0))
    assert (rows[1].state, rows[1].ttft_s, rows[1].age_s) == ("waiting", None, pytest.approx(5.0))
    assert dict(meter.failed) == {"WorkerDied": 1}


# Events.


@pytest.mark.guarantee("M8")
def test_a_flood_of_failing_requests_is_one_event_a_second_and_kind() -> None:
    log = EventLog()
    for number in range(500):
        log.add_request("refused", f"req-{number}", "Overloaded", "Overloaded: full", now_ns=number)
    log.add_request("failed", "req-9", "WorkerDied", "WorkerDied: gone", now_ns=501)

    assert log.is_holding
    log.flush(1 * S)
    log.add_request("refused", "req-600", "Overloaded", "Overloaded: full", now_ns=1 * S + 1)
    log.flush(2 * S)
    log.add_request("refused", "req-700", "Overloaded", "Overloaded: full", now_ns=4 * S)

    assert [(event.kind, event.subject, event.text) for event in log.events] == [
        ("refused", "req-0", "Overloaded: full"),
        ("failed", "req-9", "WorkerDied: gone"),
        ("refused", "499 requests", "Overloaded"),
        ("refused", "1 request", "Overloaded"),
        ("refused", "req-700", "Overloaded: full"),
    ]
    assert not log.is_holding


def test_only_the_newest_events_are_kept_and_their_numbers_go_on() -> None:
    heard: list[int] = []
    log = EventLog(lambda event: heard.append(event.number))
    for number in range(MOST_EVENTS + 30):
        log.add("ready", f"chip.{number}", "")

    assert heard == list(range(1, MOST_EVENTS + 31))
    assert [event.number for event in log.events] == list(range(31, MOST_EVENTS + 31))


def record(state: str, life: int = 1, *, name: str = "chip.0.0", last_exit: str = "", restarts: int = 0) -> ChildRecord:
    return ChildRecord(
        name=name, kind="chip", pid=40 + life, parent="replica.0", state=state, incarnation=life, restarts=restarts,
        last_exit=last_exit, phases=(("forked", 1.0), ("ready", 8.0)) if state == "ready" else (),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pictures", "kinds", "exits"),
    [
        ([record("new", 0), record("starting"), record("ready")], ["started", "ready"], 0),
        ([record("ready")], ["started", "ready"], 0),
        ([record("ready"), record("ready")], ["started", "ready"], 0),
        (
            [record("ready"), record("backoff"), record("starting", 2), record("ready", 2)],
            ["started", "ready", "exit", "restart", "ready"],
            1,
        ),
        ([record("ready"), record("starting", 2)], ["started", "ready", "exit", "restart"], 1),
        ([record("ready"), record("ready", 4)], ["started", "ready", "exit", "restart", "ready"], 3),
        (
            [record("ready"), record("draining"), record("stopping"), record("gone"), record("gone")],
            ["started", "ready", "draining", "exit"],
            1,
        ),
        ([record("new", 0), record("gone", 0)], [], 0),
        ([record("ready"), record("draining"), record("ready")], ["started", "ready", "draining"], 0),
    ],
)
def test_lives_are_told_from_pictures_of_the_tree(pictures: list[ChildRecord], kinds: list[str], exits: int) -> None:
    log = EventLog()
    processes = ProcessLog(log)
    for picture in pictures:
        processes.saw([picture])

    assert [event.kind for event in log.events] == kinds
    assert processes.exits == exits


def test_an_event_of_a_process_says_its_end_its_life_and_how_long_it_took() -> None:
    said = [*changes(None, record("ready")), *changes(record("ready"), record("starting", 2, last_exit="exit code 3"))]

    assert said == [
        ("started", "life 1"), ("ready", "pid 41, after 8 ms"), ("exit", "exit code 3"), ("restart", "life 2"),
    ]  # fmt: skip


def test_restarts_are_counted_by_few_reasons() -> None:
    ends = [
        "signal 9 (SIGKILL)",
        "exit code 1: StartFailed: no file x",
        "not ready within 3 s: …",
        "signal 9 (SIGKILL)",
    ]
    processes = ProcessLog(EventLog())
    processes.saw([record("ready")])
    for number, end in enumerate(ends, 1):
        processes.saw([record("ready", number + 1, last_exit=end, restarts=number)])

    assert [(row.worker, row.reason, row.count) for row in processes.restarts()] == [
        ("chip.0.0", "SIGKILL", 2), ("chip.0.0", "exit code 1", 1), ("chip.0.0", "replaced", 1),
    ]  # fmt: skip
    assert [restart_reason(text) for text in ("signal 40", "exit status unknown", "no answer for 10 s")] == [
        "signal 40", "exit status unknown", "replaced",
    ]  # fmt: skip


# Totals over lives.


def statistics(replica: int, life: int, steps: int, programs: tuple[ProgramStatistics, ...] = ()) -> ReplicaStatistics:
    return ReplicaStatistics(
        replica=replica, pages_total=9, pages_free=4, running=2, waiting=1, steps=steps, tokens_generated=2 * steps,
        prompt_tokens=3 * steps, step_ns=5 * steps, device_ns=4 * steps, preemptions=steps, programs=programs,
        incarnation=life,
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), max_size=30))
def test_totals_over_lives_are_the_sums_of_what_each_life_last_said(moves: list[tuple[int, int]]) -> None:
    lives, life, steps, last = ReplicaLives(), 1, 0, {}
    for new_lives, more in moves:
        life, steps = life + new_lives, more if new_lives else steps + more
        lives.saw([statistics(0, life, steps)])
        last[life] = steps
        [row] = lives.totals({"replica.0"})
        total = sum(last.values())
        assert (row.steps, row.tokens_generated, row.preemptions) == (total, 2 * total, total)


def test_a_late_word_of_an_earlier_life_changes_nothing() -> None:
    lives = ReplicaLives()
    for life, steps in ((1, 7), (2, 3), (1, 900)):
        lives.saw([statistics(0, life, steps)])

    assert [row.steps for row in lives.totals({"replica.0"})] == [10]


def test_a_replica_that_is_down_keeps_its_counts_and_has_nothing_now() -> None:
    lives = ReplicaLives()
    programs = (ProgramStatistics("decode", 5, 9, 100), ProgramStatistics("prefill", 1, 70, 400))
    lives.saw([statistics(1, 1, 4, programs), statistics(0, 1, 6)])
    lives.saw([statistics(1, 2, 1, programs[:1])])

    up, down = lives.totals({"replica.0"})

    assert (up.replica, up.steps, up.pages_free, up.running) == (0, 6, 4, 2)
    assert (down.replica, down.steps, down.pages_total, down.pages_free, down.running, down.waiting) == (
        1,
        5,
        0,
        0,
        0,
        0,
    )
    assert down.programs == (ProgramStatistics("decode", 10, 18, 200), ProgramStatistics("prefill", 1, 70, 400))


def test_what_nodes_count_is_kept_over_their_lives() -> None:
    lives = NodeLives()
    for life, counters in ((1, (("late_frames", 2),)), (1, (("late_frames", 3),)), (2, (("bad_frames", 1),))):
        lives.saw("router", life, NodeReport(age_s=1, mailbox=0, open_asks=0, counters=counters, ledger_bytes=10))

    [totals] = lives.totals()
    assert totals.counters == {"late_frames": 3, "bad_frames": 1}
    assert totals.ledger_bytes == 20


# Readiness.


def core(state: str, number: int = 0) -> ChildRecord:
    return attrs.evolve(record(state, name=f"replica.{number}"), kind="replica", parent="supervisor")


def chip(state: str, number: int = 0) -> ChildRecord:
    return attrs.evolve(record(state, name=f"chip.{number}.0"), parent=f"replica.{number}")


@pytest.mark.guarantee("M6")
@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ([core("ready"), chip("ready")], True),
        ([core("ready"), chip("starting")], False),
        ([core("starting"), chip("ready")], False),
        ([core("draining"), chip("ready")], False),
        ([core("draining"), chip("ready"), core("ready", 1), chip("ready", 1)], True),
        ([core("ready"), chip("backoff"), core("gone", 1), chip("ready", 1)], False),
        ([], False),
    ],
)
def test_ready_means_that_a_replica_takes_requests_and_its_chips_can_compute(
    tree: list[ChildRecord], expected: bool
) -> None:
    assert is_ready(tree) is expected


def test_a_difference_of_histograms_is_what_came_between() -> None:
    early, late = Histogram((1.0, 2.0), (1, 0, 2), 9.0), Histogram((1.0, 2.0), (1, 4, 3), 20.0)

    assert late.since(early) == Histogram((1.0, 2.0), (0, 4, 1), 11.0)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_a_sum_of_histograms_is_all_that_was_observed(one: list[int], other: list[int]) -> None:
    first, second = (Histogram((1.0, 2.0), tuple(counts), sum(counts)) for counts in (one, other))

    assert (first + second).counts == tuple(a + b for a, b in zip(one, other, strict=True))
    assert (first + second).since(first) == second
    assert first + UNOBSERVED == UNOBSERVED + first == first


def test_what_was_observed_of_steps_and_waits_is_kept_over_lives() -> None:
    cores, nodes = ReplicaLives(), NodeLives()
    for life, counts in ((1, (2, 0)), (1, (2, 1)), (2, (4, 0))):
        seen = Histogram((1.0,), counts, 8.0)
        cores.saw([attrs.evolve(statistics(0, life, 1), step_tokens=seen)])
        nodes.saw("router", life, NodeReport(age_s=1, mailbox=0, open_asks=0, credit_waits=seen))

    assert cores.totals(set())[0].step_tokens == nodes.totals()[0].credit_waits == Histogram((1.0,), (6, 1), 16.0)


# How busy a chip is.

BRIEF_NS = st.one_of(st.integers(0, S), st.integers(0, 3 * SLOT_NS), st.integers(0, 2 * WINDOW_NS), st.just(SLOT_NS))


@pytest.mark.guarantee("M27")
@given(
    st.integers(1, 10 * S), st.lists(st.tuples(st.sampled_from("ab"), BRIEF_NS, BRIEF_NS, st.booleans()), max_size=40)
)
def test_a_chip_is_busy_for_as_long_as_it_ran_each_program_in_the_last_minute(
    began_ns: int, spans: list[tuple[str, int, int, bool]]
) -> None:
    busy = BusyTime(began_ns)
    ran: list[tuple[str, int, int]] = []
    now_ns = began_ns

    def check() -> None:
        age_ns = now_ns - began_ns
        width_ns = min(age_ns, WINDOW_NS + age_ns % SLOT_NS)
        total = dict.fromkeys((program for program, _, _ in ran), 0)
        for program, begin, end in ran:
            total[program] += max(0, end - max(begin, now_ns - width_ns))
        shares = dict(busy.shares(now_ns))
        assert shares == pytest.approx({program: ns / max(1, width_ns) for program, ns in total.items()})
        assert sum(shares.values()) <= 1 + 1e-9

    for program, pause, length, looks in spans:
        now_ns += pause
        check()
        busy.begin(program, now_ns)
        begin = now_ns
        now_ns += length // 2
        if looks:
            ran.append((program, begin, now_ns))
            check()
            ran.pop()
        now_ns += length - length // 2
        busy.end(now_ns)
        ran.append((program, begin, now_ns))
        check()
