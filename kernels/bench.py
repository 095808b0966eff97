"""Time the Qwen3 programs on a real chip, without anything around them.

Owns: one chip for the life of a ``KernelBench``. Timed as engines are compared elsewhere: the median of 10 decode steps
after 2 warm ones, of 4 prefills after 1. A step is all of it: layers, final norm, head, greedy choice.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import numpy as np

from ..errors import ConfigError
from .chips import open_chip
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

__all__ = ["KernelBench", "line_server"]

_CONTEXT = 128  # tokens of context a decode step starts from
_PAGE_SIZE = 128
_MAX_BATCH = 64
_MAX_PREFILL = 8192


class KernelBench:
    """A checkpoint's programs on one cpu chip, with a fixed set of pages per row."""

    def __init__(self, checkpoint: str | Path, threads: int, dtype: str = "bfloat16") -> None:
        spec = ModelSpec.from_directory(checkpoint, dtype)
        self._context = min(_MAX_PREFILL, spec.max_context)
        self._pages_per_row = 2  # 128 tokens of context and the steps after it
        pages = max(_MAX_BATCH * self._pages_per_row, -(-self._context // _PAGE_SIZE))
        limits = Limits(
            max_num_seqs=_MAX_BATCH,
            max_num_batched_tokens=max(_MAX_BATCH * _CONTEXT, self._context),
            max_model_len=self._context,
            page_size=_PAGE_SIZE,
            num_pages=pages,
        )
        self._programs = ModelPrograms.build(spec, limits)
        self._vocab = spec.vocab_size
        self._random = np.random.default_rng(0)
        self._chip = open_chip("cpu:0", threads)
        self._dispatches = 1
        for program in self._programs.programs:
            self._chip.register(program)
        for tensor in self._programs.tensors:
            self._chip.alloc(tensor)

    def decode(self, batch: int) -> float:
        """Seconds of one decode step of ``batch`` rows, from a context of 128 tokens on."""
        if not 1 <= batch <= _MAX_BATCH:
            raise ConfigError(f"decode {batch}: the batch must be 1 to {_MAX_BATCH}")
        tables = [self._table(row * self._pages_per_row, self._pages_per_row) for row in range(batch)]
        self._step(
            prefills=tuple(
                PrefillRow(tokens=self._tokens(_CONTEXT), start=0, block_table=table, row=row)
                for row, table in enumerate(tables)
            )
        )
        samples = tuple(SampleRow(row=row) for row in range(batch))
        position = _CONTEXT

        def step() -> None:
            nonlocal position
            tokens = self._tokens(batch).tolist()
            self._step(
                decodes=tuple(
                    DecodeRow(token=tokens[row], position=position, block_table=tables[row], row=row)
                    for row in range(batch)
                ),
                samples=samples,
            )
            position += 1

        return _median(step, 10, 2)

    def prefill(self, tokens: int) -> float:
        """Seconds from ``tokens`` prompt tokens of one row to its first token."""
        if not 1 <= tokens <= self._context:
            raise ConfigError(f"prefill {tokens}: the prompt must be 1 to {self._context} tokens")
        table = self._table(0, -(-tokens // _PAGE_SIZE))

        def step() -> None:
            row = PrefillRow(tokens=self._tokens(tokens), start=0, block_table=table, row=0)
            self._step(prefills=(row,), samples=(SampleRow(row=0),))

        return _median(step, 4, 1)

    def close(self) -> None:
        """Give the chip back."""
        self._chip.close()

    def _tokens(self, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return self._random.integers(0, min(2000, self._vocab), count, dtype=np.int32)

    def _table(self, first: int, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.arange(first, first + count, dtype=np.int32)

    def _step(
        self,
        *,
        prefills: tuple[PrefillRow, ...] = (),
        decodes: tuple[DecodeRow, ...] = (),
        samples: tuple[SampleRow, ...] = (),
    ) -> None:
        step = StepInput(step_id=self._dispatches, prefills=prefills, decodes=decodes, samples=samples)
        dispatches = build_step(self._programs, step, self._dispatches)
        self._dispatches += len(dispatches)
        read_step(step, [self._chip.launch(dispatch) for dispatch in dispatches])


def line_server(
    checkpoint: str | Path, threads: int, *, lines: Iterable[str] | None = None, out: TextIO | None = None
) -> None:
    """Print ``ready``, then answer each line ``decode B`` or ``prefill T`` with the seconds of one step.

    A line that asks for anything else is answered ``nan`` and the reason, so that a comparison goes on without it.
    Raises ``CheckpointError`` before ``ready`` if the checkpoint cannot be used.
    """
    lines, out = lines or sys.stdin, out or sys.stdout
    bench = KernelBench(checkpoint, threads)
    try:
        print("ready", file=out, flush=True)
        for line in lines:
            words = line.split()
            work = {"decode": bench.decode, "prefill": bench.prefill}.get(words[0]) if len(words) == 2 else None
            try:
                if work is None or not words[1].isdecimal():
                    raise ConfigError(f"{line.strip()!r}: expected 'decode BATCH' or 'prefill TOKENS'")
                print(work(int(words[1])), file=out, flush=True)
            except ConfigError as error:
                print(f"nan {error}", file=out, flush=True)
    finally:
        bench.close()


def _median(call: Callable[[], object], rounds: int, warm: int) -> float:
    for _ in range(warm):
        call()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
