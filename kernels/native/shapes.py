"""Which models the native engine takes, and so which engine computes a model's programs on a cpu chip. No torch.

Owns nothing.
"""

from __future__ import annotations

from ..qwen3.model import ModelSpec
from . import library, why_not

__all__ = ["engine_of", "refused"]

_MAX_GROUP = 96  # query heads that share a KV head: rows of one attention tile


def engine_of(spec: ModelSpec | None = None, weights: str = "", isa: str = "") -> str:
    """What computes a model's programs: "native, avx512bf16", or "torch: " and why.

    weights: "int8", or "" for the model's dtype. isa: see ``open_cores``; "none" for torch alone. Without ``spec`` it
    is what computes those of models it takes.
    """
    if isa == "none":
        return "torch, as asked"
    reason = why_not(isa) or ("" if spec is None else refused(spec, weights))
    return f"torch: {reason}" if reason else f"native, {isa or library.best_isa()}"


def refused(spec: ModelSpec, weights: str = "") -> str:
    """Why the kernels do not take a model of this shape, "" if they do."""
    multiple = 4 if weights == "int8" else 2
    inner = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads × head_dim": spec.num_heads * spec.head_dim,
    }
    for name, size in inner.items():
        if size % multiple:
            return f"{name} is {size}; the kernels take multiples of {multiple}"
    if spec.head_dim > library.MAX_HEAD_DIM:
        return f"head_dim is {spec.head_dim}; the kernels take at most {library.MAX_HEAD_DIM}"
    if spec.num_heads // spec.num_kv_heads > _MAX_GROUP:
        return f"{spec.num_heads // spec.num_kv_heads} query heads share a KV head; the kernels take {_MAX_GROUP}"
    return ""
