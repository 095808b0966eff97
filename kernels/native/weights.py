"""A model's matrices packed for the native kernels, in one segment of memory.

Owns: the segment, an anonymous memory file that is mapped with huge pages where the kernel gives them.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from ...errors import MemoryExhausted
from . import library

__all__ = ["FORMATS", "PackedMatrix", "Segment", "packed_bytes"]

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""Of weights, as ``WeightFormat`` in task.h numbers them."""

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
    """Memory for all packed matrices of one model, filled in order."""

    def __init__(self, cores: Any, nbytes: int) -> None:
        self._cores = cores
        self.nbytes = nbytes
        self._used = 0
        try:
            self._file = os.memfd_create("chipbus-weights", os.MFD_CLOEXEC)
        except OSError as error:
            raise MemoryExhausted(f"no memory file for {nbytes:,} bytes of packed weights: {error}") from error
        try:
            os.ftruncate(self._file, nbytes)
            self._memory = mmap.mmap(self._file, nbytes)
        except OSError as error:
            os.close(self._file)
            raise MemoryExhausted(f"{nbytes:,} bytes of packed weights cannot be mapped: {error}") from error
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = np.frombuffer(self._memory, np.uint8).ctypes.data

    def pack(self, matrix: Tensor, weights: str) -> PackedMatrix:
        """Pack an (out, in) matrix of fp32 or bf16 in ``weights``: its own dtype, or int8."""
        matrix = matrix.contiguous()
        rows, columns = matrix.shape
        panels, groups = -(-rows // library.PANEL), -(-columns // library.GROUP)
        address = self._take(panels * library.PANEL * columns * _ITEM[weights])
        panel_bytes = library.PANEL * columns * _ITEM[weights]
        if weights != "int8":
            self._cores.pack_panels(matrix.data_ptr(), rows, columns, matrix.element_size(), address)
            return PackedMatrix((rows, columns), weights, address, panel_bytes)
        scales, sums = (self._take(panels * library.PANEL * groups * 4) for _ in range(2))
        is_wide = matrix.dtype == torch.float32
        self._cores.pack_int8(matrix.data_ptr(), rows, columns, is_wide, address, scales, sums)
        return PackedMatrix((rows, columns), weights, address, panel_bytes, scales, sums)

    def close(self) -> None:
        """Give the memory back. Nothing packed in it may be used from then on."""
        self._memory.close()
        os.close(self._file)

    def _take(self, nbytes: int) -> int:
        begin, self._used = self._used, self._used + _aligned(nbytes)
        assert self._used <= self.nbytes, "packed_bytes of the matrices is what a segment is made for"
        return self.address + begin


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
