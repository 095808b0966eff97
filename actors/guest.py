"""A look at somebody's running engine from outside: a guest on its bus, who may ask for a report or a drain.

Owns: a node and its thread, while it visits. It needs the run directory and the same user, no more.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..bus import Actor, Node, NodeConfig
from ..bus.addresses import check_run_dir, inbox_paths
from ..errors import ChipbusError, ConfigError, EngineDead
from .boot import SUPERVISOR
from .messages.tree import Drain, Drained, TreeReport, TreeReportRequest

__all__ = ["Guest"]

_TIMEOUT_S = 2.0  # the supervisor itself gives its children half a second
_CLOSE_S = 5.0
# A later visit of a process takes the place of an earlier one, also of one of an earlier process with this pid.
_visits = itertools.count(1 + time.monotonic_ns() // 1_000_000 % 2**31)


class _Visitor(Actor):
    def __init__(self) -> None:
        self.is_up = threading.Event()

    def on_start(self) -> None:
        self.is_up.set()


class Guest:
    """One visit to the engine of a run directory. Any thread, one at a time; ``close``, or leave the ``with`` block.

    Raises ``ConfigError`` if the directory is none of ours, ``EngineDead`` if no engine runs in it.
    """

    def __init__(self, run_dir: Path) -> None:
        check_run_dir(run_dir)
        if not all(path.exists() for path in inbox_paths(run_dir, SUPERVISOR, 1)):
            raise EngineDead(f"no engine runs in {run_dir}")
        self._run_dir = run_dir
        self._actor = _Visitor()
        name = f"guest.{os.getpid()}"
        self._node = Node(NodeConfig(name=name, incarnation=next(_visits), run_dir=run_dir), self._actor)
        self._node.expect(frozenset())
        self._node.connect(SUPERVISOR, 1)
        self._thread = threading.Thread(target=self._node.run, name="chipbus-guest", daemon=True)
        self._thread.start()
        if not self._actor.is_up.wait(_TIMEOUT_S):
            self.close()
            raise EngineDead(f"no guest can enter {run_dir}; its engine may have ended this moment")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def report(self) -> TreeReport:
        """What everybody is at. Raises ``EngineDead`` if the supervisor does not answer."""
        answer = self.ask(TreeReportRequest())
        if isinstance(answer, ChipbusError):
            raise EngineDead(f"the supervisor in {self._run_dir} does not answer: {answer}")
        assert isinstance(answer, TreeReport)
        return answer

    def drain(self, replica: str, timeout_s: float, *, stays_down: bool) -> bool:
        """Have a replica ended when its requests have, or after ``timeout_s``; whether they all had.

        Raises ``ConfigError`` if it cannot be drained, ``EngineDead`` if the supervisor does not answer.
        """
        answer = self.ask(Drain(replica=replica, timeout_s=timeout_s, stays_down=stays_down), timeout_s + _TIMEOUT_S)
        if isinstance(answer, ConfigError):
            raise answer
        if isinstance(answer, ChipbusError):
            raise EngineDead(f"the supervisor in {self._run_dir} does not answer: {answer}")
        assert isinstance(answer, Drained)
        return answer.is_empty

    def ask(self, message: Any, timeout_s: float = _TIMEOUT_S) -> Any:
        """The supervisor's answer to ``message``, or the error in its place."""
        answered = threading.Event()
        answers: list[Any] = []

        def settle(answer: Any) -> None:
            answers.append(answer)
            answered.set()

        def ask() -> None:
            self._actor.ctx.ask(SUPERVISOR, message, timeout_s=timeout_s, on_reply=settle, on_error=settle)

        self._actor.ctx.call_soon_threadsafe(ask)
        answered.wait(timeout_s + 1)
        return answers[0] if answers else EngineDead("nothing was heard in time")

    def close(self) -> None:
        """Leave. Idempotent."""
        self._actor.ctx.call_soon_threadsafe(self._actor.ctx.stop)
        self._thread.join(_CLOSE_S)
