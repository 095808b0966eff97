"""Which tensors a checkpoint directory stores, and where in its files, read from headers alone.

Owns nothing; reads ``*.safetensors`` headers (https://github.com/huggingface/safetensors#format) without torch, so that
a wrong or half-written directory is refused before any process is started.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import CheckpointError

__all__ = ["StoredTensor", "read_json", "read_tensors"]

# Dtypes a weight may be stored in: safetensors' name → torch's name, bytes.
_STORED_DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@attrs.frozen
class StoredTensor:
    """One tensor of a checkpoint: bytes ``[begin, end)`` of ``file``, row-major."""

    name: str
    dtype: str  # torch's name without prefix
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``CheckpointError`` if it is missing, unreadable or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file may be half-written") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}; it must hold a JSON object")
    return found


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor stored in ``directory``: ``model.safetensors``, or the shards named by its index file.

    Raises ``CheckpointError`` for a missing or cut-off file, a broken header, or an index that disagrees with a shard.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if not index.exists():
        others = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {others[0]} is a pickle file, which is never read: convert it" if others else ""
        raise CheckpointError(f"{directory} has neither model.safetensors nor model.safetensors.index.json{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to shard files")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; a shard is a file in the same directory")
        if not (directory / shard).exists():
            raise CheckpointError(
                f"{directory} lacks {shard}, which {index.name} names; the download may be incomplete"
            )
        for name, tensor in _read_header(directory / shard).items():
            if name in tensors:
                raise CheckpointError(f"{tensors[name].file} and {shard} both hold the tensor {name}; one of them may")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{directory / shard} lacks the tensor {name}, which {index.name} places there")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} is {size} bytes long and its header claims {length}; it is cut off or no safetensors file"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except CheckpointError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} has a broken header: no JSON table of tensors in its first {length} bytes"
        ) from None
    needed = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if needed > size:
        raise CheckpointError(f"{path} is {size} bytes long but its header describes {needed}; the file is cut off")
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != end:  # the format allows neither, so that no byte means two things
            how = (
                "overlaps the tensor before it" if tensor.begin < end else "leaves bytes before it that no tensor owns"
            )
            raise CheckpointError(f"{path}: tensor {tensor.name} begins at byte {tensor.begin}, not {end}: it {how}")
        end = tensor.end
    return tensors


def _entry(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    shape = tuple(int(extent) for extent in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if entry["dtype"] not in _STORED_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {entry['dtype']}; supported are {', '.join(_STORED_DTYPES)}"
        )
    dtype, item_bytes = _STORED_DTYPES[entry["dtype"]]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * item_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {entry['dtype']} needs"
            f" {math.prod(shape) * item_bytes} bytes; the header gives it {end - begin}"
        )
    return StoredTensor(name, dtype, shape, path, data_start + begin, data_start + end)
