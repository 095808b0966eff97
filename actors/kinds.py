"""Which actors a child process may run, and what a warden imports for them before it forks.

Owns: the two tables. Nothing that arrives in a message or stands in a boot file can name a module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..bus import Actor
from ..errors import ConfigError

__all__ = ["ENTRIES", "PRELOADS", "load_actor"]

ENTRIES: Mapping[str, str] = {
    "tokenizer": "chipbus.actors.tokenizer:TokenizerActor",
    "router": "chipbus.actors.router:RouterActor",
    "replica": "chipbus.actors.replica:ReplicaActor",
    "chip": "chipbus.actors.chip:ChipActor",
}
"""Kind of child → ``module:class``."""

PRELOADS: Mapping[str, tuple[str, ...]] = {
    "light": (
        "chipbus.bus",
        "chipbus.actors.chip",
        "chipbus.kernels.null",
        "chipbus.actors.router",
        "chipbus.actors.replica",
        "chipbus.actors.tokenizer",
        "tokenizers",
    ),
    # The last is torch's own, imported when ``with torch.device(…)`` is first used.
    "torch": ("chipbus.bus", "chipbus.actors.chip", "chipbus.kernels.cpu", "torch.utils._device"),
}
"""Warden → modules, imported in this order. They may define things; they must start no thread and compute nothing."""


def load_actor(kind: str, config: dict[str, Any], entries: Mapping[str, str] = ENTRIES) -> Actor:
    """Build the actor of a child. Raises ``ConfigError`` for a kind not in ``entries``, or what the actor raises."""
    entry = entries.get(kind)
    if entry is None:
        raise ConfigError(f"there is no kind of child {kind!r}; known: {', '.join(entries)}")
    module, _, name = entry.partition(":")
    actor = getattr(importlib.import_module(module), name)(config)
    assert isinstance(actor, Actor)
    return actor
