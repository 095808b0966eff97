"""A model on one chip, driven step by step the way a replica core would, for tests that look at programs alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from chipbus.kernels.chips import Chip, open_chip
from chipbus.kernels.dispatch import Completion, Dispatch
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import (
    DecodeRow,
    Limits,
    ModelPrograms,
    PrefillRow,
    SampledToken,
    SampleRow,
    StepInput,
    build_step,
    read_step,
)
from chipbus.kernels.qwen3.tiling import COARSE, Tiling

__all__ = ["LIMITS", "RunningModel", "table"]

LIMITS = Limits(max_num_seqs=40, max_num_batched_tokens=2048, max_model_len=1024, page_size=16, num_pages=256)


def table(*pages: int) -> NDArray[np.int32]:
    """A block table."""
    return np.array(pages, np.int32)


@attrs.define
class _Sequence:
    prompt: list[int]
    pages: NDArray[np.int32]
    row: int
    computed: int = 0
    output: list[int] = attrs.field(factory=list)


class RunningModel:
    """Programs registered and residents allocated on ``chip``; every dispatch and completion is kept."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str = "float32",
        limits: Limits = LIMITS,
        chip: Chip | None = None,
        tiling: Tiling = COARSE,
        weights: str = "",
    ) -> None:
        self.spec = ModelSpec.from_directory(checkpoint, dtype)
        self.limits = limits
        self.programs = ModelPrograms.build(self.spec, limits, tiling, weights=weights)
        self.chip = chip or open_chip("cpu:0", 1)
        self.digest = False
        self.dispatches: list[Dispatch] = []
        self.completions: list[Completion] = []
        for program in self.programs.programs:
            self.chip.register(program)
        for tensor in self.programs.tensors:
            self.chip.alloc(tensor)

    def step(
        self,
        prefills: Sequence[PrefillRow] = (),
        decodes: Sequence[DecodeRow] = (),
        samples: Sequence[SampleRow] = (),
    ) -> tuple[SampledToken, ...]:
        """One step; its tokens in the order of ``samples``."""
        step = StepInput(
            step_id=1 + len(self.dispatches), prefills=tuple(prefills), decodes=tuple(decodes), samples=tuple(samples)
        )
        dispatches = build_step(self.programs, step, 1 + len(self.dispatches))
        completions = [self.chip.launch(dispatch, digest=self.digest) for dispatch in dispatches]
        self.dispatches += dispatches
        self.completions += completions
        return read_step(step, completions)

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        *,
        chunk: int = 1 << 30,
        stagger: int = 0,
        scatter: bool = False,
    ) -> list[list[int]]:
        """Greedy continuations by ``count`` tokens of all prompts together, like a scheduler with continuous batching.

        chunk: most prompt tokens of a row per step. stagger: sequence i joins in step i × stagger, so that steps mix
        prefill and decode rows. scatter: pages of a sequence do not follow each other.
        """
        order = np.random.default_rng(0).permutation(self.limits.num_pages) if scatter else None
        sequences, first_page = [], 0
        for row, prompt in enumerate(prompts):
            pages = -(-(len(prompt) + count) // self.limits.page_size)
            block = np.arange(first_page, first_page + pages, dtype=np.int32)
            first_page += pages
            sequences.append(_Sequence(list(prompt), block if order is None else order[block].astype(np.int32), row))
        turn = 0
        while any(len(sequence.output) < count for sequence in sequences):
            joined = [s for at, s in enumerate(sequences) if at * stagger <= turn and len(s.output) < count]
            prefills, decodes, wanted = [], [], []
            for sequence in joined:
                if sequence.computed < len(sequence.prompt):
                    part = sequence.prompt[sequence.computed : sequence.computed + chunk]
                    is_last = sequence.computed + len(part) == len(sequence.prompt)
                    prefills.append(
                        PrefillRow(
                            tokens=np.array(part, np.int32),
                            start=sequence.computed,
                            block_table=sequence.pages,
                            row=sequence.row if is_last else -1,
                        )
                    )
                    sequence.computed += len(part)
                    if not is_last:
                        continue
                else:
                    decodes.append(
                        DecodeRow(
                            token=sequence.output[-1],
                            position=sequence.computed,
                            block_table=sequence.pages,
                            row=sequence.row,
                        )
                    )
                    sequence.computed += 1
                wanted.append(sequence)
            tokens = self.step(prefills, decodes, [SampleRow(row=sequence.row) for sequence in wanted])
            for sequence, token in zip(wanted, tokens, strict=True):
                sequence.output.append(token.token_id)
            turn += 1
        return [sequence.output for sequence in sequences]
