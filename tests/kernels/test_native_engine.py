"""The engine that runs task graphs: its order, its threads, what it refuses; and its searches in rows of logits."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_runs import ISAS, NEEDS_NATIVE, Prepared, core_threads, prepare, randn, same_bits
from torch import Tensor

from chipbus.errors import ConfigError, CoreException
from chipbus.kernels.graph import GraphBuilder, Tag, TaskGraph
from chipbus.kernels.native import library, open_cores
from chipbus.kernels.torch_executor import BoundGraph
from chipbus.kernels.torch_kernels import Window, Workspace
from support import eventually

pytestmark = NEEDS_NATIVE

MANY = settings(deadline=None, print_blob=True, max_examples=20)
SEEDS = st.integers(0, 2**32 - 1)
THREADS = st.integers(1, 4)


# Order

ROWS = 6
KINDS = {"a": "float32", "b": "float32", "c": "float32", "d": "bfloat16", "e": "bfloat16"}


@attrs.frozen
class Copy:
    """Rows of one memory to another, by number: chosen for this task, or those the window tells (``stores``)."""

    source: str
    target: str
    numbers: tuple[int, ...] = ()
    first: int = 0  # row of the target, and of the source's tile


COPIES = st.one_of(
    st.builds(
        Copy,
        source=st.sampled_from("ab"),
        target=st.sampled_from("c"),
        numbers=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=3).map(tuple),
        first=st.integers(0, 3),
    ),
    st.builds(
        Copy,
        source=st.sampled_from("c"),
        target=st.sampled_from("ab"),
        numbers=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=3).map(tuple),
        first=st.integers(0, 3),
    ),
    st.builds(Copy, source=st.sampled_from("abc"), target=st.sampled_from("de")),
    st.builds(Copy, source=st.sampled_from("de"), target=st.sampled_from("abc")),
)


@attrs.frozen(eq=False)
class Copying:
    """A program of copies: each order of its tasks that is not allowed gives something else."""

    copies: Sequence[Copy]
    width: int
    pairs: list[tuple[int, int]]  # rows of source and target of every store

    def memory(self) -> dict[str, Tensor]:
        random = np.random.default_rng(0)
        given = {name: randn(random, ROWS, self.width, dtype=dtype) for name, dtype in KINDS.items()}
        numbers = [number for copy in self.copies for number in copy.numbers]
        return {**given, "numbers": torch.tensor([*numbers, 0], dtype=torch.int32)}

    def graph(self) -> TaskGraph:
        graph = GraphBuilder("copies", track_war=True)
        tiles = {name: graph.bound(name, dtype, ROWS, self.width) for name, dtype in KINDS.items()}
        numbers = graph.bound("numbers", "int32", 1 + sum(len(copy.numbers) for copy in self.copies))
        stores = graph.bound("stores", "int32", ROWS, 2)
        at = 0
        for copy in self.copies:
            source, target = tiles[copy.source], tiles[copy.target]
            if not copy.numbers:
                graph.submit("store_rows", (Tag.INPUT, source), (Tag.INPUT, stores), (Tag.INOUT, target))
                continue
            count = len(copy.numbers)
            chosen, at = numbers[at : at + count], at + count
            target = target[copy.first : copy.first + count]
            graph.submit("load_rows", (Tag.INPUT, source), (Tag.INPUT, chosen), (Tag.INOUT, target))
        return graph.build()

    def in_order(self) -> dict[str, Tensor]:
        memory = self.memory()
        for copy in self.copies:
            source, target = memory[copy.source], memory[copy.target]
            if copy.numbers:
                target[copy.first : copy.first + len(copy.numbers)] = source[list(copy.numbers)]
            for here, there in [] if copy.numbers else self.pairs:
                target[there] = source[here].to(target.dtype)
        return memory


def filled(program: Copying, threads: int) -> Prepared:
    made = prepare("", program.graph(), program.memory(), threads=threads)
    made.bound.window.count, made.bound.window.num_stores = ROWS, len(program.pairs)
    made.bound.window.memory["stores"][: len(program.pairs)] = program.pairs
    return made


def run_repeatedly(program: Copying, threads: int, times: int) -> None:
    made, given, expected = filled(program, threads), program.memory(), program.in_order()
    for _ in range(times):
        for name, tensor in given.items():
            made.memory[name].copy_(tensor)
        made.bound.run("test")
        assert all(same_bits(made.memory[name], tensor) for name, tensor in expected.items())


PROGRAMS = st.builds(
    Copying,
    copies=st.lists(COPIES, min_size=1, max_size=60),
    width=st.sampled_from([1, 40, 3000, 20_000]),
    pairs=st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)), min_size=1, max_size=4),
)


@pytest.mark.guarantee("K34")
@MANY
@given(program=PROGRAMS, threads=THREADS)
def test_a_graph_gives_what_its_tasks_give_one_after_another_on_any_number_of_threads(
    program: Copying, threads: int
) -> None:
    run_repeatedly(program, threads, 8)


def busy_program(seed: int) -> Copying:
    """Tasks that all wait for each other and copy for a while: one that begins too early finds old rows."""
    random = np.random.default_rng(seed)
    names = "abc", "de"
    copies = []
    for _ in range(80):
        source, target = (names[at] for at in random.permutation(2))
        copies.append(Copy(str(random.choice([*source])), str(random.choice([*target]))))
    return Copying(copies, 20_000, [(0, 1), (2, 0), (1, 4), (5, 5)])


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_a_task_finds_all_that_the_one_before_it_wrote(threads: int) -> None:
    run_repeatedly(busy_program(threads), threads, 20)


def structure(kernels: Sequence[int], successors: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Tasks without work, as task.h lays them out, and the list of all successors."""
    tasks = np.zeros((len(kernels), library.TASK_BYTES // 4), np.int32)
    tasks[:, 0] = kernels
    ends = np.cumsum([len(after) for after in successors])
    tasks[:, 15] = ends
    tasks[1:, 14] = ends[:-1]
    return tasks.reshape(-1).view(np.uint8), np.array([at for after in successors for at in after], np.int32)


@st.composite
def structures(draw: st.DrawFn) -> list[list[int]]:
    """For each task those that wait for it, all further on."""
    count = draw(st.integers(1, 200))
    random = np.random.default_rng(draw(SEEDS))
    most = draw(st.sampled_from([1, 3, 20]))
    return [
        random.integers(at + 1, count, int(random.integers(most + 1))).tolist() if at + 1 < count else []
        for at in range(count)
    ]


@pytest.mark.guarantee("K35")
@MANY
@given(successors=structures(), threads=THREADS, data=st.data())
def test_no_task_begins_before_those_it_waits_for_have_ended(
    successors: list[list[int]], threads: int, data: st.DataObject
) -> None:
    cores = open_cores(threads)
    graph = library.Graph(*structure([0] * len(successors), successors))
    assert len(graph) == len(successors)
    for turn in range(1, 6):
        failed, begins, ends, where = cores.run_timed(graph, 0, 0, 0, check=data.draw(st.booleans()))
        assert failed == -1
        assert (begins <= ends).all()
        assert (where >= 0).all()
        assert (where < threads).all()
        assert all(ends[at] <= begins[after] for at, waiting in enumerate(successors) for after in waiting)
        for core in range(threads):  # one task at a time
            mine = np.argsort(begins[where == core], kind="stable")
            assert (ends[where == core][mine][:-1] <= begins[where == core][mine][1:]).all()
        assert sum(tasks for tasks, _ in cores.counters()) == cores.ended == turn * len(successors)


@MANY
@given(
    successors=st.lists(st.lists(st.integers(-1, 4), max_size=2), min_size=1, max_size=4),
    kernels=st.lists(st.sampled_from([0, 1, 6, 6, 6, 6, 7, -1]), min_size=4, max_size=4),
)
def test_a_graph_that_could_not_end_or_names_no_kernel_is_refused(
    successors: list[list[int]], kernels: list[int]
) -> None:
    count = len(successors)
    given = structure(kernels[:count], successors)
    is_right = all(0 <= kernel < len(library.KERNELS) for kernel in kernels[:count]) and all(
        at < after < count for at, waiting in enumerate(successors) for after in waiting
    )
    if not is_right:
        with pytest.raises(ValueError, match=r"^task \d (names kernel|is followed by task) -?\d$"):
            library.Graph(*given)
        return
    assert open_cores(2).run(library.Graph(*given), 0, 0, 0, check=False) == -1


@pytest.mark.parametrize(("begin", "end"), [(-1, 0), (0, 2), (1, 0), (2, 2)])
def test_successors_outside_the_list_are_refused(begin: int, end: int) -> None:
    tasks, successors = structure([0, 0], [[1], []])
    words = tasks.view(np.int32).reshape(2, -1)
    words[0, 14:16] = begin, end
    with pytest.raises(ValueError, match="task 0 has successors outside the list"):
        library.Graph(tasks, successors)
    with pytest.raises(ValueError, match="tasks are not whole"):
        library.Graph(tasks[:-1], successors)


def test_a_graph_without_tasks_ends() -> None:
    cores = open_cores(2)
    assert cores.run(library.Graph(np.zeros(0, np.uint8), np.zeros(0, np.int32)), 3, 0, 0, check=True) == -1
    assert [tasks for tasks, _ in cores.counters()] == [0, 0]


# Threads


@pytest.mark.guarantee("K36")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_threads_of_an_engine_end_with_it(threads: int) -> None:
    gc.collect()  # engines of other tests
    before = core_threads()
    cores = open_cores(threads)
    assert (cores.threads, core_threads()) == (threads, before + threads - 1)
    graph = library.Graph(*structure([0] * 50, [[]] * 50))
    cores.run(graph, 0, 0, 0, check=False)
    del cores
    eventually(lambda: core_threads() <= before, "the engine's threads have ended")


def test_an_engine_that_cannot_be_is_refused_with_a_sentence() -> None:
    for threads in (0, -3):
        with pytest.raises(ValueError, match=f"^threads is {threads}; there must be at least 1$"):
            open_cores(threads)
    with pytest.raises(ConfigError, match=r"^.*the native engine cannot run here: no kernels of that name"):
        open_cores(1, "avx9")
    with pytest.raises(ValueError, match="instruction set 'avx9': no kernels of that name"):
        library.Cores(1, "avx9")


SHORT_OF_MEMORY = """
import resource
import numpy as np
from chipbus.kernels.native import library

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), hard))  # a thread's stack is 8 MiB
isa = library.best_isa()
try:
    library.Cores(200, isa)
except OSError as error:
    print(f"no threads: {error.strerror}")
cores = library.Cores(3, isa)
tasks = np.zeros((40, library.TASK_BYTES // 4), np.int32)
tasks[:, 0] = library.KERNELS.index("paged_attention")
tasks[:, 3] = 1  # row
tasks[:, 7:9] = 1, 1 << 22  # a query head for each KV head, and dims no memory suffices for
tasks[:, 14], tasks[:, 15] = np.arange(40), np.arange(1, 41)
tasks[-1, 15] = 39
heavy = library.Graph(tasks.reshape(-1).view(np.uint8), np.arange(1, 40, dtype=np.int32))
for tokens in (1, 0, 1, 0):
    try:
        print(cores.run(heavy, tokens, 0, 0, check=False))
    except MemoryError:
        print("no memory")
"""


@pytest.mark.slow
def test_an_engine_short_of_memory_says_so_and_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no threads: Resource temporarily unavailable", "no memory", "-1", "no memory", "-1",
    ]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_an_engine_tells_its_instruction_set(isa: str) -> None:
    assert open_cores(1, isa).isa == isa


def test_engines_of_one_process_do_not_touch_each_other() -> None:
    programs = [busy_program(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(run_repeatedly, program, 2, 10) for program in programs]:
            done.result(30)


def test_an_engine_may_be_used_and_dropped_on_another_thread_than_it_was_made_on() -> None:
    program = busy_program(0)
    gc.collect()
    before = core_threads()
    made = [filled(program, 3)]

    def use() -> None:
        one = made.pop()
        one.bound.run("test")
        assert all(same_bits(one.memory[name], tensor) for name, tensor in program.in_order().items())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(use).result(30)
    gc.collect()
    eventually(lambda: core_threads() <= before, "the engine's threads have ended")


@pytest.mark.slow
def test_no_wakeup_is_lost_in_thousands_of_runs() -> None:
    random = np.random.default_rng(3)
    cores = open_cores(4)
    for _ in range(40):
        count = int(random.integers(1, 120))
        successors = [
            random.integers(at + 1, count, int(random.integers(3))).tolist() if at + 1 < count else []
            for at in range(count)
        ]
        graph = library.Graph(*structure([0] * count, successors))
        for _ in range(100):
            assert cores.run(graph, 0, 0, 0, check=False) == -1
        # Long enough for cores to fall asleep: this one is busy without them.
        sum(range(int(random.integers(2)) * 200_000))


# NaN


def norms(poisoned: int, count: int) -> tuple[TaskGraph, dict[str, Tensor]]:
    """A chain of norms, ten tasks wide, one gamma of which holds a NaN; so does all padding of ``count`` tokens."""
    random = np.random.default_rng(0)
    graph = GraphBuilder("norms")
    memory = {"x": randn(random, 30, 8), "y": torch.zeros(30, 8), "z": torch.zeros(30, 8)}
    for tensor in memory.values():
        tensor[count:] = torch.nan
    tiles = {name: graph.bound(name, "float32", 30, 8) for name in memory}
    gammas = {f"gamma.{at}": torch.ones(8) for at in range(20)}
    gammas[f"gamma.{poisoned}"][5] = torch.nan
    for at in range(20):
        source, target = ("x", "y") if at < 10 else ("y", "z")
        first = 3 * (at % 10)
        args = [(Tag.INPUT, tiles[source][first : first + 3]), (Tag.INPUT, graph.bound(f"gamma.{at}", "float32", 8))]
        graph.submit("rms_norm", *args, (Tag.OUTPUT, tiles[target][first : first + 3]), eps=1e-6, first_token=first)
    return graph.build(), memory | gammas


@MANY
@given(threads=THREADS, poisoned=st.integers(0, 19), count=st.integers(1, 30))
def test_a_task_that_writes_nan_is_named_with_its_graph_kernel_and_buffer(
    threads: int, poisoned: int, count: int
) -> None:
    graph, memory = norms(poisoned, count)
    is_seen = 3 * (poisoned % 10) < count  # tokens behind the window's are nobody's
    named = rf"dispatch 3: task {poisoned} of norms \(rms_norm\) .*wrote NaN to a tile of {'yz'[poisoned >= 10]}\b"
    for check in (False, True):
        made = prepare("", graph, memory, threads=threads, check_numerics=check)
        made.bound.window.count = count
        window = Window.of(30, count)
        by_torch = BoundGraph(graph, memory, window, Workspace(torch.float32), check_numerics=check)
        for executor in (made.bound, by_torch):
            if check and is_seen:
                with pytest.raises(CoreException, match=named):
                    executor.run("dispatch 3")
            else:
                executor.run("dispatch 3")


# Searches


def searched(random: np.random.Generator, size: int, kind: str) -> np.ndarray[Any, Any]:
    values = random.standard_normal(size, np.float32)
    if kind == "ties":
        values = random.integers(0, 3, size).astype(np.float32)
    elif kind == "equal":
        values[:] = random.choice([0.0, -0.0, -np.inf, np.inf, np.nan])
    elif kind == "special":
        values[random.integers(0, size, 1 + size // 3)] = random.choice([-np.inf, np.inf, np.nan, -0.0])
        values[random.integers(0, size, 1 + size // 9)] = random.choice([-np.inf, np.inf, np.nan, 0.0])
    return values


SIZES = st.one_of(st.integers(1, 70), st.integers(1, 100_000), st.sampled_from([16384, 16385, 32768, 49151]))


@MANY
@given(
    seed=SEEDS, size=SIZES, kind=st.sampled_from(["plain", "ties", "equal", "special"]), rows=st.integers(1, 5),
    padding=st.integers(0, 3), threads=THREADS,
)  # fmt: skip
def test_the_largest_of_a_row_is_where_numpy_finds_it(
    seed: int, size: int, kind: str, rows: int, padding: int, threads: int
) -> None:
    random = np.random.default_rng(seed)
    values = np.stack([searched(random, size + padding, kind) for _ in range(rows)])
    values[:, size:] = np.inf
    chosen = random.integers(0, rows, 1 + int(random.integers(6))).tolist()
    found = open_cores(threads).largest(values.ctypes.data, values.strides[0], chosen, size)
    assert found == values[chosen, :size].argmax(1).tolist()


@MANY
@given(
    seed=SEEDS, size=st.integers(1, 3000), kind=st.sampled_from(["plain", "ties", "equal", "special"]),
    count=st.integers(-1, 3100),
)  # fmt: skip
def test_the_top_of_a_row_is_that_of_a_stable_sort(seed: int, size: int, kind: str, count: int) -> None:
    values = searched(np.random.default_rng(seed), size, kind)
    order = np.lexsort(
        (np.arange(size), -np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf), np.isnan(values))
    )
    assert library.top(values, count) == order[: max(count, 0)].tolist()
