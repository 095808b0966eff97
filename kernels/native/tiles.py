"""Into how large tiles the native engine cuts a program that leaves it open, measured once per machine and model shape.

Owns: one file of the user's cache, a JSON object of sizes by what they were measured for. It may be deleted at any
time, and where it cannot be read or written every chip measures for itself. Tile sizes change no bit (K24).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from ..graph import GraphBuilder, Tag
from ..qwen3.model import ModelSpec
from ..qwen3.tiling import spans
from ..torch_executor import HeapArenas
from .graph import NativeGraph

__all__ = ["TileSizes", "measured"]

_FORMAT = 2  # of what is measured: another one does not count
_WORTH_MEASURING = 1 << 20  # weights; for fewer any tile will do
_LAYERS = 6  # measured on: enough for weights to come from memory, as they do in a step
_ROUNDS = 5
_ROWS = 8
_PROMPT = 512
_HEAD_TOKENS = 64  # a bucket of so many or fewer tokens is read at the pace of the weights


@attrs.frozen(kw_only=True)
class TileSizes:
    """How much of each axis one task takes, for a few rows and for a prompt."""

    row_columns: int = 128
    head_columns: int = 2048
    prompt_columns: int = 256
    prompt_tokens: int = 128

    def fill(self, static: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A program's configuration with every tile size of 0 replaced, for a window of ``tokens``."""
        is_prompt = tokens > _HEAD_TOKENS
        chosen = {
            "tile_tokens": self.prompt_tokens if is_prompt else 0,
            "tile_columns": self.prompt_columns if is_prompt else self.row_columns,
            "tile_head_columns": self.head_columns,
            "tile_kv_heads": 1,
            "tile_query_tokens": 64,
            "tile_query_rows": 8,
        }
        return {**static, **{name: size for name, size in chosen.items() if not static[name]}}


def measured(cores: Any, spec: ModelSpec, weights: str, matrices: Mapping[str, Any]) -> TileSizes:
    """The fastest sizes for a model on these cores: from the cache file, or measured now in about a second.

    weights: format of ``matrices``, which are the model's by name, packed.
    """
    if sum(rows * columns for rows, columns in spec.matrices()) < _WORTH_MEASURING:
        return TileSizes()
    shape = spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size
    key = f"{_FORMAT}: {_processor()}, {cores.isa}, {cores.threads} threads, {weights}, {'x'.join(map(str, shape))}"
    known = _read()
    try:
        return TileSizes(**known[key])
    except (KeyError, TypeError):  # never measured, or not by this version
        sizes = _measure(cores, spec, matrices)
        _write({**known, key: attrs.asdict(sizes)})
        return sizes


def _measure(cores: Any, spec: ModelSpec, matrices: Mapping[str, Any]) -> TileSizes:
    layers = [
        f"layers.{layer}.{name}"
        for layer in range(min(spec.num_layers, _LAYERS))
        for name in ("qkv", "o", "gate", "down")
    ]

    def least(names: Iterable[str], tokens: int, tile_tokens: int, columns: int) -> float:
        return _seconds(cores, [(name, matrices[name]) for name in names], spec.dtype, tokens, tile_tokens, columns)

    row_columns = min((64, 128, 256, 512), key=lambda columns: least(layers, _ROWS, 0, columns))
    head_columns = min((256, 1024, 2048, 8192), key=lambda columns: least(["lm_head"], _ROWS, 0, columns))
    prompt = [(tokens, columns) for tokens in (64, 128) for columns in (128, 256, 512)]
    # No more tokens than that: norms and rotation are cut like linears, and have no columns to share out.
    tokens, columns = min(prompt, key=lambda size: least(layers[:4], _PROMPT, *size))
    return TileSizes(row_columns=row_columns, head_columns=head_columns, prompt_columns=columns, prompt_tokens=tokens)


def _seconds(
    cores: Any, matrices: Iterable[tuple[str, Any]], dtype: str, tokens: int, tile_tokens: int, columns: int
) -> float:
    """The least time of several for one linear after another."""
    builder = GraphBuilder("measure")
    memory: dict[str, Any] = {}

    def activations(side: str, width: int) -> Any:
        name = f"{side}.{width}"
        memory.setdefault(name, torch.zeros(tokens, width, dtype=getattr(torch, dtype)))
        return builder.bound(name, dtype, tokens, width)

    for name, matrix in matrices:
        memory[name] = matrix
        rows, inner = matrix.shape
        x, w, y = activations("x", inner), builder.bound(name, dtype, rows, inner), activations("y", rows)
        for left, right in spans(rows, columns):
            for begin, end in spans(tokens, tile_tokens):
                args = (Tag.INPUT, x[begin:end]), (Tag.INPUT, w[left:right]), (Tag.NO_DEP, y[begin:end, left:right])
                builder.submit("linear", *args, epilogue="none", bias=0, first_token=begin)
    graph = NativeGraph(
        cores, builder.build(), memory, HeapArenas(lambda count, _: torch.empty(count, dtype=torch.uint8))
    )
    graph.window.count = tokens
    took = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        graph.run("measure")
        took.append(time.perf_counter() - began)
    return min(took)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chipbus" / "tiles.json"


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # none yet, half-written by hand, or nobody's home
        return {}
    return known if isinstance(known, dict) else {}


def _write(known: Mapping[str, Any]) -> None:
    """In one step, so that a reader sees all or nothing. Two writers at once: one's sizes are measured again later."""
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1), encoding="utf-8")
        fresh.replace(path)
    except (OSError, RuntimeError):
        pass  # a cache nobody can keep: measured again by the next chip
