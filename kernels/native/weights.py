"""A model's matrices packed for the native kernels, in a memory file that may outlive the chip.

Owns: the mapping, and while it is filled the file, unless somebody keeps one for the chip (``Kept``).

    matrices, in order | label: what they are, and how many bytes | room up to a whole huge page

A file is finished when the kernel has sealed it against writing, for good. That is done last, so one that is half
written never passes for a whole one, and one that is whole never changes: what a process still writes by mistake hits
memory that is mapped read-only, and nobody can map it otherwise any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import Any

import attrs
import torch
from torch import Tensor

from ...errors import MemoryExhausted
from ..chips import Kept
from . import library

__all__ = ["FORMATS", "PackedMatrix", "Segment", "packed_bytes"]

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""Of weights, as ``WeightFormat`` in task.h numbers them."""

_LAYOUT = b"chipbus weights 1\n"  # another number whenever the same contents give other bytes
_ALIGNMENT = 4096
_ITEM = {"float32": 4, "bfloat16": 2, "int8": 1}


@attrs.frozen(eq=False)
class PackedMatrix:
    """An (out, in) matrix in panels of ``PANEL`` output columns; see kernels/native/packing.h."""

    shape: tuple[int, int]
    format: str
    address: int
    panel_bytes: int
    scales: int = 0  # of int8: address of (panels, groups, PANEL) fp32
    sums: int = 0  # likewise, int32


def packed_bytes(rows: int, columns: int, weights: str) -> int:
    """Bytes of a segment that an (out, in) matrix takes."""
    panels = -(-rows // library.PANEL)
    matrix = _aligned(panels * library.PANEL * columns * _ITEM[weights])
    scales = _aligned(panels * library.PANEL * -(-columns // library.GROUP) * 4) if weights == "int8" else 0
    return matrix + 2 * scales


class Segment:
    """Memory for all packed matrices of one model, in order: ``pack`` them and ``finish``, or ``place`` what is found.

    ``contents`` says what they are: everything that decides on a byte of them. If the file in ``kept`` was finished for
    the same contents, ``is_found`` is true and it is mapped as it is; else it is emptied, and ``kept.tell`` hears why.
    """

    def __init__(self, cores: Any, nbytes: int, contents: str = "", kept: Kept | None = None) -> None:
        self.nbytes = nbytes
        self._cores = cores
        self._kept = kept
        self._own_file = -1
        self._used = 0
        self._label = _label(contents, nbytes)
        size = _aligned(nbytes + len(self._label), library.HUGE_PAGE)
        try:
            flaw = self._flaw(size)
            self.is_found = not flaw
            if kept is not None:
                kept.tell(f"packed: {flaw}" if flaw else "mapped")
            if flaw:
                self._make_room(size)
            self._mapping = library.Mapping(self._file, size, not self.is_found)
        except OSError as error:
            self._drop_own_file()
            raise MemoryExhausted(f"no memory for {nbytes:,} bytes of packed weights: {error}") from error
        self.address: int = self._mapping.address
        if not self.is_found:
            self._mapping.take_huge_pages(cores)

    @property
    def _file(self) -> int:
        return self._own_file if self._kept is None else self._kept.file

    def _make_room(self, size: int) -> None:
        """Have an empty file of ``size`` bytes."""
        if self._kept is not None:
            os.ftruncate(self._kept.file, 0)  # whatever was there is of no use to anyone
            if _is_sealed(self._kept.file):
                self._kept = None
        if self._kept is None:
            self._own_file = os.memfd_create("chipbus-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._file, size)

    def _flaw(self, size: int) -> str:
        """Why there is nothing in the file that can be used, "" if there is."""
        if self._kept is None:
            return "nobody keeps a file"
        file = self._kept.file
        found = os.fstat(file).st_size
        if not found:
            return "nothing is there yet"
        if not _is_sealed(file):
            return "what is there was not finished"
        if found != size:
            return f"what is there has {found:,} bytes and should have {size:,}"
        if os.pread(file, len(self._label), self.nbytes) != self._label:
            return "what is there are other weights, or packed otherwise"
        return ""

    def place(self, shape: tuple[int, int], weights: str) -> PackedMatrix:
        """Where the next (out, in) matrix is, in ``weights``: its own dtype, or int8."""
        rows, columns = shape
        panels, groups = -(-rows // library.PANEL), -(-columns // library.GROUP)
        panel_bytes = library.PANEL * columns * _ITEM[weights]
        address = self._take(panels * panel_bytes)
        if weights != "int8":
            return PackedMatrix(shape, weights, address, panel_bytes)
        scales, sums = (self._take(panels * library.PANEL * groups * 4) for _ in range(2))
        return PackedMatrix(shape, weights, address, panel_bytes, scales, sums)

    def pack(self, matrix: Tensor, weights: str) -> PackedMatrix:
        """Pack an (out, in) matrix of fp32 or bf16 into its place."""
        matrix = matrix.contiguous()
        rows, columns = matrix.shape
        packed = self.place((rows, columns), weights)
        if weights != "int8":
            self._cores.pack_panels(matrix.data_ptr(), rows, columns, matrix.element_size(), packed.address)
        else:
            is_wide = matrix.dtype == torch.float32
            self._cores.pack_int8(matrix.data_ptr(), rows, columns, is_wide, packed.address, packed.scales, packed.sums)
        return packed

    def finish(self) -> None:
        """All matrices are packed: from now on nothing changes in here. Addresses stay as they are."""
        os.pwrite(self._file, self._label, self.nbytes)
        self._mapping.make_read_only()
        try:
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
        except OSError as error:  # EBUSY: somebody else has it mapped to write, so it is for this chip alone
            if self._kept is not None:
                self._kept.tell(f"not kept for the next chip: {error}")
        self._drop_own_file()

    def close(self, *, and_empty: bool = False) -> None:
        """Let go of the memory, ``and_empty`` for those who keep it, too. Nothing in it may be used from then on."""
        del self._mapping
        if and_empty and self._kept is not None:
            os.ftruncate(self._kept.file, 0)
        self._drop_own_file()

    def _drop_own_file(self) -> None:
        """What is mapped stays."""
        file, self._own_file = self._own_file, -1
        if file >= 0:
            os.close(file)

    def _take(self, nbytes: int) -> int:
        begin, self._used = self._used, self._used + _aligned(nbytes)
        assert self._used <= self.nbytes, "packed_bytes of the matrices is what a segment is made for"
        return self.address + begin


def _label(contents: str, nbytes: int) -> bytes:
    """What is written behind the matrices."""
    what = f"{contents} in panels of {library.PANEL}, groups of {library.GROUP}"
    return _LAYOUT + nbytes.to_bytes(8, "little") + hashlib.sha256(what.encode()).digest()


def _is_sealed(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


def _aligned(nbytes: int, to: int = _ALIGNMENT) -> int:
    return -(-nbytes // to) * to
