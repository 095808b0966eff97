"""What a null chip makes of a tile program: the graph a real chip would run, modelled times, known numbers.

Owns nothing. No torch here (the program's own file may import it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from .graph import Task, TaskGraph, Tile
from .program import DTYPE_BYTES, nbytes

__all__ = ["corrupted_tile", "null_values", "task_flop", "tile_bytes"]

_NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "uint8": np.uint8, "int32": np.int32,
          "int64": np.int64}  # fmt: skip


def null_values(program: str, param: str, inputs: Iterable[bytes], dtype: str, shape: tuple[int, ...]) -> bytes:
    """What a null chip writes to a parameter, given the bytes of all IN and INOUT arguments in order.

    Element i is byte i mod 16 of a blake2b-16 over program name, parameter name and ``inputs``, as a number 0 to 255:
    exact in every dtype, the same whatever the tiles, and another one if any input differs.
    """
    digest = hashlib.blake2b(f"{program}\0{param}\0".encode(), digest_size=16)
    for data in inputs:
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    count = nbytes(dtype, shape) // DTYPE_BYTES[dtype]
    numbers = np.resize(np.frombuffer(digest.digest(), np.uint8), count)
    if dtype == "bfloat16":  # the upper half of a float32
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return numbers.astype(_NUMPY[dtype]).tobytes()


def tile_bytes(task: Task) -> int:
    """Memory a task moves: each of its tiles once."""
    return sum(nbytes(tile.buffer.dtype, tile.shape) for _, tile in task.args)


def task_flop(task: Task) -> float:
    """Arithmetic of a task, as far as it is known: that of a built-in linear."""
    if task.kernel != "linear":
        return 0.0
    (rows, width), (columns, _) = task.args[0][1].shape, task.args[1][1].shape
    return 2.0 * rows * width * columns


def corrupted_tile(graph: TaskGraph, task: int) -> Tile | None:
    """What becomes wrong if a task writes garbage: a caller's tile it writes, else the next one that is written."""
    for later in graph.tasks[task:]:
        for tag, tile in later.args:
            if tag.writes and tile.buffer.is_bound and tile.byte_ranges():
                return tile
    return None
