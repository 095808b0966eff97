"""Checkpoints of several tiny shapes, each made once per session, and transformers' answers on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import tiny_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied-sharded-odd-vocabulary": {
        "tied": False, "vocab": 1021, "heads": 6, "kv_heads": 2, "head_dim": 16, "shard_bytes": 200_000,
        "layers": 3,
    },
    "bias-no-groups": {"bias": True, "heads": 4, "kv_heads": 4, "head_dim": 24, "intermediate": 96,
        "rope_at_top": True},
    "wide-heads": {"hidden": 48, "heads": 8, "kv_heads": 1, "head_dim": 64, "rope_theta": 1e4, "eos": [2, 7]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Other processes share the machine, and two OpenMP threads collapse when one of them is not running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a shape by name."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_checkpoint(tmp_path_factory.mktemp(name), **SHAPES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """A shape's model in transformers, computed plainly: eager attention."""
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, torch.dtype], Any] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Any:
        if (name, dtype) not in made:
            made[name, dtype] = AutoModelForCausalLM.from_pretrained(
                checkpoint(name), dtype=dtype, attn_implementation="eager"
            ).eval()
        return made[name, dtype]

    return get
