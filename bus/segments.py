"""Large arrays between processes: one pre-faulted memory file per arena, handles over the bus, no copy at the reader.

    | header page | generation of each 4 KiB granule, u64 | blocks …                                  |
                    0: nothing begins here; else the block that does

A memory file has no name: nothing to unlink, nothing left after SIGKILL. Its size is sealed, so a view can never fault.
A handle is checked against the arena's id and the block's generation, which lives in the shared memory itself, so every
process sees at once that a block was freed. Owner of allocation and free: the process that made the arena, one thread.
A block must not be freed while a process that could still write to it lives; hence ``free_all`` by life.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import BusError, MailboxFull, PeerGone, StaleTensor

__all__ = ["GRANULE_BYTES", "Arena", "TensorRef"]

GRANULE_BYTES = 4096
HEADER = struct.Struct("<8sQQ")  # magic, arena id, granules
MAGIC = b"CBARENA\x01"

Owner = tuple[str, int]
"""Name and incarnation of the node a block was allocated for."""


@attrs.frozen(kw_only=True)
class TensorRef:
    """A handle to an array in an arena; may travel as a field of a message."""

    arena: int  # id of the arena, not a descriptor
    generation: int  # of the block; never used twice in one arena
    offset: int  # bytes from the start of the arena
    nbytes: int
    dtype: str  # numpy's name; bfloat16 travels as "uint16"
    shape: tuple[int, ...]


@attrs.frozen
class Block:
    """Memory given out by ``Arena.alloc``."""

    offset: int
    nbytes: int
    generation: int
    owner: Owner


class Arena:
    """One shared segment, made by ``create`` (the owner, who allocates) or ``attach`` (everybody else)."""

    def __init__(self, fd: int, memory: mmap.mmap, *, is_owner: bool) -> None:
        self.fd = fd
        self._memory: mmap.mmap | None = memory
        _, self.id, granules = HEADER.unpack_from(memory)
        self._generations = np.frombuffer(memory, dtype="<u8", count=granules, offset=GRANULE_BYTES)
        self._is_owner = is_owner
        self._first_granule = 1 + -(-8 * granules // GRANULE_BYTES)
        self._next_generation = 1
        self._blocks: dict[int, Block] = {}  # by first granule
        self._free: list[tuple[int, int]] = [(self._first_granule, granules)]  # [begin, end) granules, ascending

    @classmethod
    def create(cls, name: str, size: int) -> Arena:
        """A new arena with room for ``size`` bytes, faulted in now. ``name`` shows in /proc only.

        Raises ``OSError`` if the memory cannot be had.
        """
        if size <= 0:
            raise ValueError(f"arena size {size}; it must be above 0")
        usable = -(-size // GRANULE_BYTES)
        granules = 1 + usable + -(-8 * usable // GRANULE_BYTES) + 1
        fd = os.memfd_create(f"chipbus-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, granules * GRANULE_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            HEADER.pack_into(memory, 0, MAGIC, secrets.randbits(63), granules)
            return cls(fd, memory, is_owner=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, pid: int, fd: int) -> Arena:
        """Map the arena that process ``pid`` holds as descriptor ``fd``.

        Raises ``PeerGone`` if there is no such descriptor, ``BusError`` if it is no arena.
        """
        try:
            own_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PeerGone(f"descriptor {fd} of process {pid} cannot be opened: {error.strerror}") from error
        try:
            size = os.fstat(own_fd).st_size
            memory = mmap.mmap(own_fd, 0, flags=mmap.MAP_SHARED) if size >= GRANULE_BYTES else None
            header = HEADER.unpack_from(memory) if memory is not None else (b"", 0, 0)
            if memory is None or header[0] != MAGIC or header[2] * GRANULE_BYTES != size:
                raise BusError(f"descriptor {fd} of process {pid} is no arena")
            return cls(own_fd, memory, is_owner=False)
        except BaseException:
            os.close(own_fd)
            raise

    def alloc(self, nbytes: int, owner: Owner) -> Block:
        """A block of at least ``nbytes`` for one life of one node, first fit. ``MailboxFull`` if there is none."""
        self._check_owner()
        need = max(1, -(-nbytes // GRANULE_BYTES))
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= need:
                if end - begin == need:
                    del self._free[index]
                else:
                    self._free[index] = (begin + need, end)
                block = Block(begin * GRANULE_BYTES, need * GRANULE_BYTES, self._next_generation, owner)
                self._next_generation += 1
                self._blocks[begin] = block
                self._generations[begin] = block.generation
                return block
        raise MailboxFull(f"no {nbytes} bytes in one piece in the arena; {self.free_bytes} are free")

    def ref(self, block: Block, dtype: str, shape: tuple[int, ...]) -> TensorRef:
        """A handle to an array at the start of ``block``. Raises ``ValueError`` if it does not fit."""
        nbytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        if nbytes > block.nbytes:
            raise ValueError(f"an array of {nbytes} bytes does not fit into a block of {block.nbytes}")
        return TensorRef(
            arena=self.id, generation=block.generation, offset=block.offset, nbytes=nbytes, dtype=dtype, shape=shape
        )  # fmt: skip

    def view(self, ref: TensorRef) -> NDArray[Any]:
        """The array itself, shared and writable. ``StaleTensor`` if its block was freed or belongs to another arena.

        The handle may come from another process, so every field is checked. A view stays mapped as long as it is
        referenced; what it shows after a free is the next owner's.
        """
        if ref.arena != self.id:
            raise StaleTensor(f"the handle is for arena {ref.arena:#x}, this is {self.id:#x}")
        if self._memory is None:
            raise StaleTensor("the arena is closed")
        granule, rest = divmod(ref.offset, GRANULE_BYTES)
        if rest or not self._first_granule <= granule < len(self._generations):
            raise StaleTensor(f"no block can begin at byte {ref.offset} of the arena")
        if not ref.generation or int(self._generations[granule]) != ref.generation:
            raise StaleTensor(f"block {ref.generation} at byte {ref.offset} was freed")
        try:
            dtype = np.dtype(ref.dtype)
        except (TypeError, ValueError, SyntaxError) as error:
            raise StaleTensor(f"the handle's dtype {ref.dtype!r} is unknown") from error
        if any(size < 0 for size in ref.shape) or dtype.hasobject:
            raise StaleTensor(f"the handle's shape {ref.shape} or dtype {ref.dtype!r} cannot be shared")
        count = 1
        for size in ref.shape:
            count *= size
        if count * dtype.itemsize != ref.nbytes or ref.offset + ref.nbytes > len(self._memory):
            raise StaleTensor(f"{ref.nbytes} bytes at byte {ref.offset} do not hold {ref.dtype} {ref.shape}")
        return np.frombuffer(self._memory, dtype=dtype, count=count, offset=ref.offset).reshape(ref.shape)

    def free(self, block: Block) -> None:
        """Give a block back; handles to it are stale from now on. ``StaleTensor`` if it was given back already."""
        self._check_owner()
        granule = block.offset // GRANULE_BYTES
        if self._blocks.get(granule) != block:
            raise StaleTensor(f"block {block.generation} at byte {block.offset} was freed already")
        del self._blocks[granule]
        self._generations[granule] = 0
        self._free.append((granule, granule + block.nbytes // GRANULE_BYTES))
        self._free.sort()
        merged = [self._free[0]]
        for begin, end in self._free[1:]:
            if begin == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        self._free = merged

    def free_all(self, owner: Owner) -> int:
        """Give back every block of one life, after its process was reaped; how many there were."""
        blocks = [block for block in self._blocks.values() if block.owner == owner]
        for block in blocks:
            self.free(block)
        return len(blocks)

    @property
    def free_bytes(self) -> int:
        """Bytes not given out, over all gaps."""
        return sum(end - begin for begin, end in self._free) * GRANULE_BYTES

    def check_integrity(self) -> None:
        """Assert that blocks and gaps tile the arena, without overlap."""
        spans = [*self._free, *((g, g + b.nbytes // GRANULE_BYTES) for g, b in self._blocks.items())]
        position = self._first_granule
        for begin, end in sorted(spans):
            assert begin == position, f"granules {position} to {begin} are lost or given out twice"
            position = end
        assert position == len(self._generations), f"granules from {position} on are lost"

    def close(self) -> None:
        """Forget the mapping and close the descriptor; the memory goes with the last view of it. Idempotent."""
        if self._memory is not None:
            self._memory = None
            self._generations = np.empty(0, dtype="<u8")
            os.close(self.fd)

    def _check_owner(self) -> None:
        if not self._is_owner or self._memory is None:
            raise BusError("only the process that made an arena allocates in it, until it closes it")
