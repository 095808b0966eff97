"""Time the Qwen3 programs on a real chip, without anything around them, and what the machine would allow.

Owns: one chip for the life of a ``KernelBench``. Timed as engines are compared elsewhere: 10 decode steps after 2 warm
ones, 4 prefills after 1. A step is all of it: layers, final norm, head, greedy choice.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import TextIO

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError
from .cpu import CpuChip
from .diagnosis import RunGraph, run_of_launches
from .dispatch import Completion, LaunchConfig, Usage
from .native import why_not
from .program import DTYPE_BYTES
from .qwen3.model import ModelSpec
from .qwen3.step import (
    DecodeRow,
    Limits,
    ModelPrograms,
    PrefillRow,
    SampleRow,
    StepInput,
    build_step,
    read_step,
)

__all__ = ["KernelBench", "Roofline", "Timing", "Work", "line_server"]

_CONTEXT = 128  # tokens of context a decode step starts from unless said
_PAGE_SIZE = 128
_MAX_BATCH = 64
_MAX_LENGTH = 8192
_NUM_PAGES = 2 * _MAX_BATCH  # all rows at a context of 128, or one of 8192
_ROUNDS = {"decode": (10, 2), "prefill": (4, 1)}  # timed, warm

_READ_BYTES = 512 << 20  # larger than any cache one virtual machine is given to itself
_GEMM = 2048


@attrs.frozen
class Work:
    """A step to time: ``decode`` of ``size`` rows of ``context`` tokens each, or ``prefill`` of ``size`` tokens."""

    name: str
    size: int
    context: int = 0

    @classmethod
    def parse(cls, line: str) -> Work:
        """Of "decode BATCH", "decode BATCH CONTEXT" or "prefill TOKENS"; ``ConfigError`` for anything else."""
        name, *numbers = line.split() or [""]
        most = {"decode": 2, "prefill": 1}.get(name, 0)
        if not 1 <= len(numbers) <= most or not all(number.isdecimal() for number in numbers):
            raise ConfigError(f"{line.strip()!r}: expected 'decode BATCH [CONTEXT]' or 'prefill TOKENS'")
        size, context = [*map(int, numbers), _CONTEXT if name == "decode" else 0][:2]
        return cls(name, size, context)

    @property
    def attended(self) -> int:
        """Pairs of a token and one it attends to, itself included."""
        return self.size * (self.context + 1) if self.name == "decode" else self.size * (self.size + 1) // 2

    @property
    def positions(self) -> int:
        """Of all rows together: whose keys and values are read."""
        return self.attended if self.name == "decode" else self.size

    def __str__(self) -> str:
        at = f" at {self.context}" if self.name == "decode" and self.context != _CONTEXT else ""
        return f"{self.name} {self.size}{at}"


@attrs.frozen
class Timing:
    """Equal steps, timed one after another."""

    took_s: tuple[float, ...]
    usages: tuple[Usage, ...]
    """Of the graphs of each step."""

    @property
    def seconds(self) -> float:
        """Of a step, in the middle."""
        return statistics.median(self.took_s)

    @property
    def kernel_seconds(self) -> float:
        """Of its kernels alone, in the middle: what the engine ran, nothing around it."""
        return statistics.median(usage.run_ns for usage in self.usages) / 1e9


@attrs.frozen(kw_only=True)
class Roofline:
    """What the machine allows a model's steps, from two figures measured on it and what is counted in the model."""

    read_bytes_per_s: float
    """Reading memory on all threads, nothing computed but a sum: the packed weights, where the native engine has them.
    """
    flop_per_s: float
    """A product of two square matrices of 2048 in the model's dtype, by torch; other kernels may beat it."""
    weight_bytes: int
    """Read once per step, whatever its batch: layers and head."""
    position_bytes: int
    """Keys and values of one position, all layers."""
    layer_flop: float
    """Of one token through all layers' linears."""
    head_flop: float
    """Of one row of logits."""
    pair_flop: float
    """Of one token that attends to one position, all layers."""

    def seconds(self, work: Work) -> float:
        """The least a step can take: reading everything once, or computing it."""
        logits = work.size if work.name == "decode" else 1
        computed = work.size * self.layer_flop + logits * self.head_flop + work.attended * self.pair_flop
        read = self.weight_bytes + work.positions * self.position_bytes
        return max(read / self.read_bytes_per_s, computed / self.flop_per_s)

    def fraction(self, work: Work, seconds: float) -> float:
        """How much of it a step that took ``seconds`` reached."""
        return self.seconds(work) / seconds


