"""A token's numbers are the same bits whatever shares its batch, however its prompt is cut, wherever its pages are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from kernel_runs import RunningModel
from numpy.typing import NDArray

from checkpoints import tiny_checkpoint
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.qwen3.step import DecodeRow, Limits, PrefillRow, SampleRow
from chipbus.kernels.qwen3.tiling import FINE, Tiling

SHAPES = ["tied", "untied-sharded-odd-vocabulary", "bias-no-groups", "wide-heads"]
DTYPES = ["float32", "bfloat16"]
LIMITS = Limits(max_num_seqs=80, max_num_batched_tokens=4096, max_model_len=768, page_size=16, num_pages=1600)


@attrs.frozen(eq=False)
class Text:
    """What a sequence is made of: its prompt and the tokens that follow, which are decoded one by one."""

    prompt: NDArray[np.int32]
    follows: NDArray[np.int32]

    @classmethod
    def drawn(cls, random: np.random.Generator, prompt: int, follows: int) -> Text:
        return cls(*(random.integers(0, 500, count).astype(np.int32) for count in (prompt, follows)))


@attrs.define(eq=False)
class Running:
    """One text on its way through a model."""

    text: Text
    pages: NDArray[np.int32]
    row: int
    computed: int = 0
    logits: list[torch.Tensor] = attrs.field(factory=list)

    @property
    def is_prompt(self) -> bool:
        return self.computed < len(self.text.prompt)

    @property
    def is_done(self) -> bool:
        return self.computed == len(self.text.prompt) + len(self.text.follows)


class Machine:
    """One model on which texts are run in ways drawn at random. Its cache starts as NaN everywhere."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        limits: Limits = LIMITS,
        tiling: Tiling | None = None,
        chip: CpuChip | None = None,
    ) -> None:
        self.model = RunningModel(checkpoint, dtype, limits, chip, **({} if tiling is None else {"tiling": tiling}))
        self.limits = limits
        self.poison()

    def poison(self) -> None:
        """What pages hold before a sequence writes them is never to be seen."""
        _, k_cache, v_cache, *_ = self.model.programs.tensors
        for cache in (k_cache, v_cache):
            self.model.chip.tensor(cache.resident).fill_(torch.nan)

    def logits_of(self, row: int) -> torch.Tensor:
        return self.model.chip.tensor(self.model.programs.tensors[-1].resident)[row].clone()

    def alone(self, text: Text) -> list[torch.Tensor]:
        """The whole prompt in one step, then one token a step, with nothing beside it. Logits after each."""
        pages = np.arange(-(-(len(text.prompt) + len(text.follows)) // self.limits.page_size), dtype=np.int32)
        running = Running(text, pages, 0)
        while not running.is_done:
            self.step([running], [1 << 30])
        return running.logits

    def together(self, texts: Sequence[Text], random: np.random.Generator) -> list[list[torch.Tensor]]:
        """All texts at once: chunks of drawn sizes, drawn turns, pages anywhere, rows in any order."""
        pages = random.permutation(self.limits.num_pages).astype(np.int32)
        rows = random.permutation(self.limits.max_num_seqs)
        sequences, first = [], 0
        for text, row in zip(texts, rows.tolist(), strict=False):
            count = -(-(len(text.prompt) + len(text.follows)) // self.limits.page_size)
            mine = pages[first : first + count]
            sequences.append(Running(text, np.sort(mine) if random.random() < 0.3 else mine, row))
            first += count
        while pending := [sequence for sequence in sequences if not sequence.is_done]:
            chosen = [sequence for sequence in pending if random.random() < 0.7] or pending[:1]
            random.shuffle(chosen)
            self.step(chosen, [int(2 ** random.uniform(0, 9)) for _ in chosen])
        return [sequence.logits for sequence in sequences]

    def step(self, chosen: Sequence[Running], most: Sequence[int]) -> None:
        """One step of the chosen sequences: prompts by at most so many tokens, the others by one."""
        prefills, decodes, wanted = [], [], []
        for sequence, limit in zip(chosen, most, strict=True):
            start = sequence.computed
            if sequence.is_prompt:
                part = sequence.text.prompt[start : start + limit]
                sequence.computed += len(part)
                row = -1 if sequence.is_prompt else sequence.row
                prefills.append(PrefillRow(tokens=part, start=start, block_table=sequence.pages, row=row))
                if row < 0:
                    continue
            else:
                token = int(sequence.text.follows[start - len(sequence.text.prompt)])
                decodes.append(DecodeRow(token=token, position=start, block_table=sequence.pages, row=sequence.row))
                sequence.computed += 1
            wanted.append(sequence)
        self.model.step(prefills, decodes, [SampleRow(row=sequence.row) for sequence in wanted])
        for sequence in wanted:
            sequence.logits.append(self.logits_of(sequence.row))


def same_bits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    assert len(ours) == len(theirs)
    assert not any(torch.isnan(logits).any() for logits in theirs)
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.guarantee("K21")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_bit_equal_whatever_shares_the_batch_and_however_the_prompt_is_cut(
    shape: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    machine = Machine(checkpoint(shape), dtype)
    for seed in range(3):
        random = np.random.default_rng([seed, len(shape)])
        lengths = [1, 2, 63, 64, 65, 128, 130, 255, 300, 700, *random.integers(1, 400, 8).tolist()]
        texts = [Text.drawn(random, length, 1 + int(random.integers(6))) for length in lengths]
        expected = [machine.alone(text) for text in texts]
        machine.poison()
        for ours, theirs in zip(machine.together(texts, random), expected, strict=True):
            assert same_bits(ours, theirs)
        machine.poison()


@pytest.mark.slow
@pytest.mark.guarantee("K22")
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_bit_equal_in_batches_of_every_bucket(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    machine = Machine(checkpoint("tied"), dtype)
    random = np.random.default_rng(5)
    texts = [Text.drawn(random, int(random.integers(1, 40)), 2) for _ in range(70)]
    expected = [machine.alone(text) for text in texts]
    for batch in (2, 9, 17, 25, 33, 49, 65, 70):
        machine.poison()
        sequences = [
            Running(text, np.arange(3 * at, 3 * at + 3, dtype=np.int32), at) for at, text in enumerate(texts[:batch])
        ]
        while not sequences[0].is_done:
            machine.step(sequences, [1 << 30] * batch)
        assert all(same_bits(s.logits, theirs) for s, theirs in zip(sequences, expected[:batch], strict=True))


@pytest.mark.slow
@pytest.mark.guarantee("K23")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_bit_equal_at_the_widths_of_qwen3_0_6b(dtype: str, threads: int, tmp_path: Path) -> None:
    wide = tiny_checkpoint(
        tmp_path, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128, layers=1, vocab=2048
    )
    torch.set_num_threads(threads)
    machine = Machine(wide, dtype, attrs.evolve(LIMITS, num_pages=400))
    torch.set_num_threads(threads)
    random = np.random.default_rng(threads)
    texts = [Text.drawn(random, length, 3) for length in (5, 40, 65, 128, 200, 330, 700)]
    expected = [machine.alone(text) for text in texts]
    for _ in range(2):
        machine.poison()
        for ours, theirs in zip(machine.together(texts, random), expected, strict=True):
            assert same_bits(ours, theirs)


@pytest.mark.slow
@pytest.mark.guarantee("K24")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "tiling",
    [FINE, Tiling(tokens=24, columns=16, head_columns=100, kv_heads=1, query_tokens=40, query_rows=3)],
    ids=["fine", "odd"],
)
def test_every_tiling_gives_the_same_bits(
    tiling: Tiling, shape: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    random = np.random.default_rng(11)
    texts = [Text.drawn(random, length, 2) for length in (3, 70, 129)]
    whole, tiled = (Machine(checkpoint(shape), dtype, tiling=kind) for kind in (None, tiling))
    for text in texts:
        assert same_bits(tiled.alone(text), whole.alone(text))
    for ours, theirs in zip(tiled.together(texts, random), [whole.alone(text) for text in texts], strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.slow
@pytest.mark.guarantee("R72")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiling", [None, FINE], ids=["coarse", "fine"])
@pytest.mark.parametrize("isa", ["", "none"], ids=["native", "torch"])
def test_a_row_finds_what_rows_before_it_in_the_same_step_write_bit_by_bit(
    isa: str, tiling: Tiling | None, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    machine = Machine(checkpoint("tied"), dtype, tiling=tiling, chip=CpuChip(1 if isa == "none" else 2, isa=isa))
    random = np.random.default_rng(3)
    long, other = Text.drawn(random, 700, 1), Text.drawn(random, 640, 0)
    short = attrs.evolve(long, prompt=np.concatenate([long.prompt[:320], other.prompt[:17]]))
    expected = [machine.alone(text) for text in (long, short)]
    machine.poison()
    # Three sequences compute one prompt by turns, a fourth leaves it; behind 640 tokens of another the window of 1,024
    # ends inside the second row of the prompt.
    pages = random.permutation(machine.limits.num_pages).astype(np.int32)
    tables = [np.concatenate([pages[:shared], own]) for shared, own in ((0, pages[:20]), (20, pages[20:38]))]
    tables += [np.concatenate([pages[:38], pages[at : at + 7]]) for at in (100, 110)]
    tables.append(np.concatenate([pages[:20], pages[120:123]]))
    rows = [(0, 320, tables[0]), (320, 608, tables[1]), (608, 700, tables[2]), (608, 700, tables[3])]
    prefills = [PrefillRow(tokens=other.prompt, start=0, block_table=pages[200:240], row=9)]
    for row, (start, end, table) in enumerate(rows):
        prefills.append(PrefillRow(tokens=long.prompt[start:end], start=start, block_table=table, row=row))
    prefills.append(PrefillRow(tokens=short.prompt[320:], start=320, block_table=tables[4], row=4))
    ends = {2: long, 3: long, 4: short}
    machine.model.step(prefills, (), [SampleRow(row=row) for row in ends])
    logits = {row: [machine.logits_of(row)] for row in ends}
    decodes = [
        DecodeRow(token=int(text.follows[0]), position=len(text.prompt), block_table=tables[row], row=row)
        for row, text in ends.items()
    ]
    machine.model.step((), decodes, [SampleRow(row=row) for row in ends])
    for row, text in ends.items():
        assert same_bits([*logits[row], machine.logits_of(row)], expected[0 if text is long else 1])
