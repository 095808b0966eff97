"""Matrices kept as int8, and products with them: what ``weights`` "int8" means, in torch.

Owns nothing. A row (of a matrix (out, in), or of activations) is cut into groups of ``INT8_GROUP`` inputs; the last may
be shorter. Of each group

    largest = max |x|, at least 1e-30          scale = largest / 127          value = round(x · (127 / largest))

in fp32, halves to even. A product adds up, group after group and in fp32,

    y = Σ exact · (scale of the matrix · scale of the row)        exact = Σ value of the matrix · value of the row

``exact`` is a whole number below 2²⁴, so the order of its sum, and with it whatever shares a batch, changes no bit. The
native kernels round exact · scale and its addition once (fma), these twice: that is all they may differ in. A row that
holds a NaN or an infinity gives NaN.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from .program import INT8_GROUP

__all__ = ["Int8Matrix", "multiply", "quantized"]

_LEAST = 1e-30  # keeps 127 / largest finite; a group of smaller numbers is all zeros
_LOAD_ROWS = 4096  # quantised at once: the fp32 copy of a vocabulary would be as large as the model
_BLOCK = 1 << 20  # results computed together: fewer are mostly calls, more leave the cache between groups


@attrs.frozen(eq=False)
class Int8Matrix:
    """An (out, in) matrix."""

    values: Tensor  # (out, in) int8
    scales: Tensor  # (out, groups) fp32

    @classmethod
    def of(cls, matrix: Tensor) -> Int8Matrix:
        """Of fp32 or bf16 numbers. Each row is by itself: rows of the result are the result of the rows."""
        parts = [quantized(rows) for rows in torch.split(matrix, _LOAD_ROWS)]
        values = [values.nan_to_num(0.0).to(torch.int8).flatten(1)[:, : matrix.shape[1]] for values, _ in parts]
        return cls(torch.cat(values), torch.cat([scales for _, scales in parts]))

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, begin: int, end: int) -> Int8Matrix:
        """Outputs ``begin:end``, in the same memory."""
        return Int8Matrix(self.values[begin:end], self.scales[begin:end])


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (rows, groups, ``INT8_GROUP``) as whole fp32 numbers, zeros behind the last; scales (rows, groups)."""
    rows, inner = x.shape
    groups = functional.pad(x.float(), (0, -inner % INT8_GROUP)).reshape(rows, -1, INT8_GROUP)
    largest = groups.abs().amax(-1).clamp_(min=_LEAST)
    factors = torch.full((), 127.0).div(largest)  # 127.0 / largest would multiply by a rounded 1 / largest
    return (groups * factors[..., None]).round_(), largest.div_(127.0)


def multiply(x: Tensor, matrix: Int8Matrix) -> Tensor:
    """x (rows, in) · matrixᵀ in fp32."""
    values, scales = quantized(x)
    rows, columns = x.shape[0], matrix.shape[0]
    y = torch.zeros(rows, columns)
    width = max(_BLOCK // rows, 64)
    parts = torch.split(y, width, 1), torch.split(matrix.values, width), torch.split(matrix.scales, width)
    for block, part, block_scales in zip(*parts, strict=True):
        for group, weights in enumerate(torch.split(part, INT8_GROUP, 1)):
            exact = values[:, group, : weights.shape[1]] @ weights.float().T
            block.add_(exact.mul_(scales[:, group, None] * block_scales[:, group]))
    return y
