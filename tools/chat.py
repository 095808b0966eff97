"""``bus-run chat``: a conversation in the terminal, through a whole engine that is gone afterwards.

Owns: the engine while it runs, and the turns of the conversation.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from typing import Protocol

import attrs

from ..actors.config import EngineConfig
from ..actors.engine import Engine, as_turns
from ..actors.logs import configure_logging
from ..actors.outputs import RequestOutput
from ..actors.plan import plan_engine
from ..actors.sampling import SamplingParams
from ..actors.text import TextModel
from ..bus import Progress
from ..errors import ChipbusError, ContextTooLong, EngineClosed, EngineDead, RequestInvalid
from .console import Terminated
from .progress import progress_view

__all__ = ["Face", "chat", "converse", "face_of_process"]

_Turns = list[dict[str, str]]

_COMMAND = re.compile(r"/[a-z]+")
_FULL = "the context is full; /new begins a new conversation"


class Face(Protocol):
    """How the conversation meets the person, or the program, on the other side."""

    is_patient: bool
    """Somebody is there to try again: an error of one message is said, and does not end the chat."""

    def read(self) -> str | None:
        """The next message, without the end of its line; None if the other side leaves."""

    def show(self, text: str) -> None:
        """The next piece of the answer."""

    def end(self) -> None:
        """The answer is over."""

    def say(self, sentence: str) -> None:
        """Something that is no answer."""


def chat(config: EngineConfig, params: SamplingParams, system: str) -> None:
    """Talk with the model until the other side leaves. ``system``: what the model is told first; "" is nothing.

    Raises ``RequestInvalid`` before anything starts if the model has no chat template or the flags fit no chat, and the
    engine's own errors; the engine is closed then too.
    """
    for name, value, usual in (("--n", params.n, 1), ("--logprobs", params.logprobs, None)):
        if value != usual:
            raise RequestInvalid(f"{name} is {value}; a chat shows one answer, and only its text")
    _check_template(config, system)
    configure_logging(config.log_level, "host")
    face = face_of_process()
    with _engine(config) as engine:
        face.say(f"{config.model}; /new begins a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
        converse(engine, face, params, system)


def _check_template(config: EngineConfig, system: str) -> None:
    TextModel(plan_engine(config).model_dir).render(as_turns([*_beginning(system), _turn("user", "hello")]))


@contextlib.contextmanager
def _engine(config: EngineConfig) -> Iterator[Engine]:
    """Its start is shown; what it does later, a restart, must not draw over a conversation."""
    is_ready = threading.Event()
    with contextlib.ExitStack() as stack:
        with progress_view() as view:

            def show(progress: Progress) -> None:
                if not is_ready.is_set():
                    view.show(progress)

            engine = stack.enter_context(Engine(on_progress=show, **attrs.asdict(config)))
            is_ready.set()
        yield engine


def converse(engine: Engine, face: Face, params: SamplingParams, system: str) -> None:
    """One message and one answer after the other, until the other side leaves.

    Raises what an answer raises, unless the face is patient and the engine can go on; ``KeyboardInterrupt`` from
    anywhere but the middle of an answer.
    """
    turns = _beginning(system)
    while True:
        try:
            message = face.read()
            if message is None or message == "/exit":
                return
            if message == "/new":
                turns = _beginning(system)
            elif _COMMAND.fullmatch(message):
                raise RequestInvalid(f"there is no command {message}; there are /new and /exit")
            elif message.strip():
                turns = _answered(engine, face, [*turns, _turn("user", message)], params) or turns
        except (EngineDead, EngineClosed):
            raise
        except ChipbusError as error:
            if not face.is_patient:
                raise
            face.say(_FULL if isinstance(error, ContextTooLong) else str(error))


def _answered(engine: Engine, face: Face, asked: _Turns, params: SamplingParams) -> _Turns:
    """The turns with what the model says next, shown as it comes.

    If it is interrupted its pages are free, and what came so far stands for an answer; no turns if nothing did.
    """
    said: list[str] = []
    num_tokens = 0
    last: RequestOutput | None = None
    with contextlib.closing(engine.stream_chat(asked, params)) as deltas:  # type: ignore[type-var]
        try:
            for last in deltas:
                [part] = last.outputs
                said.append(part.text)
                num_tokens += len(part.token_ids)
                face.show(part.text)
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not face.is_patient:
                raise
            last = None
        finally:
            face.end()
    if last is None:
        face.say("stopped")
    elif last.outputs[0].finish_reason == "length":
        face.say(f"cut off after --max-tokens {params.max_tokens}" if num_tokens >= params.max_tokens else _FULL)
    answer = "".join(said)
    return [*asked, _turn("assistant", answer)] if answer or last is not None else []


def _beginning(system: str) -> _Turns:
    return [_turn("system", system)] if system else []


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def face_of_process() -> Face:
    """A terminal if standard input and output are one, plain lines otherwise."""
    return _Terminal() if sys.stdin.isatty() and sys.stdout.isatty() else _Lines()


class _Lines:
    """One message per line of stdin, one answer per line of stdout; line breaks in an answer become spaces there."""

    is_patient = False

    def read(self) -> str | None:
        line = sys.stdin.buffer.readline()
        if not line:
            return None
        try:
            return line.decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise RequestInvalid(f"a message is no UTF-8 text at byte {error.start}") from None

    def show(self, text: str) -> None:
        print(text.replace("\n", " "), end="", flush=True)

    def end(self) -> None:
        print(flush=True)

    def say(self, sentence: str) -> None:
        """Nobody asked; what matters is raised."""


class _Terminal:
    """A prompt with the line editing of readline, if there is one; what is no answer is dim."""

    is_patient = True

    def __init__(self) -> None:
        from rich.console import Console

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() uses it from now on)
        self._console = Console(highlight=False, markup=False)

    def read(self) -> str | None:
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt) as leaving:
            print()  # the shell goes on below
            if isinstance(leaving, Terminated):
                raise
            return None
        except UnicodeDecodeError as error:
            raise RequestInvalid(f"a message is no UTF-8 text at byte {error.start}") from None

    def show(self, text: str) -> None:
        print(text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)

    def say(self, sentence: str) -> None:
        self._console.print(sentence, style="dim", soft_wrap=True)
