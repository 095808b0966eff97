"""Bare ZeroMQ sockets between two processes, nothing else: what every figure of the bus is set against.

Owns: its sockets. A blocking ``DEALER`` asks a blocking ``ROUTER``; the first byte of a message says what it is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

import numpy as np
import zmq

__all__ = ["BarePair", "answer_bare"]

_ECHO, _NOTE, _PAGES = b"ENP"
_TIMEOUT_S = 30.0
_PAGE_BYTES = 4096


class BarePair:
    """The asking side. Times are wall times in nanoseconds, or in seconds where so named."""

    def __init__(self, run_dir: Path) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.rcvtimeo = self._socket.sndtimeo = int(1000 * _TIMEOUT_S)
        self._socket.connect(f"ipc://{run_dir}/bare")
        self._array = np.empty(0, np.uint8)

    def measure(self, count: int, payload_bytes: int) -> list[int]:
        """Nanoseconds of each of ``count`` round trips, one after another."""
        took_ns = []
        payload = bytes([_ECHO]) + bytes(payload_bytes - 1)
        for _ in range(count):
            began_ns = time.perf_counter_ns()
            self._socket.send(payload)
            self._socket.recv()
            took_ns.append(time.perf_counter_ns() - began_ns)
        return took_ns

    def many_s(self, count: int, in_flight: int, payload_bytes: int) -> float:
        """Seconds for ``count`` round trips, ``in_flight`` of them under way at any moment."""
        payload = bytes([_ECHO]) + bytes(payload_bytes - 1)
        began_s = time.perf_counter()
        for number in range(count + in_flight):
            if number >= in_flight:
                self._socket.recv()
            if number < count:
                self._socket.send(payload)
        return time.perf_counter() - began_s

    def notes_s(self, count: int, payload_bytes: int) -> float:
        """Seconds until the other side has had ``count`` one-way messages."""
        payload = bytes([_NOTE]) + bytes(payload_bytes - 1)
        began_s = time.perf_counter()
        for _ in range(count):
            self._socket.send(payload)
        self._socket.send(bytes([_ECHO]))
        self._socket.recv()
        return time.perf_counter() - began_s

    def arrays(self, count: int, nbytes: int) -> list[int]:
        """Nanoseconds of each of ``count`` arrays, copied into and out of the sockets, until each page was read."""
        if self._array.nbytes != nbytes:
            self._array = np.ones(nbytes, np.uint8)
            self._array[0] = _PAGES
        took_ns = []
        for _ in range(count):
            began_ns = time.perf_counter_ns()
            self._socket.send(self._array.data)
            self._socket.recv()
            took_ns.append(time.perf_counter_ns() - began_ns)
        return took_ns

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)
        self._context.term()


def answer_bare(run_dir: Path) -> None:
    """Be the answering side until stdin ends."""
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
            sender, body = socket.recv_multipart()
            kind = body[0]
            if kind == _ECHO:
                socket.send_multipart((sender, body))
            elif kind == _PAGES:
                total = int(np.frombuffer(body, np.uint8)[::_PAGE_BYTES].sum())
                socket.send_multipart((sender, total.to_bytes(8, "little")))
    socket.close(linger=0)
