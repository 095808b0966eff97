"""The frame around a command line of ours: exit codes, one-line errors with a hint, Ctrl-C at any moment.

Owns: the process's signal handlers. Only this module turns exceptions into exit codes; it imports
nothing heavy itself, so that an interrupt while a command's modules load is already answered politely.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

__all__ = [
    "EXIT_DIVERGED",
    "EXIT_FAILED",
    "EXIT_FINE",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "Terminated",
    "run",
    "run_process",
]

EXIT_FINE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DIVERGED = 11
EXIT_INTERRUPTED = 130

_MORE = "--traceback shows where it was raised"


class Terminated(KeyboardInterrupt):
    """SIGTERM: an interrupt for everybody who does not ask; a command that lives on after Ctrl-C can tell."""


def run_process(program: str, load: Callable[[], click.Command]) -> int:
    """``run`` with the process's own arguments and signals: for a console script.

    SIGTERM is treated as Ctrl-C: what runs is closed in order, and the code is 130. A second one while closing kills.
    """
    try:
        signal.signal(signal.SIGTERM, _terminated)
        code = run(program, load, sys.argv[1:])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is closed and said; an interrupt now could only garble it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:  # while an earlier ending was being told
        return EXIT_INTERRUPTED
    return code


def _terminated(_: int, __: object) -> None:
    raise Terminated


def run(program: str, load: Callable[[], click.Command], arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; results go to stdout, everything else to stderr.

    program:   the name in front of every error, ``bus-run``
    load:      imports and returns the click command
    arguments: without the program's name
    """
    try:
        command = load()
        with command.make_context(program, list(arguments)) as context:  # click's own main() would decide the codes
            command.invoke(context)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 (the last boundary: every ending becomes an exit code and a sentence)
        code, sentence, hint = _verdict(error)
        with contextlib.suppress(OSError):
            if "--traceback" in arguments:
                traceback.print_exception(error)
            if sentence:
                print(f"{program}: {sentence}", file=sys.stderr)
            if hint:
                print(f"hint: {hint}", file=sys.stderr)
            sys.stdout.flush()
        return code
    return EXIT_FINE


def _verdict(error: BaseException) -> tuple[int, str, str]:
    """Exit code, sentence and hint for whatever ended the command; an empty one is not printed."""
    import click

    from .. import errors

    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return EXIT_INTERRUPTED, "interrupted", ""
    if isinstance(error, BrokenPipeError):  # the reader of our output left, as in `| head`: nothing has failed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINE, "", ""
    if isinstance(error, click.exceptions.Exit):  # --help and --version
        return error.exit_code, "", ""
    if isinstance(error, click.ClickException):
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        return EXIT_USAGE, _one_line(error.format_message()), f"see {where} --help" if where else ""
    if isinstance(error, errors.ReplayDiverged):
        return EXIT_DIVERGED, _one_line(str(error)), ""
    if isinstance(error, errors.NumberedError):
        cause = f"\nfirst cause: {_one_line(error.first_cause)}" if error.first_cause else ""
        return EXIT_FAILED, f"{error.name} ({error.code}): {_one_line(error.detail)}", error.hint + cause
    if isinstance(error, errors.ChipbusError):
        is_refusal = isinstance(error, (errors.ConfigError, errors.RequestInvalid, errors.LedgerCorrupt))
        return EXIT_USAGE if is_refusal else EXIT_FAILED, _one_line(str(error)), _hint(error)
    return EXIT_FAILED, f"internal error: {type(error).__name__}: {_one_line(str(error))}", _MORE


def _hint(error: Exception) -> str:
    """What to do about an error of ours, by its class; the most special class with a hint speaks."""
    from .. import errors

    hints: dict[type[BaseException], str] = {
        errors.CheckpointError: "bus-run check MODEL reads a model directory without starting anything",
        errors.ConfigError: "bus-run check --print-config shows every setting and where it comes from",
        errors.ContextTooLong: "shorten the prompt, or raise --max-model-len if model and memory allow",
        errors.RequestInvalid: "bus-run generate --help lists the fields of a request",
        errors.Overloaded: "send fewer prompts at once, or raise --max-waiting",
        errors.LedgerCorrupt: "entries before the break are intact, but a broken record proves nothing",
        errors.StartFailed: "--log-level info shows how far each process came",
        errors.WorkerDied: "--log-level info shows restarts and exits",
    }
    return next((hints[kind] for kind in type(error).__mro__ if kind in hints), _MORE)


def _one_line(text: str) -> str:
    return " ".join(text.split())
