"""The smallest tile program there is, and what a captured graph adds to each of its tasks.

Owns: one chip while it measures. No torch at import: in-core functions are given tensors.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from .dispatch import Arg, Dispatch
from .program import TensorSpec
from .tiles import INOUT, Tile, Trace, incore, program, tensor

__all__ = ["add_one", "task_overhead_us", "touch"]

_ROUNDS = 20


@incore(x=INOUT)
def add_one(x: Any) -> None:
    """One torch call."""
    x.add_(1.0)


@program(x=tensor("float32", "N", direction=INOUT))
def touch(t: Trace, x: Tile, *, tasks: int = 1) -> None:
    """``tasks`` tasks, one after another, each of one torch call on 32 bytes."""
    for _ in t.range(0, tasks):
        t.submit(add_one, x)


def task_overhead_us(tasks: int = 1000) -> float:
    """Microseconds a captured graph adds to each task, beyond calling the same function as often on the same tensor.

    Both in this process, in turn, on one thread; medians of 20 rounds.
    """
    import torch

    from .cpu import CpuChip

    chip = CpuChip(1)
    many = touch.with_settings(tasks=tasks).program
    chip.register(many)
    chip.alloc(TensorSpec(resident=1, dtype="float32", shape=(8,)))
    dispatch = Dispatch(dispatch_id=1, step_id=1, program=many.digest, args=(Arg(resident=1),))
    x = chip.tensor(1)
    replayed, called = [], []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            replayed.append(chip.launch(dispatch).device_ns)
            began = time.perf_counter_ns()
            for _ in range(tasks):
                add_one.function(x)
            called.append(time.perf_counter_ns() - began)
    chip.close()
    return (statistics.median(replayed) - statistics.median(called)) / tasks / 1000
