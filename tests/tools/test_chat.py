"""``bus-run chat``: through pipes, on a real terminal, and what an interrupt leaves of an answer."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from chipbus import Engine, SamplingParams
from chipbus.errors import ContextTooLong, RequestInvalid
from chipbus.tools import console
from chipbus.tools.chat import converse
from chipbus.tools.run_commands import bus_run
from support import eventually, our_processes

CHAT = [sys.executable, "-m", "chipbus.tools.bus_run", "chat"]
DEMO = Path(__file__).resolve().parents[2] / "chipbus" / "demo"
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG_FLAGS = ("--max-tokens", "1900", "--ignore-eos")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Where run directories are made."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture(autouse=True)
def nothing_left_behind(home: Path, engine: Engine) -> Iterator[None]:
    before = our_processes()
    yield
    eventually(lambda: our_processes() <= before, "every process is gone")
    eventually(lambda: [str(path) for path in home.iterdir()] == [engine.run_dir], "every run directory is gone")


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[Engine]:
    """A conversation of more than 256 tokens is too long for it."""
    with Engine("demo", chip="null", max_model_len=1024, kv_pages=64, page_size=16) as running:
        yield running


@attrs.define
class Script:
    """A face that says what it is told to say, and keeps what it hears."""

    messages: list[str]
    is_patient: bool = True
    interrupts: int = 0  # so many answers, each at its first piece
    heard: list[str] = attrs.Factory(list)  # after each message
    said: list[str] = attrs.Factory(list)

    def read(self) -> str | None:
        self.heard.append("")
        return self.messages.pop(0) if self.messages else None

    def show(self, text: str) -> None:
        self.heard[-1] += text
        if self.interrupts and text:
            self.interrupts -= 1
            signal.raise_signal(signal.SIGINT)

    def end(self) -> None:
        """The next piece is another answer's."""

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system else said


def answer(engine: Engine, *contents: str, system: str = "", max_tokens: int = 8) -> str:
    [output] = engine.chat(turns(*contents, system=system), attrs.evolve(SHORT, max_tokens=max_tokens))
    return output.outputs[0].text


@pytest.mark.slow
@pytest.mark.guarantee("Y20")
def test_each_line_is_a_message_and_each_answer_a_line_and_the_conversation_goes_on(engine: Engine) -> None:
    flags = ["--chip", "null", "--max-tokens", "8", "--ignore-eos", "--system", "be brief"]
    given = "one\n\ntwo\n/new\none\n/exit\nthree\n"
    done = subprocess.run([*CHAT, *flags], input=given, capture_output=True, text=True, timeout=60, check=False)

    first = answer(engine, "one", system="be brief")
    second = answer(engine, "one", first, "two", system="be brief")
    assert second != answer(engine, "two", system="be brief"), "the answer must depend on what was said before"
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [text.replace("\n", " ") for text in (first, second, first)]


@pytest.mark.guarantee("Y21")
def test_an_interrupted_answer_gives_its_pages_back_and_stands_as_far_as_it_came(engine: Engine) -> None:
    params = attrs.evolve(SHORT, max_tokens=400)  # so many that its first piece is not all of it
    face = Script(["one", "two"], interrupts=1)
    converse(engine, face, params, "")

    assert face.said == ["stopped", "cut off after --max-tokens 400"]
    eventually(lambda: engine.statistics().running == 0, "the request is gone")
    assert engine.statistics().pages_free == engine.statistics().pages_total
    stopped, second, _ = face.heard
    assert 0 < len(stopped) < len(answer(engine, "one", max_tokens=400))
    assert second == answer(engine, "one", stopped, "two", max_tokens=400)


@pytest.mark.guarantee("Y22")
def test_a_full_context_is_said_and_a_new_conversation_goes_on(engine: Engine) -> None:
    long = "word " * 1200
    face = Script(["one", long, "two", "/new", "one"])
    converse(engine, face, SHORT, "")

    first = answer(engine, "one")
    full, cut = "the context is full; /new begins a new conversation", "cut off after --max-tokens 8"
    assert face.heard == [first, "", answer(engine, "one", first, "two"), "", first, ""]
    assert face.said == [cut, full, cut, cut]

    grows = Script(["one"])
    converse(engine, grows, attrs.evolve(SHORT, max_tokens=2000), "")
    assert grows.said == [full]
    with pytest.raises(ContextTooLong):
        converse(engine, Script([long], is_patient=False), SHORT, "")


