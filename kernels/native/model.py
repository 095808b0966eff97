"""What the native engine keeps for one chip: its cores, and each model's packed weights.

Owns: cores and segments. Which models it takes is decided in shapes.py, into how large tiles it cuts them in tiles.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..captures import Capture
from ..chips import Kept, Report
from ..memory import weights_bytes
from ..program import TensorSpec
from ..qwen3.model import ModelSpec
from ..weights import load_weights
from .graph import NativeGraph
from .tiles import TileSizes, measured
from .weights import Segment, packed_bytes

if TYPE_CHECKING:
    from ..torch_chip import TorchChip

__all__ = ["NativeModel"]


class NativeModel:
    """The native half of a cpu chip."""

    def __init__(self, cores: Any, kept: Kept | None = None) -> None:
        self.cores = cores
        self._kept = kept  # until a model has taken it
        self._segments: dict[int, Segment] = {}
        self._sizes: dict[int, TileSizes] = {}

    @property
    def ended(self) -> int:
        """Tasks and packing jobs ended so far; for any thread."""
        cores = self.cores  # None once closed, by the thread that computes
        return 0 if cores is None else int(cores.ended)

    def has(self, resident: int) -> bool:
        """Whether the weights of that id are packed here."""
        return resident in self._segments

    def load(self, tensor: TensorSpec, spec: ModelSpec, report: Report | None) -> tuple[dict[str, Any], int]:
        """A model's weights, matrices packed or found as an earlier chip packed them; and the bytes they take.

        spec: that of ``tensor``.
        """
        weights = tensor.weights or tensor.dtype
        size = sum(packed_bytes(*shape, weights) for shape in spec.matrices())
        kept, self._kept = self._kept, None
        segment = Segment(self.cores, size, f"{spec.fingerprint} from {spec.dtype} to {weights}", kept)
        try:
            if segment.is_found:
                places = (segment.place(shape, weights) for shape in spec.matrices())
                loaded = load_weights(spec, report, found=places)
            else:
                loaded = load_weights(spec, report, lambda matrix: segment.pack(matrix, weights))
                segment.finish()
        except BaseException:
            segment.close(and_empty=not segment.is_found)
            raise
        self._segments[tensor.resident] = segment
        self._sizes[tensor.resident] = measured(self.cores, spec, weights, loaded)
        return loaded, weights_bytes(spec, tensor.weights)

    def tiled(self, resident: int, static: Mapping[str, Any], tokens: int) -> Mapping[str, Any]:
        """A program's configuration with the tile sizes it leaves open chosen for those weights and ``tokens``."""
        return self._sizes[resident].fill(static, tokens)

    def bind(self, chip: TorchChip, capture: Capture, memory: Mapping[str, Any]) -> NativeGraph:
        """A captured graph on the chip's memory."""
        return NativeGraph(self.cores, capture.graph, memory, chip.arenas, check_numerics=chip.check_numerics)

    def read(self, resident: int) -> tuple[int, float]:
        """Read the packed weights of that id on all cores, computing nothing: bytes, and the seconds it took."""
        segment = self._segments[resident]
        return segment.nbytes, float(self.cores.read(segment.address, segment.nbytes))

    def largest(self, values: NDArray[np.float32]) -> int:
        """The index of the largest of ``values`` (V,), the lowest among equals, looked for on all cores."""
        values = np.ascontiguousarray(values)
        return int(self.cores.largest(values.ctypes.data, 0, [0], len(values))[0])

    def free(self, resident: int) -> None:
        """Give back the weights of that id, if there are any. Graphs bound to them are gone already."""
        segment = self._segments.pop(resident, None)
        if segment is not None:
            segment.close(and_empty=True)

    def close(self) -> None:
        """Give back all that is not kept for the next chip; the cores end with the last graph that knows them."""
        while self._segments:
            self._segments.popitem()[1].close()
        self.cores = None
