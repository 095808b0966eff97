"""How a model's author would have it sample: ``generation_config.json`` as fields of ``SamplingParams``.

Owns nothing. Taken as vLLM takes the file (``--generation-config auto``): six fields, whatever ``do_sample`` says.
Where they apply is the caller's decision: an engine's own defaults are those of ``SamplingParams``, a server uses these
for what its client leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, RequestInvalid
from ..kernels.checkpoint import read_json
from .sampling import SamplingParams

__all__ = ["generation_defaults"]

# Hugging Face's name → ours.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(directory: Path) -> Mapping[str, Any]:
    """Fields of ``SamplingParams`` that the model's ``generation_config.json`` states; empty without that file.

    Raises ``CheckpointError`` naming file and field if a value cannot be one.
    """
    path = directory / "generation_config.json"
    stated = read_json(path) if path.exists() else {}
    defaults = {ours: stated[theirs] for theirs, ours in _FIELDS.items() if stated.get(theirs) is not None}
    for theirs, ours in _FIELDS.items():
        if ours in defaults:
            try:
                SamplingParams(**{ours: defaults[ours]})
            except RequestInvalid as error:
                raise CheckpointError(f"{path}: {theirs} cannot be used: {error}") from None
    return MappingProxyType(defaults)
