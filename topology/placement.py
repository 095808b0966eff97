"""Which chip serves which replica: the one source of truth for names, ranks and devices.

Owns: nothing; values only. The device list is cut, in order, into one group of ``tensor_parallel_size`` chips per
replica:

    devices   cpu:0      cpu:1      cpu:2      cpu:3          (-dp 2 -tp 2)
              chip.0.0   chip.0.1   chip.1.0   chip.1.1
              └─ replica.0 ──────┘  └─ replica.1 ──────┘
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import TopologyError
from .devices import Device, check_kind, default_devices, parse_devices
from .parallel import ParallelConfig
from .spans import LayerSplit

__all__ = ["ChipPlace", "ReplicaPlace", "Topology"]


@attrs.frozen
class ChipPlace:
    """One chip's place: ``rank`` is its position in the replica's group, from 0."""

    name: str  # "chip.0.1": replica, then rank; stable over restarts
    replica: int
    rank: int
    device: Device


@attrs.frozen
class ReplicaPlace:
    """One complete copy of the model."""

    name: str  # "replica.0"
    replica: int
    dp_rank: int
    """Global data-parallel rank. Each replica holds one rank in this version, so it equals the replica's number."""
    chips: tuple[ChipPlace, ...]


def _replica(parallel: ParallelConfig, devices: tuple[Device, ...], replica: int) -> ReplicaPlace:
    size = parallel.tensor_parallel_size
    group = devices[replica * size : (replica + 1) * size]
    chips = tuple(ChipPlace(f"chip.{replica}.{rank}", replica, rank, device) for rank, device in enumerate(group))
    return ReplicaPlace(f"replica.{replica}", replica, replica, chips)


@attrs.frozen
class Topology:
    """Replicas on chips. Made with ``of``, ``from_mapping`` or ``from_toml``; ``TopologyError`` if it is impossible."""

    parallel: ParallelConfig
    devices: tuple[Device, ...] = attrs.field(converter=parse_devices)

    def __attrs_post_init__(self) -> None:
        needed = self.parallel.num_chips
        if len(self.devices) != needed:
            raise TopologyError(
                f"{len(self.devices)} devices are given ({', '.join(map(str, self.devices))}); data_parallel_size"
                f" {self.parallel.data_parallel_size} x tensor_parallel_size {self.parallel.tensor_parallel_size}"
                f" needs {needed}"
            )

    @classmethod
    def of(
        cls,
        data_parallel_size: int = 1,
        tensor_parallel_size: int = 1,
        layers: LayerSplit | str | None = None,
        devices: str | Iterable[str | Device] | None = None,
        chip: str = "cpu",
        num_layers: int | None = None,
    ) -> Topology:
        """The topology an engine can start, or ``TopologyError``.

        devices: ``"cpu:0,cpu:1"`` or a list, which bring their own kind; None takes the first devices of kind ``chip``.
        num_layers: the model's number of layers, if it is known already; a layer split is then checked against it.
        Everything is validated first; then tensor parallelism and layer splits are refused, for they come later.
        """
        check_kind(chip)
        parallel = ParallelConfig(data_parallel_size, tensor_parallel_size, layers)
        chosen = default_devices(chip, parallel.num_chips) if devices is None else parse_devices(devices)
        topology = cls(parallel, chosen)
        parallel.check_offered(num_layers)
        return topology

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], num_layers: int | None = None) -> Topology:
        """``of`` with names and values as a TOML file has them; an unknown name raises with the nearest match."""
        known = ("data_parallel_size", "tensor_parallel_size", "layers", "devices", "chip")
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise TopologyError(f"a topology has no setting {name!r}; {hint}")
        return cls.of(**settings, num_layers=num_layers)

    @classmethod
    def from_toml(cls, path: Path, num_layers: int | None = None) -> Topology:
        """Read a file such as ``data_parallel_size = 2`` / ``devices = ["cpu:0", "cpu:1"]``; errors name the file."""
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TopologyError(f"topology file {path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TopologyError(f"topology file {path} is not TOML: {error}") from error
        try:
            return cls.from_mapping(settings, num_layers)
        except TopologyError as error:
            raise TopologyError(f"topology file {path}: {error}") from error

    @property
    def replicas(self) -> tuple[ReplicaPlace, ...]:
        """One entry per replica, in order."""
        return tuple(_replica(self.parallel, self.devices, n) for n in range(self.parallel.data_parallel_size))

    @property
    def chips(self) -> tuple[ChipPlace, ...]:
        """The placement table: every chip with its name, replica, rank and device, in replica order."""
        return tuple(chip for replica in self.replicas for chip in replica.chips)
