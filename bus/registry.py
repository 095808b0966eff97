"""The one table of message types, and the strict codec over it.

Owns: type id ↔ class. Filled while modules are imported, read-only afterwards.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs
import msgspec

from ..errors import BadFrame
from .envelope import ASK, MAX_BODY_BYTES, REPLY, STREAM, TELL, WORK, Lane, head_of
from .schema import describe

__all__ = [
    "PLAIN",
    "MessageType",
    "compare_schemas",
    "decode",
    "encode",
    "lookup",
    "message",
    "register",
    "registered",
    "schema_hash",
    "schema_table",
    "type_of",
]

T = TypeVar("T")
ROW = struct.Struct("<H8s")


@attrs.frozen(eq=False)
class MessageType:
    """One row of the registry."""

    type_id: int
    cls: type
    lane: Lane
    version: int
    merge: Callable[[Any, Any], Any] | None
    """The class's ``merge(self, later)``: one stream item that says what both say, or None."""
    is_work: bool
    tell_head: int
    ask_head: int
    answer_heads: dict[int, int]
    """By kind, REPLY and STREAM, in the WORK lane. See ``envelope.head_of``."""


_BY_ID: dict[int, MessageType] = {}
_BY_CLASS: dict[type, MessageType] = {}
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {}
_DIGESTS: dict[int, bytes] = {}
PLAIN: dict[int, tuple[int, int]] = {}
"""(kind, type id) of each head that a record of the WORK lane may have: tells and asks that belong there, answers."""
_ENCODER = msgspec.msgpack.Encoder()


def register(type_id: int, cls: type, *, lane: Lane, version: int = 1) -> None:
    """Make a frozen attrs class a message. ``TypeError`` if it is none, ``ValueError`` if id or class is taken."""
    if not attrs.has(cls) or cls.__setattr__.__name__ != "_frozen_setattrs":
        raise TypeError(f"{cls.__qualname__} cannot be a message: messages are frozen attrs classes")
    if not 0 < type_id <= 0xFFFF:
        raise ValueError(f"message type id {type_id:#x} of {cls.__qualname__} is outside [0x1, 0xffff]")
    if type_id in _BY_ID:
        raise ValueError(
            f"message type id {type_id:#06x} is taken by {_BY_ID[type_id].cls.__qualname__}; ids are never reused"
        )
    if cls in _BY_CLASS:
        raise ValueError(f"{cls.__qualname__} is registered already, as {_BY_CLASS[cls].type_id:#06x}")
    merge = getattr(cls, "merge", None)
    row = MessageType(
        type_id, cls, lane, version, merge if callable(merge) else None, lane == WORK,
        head_of(TELL, type_id, lane), head_of(ASK, type_id, lane),
        {kind: head_of(kind, type_id, WORK) for kind in (REPLY, STREAM)},
    )  # fmt: skip
    _BY_ID[type_id] = _BY_CLASS[cls] = row
    PLAIN.update({head: (kind, type_id) for kind, head in row.answer_heads.items()})
    if row.is_work:
        PLAIN.update({row.tell_head: (TELL, type_id), row.ask_head: (ASK, type_id)})


def message(type_id: int, lane: Lane, version: int = 1) -> Callable[[type[T]], type[T]]:
    """Class decorator: register a frozen attrs class. A new meaning needs a new id; a new field needs a default.

    Items of streams may have a method ``merge(self, later) -> Self | None``, see ``Call.item``.
    """

    def decorate(cls: type[T]) -> type[T]:
        register(type_id, cls, lane=lane, version=version)
        return cls

    return decorate


def registered() -> Iterator[MessageType]:
    """Every message type known to this process, by id."""
    return iter([_BY_ID[type_id] for type_id in sorted(_BY_ID)])


def lookup(type_id: int) -> MessageType:
    """The row of an id. Raises ``BadFrame`` for an id this process does not know."""
    row = _BY_ID.get(type_id)
    if row is None:
        raise BadFrame(f"unknown message type id {type_id:#06x}")
    return row


def type_of(value: object) -> MessageType:
    """The row of a message's class. Raises ``TypeError`` if it was never registered."""
    row = _BY_CLASS.get(type(value))
    if row is None:
        raise TypeError(f"{type(value).__qualname__} is no registered message")
    return row


def encode(value: object) -> bytes:
    """A registered message as msgpack. Raises ``BadFrame`` if a field's value has no wire form, or all is too long."""
    try:
        body = _ENCODER.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadFrame(f"{type(value).__qualname__} cannot be encoded: {error}") from error
    if len(body) > MAX_BODY_BYTES:
        name = type(value).__qualname__
        raise BadFrame(
            f"{name} has {len(body)} bytes, and at most {MAX_BODY_BYTES} fit into a message; send it in parts"
        )
    return body


def decode(type_id: int, body: bytes | memoryview) -> Any:
    """The message in ``body``. Raises ``BadFrame`` for an unknown id and for anything wrong with the bytes.

    Fields unknown to the class are ignored: that both sides mean the same fields is checked once per link, at HELLO.
    """
    decoder = _DECODERS.get(type_id) or _make_decoder(type_id)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadFrame(f"{lookup(type_id).cls.__qualname__} cannot be decoded: {error}") from error


def _make_decoder(type_id: int) -> msgspec.msgpack.Decoder[Any]:
    decoder = _DECODERS[type_id] = msgspec.msgpack.Decoder(lookup(type_id).cls)
    return decoder


def _digest(row: MessageType) -> bytes:
    if row.type_id not in _DIGESTS:
        _DIGESTS[row.type_id] = hashlib.blake2b(f"{row.version};{describe(row.cls)}".encode(), digest_size=8).digest()
    return _DIGESTS[row.type_id]


def schema_table() -> bytes:
    """What HELLO carries: id (u16) and 8-byte digest of name, fields and types of every known message, by id."""
    return b"".join(ROW.pack(row.type_id, _digest(row)) for row in registered())


def schema_hash() -> bytes:
    """16 bytes over the whole registry; equal hashes mean equal messages.

    Calling it also prepares every decoder, so a fork server calls it once for all its children.
    """
    for row in registered():
        _DECODERS.get(row.type_id) or _make_decoder(row.type_id)
    return hashlib.blake2b(schema_table(), digest_size=16).digest()


def compare_schemas(theirs: bytes) -> str:
    """Name the first message both sides know but understand differently; empty if there is none.

    A message known to one side only is no conflict: processes import only the conversations they take part in, and
    an unknown type is refused when it arrives.
    """
    if len(theirs) % ROW.size:
        return f"a schema table of {len(theirs)} bytes, no multiple of {ROW.size}"
    for type_id, digest in ROW.iter_unpack(theirs):
        row = _BY_ID.get(type_id)
        if row is not None and _digest(row) != digest:
            return f"{row.cls.__qualname__} ({type_id:#06x}) has other fields there"
    return ""
