"""Names of chips: ``kind:index``, e.g. ``cpu:0``.

Owns: nothing; values only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import attrs

from ..errors import TopologyError

__all__ = ["CHIP_KINDS", "Device", "default_devices", "parse_devices"]

CHIP_KINDS = ("cpu", "cuda", "null")
"""Kinds of chip this version has a driver for."""

_NAME = re.compile(r"([a-z]+):(0|[1-9][0-9]{0,8})")


@attrs.frozen(order=True)
class Device:
    """One chip. Two devices are the same chip exactly when they are equal."""

    kind: str
    index: int

    @classmethod
    def parse(cls, text: str) -> Device:
        """``cpu:0`` → ``Device("cpu", 0)``. Raises ``TopologyError`` for anything else, or an unknown kind."""
        match = _NAME.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise TopologyError(f"device {text!r} is not KIND:INDEX, for example cpu:0")
        check_kind(match[1])
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"


def check_kind(kind: str) -> None:
    """Raise ``TopologyError`` unless ``kind`` names a chip this version can open."""
    if kind in CHIP_KINDS:
        return
    near = difflib.get_close_matches(str(kind), CHIP_KINDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CHIP_KINDS)}"
    raise TopologyError(f"chip kind {kind!r} is unknown; {hint}")


def default_devices(chip: str, count: int) -> tuple[Device, ...]:
    """The first ``count`` devices of one kind. Raises ``TopologyError`` for an unknown kind."""
    check_kind(chip)
    return tuple(Device(chip, index) for index in range(count))


def parse_devices(devices: str | Iterable[str | Device]) -> tuple[Device, ...]:
    """``"cpu:0,cpu:1"`` or a list of names or devices → distinct devices of one kind, in the order given.

    Raises ``TopologyError`` for a bad name, a device given twice, or two kinds: replicas on chips of different kinds
    would answer the same prompt differently.
    """
    if isinstance(devices, str):
        parts: list[str | Device] = [part.strip() for part in devices.split(",")]
    elif isinstance(devices, Iterable):
        parts = list(devices)
    else:
        raise TopologyError(f"devices is {devices!r}; it must be a list of names such as cpu:0")
    parsed = tuple(Device.parse(str(part) if isinstance(part, Device) else part) for part in parts)
    for position, device in enumerate(parsed):
        if device in parsed[:position]:
            raise TopologyError(f"device {device} is given twice; each chip serves one place")
    kinds = sorted({device.kind for device in parsed})
    if len(kinds) > 1:
        raise TopologyError(f"devices mix the kinds {' and '.join(kinds)}; all chips of one engine are of one kind")
    return parsed
