"""Peers made by hand: records as a node would send them, or wrong in one place, over bare sockets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq

from chipbus.bus.envelope import NO_TRACE, Envelope, Kind, Lane, name_id, seal, split
from chipbus.bus.lifecycle import Hello
from chipbus.bus.registry import encode, schema_table, type_of

__all__ = ["Speaker", "Stranger"]


class Speaker:
    """Makes records from one name to another."""

    def __init__(self, name: str, to: str) -> None:
        self.name = name
        self.to = to

    def record(
        self, kind: Kind, message: object | None, *, incarnation: int = 1, correlation: int = 0, **fields: Any
    ) -> bytes:
        """One record; ``fields`` are those of the envelope."""
        row = None if message is None else type_of(message)
        type_id, lane = (row.type_id, row.lane) if row else (0, Lane.WORK)
        source, destination = name_id(self.name), name_id(self.to)
        body = b"" if message is None else encode(message)
        envelope = Envelope(
            1, kind, type_id, lane, 0, correlation, 0, source, destination, incarnation, NO_TRACE, 0, len(body)
        )._replace(**fields)
        return seal(*envelope[1:4], *envelope[5:12], body)


class Stranger(Speaker):
    """Bare sockets that speak to a node's inbox as they like."""

    def __init__(self, run_dir: Path, node: str, incarnation: int = 1, name: str = "stranger") -> None:
        super().__init__(name, node)
        self.context = zmq.Context()
        self.data, self.control = (self.context.socket(zmq.DEALER) for _ in range(2))
        for socket, suffix in ((self.data, "d"), (self.control, "c")):
            socket.rcvtimeo = 10_000
            socket.connect(f"ipc://{run_dir}/{node}.{incarnation}.{suffix}")

    def hello(self, only: zmq.Socket[bytes] | None = None, **fields: Any) -> None:
        """Say hello on both sockets, or on one."""
        claims = {
            "name": self.name, "incarnation": 1, "pid": os.getpid(), "to": self.to, "to_incarnation": 1,
            "schema": schema_table(),
        }  # fmt: skip
        hello = Hello(**{**claims, **fields})
        for socket in (self.data, self.control) if only is None else (only,):
            socket.send(self.record(Kind.HELLO, hello))

    def first_answer(self, socket: zmq.Socket[bytes]) -> tuple[Envelope, bytes]:
        """The first record of the next frame."""
        envelope, body = next(split(socket.recv()))
        return envelope, bytes(body)

    def close(self) -> None:
        """Drop everything."""
        self.context.destroy(linger=0)
