"""What every chip refuses and keeps: the same table for the cpu chip and the null chip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from kernel_runs import LIMITS, RunningModel, table

from chipbus.errors import (
    CheckpointError,
    ConfigError,
    KernelError,
    MemoryExhausted,
    UnknownProgram,
    WrongArity,
)
from chipbus.kernels.chips import Chip, open_chip
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.dispatch import Arg, Dispatch
from chipbus.kernels.null import NullChip
from chipbus.kernels.program import TensorSpec
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import (
    DecodeRow,
    ModelPrograms,
    PrefillRow,
    SampleRow,
    StepInput,
    build_step,
    chosen_token,
)

K_CACHE, HIDDEN, LOGITS = 2, 4, 6


@pytest.fixture(params=["cpu", "null"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Iterator[RunningModel]:
    """A model on each kind of chip."""
    running = RunningModel(checkpoint("tied"), chip=open_chip(f"{request.param}:0", 1))
    yield running
    running.chip.close()


def ints(*values: int) -> Arg:
    return Arg.of(np.array(values, np.int32))


def decode_dispatch(model: RunningModel, **changes: Arg) -> Dispatch:
    """A correct decode of one row, some arguments replaced."""
    row = DecodeRow(token=7, position=0, block_table=table(0, 1), row=0)
    (dispatch,) = build_step(model.programs, StepInput(step_id=1, decodes=(row,)), 9)
    names = [param.name for param in model.programs.decode.params]
    args = [changes.get(name, arg) for name, arg in zip(names, dispatch.args, strict=True)]
    return attrs.evolve(dispatch, args=tuple(args))


REFUSED: list[tuple[dict[str, Arg], str]] = [
    ({"tokens": Arg.of(np.array([7.0], np.float32))}, "argument 4 (tokens): dtype is float32; expected int32"),
    ({"tokens": ints(7, 8)}, "argument 5 (positions): shape is [1]; expected ['B'] with {'B': 2}"),
    ({"tokens": Arg.of(np.array([[7]], np.int32))}, "argument 4 (tokens): shape is [1, 1]; expected ['B']"),
    ({"tokens": Arg.out("int32", (1,))}, "argument 4 (tokens): 0 bytes given; expected 4 for int32 [1]"),
    ({"tokens": Arg(resident=4)}, "argument 4 (tokens): dtype is absent; expected int32"),
    ({"tokens": Arg(resident=4, dtype="int32", shape=(1,))}, "(tokens): resident 4 given; expected an array by value"),
    ({"hidden": ints(7)}, "argument 3 (hidden): given by value; expected a resident tensor"),
    ({"hidden": Arg(resident=99)}, "argument 3 (hidden): resident 99 is unknown or was freed"),
    ({"hidden": Arg(resident=1)}, "argument 3 (hidden): resident 1 is weights of"),
    ({"hidden": Arg(resident=6)}, "argument 3 (hidden): shape is [40, 515]; expected [40, 64]"),
    ({"weights": Arg(resident=4)}, "argument 0 (weights): resident 4 is float32 [40, 64]; expected weights"),
    ({"tokens": ints(515)}, "token id 515 is outside the vocabulary of 515"),
    ({"tokens": ints(-41)}, "a token is the one chosen for row 40; rows are 0 to 39"),
    ({"positions": ints(1024)}, "rows cover positions 1024 to 1024; the context has 1024"),
    ({"positions": ints(2**31 - 1)}, "rows cover positions 2147483647 to 2147483647"),
    ({"positions": ints(-1)}, "rows cover positions -1 to -1"),
    ({"positions": ints(32)}, "block tables must name a page below 256 for each of a row's [3] pages"),
    ({"block_tables": Arg.of(np.array([[256]], np.int32))}, "block tables must name a page below 256"),
    ({"block_tables": Arg.of(np.array([[-1]], np.int32))}, "block tables must name a page below 256"),
    ({"rows": ints(40)}, "output rows [40] must be -1 to 39"),
    ({"rows": ints(-2)}, "output rows [-2] must be -1 to 39"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence[:50] for _, sentence in REFUSED])
@pytest.mark.guarantee("K11")
def test_a_wrong_argument_is_refused_by_name_and_changes_nothing(
    model: RunningModel, changes: dict[str, Arg], sentence: str
) -> None:
    with pytest.raises(KernelError) as caught:
        model.chip.launch(decode_dispatch(model, **changes))
    assert sentence in str(caught.value)
    assert "dispatch 9 of decode" in str(caught.value)
    assert not np.any(model.chip.copy_from(K_CACHE).numpy())
    model.chip.launch(decode_dispatch(model))


def test_rows_that_share_a_slot_or_an_output_are_refused(model: RunningModel) -> None:
    def rows(*pairs: tuple[int, int]) -> list[PrefillRow]:
        return [
            PrefillRow(tokens=np.ones(3, np.int32), start=0, block_table=table(page), row=row) for page, row in pairs
        ]

    with pytest.raises(KernelError, match="two tokens are written to one cache slot"):
        model.step(rows((5, 0), (5, 1)))
    with pytest.raises(KernelError, match="two rows share an output row in \\[1, 1\\]"):
        model.step(rows((5, 1), (6, 1)))
    model.step(rows((5, -1), (6, -1), (7, 0)))


def test_rows_of_later_programs_are_checked(model: RunningModel) -> None:
    norm = model.programs.final_norm
    for rows, sentence in (
        (ints(), "must be one or more of 0 to 39"),
        (ints(40), "must be one or more of 0 to 39"),
        (ints(3, 3), "rows \\[3, 3\\] must be distinct"),
    ):
        args = (Arg(resident=1), Arg(resident=HIDDEN), Arg(resident=5), rows)
        with pytest.raises(KernelError, match=sentence):
            model.chip.launch(Dispatch(dispatch_id=1, step_id=1, program=norm.digest, args=args))


def test_ragged_ids_must_fit_their_ends_and_the_vocabulary(model: RunningModel) -> None:
    model.step([PrefillRow(tokens=np.ones(3, np.int32), start=0, block_table=table(0), row=0)])
    step = StepInput(step_id=1, samples=(SampleRow(row=0, history=np.array([1, 2], np.int32), banned=np.array([515])),))
    dispatches = build_step(model.programs, step, 1)
    for dispatch in dispatches[:2]:
        model.chip.launch(dispatch)
    with pytest.raises(KernelError, match="banned holds token id 515, outside the vocabulary of 515"):
        model.chip.launch(dispatches[2])
    args = list(dispatches[2].args)
    for ends in (ints(3), ints(-1)):
        args[4] = ends
        with pytest.raises(KernelError, match=r"history_ends .* do not divide 2 ids into rows"):
            model.chip.launch(attrs.evolve(dispatches[2], args=tuple(args)))


def test_more_tokens_than_the_limits_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = RunningModel(checkpoint("tied"), limits=attrs.evolve(LIMITS, max_num_seqs=2, max_num_batched_tokens=8))
    with pytest.raises(KernelError, match="9 tokens; max_num_batched_tokens is 8"):
        model.step([PrefillRow(tokens=np.ones(9, np.int32), start=0, block_table=table(0), row=0)])


def test_lengths_must_divide_the_tokens(model: RunningModel) -> None:
    row = PrefillRow(tokens=np.ones(3, np.int32), start=0, block_table=table(0), row=0)
    (dispatch,) = build_step(model.programs, StepInput(step_id=1, prefills=(row,)), 1)
    args = list(dispatch.args)
    for lengths in (ints(2), ints(0), ints(4)):
        args[6] = lengths
        with pytest.raises(KernelError, match="do not divide 3 tokens into rows"):
            model.chip.launch(attrs.evolve(dispatch, args=tuple(args)))


def test_arity_and_unknown_programs_are_refused(model: RunningModel) -> None:
    dispatch = decode_dispatch(model)
    with pytest.raises(WrongArity, match=r"dispatch 9 of decode: 8 arguments given; expected 9"):
        model.chip.launch(attrs.evolve(dispatch, args=dispatch.args[:-1]))
    with pytest.raises(UnknownProgram, match=r"dispatch 9: program 0{12} is not registered; registered: prefill"):
        model.chip.launch(attrs.evolve(dispatch, program=bytes(32)))
    with pytest.raises(KernelError, match=r"program decode is of kind 'llama\.decode'; known are qwen3\.decode"):
        model.chip.register(attrs.evolve(model.programs.decode, kind="llama.decode"))
    model.chip.register(model.programs.decode)  # again is harmless


@pytest.mark.guarantee("K12")
def test_residents_are_checked_when_allocated_copied_and_freed(model: RunningModel) -> None:
    chip = model.chip

    def refused(call: Callable[[], object], sentence: str) -> None:
        with pytest.raises(KernelError) as caught:
            call()
        assert sentence in str(caught.value)

    refused(
        lambda: chip.alloc(TensorSpec(HIDDEN, "float32", (2,))), "resident 4 is allocated already, as float32 [40, 64]"
    )
    refused(lambda: chip.alloc(TensorSpec(0, "float32", (2,))), "resident 0: ids are integers above 0")
    refused(lambda: chip.alloc(TensorSpec(9, "float8", (2,))), "resident 9: dtype is 'float8'; expected one of")
    refused(lambda: chip.alloc(TensorSpec(9, "float32", (-2,))), "resident 9: shape is [-2]; extents are at least 0")
    held = chip.resident_bytes
    chip.alloc(TensorSpec(9, "bfloat16", (3, 4)))
    assert chip.resident_bytes == held + 24
    value = Arg(dtype="bfloat16", shape=(3, 4), data=bytes(range(24)))
    assert chip.copy_from(9).data == bytes(24)
    chip.copy_to(9, value)
    assert chip.copy_from(9) == value
    refused(lambda: chip.copy_to(9, ints(1)), "copy to resident 9: value is int32 [1]; expected bfloat16 [3, 4]")
    refused(
        lambda: chip.copy_to(9, Arg(resident=4)), "copy to resident 9: value is resident 4; expected bfloat16 [3, 4]"
    )
    refused(lambda: chip.copy_to(9, attrs.evolve(value, data=b"")), "0 bytes given; expected 24 for bfloat16 [3, 4]")
    refused(lambda: chip.copy_from(1), "resident 1 is a set of weights; it cannot be copied")
    chip.free(9)
    assert chip.resident_bytes == held
    for call in (lambda: chip.free(9), lambda: chip.copy_from(9), lambda: chip.copy_to(9, value)):
        refused(call, "resident 9 is unknown or was freed; allocated: 1, 2, 3, 4, 5, 6")


def test_a_closed_chip_refuses_every_verb_and_closing_again_is_harmless(model: RunningModel) -> None:
    dispatch = decode_dispatch(model)
    chip = model.chip
    chip.close()
    chip.close()
    assert chip.resident_bytes == 0
    for call in (
        lambda: chip.register(model.programs.decode),
        lambda: chip.alloc(TensorSpec(1, "int32", (1,))),
        lambda: chip.free(1),
        lambda: chip.copy_from(1),
        lambda: chip.copy_to(1, ints(1)),
        lambda: chip.launch(dispatch),
    ):
        with pytest.raises(KernelError, match="the chip is closed"):
            call()


def scenario(model: RunningModel) -> None:
    """Prefill in chunks, mixed with decode, then sampling of two rows."""
    model.digest = True
    model.step([PrefillRow(tokens=np.arange(5, dtype=np.int32), start=0, block_table=table(20), row=-1)])
    model.step(
        [PrefillRow(tokens=np.arange(70, dtype=np.int32), start=0, block_table=np.arange(5, dtype=np.int32), row=0)]
    )
    model.step(
        [PrefillRow(tokens=np.arange(30, 50, dtype=np.int32), start=0, block_table=table(9, 7), row=1)],
        [DecodeRow(token=3, position=70, block_table=np.arange(5, dtype=np.int32), row=0)],
        [SampleRow(row=0, logprobs=3), SampleRow(row=1, temperature=1.0, uniform=0.3)],
    )


@pytest.mark.guarantee("R67")
def test_a_token_that_is_not_known_yet_is_the_one_chosen_last_for_its_row(
    model: RunningModel, checkpoint: Callable[[str], Path]
) -> None:
    def run(running: RunningModel, *, is_known: bool) -> list[object]:
        tables = [table(2 * row, 2 * row + 1) for row in range(3)]
        prompts = [np.arange(20 + row, 27 + row, dtype=np.int32) for row in range(3)]
        at = (5, 1, 3)
        samples = [SampleRow(row=row, temperature=1.0, uniform=0.15 * row, logprobs=2) for row in at]
        rows = [
            PrefillRow(tokens=ids, start=0, block_table=pages, row=row)
            for row, ids, pages in zip(at, prompts, tables, strict=True)
        ]
        chosen = running.step(rows, [], samples)
        other = running.step([PrefillRow(tokens=prompts[0], start=0, block_table=table(9), row=1)])  # chooses nothing
        assert other == ()
        tokens = [token.token_id if is_known else chosen_token(row) for row, token in zip(at, chosen, strict=True)]
        decodes = [
            DecodeRow(token=tokens[n], position=7, block_table=tables[n], row=at[n - 1])  # another row than before
            for n in range(3)
        ]
        return [chosen, running.step([], decodes, samples)]

    fresh = RunningModel(checkpoint("tied"), chip=CpuChip(1) if isinstance(model.chip, CpuChip) else NullChip())
    assert run(model, is_known=False) == run(fresh, is_known=True)


@pytest.mark.guarantee("K13")
def test_digests_are_equal_for_equal_dispatches_and_count_the_written_parameters(
    model: RunningModel, checkpoint: Callable[[str], Path]
) -> None:
    scenario(model)
    fresh = RunningModel(checkpoint("tied"), chip=CpuChip(1) if isinstance(model.chip, CpuChip) else NullChip())
    for dispatch, before in zip(model.dispatches, model.completions, strict=True):
        again = fresh.chip.launch(dispatch, digest=True)
        assert again.digests == before.digests
        assert again.outputs == before.outputs
    assert [len(completion.digests) for completion in model.completions] == [3, 3, 3, 3, 1, 1, 5]
    assert all(len(digest) == 16 for completion in model.completions for digest in completion.digests)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_digest_covers_the_rows_of_the_dispatch_and_nothing_else(
    dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    digests = []
    for other in (False, True):
        model = RunningModel(checkpoint("tied"), dtype)
        if other:  # something else is in the cache: the digest does not see it
            model.step([PrefillRow(tokens=np.ones(9, np.int32), start=0, block_table=table(3), row=2)])
        model.digest = True
        model.step([PrefillRow(tokens=np.arange(20, dtype=np.int32), start=0, block_table=table(8, 6), row=0)])
        digests.append(model.completions[-1].digests)
        slots = [*range(8 * 16, 9 * 16), *range(6 * 16, 6 * 16 + 4)]
        raw = np.frombuffer(model.chip.copy_from(K_CACHE).data, np.uint8)
        cache = raw.reshape(2, 2, LIMITS.num_pages * LIMITS.page_size, -1)
        written = np.ascontiguousarray(cache[:, :, slots])
        assert digests[-1][0] == hashlib.blake2b(written.tobytes(), digest_size=16).digest()
    assert digests[0] == digests[1]


def test_no_digests_are_computed_unasked(model: RunningModel) -> None:
    model.step([PrefillRow(tokens=np.ones(3, np.int32), start=0, block_table=table(0), row=0)])
    assert model.completions[0].digests == ()


def test_a_freed_resident_leaves_no_graph_behind(checkpoint: Callable[[str], Path]) -> None:
    chip = CpuChip(1)
    model = RunningModel(checkpoint("tied"), chip=chip)
    prompts = [[5, 6, 7]]
    before = model.greedy(prompts, 3)
    assert chip.num_graphs > 0
    for tensor in model.programs.tensors:
        chip.free(tensor.resident)
    assert chip.num_graphs == 0
    assert chip.resident_bytes == 0
    with pytest.raises(KernelError, match="resident 1 is unknown or was freed"):
        model.step([PrefillRow(tokens=np.ones(3, np.int32), start=0, block_table=table(0), row=0)])
    for tensor in model.programs.tensors:
        chip.alloc(tensor)
    assert model.greedy(prompts, 3) == before


def test_weights_report_progress_and_their_memory(checkpoint: Callable[[str], Path]) -> None:
    reports: list[tuple[float, float]] = []
    spec = ModelSpec.from_directory(checkpoint("untied-sharded-odd-vocabulary"), "bfloat16")
    chip = CpuChip(1)
    chip.alloc(ModelPrograms.build(spec, LIMITS).tensors[0], lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports)
    assert len(reports) > 5
    assert reports[-1] == (spec.weights_bytes, spec.weights_bytes)
    assert chip.resident_bytes == spec.weights_bytes


@pytest.mark.guarantee("S28")
@pytest.mark.parametrize("make", [lambda: CpuChip(2), lambda: CpuChip(1, isa="none"), NullChip])
def test_progress_changes_with_every_task_that_ends(
    make: Callable[[], Chip], checkpoint: Callable[[str], Path]
) -> None:
    chip = make()
    model = RunningModel(checkpoint("tied"), chip=chip)
    loaded = chip.progress
    completion = chip.launch(decode_dispatch(model))

    assert chip.progress - loaded >= max(1, completion.usage.tasks if completion.usage else 1)
    assert loaded > 0 or isinstance(chip, NullChip)
    chip.close()
    assert chip.progress >= 0


@pytest.mark.guarantee("K14")
def test_weights_of_another_checkpoint_are_refused(checkpoint: Callable[[str], Path]) -> None:
    weights = ModelPrograms.build(ModelSpec.from_directory(checkpoint("tied")), LIMITS).tensors[0]
    chip = CpuChip(1)
    with pytest.raises(CheckpointError, match="its files are not those the programs were made for"):
        chip.alloc(attrs.evolve(weights, source=str(checkpoint("wide-heads"))))
    assert chip.resident_bytes == 0
    chip.alloc(weights)


def test_a_tensor_larger_than_the_machine_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        MemoryExhausted, match="resident 1 of float32 \\[1000000000000000\\] needs 4,000,000,000,000,000 bytes"
    ):
        CpuChip(1).alloc(TensorSpec(1, "float32", (10**15,)))


@pytest.mark.parametrize("device", ["cpu", "cpu:", "cpu:x", "tpu:0", ":0", "cpu:-1"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'; it must be one of cpu, cuda, null, a colon"):
        open_chip(device, 1)


def test_a_chip_needs_a_thread() -> None:
    with pytest.raises(ConfigError, match="threads is 0; a chip computes with at least 1"):
        open_chip("cpu:0", 0)


def test_a_cpu_chip_sets_the_threads_it_was_given() -> None:
    chip: Chip = open_chip("cpu:3", 2)
    assert torch.get_num_threads() == 2
    chip.close()


def test_bfloat16_arguments_widen_exactly() -> None:
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    arg = Arg(dtype="bfloat16", shape=(3, 5), data=tensor.view(torch.uint8).numpy().tobytes())
    assert np.array_equal(arg.numpy(), tensor.float().numpy())
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    given: Any = Arg.of(array.T)
    assert np.array_equal(given.numpy(), array.T)
