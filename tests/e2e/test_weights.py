"""Whole engines on weights that are special: kept as int8, or broken by a NaN."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint
from chipbus import Engine, SamplingParams, errors
from chipbus.kernels.native.shapes import engine_of

PROMPTS = [[3, 1, 4, 1, 5], list(range(2, 60))]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), hidden=128, intermediate=256)


def tokens(engine: Engine) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.slow
@pytest.mark.guarantee("K44")
def test_an_engine_keeps_int8_weights_over_a_chips_death_and_in_its_record(checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "run"
    with Engine(str(checkpoint), weights="int8", threads=1, record=record) as engine:
        before = tokens(engine)
        chip = next(child for child in engine.tree() if child.kind == "chip")
        os.kill(chip.pid, signal.SIGKILL)
        assert tokens(engine) == before
        assert next(child for child in engine.tree() if child.kind == "chip").incarnation == 2
    with Engine(str(checkpoint), threads=1) as engine:
        assert tokens(engine) != before  # these weights are drawn so large that rounding them shows

    done = subprocess.run(
        [sys.executable, "-m", "chipbus.tools.bus_replay", "dispatch", str(record)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on 2 chips: every digest is equal" in done.stdout


@pytest.mark.slow
@pytest.mark.guarantee("K45")
def test_a_task_that_writes_nan_ends_its_request_with_its_name_and_the_engine_goes_on(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][77, 5] = torch.nan  # read by one token, and by the head
    tensors["model.layers.1.mlp.up_proj.weight"][3, 9] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})

    named = r"prefill: task \d+ of prefill\.8 \(linear\) .*wrote NaN to a tile of .*, from token 0 .*layers\.1\.up \["
    with Engine(str(broken), threads=1, check_numerics=True, log_level="info") as engine:
        for _ in range(2):
            with pytest.raises(errors.CoreException, match=named):
                engine.generate([[3, 1, 4]], GREEDY)
        with pytest.raises(errors.CoreException, match=r"\(load_rows\) .*wrote NaN to a tile of x.* embed \["):
            engine.generate([[3, 77, 4]], GREEDY)
        assert [(child.incarnation, child.restarts) for child in engine.tree()] == [(1, 0)] * 5
        statistics = engine.statistics()
        assert (statistics.running, statistics.pages_free) == (0, statistics.pages_total)
    [said] = [line for line in capfd.readouterr().err.splitlines() if "chip.engine" in line]
    assert f'engine="{engine_of()}"' in said
