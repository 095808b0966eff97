"""Two nodes in two processes for benchmarks: what is sent between them, and the answering side of every pair.

Owns: the answering side's sockets. ``python -m chipbus.bus.bench nodes|bare DIR`` prints ``ready`` and ends when its
stdin does. The asking sides are ``bench_nodes.NodePair`` and ``bench_bare.BarePair``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import attrs

from .actor import Actor, handles
from .bench_bare import answer_bare
from .conversation import Call
from .envelope import Lane
from .node import Node, NodeConfig
from .registry import message
from .segments import Arena, TensorRef

__all__ = ["ANSWERER", "PAYLOAD_BYTES", "Attach", "Echo", "Fence", "Note", "Pages", "Passed", "Seen", "answer"]

ANSWERER = "bench.answerer"
PAYLOAD_BYTES = 64
PAGE_BYTES = 4096


@message(0x01F0, lane=Lane.WORK)
@attrs.frozen
class Echo:
    """To be sent back as it is."""

    payload: bytes


@message(0x01F1, lane=Lane.WORK)
@attrs.frozen
class Note:
    """A tell that is only counted."""

    payload: bytes


@message(0x01F2, lane=Lane.WORK)
@attrs.frozen
class Fence:
    """How many notes have come? Reply: ``Passed``."""


@message(0x01F3, lane=Lane.WORK)
@attrs.frozen
class Passed:
    """Notes handled since the answering side began."""

    notes: int


@message(0x01F4, lane=Lane.WORK)
@attrs.frozen
class Attach:
    """Map this arena from now on. Reply: ``Seen``."""

    pid: int
    fd: int


@message(0x01F5, lane=Lane.WORK)
@attrs.frozen
class Pages:
    """An array in the arena: read a byte of each of its pages. Reply: ``Seen``."""

    ref: TensorRef


@message(0x01F6, lane=Lane.WORK)
@attrs.frozen
class Seen:
    """The sum of the bytes read."""

    total: int


class _Answerer(Actor):
    def __init__(self) -> None:
        self._notes = 0
        self._arena: Arena | None = None

    def on_start(self) -> None:
        """The inbox is bound, so an asker may connect."""
        print("ready", flush=True)
        self.ctx.watch(sys.stdin.fileno(), self.ctx.stop)

    @handles(Echo)
    def _echo(self, message: Echo, call: Call) -> None:
        call.reply(message)

    @handles(Note)
    def _note(self, message: Note, _: object) -> None:
        self._notes += 1

    @handles(Fence)
    def _fence(self, _: Fence, call: Call) -> None:
        call.reply(Passed(self._notes))

    @handles(Attach)
    def _attach(self, message: Attach, call: Call) -> None:
        self._arena = Arena.attach(message.pid, message.fd)
        call.reply(Seen(0))

    @handles(Pages)
    def _pages(self, message: Pages, call: Call) -> None:
        assert self._arena is not None, "attached before"
        call.reply(Seen(int(self._arena.view(message.ref)[::PAGE_BYTES].sum())))


def answer(kind: str, run_dir: Path) -> None:
    """Be the answering side, "nodes" or "bare", until stdin ends."""
    if kind == "nodes":
        Node(NodeConfig(name=ANSWERER, incarnation=1, run_dir=run_dir), _Answerer()).run()
    else:
        answer_bare(run_dir)


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]))
