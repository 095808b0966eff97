"""Programs cut into tiles: which tasks there are, and that their edges are all an executor needs to know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from kernel_runs import LIMITS, RunningModel

from chipbus.errors import ConfigError
from chipbus.kernels.graph import TaskGraph
from chipbus.kernels.qwen3 import graphs
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import DecodeRow, ModelPrograms, PrefillRow, SampleRow
from chipbus.kernels.qwen3.tiling import COARSE, FINE, Tiling, spans
from chipbus.kernels.torch_kernels import KERNELS

ODD = Tiling(tokens=24, columns=16, head_columns=100, kv_heads=1, query_tokens=40, query_rows=3)


def counts(graph: TaskGraph) -> dict[str, int]:
    kernels = [task.kernel for task in graph.tasks]
    return {kernel: kernels.count(kernel) for kernel in dict.fromkeys(kernels)}


@pytest.mark.guarantee("K27")
def test_tile_sizes_are_parameters_of_the_programs(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.from_directory(checkpoint("tied"))
    coarse, fine = (ModelPrograms.build(spec, LIMITS, tiling) for tiling in (COARSE, FINE))
    assert coarse.prefill.digest != fine.prefill.digest
    whole = {
        "load_rows": 1, "rotary_table": 1, "rms_norm": 4, "linear": 10, "rotate_and_store": 2, "paged_attention": 2,
        "store_rows": 1,
    }  # fmt: skip
    assert counts(graphs.trace_decode(dict(coarse.decode.static), 32)) == whole
    # 64 tokens a tile: 2 of 128; 2 KV heads; no linear of this model has more than 256 columns
    tiled = whole | {"rms_norm": 8, "linear": 20, "rotate_and_store": 4, "paged_attention": 8}
    assert counts(graphs.trace_prefill(dict(fine.prefill.static), 128)) == tiled
    # each row and KV head by itself
    assert counts(graphs.trace_decode(dict(fine.decode.static), 32)) == whole | {"paged_attention": 2 * 2 * 32}
    cut = dict(ModelPrograms.build(spec, LIMITS, ODD).lm_head.static)
    assert counts(graphs.trace_lm_head(cut, 8))["linear"] == -(-515 // 100)


def test_a_tile_size_is_at_least_one_or_all() -> None:
    assert list(spans(5, 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(spans(5, 0)) == [(0, 5)]
    for wrong in (-1, 1.5, True):
        with pytest.raises(
            ConfigError, match=r"tiling: columns is .*; it must be an integer of at least 1, or 0 for all"
        ):
            Tiling(columns=wrong)  # type: ignore[arg-type]


@pytest.mark.guarantee("K28")
def test_tiled_graphs_name_kernels_of_the_closed_set_and_describe_them_by_value(
    checkpoint: Callable[[str], Path],
) -> None:
    spec = ModelSpec.from_directory(checkpoint("bias-no-groups"))
    programs = ModelPrograms.build(spec, LIMITS, ODD)
    for trace, program in ((graphs.trace_prefill, programs.prefill), (graphs.trace_decode, programs.decode)):
        graph = trace(dict(program.static), 48)
        assert set(counts(graph)) <= set(KERNELS)
        for task in graph.tasks:
            assert all(isinstance(value, int | float | str) for _, value in task.settings)
        inside = [buffer for buffer in graph.buffers if not buffer.is_bound and buffer.name not in ("x", "rotary")]
        assert inside  # the memory of the layers
        assert all(buffer.place is not None for buffer in inside)


def in_any_order(graph: TaskGraph, random: np.random.Generator) -> TaskGraph:
    """The same tasks in another order that keeps every edge."""
    waits = [set(task.predecessors) for task in graph.tasks]
    order: list[int] = []
    ready = [at for at, before in enumerate(waits) if not before]
    while ready:
        at = ready.pop(int(random.integers(len(ready))))
        order.append(at)
        for other, before in enumerate(waits):
            if at in before:
                before.remove(at)
                if not before:
                    ready.append(other)
    assert len(order) == len(graph.tasks)
    place = {old: new for new, old in enumerate(order)}
    tasks = [
        attrs.evolve(graph.tasks[old], predecessors=tuple(sorted(place[p] for p in graph.tasks[old].predecessors)))
        for old in order
    ]
    return attrs.evolve(graph, tasks=tuple(tasks))


@pytest.mark.slow
@pytest.mark.guarantee("K29")
@pytest.mark.parametrize("tiling", [COARSE, ODD], ids=["coarse", "odd"])
def test_every_order_that_keeps_the_edges_gives_the_same_bits(
    tiling: Tiling, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits() -> torch.Tensor:
        model = RunningModel(checkpoint("untied-sharded-odd-vocabulary"), tiling=tiling)
        tokens = np.random.default_rng(3).integers(0, 500, 70).astype(np.int32)
        tables = [np.arange(8 * row, 8 * row + 8, dtype=np.int32) for row in range(2)]
        model.step(
            [PrefillRow(tokens=tokens[: 70 - 30 * row], start=0, block_table=table, row=row)
             for row, table in enumerate(tables)]
        )  # fmt: skip
        model.step(
            (),
            [
                DecodeRow(token=5, position=70 - 30 * row, block_table=table, row=row)
                for row, table in enumerate(tables)
            ],
            [SampleRow(row=row) for row in range(2)],
        )
        return model.chip.tensor(model.programs.tensors[-1].resident)[:2].clone()  # type: ignore[attr-defined]

    expected = logits()
    random = np.random.default_rng(4)
    for name in ("trace_prefill", "trace_decode", "trace_lm_head"):
        trace = getattr(graphs, name)
        monkeypatch.setattr(graphs, name, lambda *args, trace=trace: in_any_order(trace(*args), random))
    for _ in range(3):
        assert torch.equal(logits(), expected)
