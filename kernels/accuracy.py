"""How far a model's logits move when its matrices are kept in fewer bits, on texts drawn at random.

Owns nothing: the chips it opens are closed before it returns.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu import CpuChip
from .qwen3.model import ModelSpec
from .qwen3.step import DecodeRow, Limits, ModelPrograms, PrefillRow, SampleRow, StepInput, build_step

__all__ = ["LogitsError", "compare_logits"]

_TEXTS = 8
_TOKENS = 64  # of each text, of which the last _FOLLOW are computed one by one
_FOLLOW = 15
_PAGE = 16


@attrs.frozen(kw_only=True)
class LogitsError:
    """Of logits with ``weights``, against those with matrices in the dtype."""

    weights: str
    dtype: str
    positions: int
    """Logits compared, each over the whole vocabulary."""
    relative_rms: float
    """Root of the mean square of the difference, as a share of that of the logits."""
    largest: float
    """Difference of any logit."""
    divergence: float
    """Kullback-Leibler, of the distribution with ``weights`` from the other, in nats; the mean over the positions."""
    agreement: float
    """Share of positions with the same likeliest token."""

    def __str__(self) -> str:
        return (
            f"{self.weights} against {self.dtype} weights, logits at {self.positions} positions of random texts:"
            f" relative RMS error {self.relative_rms:.2%}, largest difference {self.largest:.3g},"
            f" KL divergence {self.divergence:.2g} nats, same likeliest token at {self.agreement:.1%}"
        )


def compare_logits(spec: ModelSpec, weights: str, threads: int, *, isa: str = "", seed: int = 0) -> LogitsError:
    """Compute the same positions with and without ``weights``; the same seed gives the same texts.

    Loads the model twice, one after the other. isa: as ``CpuChip`` takes it.
    """
    length = min(_TOKENS, spec.max_context)
    texts = np.random.default_rng(seed).integers(0, spec.vocab_size, (_TEXTS, length)).astype(np.int32)
    plain, kept = (_logits(spec, texts, wanted, threads, isa) for wanted in ("", weights))
    error = (kept - plain).double()
    divergences = []
    for ours, theirs in zip(kept, plain, strict=True):  # one by one: the vocabulary is long
        expected, found = (logits.double().log_softmax(-1) for logits in (theirs, ours))
        divergences.append(float((expected.exp() * (expected - found)).sum()))
    return LogitsError(
        weights=weights,
        dtype=spec.dtype,
        positions=len(plain),
        relative_rms=float(error.norm() / plain.double().norm()),
        largest=float(error.abs().max()),
        divergence=float(np.mean(divergences)),
        agreement=float((kept.argmax(-1) == plain.argmax(-1)).double().mean()),
    )


def _logits(spec: ModelSpec, texts: NDArray[np.int32], weights: str, threads: int, isa: str) -> Tensor:
    """(positions, vocabulary): after all but the last few tokens of each text, and after each of those."""
    count, length = texts.shape
    pages = -(-length // _PAGE)
    programs = ModelPrograms.build(spec, Limits(count, texts.size, length, _PAGE, count * pages), weights=weights)
    chip = CpuChip(threads, isa=isa)
    try:
        for program in programs.programs:
            chip.register(program)
        for tensor in programs.tensors:
            chip.alloc(tensor)
        logits = []
        for step in _steps(texts, pages):
            for dispatch in build_step(programs, step, 1):
                chip.launch(dispatch)
            logits.append(chip.tensor(programs.tensors[-1].resident).clone())
        return torch.cat(logits)
    finally:
        chip.close()


def _steps(texts: NDArray[np.int32], pages: int) -> Iterator[StepInput]:
    count, length = texts.shape
    prompt = max(1, length - _FOLLOW)
    tables = np.arange(count * pages, dtype=np.int32).reshape(count, pages)
    samples = tuple(SampleRow(row=row) for row in range(count))
    prefills = (
        PrefillRow(tokens=texts[row, :prompt], start=0, block_table=tables[row], row=row) for row in range(count)
    )
    yield StepInput(step_id=1, prefills=tuple(prefills), samples=samples)
    for at in range(prompt, length):
        decodes = (
            DecodeRow(token=int(texts[row, at]), position=at, block_table=tables[row], row=row) for row in range(count)
        )
        yield StepInput(step_id=1 + at, decodes=tuple(decodes), samples=samples)
