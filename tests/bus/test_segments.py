"""Shared memory: views without copies, stale handles, reuse, and the view from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import Arena, TensorRef
from chipbus.bus.segments import GRANULE_BYTES
from chipbus.errors import BusError, MailboxFull, PeerGone, StaleTensor
from support import descriptors

CHIP = ("chip.0.0", 1)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create("test", 100 * GRANULE_BYTES)
    yield arena
    arena.check_integrity()
    arena.close()


def filled(arena: Arena, value: float = 1.5, shape: tuple[int, ...] = (3, 5)) -> TensorRef:
    ref = arena.ref(arena.alloc(4 * int(np.prod(shape)), CHIP), "float32", shape)
    arena.view(ref)[...] = value
    return ref


def test_a_view_shows_and_changes_the_memory_itself(arena: Arena) -> None:
    ref = filled(arena)

    first, second = arena.view(ref), arena.view(ref)
    first[1, 2] = 7

    assert second[1, 2] == 7
    assert second.shape == (3, 5)
    assert np.shares_memory(first, second)


@pytest.mark.guarantee("B40")
def test_a_freed_blocks_handles_are_stale_also_when_its_memory_is_reused(arena: Arena) -> None:
    block = arena.alloc(100, CHIP)
    ref = arena.ref(block, "uint8", (100,))
    arena.free(block)
    with pytest.raises(StaleTensor, match="was freed"):
        arena.view(ref)

    again = arena.alloc(100, CHIP)

    assert again.offset == block.offset
    with pytest.raises(StaleTensor, match="was freed"):
        arena.view(ref)
    with pytest.raises(StaleTensor, match="freed already"):
        arena.free(block)


@pytest.mark.guarantee("B41")
def test_another_process_sees_the_same_memory_and_the_same_staleness() -> None:
    code = """
import sys
from chipbus.bus import Arena, TensorRef
from chipbus.errors import StaleTensor
arena = Arena.attach(int(sys.argv[1]), int(sys.argv[2]))
ref = TensorRef(arena=arena.id, generation=1, offset=int(sys.argv[3]), nbytes=16, dtype="int32", shape=(4,))
view = arena.view(ref)
print(view.tolist(), flush=True)
view *= 2
print("written", flush=True)
sys.stdin.readline()
try:
    arena.view(ref)
except StaleTensor as error:
    print(error)
"""
    arena = Arena.create("shared", GRANULE_BYTES)
    block = arena.alloc(16, CHIP)
    ref = arena.ref(block, "int32", (4,))
    arena.view(ref)[...] = [1, 2, 3, 4]
    command = [sys.executable, "-c", code, str(os.getpid()), str(arena.fd), str(block.offset)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "[1, 2, 3, 4]\n"
        assert process.stdout.readline() == "written\n"
        assert arena.view(ref).tolist() == [2, 4, 6, 8]
        arena.free(block)
        rest, _ = process.communicate("go\n", timeout=20)
    assert "was freed" in rest
    arena.close()


def test_an_attached_arena_only_views(arena: Arena) -> None:
    other = Arena.attach(os.getpid(), arena.fd)

    with pytest.raises(BusError, match="only the process that made"):
        other.alloc(1, CHIP)
    assert other.view(filled(arena)).sum() == 22.5
    other.close()


@pytest.mark.guarantee("B42")
def test_what_a_dead_life_held_is_freed_at_once(arena: Arena) -> None:
    before = arena.free_bytes
    mine = [arena.alloc(5000, CHIP) for _ in range(3)]
    others = arena.alloc(5000, ("chip.0.0", 2))

    assert arena.free_all(CHIP) == 3
    assert arena.free_bytes == before - others.nbytes
    for block in mine:
        with pytest.raises(StaleTensor):
            arena.view(arena.ref(block, "uint8", (1,)))
    assert arena.free_all(CHIP) == 0


def test_a_full_arena_says_what_is_free(arena: Arena) -> None:
    arena.alloc(arena.free_bytes - GRANULE_BYTES, CHIP)

    with pytest.raises(
        MailboxFull, match=f"no {2 * GRANULE_BYTES} bytes in one piece in the arena; {GRANULE_BYTES} are free"
    ):
        arena.alloc(2 * GRANULE_BYTES, CHIP)


def test_an_array_larger_than_its_block_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        arena.ref(arena.alloc(GRANULE_BYTES, CHIP), "float32", (GRANULE_BYTES,))


@pytest.mark.parametrize(
    "changes",
    [
        {"arena": 1}, {"offset": 0}, {"offset": 1}, {"offset": 2**62}, {"offset": -GRANULE_BYTES}, {"generation": 0},
        {"nbytes": 61}, {"shape": (3, 6)}, {"shape": (2**40, 2**40)}, {"shape": (-1, -15)}, {"dtype": "nonsense"},
        {"dtype": "O"}, {"dtype": "i4,,"}, {"nbytes": 2**50, "shape": (2**48,)},
    ],
    ids=str,
)  # fmt: skip
def test_a_handle_with_a_wrong_field_is_stale(arena: Arena, changes: dict[str, object]) -> None:
    ref = filled(arena)

    with pytest.raises(StaleTensor):
        arena.view(attrs.evolve(ref, **changes))


def test_an_empty_array_is_an_array(arena: Arena) -> None:
    assert arena.view(arena.ref(arena.alloc(0, CHIP), "float32", (0, 4))).shape == (0, 4)


def test_what_is_no_arena_is_not_attached(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(PeerGone, match="descriptor 99999"):
        Arena.attach(os.getpid(), 99999)
    for size in (0, 10, 2 * GRANULE_BYTES):
        fd = os.memfd_create("other")
        os.ftruncate(fd, size)
        with pytest.raises(BusError, match="is no arena"):
            Arena.attach(os.getpid(), fd)
        os.close(fd)
    with pytest.raises(ValueError, match="above 0"):
        Arena.create("empty", 0)


def test_a_closed_arena_leaves_no_descriptor_and_its_views_stay_readable() -> None:
    before = descriptors()
    arena = Arena.create("short", GRANULE_BYTES)
    ref = filled(arena)
    view = arena.view(ref)
    arena.close()
    arena.close()

    assert view.sum() == 22.5
    with pytest.raises(StaleTensor, match="closed"):
        arena.view(ref)
    with pytest.raises(BusError):
        arena.alloc(1, CHIP)
    del view
    assert descriptors() == before


def test_the_size_is_sealed(arena: Arena) -> None:
    for size in (0, 10**9):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)


@settings(deadline=None, print_blob=True, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40 * GRANULE_BYTES)), max_size=40))
def test_blocks_never_overlap_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    arena = Arena.create("random", 60 * GRANULE_BYTES)
    total = arena.free_bytes
    held: dict[TensorRef, object] = {}
    for number, (is_alloc, size) in enumerate(steps):
        if is_alloc:
            try:
                block = arena.alloc(size, CHIP)
            except MailboxFull:
                continue
            ref = arena.ref(block, "uint8", (block.nbytes,))
            arena.view(ref)[...] = number
            held[ref] = block
        elif held:
            ref = list(held)[size % len(held)]
            arena.free(held.pop(ref))  # type: ignore[arg-type]
        arena.check_integrity()
    for ref in held:
        assert len(set(arena.view(ref).tolist())) == 1

    arena.free_all(CHIP)

    assert arena.free_bytes == total
    arena.check_integrity()
    arena.close()
