"""Memory is counted before it is taken: what a placement needs, what there is, and a refusal with both numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from kernel_runs import LIMITS
from native_runs import NEEDS_NATIVE

from chipbus.errors import ConfigError
from chipbus.kernels.int8 import Int8Matrix
from chipbus.kernels.memory import available_bytes, check_memory, default_kv_pages, replica_bytes, weights_bytes
from chipbus.kernels.native.weights import packed_bytes
from chipbus.kernels.program import nbytes
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import Limits

MIB = 1 << 20


@pytest.fixture
def spec(checkpoint: Callable[[str], Path]) -> ModelSpec:
    return ModelSpec.from_directory(checkpoint("tied"))


def machine(root: Path, *, available_kib: int, cgroup: str, files: dict[str, str]) -> int:
    """What ``available_bytes`` says on a machine described by a few files."""
    proc = {"proc/meminfo": f"MemFree: 9 kB\nMemAvailable:  {available_kib} kB\n", "proc/self/cgroup": cgroup}
    for name, text in {**proc, **{f"cgroup/{name}": text for name, text in files.items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_bytes(root / "proc", root / "cgroup")


def test_without_a_limit_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert machine(tmp_path, available_kib=2048, cgroup="0::/\n", files={"memory.max": "max\n"}) == 2 * MIB


def test_a_limit_on_any_ancestor_counts_and_page_cache_does_not(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": "max\n",
        "a/memory.max": f"{10 * MIB}\n",
        "a/memory.current": f"{9 * MIB}\n",
        "a/memory.stat": f"anon 5\ninactive_file {2 * MIB}\n",
    }
    assert machine(tmp_path, available_kib=99_999, cgroup="0::/a/b\n", files=files) == 3 * MIB


def test_version_one_groups_are_read_too(tmp_path: Path) -> None:
    files = {"memory/x/memory.limit_in_bytes": f"{4 * MIB}", "memory/x/memory.usage_in_bytes": f"{5 * MIB}"}
    cgroup = "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n"
    assert machine(tmp_path, available_kib=99_999, cgroup=cgroup, files=files) == 0


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 64 * MIB


@pytest.mark.guarantee("K16")
def test_more_than_there_is_is_refused_with_both_numbers(spec: ModelSpec) -> None:
    needed = 2 * replica_bytes(spec, LIMITS)
    check_memory(spec, LIMITS, 2, needed)
    with pytest.raises(ConfigError) as caught:
        check_memory(spec, attrs.evolve(LIMITS, num_pages=100_000), 2, needed)
    sentence = str(caught.value)
    assert "2 replicas with 100000 KV pages of 16 tokens need" in sentence
    assert f"{needed / 2**30:.2f} GiB is available" in sentence


def test_a_page_costs_what_the_spec_says(spec: ModelSpec) -> None:
    more = replica_bytes(spec, attrs.evolve(LIMITS, num_pages=LIMITS.num_pages + 1))
    assert more - replica_bytes(spec, LIMITS) == spec.page_bytes(LIMITS.page_size)


def wide(spec: ModelSpec, *, tied: bool) -> ModelSpec:
    """With the shape of Qwen3-0.6B."""
    return attrs.evolve(
        spec, vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8,
        head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.mark.guarantee("K47")
@pytest.mark.parametrize("tied", [True, False])
def test_int8_weights_are_counted_as_a_byte_each_and_eight_for_a_group_beside_the_table_in_its_dtype(
    tied: bool, spec: ModelSpec
) -> None:
    spec = wide(spec, tied=tied)
    head = 151_936 * 1024
    layers = 28 * 1024 * (4096 + 2048 + 3 * 3072)
    norms = 2 * (28 * (2 * 1024 + 2 * 128) + 1024)
    assert weights_bytes(spec) == 2 * (layers + 2 * head) + norms
    assert weights_bytes(spec, "int8") == (layers + head) * 136 // 128 + 2 * head + norms
    less = weights_bytes(spec) - weights_bytes(spec, "int8")
    assert replica_bytes(spec, LIMITS) - replica_bytes(spec, LIMITS, "int8") == less
    check_memory(spec, LIMITS, 1, replica_bytes(spec, LIMITS, "int8"), "int8")
    with pytest.raises(ConfigError, match="weights and"):
        check_memory(spec, LIMITS, 1, replica_bytes(spec, LIMITS, "int8"))


@NEEDS_NATIVE
@pytest.mark.parametrize("weights", ["", "int8"])
def test_what_is_counted_for_weights_is_what_packing_takes(weights: str, spec: ModelSpec) -> None:
    spec = wide(spec, tied=True)
    packed = sum(packed_bytes(*shape, weights or spec.dtype) for shape in spec.matrices())
    kept = packed + nbytes(spec.dtype, (spec.vocab_size, spec.hidden_size))
    assert 0.999 < weights_bytes(spec, weights) / kept < 1.001
    assert Int8Matrix.of(torch.ones(6, 300)).nbytes <= 6 * (300 + 3 * 8)


def bare(spec: ModelSpec) -> int:
    """A replica without KV pages."""
    return replica_bytes(spec, Limits(4, 256, 1024, 16, 1)) - spec.page_bytes(16)


def pages(spec: ModelSpec, available: int, replicas: int = 1) -> int:
    return default_kv_pages(
        spec,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        max_model_len=1024,
        page_size=16,
        replicas=replicas,
        available=available,
    )


def test_by_default_every_sequence_fits_or_half_the_memory_is_used(spec: ModelSpec) -> None:
    assert pages(spec, 64 << 30) == 4 * 64
    room = 100 * spec.page_bytes(16)
    assert pages(spec, bare(spec) + 2 * room) == 100
    assert pages(spec, 2 * (bare(spec) + 2 * room), replicas=2) == 100
    assert pages(spec, bare(spec) + 64 * spec.page_bytes(16)) == 64  # one full sequence fits: more than half is used


def test_not_even_one_full_sequence_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="1 replica with 64 KV pages of 16 tokens need"):
        pages(spec, bare(spec) + 63 * spec.page_bytes(16))
