"""Time the Qwen3 programs on a real chip, without anything around them, and what the machine would allow.

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

import attrs
import numpy as np
import torch

from ..errors import ConfigError
from .chips import open_chip
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

__all__ = ["KernelBench", "Roofline", "line_server"]

_CONTEXT = 128  # tokens of context a decode step starts from
_PAGE_SIZE = 128
_MAX_BATCH = 64
_MAX_PREFILL = 8192


_READ_BYTES = 512 << 20  # larger than any cache one virtual machine is given to itself
_GEMM = 2048


@attrs.frozen(kw_only=True)
class Roofline:
    """What the machine allows a model's steps, from two figures measured on it and two counted in the model."""

    read_bytes_per_s: float
    """Reading memory on all threads, nothing computed but a sum."""
    flop_per_s: float
    """A product of two square matrices of 2048 in the model's dtype."""
    weight_bytes: int
    """Read once per step, whatever its batch: layers and head."""
    layer_flop: float
    """Of one token through all layers' linears."""
    head_flop: float
    """Of one row of logits."""

    def seconds(self, work: str, count: int) -> float:
        """The least a step can take: ``decode`` of ``count`` rows, or ``prefill`` of ``count`` tokens of one row.

        Attention is not counted, so long prompts reach less of it.
        """
        logits = count if work == "decode" else 1
        computed = (count * self.layer_flop + logits * self.head_flop) / self.flop_per_s
        return max(self.weight_bytes / self.read_bytes_per_s, computed)

    def fraction(self, work: str, count: int, seconds: float) -> float:
        """How much of it a step that took ``seconds`` reached."""
        return self.seconds(work, count) / seconds


class KernelBench:
    """A checkpoint's programs on one cpu chip, with a fixed set of pages per row."""

    def __init__(self, checkpoint: str | Path, threads: int, dtype: str = "bfloat16") -> None:
        spec = ModelSpec.from_directory(checkpoint, dtype)
        self.context = min(_MAX_PREFILL, spec.max_context)
        """Tokens of the longest prompt it can time."""
        self._pages_per_row = 2  # 128 tokens of context and the steps after it
        pages = max(_MAX_BATCH * self._pages_per_row, -(-self.context // _PAGE_SIZE))
        limits = Limits(
            max_num_seqs=_MAX_BATCH,
            max_num_batched_tokens=max(_MAX_BATCH * _CONTEXT, self.context),
            max_model_len=self.context,
            page_size=_PAGE_SIZE,
            num_pages=pages,
        )
        self._spec = spec
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
        if not 1 <= tokens <= self.context:
            raise ConfigError(f"prefill {tokens}: the prompt must be 1 to {self.context} tokens")
        table = self._table(0, -(-tokens // _PAGE_SIZE))

        def step() -> None:
            row = PrefillRow(tokens=self._tokens(tokens), start=0, block_table=table, row=0)
            self._step(prefills=(row,), samples=(SampleRow(row=0),))

        return _median(step, 4, 1)

    def roofline(self) -> Roofline:
        """Measured now, on the chip's threads; compare only with steps measured right before or after."""
        spec = self._spec
        dtype: torch.dtype = getattr(torch, spec.dtype)
        memory = torch.from_numpy(np.ones(_READ_BYTES // 4, np.float32)).view(torch.get_num_threads(), -1)
        square = torch.ones(_GEMM, _GEMM, dtype=dtype)
        with torch.inference_mode():
            read_s = _least(lambda: memory.sum(1), 5)
            product_s = _least(lambda: square @ square, 5)
        table = spec.vocab_size * spec.hidden_size
        attended = spec.num_heads * spec.head_dim
        kept = spec.num_kv_heads * spec.head_dim
        linears = spec.num_layers * spec.hidden_size * (2 * attended + 2 * kept + 3 * spec.intermediate_size)
        return Roofline(
            read_bytes_per_s=_READ_BYTES / read_s,
            flop_per_s=2 * _GEMM**3 / product_s,
            weight_bytes=(linears + table) * DTYPE_BYTES[spec.dtype],
            layer_flop=2.0 * linears,
            head_flop=2.0 * table,
        )

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


def _least(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest: what the machine can do, not what it did beside others."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return min(took)


def _median(call: Callable[[], object], rounds: int, warm: int) -> float:
    for _ in range(warm):
        call()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
