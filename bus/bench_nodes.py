"""The asking side of two nodes in two processes: how long asks, tells and handles to arrays take over the bus.

Owns: the asking node, on a thread of its own, and the arena. Whoever measures waits in another thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ChipbusError, MailboxFull, Overloaded
from .actor import Actor
from .bench import ANSWERER, PAYLOAD_BYTES, Attach, Echo, Fence, Note, Pages, Passed
from .node import Node, NodeConfig
from .segments import Arena, TensorRef

__all__ = ["NodePair"]

_ASKER = "bench.asker"
_TIMEOUT_S = 30.0
_BURST = 512  # tells in one turn of the loop, then a fence behind them
_FENCES = 4  # bursts under way
_PATIENCE_S = 0.001  # of a sender that was refused and has no fence under way


class _Asker(Actor):
    """Runs one measurement at a time; whoever began it waits for ``is_done``."""

    def __init__(self) -> None:
        self.is_linked = threading.Event()
        self.is_done = threading.Event()
        self.took_ns: list[int] = []
        self.took_s = 0.0
        self.error: ChipbusError | None = None
        self._noted = 0  # over the life of the pair, as the answering side counts

    def on_peer_up(self, name: str) -> None:
        self.is_linked.set()

    def one_by_one(self, message: Any, count: int) -> None:
        """Ask ``message`` so often, each time after the answer."""
        self.took_ns = took_ns = []
        clock, began_ns = time.perf_counter_ns, 0

        def ask() -> None:
            nonlocal began_ns
            began_ns = clock()
            self._ask(message, replied)

        def replied(_: object) -> None:
            took_ns.append(clock() - began_ns)
            if len(took_ns) < count:
                ask()
            else:
                self.is_done.set()

        ask()

    def side_by_side(self, message: Any, count: int, in_flight: int) -> None:
        """Ask ``message`` so often, ``in_flight`` at any moment."""
        began_s = time.perf_counter()
        asked = answered = 0

        def ask() -> None:
            nonlocal asked
            asked += 1
            self._ask(message, replied)

        def replied(_: object) -> None:
            nonlocal answered
            answered += 1
            if asked < count:
                ask()
            elif answered == count:
                self.took_s = time.perf_counter() - began_s
                self.is_done.set()

        for _ in range(min(in_flight, count)):
            ask()

    def notes(self, payload: bytes, count: int) -> None:
        """Tell ``count`` notes in bursts. A fence behind each says how far the other side is; refused, wait for it."""
        message = Note(payload)
        goal = self._noted + count
        told, fences = self._noted, 0
        began_s = time.perf_counter()

        def burst() -> None:
            nonlocal told, fences
            tell = self.ctx.tell
            try:
                for _ in range(min(_BURST, goal - told)):
                    tell(ANSWERER, message)
                    told += 1
            except (MailboxFull, Overloaded):
                if fences:
                    return
            fences += 1
            self.ctx.ask(ANSWERER, Fence(), timeout_s=_TIMEOUT_S, on_reply=passed, on_error=refused)

        def passed(reply: Passed) -> None:
            nonlocal fences
            fences -= 1
            if reply.notes == goal:
                self._noted = goal
                self.took_s = time.perf_counter() - began_s
                self.is_done.set()
            elif told < goal:
                burst()
            elif not fences:
                self._failed(ChipbusError(f"{reply.notes} notes came of {told} that were told"))

        def refused(error: ChipbusError) -> None:
            nonlocal fences
            fences -= 1
            if not isinstance(error, Overloaded):
                self._failed(error)
            elif not fences:
                self.ctx.after(_PATIENCE_S, burst)

        for _ in range(_FENCES):
            self.ctx.after(0.0, burst)

    def once(self, message: Any) -> None:
        """Ask, and be done with the answer."""
        self._ask(message, lambda _: self.is_done.set())

    def _ask(self, message: Any, on_reply: Callable[[Any], None]) -> None:
        self.ctx.ask(ANSWERER, message, timeout_s=_TIMEOUT_S, on_reply=on_reply, on_error=self._failed)

    def _failed(self, error: ChipbusError) -> None:
        self.error = error
        self.is_done.set()


class NodePair:
    """The asking node of an answering node in another process (``bench.answer``). Times as ``BarePair`` gives them."""

    def __init__(self, run_dir: Path) -> None:
        self._actor = _Asker()
        self._arena: Arena | None = None
        self._ref: TensorRef | None = None
        self._node = Node(NodeConfig(name=_ASKER, incarnation=1, run_dir=run_dir), self._actor)
        self._node.connect(ANSWERER, 1)
        self._thread = threading.Thread(target=self._node.run, name=_ASKER, daemon=True)
        self._thread.start()
        if not self._actor.is_linked.wait(_TIMEOUT_S):
            self.close()
            raise ChipbusError(f"no link to {ANSWERER} in {run_dir} within {_TIMEOUT_S:g} s")

    def measure(self, count: int, payload_bytes: int = PAYLOAD_BYTES) -> list[int]:
        """Nanoseconds of each of ``count`` asks, one after another."""
        self._run(lambda: self._actor.one_by_one(Echo(bytes(payload_bytes)), count))
        return self._actor.took_ns

    def many_s(self, count: int, in_flight: int, payload_bytes: int) -> float:
        """Seconds for ``count`` asks, ``in_flight`` of them under way at any moment."""
        self._run(lambda: self._actor.side_by_side(Echo(bytes(payload_bytes)), count, in_flight))
        return self._actor.took_s

    def notes_s(self, count: int, payload_bytes: int) -> float:
        """Seconds until the other side has handled ``count`` tells. Raises ``ChipbusError`` if one is missing."""
        self._run(lambda: self._actor.notes(bytes(payload_bytes), count))
        return self._actor.took_s

    def arrays(self, count: int, nbytes: int) -> list[int]:
        """Nanoseconds of each of ``count`` handles to an array in an arena, until the other side read each page of it.

        The first call makes the arena, writes the array, and has the other side attach and read it once.
        """
        if self._ref is None or self._ref.nbytes != nbytes:
            self._make_array(nbytes)
        message = Pages(self._held)
        self._run(lambda: self._actor.one_by_one(message, count))
        return self._actor.took_ns

    @property
    def _held(self) -> TensorRef:
        assert self._ref is not None
        return self._ref

    def _make_array(self, nbytes: int) -> None:
        if self._arena is not None:
            self._arena.close()
        arena = self._arena = Arena.create("bench", nbytes)
        self._ref = arena.ref(arena.alloc(nbytes, (_ASKER, 1)), np.dtype(np.uint8).name, (nbytes,))
        arena.view(self._ref)[:] = 1
        self._run(lambda: self._actor.once(Attach(os.getpid(), arena.fd)))
        self._run(lambda: self._actor.once(Pages(self._held)))

    def _run(self, begin: Callable[[], None]) -> None:
        """Have the loop begin, and wait until the actor is done. Raises what ended it early."""
        self._actor.is_done.clear()
        self._node.call_soon_threadsafe(begin)
        if not self._actor.is_done.wait(2 * _TIMEOUT_S):
            raise ChipbusError(f"a measurement was not done within {2 * _TIMEOUT_S:g} s")
        if self._actor.error is not None:
            raise self._actor.error

    def close(self) -> None:
        """Stop the node and its thread, give the arena back."""
        self._node.call_soon_threadsafe(self._actor.ctx.stop)
        self._thread.join(_TIMEOUT_S)
        if self._arena is not None:
            self._arena.close()
