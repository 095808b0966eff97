"""Matrices of int8: torch against a plain reference, native kernels against torch, the same bits in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import LIMITS, RunningModel
from native_runs import ENGINES, ISAS, NEEDS_NATIVE, cut, randn, run_native, run_torch, same_bits
from numpy.typing import NDArray
from torch import Tensor

from checkpoints import tiny_checkpoint
from chipbus.errors import InvalidArgs
from chipbus.kernels.chips import open_chip
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.graph import GraphBuilder, Tag, TaskGraph
from chipbus.kernels.int8 import Int8Matrix, multiply
from chipbus.kernels.native import library
from chipbus.kernels.program import INT8_GROUP, TensorSpec
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import ModelPrograms, PrefillRow, SampleRow
from chipbus.kernels.qwen3.tiling import COARSE, Tiling

DTYPES = ["float32", "bfloat16"]
EPILOGUES = ["none", "silu", "mul", "add"]
MANY = settings(deadline=None, print_blob=True, max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)

ROUNDINGS = 2.0**-23
"""What engines may differ in for each group of a product, as a share of what it adds up: they round once or twice."""


def by_hand(x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Whole numbers, and for every one of them its scale."""
    values, scales = np.zeros(x.shape, np.int64), np.zeros(x.shape)
    for row in range(x.shape[0]):
        for begin in range(0, x.shape[1], 128):
            group = x[row, begin : begin + 128]
            largest = np.float32(max(np.abs(group).max(), np.float32(1e-30)))
            factor = np.float32(127) / largest
            values[row, begin : begin + 128] = np.rint(group * factor)  # halves to even
            scales[row, begin : begin + 128] = largest / np.float32(127)
    return values, scales


