"""What an engine says of itself while its processes die: whole engines in one process, on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import msgspec
import pytest
from local_engine import LocalEngine

from chipbus.actors.messages.tree import GroupLost, ReplicaStatisticsRequest, TreeReportRequest
from chipbus.actors.report import EngineReport, Event
from chipbus.actors.reporter import ANSWERS_TIMEOUT_S, About
from chipbus.actors.run_files import RunFiles, read_recorded
from chipbus.actors.sampling import SamplingParams
from chipbus.errors import ConfigError, EngineClosed, LedgerCorrupt

REPLICA_COUNTERS = (
    "steps", "tokens_generated", "prompt_tokens", "step_ns", "device_ns", "preemptions", "prefix_queries",
    "prefix_hits",
)  # fmt: skip
PARAMS = SamplingParams(seed=0, max_tokens=20, ignore_eos=True)


def report_of(engine: LocalEngine) -> EngineReport:
    heard: list[EngineReport] = []
    engine.host.reporter.ask(heard.append)
    engine.system.run_until(lambda: heard != [])
    return heard[0]


def pass_time(engine: LocalEngine, seconds: float) -> None:
    is_over: list[bool] = []
    engine.host.ctx.after(seconds, lambda: is_over.append(True))
    engine.system.run_until(lambda: is_over != [])


def counters_of(report: EngineReport) -> Iterator[tuple[str, float]]:
    """Everything in a report that counts up."""
    names = "requests_total retries_total exits prompt_tokens output_tokens"
    yield from ((name, getattr(report, name)) for name in names.split())
    yield from ((f"finished {reason}", count) for reason, count in report.finished.items())
    yield from ((f"failed {error}", count) for error, count in report.failed.items())
    yield from ((f"restarts {row.worker} {row.reason}", row.count) for row in report.restarts)
    for row in report.replicas:
        yield from ((f"{name} {row.replica}", getattr(row, name)) for name in REPLICA_COUNTERS)
        yield from ((f"step {row.replica} {place}", count) for place, count in enumerate(row.step_tokens.counts))
        yield from ((f"dispatches {row.replica} {use.program}", use.dispatches) for use in row.programs)
    for totals in report.totals:
        yield f"ledger_bytes {totals.name}", totals.ledger_bytes
        yield from ((f"{name} {totals.name}", count) for name, count in totals.counters.items())
        yield from ((f"wait {totals.name} {place}", n) for place, n in enumerate(totals.credit_waits.counts))
    yield from ((f"reap {place}", count) for place, count in enumerate(report.reaps.counts))
    for name, histogram in attrs.asdict(report.latencies, recurse=False).items():
        yield from ((f"{name} {place}", count) for place, count in enumerate(histogram.counts))


@pytest.mark.guarantee("M1", "M3")
@pytest.mark.parametrize("seed", range(4))
def test_each_request_is_counted_once_and_no_counter_goes_down_whatever_dies(seed: int) -> None:
    engine = LocalEngine(seed, replicas=2)
    before: dict[str, float] = {}
    states = []
    for victim in ("replica.0", "chip.1.0", "router", "tokenizer.0", "replica.1", "replica.0"):
        states += [engine.submit([20 + n], PARAMS) for n in range(2)]
        engine.system.run_until(lambda state=states[-1]: state.token_ids(0) != [])  # type: ignore[misc]
        engine.nursery.kill(victim)
        for _ in range(2):
            pass_time(engine, 1.1)  # so that the next report is a fresh one
            report = report_of(engine)
            ended = sum(report.finished.values()) + sum(report.failed.values())
            assert report.requests_total == len(states) == ended + report.open_total
            after = dict(counters_of(report))
            assert {name: (was, after.get(name)) for name, was in before.items() if after.get(name, -1) < was} == {}
            before = after
    assert report.finished == {"length": 12}
    assert (report.prompt_tokens, report.output_tokens) == (12, 240)
    assert report.exits >= 6
    assert sum(row.count for row in report.restarts) == sum(r.restarts for r in engine.host.tree)
    assert {row.reason for row in report.restarts if row.worker in ("router", "tokenizer.0")} == {"SIGKILL"}
    assert report.retries_total > 0
    assert any(event.kind == "retried" for event in report.events)
    engine.close()


def test_a_request_with_tokens_shows_its_replica_also_after_it_was_moved() -> None:
    engine = LocalEngine(6, replicas=2)
    states = [engine.submit([20 + n], PARAMS) for n in range(2)]
    assert [row.replica for row in engine.host.reporter.report().open] == [None, None]
    engine.system.run_until(lambda: all(state.token_ids(0) != [] for state in states))
    rows = {row.request_id: row for row in engine.host.reporter.report().open}
    assert {row.replica for row in rows.values()} == {0, 1}
    [moved] = [row for row in rows.values() if row.replica == 0]
    engine.nursery.kill("replica.0")
    state = next(state for state in states if state.request_id == moved.request_id)
    had = len(state.token_ids(0))
    engine.system.run_until(lambda: len(state.token_ids(0)) > had)

    [row] = [row for row in engine.host.reporter.report().open if row.request_id == moved.request_id]
    assert (row.state, row.replica, row.output_tokens) == ("running", 1, len(state.token_ids(0)))
    engine.close()


@pytest.mark.guarantee("M4")
def test_however_many_ask_within_a_second_the_processes_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(1)
    asked: list[str] = []
    ask = engine.host.ctx.ask

    def listen(to: str, message: object, **rest: object) -> object:
        if isinstance(message, (TreeReportRequest, ReplicaStatisticsRequest)):
            asked.append(type(message).__name__)
        return ask(to, message, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.host.ctx, "ask", listen)
    heard: list[EngineReport] = []
    for _ in range(50):
        engine.host.reporter.ask(heard.append)
    engine.system.run_until(lambda: len(heard) == 50)
    engine.host.reporter.ask(heard.append)
    assert len(heard) == 51
    assert sorted(asked) == ["ReplicaStatisticsRequest", "TreeReportRequest"]

    engine.host.ctx.after(1.0, lambda: engine.host.reporter.ask(heard.append))
    engine.system.run_until(lambda: len(heard) == 52)
    assert len(asked) == 4
    engine.close()


@pytest.mark.guarantee("M5")
def test_a_report_comes_in_seconds_whoever_is_stuck_with_what_is_known_of_him() -> None:
    engine = LocalEngine(2, replicas=2, stall_timeout_s=60.0)
    first = report_of(engine)
    assert [process.record.name for process in first.processes if process.node is None] == []
    engine.system.freeze("replica.1", 1e5)
    engine.system.freeze("supervisor", 1e5)
    began_ns = engine.system.clock.now_ns()
    pass_time(engine, 2.0)

    report = report_of(engine)

    assert (engine.system.clock.now_ns() - began_ns) / 1e9 <= 2.0 + ANSWERS_TIMEOUT_S + 0.1
    assert [process.record for process in report.processes[1:]] == [process.record for process in first.processes[1:]]
    assert [row.pages_total for row in report.replicas] == [20, 20]
    assert report.is_ready


@pytest.mark.guarantee("M7")
@pytest.mark.parametrize("seed", range(3))
def test_events_are_numbered_without_gaps_and_tell_a_life_in_order(seed: int) -> None:
    engine = LocalEngine(seed)
    engine.nursery.kill("chip.0.0")
    engine.system.run_until(lambda: any(r.name == "chip.0.0" and r.incarnation == 2 for r in engine.host.tree))
    engine.system.run_until(engine.is_idle)

    events = engine.host.reporter.log.events

    assert [event.number for event in events] == list(range(1, len(events) + 1))
    life = [(event.kind, event.text) for event in events if event.subject == "chip.0.0"]
    assert [kind for kind, _ in life] == ["started", "ready", "exit", "restart", "ready"]
    assert life[2] == ("exit", "signal 9 (SIGKILL)")
    assert life[3] == ("restart", "life 2")
    assert not engine.host.reporter.report().events[-1].text.startswith("pid 0")
    engine.close()


def test_a_group_that_is_given_up_is_an_event_with_the_reason() -> None:
    engine = LocalEngine(7, replicas=2)

    engine.host._group_lost(GroupLost("chip.1.0", "died 6 times within 30 s"), None)

    last = engine.host.reporter.log.events[-1]
    assert (last.kind, last.subject, last.text) == ("lost", "chip.1.0", "died 6 times within 30 s")
    assert engine.deaths == [], "the other replica is left"
    engine.close()


def test_requests_for_which_there_is_no_room_are_refused_and_not_failed() -> None:
    engine = LocalEngine(3, max_waiting=1)
    engine.system.freeze("chip.0.0", 2.0)
    states = [engine.submit([20 + n], PARAMS) for n in range(9)]
    engine.system.run_until(lambda: all(state.is_over for state in states))
    report = report_of(engine)

    assert set(report.failed) == {"Overloaded"}
    assert report.failed["Overloaded"] + report.finished["length"] == 9
    refused = [event for event in report.events if event.kind == "refused"]
    assert 1 <= len(refused) <= 3
    assert "its text may be of a request" in refused[0].text
    engine.close()


def test_requests_that_end_with_the_engine_are_no_news() -> None:
    engine = LocalEngine(4)
    state = engine.submit([20], PARAMS)
    engine.host.fail_all(EngineClosed("closed"))

    assert state.is_over
    report = engine.host.reporter.report()
    assert report.failed == {"EngineClosed": 1}
    assert not report.is_ready
    assert [event for event in report.events if event.kind == "failed"] == []


# Files of a recorded run.


@pytest.fixture(scope="module")
def report() -> EngineReport:
    engine = LocalEngine(5)
    engine.host.reporter.about = About(version="1", model="demo", chip="null", config={"seed": 3})
    engine.submit([20], PARAMS)
    report = report_of(engine)
    engine.close()
    return report


def test_a_report_is_the_same_after_json(report: EngineReport) -> None:
    assert msgspec.json.decode(msgspec.json.encode(report), type=EngineReport) == report


def test_events_that_came_after_the_report_are_read_with_it(tmp_path: Path, report: EngineReport) -> None:
    files = RunFiles(tmp_path)
    for event in report.events:
        files.event(event)
    files.report(report)
    later = Event(number=report.events[-1].number + 1, at_unix_s=1.0, kind="exit", subject="router", text="exit code 1")
    files.event(later)

    assert read_recorded(tmp_path) == attrs.evolve(report, events=(*report.events, later))


@pytest.mark.guarantee("M10")
def test_a_torn_last_line_is_not_read_and_any_other_damage_is_named(tmp_path: Path, report: EngineReport) -> None:
    files = RunFiles(tmp_path)
    for event in report.events:
        files.event(event)
    files.report(report)
    whole = (tmp_path / "events.jsonl").read_bytes()
    last = len(whole.splitlines()[-1]) + 1
    for cut in (1, last // 2, last):
        (tmp_path / "events.jsonl").write_bytes(whole[:-cut])
        assert read_recorded(tmp_path).events == report.events[:-1]

    (tmp_path / "events.jsonl").write_bytes(whole.replace(b'"number":2,', b'"number":"x,', 1))
    with pytest.raises(LedgerCorrupt, match=r"events\.jsonl, line 2 is no event"):
        read_recorded(tmp_path)
    (tmp_path / "events.jsonl").write_bytes(whole)
    (tmp_path / "report.json").write_bytes(b'{"schema": 1, "at_unix_s": "now"}')
    with pytest.raises(LedgerCorrupt, match=r"report\.json is no report"):
        read_recorded(tmp_path)
    (tmp_path / "report.json").write_bytes(b'{"schema": 99}')
    with pytest.raises(ConfigError, match="schema 99; this version reads 1"):
        read_recorded(tmp_path)
    (tmp_path / "report.json").unlink()
    with pytest.raises(ConfigError, match=r"no report of a run at .*report\.json"):
        read_recorded(tmp_path)


def test_a_disk_that_refuses_the_report_is_named_once_and_costs_nothing_else(
    tmp_path: Path, report: EngineReport, caplog: pytest.LogCaptureFixture
) -> None:
    files = RunFiles(tmp_path / "gone")  # removed by somebody, or full: any OSError

    for _ in range(3):
        files.event(report.events[0])
        files.report(report)

    assert [line.getMessage().partition(" ")[0] for line in caplog.records] == ["event='run_files.failed'"]
    assert "events.jsonl" in caplog.text
