"""What a request says stays between its caller and the processes that serve it: no log, at any level, repeats it."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from chipbus import Engine, SamplingParams
from chipbus.errors import ChipbusError, WorkerError
from support import eventually

SECRET = "Xyzzy plugh: the key is kryptonite-4711081547."  # long enough to be no pid and no part of a time


def runs_of(ids: list[int]) -> re.Pattern[str]:
    """Three of these numbers, one after the other, however they are written."""
    triples = [ids[place : place + 3] for place in range(len(ids) - 2)]
    return re.compile("|".join(r"\b" + r"\D{1,4}".join(map(str, triple)) + r"\b" for triple in triples))


@pytest.mark.guarantee("E44")
def test_no_log_of_any_process_holds_what_a_request_says(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TESTS_PASSWORD", "swordfish-0815")
    caplog.set_level(logging.DEBUG)
    with Engine("demo", chip="null", log_level="debug", max_model_len=1024) as engine:
        first = engine.generate(SECRET, SamplingParams(max_tokens=20, stop=("kryptonite-0815",)))[0]
        ids = list(first.prompt_token_ids)
        said = list(first.outputs[0].token_ids)
        assert len(ids) > 8
        assert len(said) == 20

        engine.chat([{"role": "user", "content": SECRET}], SamplingParams(max_tokens=3))
        for wrong in (SECRET * 500, SECRET + "\udc80", [*ids, 2**31 - 1], [*ids] * 500):
            with pytest.raises(ChipbusError):
                engine.generate(wrong)
        engine.chat([{"role": SECRET, "content": SECRET}], SamplingParams(max_tokens=3))

        for victim in ("chip.0.0", "replica.0", "tokenizer.0"):
            kill_while_it_serves(engine, victim)
        engine.generate(SECRET, SamplingParams(max_tokens=3))

    out, err = capfd.readouterr()
    logged = out + err + caplog.text
    assert logged.count("event='request.failed'") >= 3  # too long, and a token id no vocabulary has
    assert logged.count("event=child.exited") >= 6
    for secret in ("xyzzy", "plugh", "kryptonite", "4711081547", "swordfish", first.outputs[0].text[:12].lower()):
        assert secret not in logged.lower()
    for numbers in (ids, said):
        assert not runs_of(numbers).search(logged)


def kill_while_it_serves(engine: Engine, victim: str) -> None:
    """SIGKILL in the middle of a request; returns when the process is replaced and the request has ended."""
    before = next(record for record in engine.tree() if record.name == victim)
    began = threading.Event()
    ends: list[str] = []

    def read() -> None:
        try:
            for _ in engine.stream(SECRET, SamplingParams(max_tokens=400, ignore_eos=True)):
                began.set()
        except WorkerError as error:
            ends.append(str(error))
        began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(20)
    os.kill(before.pid, signal.SIGKILL)
    reader.join(30)
    assert not reader.is_alive()
    assert all(SECRET not in text for text in ends)

    def is_replaced() -> bool:
        now = next(record for record in engine.tree() if record.name == victim)
        return now.incarnation > before.incarnation and now.state == "ready"

    eventually(is_replaced, f"another {victim}", within_s=20)


def test_the_run_directory_holds_nothing_a_request_says(tmp_path: Path) -> None:
    with Engine("demo", chip="null", run_dir=tmp_path / "run", log_level="error") as engine:
        engine.generate(SECRET, SamplingParams(max_tokens=3))

        for path in (tmp_path / "run").iterdir():
            if path.is_file():
                assert b"xyzzy" not in path.read_bytes().lower()
