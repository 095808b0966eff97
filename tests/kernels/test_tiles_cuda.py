"""The cuda chip: refused with a sentence where there is no GPU, the same numbers as the cpu chip where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tile_programs as programs
import torch

from chipbus.errors import ConfigError, CoreException, InvalidArgs
from chipbus.kernels.chips import open_chip
from chipbus.kernels.dispatch import Arg, Completion, Dispatch, LaunchConfig
from chipbus.kernels.golden import golden
from chipbus.kernels.program import Program, TensorSpec
from chipbus.kernels.tiles import TileProgram

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def launch(chip: Any, made: TileProgram, *args: Arg, config: LaunchConfig | None = None) -> Completion:
    chip.register(made.program)
    dispatch = Dispatch(dispatch_id=3, step_id=1, program=made.program.digest, args=args, config=config)
    completion: Completion = chip.launch(dispatch, digest=True)
    return completion


@pytest.mark.guarantee("P14")
def test_a_gpu_that_is_not_there_is_refused_with_a_sentence() -> None:
    index = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(ConfigError, match=rf"device is 'cuda:{index}'; torch sees (no GPU|\d+ GPUs?) here"):
        open_chip(f"cuda:{index}", 1)


@needs_gpu
def test_programs_give_the_numbers_of_the_cpu_chip() -> None:
    for device in ("cpu:0", "cuda:0"):
        golden(programs.layered, lambda x: 7 * x, [(5, 7), (2, 3), (0, 3)], device=device)
        golden(programs.staged, lambda x: 6 * x, [(5, 7)], device=device)


@needs_gpu
def test_residents_times_and_errors_are_those_of_any_chip() -> None:
    chip = open_chip("cuda:0", 1)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    chip.alloc(TensorSpec(1, "float32", (2, 3)))
    chip.copy_to(1, Arg.of(x))
    completion = launch(
        chip, programs.whole, Arg(resident=1), Arg.out("float32", (2, 3)), config=LaunchConfig(timeline=True)
    )
    assert np.array_equal(completion.outputs[0].numpy(), 3 * x)
    assert len(completion.task_times) == 16
    with pytest.raises(CoreException, match="task 1 of boom"):
        launch(chip, programs.boom, Arg(resident=1), Arg.out("float32", (2, 3)))
    with pytest.raises(InvalidArgs, match=r"is of kind 'qwen3\.decode'; known are tile"):
        chip.register(Program("decode", "qwen3.decode", (), ()))
    chip.close()
