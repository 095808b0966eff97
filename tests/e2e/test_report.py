"""Reports and events of real engines on null chips, and what a recorded run leaves for later."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from chipbus import AsyncEngine, Engine, SamplingParams
from chipbus.actors.report import EngineReport, Event
from chipbus.actors.run_files import read_recorded
from chipbus.errors import ChipbusError, EngineClosed
from support import comes_true, eventually

SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SECRET = "Xyzzy plugh: the key is kryptonite-4711081547."
KILLED_HOST = """
import os, signal, sys
from chipbus import Engine, SamplingParams
if __name__ == "__main__":
    engine = Engine("demo", chip="null", record=sys.argv[1], log_level="error")
    engine.generate([[5, 6], [7]], SamplingParams(max_tokens=4, ignore_eos=True))
    print(engine.report().events[-1].number, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_report_has_every_process_and_what_was_served() -> None:
    with Engine("demo", chip="null", data_parallel_size=2) as engine:
        before = engine.report()
        assert before.is_ready
        assert before.requests_total == before.open_total == 0
        engine.generate([[5 + n] for n in range(8)], SHORT)
        with pytest.raises(ChipbusError):
            engine.generate("")

        report = engine.report()

        assert (report.model, report.chip, report.run_dir, report.record) == ("demo", "null", engine.run_dir, "")
        assert report.config["data_parallel_size"] == 2
        names = ["host", "supervisor", "tokenizer.0", "router", "replica.0", "chip.0.0", "replica.1", "chip.1.0"]
        assert [process.record.name for process in report.processes] == names
        assert all(process.node is not None for process in report.processes)
        assert report.processes[0].record.pid == os.getpid()
        assert dict(report.processes[1].node.lanes).keys() == {"kill", "stop", "child", "health", "work"}  # type: ignore[union-attr]
        assert (report.requests_total, report.finished, report.failed) == (9, {"length": 8}, {"RequestInvalid": 1})
        assert (report.prompt_tokens, report.output_tokens, report.recent_output_tokens) == (8, 48, 48)
        assert sum(report.latencies.inter_token.counts) <= 40
        assert report.latencies.e2e.total >= report.latencies.time_to_first_token.total > 0
        assert report.recent_s < 60
        assert comes_true(lambda: sum(row.tokens_generated for row in engine.report().replicas) == 48, 5)
    with pytest.raises(EngineClosed):
        engine.report()


def test_a_closed_engines_record_ends_with_a_report_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Engine("demo", chip="null", record=Path("run"), log_level="error") as engine:
        monkeypatch.chdir("/")  # the host application may move: its record stays
        engine.generate([5, 6, 7], SHORT)
        eventually(lambda: read_recorded(tmp_path / "run").is_ready, "it is written that the engine is ready")
        living = engine.report()
        assert all(totals.ledger_bytes > 0 for totals in living.totals)
        assert {totals.name for totals in living.totals} == {r.name for r in engine.tree()} | {"host"}

    last = read_recorded(tmp_path / "run")

    assert last.is_closed
    assert not last.is_ready
    assert (last.finished, last.output_tokens, last.open_total) == ({"length": 1}, 6, 0)
    assert [event.kind for event in last.events][-4:] == ["exit"] * 4
    assert [event.number for event in last.events] == list(range(1, len(last.events) + 1))


@pytest.mark.slow
@pytest.mark.guarantee("M9")
def test_a_killed_host_application_leaves_its_events_and_its_latest_report(tmp_path: Path) -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", KILLED_HOST, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert host.stdin is not None
    assert host.stdout is not None
    last_number = int(host.stdout.readline())
    eventually(lambda: read_recorded(tmp_path / "run").finished == {"length": 2}, "the report is written", 20)
    host.stdin.write("\n")
    host.stdin.close()
    assert host.wait(20) == -signal.SIGKILL
    host.stdout.close()

    report = read_recorded(tmp_path / "run")

    assert not report.is_closed
    assert report.output_tokens == 8
    assert [event.number for event in report.events] == list(range(1, last_number + 1))
    assert {event.kind for event in report.events} == {"started", "ready"}


@pytest.mark.guarantee("M12")
def test_no_report_and_no_event_repeats_what_a_request_says(tmp_path: Path) -> None:
    with Engine("demo", chip="null", record=tmp_path / "run", log_level="error", max_model_len=512) as engine:
        engine.generate(SECRET, SHORT)
        for wrong in (SECRET * 500, SECRET + "\udc80"):
            with pytest.raises(ChipbusError):
                engine.generate(wrong, SHORT)
        victim = next(record.pid for record in engine.tree() if record.name == "tokenizer.0")
        os.kill(victim, signal.SIGKILL)
        engine.generate(SECRET, SHORT)
        report = engine.report()
        assert {event.kind for event in report.events} >= {"refused", "exit", "restart"}
        said = msgspec.json.encode(report).lower()

    for path in ("report.json", "events.jsonl"):
        said += (tmp_path / "run" / path).read_bytes().lower()
    assert said.count(b"sigkill") >= 2
    for secret in (b"xyzzy", b"plugh", b"kryptonite", b"4711081547"):
        assert secret not in said


@pytest.mark.guarantee("M11")
def test_a_disk_that_refuses_reports_and_events_is_named_once_and_disturbs_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine("demo", chip="null", record=tmp_path / "run", log_level="error") as engine:
        (tmp_path / "run").rename(tmp_path / "moved")  # the files are opened by name, the ledgers are open
        engine.generate([5], SHORT)
        os.kill(next(record.pid for record in engine.tree() if record.name == "router"), signal.SIGKILL)
        engine.generate([5], SHORT)
        eventually(lambda: engine.report().exits == 1, "the router's end is known")
        assert engine.report().finished == {"length": 2}
    assert caplog.text.count("run_files.failed") == 1


@pytest.mark.guarantee("M14")
def test_the_end_of_each_request_is_logged_with_its_facts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Engine("demo", chip="null", log_level="error") as engine:
        [output] = engine.generate(SECRET, SHORT)
        with pytest.raises(ChipbusError):
            engine.generate("", SHORT)

    finished, failed = (
        [line for line in caplog.messages if line.startswith(f"event='request.{how}'")]
        for how in ("finished", "failed")
    )
    assert len(finished) == len(failed) == 1
    facts = (
        f"request='{output.request_id}' finish_reason='length' attempt=1 prompt_tokens={len(output.prompt_token_ids)}"
    )
    assert f"{facts} output_tokens=6 replica=0 ttft_s=0." in finished[0]
    assert "error='RequestInvalid' attempt=1 prompt_tokens=0 output_tokens=0 ttft_s=None e2e_s=" in failed[0]


@pytest.mark.slow
@pytest.mark.guarantee("M13")
def test_a_reader_of_events_gets_each_once_as_it_happens_until_the_engine_ends() -> None:
    async def main() -> tuple[list[Event], EngineReport]:
        heard: list[Event] = []
        is_back = asyncio.Event()

        async def listen(engine: AsyncEngine) -> None:
            async for event in engine.events():
                heard.append(event)
                if (event.kind, event.subject) == ("restart", "router"):
                    is_back.set()

        async with AsyncEngine("demo", chip="null", log_level="error") as engine:
            listener = asyncio.create_task(listen(engine))
            await engine.generate([[5]], SHORT)
            os.kill(next(record.pid for record in engine.tree() if record.name == "router"), signal.SIGKILL)
            await asyncio.wait_for(is_back.wait(), 20)
            reports = await asyncio.gather(*(engine.report() for _ in range(4)))
            seen = len(heard)
            later = [event async for event in _first(engine, after=seen - 2, count=2)]
            assert later == heard[seen - 2 : seen]
        await asyncio.wait_for(listener, 20)
        return heard, reports[0]

    heard, report = asyncio.run(main())

    assert [event.number for event in heard] == list(range(1, len(heard) + 1))
    assert ("exit", "router", "signal 9 (SIGKILL)") in [(event.kind, event.subject, event.text) for event in heard]
    assert report.finished == {"length": 1}


async def _first(engine: AsyncEngine, after: int, count: int):  # type: ignore[no-untyped-def]
    events = engine.events(after)
    for _ in range(count):
        yield await anext(events)
    await events.aclose()
