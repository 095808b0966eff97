"""Round trips of one small message between two processes: an ask between nodes, and the bare sockets below it.

Owns: its two sides' sockets. ``python -m chipbus.bus.bench nodes|bare DIR`` is the answering side; it prints ``ready``
and ends when its stdin does. The asking side is ``NodePair`` and ``BarePair``, used by ``bus-run bench bus``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

import attrs
import zmq

from ..errors import ChipbusError
from .actor import Actor, handles
from .conversation import Call
from .envelope import Lane
from .node import Node, NodeConfig
from .registry import message

__all__ = ["PAYLOAD_BYTES", "BarePair", "Echo", "NodePair", "answer"]

PAYLOAD_BYTES = 64
_ANSWERER, _ASKER = "bench.answerer", "bench.asker"
_TIMEOUT_S = 30.0


@message(0x01F0, lane=Lane.WORK)
@attrs.frozen
class Echo:
    """To be sent back as it is."""

    payload: bytes


class _Answerer(Actor):
    def on_start(self) -> None:
        """The inbox is bound, so an asker may connect."""
        print("ready", flush=True)
        self.ctx.watch(sys.stdin.fileno(), self.ctx.stop)

    @handles(Echo)
    def _echo(self, message: Echo, call: Call) -> None:
        call.reply(message)


class _Asker(Actor):
    """Asks one after another; a round's times go to whoever waits for it."""

    def __init__(self) -> None:
        self.is_linked = threading.Event()
        self.took_ns: list[int] = []
        self.is_done = threading.Event()
        self.error: ChipbusError | None = None
        self._left = 0
        self._began_ns = 0

    def on_peer_up(self, name: str) -> None:
        self.is_linked.set()

    def begin(self, count: int) -> None:
        self.took_ns, self._left = [], count
        self._ask()

    def _ask(self) -> None:
        self._began_ns = time.perf_counter_ns()
        self.ctx.ask(
            _ANSWERER, Echo(bytes(PAYLOAD_BYTES)), timeout_s=_TIMEOUT_S, on_reply=self._replied, on_error=self._failed
        )

    def _replied(self, _: object) -> None:
        self.took_ns.append(time.perf_counter_ns() - self._began_ns)
        self._left -= 1
        if self._left:
            self._ask()
        else:
            self.is_done.set()

    def _failed(self, error: ChipbusError) -> None:
        self.error = error
        self.is_done.set()


class NodePair:
    """The asking node, on a thread of its own, of an answering node in another process."""

    def __init__(self, run_dir: Path) -> None:
        self._actor = _Asker()
        self._node = Node(NodeConfig(name=_ASKER, incarnation=1, run_dir=run_dir), self._actor)
        self._node.connect(_ANSWERER, 1)
        self._thread = threading.Thread(target=self._node.run, name=_ASKER, daemon=True)
        self._thread.start()
        if not self._actor.is_linked.wait(_TIMEOUT_S):
            self.close()
            raise ChipbusError(f"no link to {_ANSWERER} in {run_dir} within {_TIMEOUT_S:g} s")

    def measure(self, count: int) -> list[int]:
        """Nanoseconds of each of ``count`` asks, one after another."""
        self._actor.is_done.clear()
        self._node.call_soon_threadsafe(lambda: self._actor.begin(count))
        self._actor.is_done.wait(_TIMEOUT_S + count)
        if self._actor.error is not None:
            raise self._actor.error
        return self._actor.took_ns

    def close(self) -> None:
        """Stop the node and its thread."""
        self._node.call_soon_threadsafe(self._actor.ctx.stop)
        self._thread.join(_TIMEOUT_S)


class BarePair:
    """A ``DEALER`` that sends bytes to a bare ``ROUTER`` in another process and waits for them, nothing else."""

    def __init__(self, run_dir: Path) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.rcvtimeo = int(1000 * _TIMEOUT_S)
        self._socket.connect(f"ipc://{run_dir}/bare")

    def measure(self, count: int) -> list[int]:
        """Nanoseconds of each of ``count`` round trips, one after another."""
        took_ns = []
        payload = bytes(PAYLOAD_BYTES)
        for _ in range(count):
            began_ns = time.perf_counter_ns()
            self._socket.send(payload)
            self._socket.recv()
            took_ns.append(time.perf_counter_ns() - began_ns)
        return took_ns

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)
        self._context.term()


def _answer_bare(run_dir: Path) -> None:
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{run_dir}/bare")
    print("ready", flush=True)

    def end() -> None:
        sys.stdin.read()
        context.term()  # ends the blocking recv below

    threading.Thread(target=end, daemon=True).start()
    with contextlib.suppress(zmq.ContextTerminated):
        while True:
            socket.send_multipart(socket.recv_multipart())
    socket.close(linger=0)


def answer(kind: str, run_dir: Path) -> None:
    """Be the answering side, "nodes" or "bare", until stdin ends."""
    if kind == "nodes":
        Node(NodeConfig(name=_ANSWERER, incarnation=1, run_dir=run_dir), _Answerer()).run()
    else:
        _answer_bare(run_dir)


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]))
