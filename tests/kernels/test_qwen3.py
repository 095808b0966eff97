"""The Qwen3 programs against transformers: equal greedy tokens in fp32, logits in bf16 within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_runs import RunningModel, table

from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.qwen3.graphs import PREFILL_BUCKETS, ROW_BUCKETS, bucket_of, trace_prefill
from chipbus.kernels.qwen3.step import DecodeRow, Limits, PrefillRow, SampleRow

SHAPES = ["tied", "untied-sharded-odd-vocabulary", "bias-no-groups", "wide-heads"]
NEW = 12


def prompts(vocab: int, lengths: Sequence[int] = (5, 1, 70, 33)) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(0, vocab, length).tolist() for length in lengths]


def greedy_by_transformers(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        output, cache = None, None
        for _ in range(count):
            step = torch.tensor([tokens if cache is None else tokens[-1:]])
            output = model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def expected(reference: Callable[..., Any]) -> Callable[[str], list[list[int]]]:
    made: dict[str, list[list[int]]] = {}

    def get(name: str) -> list[list[int]]:
        if name not in made:
            model = reference(name)
            made[name] = [greedy_by_transformers(model, prompt, NEW) for prompt in prompts(model.config.vocab_size)]
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.guarantee("K1")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunk": 7},
        {"chunk": 16, "stagger": 3},
        {"chunk": 24, "stagger": 1, "scatter": True},
    ],
    ids=["whole", "chunked", "mixed", "mixed-scattered"],
)
def test_greedy_tokens_in_fp32_equal_transformers(
    shape: str,
    how: dict[str, Any],
    checkpoint: Callable[[str], Path],
    expected: Callable[[str], list[list[int]]],
) -> None:
    model = RunningModel(checkpoint(shape))
    assert len({token for output in expected(shape) for token in output}) > 10  # the texts wander
    assert model.greedy(prompts(model.spec.vocab_size), NEW, **how) == expected(shape)


@pytest.mark.slow
@pytest.mark.guarantee("K17")
def test_a_prompt_longer_than_a_window_and_a_batch_wider_than_one_equal_transformers(
    checkpoint: Callable[[str], Path], reference: Callable[..., Any]
) -> None:
    limits = Limits(max_num_seqs=40, max_num_batched_tokens=4096, max_model_len=1100, page_size=32, num_pages=256)
    model = RunningModel(checkpoint("tied"), limits=limits)
    long = prompts(model.spec.vocab_size, [1050])
    assert model.greedy(long, 3) == [greedy_by_transformers(reference("tied"), long[0], 3)]
    many = prompts(model.spec.vocab_size, range(1, 36))
    assert model.greedy(many, 4) == [greedy_by_transformers(reference("tied"), prompt, 4) for prompt in many]


def logits_of(model: RunningModel, prompt: Sequence[int], how: str) -> torch.Tensor:
    """Logits after ``prompt``, in row 3, by one way of cutting it up."""
    pages = np.arange(20, 20 + 16, dtype=np.int32) if how != "scattered" else np.arange(40, 8, -2, dtype=np.int32)
    ids = np.array(prompt, np.int32)
    cut = {"whole": len(ids), "scattered": len(ids), "chunked": 10, "decoded": len(ids) - 4}[how]
    for start in range(0, cut if how == "decoded" else len(ids), cut):
        part = ids[start : start + cut]
        model.step([PrefillRow(tokens=part, start=start, block_table=pages, row=3)])
    if how == "decoded":
        for position in range(cut, len(ids)):
            model.step((), [DecodeRow(token=int(ids[position]), position=position, block_table=pages, row=3)])
    model.step((), (), [SampleRow(row=3)])
    logits = model.programs.tensors[-1].resident
    return torch.from_numpy(model.chip.copy_from(logits).numpy()[3].copy())


@pytest.mark.slow
@pytest.mark.guarantee("K2")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["whole", "chunked", "decoded", "scattered"])
def test_logits_in_fp32_are_exact_and_in_bf16_as_close_as_transformers_in_bf16(
    shape: str, how: str, checkpoint: Callable[[str], Path], reference: Callable[..., Any]
) -> None:
    in_fp32, in_bf16 = (RunningModel(checkpoint(shape), dtype) for dtype in ("float32", "bfloat16"))
    ours, theirs = 0.0, 0.0
    for prompt in prompts(reference(shape).config.vocab_size, [50] * 6):
        with torch.inference_mode():
            exact, rounded = (
                reference(shape, dtype)(torch.tensor([prompt])).logits[0, -1].float()
                for dtype in (torch.float32, torch.bfloat16)
            )
        assert (logits_of(in_fp32, prompt, how) - exact).norm() / exact.norm() < 1e-5
        error = float((logits_of(in_bf16, prompt, how) - exact).norm() / exact.norm())
        assert error < 0.05  # bf16 keeps 8 bits, and these weights are drawn large
        ours += error
        theirs += float((rounded - exact).norm() / exact.norm())
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_steps_give_equal_logits_bit_by_bit(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    prompt = prompts(500, [40])[0]
    runs = [logits_of(RunningModel(checkpoint("tied"), dtype), prompt, "chunked") for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.guarantee("K18")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_pages_are_changes_no_bit(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    prompt = prompts(500, [70])[0]
    in_order, scattered = (
        logits_of(RunningModel(checkpoint("tied"), dtype), prompt, how) for how in ("whole", "scattered")
    )
    assert torch.equal(in_order, scattered)


def test_a_row_of_fp32_decode_has_the_same_bits_whatever_shares_its_batch(checkpoint: Callable[[str], Path]) -> None:
    def logits(others: int) -> torch.Tensor:
        model = RunningModel(checkpoint("tied"))
        rows = range(others + 1)
        ids = prompts(500, [8] * (others + 1))
        model.step([PrefillRow(tokens=np.array(ids[r], np.int32), start=0, block_table=table(r), row=r) for r in rows])
        model.step(
            (),
            [DecodeRow(token=5, position=8, block_table=table(r), row=r) for r in rows],
            [SampleRow(row=r) for r in rows],
        )
        return torch.from_numpy(model.chip.copy_from(model.programs.tensors[-1].resident).numpy()[0].copy())

    alone = logits(0)
    for others in (1, 6, 34):
        assert torch.equal(alone, logits(others))


def test_buckets_cover_every_count_with_the_smallest_that_holds_it() -> None:
    for buckets in (PREFILL_BUCKETS, ROW_BUCKETS):
        for count in range(1, buckets[-1] + 1):
            chosen = bucket_of(count, buckets)
            assert chosen >= count
            assert all(bucket < count for bucket in buckets if bucket < chosen)
        assert bucket_of(buckets[-1] + 1, buckets) == buckets[-1]


@pytest.mark.guarantee("K19")
def test_graphs_are_traced_once_per_bucket_and_the_cache_is_bounded(checkpoint: Callable[[str], Path]) -> None:
    chip = CpuChip(1, max_graphs=3)
    model = RunningModel(checkpoint("tied"), chip=chip)
    for length in (250, 193, 256):
        model.step(
            [PrefillRow(tokens=np.ones(length, np.int32), start=0, block_table=np.arange(16, dtype=np.int32), row=0)]
        )
    assert chip.num_graphs == 1
    for length in (70, 130, 200, 3):
        model.step(
            [PrefillRow(tokens=np.ones(length, np.int32), start=0, block_table=np.arange(13, dtype=np.int32), row=0)]
        )
    assert chip.num_graphs == 3


def test_every_layer_waits_for_the_one_before_and_attention_for_the_pages_just_written(
    checkpoint: Callable[[str], Path],
) -> None:
    model = RunningModel(checkpoint("tied"))
    graph = trace_prefill(dict(model.programs.prefill.static), 64)
    kernels = [task.kernel for task in graph.tasks]
    assert kernels.count("paged_attention") == kernels.count("rotate_and_store") == model.spec.num_layers
    for at, task in enumerate(graph.tasks):
        if task.kernel == "paged_attention":
            assert at - 1 in task.predecessors
            assert kernels[at - 1] == "rotate_and_store"
    reached = {len(graph.tasks) - 1}
    for at in range(len(graph.tasks) - 1, -1, -1):
        if at in reached:
            reached |= set(graph.tasks[at].predecessors)
    assert reached == set(range(len(graph.tasks)))  # the hidden state depends on every task
