"""WHERE things are: how many replicas on how many chips, which layers where. Pure data, no processes, no sockets."""

from __future__ import annotations

from .devices import CHIP_KINDS, Device, default_devices, parse_devices
from .parallel import MAX_CHIPS, ParallelConfig
from .placement import ChipPlace, ReplicaPlace, Topology
from .rings import (
    RINGS,
    RingRequest,
    RingSizes,
    RingUse,
    check_reservation,
    resolve_rings,
    suggest_rings,
)
from .spans import LayerSpan, LayerSplit

__all__ = [
    "CHIP_KINDS",
    "MAX_CHIPS",
    "RINGS",
    "ChipPlace",
    "Device",
    "LayerSpan",
    "LayerSplit",
    "ParallelConfig",
    "ReplicaPlace",
    "RingRequest",
    "RingSizes",
    "RingUse",
    "Topology",
    "check_reservation",
    "default_devices",
    "parse_devices",
    "resolve_rings",
    "suggest_rings",
]
