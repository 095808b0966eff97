"""A step as dispatches and back: programs identified by what they are, arguments in the order of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec
import numpy as np
import pytest
from kernel_runs import LIMITS, table

from chipbus.errors import ConfigError, KernelError
from chipbus.kernels.dispatch import Arg, Completion, Dispatch
from chipbus.kernels.program import Program
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import (
    SAMPLE_COLUMNS,
    DecodeRow,
    Limits,
    ModelPrograms,
    PrefillRow,
    SampledToken,
    SampleRow,
    StepInput,
    build_step,
    read_step,
)


@pytest.fixture
def programs(checkpoint: Callable[[str], Path]) -> ModelPrograms:
    return ModelPrograms.build(ModelSpec.from_directory(checkpoint("tied")), LIMITS)


STEP = StepInput(
    step_id=4,
    prefills=(
        PrefillRow(tokens=np.array([5, 6, 7], np.int32), start=16, block_table=table(2, 9), row=1),
        PrefillRow(tokens=np.array([8], np.int32), start=0, block_table=table(3), row=-1),
    ),
    decodes=(DecodeRow(token=9, position=40, block_table=table(4, 5, 6), row=0),),
    samples=(
        SampleRow(row=1, history=np.array([1, 2], np.int32), prompt_tokens=1, top_k=4, logprobs=2),
        SampleRow(row=0, temperature=0.5, uniform=0.25, banned=np.array([3], np.int32)),
    ),
)


def by_name(programs: ModelPrograms, dispatch: Dispatch) -> dict[str, Arg]:
    program = next(program for program in programs.programs if program.digest == dispatch.program)
    return {param.name: arg for param, arg in zip(program.params, dispatch.args, strict=True)}


def test_a_step_is_launched_in_order_with_its_ids(programs: ModelPrograms) -> None:
    dispatches = build_step(programs, STEP, 11)
    expected = [programs.prefill, programs.decode, programs.final_norm, programs.lm_head, programs.sample]
    assert [dispatch.program for dispatch in dispatches] == [program.digest for program in expected]
    assert [dispatch.dispatch_id for dispatch in dispatches] == [11, 12, 13, 14, 15]
    assert {dispatch.step_id for dispatch in dispatches} == {4}
    prefill, decode, norm, _, sample = (by_name(programs, dispatch) for dispatch in dispatches)
    assert prefill["tokens"].numpy().tolist() == [5, 6, 7, 8]
    assert prefill["starts"].numpy().tolist() == [16, 0]
    assert prefill["lengths"].numpy().tolist() == [3, 1]
    assert prefill["block_tables"].numpy().tolist() == [[2, 9], [3, -1]]
    assert prefill["rows"].numpy().tolist() == [1, -1]
    assert decode["positions"].numpy().tolist() == [40]
    assert norm["rows"].numpy().tolist() == [1, 0]
    settings = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in sample["settings"].numpy().tolist()]
    assert settings[0]["logprobs"] == 2
    assert settings[1]["logprobs"] == -1
    assert settings[1]["uniform"] == 0.25
    assert sample["history_ends"].numpy().tolist() == [2, 2]
    assert sample["banned"].numpy().tolist() == [3]
    assert sample["banned_ends"].numpy().tolist() == [0, 1]
    assert sample["top_ids"].shape == (2, 2)


def test_absent_parts_are_left_out(programs: ModelPrograms) -> None:
    (only,) = build_step(programs, StepInput(step_id=1, decodes=STEP.decodes), 1)
    assert only.program == programs.decode.digest
    assert read_step(StepInput(step_id=1, decodes=STEP.decodes), [Completion(dispatch_id=1)]) == ()
    assert build_step(programs, StepInput(step_id=1), 1) == ()


def test_tokens_are_read_back_in_the_order_of_the_samples() -> None:
    outputs = (
        np.array([7, 8], np.int32), np.array([-0.5, np.nan], np.float32),
        np.array([[7, 1], [0, 0]], np.int32), np.array([[-0.5, -1.5], [-np.inf, -np.inf]], np.float32),
    )  # fmt: skip
    done = Completion(dispatch_id=5, outputs=tuple(Arg.of(output) for output in outputs))
    assert read_step(STEP, [Completion(dispatch_id=4), done]) == (
        SampledToken(7, -0.5, (7, 1), (-0.5, -1.5)),
        SampledToken(8),
    )
    with pytest.raises(KernelError, match="step 4: the last completion carries outputs of shapes \\[\\]"):
        read_step(STEP, [Completion(dispatch_id=4)])


@pytest.mark.guarantee("K15")
def test_programs_are_identified_by_what_they_are(checkpoint: Callable[[str], Path], programs: ModelPrograms) -> None:
    again = ModelPrograms.build(ModelSpec.from_directory(checkpoint("tied")), LIMITS)
    assert [program.digest for program in again.programs] == [program.digest for program in programs.programs]
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(programs.decode), type=Program)
    assert travelled.digest == programs.decode.digest
    others = [
        ModelPrograms.build(ModelSpec.from_directory(checkpoint("tied"), "float32"), LIMITS),
        ModelPrograms.build(ModelSpec.from_directory(checkpoint("wide-heads")), LIMITS),
        ModelPrograms.build(programs.spec, attrs.evolve(LIMITS, page_size=32)),
    ]
    digests = {program.digest for built in (programs, *others) for program in built.programs}
    assert len(digests) == 5 * 4


def test_residents_are_what_the_programs_share(programs: ModelPrograms) -> None:
    weights, k_cache, v_cache, hidden, normed, chosen, logits = programs.tensors
    assert weights.source == programs.spec.path
    assert weights.fingerprint == programs.spec.fingerprint
    assert k_cache.shape == v_cache.shape == (2, 2, 256, 16, 32)
    assert hidden.shape == normed.shape == (40, 64)
    assert (logits.shape, logits.dtype) == ((40, 515), "float32")
    assert (chosen.shape, chosen.dtype) == ((40,), "int32")
    assert len({tensor.resident for tensor in programs.tensors}) == 7


def test_limits_must_be_positive_integers() -> None:
    with pytest.raises(ConfigError, match="page_size is 0; it must be an integer of at least 1"):
        Limits(1, 1, 1, 0, 1)
    with pytest.raises(ConfigError, match=r"num_pages is 1\.5"):
        Limits(1, 1, 1, 1, 1.5)  # type: ignore[arg-type]
    assert Limits(1, 1, 33, 16, 9).pages_per_sequence == 3
