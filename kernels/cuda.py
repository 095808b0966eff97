"""The cuda chip: tile programs with torch on a GPU.

Owns nothing beyond what a ``TorchChip`` owns. Of the Qwen3 programs there are none here yet: their kernels work on
weights packed for the cpu.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .torch_chip import TorchChip

__all__ = ["CudaChip"]


class CudaChip(TorchChip):
    """A ``Chip`` on the GPU of that index. Raises ``ConfigError`` where torch sees no such GPU."""

    def __init__(self, index: int, *, check_numerics: bool = False) -> None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise ConfigError(f"device is 'cuda:{index}'; torch sees {count or 'no'} GPU{'s' * (count > 1)} here")
        super().__init__(torch.device("cuda", index), check_numerics=check_numerics)

    def free_bytes(self) -> int:
        """Memory of the GPU that nobody holds."""
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        """Return when everything queued on the GPU has ended."""
        torch.cuda.synchronize(self.device)
