"""The task graph engine against brute force: random programs, ring sizes, failures and orders of execution."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar
from unittest import mock

import pytest
import task_programs
from hypothesis import given, settings
from hypothesis import strategies as st
from task_programs import READING, WRITING, Alloc, Bookkeeper, Byte, Close, Open, Work

from chipbus.errors import DepPoolOverflow, FlowControlDeadlock, HeapRingDeadlock, NumberedError, ScopeDeadlock
from chipbus.kernels import engine as engine_module
from chipbus.kernels.engine import Access, HeapBlock, RingFull, TaskEngine, TaskState
from chipbus.kernels.tags import Tag
from chipbus.topology.rings import RingSizes

T = TypeVar("T")


class World:
    """Runs a program on the engine in a random order, next to what it would be by brute force."""

    def __init__(self, sizes: RingSizes, rng: random.Random, *, track_war: bool, repair: bool, inline: int) -> None:
        self.sizes, self.rng, self.repair, self.inline = sizes, rng, repair, inline
        self.engine = TaskEngine(sizes, track_war=track_war)
        self.books = Bookkeeper(track_war)
        self.numbers: dict[int, int] = {}  # by the engine's id
        self.works: list[tuple[Work, list[tuple[Tag, list[Byte]]], list[tuple[int, ...]]]] = []
        self.edges: list[set[int]] = []
        self.places: list[tuple[int, int]] = []  # (ring, scope)
        self.scopes = [(0, False)]  # (number, manual), open ones
        self.num_scopes = 1
        self.blocks: list[tuple[int, int, HeapBlock]] = []  # (scope, columns, block), all there have been
        self.ready: list[int] = []
        self.running: list[tuple[int, int]] = []  # (task, member)
        self.snapshots: dict[int, list[object]] = {}
        self.memory: dict[object, object] = {}
        self.members_left: dict[int, int] = {}
        self.states: dict[int, str] = {}  # "ok", "failed" or "aborted", of tasks that have ended
        self.waited: list[set[int]] = []  # producers that had not ended when the task was submitted

    # Execution

    def advance(self) -> bool:
        """One step of some task; False if there is nothing to do."""
        for task in self.engine.take_ready():
            assert self.engine.state(task) is TaskState.READY
            self.ready.append(task)
        self.take_failed()
        if self.ready and (not self.running or self.rng.random() < 0.5):
            task = self.ready.pop(self.rng.randrange(len(self.ready)))
            self.begin(task)
        elif self.running:
            task, member = self.running.pop(self.rng.randrange(len(self.running)))
            self.end(task, member)
        else:
            return False
        return True

    def take_failed(self) -> None:
        for task in self.engine.take_failed():
            assert self.numbers[task] not in self.states
            self.states[self.numbers[task]] = "aborted"

    def begin(self, task: int) -> None:
        number = self.numbers[task]
        work, touched, places = self.works[number]
        self.engine.start(task)
        self.running += [(task, member) for member in range(work.members)]
        self.members_left[task] = work.members
        self.snapshots[number] = [self.read(byte, place) for byte, place in self.touching(touched, places, READING)]

    def end(self, task: int, member: int) -> None:
        number = self.numbers[task]
        work, touched, places = self.works[number]
        self.members_left[task] -= 1
        if work.fails and (member == 0 or self.rng.random() < 0.5):
            self.engine.fail(task, ValueError(f"task {number} member {member}"), member)
        else:
            self.engine.complete(task, member)
        if self.members_left[task]:
            assert self.engine.state(task) is TaskState.RUNNING
            return
        assert self.engine.state(task) not in (TaskState.RUNNING, TaskState.READY, TaskState.PENDING)
        self.states[number] = "failed" if work.fails else "ok"
        for byte, place in self.touching(touched, places, WRITING):
            self.memory[place] = (byte, number, hash(tuple(self.snapshots[number])))

    @staticmethod
    def touching(
        touched: list[tuple[Tag, list[Byte]]], places: list[tuple[int, ...]], tags: tuple[Tag, ...]
    ) -> list[tuple[Byte, object]]:
        return [
            (byte, (*place[:2], byte[1] * 1000 + byte[2]) if place else byte)
            for (tag, cells), place in zip(touched, places, strict=True)
            if tag in tags
            for byte in cells
        ]

    def read(self, byte: Byte, place: object) -> object:
        """What is there, if it was written as this byte: an earlier block's value is as good as nothing."""
        value = self.memory.get(place)
        return value if isinstance(value, tuple) and value[0] == byte else None

    def drain(self) -> None:
        while self.advance():
            pass

    # Program

    def attempt(self, action: Callable[[], T]) -> T:
        while True:
            try:
                return action()
            except RingFull as now_full:
                full = now_full
            assert 0 < full.occupancy <= full.capacity
            assert self.advance(), f"{full}, with nothing left to run"

    def step(self, step: task_programs.Step) -> None:
        for _ in range(self.rng.randrange(4)):
            self.advance()
            self.check_rings()
        if isinstance(step, Open):
            self.engine.open_scope(manual=step.manual)
            self.scopes.append((self.num_scopes, step.manual))
            self.num_scopes += 1
        elif isinstance(step, Close):
            if len(self.scopes) > 1:
                self.engine.close_scope()
                self.scopes.pop()
        elif isinstance(step, Alloc):
            self.alloc(step)
        else:
            self.submit(step)

    def alloc(self, step: Alloc) -> None:
        nbytes = 4 * step.columns
        try:
            block = self.attempt(lambda: self.engine.alloc(nbytes))
        except HeapRingDeadlock:
            self.drain()
            self.check_full(nbytes)
            return
        assert block.ring == min(len(self.scopes) - 1, 3)
        assert block.offset % 1024 == 0
        assert block.offset + nbytes <= self.sizes.heap[block.ring]
        self.blocks.append((self.scopes[-1][0], step.columns, block))

    def check_full(self, nbytes: int) -> None:
        """Everything has ended. Of the heap stays what follows the oldest block of an open scope."""
        ring = min(len(self.scopes) - 1, 3)
        capacity, size = self.sizes.heap[ring], -(-nbytes // 1024) * 1024
        open_scopes = {number for number, _ in self.scopes}
        blocks = [(scope, block) for scope, _, block in self.blocks if block.ring == ring]
        while blocks and blocks[0][0] not in open_scopes:
            blocks.pop(0)
        if not blocks:
            assert size > capacity
            return
        oldest, newest = blocks[0][1], blocks[-1][1]
        begin, end = oldest.offset, newest.offset + -(-max(newest.nbytes, 1) // 1024) * 1024
        if newest.offset >= begin:
            assert max(capacity - end, begin) < size
        else:
            assert begin - end < size

    def submit(self, work: Work) -> None:
        open_scopes = {number for number, _ in self.scopes}
        mine = [(columns, block) for scope, columns, block in self.blocks if scope in open_scopes]
        manual = self.scopes[-1][1]
        touched: list[tuple[Tag, list[Byte]]] = []
        accesses: list[Access] = []
        places: list[tuple[int, ...]] = []
        for use in work.uses:
            index = use.block(len(mine))
            if index is None:
                space: object = "ab"[use.space % 2]
                accesses.append(Access(use.tag, space, use.ranges()))
                places.append(())
            else:
                columns, block = mine[index]
                space = id(block)
                accesses.append(Access(use.tag, block, use.ranges(columns)))
                places.append((block.ring, block.offset, id(block)))
            touched.append((use.tag, [(space, row, column) for row, column in use.cells()]))
        number = len(self.works)
        given, needed = self.books.edges(touched, manual=manual)
        after = {number - ago for ago in work.after if ago <= number}
        if self.repair:
            after |= needed - given
        ids = {known: task for task, known in self.numbers.items()}
        expected = given | after
        try:
            task = self.attempt(
                lambda: self.engine.submit(
                    accesses, after=[ids[known] for known in sorted(after)], members=work.members, label=str(number)
                )
            )
        except NumberedError as error:
            self.drain()
            self.check_deadlock(error, max(0, len(expected) - self.inline))
            return
        assert {self.numbers[before] for before in self.engine.predecessors(task)} == expected
        assert self.engine.label(task) == str(number)
        self.numbers[task] = number
        self.works.append((work, touched, places))
        self.edges.append(expected)
        self.waited.append(expected - self.states.keys())
        self.places.append((min(len(self.scopes) - 1, 3), self.scopes[-1][0]))
        self.books.add(number, touched, manual=manual)

    def check_deadlock(self, error: NumberedError, deps: int) -> None:
        """Everything has ended. Of the ring stays what follows the oldest task of an open scope."""
        ring = min(len(self.scopes) - 1, 3)
        open_scopes = {number for number, _ in self.scopes}
        stays = [number for number, (where, _) in enumerate(self.places) if where == ring]
        while stays and self.places[stays[0]][1] not in open_scopes:
            stays.pop(0)
        if isinstance(error, DepPoolOverflow):
            held = sum(max(0, len(self.edges[number]) - self.inline) for number in stays)
            assert held + deps > self.sizes.dep_pool[ring]
        else:
            assert len(stays) >= self.sizes.task_window[ring] - 1
            is_own = self.places[stays[0]][1] == self.scopes[-1][0]
            assert isinstance(error, ScopeDeadlock if is_own else FlowControlDeadlock)

    def check_rings(self) -> None:
        """Each ring holds what it should: everything from the oldest task or block on that somebody still needs."""
        self.take_failed()
        open_scopes = {number for number, _ in self.scopes}
        needed = {before for number, waited in enumerate(self.waited) if number not in self.states for before in waited}
        used = {
            place[-1]
            for number, (_, _, places) in enumerate(self.works)
            if number not in self.states
            for place in places
            if place
        }
        for ring, use in enumerate(self.engine.occupancy()):
            tasks = [number for number, (where, _) in enumerate(self.places) if where == ring]
            while tasks and tasks[0] in self.states.keys() - needed and self.places[tasks[0]][1] not in open_scopes:
                tasks.pop(0)
            blocks = [(scope, block) for scope, _, block in self.blocks if block.ring == ring]
            while blocks and id(blocks[0][1]) not in used and blocks[0][0] not in open_scopes:
                blocks.pop(0)
            assert use.tasks == len(tasks)
            assert use.heap_bytes == sum(-(-max(block.nbytes, 1) // 1024) * 1024 for _, block in blocks)
            assert use.dep_entries == sum(max(0, len(self.edges[number]) - self.inline) for number in tasks)

    # Outcome

    def check(self) -> None:
        self.engine.finish()
        self.drain()
        engine = self.engine
        assert engine.is_drained
        assert engine.submitted == engine.consumed == len(self.works) == engine.completed + engine.failed
        assert all(engine.state(task) is TaskState.FREE for task in self.numbers)
        for use in engine.occupancy():
            assert (use.tasks, use.heap_bytes, use.dep_entries) == (0, 0, 0)

        expected: dict[int, str] = {}
        for number, (work, _, _) in enumerate(self.works):
            is_hit = any(expected[before] != "ok" for before in self.edges[number])
            expected[number] = "aborted" if is_hit else "failed" if work.fails else "ok"
        assert self.states == expected
        if "failed" in expected.values():
            assert str(engine.first_error).startswith("task ")
            return
        if self.repair:
            assert (self.snapshots, self.memory) == self.sequential()

    def sequential(self) -> tuple[dict[int, list[object]], dict[object, object]]:
        """What each task reads, and what is there in the end, if tasks run one after another in their own memory."""
        snapshots: dict[int, list[object]] = {}
        own: dict[Byte, object] = {}
        memory: dict[object, object] = {}
        for number, (_, touched, places) in enumerate(self.works):
            snapshots[number] = [own.get(byte) for byte, _ in self.touching(touched, places, READING)]
            for byte, place in self.touching(touched, places, WRITING):
                own[byte] = memory[place] = (byte, number, hash(tuple(snapshots[number])))
        return snapshots, memory


def run(
    program: list[task_programs.Step],
    sizes: RingSizes,
    rng: random.Random,
    *,
    track_war: bool,
    repair: bool,
    inline: int,
) -> None:
    with mock.patch.object(engine_module, "INLINE_FAN_IN", inline):
        world = World(sizes, rng, track_war=track_war, repair=repair, inline=inline)
        for step in program:
            world.step(step)  # one that is refused is left out, and the program goes on
        world.check()


@pytest.mark.slow
@settings(deadline=None, print_blob=True, max_examples=300)
@given(
    task_programs.steps(may_fail=False),
    task_programs.sizes(),
    st.integers(0, 2**32).map(random.Random),
    st.booleans(),
    st.sampled_from([0, 1, 64]),
)
@pytest.mark.guarantee("G1")
def test_any_order_of_execution_ends_as_program_order_does(
    program: list[task_programs.Step], sizes: RingSizes, rng: random.Random, track_war: bool, inline: int
) -> None:
    run(program, sizes, rng, track_war=track_war, repair=True, inline=inline)


@pytest.mark.slow
@settings(deadline=None, print_blob=True, max_examples=300)
@given(
    task_programs.steps(may_fail=True),
    task_programs.sizes(),
    st.integers(0, 2**32).map(random.Random),
    st.booleans(),
    st.sampled_from([0, 1, 64]),
)
@pytest.mark.guarantee("G2")
def test_a_failure_takes_with_it_exactly_what_depends_on_it_and_everything_drains(
    program: list[task_programs.Step], sizes: RingSizes, rng: random.Random, track_war: bool, inline: int
) -> None:
    run(program, sizes, rng, track_war=track_war, repair=False, inline=inline)
