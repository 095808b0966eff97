"""Append-only, checksummed record of one life of one node: envelopes, dispatches, decisions; the source of replay.

    file    = magic (8 bytes) entry entry …                  one file per life: {name}.{incarnation}.ledger
    entry   = length u32, head check u32, chain 16 bytes, payload
    payload = msgpack [seq, time_ns, kind, fields]           seq from 0; first "ledger.begin", last "ledger.end"

``chain`` is blake2b over the previous entry's chain and this payload, so a changed, lost or moved entry breaks it. The
head check (crc32 over length and previous chain) tells a damaged length from a file that just stops. Owner: the node's
loop thread.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import msgspec

from ..errors import ConfigError, LedgerCorrupt
from .logs import get_logger

__all__ = ["Entry", "LedgerReader", "LedgerWriter", "read_ledger"]

MAGIC = b"CBLEDG\x00\x01"  # the last byte is the format's version
HEAD = struct.Struct("<II16s")
HEAD_CHECKED = struct.Struct("<I16s")
FIRST_CHAIN = bytes(16)
BEGIN, END = "ledger.begin", "ledger.end"
BUFFER_BYTES = 256 * 2**10  # written early when a turn records more than this


@attrs.frozen
class Entry:
    """One record: ``fields`` as given to ``append``, tuples as lists. ``offset``: its first byte in the file."""

    seq: int
    time_ns: int
    kind: str
    fields: dict[str, Any]
    offset: int


class _Row(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    seq: int
    time_ns: int
    kind: str
    fields: dict[str, Any]


def _chain(previous: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(previous + payload, digest_size=16).digest()


class LedgerWriter:
    """Writes one ledger file, which must not exist yet. ``append`` buffers; ``flush`` writes, once per loop turn.

    If the disk refuses a write, that is logged once, nothing more is recorded, and the file lacks its end marker: a run
    that serves requests does not die of its record. Raises ``ConfigError`` if the file cannot be made.
    """

    def __init__(self, directory: Path, name: str, incarnation: int, meta: Mapping[str, Any]) -> None:
        self.path = directory / f"{name}.{incarnation}.ledger"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise ConfigError(f"{self.path} exists; record each run into a directory of its own") from error
        except OSError as error:
            raise ConfigError(f"cannot record into {self.path}: {error.strerror}") from error
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray(MAGIC)
        self._chain = FIRST_CHAIN
        self._seq = 0
        self._is_open = True
        self.written_bytes = 0
        self.failures = 0
        self._append(BEGIN, {"name": name, "incarnation": incarnation, **meta})
        self.flush()

    def append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Add one entry; values must be msgpack-able. After ``close`` it does nothing. ``kind`` is free to choose."""
        if kind in (BEGIN, END):
            raise ValueError(f"entries of kind {kind!r} are the ledger's own")
        if self._is_open:
            self._append(kind, fields)

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        payload = self._encoder.encode((self._seq, time.time_ns(), kind, fields))
        self._seq += 1
        head_check = zlib.crc32(HEAD_CHECKED.pack(len(payload), self._chain))
        self._chain = _chain(self._chain, payload)
        self._buffer += HEAD.pack(len(payload), head_check, self._chain)
        self._buffer += payload
        if len(self._buffer) > BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand everything appended to the kernel."""
        if not self._buffer or not self._is_open:
            return
        pending = memoryview(self._buffer)
        try:
            while pending:
                num_bytes = os.write(self._fd, pending)
                self.written_bytes += num_bytes
                pending = pending[num_bytes:]
        except OSError as error:
            self.failures += 1
            get_logger().error("ledger.failed", path=str(self.path), error=str(error))
            self._is_open = False
            os.close(self._fd)
        pending.release()
        self._buffer = bytearray()

    def close(self) -> None:
        """Write the end marker and close the file. Idempotent."""
        if not self._is_open:
            return
        self._append(END, {"entries": self._seq})
        self.flush()
        if self._is_open:
            self._is_open = False
            os.close(self._fd)


class LedgerReader:
    """Entries of one ledger, checked while they are read. Iterating again starts at the beginning.

    ``meta``: fields of the first entry. ``torn``: after an iteration, the file had no end marker (its process was
    killed); what was read is complete and unchanged all the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn = False
        first = next(self._entries(), None)
        self.meta: dict[str, Any] = first.fields if first is not None else {}

    def __iter__(self) -> Iterator[Entry]:
        """Entries in order, without the begin and end markers."""
        return (entry for entry in self._entries() if entry.kind not in (BEGIN, END))

    def _entries(self) -> Iterator[Entry]:
        self.torn = False
        with self.path.open("rb") as file:
            if (magic := file.read(len(MAGIC))) != MAGIC:
                if MAGIC.startswith(magic):
                    self.torn = True
                    return
                raise LedgerCorrupt(f"{self.path}, byte 0: {magic!r} is not the beginning of a version 1 ledger")
            chain, offset, seq = FIRST_CHAIN, len(MAGIC), 0
            while True:
                entry, chain, offset_after = self._entry(file, chain, offset, seq)
                if entry is None:
                    self.torn = True
                    return
                yield entry
                offset, seq = offset_after, seq + 1
                if entry.kind == END:
                    break
            if file.read(1):
                raise LedgerCorrupt(f"{self.path}, byte {offset}: bytes after the end marker")

    def _entry(self, file: BinaryIO, chain: bytes, offset: int, seq: int) -> tuple[Entry | None, bytes, int]:
        """The entry at ``offset``, its chain, the offset after it; no entry where the file just stops."""
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return None, chain, offset
        size, head_check, next_chain = HEAD.unpack(head)
        if head_check != zlib.crc32(HEAD_CHECKED.pack(size, chain)):
            raise LedgerCorrupt(f"{self.path}, byte {offset}: the length of entry {seq} is damaged")
        payload = file.read(size)
        if len(payload) < size:
            return None, chain, offset
        if _chain(chain, payload) != next_chain:
            raise LedgerCorrupt(f"{self.path}, byte {offset}: entry {seq} does not match its checksum")
        try:
            row = msgspec.msgpack.decode(payload, type=_Row)
        except msgspec.DecodeError as error:
            raise LedgerCorrupt(f"{self.path}, byte {offset}: entry {seq} is no record: {error}") from error
        if row.seq != seq:
            raise LedgerCorrupt(f"{self.path}, byte {offset}: entry {row.seq} where {seq} was expected")
        return Entry(row.seq, row.time_ns, row.kind, row.fields, offset), next_chain, offset + HEAD.size + size


def read_ledger(path: Path | str) -> LedgerReader:
    """Open a ledger. Raises ``LedgerCorrupt`` if it is none, ``OSError`` if it cannot be read."""
    return LedgerReader(Path(path))
