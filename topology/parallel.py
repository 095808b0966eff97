"""How many copies of a model, on how many chips each, and which layers.

Owns: nothing; values only. Chip counts and ids are derived from ``ParallelConfig`` alone.
"""

from __future__ import annotations

from typing import Any

import attrs

from ..errors import TopologyError
from .spans import LayerSplit

__all__ = ["MAX_CHIPS", "ParallelConfig"]

MAX_CHIPS = 1024
"""Most chips one engine may have: each is a process of its own on one host."""


def _size(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TopologyError(f"{field.name} is {value!r}; it must be an integer of at least 1")


def _split(value: LayerSplit | str | None) -> LayerSplit | None:
    return value if value is None or isinstance(value, LayerSplit) else LayerSplit.parse(value)


@attrs.frozen
class ParallelConfig:
    """Sizes of the two parallel dimensions, and the layer split. Raises ``TopologyError`` naming value and rule."""

    data_parallel_size: int = attrs.field(default=1, validator=_size)
    """Replicas, each a complete copy of the model."""
    tensor_parallel_size: int = attrs.field(default=1, validator=_size)
    """Chips per replica."""
    layers: LayerSplit | None = attrs.field(default=None, converter=_split)
    """Layers owned here, as text or parsed; None means all."""

    def __attrs_post_init__(self) -> None:
        if self.num_chips > MAX_CHIPS:
            raise TopologyError(
                f"data_parallel_size {self.data_parallel_size} x tensor_parallel_size {self.tensor_parallel_size}"
                f" needs {self.num_chips} chips; one engine has at most {MAX_CHIPS}"
            )

    @property
    def num_chips(self) -> int:
        """``data_parallel_size * tensor_parallel_size``."""
        return self.data_parallel_size * self.tensor_parallel_size

    def check_offered(self, num_layers: int | None = None) -> None:
        """Raise ``TopologyError`` for what is understood but not built yet; ``num_layers`` is the model's, if known."""
        if self.layers is not None:
            if num_layers is not None:
                self.layers.check(num_layers)
            if self.layers.kind != "local":
                remote = None if num_layers is None else self.layers.remote(num_layers)
                leaves = "" if remote is None else f" that leaves layers {remote[0]} to {remote[1]} to other stages"
                raise TopologyError(
                    f"layers {self.layers} is a {self.layers.kind} split{leaves}; layer splits come in a later version,"
                    " use 0:output"
                )
        if self.tensor_parallel_size > 1:
            raise TopologyError(
                f"tensor_parallel_size is {self.tensor_parallel_size};"
                " tensor parallelism comes in a later version, use 1"
            )
