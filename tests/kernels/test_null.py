"""The null chip: known tokens, modelled time, faults, and a watch over what rows read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import RunningModel, table

from chipbus.errors import ConfigError, KernelError
from chipbus.kernels.null import CostTable, Fault, NullChip, null_token
from chipbus.kernels.qwen3.step import DecodeRow, PrefillRow, SampleRow


@pytest.fixture
def running(checkpoint: Callable[[str], Path]) -> Callable[..., RunningModel]:
    return lambda *faults, **costs: RunningModel(
        checkpoint("tied"), chip=NullChip(faults, CostTable(**costs) if costs else None)
    )


def prefill(count: int, *, start: int = 0, pages: tuple[int, ...] = (0, 1, 2, 3), row: int = 0) -> PrefillRow:
    tokens = np.arange(start, start + count, dtype=np.int32) + 20 + 100 * max(row, 0)
    return PrefillRow(tokens=tokens, start=start, block_table=table(*pages), row=row)


def decode(token: int, position: int, *, pages: tuple[int, ...] = (0, 1, 2, 3), row: int = 0) -> DecodeRow:
    return DecodeRow(token=token, position=position, block_table=table(*pages), row=row)


@pytest.mark.guarantee("K9")
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 200_000))
@settings(print_blob=True)
def test_tokens_follow_the_documented_formula(last: int, position: int, vocab: int) -> None:
    token = null_token(last, position, vocab)
    assert 0 <= token < vocab
    first = 16 if vocab > 32 else 0
    assert token == first + (31 * last + 17 * position + 7) % (vocab - first)


def test_greedy_texts_are_those_of_the_formula_however_the_work_is_cut(running: Callable[..., RunningModel]) -> None:
    prompts = [[20, 21, 22], [99], list(range(30, 100))]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 9:
            tokens.append(null_token(tokens[-1], len(tokens) - 1, 515))
        expected.append(tokens[len(prompt) :])
    assert running().greedy(prompts, 9) == expected
    assert running().greedy(prompts, 9, chunk=5, stagger=2, scatter=True) == expected


def test_a_banned_token_gives_way_to_the_next_higher_one(running: Callable[..., RunningModel]) -> None:
    model = running()
    expected = null_token(24, 4, 515)
    banned = np.array([expected, expected + 1], np.int32)
    (token,) = model.step([prefill(5)], (), [SampleRow(row=0, banned=banned, logprobs=2, temperature=1.0)])
    assert token.token_id == expected + 2
    assert token.top_ids == (expected + 2, expected + 3)
    assert token.logprob == -0.5
    assert token.top_logprobs == (-0.5, -1.5)


def test_equal_commands_give_equal_completions(running: Callable[..., RunningModel]) -> None:
    runs = [running() for _ in range(2)]
    for model in runs:
        model.digest = True
        model.greedy([[20, 21], [40, 41, 42]], 4, chunk=2)
    assert runs[0].completions == runs[1].completions
    assert {len(completion.digests) for completion in runs[0].completions} == {1, 3, 5}
    other = running()
    other.digest = True
    other.greedy([[20, 22], [40, 41, 42]], 4, chunk=2)
    assert other.completions[0].digests != runs[0].completions[0].digests


def test_time_is_modelled_from_bytes_and_arithmetic(running: Callable[..., RunningModel]) -> None:
    model = running(launch_ns=100, bytes_per_s=1e9, flop_per_s=1e12)
    model.step([prefill(5)], (), [SampleRow(row=0)])
    forward, norm, head, sample = (completion.device_ns for completion in model.completions)
    parameters = 2 * (64 * 32 * 2 * 6 + 3 * 64 * 128)
    assert forward == 100 + parameters * 4 + 2 * 2 * 2 * 32 * 4 * 5
    assert norm == 100 + 2 * 64 * 4
    assert head == 100 + 515 * 64 * 4
    assert sample == 100 + 4 * 515
    slow = running(flop_per_s=1e6)
    slow.step([prefill(5)])
    assert slow.completions[0].device_ns == 20_000 + 1000 * 2 * parameters * 5


@pytest.mark.guarantee("K10")
def test_a_row_that_reads_pages_of_another_context_is_caught(running: Callable[..., RunningModel]) -> None:
    def refused(*args: object) -> str:
        with pytest.raises(KernelError) as caught:
            model.step(*args)  # type: ignore[arg-type]
        return str(caught.value)

    model = running()
    model.step([prefill(20), prefill(40, pages=(8, 9, 10), row=1)])
    model.step((), [decode(7, 20)])
    assert "row 0 reads position 0 from page 9, offset 0, which holds no token of its context" in refused(
        (), [decode(7, 21, pages=(9, 1, 2, 3))]
    )
    assert "row 0 reads position 21 from page 1, offset 5" in refused((), [decode(7, 23)])
    assert "row 0 reads position 16 from page 9" in refused([prefill(3, start=21, pages=(0, 9))])
    # Nothing of a refused dispatch was written, not even rows before the wrong one.
    assert "row 1 reads" in refused((), [decode(7, 21), decode(7, 50, pages=(8, 9, 10, 11), row=1)])
    assert "row 0 reads position 21" in refused((), [decode(7, 22)])
    model.step((), [decode(7, 21)])
    # A shared prefix is read by both, and written by neither.
    model.step([prefill(4, start=16, pages=(0, 30), row=2)])


def test_a_row_may_read_what_rows_before_it_write_and_no_others(running: Callable[..., RunningModel]) -> None:
    def rows(first: int = 0) -> list[PrefillRow]:
        ids = np.arange(20, 60, dtype=np.int32)
        whole = PrefillRow(tokens=ids[first:32], start=first, block_table=table(0, 1), row=-1)
        return [whole, PrefillRow(tokens=ids[32:], start=32, block_table=table(0, 1, 7), row=3)]

    model = running()
    model.step([prefill(5, pages=(1,))])
    for wrong, read in ((rows()[::-1], "row 0 reads position 0"), (rows(16), "row 0 reads position 0 from page 0")):
        with pytest.raises(KernelError, match=read):
            model.step(wrong)
    model.step((), [decode(7, 5, pages=(1,))])  # what was there is there: a refused dispatch has written nothing
    (token,) = model.step(rows(), (), [SampleRow(row=3)])
    assert token.token_id == null_token(59, 39, 515)


def test_rows_nothing_was_written_to_are_caught(running: Callable[..., RunningModel]) -> None:
    model = running()
    model.step([prefill(5, row=-1)])
    with pytest.raises(KernelError, match="dispatch 2 of final_norm: row 0 of hidden was never written"):
        model.step((), (), [SampleRow(row=0)])


def test_a_failing_launch_writes_nothing_and_the_next_works(running: Callable[..., RunningModel]) -> None:
    model = running(Fault(dispatch=2, kind="fail"))
    model.step([prefill(5)])
    with pytest.raises(KernelError, match="dispatch 2 of decode: injected fault at launch 2"):
        model.step((), [decode(7, 5)])
    with pytest.raises(KernelError, match="reads position 5"):
        model.step((), [decode(7, 6)])
    model.step((), [decode(7, 5)])


def test_a_slow_launch_takes_its_factor_of_modelled_time(running: Callable[..., RunningModel]) -> None:
    plain, slow = running(), running(Fault(dispatch=2, kind="slow", factor=10.0))
    for model in (plain, slow):
        model.step([prefill(5)])
        model.step([prefill(5)])
    ours, theirs = ([completion.device_ns for completion in model.completions] for model in (slow, plain))
    assert ours == [theirs[0], 10 * theirs[1]]


def test_a_dying_launch_ends_the_process_with_exit_code_13(
    running: Callable[..., RunningModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit, match="13"):
        running(Fault(dispatch=1, kind="die")).step([prefill(5)])


def test_a_hanging_launch_ends_when_the_chip_is_closed(running: Callable[..., RunningModel]) -> None:
    model = running(Fault(dispatch=1, kind="hang"))
    ended: list[str] = []

    def launch() -> None:
        try:
            model.step([prefill(5)])
        except KernelError as error:
            ended.append(str(error))

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    model.chip.close()
    thread.join(5)
    assert ended == ["dispatch 1 of prefill: the chip was closed while it hung"]


def test_a_fault_that_makes_no_sense_is_refused() -> None:
    for fault in ({"dispatch": 0, "kind": "fail"}, {"dispatch": 1, "kind": "explode"}):
        with pytest.raises(
            ConfigError, match="expected fail, die, hang, stop, slow, corrupt or refuse_alloc at 1 or later"
        ):
            Fault(**fault)  # type: ignore[arg-type]
