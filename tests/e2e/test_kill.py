"""Processes die; callers get tokens or a typed error, never a hang, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import psutil
import pytest
from native_runs import NEEDS_NATIVE

from chipbus import Engine, SamplingParams, errors
from support import eventually, holders, run_directories, weight_files

LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def pid_of(engine: Engine, name: str) -> int:
    return next(record.pid for record in engine.tree() if record.name == name)


def incarnation_of(engine: Engine, name: str) -> tuple[int, str]:
    return next((record.incarnation, record.state) for record in engine.tree() if record.name == name)


class Reader:
    """Reads one stream on a thread, and says how it ended and when."""

    def __init__(self, engine: Engine, prompt: list[int], params: SamplingParams = LONG) -> None:
        self.started, self.ended = threading.Event(), threading.Event()
        self.tokens: list[int] = []
        self.attempt = 0  # that gave the last token
        self.error: BaseException | None = None
        self._stream = engine.stream(prompt, params)
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        assert self.started.wait(20)

    def _read(self) -> None:
        try:
            for delta in self._stream:
                self.tokens += delta.outputs[0].token_ids
                self.attempt = delta.attempt
                self.started.set()
        except errors.ChipbusError as error:
            self.error = error
        self.started.set()
        self.ended.set()


@pytest.mark.guarantee("E2")
@pytest.mark.parametrize(
    ("victim", "chip", "params"),
    [
        ("tokenizer.0", "null", LONG),
        ("router", "cpu", attrs.evolve(LONG, max_tokens=300, temperature=0.8, seed=7)),
        ("replica.0", "cpu", attrs.evolve(LONG, max_tokens=300)),
    ],
)
def test_a_killed_process_costs_no_token_and_is_replaced(victim: str, chip: str, params: SamplingParams) -> None:
    with Engine("demo", chip=chip, threads=1) as engine:
        undisturbed = [t for d in engine.stream([1, 2, 3], params) for t in d.outputs[0].token_ids]
        reader = Reader(engine, [1, 2, 3], params)
        os.kill(pid_of(engine, victim), signal.SIGKILL)

        assert reader.ended.wait(20)
        reader.thread.join()
        assert reader.error is None, reader.error
        assert reader.tokens == undisturbed
        assert reader.attempt > 1, "it was struck while the request ran"
        eventually(lambda: incarnation_of(engine, victim) == (2, "ready"), f"{victim} is ready again")
        statistics = engine.statistics()
        assert statistics.restarts >= 1
        assert statistics.pages_free == statistics.pages_total


@pytest.mark.slow
@pytest.mark.guarantee("E1")
def test_a_killed_chip_is_replaced_and_its_requests_go_on() -> None:
    with Engine("demo", chip="null") as engine:
        undisturbed = [t for d in engine.stream([1, 2, 3], LONG) for t in d.outputs[0].token_ids]
        reader = Reader(engine, [1, 2, 3])
        os.kill(pid_of(engine, "chip.0.0"), signal.SIGKILL)

        assert reader.ended.wait(20)
        reader.thread.join()
        assert reader.error is None
        assert reader.tokens == undisturbed
        assert incarnation_of(engine, "chip.0.0") == (2, "ready")
        assert incarnation_of(engine, "replica.0") == (1, "ready")
        statistics = engine.statistics()
        assert statistics.pages_free == statistics.pages_total


@NEEDS_NATIVE
@pytest.mark.slow
@pytest.mark.guarantee("E13")
def test_the_next_life_of_a_chip_finds_the_packed_weights(capfd: pytest.CaptureFixture[str]) -> None:
    with Engine("demo", log_level="info", threads=1) as engine:
        undisturbed = [t for d in engine.stream([1, 2, 3], LONG) for t in d.outputs[0].token_ids]
        [file] = weight_files(pid_of(engine, "supervisor"))
        reader = Reader(engine, [1, 2, 3])
        os.kill(pid_of(engine, "chip.0.0"), signal.SIGKILL)

        assert reader.ended.wait(30)
        reader.thread.join()
        assert reader.error is None
        assert reader.tokens == undisturbed
        assert incarnation_of(engine, "chip.0.0") == (2, "ready")
        maps = Path(f"/proc/{pid_of(engine, 'chip.0.0')}/maps").read_text().splitlines()
        mapped = [line.split() for line in maps if "memfd:chipbus-weights" in line]
        assert {(access, int(number)) for _, access, _, _, number, *_ in mapped} == {("r--p", file)}

    said = [line.partition("how=")[2] for line in capfd.readouterr().err.splitlines() if "chip.weights" in line]
    assert said == ['"packed: nothing is there yet"', "mapped"]
    assert holders(file) == []


@NEEDS_NATIVE
@pytest.mark.slow
@pytest.mark.guarantee("E14")
def test_packed_weights_are_gone_with_a_killed_host_application() -> None:
    program = [sys.executable, "-c", HOST.replace('chip="null", ', "")]
    host = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    assert host.stdin is not None
    supervisor = int(host.stdout.readline().split()[1])
    files = weight_files(supervisor)
    assert len(files) == 2
    assert [len(holders(file)) for file in files] == [2, 2]  # it, and the chip

    host.kill()
    host.wait(10)
    host.stdout.close()
    host.stdin.close()

    eventually(lambda: not any(holders(file) for file in files), "nobody has them open")


@pytest.mark.slow
@pytest.mark.guarantee("E12")
def test_the_other_replica_takes_over() -> None:
    with Engine("demo", chip="null", data_parallel_size=2) as engine:
        undisturbed = [t for d in engine.stream([1, 2, 3], LONG) for t in d.outputs[0].token_ids]
        readers = [Reader(engine, [1, 2, 3]), Reader(engine, [1, 2, 3])]
        os.kill(pid_of(engine, "replica.1"), signal.SIGKILL)

        assert all(reader.ended.wait(20) for reader in readers)
        for reader in readers:
            reader.thread.join()
        assert [reader.error for reader in readers] == [None, None]
        assert [reader.tokens for reader in readers] == [undisturbed, undisturbed]


@pytest.mark.guarantee("E15")
def test_a_replica_is_drained_from_outside_and_its_requests_lose_nothing() -> None:
    with Engine("demo", chip="null", data_parallel_size=2) as engine:
        undisturbed = [t for d in engine.stream([1, 2, 3], LONG) for t in d.outputs[0].token_ids]
        readers = [Reader(engine, [1, 2, 3]), Reader(engine, [1, 2, 3])]
        command = [sys.executable, "-P", "-m", "chipbus.tools.bus_run", "drain"]
        done = subprocess.run(
            [*command, "replica.1", engine.run_dir, "--timeout", "0.1"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stdout.startswith("replica.1 is started afresh")) == (0, True), done.stderr
        for reader in readers:
            assert reader.ended.wait(20)
            reader.thread.join()
            assert (reader.error, reader.tokens) == (None, undisturbed)
        eventually(lambda: incarnation_of(engine, "replica.1") == (2, "ready"), "replica 1 is back")
        assert incarnation_of(engine, "replica.0") == (1, "ready")
        assert engine.drain("replica.1") is True
        refused = subprocess.run(
            [*command, "replica.7", engine.run_dir], capture_output=True, text=True, timeout=30, check=False
        )
        assert refused.returncode == 2
        assert "its replicas are replica.0, replica.1" in refused.stderr


@pytest.mark.guarantee("E4")
def test_a_killed_supervisor_is_engine_dead_not_a_hang() -> None:
    with Engine("demo", chip="null") as engine:
        reader = Reader(engine, [1, 2, 3])
        os.kill(pid_of(engine, "supervisor"), signal.SIGKILL)

        assert reader.ended.wait(10)
        reader.thread.join()
        assert isinstance(reader.error, errors.EngineDead)
        with pytest.raises(errors.EngineDead):
            engine.generate([1], SHORT)


@pytest.mark.slow
@pytest.mark.guarantee("S26")
def test_a_stopped_supervisor_is_killed_and_everything_ends_with_engine_dead() -> None:
    with Engine("demo", chip="null", stall_timeout_s=1.0) as engine:
        os.kill(pid_of(engine, "supervisor"), signal.SIGSTOP)
        ended: list[BaseException] = []

        def call() -> None:
            try:
                while True:
                    engine.generate([1, 2, 3], LONG)
            except errors.ChipbusError as error:
                ended.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        caller.join(20)
        assert not caller.is_alive()
        assert isinstance(ended[0], errors.EngineDead)
        assert "supervisor gave no answer to heartbeats for 1 s" in str(ended[0])
        with pytest.raises(errors.EngineDead):
            engine.generate([1], SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["tokenizer.0", "router", "replica.0", "chip.0.0"])
def test_a_stopped_process_costs_a_pause_and_no_token(victim: str) -> None:
    with Engine("demo", chip="null", stall_timeout_s=1.0) as engine:
        undisturbed = [t for d in engine.stream([1, 2, 3], LONG) for t in d.outputs[0].token_ids]
        reader = Reader(engine, [1, 2, 3])
        os.kill(pid_of(engine, victim), signal.SIGSTOP)

        assert reader.ended.wait(20)
        reader.thread.join()
        assert (reader.error, reader.tokens) == (None, undisturbed)
        assert incarnation_of(engine, victim)[0] == 2


@pytest.mark.guarantee("E5")
def test_a_child_that_keeps_dying_is_given_up_with_a_typed_error() -> None:
    with Engine("demo", chip="null", max_restarts=1) as engine:
        for life in (1, 2):
            eventually(lambda n=life: incarnation_of(engine, "chip.0.0") == (n, "ready"), "the chip is up")  # type: ignore[misc]
            os.kill(pid_of(engine, "chip.0.0"), signal.SIGKILL)
        eventually(lambda: incarnation_of(engine, "chip.0.0")[1] == "gone", "the group was given up")

        with pytest.raises((errors.RestartLimit, errors.NotReady, errors.EngineDead)):
            engine.generate([1], SHORT)


HOST = """
import sys
from chipbus import Engine, SamplingParams
engine = Engine("demo", chip="null", data_parallel_size=2)
stream = engine.stream([1, 2], SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True))
next(stream)
print(engine._runtime.processes._run_dir.path, *[record.pid for record in engine.tree()], flush=True)
for _ in stream:
    pass
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.guarantee("E3")
@pytest.mark.parametrize("stopped", [None, "supervisor"])
def test_a_killed_host_application_leaves_nothing(stopped: str | None) -> None:
    before = run_directories()
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    assert host.stdin is not None
    line = host.stdout.readline().split()
    pids = [int(word) for word in line[1:]]
    descendants = [process.pid for process in psutil.Process(host.pid).children(recursive=True)]
    assert set(pids) <= set(descendants)
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)

    host.kill()
    host.wait(10)
    host.stdout.close()
    host.stdin.close()

    eventually(lambda: not any(psutil.pid_exists(pid) for pid in descendants), "every descendant is gone")
    eventually(lambda: run_directories() <= before, "the run directory is gone")


@pytest.mark.slow
@pytest.mark.guarantee("E7")
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 0.4, 1.0])
def test_ctrl_c_at_any_moment_leaves_nothing(after_s: float) -> None:
    before = run_directories()
    process = subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(after_s + 0.01)  # let it get somewhere
    parent = psutil.Process(process.pid)
    seen = [child.pid for child in parent.children(recursive=True)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)

    eventually(lambda: not any(psutil.pid_exists(pid) for pid in seen), "every descendant is gone")
    eventually(lambda: run_directories() <= before, "the run directory is gone")
