"""What a chip executes: programs, tiles, task graphs, device tensors, chips and the Qwen3 programs.

Importing this package loads no torch; ``open_chip("cpu:0", …)`` does.
"""

from .chips import CHIP_KINDS, Chip, open_chip
from .dispatch import Arg, Completion, Dispatch
from .program import Direction, Param, Program, TensorSpec

__all__ = [
    "CHIP_KINDS",
    "Arg",
    "Chip",
    "Completion",
    "Direction",
    "Dispatch",
    "Param",
    "Program",
    "TensorSpec",
    "open_chip",
]
