"""The 64-byte header around every message, and frames made of records end to end. Pure functions over bytes.

frame  = record record record …            all sends of one loop turn to one peer and one socket
record = header (64 bytes) body (msgpack)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from ..errors import BadFrame

__all__ = [
    "ASK",
    "CANCEL",
    "CHECK",
    "CHECKED",
    "CREDIT",
    "ERROR",
    "HEADER",
    "HEADER_BYTES",
    "MAX_BODY_BYTES",
    "MAX_FRAME_BYTES",
    "NO_TRACE",
    "PLAIN_HEADER",
    "REPLY",
    "STREAM",
    "TELL",
    "UNKNOWN",
    "VERSION",
    "WORK",
    "Envelope",
    "Kind",
    "Lane",
    "ends_of",
    "envelope_of",
    "head_of",
    "name_id",
    "record_at",
    "seal",
    "split",
]

VERSION = 1
HEADER = struct.Struct("<BBHHHQQIII16sQI")
PLAIN_HEADER = struct.Struct("<QQQ12s16sQI")
"""The same 64 bytes in fewer fields, for the hot path: see ``head_of`` and ``ends_of``."""
MAX_FRAME_BYTES = 64 * 2**20
MAX_BODY_BYTES = MAX_FRAME_BYTES - HEADER.size
NO_TRACE = bytes(16)


class Lane(IntEnum):
    """Priority class of a message: a lower value is served first. Lanes before WORK travel on the control socket."""

    KILL = 0
    STOP = 1
    CHILD = 2
    HEALTH = 3
    WORK = 4


class Kind(IntEnum):
    """What a record is for."""

    TELL = 1
    ASK = 2
    STREAM = 3
    REPLY = 4
    ERROR = 5
    CANCEL = 6
    HELLO = 7
    WELCOME = 8
    REFUSE = 9
    CHECK = 10  # by whoever asked: is this ask still with you?
    CHECKED = 11  # by the callee itself, behind all it has answered
    CREDIT = 12  # how much has been taken, ever, so that as much more may be sent


# The same as plain ints: looking up a member of an enum costs 80 ns, and a message takes a dozen of them.
TELL, ASK, STREAM, REPLY, ERROR, CANCEL = range(1, 7)
CHECK, CHECKED, CREDIT = range(10, 13)
LAST_KIND = int(Kind.CREDIT)
UNKNOWN = 2**64 - 1  # position of a CHECKED: no such call here
WORK = int(Lane.WORK)
HEADER_BYTES = HEADER.size


class Envelope(NamedTuple):
    """The header's fields in wire order; a tuple because that is what ``struct`` gives, on the hottest path."""

    version: int
    kind: int
    type_id: int
    flags: int  # bits 0-2: lane
    aux_frames: int  # always 0 in version 1
    correlation: int  # TELL and ASK: counts up per link; all others: that of their ask; CHECK, CREDIT: 0 for the link
    deadline_ns: int  # absolute, CLOCK_MONOTONIC; 0: none
    source: int  # name_id of the sender
    destination: int  # name_id of the receiver
    incarnation: int  # the sender's
    trace_id: bytes  # 16 bytes
    position: int
    """Work told or asked: its number on this link, from 1. STREAM: index of the item. REPLY: number of items before it.
    CANCEL: reason. CHECK: items taken, or work sent. CHECKED: items sent. CREDIT: items or work taken. Else 0."""
    body_bytes: int

    @property
    def lane(self) -> int:
        """A value of ``Lane``; version 1 has no other flags."""
        return self.flags


def name_id(name: str) -> int:
    """The four bytes that stand for a node's name in a header."""
    return zlib.crc32(name.encode())


def head_of(kind: int, type_id: int, lane: int) -> int:
    """The first eight bytes of a record, version to aux_frames, as one number: equal for all messages of a class."""
    return int.from_bytes(HEADER.pack(VERSION, kind, type_id, lane, 0, 0, 0, 0, 0, 0, NO_TRACE, 0, 0)[:8], "little")


def ends_of(source: int, destination: int, incarnation: int) -> bytes:
    """The twelve bytes from source to incarnation: equal for all messages of one direction of a link."""
    return struct.pack("<III", source, destination, incarnation)


def seal(
    kind: int,
    type_id: int,
    lane: int,
    correlation: int,
    deadline_ns: int,
    source: int,
    destination: int,
    incarnation: int,
    trace_id: bytes,
    position: int,
    body: bytes,
) -> bytes:
    """One record; the fields are those of ``Envelope``. Raises ``BadFrame`` if the body is over ``MAX_BODY_BYTES``."""
    body_bytes = len(body)
    if body_bytes > MAX_BODY_BYTES:
        raise BadFrame(f"a message body of {body_bytes} bytes is over the bus's limit of {MAX_BODY_BYTES}")
    header = HEADER.pack(
        VERSION, kind, type_id, lane, 0, correlation, deadline_ns, source, destination, incarnation, trace_id, position,
        body_bytes,
    )  # fmt: skip
    return header + body


def envelope_of(record: bytes) -> Envelope:
    """The header of a record made by ``seal``."""
    return Envelope._make(HEADER.unpack_from(record))


def record_at(view: memoryview, offset: int) -> tuple[Envelope, memoryview, int]:
    """(envelope, body, offset of what follows) of the record at ``offset``. Raises ``BadFrame`` if there is none."""
    end = len(view)
    if end - offset < HEADER_BYTES:
        raise BadFrame(f"{end - offset} left-over bytes at byte {offset} of a frame of {end}")
    envelope = Envelope._make(HEADER.unpack_from(view, offset))
    if envelope.version != VERSION:
        raise BadFrame(f"envelope version {envelope.version} at byte {offset}; this is version {VERSION}")
    if not TELL <= envelope.kind <= LAST_KIND:
        raise BadFrame(f"unknown envelope kind {envelope.kind} at byte {offset}")
    if envelope.flags > WORK or envelope.aux_frames:
        raise BadFrame(f"flags {envelope.flags:#x}, {envelope.aux_frames} further frames at byte {offset}: unknown")
    begin = offset + HEADER_BYTES
    after = begin + envelope.body_bytes
    if after > end:
        raise BadFrame(f"a body of {envelope.body_bytes} bytes at byte {begin} of a frame of {end}")
    return envelope, view[begin:after], after


def split(frame: bytes) -> Iterator[tuple[Envelope, memoryview]]:
    """The records of a frame. Raises ``BadFrame`` at the first that is none; those before it have been yielded."""
    view = memoryview(frame)
    offset, end = 0, len(view)
    while True:
        envelope, body, offset = record_at(view, offset)
        yield envelope, body
        if offset == end:
            return
