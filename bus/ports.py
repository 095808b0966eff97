"""What an exchange and a context need from outside: a codec, a way to send, a loop that drives them. Protocols only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .registry import decode, encode

__all__ = ["Codec", "Driver", "Port", "WireCodec"]


class Codec(Protocol):
    """Messages to bytes and back."""

    def encode(self, value: Any) -> bytes:
        """The body of a message. Raises ``BadFrame``."""
        ...

    def decode(self, type_id: int, body: bytes | memoryview) -> Any:
        """The message in a body. Raises ``BadFrame``."""
        ...


class WireCodec:
    """msgpack through the registry."""

    encode = staticmethod(encode)
    decode = staticmethod(decode)


class Port(Protocol):
    """Where a transport takes records for one peer."""

    def put(self, control: bool, record: bytes, bound: int) -> None:
        """Queue a record on the control or data socket. Raises ``MailboxFull`` if ``bound`` records wait there."""
        ...

    def close(self) -> None:
        """The link is over; what was not sent is dropped."""
        ...


class Driver(Protocol):
    """The loop an actor lives in: a ``Node``, or a seat of a ``LocalSystem``."""

    def make_link(self, name: str, incarnation: int) -> None:
        """Make a transport to a peer, then call ``Peers.up``."""
        ...

    def finish(self) -> None:
        """The actor has stopped: flush and leave the loop."""
        ...

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """See ``actor.Context``."""
        ...

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """See ``actor.Context``."""
        ...

    def unwatch(self, fd: int) -> None:
        """See ``actor.Context``."""
        ...
