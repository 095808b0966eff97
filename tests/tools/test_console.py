"""Every way a command can end, as exit code, one sentence and a hint; results on stdout, all else on stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from chipbus import errors
from chipbus.tools import console


def run_command(body: Callable[[], None], *arguments: str) -> int:
    @click.group()
    def program() -> None:
        pass

    @program.command()
    @click.option("--traceback", is_flag=True, expose_value=False)
    @click.option("--max-num-seqs")
    def command(max_num_seqs: str | None) -> None:
        body()

    return console.run("bus-run", lambda: program, ["command", *arguments])


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


EXPECTED = {
    **dict.fromkeys(errors.__all__, 1),
    **dict.fromkeys(("ConfigError", "CheckpointError", "TopologyError", "RunDirectoryInUse"), 2),
    **dict.fromkeys(("RequestInvalid", "ContextTooLong", "BadTarget"), 2),
    "LedgerCorrupt": 2,
    "ReplayDiverged": 11,
}


@pytest.mark.parametrize("name", errors.__all__)
def test_each_error_of_ours_is_its_sentence_and_its_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = getattr(errors, name)
    code = run_command(raising(error("setting x is 3;\n it must be 4")))

    shown = capsys.readouterr()
    assert code == EXPECTED[name]
    assert shown.out == ""
    number = f"{error.name} ({error.code}): " if issubclass(error, errors.NumberedError) else ""
    assert shown.err.splitlines()[0] == f"bus-run: {number}setting x is 3; it must be 4"
    assert all(line.startswith("hint: ") for line in shown.err.splitlines()[1:])


def test_a_numbered_error_is_three_lines_what_failed_what_to_do_and_what_it_began_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = errors.CoreException("task 3 of matmul (store) failed: ValueError: no")

    run_command(raising(errors.TaskAborted("dispatch 2 was not run").caused_by(first)))

    what, hint, cause = capsys.readouterr().err.splitlines()
    assert what == "bus-run: TASK_ABORT (107022): dispatch 2 was not run"
    assert hint == "hint: look at the first cause"
    assert cause.startswith("first cause: CORE_EXCEPTION (507015): task 3 of matmul (store) failed: ValueError: no")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (click.UsageError("no such thing"), 2, "no such thing"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero"),
        (MemoryError(), 1, "internal error: MemoryError: "),
    ],
)
def test_any_other_ending_is_a_sentence_too(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error)) == code

    shown = capsys.readouterr()
    assert f"bus-run: {words}" in shown.err
    assert "Traceback" not in shown.err


def test_traceback_shows_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(errors.ConfigError("wrong")), "--traceback") == 2

    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in body" in shown
    assert "bus-run: wrong" in shown


@pytest.mark.parametrize("argument", ["--max-num-seq", "--max-nums-seqs"])
def test_an_unknown_flag_names_the_nearest(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None, argument, "3") == 2

    shown = capsys.readouterr().err
    assert argument in shown
    assert "'--max-num-seqs'" in shown
    assert "hint: see bus-run command --help" in shown


def test_help_and_success_are_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: None, "--help") == 0
    assert "--max-num-seqs" in capsys.readouterr().out


def test_a_reader_that_left_is_no_failure() -> None:
    code = (
        "import sys, click; from chipbus.tools import console\n"
        "@click.command()\n"
        "def endless():\n"
        "    while True: click.echo('x' * 1000)\n"
        "sys.exit(console.run('bus-run', lambda: endless, []))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read(100)
    child.stdout.close()

    _, shown = child.communicate(timeout=20)

    assert (shown, child.returncode) == (b"", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_with_130_and_one_line(number: signal.Signals) -> None:
    code = (
        "import sys, threading, click; from chipbus.tools import console\n"
        "@click.command()\n"
        "def waiting():\n"
        "    click.echo('waiting')\n"
        "    while not threading.Event().wait(0.1): pass\n"  # a signal just before a wait is seen after it
        "sys.exit(console.run_process('bus-run', lambda: waiting))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()

    os.kill(child.pid, number)
    _, shown = child.communicate(timeout=20)

    assert child.returncode == 130
    assert shown.strip() == "bus-run: interrupted"
