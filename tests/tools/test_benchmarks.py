"""Benchmarks run and say what they measured; how fast it was is nobody's test."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from chipbus.tools import benchmarks, console
from chipbus.tools.run_commands import bus_run

DEMO = Path(__file__).resolve().parents[2] / "chipbus" / "demo"


def run(*arguments: str) -> int:
    return console.run("bus-run", lambda: bus_run, ["bench", *arguments])


@pytest.mark.slow
def test_bus_round_trips_are_set_against_bare_sockets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bus", "--rounds", "1") == 0

    machine, _, *rows = capsys.readouterr().out.splitlines()
    assert machine.startswith(benchmarks.machine())
    assert [row.split("  ")[0] for row in rows] == ["ask", "bare sockets", "ratio"]


@pytest.mark.slow
def test_engine_overhead_is_told_as_part_of_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("engine", "--chip", "null", "--rounds", "1", "--tokens", "4", "--batch", "2") == 0

    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("  ")[0] for row in rows] == [
        "tokens per second, all requests", "step", "engine overhead, step minus chip",
    ]  # fmt: skip
    assert rows[2].endswith("% of the step")


@pytest.mark.slow
def test_kernels_are_told_a_line_per_work_and_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert run("kernels", "--rounds", "1", "--threads", "1", "--trace", str(trace)) == 0

    where, engine, _, head, *rows, _ = capsys.readouterr().out.splitlines()
    assert where.startswith(f"{benchmarks.machine()}; demo, 1 threads, 1 rounds")
    assert engine.startswith("engine ")
    assert head.split()[-4:] == ["%", "busy", "per", "core"]
    works = ["decode 1", "decode 4", "decode 16", "prefill 128", "prefill 512"]
    assert [row.split("  ")[0] for row in rows[:5]] == works
    events = json.loads(trace.read_bytes())["traceEvents"]
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == ["decode 1 (wall clock)", "prefill 128 (wall clock)"]


@pytest.mark.slow
def test_the_line_server_answers_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("decode 1\nprefill 8\nrest 3\n"))

    assert run("kernels", str(DEMO), "--line-server", "--threads", "1") == 0

    ready, decode, prefill, unknown = capsys.readouterr().out.splitlines()
    assert ready == "ready"
    assert float(decode) > 0
    assert float(prefill) > 0
    assert unknown.startswith("nan ")


def test_a_command_that_fails_while_it_is_timed_is_told_with_its_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")

    assert run("start", "--rounds", "1") == 1
    assert "bus-run: -c pass ended with exit code 1: it said nothing" in capsys.readouterr().err
