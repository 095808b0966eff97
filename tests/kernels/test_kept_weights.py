"""Packed weights in a memory file outlive their chip: used if whole and the same, else packed afresh."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
from kernel_runs import RunningModel
from native_runs import NEEDS_NATIVE

from chipbus.errors import MemoryExhausted
from chipbus.kernels.checkpoint import read_tensors
from chipbus.kernels.chips import Kept
from chipbus.kernels.cpu import CpuChip

pytestmark = NEEDS_NATIVE

Checkpoints = Callable[[str], Path]
PROMPTS = [[5, 6, 7], [9] * 20]


@attrs.frozen
class Life:
    """What one chip said of its weights, and what it computed: tokens, and digests of all it wrote."""

    told: list[str]
    tokens: list[list[int]]
    digests: list[tuple[bytes, ...]]


def live(file: int | None, checkpoint: Path, dtype: str = "bfloat16", weights: str = "") -> Life:
    """Open a chip, load, compute a little, close it."""
    told: list[str] = []
    chip = CpuChip(1, kept=None if file is None else Kept(file, told.append))
    running = RunningModel(checkpoint, dtype, chip=chip, weights=weights)
    running.digest = True
    tokens = running.greedy(PROMPTS, 3)
    chip.close()
    return Life(told, tokens, [completion.digests for completion in running.completions])


@contextmanager
def memory_file() -> Iterator[int]:
    """What a supervisor keeps for a chip."""
    number = os.memfd_create("chipbus-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    yield number
    os.close(number)


@pytest.fixture
def file() -> Iterator[int]:
    with memory_file() as number:
        yield number


def content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def overwrite_matrices(checkpoint: Path) -> None:
    """Zero the first bytes of every matrix, which the fingerprint does not look at."""
    for tensor in read_tensors(checkpoint).values():
        if tensor.name.endswith("_proj.weight"):
            with tensor.file.open("r+b") as stored:
                stored.seek(tensor.begin)
                stored.write(bytes(128))


@pytest.mark.parametrize(("dtype", "weights"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "int8")])
@pytest.mark.parametrize("shape", ["tied", "bias-no-groups"])
@pytest.mark.guarantee("K50")
def test_packed_weights_that_are_there_are_used_without_reading_a_matrix(
    shape: str, dtype: str, weights: str, checkpoint: Checkpoints, file: int, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(checkpoint(shape), tmp_path / "mine"))
    first = live(file, mine, dtype, weights)
    packed = content(file)
    overwrite_matrices(mine)

    second, third = live(file, mine, dtype, weights), live(file, mine, dtype, weights)

    assert first.told == ["packed: nothing is there yet"]
    assert second.told == third.told == ["mapped"]
    assert first.digests == second.digests == third.digests
    assert content(file) == packed
    assert live(None, mine, dtype, weights).digests != first.digests


@attrs.frozen
class Scene:
    """A finished file, one that is empty still, and the model of both."""

    whole: int
    flawed: int
    checkpoint: Checkpoints
    tmp_path: Path

    def write(self, found: bytes, *, and_seal: bool = True) -> None:
        os.write(self.flawed, found)
        if and_seal:
            fcntl.fcntl(self.flawed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def cut_off(scene: Scene) -> None:
    scene.write(content(scene.whole))
    os.ftruncate(scene.flawed, os.fstat(scene.flawed).st_size - mmap.PAGESIZE)


def not_finished(scene: Scene) -> None:
    scene.write(content(scene.whole), and_seal=False)


def zeros(scene: Scene) -> None:
    scene.write(bytes(os.fstat(scene.whole).st_size))


def mislabelled(scene: Scene, byte: int) -> None:
    changed = bytearray(content(scene.whole))
    changed[changed.rindex(b"chipbus weights") + byte] ^= 1
    scene.write(changed)


def of_fine_tuned_weights(scene: Scene) -> None:
    """The same shapes, and other numbers."""
    tuned = Path(shutil.copytree(scene.checkpoint("tied"), scene.tmp_path / "tuned"))
    tensor = read_tensors(tuned)["model.layers.0.mlp.up_proj.weight"]
    with tensor.file.open("r+b") as stored:
        stored.seek((tensor.begin + tensor.end) // 2)
        stored.write(bytes(64))
    live(scene.flawed, tuned)


def of(shape: str, dtype: str = "bfloat16", weights: str = "") -> Callable[[Scene], object]:
    return lambda scene: live(scene.flawed, scene.checkpoint(shape), dtype, weights)


FLAWS: dict[str, tuple[Callable[[Scene], object], str]] = {
    "cut off": (cut_off, "bytes and should have"),
    "not finished": (not_finished, "was not finished"),
    "zeros": (zeros, "other weights"),
    "fine-tuned": (of_fine_tuned_weights, "other weights"),
    "other model": (of("wide-heads"), "bytes and should have|other weights"),
    "other dtype": (of("tied", "float32"), "bytes and should have|other weights"),
    "int8": (of("tied", weights="int8"), "bytes and should have|other weights"),
    **{f"label, byte {byte}": (partial(mislabelled, byte=byte), "other weights") for byte in (0, 17, 18, 26, 57)},
}


@pytest.mark.parametrize("name", FLAWS)
@pytest.mark.guarantee("K51")
def test_packed_weights_with_any_flaw_are_packed_afresh_and_it_is_said_why(
    name: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    spoil, words = FLAWS[name]
    with memory_file() as whole, memory_file() as flawed:
        sound = live(whole, checkpoint("tied"))
        spoil(Scene(whole, flawed, checkpoint, tmp_path))
        was_sealed = fcntl.fcntl(flawed, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE

        first, second = live(flawed, checkpoint("tied")), live(flawed, checkpoint("tied"))

        assert re.fullmatch(f"packed: what is there.*({words}).*", first.told[0])
        assert first.digests == second.digests == sound.digests
        if was_sealed:  # nothing can be written there any more, so that chip had memory of its own
            assert (os.fstat(flawed).st_size, second.told) == (0, ["packed: nothing is there yet"])
        else:
            assert (content(flawed), second.told) == (content(whole), ["mapped"])


DIES = """
import os, signal, sys
from chipbus.kernels.chips import Kept
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.program import TensorSpec
def report(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
chip = CpuChip(1, kept=Kept(int(sys.argv[1]), print))
chip.alloc(TensorSpec(1, "bfloat16", source=sys.argv[2]), report)
"""


@pytest.mark.slow
@pytest.mark.guarantee("K52")
def test_what_a_chip_left_that_was_killed_while_packing_is_not_used(checkpoint: Checkpoints, file: int) -> None:
    mine = checkpoint("tied")
    died = subprocess.run([sys.executable, "-c", DIES, str(file), str(mine)], pass_fds=[file], timeout=60, check=False)
    assert died.returncode == -9
    assert os.fstat(file).st_size > 0

    first, second = live(file, mine), live(file, mine)

    assert (first.told, second.told) == (["packed: what is there was not finished"], ["mapped"])
    assert first.digests == second.digests == live(None, mine).digests


@pytest.mark.guarantee("K53")
def test_finished_weights_cannot_be_changed_by_anyone(checkpoint: Checkpoints, file: int) -> None:
    live(file, checkpoint("tied"))
    size = os.fstat(file).st_size

    opened_again = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    for number in (file, opened_again):
        with pytest.raises(PermissionError):
            os.pwrite(number, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(number, size)
        with pytest.raises(PermissionError):
            os.ftruncate(number, 2 * size)
    os.close(opened_again)


@pytest.mark.guarantee("K54")
def test_closing_a_chip_keeps_its_weights_and_freeing_them_gives_the_memory_back(
    checkpoint: Checkpoints, file: int
) -> None:
    told: list[str] = []
    for _ in range(2):
        chip = CpuChip(1, kept=Kept(file, told.append))
        running = RunningModel(checkpoint("tied"), "bfloat16", chip=chip)
        [weights] = [tensor for tensor in running.programs.tensors if tensor.source]
        chip.close()
    assert told == ["packed: nothing is there yet", "mapped"]
    assert os.fstat(file).st_blocks > 0

    chip = CpuChip(1, kept=Kept(file, told.append))
    chip.alloc(weights)
    chip.free(weights.resident)

    assert os.fstat(file).st_blocks == 0
    chip.alloc(weights)  # in memory of its own
    chip.close()
    assert os.fstat(file).st_blocks == 0


def test_a_load_that_fails_leaves_no_memory_taken(checkpoint: Checkpoints, file: int) -> None:
    chip = CpuChip(1, kept=Kept(file, lambda _: None))
    [weights] = [t for t in RunningModel(checkpoint("tied"), "bfloat16").programs.tensors if t.source]

    def interrupt(done: float, total: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        chip.alloc(weights, interrupt)
    assert os.fstat(file).st_blocks == 0
    chip.close()


def test_a_file_still_mapped_to_write_elsewhere_serves_this_chip_alone(checkpoint: Checkpoints, file: int) -> None:
    """A stray process of an earlier life: what it writes may never reach a later one."""
    os.ftruncate(file, 1)
    stray = mmap.mmap(file, 1)

    first, second = live(file, checkpoint("tied")), live(file, checkpoint("tied"))

    not_finished = "packed: what is there was not finished"
    assert [told.partition(":")[0] for told in first.told] == ["packed", "not kept for the next chip"]
    assert second.told[0] == not_finished
    assert first.digests == second.digests
    stray.close()


def test_what_is_no_memory_file_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as ordinary:
        ordinary.write(b"x")
        ordinary.flush()
        with pytest.raises(MemoryExhausted, match="Invalid argument"):
            live(ordinary.fileno(), checkpoint("tied"))
