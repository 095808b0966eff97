"""A guest with manners: what an engine must leave alone in the program that embeds it."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chipbus import AsyncEngine, Engine, SamplingParams, errors
from support import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens(engine: Engine) -> tuple[int, ...]:
    return engine.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids


@pytest.mark.guarantee("E20")
def test_signals_environment_streams_and_directory_of_the_host_are_as_before() -> None:
    def picture() -> object:
        return (
            {signum: signal.getsignal(signum) for signum in signal.valid_signals()},
            signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            dict(os.environ),
            list(sys.path),
            Path.cwd(),
            sys.stdout,
            sys.stderr,
            sys.excepthook,
            threading.excepthook,
            os.getpriority(os.PRIO_PROCESS, 0),
            os.getpgid(0),
        )

    before = picture()
    with Engine("demo", chip="null") as engine:
        tokens(engine)
        assert picture() == before
    assert picture() == before


@pytest.mark.guarantee("E21")
def test_the_hosts_own_children_are_the_hosts() -> None:
    own = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(7)"], stdin=subprocess.PIPE)
    with Engine("demo", chip="null") as engine:
        assert own.stdin is not None
        own.stdin.close()
        assert own.wait(10) == 7
        forked = os.fork()
        if forked == 0:
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 3
        victim = next(record for record in engine.tree() if record.name == "router")
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: [r.state for r in engine.tree() if r.incarnation == 2] == ["ready"], "the router is back")
        assert tokens(engine)


def test_a_host_that_waits_for_any_child_takes_nothing_the_engine_needs() -> None:
    engine = Engine("demo", chip="null")
    reaped: list[int] = []

    def reap_all() -> None:
        try:
            while True:
                reaped.append(os.wait()[0])
        except ChildProcessError:
            return

    supervisor = next(record.pid for record in engine.tree() if record.kind == "supervisor")
    reaper = threading.Thread(target=reap_all)
    reaper.start()
    assert tokens(engine)
    report = engine.close()
    reaper.join(10)
    assert set(reaped) <= {supervisor}  # or the engine was faster
    assert report.left == ()


@pytest.mark.guarantee("E22")
def test_an_engine_outlives_the_thread_that_made_it() -> None:
    made: list[Engine] = []
    maker = threading.Thread(target=lambda: made.append(Engine("demo", chip="null")))
    maker.start()
    maker.join()
    with made[0] as engine:
        answers: list[tuple[int, ...]] = []
        callers = [threading.Thread(target=lambda: answers.append(tokens(engine))) for _ in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(20)
        assert answers == [tokens(engine)] * 8
        assert all(record.incarnation == 1 for record in engine.tree())


@pytest.mark.guarantee("E23")
def test_several_engines_of_one_process_share_nothing() -> None:
    with Engine("demo", chip="null") as one, Engine("demo", chip="null", data_parallel_size=2) as two:
        expected = tokens(one)
        os.kill(next(r.pid for r in one.tree() if r.kind == "supervisor"), signal.SIGKILL)
        eventually(lambda: one._runtime.processes.death is not None, "the first engine knows that it is dead")
        with pytest.raises(errors.EngineDead):
            tokens(one)
        assert tokens(two) == expected
        one.close()
        assert tokens(two) == expected
        assert all(record.incarnation == 1 for record in two.tree())


@pytest.mark.guarantee("E24")
def test_a_running_event_loop_may_use_either_engine() -> None:
    """As a notebook does: its cells run inside a loop, and its streams are no files."""

    async def cells() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(tick())
        with Engine("demo", chip="null") as engine:  # blocks the cell, as any other call in it
            expected = tokens(engine)
        async with AsyncEngine("demo", chip="null") as engine:
            before = ticks
            [answer] = await engine.generate([5, 6, 7], GREEDY)
            assert answer.outputs[0].token_ids == expected
            assert ticks > before, "the host's loop went on"
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(4)")
            assert await process.wait() == 4
        other.cancel()

    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        asyncio.run(cells())
        assert sys.stdout.getvalue() == ""
    finally:
        sys.stdout, sys.stderr = out, err


SCRIPT = """
from chipbus import Engine, SamplingParams
engine = Engine("demo", chip="null")
print(len(engine.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
"""


@pytest.mark.guarantee("E25")
@pytest.mark.parametrize("how", ["file", "stdin", "argument", "interactive"])
def test_a_program_needs_no_main_guard(how: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(SCRIPT)
    arguments = {"file": [str(path)], "stdin": ["-"], "argument": ["-c", SCRIPT], "interactive": ["-i", "-q"]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if how in ("stdin", "interactive") else "",
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.guarantee("E26")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_pools_that_fork_the_host_do_no_harm_and_are_told() -> None:
    with Engine("demo", chip="null") as engine:
        expected = tokens(engine)

        def in_copy(pipe: multiprocessing.connection.Connection) -> None:
            try:
                tokens(engine)
            except errors.EngineClosed as error:
                pipe.send_bytes(str(error).encode())

        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        copy = context.Process(target=in_copy, args=(theirs,))
        copy.start()
        said = ours.recv_bytes().decode()
        copy.join(10)
        assert copy.exitcode == 0  # it ran its exit hooks, too
        assert said.startswith(f"this engine belongs to process {os.getpid()}; {copy.pid} is a forked copy")
        assert tokens(engine) == expected
        assert all(record.incarnation == 1 for record in engine.tree())
        for connection in (ours, theirs):
            connection.close()
        copy.close()


def test_a_forked_copy_can_make_an_engine_of_its_own() -> None:
    with Engine("demo", chip="null") as engine:
        expected = tokens(engine)
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with Engine("demo", chip="null") as own:
                    os.write(write_fd, repr(tokens(own)).encode())
            finally:
                os._exit(0)
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as pipe:
            assert pipe.read().decode() == repr(expected)
        os.waitpid(pid, 0)
        assert tokens(engine) == expected
