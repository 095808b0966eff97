"""Load a checkpoint's weights the way the cpu chip computes with them.

Owns nothing: returns tensors. Files are memory-mapped by safetensors, so what keeps its dtype and layout (the
embedding) is shared with every other process through the page cache; matrices are packed into oneDNN's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import read_tensors
from .chips import Report
from .program import TensorSpec
from .qwen3.model import ModelSpec

__all__ = ["can_pack", "interleave_halves", "load_weights", "pack", "packed_rows", "spec_of"]

# Rows per call oneDNN is asked to choose its layout for. Measured from 1 to 2048 rows: 256 is as fast as any other up
# to 1024, while layouts chosen for 16 or fewer are reordered again in every call of 2048 (2 × slower).
_PACK_ROWS = 256

_ONE_BY_ONE: tuple[Any, ...] = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN takes packed weights of ``dtype``."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """(out, in) matrix in oneDNN's layout where ``can_pack``, else contiguous. Only ``linear`` reads it.

    In bf16 as a convolution of one pixel, (out, in, 1, 1). oneDNN's AMX convolution adds up a pixel's products in one
    order for any number of pixels; its inner product takes another order for 1 to 32 rows, 40 to 160, and more.
    """
    if not can_pack(weight.dtype):
        return weight.contiguous()
    rows, columns = weight.shape
    packed: Tensor
    if weight.dtype == torch.bfloat16:
        image = weight.contiguous().view(rows, columns, 1, 1)
        packed = torch.ops.mkldnn._reorder_convolution_weight(image, *_ONE_BY_ONE, [1, columns, _PACK_ROWS, 1])
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    return packed


def packed_rows(packed: Tensor, begin: int, end: int) -> Tensor:
    """Rows ``begin:end`` of a matrix that ``pack`` packed, packed again: its own memory, the same products."""
    rows, columns = packed.shape[:2]
    return pack(packed.to_dense().view(rows, columns)[begin:end])


def interleave_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's dims 0, 1, … to 0, d/2, 1, d/2 + 1, …: the pairs rotary embedding turns become neighbours.

    Done to the output rows of the query and key projections, to their biases and to both head norms, it changes no
    query·key product, and lets the rotation be one complex multiplication. tensor: (heads × head_dim, …).
    """
    pairs = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def spec_of(tensor: TensorSpec) -> ModelSpec:
    """The model whose weights ``tensor`` names, in its dtype.

    Raises ``CheckpointError`` if they cannot be read, or the directory changed since ``tensor.fingerprint`` was taken.
    """
    spec = ModelSpec.from_directory(tensor.source, tensor.dtype)
    if tensor.fingerprint not in ("", spec.fingerprint):
        raise CheckpointError(
            f"{tensor.source} has fingerprint {spec.fingerprint[:12]}; expected {tensor.fingerprint[:12]}: its files"
            " are not those the programs were made for"
        )
    return spec


def load_weights(
    spec: ModelSpec,
    report: Report | None = None,
    pack: Callable[[Tensor], Any] = pack,
    found: Iterator[Any] | None = None,
) -> dict[str, Any]:
    """A model's weights under the names ``graphs`` binds.

    ``pack`` makes of an (out, in) matrix what the executor's ``linear`` reads, by default oneDNN's layout; all else are
    tensors. ``found``: what ``pack`` made of each, in the order of ``ModelSpec.matrices``, where that is there already;
    then no matrix is read.
    """

    def matrix(read: Callable[[], Tensor]) -> Any:
        return pack(read()) if found is None else next(found)

    total, done = float(spec.weights_bytes), 0.0
    weights: dict[str, Any] = {}
    with ExitStack() as opened:
        source = _Source(spec, opened)
        for name, value in _arranged(spec, source, matrix):
            weights[name] = value
            if report is not None and source.bytes_read > done:
                done = float(source.bytes_read)
                report(min(done, total), total)
    if report is not None:
        report(total, total)
    return weights


class _Source:
    """Stored tensors by name, converted to the compute dtype."""

    def __init__(self, spec: ModelSpec, opened: ExitStack) -> None:
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._stored = read_tensors(Path(spec.path))
        self._files: Mapping[str, Any] = {
            str(file): opened.enter_context(safe_open(file, framework="pt"))
            for file in {stored.file for stored in self._stored.values()}
        }
        self.bytes_read = 0

    def __call__(self, name: str) -> Tensor:
        raw: Tensor = self._files[str(self._stored[name].file)].get_tensor(name)
        value = raw.to(self._dtype)
        self.bytes_read += value.nbytes
        return value


def _arranged(
    spec: ModelSpec, source: _Source, matrix: Callable[[Callable[[], Tensor]], Any]
) -> Iterator[tuple[str, Any]]:
    dim = spec.head_dim
    embed = source("model.embed_tokens.weight")
    yield "embed", embed
    for layer in range(spec.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."

        def projection(kind: str, theirs: str = theirs) -> Tensor:
            q, k, v = (source(f"{theirs}self_attn.{name}_proj.{kind}") for name in "qkv")
            return torch.cat([interleave_halves(q, dim), interleave_halves(k, dim), v])

        yield ours + "input_norm", source(theirs + "input_layernorm.weight").float()
        yield ours + "qkv", matrix(partial(projection, "weight"))
        if spec.attention_bias:
            yield ours + "qkv_bias", projection("bias")
            yield ours + "o_bias", source(theirs + "self_attn.o_proj.bias").clone()
        q_norm, k_norm = (
            interleave_halves(source(f"{theirs}self_attn.{name}_norm.weight").float(), dim) for name in "qk"
        )
        yield ours + "qk_norm", torch.cat([q_norm.expand(spec.num_heads, dim), k_norm.expand(spec.num_kv_heads, dim)])
        yield ours + "o", matrix(partial(source, theirs + "self_attn.o_proj.weight"))
        yield ours + "post_norm", source(theirs + "post_attention_layernorm.weight").float()
        for name in ("gate", "up", "down"):
            yield ours + name, matrix(partial(source, f"{theirs}mlp.{name}_proj.weight"))
    yield "final_norm", source("model.norm.weight").float()
    yield "lm_head", matrix(lambda: embed if spec.tie_word_embeddings else source("lm_head.weight"))
