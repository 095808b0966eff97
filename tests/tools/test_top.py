"""``bus-run top``: a guest sees who waits for whom, and can do nothing else."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chipbus import Engine, SamplingParams
from chipbus.actors.guest import Guest
from chipbus.actors.messages.launching import ChipReport
from chipbus.actors.messages.tree import (
    ChildRecord,
    ProcessReport,
    ReplicaStatisticsRequest,
    Shutdown,
    TreeReport,
)
from chipbus.bus import NodeReport, PeerDown, Stop
from chipbus.errors import BusError, ConfigError, EngineDead
from chipbus.tools.console import run
from chipbus.tools.run_commands import bus_run
from chipbus.tools.top import HEAD, as_json, cells, choose
from support import eventually

LONG = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)


def bus_run_top(*arguments: str) -> int:
    return run("bus-run", lambda: bus_run, ["top", *arguments])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The only one where engines are looked for; the path is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        monkeypatch.setenv("XDG_RUNTIME_DIR", home)
        monkeypatch.setattr("tempfile.tempdir", home)
        with Engine("demo", chip="null") as running:
            yield running


def run_dir_of(engine: Engine) -> Path:
    assert engine._runtime is not None
    return engine._runtime.processes._run_dir.path


def pid_of(engine: Engine, name: str) -> int:
    return next(record.pid for record in engine.tree() if record.name == name)


@pytest.mark.slow
@pytest.mark.guarantee("S32")
def test_a_stalled_replica_is_silent_and_who_waits_for_it_is_shown(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = engine.stream([1, 2, 3], LONG)
    next(stream)
    os.kill(pid_of(engine, "replica.0"), signal.SIGSTOP)
    try:
        assert bus_run_top("--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert bus_run_top(str(run_dir_of(engine)), "--once") == 0
        table = capsys.readouterr().out
    finally:
        os.kill(pid_of(engine, "replica.0"), signal.SIGCONT)
        stream.close()

    assert told["run_dir"] == str(run_dir_of(engine))
    nodes: dict[str, Any] = {process["name"]: process["node"] for process in told["processes"]}
    assert list(nodes) == ["host", "supervisor", "tokenizer.0", "router", "replica.0", "chip.0.0"]
    assert nodes["replica.0"] is None
    assert (nodes["router"]["waits_for"], nodes["router"]["waits_on"]) == ("Submit", "replica.0")
    assert nodes["router"]["waits_s"] > 0
    assert nodes["router"]["age_s"] > nodes["router"]["waits_s"]
    assert (nodes["host"]["waits_for"], nodes["host"]["waits_on"]) == ("Generate", "tokenizer.0")
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert " silent " in lines["replica.0"]
    assert "Submit of replica.0 for " in lines["router"]


@pytest.mark.slow
@pytest.mark.guarantee("S33")
def test_a_guest_can_do_nothing_but_look(engine: Engine) -> None:
    with Guest(run_dir_of(engine)) as guest:
        for message in (Shutdown(1.0), ReplicaStatisticsRequest(), Stop(0), PeerDown("router", 1, "so they say")):
            assert isinstance(guest.ask(message), BusError)
        assert guest.report().refused == 2  # the node itself refuses the others
        assert [process.record.state for process in guest.report().processes] == ["ready"] * 6

    [output] = engine.generate([1, 2], SamplingParams(max_tokens=3))
    assert len(output.outputs[0].token_ids) == 3
    assert all(record.restarts == 0 for record in engine.tree())


@pytest.mark.slow
def test_a_guest_may_come_again_and_again(engine: Engine) -> None:
    for _ in range(3):
        with Guest(run_dir_of(engine)) as guest:
            assert guest.report().refused == 0


def test_a_directory_without_an_engine_is_named_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def said() -> str:
        return capsys.readouterr().err.splitlines()[0]

    assert (bus_run_top(str(tmp_path / "none"), "--once"), "No such file or directory" in said()) == (2, True)
    assert (bus_run_top(str(tmp_path), "--once"), f"no engine runs in {tmp_path}" in said()) == (1, True)
    assert (bus_run_top("--once"), "no engine of yours is running" in said()) == (1, True)
    tmp_path.chmod(0o755)
    assert (bus_run_top(str(tmp_path), "--once"), "it must be ours, mode 0700" in said()) == (2, True)


def test_of_several_engines_one_has_to_be_named() -> None:
    two = [(Path("/run/chipbus-a"), 7), (Path("/run/chipbus-b"), 8)]

    with pytest.raises(ConfigError, match=r"2 engines .*chipbus-a \(of process 7\), /run/chipbus-b \(of process 8\)"):
        choose(None, two)
    with pytest.raises(EngineDead):
        choose(None, [])
    assert choose(None, two[1:]) == two[1][0]
    assert choose(Path("/x"), two) == Path("/x")


ROUTER = ChildRecord(
    name="router", kind="router", pid=17, parent="supervisor", state="ready", incarnation=2, restarts=1,
    last_exit="exit code 1", phases=(("forked", 1.5),),
)  # fmt: skip
BUSY = NodeReport(
    age_s=3723.4,
    mailbox=5,
    open_asks=2,
    waits_for="Submit",
    waits_on="replica.0",
    waits_s=3.24,
    progress=9,
    is_busy=True,
)
CHIP = ChipReport(1 << 20, "", 0.0, "null", (("decode", 0.3), ("prefill", 0.04)))


def test_a_line_of_the_table_says_what_a_process_is_at() -> None:
    line = dict(zip(HEAD, cells(ProcessReport(ROUTER, BUSY)), strict=True))

    assert line == {
        "process": "router", "owner": "supervisor", "kind": "router", "state": "ready", "pid": "17", "life": "2",
        "restarts": "1", "age": "1:02:03", "mailbox": "5", "asks": "2", "waits for": "Submit of replica.0 for 3.2 s",
        "progress": "9 busy", "last exit": "exit code 1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("state", "pid", "shown"), [("ready", 17, "silent"), ("starting", 0, "starting"), ("backoff", 0, "backoff")]
)
def test_who_should_answer_and_does_not_is_silent(state: str, pid: int, shown: str) -> None:
    record = ChildRecord(name="router", kind="router", pid=pid, parent="", state=state, incarnation=1, restarts=0)

    assert dict(zip(HEAD, cells(ProcessReport(record, None)), strict=True))["state"] == shown


def test_a_line_of_a_chip_says_how_busy_it_was() -> None:
    line = dict(zip(HEAD, cells(ProcessReport(ROUTER, BUSY, CHIP)), strict=True))

    assert line["progress"] == "9 busy, 34 % of a minute"


def test_json_is_one_object_on_one_line() -> None:
    text = as_json(Path("/run/x"), TreeReport(processes=(ProcessReport(ROUTER, BUSY, CHIP),), refused=3))

    assert "\n" not in text
    told = json.loads(text)
    assert (told["run_dir"], told["refused"], told["processes"][0]["phases"]) == ("/run/x", 3, {"forked": 1.5})
    assert told["processes"][0]["node"]["waits_s"] == 3.24
    assert told["processes"][0]["chip"]["busy"] == [["decode", 0.3], ["prefill", 0.04]]


@pytest.mark.slow
def test_a_live_table_ends_with_its_engine(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_dir_of(engine)
    with Guest(run_dir) as guest:
        guest.report()
        engine.close()
        with pytest.raises(EngineDead):
            guest.report()
    eventually(lambda: not run_dir.exists(), "the run directory is gone")
