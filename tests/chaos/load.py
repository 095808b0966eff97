"""Callers that never stop: streams with known tokens, each checked at every delta. Owner of each thread: ``Load``."""

from __future__ import annotations

import random
import threading
import time

import attrs

from chipbus import Engine, SamplingParams
from chipbus.errors import ChipbusError, EngineClosed, EngineDead

__all__ = ["Case", "Load", "make_cases"]


@attrs.frozen
class Case:
    """One request, and what an undisturbed engine answers."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: tuple[int, ...] = ()
    text: str = ""


def make_cases(engine: Engine, seed: int, count: int) -> list[Case]:
    """Requests of several kinds, answered while nothing is wrong: greedy, seeded, with penalties, with stop strings."""
    draw = random.Random(seed)
    cases = []
    for number in range(count):
        prompt = tuple(draw.randrange(20, 900) for _ in range(draw.randint(1, 40)))
        kind = number % 4
        params = SamplingParams(
            max_tokens=draw.randint(20, 120),
            ignore_eos=True,
            temperature=0.0 if kind == 0 else 0.9,
            seed=draw.getrandbits(40),
            frequency_penalty=0.5 if kind == 2 else 0.0,
            stop=("th", "e ") if kind == 3 else (),
        )
        [answer] = engine.generate([list(prompt)], params)
        [output] = answer.outputs
        cases.append(Case(prompt, params, output.token_ids, output.text))
    return cases


class Load:
    """``count`` callers, each with one request after another, until ``stop``. What goes wrong is kept in ``wrong``."""

    def __init__(self, engine: Engine, cases: list[Case], count: int, seed: int) -> None:
        self._engine = engine
        self._cases = cases
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.finished = self.tokens = self.retried = self.ended_with_engine = 0
        self.wrong: list[str] = []
        self.last_token_s = [time.monotonic()] * count
        self._threads = [
            threading.Thread(target=self._call, args=(number, seed * 1000 + number), name=f"caller-{number}")
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Let every request that is under way end."""
        self._is_over.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                self.wrong.append(f"{thread.name} hangs: its request did not end within {timeout_s:g} s")

    def _call(self, number: int, seed: int) -> None:
        draw = random.Random(seed)
        while not self._is_over.is_set():
            case = draw.choice(self._cases)
            try:
                self._request(number, case)
            except (EngineDead, EngineClosed):  # the supervisor was struck: everything ends, by design
                with self._lock:
                    self.ended_with_engine += 1
                return
            except ChipbusError as error:
                self._note(f"a request failed with {type(error).__name__}: {error}")
                return

    def _request(self, number: int, case: Case) -> None:
        tokens: list[int] = []
        text = ""
        for delta in self._engine.stream(list(case.prompt), case.params):
            for output in delta.outputs:
                tokens += output.token_ids
                text += output.text
            if tuple(tokens) != case.tokens[: len(tokens)] or not case.text.startswith(text):
                self._note(f"wrong tokens: {tokens} are not the beginning of {case.tokens}, attempt {delta.attempt}")
                return
            self.last_token_s[number] = time.monotonic()
        if tuple(tokens) != case.tokens or text != case.text:
            self._note(f"{len(tokens)} of {len(case.tokens)} tokens, {len(text)} of {len(case.text)} characters came")
        with self._lock:
            self.finished += 1
            self.tokens += len(tokens)
            self.retried += delta.attempt > 1

    def _note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)