class KernelBench:
    """A checkpoint's programs on one cpu chip, with a fixed set of pages per row.

    weights: what matrices are kept in, "int8" or "" for ``dtype``. isa: see ``CpuChip``; an instruction set that cannot
    be had is a ``ConfigError`` here.
    """

    def __init__(
        self, checkpoint: str | Path, threads: int, dtype: str = "bfloat16", *, weights: str = "", isa: str = ""
    ) -> None:
        if isa not in ("", "none") and why_not(isa):
            raise ConfigError(f"the native engine cannot run here: {why_not(isa)}")
        spec = ModelSpec.from_directory(checkpoint, dtype)
        self.context = min(_MAX_LENGTH, spec.max_context)
        """Tokens of the longest prompt it can time."""
        limits = Limits(
            max_num_seqs=_MAX_BATCH,
            max_num_batched_tokens=self.context,
            max_model_len=self.context,
            page_size=_PAGE_SIZE,
            num_pages=_NUM_PAGES,
        )
        self.threads = threads
        self._spec = spec
        self._programs = ModelPrograms.build(spec, limits, weights=weights)
        self._random = np.random.default_rng(0)
        self._chip = CpuChip(threads, isa=isa)
        self._dispatches = 1
        for program in self._programs.programs:
            self._chip.register(program)
        for tensor in self._programs.tensors:
            self._chip.alloc(tensor)

    @property
    def engine(self) -> str:
        """What runs the programs, and why."""
        return self._chip.engine

    def refused(self, work: Work) -> str:
        """Why that work cannot be timed here; "" if it can."""
        if work.name == "prefill":
            fits = 1 <= work.size <= self.context
            return "" if fits else f"{work}: the prompt must be 1 to {self.context} tokens"
        if not 1 <= work.size <= _MAX_BATCH:
            return f"{work}: the batch must be 1 to {_MAX_BATCH}"
        length = work.context + sum(_ROUNDS["decode"])
        if length > self.context:
            return f"{work}: the steps end at {length} tokens; the model takes {self.context}"
        pages = work.size * self._pages(length)
        return f"{work}: that takes {pages} KV pages; there are {_NUM_PAGES}" if pages > _NUM_PAGES else ""

    def measure(self, work: Work) -> Timing:
        """Time that work now; ``ConfigError`` if it is refused."""
        steps = self._steps(work)
        timed, warm = _ROUNDS[work.name]
        for step in itertools.islice(steps, warm):
            self._run(step)
        took, usages = [], []
        for step in itertools.islice(steps, timed):
            began = time.perf_counter()
            launches = self._run(step)
            took.append(time.perf_counter() - began)
            usages.append(reduce(add, (completion.usage for _, completion in launches)))
        return Timing(tuple(took), tuple(usages))

    def timeline(self, work: Work) -> RunGraph:
        """One such step, task by task, after a warm one."""
        steps = self._steps(work)
        self._run(next(steps))
        began = time.perf_counter_ns()
        launches = self._run(next(steps), LaunchConfig(timeline=True))
        later = [(at - began, completion) for at, completion in launches]
        return run_of_launches(str(work), later, self._chip.describe)

    def read_weights(self) -> float | None:
        """Seconds of reading all packed weights on the chip's cores, nothing computed; None without native engine."""
        read = self._read_packed()
        return read[1] if read else None

    def roofline(self) -> Roofline:
        """Measured now, on the chip's threads; compare only with steps measured right before or after."""
        spec = self._spec
        dtype: torch.dtype = getattr(torch, spec.dtype)
        attended = spec.num_heads * spec.head_dim
        kept = spec.num_kv_heads * spec.head_dim
        linears = spec.num_layers * spec.hidden_size * (2 * attended + 2 * kept + 3 * spec.intermediate_size)
        table = spec.vocab_size * spec.hidden_size
        packed = self._read_packed()
        if packed:
            weight_bytes = read_bytes = packed[0]
            read_s = _least(lambda: self._read_packed(), 5)
        else:
            weight_bytes, read_bytes = (linears + table) * DTYPE_BYTES[spec.dtype], _READ_BYTES
            memory = torch.from_numpy(np.ones(_READ_BYTES // 4, np.float32)).view(torch.get_num_threads(), -1)
            read_s = _least(lambda: memory.sum(1), 5)
        square = torch.ones(_GEMM, _GEMM, dtype=dtype)
        with torch.inference_mode():
            product_s = _least(lambda: square @ square, 5)
        return Roofline(
            read_bytes_per_s=read_bytes / read_s,
            flop_per_s=2 * _GEMM**3 / product_s,
            weight_bytes=weight_bytes,
            position_bytes=spec.page_bytes(1),
            layer_flop=2.0 * linears,
            head_flop=2.0 * table,
            pair_flop=4.0 * spec.num_layers * attended,
        )

    def close(self) -> None:
        """Give the chip back."""
        self._chip.close()

    def _read_packed(self) -> tuple[int, float] | None:
        native, weights = self._chip.native, self._programs.tensors[0].resident
        return native.read(weights) if native is not None and native.has(weights) else None

    def _pages(self, tokens: int) -> int:
        return -(-tokens // _PAGE_SIZE)

    def _steps(self, work: Work) -> Iterator[StepInput]:
        """Steps of that work one after another; what rows of a decode have before is computed ahead of the first."""
        if reason := self.refused(work):
            raise ConfigError(reason)
        greedy = tuple(SampleRow(row=row) for row in range(work.size if work.name == "decode" else 1))
        if work.name == "prefill":
            table = np.arange(self._pages(work.size), dtype=np.int32)
            while True:
                row = PrefillRow(tokens=self._tokens(work.size), start=0, block_table=table, row=0)
                yield StepInput(step_id=self._dispatches, prefills=(row,), samples=greedy)
        pages = self._pages(work.context + sum(_ROUNDS["decode"]))
        tables = [np.arange(row * pages, (row + 1) * pages, dtype=np.int32) for row in range(work.size)]
        for table in tables if work.context else ():
            row = PrefillRow(tokens=self._tokens(work.context), start=0, block_table=table, row=-1)
            self._run(StepInput(step_id=self._dispatches, prefills=(row,)))
        for position in itertools.count(work.context):
            tokens = self._tokens(work.size).tolist()
            decodes = tuple(
                DecodeRow(token=tokens[row], position=position, block_table=table, row=row)
                for row, table in enumerate(tables)
            )
            yield StepInput(step_id=self._dispatches, decodes=decodes, samples=greedy)

    def _tokens(self, count: int) -> NDArray[np.int32]:
        return self._random.integers(0, min(2000, self._spec.vocab_size), count, dtype=np.int32)

    def _run(self, step: StepInput, config: LaunchConfig | None = None) -> list[tuple[int, Completion]]:
        """When each dispatch of a step began, and what came back."""
        dispatches = build_step(self._programs, step, self._dispatches)
        self._dispatches += len(dispatches)
        launches = []
        for dispatch in dispatches:
            began = time.perf_counter_ns()
            launches.append((began, self._chip.launch(attrs.evolve(dispatch, config=config) if config else dispatch)))
        read_step(step, [completion for _, completion in launches])
        return launches


def line_server(bench: KernelBench, *, lines: Iterable[str] | None = None, out: TextIO | None = None) -> None:
    """Print ``ready``, then answer each line that ``Work.parse`` takes with the seconds of one step.

    A line that asks for anything else is answered ``nan`` and the reason, so that a comparison goes on without it.
    """
    lines, out = lines or sys.stdin, out or sys.stdout
    print("ready", file=out, flush=True)
    for line in lines:
        try:
            print(bench.measure(Work.parse(line)).seconds, file=out, flush=True)
        except ConfigError as error:
            print(f"nan {error}", file=out, flush=True)


def _least(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest: what the machine can do, not what it did beside others."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return min(took)
