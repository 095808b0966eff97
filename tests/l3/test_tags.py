"""Tags of arguments: they follow the direction of the parameter, whatever kind of tensor is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from l3_local import LocalWorker

from chipbus.kernels import Direction, Param, Program
from chipbus.kernels.graph import Tag

TAGS = {Direction.IN: Tag.INPUT, Direction.OUT: Tag.OUTPUT_EXISTING, Direction.INOUT: Tag.INOUT}


@pytest.mark.parametrize("kind", ["host", "resident", "stacked", "deferred"])
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.guarantee("D15")
def test_the_tag_of_an_argument_follows_its_direction_wherever_the_tensor_is(direction: Direction, kind: str) -> None:
    program = Program("touch", "test.bump", (), (Param("x", "float32", ("N",), direction, resident=None),))
    worker = LocalWorker(program)
    tensors: dict[str, Any] = {
        "host": np.zeros(4, np.float32),
        "resident": worker.alloc_tensor((4,), "float32"),
        "stacked": worker.alloc_stacked_tensor(np.zeros((1, 4), np.float32), [0]),
    }

    def touch(orch: Any) -> None:
        tensor = orch.deferred("d", (4,), "float32", worker=0) if kind == "deferred" else tensors[kind]
        orch.submit_next_level(program, tensor, worker=0)
        orch.submit_next_level(program, orch.no_dep(tensor), worker=0)

    handle = worker.submit(touch)
    assert handle.wait()

    tags = [[operand.tag for operand in task.operands] for task in handle.graph().tasks]
    assert tags == [[TAGS[direction]], []]
