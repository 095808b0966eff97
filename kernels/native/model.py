"""What the native engine keeps for one chip: its cores, and each model's packed weights.

Owns: cores and segments. Which models it takes, and into how large tiles it cuts their programs, is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..captures import Capture
from ..chips import Report
from ..program import TensorSpec
from ..qwen3.model import ModelSpec
from ..weights import load_weights
from . import library
from .graph import NativeGraph
from .tiles import tiled
from .weights import Segment, packed_bytes

if TYPE_CHECKING:
    from ..torch_chip import TorchChip

__all__ = ["NativeModel", "refused"]

_MAX_GROUP = 96  # query heads that share a KV head: rows of one attention tile


class NativeModel:
    """The native half of a cpu chip."""

    def __init__(self, cores: Any) -> None:
        self.cores = cores
        self._segments: dict[int, Segment] = {}

    def has(self, resident: int) -> bool:
        """Whether the weights of that id are packed here."""
        return resident in self._segments

    def load(self, tensor: TensorSpec, report: Report | None) -> tuple[dict[str, Any], int]:
        """A checkpoint's weights, matrices packed; and the bytes they take."""
        spec = ModelSpec.from_directory(tensor.source, tensor.dtype)
        weights = tensor.weights or tensor.dtype
        segment = Segment(self.cores, sum(packed_bytes(*shape, weights) for shape in matrices(spec)))
        try:
            _, loaded = load_weights(tensor, report, lambda matrix: segment.pack(matrix, weights))
        except BaseException:
            segment.close()
            raise
        self._segments[tensor.resident] = segment
        return loaded, spec.weights_bytes

    def tiled(self, static: Mapping[str, Any], tokens: int) -> Mapping[str, Any]:
        """A program's configuration with the tile sizes it leaves open chosen for a window of ``tokens``."""
        return tiled(static, tokens, self.cores.threads)

    def bind(self, chip: TorchChip, capture: Capture, memory: Mapping[str, Any]) -> NativeGraph:
        """A captured graph on the chip's memory."""
        return NativeGraph(self.cores, capture.graph, memory, chip.arenas, check_numerics=chip.check_numerics)

    def free(self, resident: int) -> None:
        """Give back the weights of that id, if there are any. Graphs bound to them are gone already."""
        segment = self._segments.pop(resident, None)
        if segment is not None:
            segment.close()

    def close(self) -> None:
        """Give everything back; the cores end with the last graph that knows them."""
        for resident in list(self._segments):
            self.free(resident)


def matrices(spec: ModelSpec) -> list[tuple[int, int]]:
    """(out, in) of every matrix that is packed, in the order ``load_weights`` packs them."""
    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    mixed = heads + 2 * spec.num_kv_heads * spec.head_dim
    layer = [(mixed, hidden), (hidden, heads), (inner, hidden), (inner, hidden), (hidden, inner)]
    return spec.num_layers * layer + [(spec.vocab_size, hidden)]


def refused(spec: ModelSpec, weights: str = "") -> str:
    """Why the kernels do not take a model of this shape, "" if they do."""
    multiple = 4 if weights == "int8" else 2
    inner = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads × head_dim": spec.num_heads * spec.head_dim,
    }
    for name, size in inner.items():
        if size % multiple:
            return f"{name} is {size}; the kernels take multiples of {multiple}"
    if spec.head_dim > library.MAX_HEAD_DIM:
        return f"head_dim is {spec.head_dim}; the kernels take at most {library.MAX_HEAD_DIM}"
    if spec.num_heads // spec.num_kv_heads > _MAX_GROUP:
        return f"{spec.num_heads // spec.num_kv_heads} query heads share a KV head; the kernels take {_MAX_GROUP}"
    return ""
