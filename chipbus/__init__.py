"""The front door: what a host application imports. Names load on first use, so importing this costs little.

from chipbus import Engine
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import errors as errors
    from .actors.async_engine import AsyncEngine as AsyncEngine
    from .actors.config import EngineConfig as EngineConfig
    from .actors.engine import Engine as Engine
    from .actors.handling import Handling as Handling
    from .actors.l3 import L3Worker as L3Worker
    from .actors.l3 import RunConfig as RunConfig
    from .actors.messages.tree import ChildEnd as ChildEnd
    from .actors.messages.tree import ChildRecord as ChildRecord
    from .actors.messages.tree import CloseReport as CloseReport
    from .actors.outputs import CompletionOutput as CompletionOutput
    from .actors.outputs import RequestOutput as RequestOutput
    from .actors.outputs import Statistics as Statistics
    from .actors.outputs import Timing as Timing
    from .actors.report import EngineReport as EngineReport
    from .actors.report import Event as Event
    from .actors.sampling import SamplingParams as SamplingParams
    from .bus import Progress as Progress
    from .errors import ChipbusError as ChipbusError
    from .topology import RingRequest as RingRequest
    from .topology import Topology as Topology

_HOME = {
    "AsyncEngine": ".actors.async_engine",
    "ChildEnd": ".actors.messages.tree",
    "ChildRecord": ".actors.messages.tree",
    "CloseReport": ".actors.messages.tree",
    "CompletionOutput": ".actors.outputs",
    "Engine": ".actors.engine",
    "EngineConfig": ".actors.config",
    "EngineReport": ".actors.report",
    "Event": ".actors.report",
    "Handling": ".actors.handling",
    "L3Worker": ".actors.l3",
    "Progress": ".bus",
    "RequestOutput": ".actors.outputs",
    "RingRequest": ".topology",
    "RunConfig": ".actors.l3",
    "SamplingParams": ".actors.sampling",
    "Statistics": ".actors.outputs",
    "Timing": ".actors.outputs",
    "Topology": ".topology",
}

__all__ = [
    *_HOME,
    "errors",
]


def __getattr__(name: str) -> object:
    """Load a public name from its room, or an error class from ``chipbus.errors``."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name], __name__), name)
    else:
        errors_module = importlib.import_module(".errors", __name__)
        if name == "errors":
            value = errors_module
        elif name in errors_module.__all__:
            value = getattr(errors_module, name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "errors"})
