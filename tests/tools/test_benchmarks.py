"""Benchmarks run and say what they measured; how fast it was is nobody's test."""

from __future__ import annotations

import io
import json
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chipbus.errors import WorkerError
from chipbus.tools import benchmarks, bus_bench, console, lives_bench
from chipbus.tools.bench_figures import as_table, at_least, at_most, compared
from chipbus.tools.run_commands import bus_run
from chipbus.tools.serve.load import run_load
from support import our_processes

DEMO = Path(__file__).resolve().parents[2] / "chipbus" / "demo"


def run(*arguments: str) -> int:
    return console.run("bus-run", lambda: bus_run, ["bench", *arguments])


@pytest.mark.slow
def test_bus_round_trips_are_set_against_bare_sockets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the smallest scale, with every system that this environment has: that is, without xoscar and Ray."""
    counts = {"asks": 20, "peer_asks": 20, "many": 200, "peer_many": 128, "notes": 5000, "peer_notes": 200}
    scale = bus_bench.Scale(**counts, arrays=1, codec=10, warm_ups=0)
    monkeypatch.setattr(bus_bench, "Scale", lambda: scale)
    file = tmp_path / "figures.json"

    assert run("bus", "--rounds", "1", "--json", str(file)) == 0

    where, head, first, bare, queue, simple, xoscar, *_ = capsys.readouterr().out.splitlines()
    assert where.startswith(benchmarks.machine())
    assert head.split()[-2:] == ["aim", "met"]
    assert first.startswith("ask of 64 B, p50")
    assert [line.split("  ")[0] for line in map(str.strip, (bare, queue, simple, xoscar))] == [
        "bare sockets", "mp.Queue", "mp.SimpleQueue", "xoscar",
    ]  # fmt: skip
    assert "not installed" in xoscar
    rows = json.loads(file.read_bytes())["rows"]
    measured = {(row["figure"], row["system"]): row["values"] for row in rows}
    assert all(values == [values[0]] and values[0] > 0 for values in measured.values() if values)
    assert {system for (_, system), values in measured.items() if not values} == {"xoscar", "Ray"}
    figures = {figure for figure, _ in measured}
    assert {"asks, 64 in flight", "one-way, 64 B", "array of 16 MiB, every page read"} < figures


@pytest.mark.slow
def test_lives_of_processes_are_timed_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = lives_bench.Lives(
        wardens=("light",), chips=("null",), owners=("lock",), idle_s=0.1, crashes=1, repeats=1, warm_ups=0
    )  # fmt: skip
    before = our_processes()
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="b-") as directory:  # shorter than tmp_path: sockets are made there
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", None)

        rows = lives_bench.processes(1, lives, None)

        assert list(Path(directory).iterdir()) == []

    measured = {(row.figure, row.system): row.values for row in rows}
    assert all(len(values) == 1 and values[0] >= 0 for values in measured.values())
    assert {
        ("spawn → READY, light child", "chipbus"),
        ("SIGKILL → pending ask fails, light child", "fork, SIGKILL, wait"),
        ("SIGKILL → pending ask fails, light child", "its own end, on a pidfd"),
        ("SIGKILL → next life answers, light child", "chipbus"),
        ("SIGKILL of a serving null chip → its stream goes on", "chipbus"),
        ("owner SIGKILLed → all gone, eight, four of which hold their interpreter's lock", "chipbus"),
        ("idle engine, 8 processes, of one core", "chipbus"),
        ("close of an idle engine, 8 processes", "chipbus"),
    } < set(measured)
    assert our_processes() <= before


def test_an_interpreter_that_cannot_be_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bus", "--peers", "/nowhere/python") == 1
    assert "bus-run: /nowhere/python cannot be run: No such file" in capsys.readouterr().err


def test_an_aim_is_for_the_ratio_of_a_row_that_has_one() -> None:
    ours, bare, missing = compared(
        "ask", "µs", [60.0, 66.0, 70.0], {"bare": [50.0, 33.0, 50.0], "Ray": "not installed"},
        aim=at_most(50), aims={"bare": at_most(1.5), "Ray": at_least(9)},
    )  # fmt: skip

    assert (ours.is_met, ours.aim_text) == (False, "≤ 50 µs")
    assert (bare.ratios, bare.is_met, bare.aim_text) == ((1.2, 2.0, 1.4), True, "≤ 1.5×")
    assert (missing.is_met, missing.aim_text) == (None, "≥ 9×")
    lines = [line.split() for line in as_table([ours, bare, missing]).splitlines()]
    assert lines[1] == ["ask", "chipbus", "66.0", "60.0", "..", "70.0", "µs", "≤", "50", "µs", "NO"]
    assert lines[2][-6:] == ["1.20", "..", "2.00", "≤", "1.5×", "yes"]
    assert lines[3] == ["Ray", "not", "installed", "≥", "9×"]


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


@pytest.mark.slow
def test_a_server_is_measured_in_process_and_over_http_beside_the_least_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, file = our_processes(), tmp_path / "figures.json"

    assert run("serve", "--rounds", "1", "--requests", "32", "--json", str(file)) == 0

    assert capsys.readouterr().out.startswith(benchmarks.machine())
    rows = json.loads(file.read_bytes())["rows"]
    assert [(row["figure"].partition(",")[0], row["system"]) for row in rows] == [
        ("requests in process", "chipbus"),
        ("requests over HTTP", "chipbus"),
        ("requests over HTTP", "starlette alone"),
        ("first token over HTTP", "chipbus"),
        ("of it not the chip's", "chipbus"),
    ]
    assert all(len(row["values"]) == 1 and row["values"][0] > 0 for row in rows)
    assert our_processes() <= before


def test_a_server_that_refuses_or_breaks_off_is_no_figure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        for said in (b"HTTP/1.1 404 Not Found\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n", b""):

            def answer(said: bytes = said) -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(said)

            answered = pool.submit(answer)
            with pytest.raises(WorkerError, match="its last words: " + (said[:12].decode() or "nothing")):
                run_load(listener.getsockname(), "/v1/completions", [b"{}"], 1)
            answered.result(10)
