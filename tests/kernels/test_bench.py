"""The line server: ready, then one number per line, and a reason where there is none; what the machine would allow."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import attrs
import pytest
from native_runs import ENGINES

from chipbus.errors import ConfigError
from chipbus.kernels.bench import KernelBench, Work, line_server

MATRICES = 2 * 64 * (4 * 32 * 2 + 2 * 32 * 2 + 3 * 128)


@contextmanager
def benched(checkpoint: Path, **options: str) -> Iterator[KernelBench]:
    with closing(KernelBench(checkpoint, 1, **options)) as bench:
        yield bench


def test_lines_are_answered_with_seconds_or_a_reason(checkpoint: Callable[[str], Path]) -> None:
    refused = {
        "prefill 5000": "the prompt must be 1 to 1024 tokens",
        "decode x": "expected 'decode BATCH [CONTEXT]' or 'prefill TOKENS'",
        "dance": "expected 'decode BATCH [CONTEXT]' or 'prefill TOKENS'",
        "prefill 5 5": "expected 'decode BATCH [CONTEXT]' or 'prefill TOKENS'",
        "": "expected 'decode BATCH [CONTEXT]' or 'prefill TOKENS'",
        "decode 65": "the batch must be 1 to 64",
        "decode 1 1013": "the steps end at 1025 tokens; the model takes 1024",
        "decode 64 500": "that takes 256 KV pages; there are 128",
    }
    answered = ["decode 1", "decode 3", "prefill 70", "decode 2 300", "decode 1 0"]
    out = io.StringIO()
    with benched(checkpoint("tied")) as bench:
        line_server(bench, lines=iter(f"{line}\n" for line in [*answered, *refused]), out=out)
    ready, *answers = out.getvalue().splitlines()
    assert ready == "ready"
    assert all(0 < float(answer) < 60 for answer in answers[:5])
    assert all(math.isnan(float(answer.split()[0])) for answer in answers[5:])
    assert all(why in answer for why, answer in zip(refused.values(), answers[5:], strict=True))


@pytest.mark.parametrize("isa", ENGINES)
def test_a_timing_tells_each_step_and_what_its_kernels_took(isa: str, checkpoint: Callable[[str], Path]) -> None:
    with benched(checkpoint("tied"), isa=isa) as bench:
        assert bench.engine.startswith("torch" if isa == "none" else f"native, {isa}")
        timing = bench.measure(Work("decode", 2, 40))
    assert len(timing.took_s) == len(timing.usages) == 10
    assert all(usage.run_ns / 1e9 < took for usage, took in zip(timing.usages, timing.took_s, strict=True))
    assert min(timing.took_s) <= timing.seconds <= max(timing.took_s)
    assert 0 < timing.kernel_seconds < timing.seconds
    position = 2 * 2 * 2 * 32 * 2
    read = [usage.bytes_read for usage in timing.usages]
    assert [later - sooner for sooner, later in itertools.pairwise(read)] == [2 * position] * 9
    head = read[0] - 2 * MATRICES - 2 * 43 * position  # 40 before, 2 warm ones, itself
    assert 515 * 64 * 2 <= head <= (515 + 63) * 64 * 2  # panels of 64


def test_a_timeline_is_one_step_from_its_first_task_to_its_last(checkpoint: Callable[[str], Path]) -> None:
    with benched(checkpoint("tied")) as bench:
        run = bench.timeline(Work("decode", 1, 128))
        tasks = bench.measure(Work("decode", 1, 128)).usages[0].tasks
    assert run.name == "decode 1"
    assert len(run.tasks) == tasks
    assert [task.label for task in run.tasks].count("rms_norm") == 2 * 2 + 1  # the final norm is one of them
    began = [task.begin_ns for task in run.tasks if task.label == "store_rows"]
    assert len(began) == 3  # of the layers, the final norm and the head
    assert began == sorted(began, key=lambda ns: ns or 0)


def test_work_is_named_as_it_is_asked_for() -> None:
    assert str(Work.parse("decode 4\n")) == "decode 4"
    assert str(Work.parse("decode 1 4096")) == "decode 1 at 4096"
    assert str(Work.parse("prefill 128")) == "prefill 128"


def test_an_instruction_set_that_is_not_there_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="the native engine cannot run here: "):
        KernelBench(checkpoint("tied"), 1, isa="mmx")


@pytest.mark.parametrize("isa", ENGINES)
def test_the_roofline_is_the_slower_of_reading_everything_once_and_computing_it(
    isa: str, checkpoint: Callable[[str], Path]
) -> None:
    with benched(checkpoint("tied"), isa=isa) as bench:
        measured = bench.roofline()
        assert (bench.read_weights() is None) == (isa == "none")
    least = (MATRICES + 515 * 64) * 2
    assert measured.weight_bytes == least if isa == "none" else least <= measured.weight_bytes < least + 11 * 4096
    assert (measured.layer_flop, measured.head_flop) == (2 * MATRICES, 2 * 515 * 64)
    assert measured.position_bytes == 2 * 2 * 2 * 32 * 2
    assert measured.pair_flop == 4 * 2 * 4 * 32
    assert measured.read_bytes_per_s > 1e8
    assert measured.flop_per_s > 1e9
    slow_memory = attrs.evolve(measured, read_bytes_per_s=1e3, flop_per_s=1e12)
    one = Work("decode", 1, 128)
    assert slow_memory.seconds(one) == (measured.weight_bytes + 129 * measured.position_bytes) / 1e3
    assert slow_memory.fraction(one, 2 * slow_memory.seconds(one)) == 0.5
    slow_cores = attrs.evolve(measured, read_bytes_per_s=1e12, flop_per_s=1e6)
    linears = 10 * measured.layer_flop
    assert slow_cores.seconds(Work("prefill", 10)) == (linears + measured.head_flop + 55 * measured.pair_flop) / 1e6
    decode = (linears + 10 * measured.head_flop + 1290 * measured.pair_flop) / 1e6
    assert slow_cores.seconds(Work("decode", 10, 128)) == decode
