"""Token ids as they travel: packed little-endian int32, 36 times cheaper to decode than a list of Python ints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import BadFrame

__all__ = ["MAX_TOKENS", "TOKEN_BYTES", "TokenIds", "count_tokens", "pack_tokens", "unpack_tokens"]

MAX_TOKENS = 2**22
TOKEN_BYTES = 4
TokenIds = Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES * MAX_TOKENS)]
"""A message field of packed token ids, at most ``MAX_TOKENS`` of them."""


def pack_tokens(ids: Sequence[int] | NDArray[Any]) -> bytes:
    """Token ids to little-endian int32 bytes. Raises ``OverflowError`` for an id outside int32."""
    if isinstance(ids, np.ndarray) and ids.dtype != np.int32:
        info = np.iinfo(np.int32)
        if ids.size and not (info.min <= int(ids.min()) and int(ids.max()) <= info.max):
            raise OverflowError(f"a token id between {ids.min()} and {ids.max()} does not fit into int32")
    return np.asarray(ids, dtype="<i4").tobytes()


def count_tokens(packed: bytes | bytearray) -> int:
    """How many token ids are packed there."""
    return len(packed) // TOKEN_BYTES


def unpack_tokens(packed: bytes) -> NDArray[np.int32]:
    """Packed token ids as a read-only int32 array, zero-copy. Raises ``BadFrame`` if the length is no multiple of 4."""
    if len(packed) % TOKEN_BYTES:
        raise BadFrame(f"{len(packed)} bytes of packed token ids; the length must be a multiple of 4")
    return np.frombuffer(packed, dtype="<i4")