def test_a_wrong_message_is_said_to_a_person_and_raised_for_a_program(engine: Engine) -> None:
    face = Script(["/nwe", "one"])
    converse(engine, face, SHORT, "")

    assert face.said[0] == "there is no command /nwe; there are /new and /exit"
    assert face.heard[1] == answer(engine, "one")
    with pytest.raises(RequestInvalid, match="there is no command /nwe"):
        converse(engine, Script(["/nwe"], is_patient=False), SHORT, "")


@pytest.mark.guarantee("Y23")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["MODEL"], "has no chat template"),
        (["--n", "2"], "--n is 2; a chat shows one answer, and only its text"),
        (["--logprobs", "1"], "--logprobs is 1; a chat shows one answer, and only its text"),
    ],
)
def test_what_no_chat_can_be_held_with_is_refused_before_anything_starts(
    flags: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "chat_template.jinja").unlink()
    monkeypatch.setattr("chipbus.tools.chat.Engine", None)
    arguments = ["chat", *(str(model) if flag == "MODEL" else flag for flag in flags)]

    assert console.run("bus-run", lambda: bus_run, arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert words in shown.err.splitlines()[0]


class Terminal:
    """``bus-run chat`` in the foreground of a terminal of its own."""

    def __init__(self, *flags: str) -> None:
        self._screen, terminal = pty.openpty()
        self.child = subprocess.Popen(
            [*CHAT, "--chip", "null", "--log-level", "error", *flags],
            preexec_fn=lambda: os.login_tty(terminal), pass_fds=[terminal], env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def type(self, keys: str) -> None:
        self.shown = ""
        os.write(self._screen, keys.encode())

    def sees(self, text: str, within_s: float = 30.0) -> str:
        """What is on the screen since the last key, once ``text`` is."""
        deadline_s = time.monotonic() + within_s
        while text not in self.shown:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"{text!r} is not shown: {self.shown!r}"
            self.shown += os.read(self._screen, 4096).decode(errors="replace")
        return self.shown

    def hears(self) -> None:
        """An answer has begun."""
        self.sees("\r\n")
        begun = len(self.shown)
        while len(self.shown.strip()) <= begun:
            self.shown += os.read(self._screen, 4096).decode(errors="replace")

    def ends(self, keys: str = "") -> int:
        """Its exit code, when nobody holds the terminal any more.

        ``keys`` are typed, and again after a long silence: Python does not see a signal that comes just before it waits
        for a line.
        """
        with contextlib.suppress(OSError):
            os.write(self._screen, keys.encode())
            while True:
                if select.select([self._screen], [], [], 15.0)[0]:
                    self.shown += os.read(self._screen, 4096).decode(errors="replace")
                else:
                    os.write(self._screen, keys.encode())
        os.close(self._screen)
        return self.child.wait(30)


@pytest.mark.slow
@pytest.mark.guarantee("Y24")
def test_on_a_terminal_ctrl_c_stops_an_answer_and_at_the_prompt_leaves() -> None:
    terminal = Terminal(*LONG_FLAGS)
    assert "demo; /new begins a new conversation" in terminal.sees("> ")

    terminal.type("tell me\n")
    terminal.hears()
    terminal.type("\x03")
    assert "stopped" in terminal.sees("> ")
    terminal.type("/new\n")
    terminal.sees("> ")

    assert terminal.ends("\x03") == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.slow
def test_on_a_terminal_ctrl_d_leaves() -> None:
    terminal = Terminal("--max-tokens", "4", "--ignore-eos")
    terminal.sees("> ")
    terminal.type("hello\n")
    assert "cut off after --max-tokens 4" in terminal.sees("\n> ")
    terminal.type("\x04")

    assert terminal.ends() == 0


@pytest.mark.slow
def test_sigterm_during_an_answer_ends_the_chat_and_not_the_answer_alone() -> None:
    terminal = Terminal(*LONG_FLAGS)
    terminal.sees("> ")
    terminal.type("tell me\n")
    terminal.hears()
    terminal.child.send_signal(signal.SIGTERM)

    assert terminal.ends() == 130
    assert "interrupted" in terminal.shown
