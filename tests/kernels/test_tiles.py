"""The tile language: what a program means does not depend on its tiles, its order is what its tiles say, and misuse is
named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import tile_programs as programs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chipbus.errors import (
    CoreException,
    HeapRingDeadlock,
    InvalidArgs,
    KernelError,
    MemoryExhausted,
    ScopeDeadlock,
    UnknownProgram,
)
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.diagnosis import find_races, run_graph_from_json, run_of_capture
from chipbus.kernels.dispatch import Arg, Completion, Dispatch, LaunchConfig
from chipbus.kernels.golden import golden
from chipbus.kernels.graph import Tag, TaskGraph
from chipbus.kernels.program import TensorSpec
from chipbus.kernels.tiles import IN, INOUT, OUT, InCore, Tile, TileProgram, Trace, incore, program, tensor
from chipbus.kernels.torch_executor import BoundGraph, HeapArenas
from chipbus.kernels.torch_kernels import Window, Workspace
from chipbus.topology.rings import RingRequest, resolve_rings

SMALL = resolve_rings(RingRequest(ring_heap=8192), environ={})  # memory is used again and again


@pytest.fixture
def chip() -> Iterator[CpuChip]:
    made = CpuChip(1)
    yield made
    made.close()


def run(
    chip: CpuChip, made: TileProgram, *args: Arg, config: LaunchConfig | None = None, digest: bool = False
) -> Completion:
    chip.register(made.program)
    return chip.launch(
        Dispatch(dispatch_id=7, step_id=1, program=made.program.digest, args=args, config=config), digest=digest
    )


def matrix(rows: int, columns: int) -> NDArray[np.float32]:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) - 3


def scaled(chip: CpuChip, made: TileProgram, x: NDArray[np.float32], **more: Any) -> NDArray[Any]:
    (y,) = run(chip, made, Arg.of(x), Arg.out("float32", x.shape), **more).outputs
    return y.numpy()


def replayed(graph: TaskGraph, incores: dict[str, InCore], order: list[int], x: NDArray[np.float32]) -> NDArray[Any]:
    """The graph run by the torch executor in another order, its heap full of garbage before."""
    again = attrs.evolve(graph, tasks=tuple(graph.tasks[task] for task in order))
    arenas = HeapArenas(lambda count, _: torch.full((count,), 0xFF, dtype=torch.uint8))
    arenas.grow(graph.heap_bytes, "test")
    memory = {"x": torch.from_numpy(x), "y": torch.full(x.shape, torch.nan)}
    workspace = Workspace(torch.float32)
    BoundGraph(again, memory, Window.of(0), workspace, incores=incores, arenas=arenas).run("test")
    return memory["y"].numpy()


@pytest.mark.guarantee("P1")
@settings(deadline=None, print_blob=True, max_examples=40)
@given(
    st.integers(0, 7), st.integers(0, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.randoms(),
)  # fmt: skip
def test_any_order_its_edges_allow_gives_the_same_numbers(
    rows: int, columns: int, tile_m: int, tile_n: int, stages: int, chance: random.Random
) -> None:
    x = matrix(rows, columns)
    for made, factor in (
        (programs.layered.with_settings(tile_m=tile_m, tile_n=tile_n), 7),
        (programs.staged.with_settings(tile=tile_m, stages=stages), 6),
    ):
        graph, incores = made.trace({"M": rows, "N": columns}, SMALL)
        waiting, order = set(range(len(graph.tasks))), list[int]()
        while waiting:
            ready = sorted(task for task in waiting if waiting.isdisjoint(graph.tasks[task].predecessors))
            order.append(chance.choice(ready))
            waiting.remove(order[-1])
        assert np.array_equal(replayed(graph, incores, order, x), factor * x)
        assert not find_races(run_of_capture(graph))


@pytest.mark.guarantee("P2")
def test_by_value_and_resident_arguments_mean_the_same(chip: CpuChip) -> None:
    x = matrix(5, 7)
    chip.alloc(TensorSpec(1, "float32", (5, 7)))
    chip.alloc(TensorSpec(2, "float32", (5, 7)))
    chip.copy_to(1, Arg.of(x))
    assert np.array_equal(scaled(chip, programs.layered, x), 7 * x)
    assert run(chip, programs.layered, Arg(resident=1), Arg(resident=2)).outputs == ()
    assert np.array_equal(chip.copy_from(2).numpy(), 7 * x)
    (y,) = run(chip, programs.layered, Arg(resident=2), Arg.out("float32", (5, 7))).outputs
    assert np.array_equal(y.numpy(), 49 * x)
    chip.free(2)
    with pytest.raises(InvalidArgs, match=r"dispatch 7 of layered, argument 1 \(y\): resident 2 is unknown"):
        run(chip, programs.layered, Arg(resident=1), Arg(resident=2))


def test_what_is_written_by_value_comes_back_in_parameter_order(chip: CpuChip) -> None:
    x, total = np.array([1, 2, 3], np.float32), np.array([10], np.float32)
    for _ in range(2):  # nothing is left from the launch before
        completion = run(chip, programs.prefix_sum, Arg.of(x), Arg.of(total), Arg.out("float32", (3,)))
        assert [array.numpy().tolist() for array in completion.outputs] == [[16], [11, 13, 16]]


def test_a_written_tensor_is_given_once(chip: CpuChip) -> None:
    chip.alloc(TensorSpec(1, "float32", (2, 3)))
    with pytest.raises(InvalidArgs, match=r"argument 1 \(y\): resident 1 is also x; a tensor that is written"):
        run(chip, programs.whole, Arg(resident=1), Arg(resident=1))


def test_built_in_kernels_are_submitted_by_name() -> None:
    def plain(x: NDArray[Any], gamma: NDArray[Any], w: NDArray[Any]) -> NDArray[Any]:
        return 2 * (x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * gamma) @ w.T

    golden(programs.normed_product, plain, [(4, 8, 3), (1, 16, 5)])


def test_programs_compute_in_bfloat16() -> None:
    report = golden(halved, lambda x: x / 2, [(5,), (0,)], rtol=0, atol=0)
    assert str(report) == "halved: 2 shapes, max error 0.0e+00"


def test_a_graph_is_captured_once_per_shapes_and_rings(chip: CpuChip) -> None:
    programs.traced.clear()
    rings = LaunchConfig(heap=(2048,) * 4)
    for shape, config in (((4, 3), None), ((5, 3), None), ((4, 3), None), ((4, 3), rings), ((5, 3), None)):
        assert np.array_equal(scaled(chip, programs.staged, matrix(*shape), config=config), 6 * matrix(*shape))
    assert programs.traced == [(4, 3), (5, 3), (4, 3)]


@pytest.mark.guarantee("P3")
def test_a_pipeline_takes_the_memory_of_its_stages_however_long_it_is() -> None:
    sizes = []
    for rows in (6, 30, 300):
        graph, _ = programs.staged.with_settings(tile=3, stages=2).trace({"M": rows, "N": 300})
        sizes.append(sum(graph.heap_bytes))
    assert sizes == [4096 + 3600] * 3
    assert {(0, 1), (2, 3), (4, 5)} <= graph.edges
    assert {(0, 4), (1, 4)} <= graph.edges  # the third iteration has the memory of the first
    assert not any(after in (2, 3) for before, after in graph.edges if before < 2)


@pytest.mark.guarantee("P4")
def test_memory_of_ended_scopes_is_used_again_and_what_never_fits_is_refused_at_once(chip: CpuChip) -> None:
    x = matrix(4, 600)
    small = LaunchConfig(heap=(8192,) * 4)
    made = programs.layered.with_settings(tile_n=100)
    assert np.array_equal(scaled(chip, made, x, config=small), 7 * x)
    with pytest.raises(HeapRingDeadlock, match=r"dispatch 7 of layered: ring 1: .*ring_heap"):
        scaled(chip, made.with_settings(tile_n=600), x, config=LaunchConfig(heap=(1024,) * 4))
    with pytest.raises(ScopeDeadlock, match=r"dispatch 7 of staged: .*ring_task_window"):
        scaled(chip, programs.staged.with_settings(tile=1), matrix(9, 2), config=LaunchConfig(task_window=(4,) * 4))
    assert np.array_equal(scaled(chip, made, x), 7 * x)


def test_a_heap_larger_than_free_memory_is_refused_before_it_is_taken(
    chip: CpuChip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chip, "free_bytes", lambda: 1000)
    with pytest.raises(MemoryExhausted, match=r"dispatch 7 of staged: ring_heap\[0\] needs 1,060 bytes; 1,000 are"):
        scaled(chip, programs.staged, matrix(6, 3))


def test_the_heap_goes_with_the_last_graph_that_uses_it(chip: CpuChip) -> None:
    for rows in (6, 60, 3):
        scaled(chip, programs.staged, matrix(rows, 300))
    assert chip.resident_bytes >= 2 * 3600
    scaled(chip, programs.whole, matrix(2, 2))
    chip.unregister(programs.staged.program.digest)
    assert chip.num_graphs == 1
    assert chip.resident_bytes == 0


@pytest.mark.guarantee("P5")
def test_a_task_that_raises_is_named_with_its_tiles_and_later_ones_do_not_run(chip: CpuChip) -> None:
    chip.alloc(TensorSpec(1, "float32", (2, 3)))
    x = matrix(2, 3)
    with pytest.raises(CoreException) as caught:
        run(chip, programs.boom, Arg.of(x), Arg(resident=1))
    assert caught.value.detail == (
        "dispatch 7 of boom: task 1 of boom[M=2,N=3] (explode) failed: RuntimeError: no core for (2, 3);"
        " its tiles: x [2, 3]"
    )
    assert np.array_equal(chip.copy_from(1).numpy(), 5 * x)
    assert np.array_equal(scaled(chip, programs.whole, x), 3 * x)


def test_a_program_that_cannot_be_traced_is_named_with_its_line(chip: CpuChip) -> None:
    with pytest.raises(InvalidArgs, match=r"dispatch 7 of crooked: /.*test_tiles\.py:\d+: tracing crooked failed"):
        scaled(chip, crooked, matrix(2, 2))


def test_times_and_graph_are_told_on_request(chip: CpuChip) -> None:
    x = Arg.of(matrix(5, 7))
    plain = run(chip, programs.staged, x, Arg.out("float32", (5, 7)))
    timed = run(chip, programs.staged, x, Arg.out("float32", (5, 7)), config=LaunchConfig(timeline=True))
    assert (plain.task_times, plain.graph) == (b"", "")
    assert timed.outputs == plain.outputs
    times = np.frombuffer(timed.task_times, "<i8").reshape(-1, 2)
    assert len(times) == 4
    assert (np.diff(times.reshape(-1)) >= 0).all()
    assert 0 <= times[0, 0] <= times[-1, 1] <= timed.device_ns
    described = run_graph_from_json(chip.describe(timed.graph).encode())
    assert [task.label for task in described.tasks] == ["scale"] * 4
    with pytest.raises(KernelError, match="graph nothing is unknown; known: staged"):
        chip.describe("nothing")


def test_digests_are_over_what_was_written_alone(chip: CpuChip) -> None:
    chip.alloc(TensorSpec(1, "float32", (3, 4)))
    digests = []
    for untouched in (0, 1):
        content = np.full((3, 4), untouched, np.float32)
        content[0] = 5
        chip.copy_to(1, Arg.of(content))
        digests.append(run(chip, programs.add_up, Arg.of(matrix(3, 4)), Arg(resident=1), digest=True).digests)
    assert digests[0] == digests[1]
    assert digests[0] != run(chip, programs.add_up, Arg.of(matrix(3, 4)), Arg(resident=1), digest=True).digests


def test_an_unregistered_program_is_unknown_until_it_is_registered_again(chip: CpuChip) -> None:
    x, digest = matrix(2, 2), programs.staged.program.digest
    scaled(chip, programs.staged, x)
    graphs = chip.num_graphs
    chip.unregister(digest)
    assert chip.num_graphs == graphs - 1
    with pytest.raises(UnknownProgram, match="is not registered; registered: none"):
        chip.launch(Dispatch(dispatch_id=1, step_id=1, program=digest, args=()))
    with pytest.raises(UnknownProgram, match="unregister: program"):
        chip.unregister(digest)
    assert np.array_equal(scaled(chip, programs.staged, x), 6 * x)


def test_settings_are_part_of_a_programs_identity() -> None:
    smaller = programs.layered.with_settings(tile_m=1)
    assert smaller.settings == {"tile_m": 1, "tile_n": 3}
    assert smaller.program.digest != programs.layered.program.digest
    assert smaller.with_settings(tile_m=2).program.digest == programs.layered.program.digest
    assert smaller.program.abi_fingerprint == programs.layered.program.abi_fingerprint
    with pytest.raises(InvalidArgs, match="layered has no setting tile; its settings: tile_m, tile_n"):
        programs.layered.with_settings(tile=1)
    with pytest.raises(InvalidArgs, match="setting tile_m is None; expected a number or text"):
        programs.layered.with_settings(tile_m=None)  # type: ignore[arg-type]


def test_golden_checks_name_the_worst_element_and_can_be_frozen(tmp_path: Any) -> None:
    with pytest.raises(KernelError, match=r"whole at \{'M': 2, 'N': 2\}, y\[\d, \d\] is .*; expected .* within"):
        golden(programs.whole, lambda x: 2 * x, [(2, 2)])
    with pytest.raises(KernelError, match="the reference has shape"):
        golden(programs.whole, lambda x: 3 * x[:1], [(2, 2)])
    first = golden(programs.whole, lambda x: 3 * x, [(2, 2)], frozen=tmp_path)
    again = golden(programs.whole, lambda x: 1 / 0, [(2, 2)], frozen=tmp_path, seed=5)
    assert first == again


def test_bfloat16_values_are_rounded_to_the_nearest() -> None:
    array = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    ours = Arg.of(array, "bfloat16").numpy()
    assert np.array_equal(ours, torch.from_numpy(array).bfloat16().float().numpy())


# What the language refuses.


@incore(x=IN, y=OUT)
def halve(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.mul(x, 0.5, out=y)


@program(x=tensor("bfloat16", "N"), y=tensor("bfloat16", "N", direction=OUT))
def halved(t: Trace, x: Tile, y: Tile) -> None:
    t.submit(halve, x, y)


@program(x=programs.X, y=programs.Y)
def crooked(t: Trace, x: Tile, y: Tile) -> None:
    t.submit(programs.scale, x[99], y[0])


X, Y = programs.X, programs.Y
Body = Callable[[Trace, Tile, Tile], object]


def _twin() -> InCore:
    @incore(x=IN, y=OUT)
    def scale(x: torch.Tensor, y: torch.Tensor) -> None: ...

    return scale


def _carried(t: Trace, x: Tile, y: Tile) -> None:
    for m in t.parallel(1, x.shape[0]):
        t.submit(programs.scale, y[m - 1], y[m])


def _shared(t: Trace, x: Tile, y: Tile) -> None:
    scratch = t.tensor("float32", 1, 3)
    for m in t.spmd(2):
        for n in t.parallel(0, 1):
            t.submit(programs.scale, x[m : m + 1, n:], scratch)


WRONG: list[tuple[Body, str]] = [
    (lambda t, x, y: t.submit(programs.scale, x), "scale takes 2 tiles; 1 given"),
    (lambda t, x, y: t.submit(programs.scale, x, 3), "3 is no tile; in-core functions take tiles"),
    (lambda t, x, y: t.submit(programs.scale, x, y, factor=2), "scale has no setting factor; its settings: by"),
    (lambda t, x, y: t.submit(programs.scale, x, y, by=[2]), "setting by is a list; expected a number or text"),
    (lambda t, x, y: t.submit(programs.scale, y, x), "scale writes x, which is an IN parameter"),
    (lambda t, x, y: (t.submit(programs.scale, x, y), t.submit(_twin(), x, y)), "two kernels of one program are call"),
    (lambda t, x, y: t.submit("paged_attention", (Tag.INPUT, x)), "'paged_attention' is no built-in kernel; those are"),
    (lambda t, x, y: t.submit("load_rows", x), "load_rows is a built-in kernel; each of its tiles is given as"),
    (lambda t, x, y: t.tensor("float31", 2), "dtype is 'float31'; expected one of uint8"),
    (lambda t, x, y: list(t.range(0, 4, 0)), "range in steps of 0"),
    (lambda t, x, y: list(t.pipeline(0, 4, stages=0)), "pipeline of 0 stages; it needs at least 1"),
    (lambda t, x, y: list(t.spmd(0)), "spmd of 0 instances; it needs at least 1"),
    (_carried, "scale in iteration 1 of a parallel loop uses what scale wrote to y in iteration 0"),
    (_shared, "scale in iteration 1 of a parallel loop uses what scale wrote to tensor"),
]  # fmt: skip


@pytest.mark.guarantee("P6")
@pytest.mark.parametrize(("body", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_misuse_is_refused_when_it_is_traced(body: Body, sentence: str) -> None:
    made = attrs.evolve(programs.whole, function=lambda t, x, y, **_: body(t, x, y))
    with pytest.raises(InvalidArgs) as caught:
        made.trace({"M": 4, "N": 3})
    assert sentence in str(caught.value)


def test_tiles_without_dependency_make_no_edges() -> None:
    def body(t: Trace, x: Tile, y: Tile, **_: Any) -> None:
        first = t.submit(programs.scale, x, y)
        second = t.submit(programs.scale, t.no_dep(y), t.tensor("float32", 4, 3))
        t.submit(programs.scale, x, t.tensor("float32", 4, 3), after=[first, second])

    graph, _ = attrs.evolve(programs.whole, function=body).trace({"M": 4, "N": 3})
    assert graph.edges == {(0, 2), (1, 2)}
    assert [tag for tag, _ in graph.tasks[1].args] == [Tag.NO_DEP, Tag.OUTPUT]
    assert [tag for tag, _ in graph.tasks[0].args] == [Tag.INPUT, Tag.OUTPUT_EXISTING]


def test_a_manual_scope_has_only_the_edges_it_is_told() -> None:
    def body(t: Trace, x: Tile, y: Tile, **_: Any) -> None:
        with t.scope(manual=True):
            first = t.submit(programs.scale, x, y)
            t.submit(programs.accumulate, x, y)
            t.submit(programs.accumulate, x, y, after=[first])

    graph, _ = attrs.evolve(programs.whole, function=body).trace({"M": 4, "N": 3})
    assert graph.edges == {(0, 2)}


def test_loops_left_early_are_over() -> None:
    def body(t: Trace, x: Tile, y: Tile, **_: Any) -> None:
        for m in t.parallel(0, 4):
            t.submit(programs.scale, x[m], y[m])
            if m == 1:
                break
        for _m in t.pipeline(0, 4):
            break
        t.submit(programs.scale, y[0], t.tensor("float32", 3))

    graph, _ = attrs.evolve(programs.whole, function=body).trace({"M": 4, "N": 3})
    assert graph.edges == {(0, 2)}


def test_in_core_functions_are_described_in_order() -> None:
    def takes(x: torch.Tensor, y: torch.Tensor, *, by: float) -> None: ...
    def open_ended(*tiles: torch.Tensor) -> None: ...

    for directions in ({}, {"x": IN}, {"y": IN, "x": INOUT}, {"x": IN, "y": IN, "by": IN}):
        with pytest.raises(InvalidArgs, match="its positional parameters are x, y, and each needs its direction"):
            incore(**directions)(takes)
    with pytest.raises(InvalidArgs, match=r"open_ended has the parameter \*tiles"):
        incore()(open_ended)
    x, y = torch.ones(3), torch.empty(3)
    programs.scale(x, y, by=4.0)  # a body can be called
    assert y.tolist() == [4, 4, 4]


def test_programs_are_described_in_order_and_found_by_name() -> None:
    def nested(t: Trace, x: Tile) -> None: ...
    def unset(t: Trace, x: Tile, *, tile: int) -> None: ...

    with pytest.raises(InvalidArgs, match=r"nested of .* is inside another definition"):
        program(x=X)(nested)
    with pytest.raises(InvalidArgs, match="describes y; its parameters after the trace are x"):
        program(y=X)(nested)
    with pytest.raises(InvalidArgs, match="unset: setting tile is without default"):
        program(x=X)(unset)
    with pytest.raises(InvalidArgs, match=r"normed_product is defined in .*tile_programs, not in"):
        program(x=X, gamma=X, w=X, y=Y)(programs.normed_product.function)
    with pytest.raises(InvalidArgs, match="dtype is 'half'"):
        tensor("half", 3)
    with pytest.raises(InvalidArgs, match="extents are names or numbers of at least 0"):
        tensor("float32", -1)