def exact_product(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x · wᵀ as int8 means it, in fp64; and the sum of the magnitudes of its terms."""
    (a, a_scales), (b, b_scales) = by_hand(x.float().numpy()), by_hand(w.float().numpy())
    left, right = torch.from_numpy(a * a_scales), torch.from_numpy(b * b_scales)
    return left @ right.T, left.abs() @ right.T.abs()


@pytest.mark.guarantee("K40")
@MANY
@given(
    seed=SEEDS, rows=st.integers(1, 9), out=st.integers(1, 40), inner=st.integers(1, 500), dtype=st.sampled_from(DTYPES)
)
def test_an_int8_matrix_and_its_products_are_what_their_definition_says(
    seed: int, rows: int, out: int, inner: int, dtype: str
) -> None:
    random = np.random.default_rng(seed)
    x, w = randn(random, rows, inner, dtype=dtype), randn(random, out, inner, dtype=dtype)
    x[0, : inner // 2], w[0] = 0, 0  # groups of zeros, and rows of them
    matrix = Int8Matrix.of(w)
    values, scales = by_hand(w.float().numpy())
    assert np.array_equal(matrix.values.numpy(), values)
    assert np.array_equal(matrix.scales.numpy(), scales[:, ::128].astype(np.float32))

    exact, terms = exact_product(x, w)
    assert ((multiply(x, matrix).double() - exact).abs() <= ROUNDINGS * (2 + inner // 128) * terms + 1e-30).all()
    assert (exact - x.double() @ w.double().T).abs().max() < 0.02 * inner**0.5 * 4  # and it is a product


def test_rows_of_an_int8_matrix_share_its_memory_and_are_what_their_numbers_give() -> None:
    w = randn(np.random.default_rng(0), 50, 300, dtype="bfloat16")
    matrix, some = Int8Matrix.of(w), Int8Matrix.of(w[7:19])
    rows = matrix.rows(7, 19)
    assert torch.equal(rows.values, some.values)
    assert torch.equal(rows.scales, some.scales)
    assert rows.values.data_ptr() == matrix.values[7].data_ptr()
    assert (matrix.shape, rows.shape) == ((50, 300), (12, 300))
    assert matrix.nbytes == 50 * (300 + 3 * 4)


def linear(
    random: np.random.Generator, rows: int, out: int, inner: int, dtype: str, epilogue: str, bias: bool
) -> tuple[TaskGraph, dict[str, Tensor]]:
    """One linear, cut into tasks anywhere."""
    memory = {
        "x": randn(random, rows, inner, dtype=dtype), "w": randn(random, out, inner, dtype=dtype),
        "bias": randn(random, out, dtype=dtype), "other": randn(random, rows, out, dtype=dtype),
        "y": torch.full((rows, out), torch.nan, dtype=getattr(torch, dtype)),
    }  # fmt: skip
    graph = GraphBuilder("linear")
    tiles = {name: graph.bound(name, dtype, *tensor.shape) for name, tensor in memory.items()}
    for begin, end in cut(random, rows):
        for left, right in cut(random, out):
            args = [(Tag.INPUT, tiles["x"][begin:end]), (Tag.INPUT, tiles["w"][left:right])]
            args += [(Tag.INPUT, tiles["bias"][left:right])] if bias else []
            args += [(Tag.INPUT, tiles["other"][begin:end, left:right])] if epilogue in ("mul", "add") else []
            args += [(Tag.OUTPUT, tiles["y"][begin:end, left:right])]
            graph.submit("linear", *args, epilogue=epilogue, bias=int(bias), first_token=begin)
    return graph.build(), memory


def counted(rows: int) -> Callable[[Any], None]:
    def fill(window: Any) -> None:
        window.count = rows

    return fill


@pytest.mark.guarantee("K41")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@MANY
@given(
    seed=SEEDS, rows=st.integers(1, 40), out=st.integers(1, 200), fours=st.integers(1, 130),
    epilogue=st.sampled_from(EPILOGUES), bias=st.booleans(), threads=st.integers(1, 3),
)  # fmt: skip
def test_a_native_int8_linear_is_torchs_within_its_roundings(
    isa: str, dtype: str, seed: int, rows: int, out: int, fours: int, epilogue: str, bias: bool, threads: int
) -> None:
    random, inner = np.random.default_rng(seed), 4 * fours
    graph, memory = linear(random, rows, out, inner, dtype, epilogue, bias)
    memory["x"][0, : inner // 2], memory["w"][0] = 0, 0
    fill = counted(rows)
    ours = run_native(isa, graph, memory, fill, matrices=["w"], weights="int8", threads=threads)["y"].double()
    theirs = run_torch(graph, memory, fill, matrices=["w"], weights="int8", tokens=rows)["y"].double()

    _, terms = exact_product(memory["x"], memory["w"])
    other = memory["other"].double().abs() if epilogue == "mul" else torch.ones(rows, out)
    terms += memory["bias"].double().abs() if bias else 0
    terms = terms * other + (memory["other"].double().abs() if epilogue == "add" else 0)
    last_bit = 2.0**-7 if dtype == "bfloat16" else 2.0**-23  # the sums may fall on both sides of a rounding
    assert ((ours - theirs).abs() <= ROUNDINGS * (4 + inner // 128) * terms + last_bit * theirs.abs()).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "w"])
def test_a_number_that_is_none_is_not_rounded_away(engine: str, dtype: str, bad: float, where: str) -> None:
    graph, memory = linear(np.random.default_rng(3), 5, 70, 260, dtype, "none", bias=False)
    memory[where][2, 255] = bad
    if engine == "none":
        y = run_torch(graph, memory, counted(5), matrices=["w"], weights="int8", tokens=5)["y"]
    else:
        y = run_native(engine, graph, memory, counted(5), matrices=["w"], weights="int8")["y"]
    expected = torch.zeros(5, 70, dtype=torch.bool)
    (expected if where == "x" else expected.T)[2] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_an_int8_linear_has_the_same_bits_in_any_batch_and_tiles(engine: str, dtype: str) -> None:
    random = np.random.default_rng(5)
    graph, memory = linear(random, 33, 130, 388, dtype, "silu", bias=True)

    def run(graph: TaskGraph, memory: dict[str, Tensor], rows: int) -> Tensor:
        if engine == "none":
            return run_torch(graph, memory, counted(rows), matrices=["w"], weights="int8", tokens=rows)["y"]
        return run_native(engine, graph, memory, counted(rows), matrices=["w"], weights="int8", threads=2)["y"]

    together = run(graph, memory, 33)
    for rows in (1, 2, 7, 16):
        begin = int(random.integers(33 - rows))
        part = {
            name: value[begin : begin + rows].clone() for name, value in memory.items() if name in ("x", "other", "y")
        }
        fewer, _ = linear(random, rows, 130, 388, dtype, "silu", bias=True)
        assert same_bits(run(fewer, {**memory, **part}, rows), together[begin : begin + rows])


def test_both_engines_cut_inputs_into_the_same_groups() -> None:
    assert library is None or library.GROUP == INT8_GROUP


# Models


@pytest.mark.guarantee("K42")
def test_what_matrices_are_kept_in_is_part_of_a_programs_identity(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.from_directory(checkpoint("tied"))
    plain, small = (ModelPrograms.build(spec, LIMITS, weights=weights) for weights in ("", "int8"))
    for one, other in zip(plain.programs, small.programs, strict=True):
        assert one.digest != other.digest
    assert [tensor.weights for tensor in small.tensors] == ["int8", "", "", "", "", "", ""]


@pytest.mark.parametrize("weights", ["int4", "bfloat16"])
def test_a_chip_refuses_weights_it_does_not_know(weights: str, checkpoint: Callable[[str], Path]) -> None:
    for device in ("null:0", "cpu:0"):
        chip = open_chip(device, 1)
        with pytest.raises(InvalidArgs, match=f"weights is '{weights}'; expected 'int8'"):
            chip.alloc(TensorSpec(1, "bfloat16", (), str(checkpoint("tied")), weights=weights))
        with pytest.raises(InvalidArgs, match="without a source"):
            chip.alloc(TensorSpec(1, "bfloat16", (2, 2), weights="int8"))
        chip.close()


def logits_of(model: RunningModel, prompts: Sequence[Sequence[int]], chunk: int, order: Sequence[int]) -> Tensor:
    """After each of the prompts, all in one batch, cut into chunks, on pages and in rows in the given order."""
    for begin in range(0, max(map(len, prompts)), chunk):
        prefills = [
            PrefillRow(
                tokens=np.array(prompts[at][begin : begin + chunk], np.int32), start=begin, row=at,
                block_table=np.arange(10 * at, 10 * at + 10, dtype=np.int32)[::-1].copy(),
            )
            for at in order if begin < len(prompts[at])
        ]  # fmt: skip
        model.step(prefills)
    model.step((), (), [SampleRow(row=at) for at in order])
    logits: Tensor = model.chip.tensor(model.programs.tensors[-1].resident)  # type: ignore[attr-defined]
    return logits[: len(prompts)].clone()


@pytest.mark.slow
@pytest.mark.guarantee("K43")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["untied-sharded-odd-vocabulary", "bias-no-groups"])
def test_logits_of_int8_weights_are_bit_equal_in_any_batch_and_close_to_those_of_the_dtype(
    engine: str, dtype: str, shape: str, checkpoint: Callable[[str], Path]
) -> None:
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 500, length).tolist() for length in (1, 70, 33, 130)]

    def run(weights: str, chunk: int = 200, order: Sequence[int] = range(4), tiling: Tiling = COARSE) -> Tensor:
        model = RunningModel(checkpoint(shape), dtype, chip=CpuChip(1, isa=engine), weights=weights, tiling=tiling)
        assert model.chip.engine.startswith("native") == (engine != "none")
        found = logits_of(model, prompts, chunk, order)
        model.chip.close()
        return found

    together = run("int8")
    assert torch.equal(run("int8", chunk=24, order=[2, 0, 3, 1]), together)
    assert torch.equal(run("int8", tiling=Tiling(tokens=24, columns=20, head_columns=100)), together)
    for at in range(4):
        assert torch.equal(run("int8", order=[at])[at], together[at])
    plain = run("")
    assert 0.001 < (together - plain).norm() / plain.norm() < 0.1


@NEEDS_NATIVE
def test_a_model_native_kernels_do_not_take_in_int8_is_computed_by_torch_and_that_is_said(tmp_path: Path) -> None:
    odd = tiny_checkpoint(tmp_path, intermediate=90, tokenizer=False)
    chip, torchs = CpuChip(1), CpuChip(1, isa="none")
    one, other = (RunningModel(odd, "bfloat16", chip=each, weights="int8") for each in (chip, torchs))
    assert chip.engine == "torch: intermediate_size is 90; the kernels take multiples of 4"
    assert torchs.engine == "torch, as asked"
    assert one.greedy([[1, 2, 3]], 3) == other.greedy([[1, 2, 3]], 3)
    assert CpuChip(1).engine.startswith("native, ")
    RunningModel(odd, "bfloat16", chip=(plain := CpuChip(1)))
    assert plain.engine.startswith("native, ")  # in bf16 they take it
