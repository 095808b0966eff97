"""The L3 worker: one host and its chips, many programs, tensors that stay on the chips between runs.

Owns nothing; names only. No torch here.
"""

from .binding import DeferredTensor, Tagged
from .core import WorkerState
from .orchestrator import Orchestrator
from .programs import Orchestration, Registration, orchestration
from .runs import RunConfig, RunHandle
from .tensors import DeviceTensor, StackedTensor
from .worker import L3Worker

__all__ = [
    "DeferredTensor",
    "DeviceTensor",
    "L3Worker",
    "Orchestration",
    "Orchestrator",
    "Registration",
    "RunConfig",
    "RunHandle",
    "StackedTensor",
    "Tagged",
    "WorkerState",
    "orchestration",
]
