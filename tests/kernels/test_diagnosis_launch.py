"""What a chip says about a launch becomes a run: graph, times and rings of what really happened on it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import numpy as np
import pytest

from chipbus.errors import ConfigError
from chipbus.kernels import Arg, Dispatch, open_chip
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.diagnosis import Reason, RunGraph, find_races, run_of_capture, run_of_launch
from chipbus.kernels.dispatch import LaunchConfig
from chipbus.kernels.graph import TaskGraph
from chipbus.kernels.qwen3 import graphs
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import Limits, ModelPrograms, PrefillRow, StepInput, build_step
from chipbus.kernels.qwen3.tiling import COARSE, FINE, Tiling
from chipbus.kernels.tiles import TileProgram

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kernels"
SIZES: Mapping[str, Mapping[str, int]] = {  # with tails; every symbol any example has
    "matmul": {"M": 200, "K": 300, "N": 70},
    "paged_attention": {"B": 3, "G": 2, "R": 4, "D": 16, "P": 9, "S": 4, "W": 4},
}


def example(name: str) -> TileProgram:
    spec = importlib.util.spec_from_file_location(f"diagnosed_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    [found] = [value for value in vars(module).values() if isinstance(value, TileProgram)]
    return found


def in_order(run: RunGraph) -> bool:
    """One core: one task after another, in the order of submission."""
    times = [time for task in run.tasks for time in (task.begin_ns, task.end_ns)]
    return all(one is not None and other is not None and one <= other for one, other in itertools.pairwise(times))


@pytest.mark.parametrize("kind", ["null", "cpu"])
@pytest.mark.guarantee("D9")
def test_a_launch_with_a_timeline_tells_its_tasks_and_when_each_ran(kind: str) -> None:
    matmul = example("matmul").with_settings(tile_m=64, tile_n=64, tile_k=128)
    chip = open_chip(f"{kind}:0", 1)
    try:
        chip.register(matmul.program)
        a, b = np.ones((100, 130), np.float32), np.ones((130, 70), np.float32)
        args = (Arg.of(a), Arg.of(b), Arg.out("float32", (100, 70)))
        dispatch = Dispatch(dispatch_id=1, step_id=1, program=matmul.program.digest, args=args)
        with pytest.raises(ConfigError, match="dispatch 1 was launched without timeline"):
            run_of_launch(chip.launch(dispatch), chip.describe)
        timed = chip.launch(attrs.evolve(dispatch, config=LaunchConfig(timeline=True)))
        run = run_of_launch(timed, chip.describe)
    finally:
        chip.close()
    assert [task.label for task in run.tasks] == ["clear", "multiply_add", "multiply_add", "store"] * 4
    assert in_order(run)
    assert 0 < run.wall_ns <= timed.device_ns
    assert run.high_water[1].heap_bytes >= 4 * 64 * 64
    assert find_races(run) == []


def test_a_launch_in_several_windows_is_one_run(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.from_directory(checkpoint("tied"), "float32")
    limits = Limits(max_num_seqs=2, max_num_batched_tokens=2048, max_model_len=1024, page_size=128, num_pages=16)
    programs = ModelPrograms.build(spec, limits)
    rows = tuple(
        PrefillRow(tokens=np.ones(600, np.int32), start=0, block_table=np.arange(5 * row, 5 * row + 5, dtype=np.int32),
                   row=row)
        for row in range(2)
    )  # fmt: skip
    [dispatch] = build_step(programs, StepInput(step_id=1, prefills=rows), 1)
    chip = CpuChip(1, isa="none")  # as traced below, in whole operations
    try:
        for program in programs.programs:
            chip.register(program)
        for tensor in programs.tensors:
            chip.alloc(tensor)
        timed = chip.launch(attrs.evolve(dispatch, config=LaunchConfig(timeline=True)))
        run = run_of_launch(timed, chip.describe)
    finally:
        chip.close()
    static = dict(programs.prefill.static)
    once = [run_of_capture(graphs.trace_prefill(static, tokens)) for tokens in (1024, 192)]  # 1,200 tokens in all
    assert len(run.tasks) == sum(len(window.tasks) for window in once)
    assert len(run.edges) == sum(len(window.edges) for window in once)
    assert in_order(run)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_no_example_has_a_race(name: str) -> None:
    """They may run on any number of cores, not only in the order of submission."""
    program = example(name)
    sizes = {symbol: SIZES.get(name, {}).get(symbol, 37) for symbol in program.symbols}
    graph, _ = program.trace(sizes)
    assert graph.tasks
    assert find_races(run_of_capture(graph)) == []


@pytest.mark.parametrize("tiling", [COARSE, FINE], ids=["coarse", "fine"])
@pytest.mark.parametrize(("trace", "tokens"), [(graphs.trace_decode, 16), (graphs.trace_prefill, 96)])
def test_a_forward_pass_of_qwen3_has_no_race(
    trace: Callable[..., TaskGraph], tokens: int, tiling: Tiling, checkpoint: Callable[[str], Path]
) -> None:
    """Tiles of tokens write one cache, each its own slots, which only slot numbers say: that alone has no order."""
    spec = ModelSpec.from_directory(checkpoint("bias-no-groups"), "bfloat16")
    limits = Limits(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=512, page_size=64, num_pages=16)
    programs = ModelPrograms.build(spec, limits, tiling)
    run = run_of_capture(trace(dict(programs.prefill.static), tokens))
    races = [race for race in find_races(run) if run.tasks[race.first].label != "rotate_and_store"]
    assert races == []
    assert {(race.memory, race.reason) for race in find_races(run)} <= {
        ("k_cache", Reason.WAW), ("v_cache", Reason.WAW),
    }  # fmt: skip
