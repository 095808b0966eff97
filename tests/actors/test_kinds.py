"""The two tables of what a child may be and what is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chipbus.actors.kinds import ENTRIES, PRELOADS, load_actor
from chipbus.errors import ConfigError

COUNT = """
import importlib, sys
from chipbus.actors import processes, warden
for module in {modules!r}:
    importlib.import_module(module)
print(processes.count_threads(), 'torch' in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.guarantee("S15")
@pytest.mark.parametrize(("preload", "has_torch"), [("light", "False"), ("torch", "True")])
def test_what_a_warden_imports_starts_no_thread_and_the_light_one_loads_no_torch(preload: str, has_torch: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    code = COUNT.format(modules=PRELOADS[preload])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, timeout=50, check=True
    )

    assert done.stdout.split() == ["1", has_torch]


FIRST_STEPS = """
import importlib, sys
from pathlib import Path
for module in {modules!r}:
    importlib.import_module(module)
sys.path.insert(0, {tests!r})
import numpy as np
from kernel_runs import RunningModel
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.qwen3.step import SampleRow

before = set(sys.modules)
model = RunningModel(Path({demo!r}), "bfloat16", chip=CpuChip(1, isa={isa!r}))
model.greedy([[1, 2, 3], [4, 5]], 3)
said = np.array([1, 2, 2], np.int32)
choice = dict(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, presence_penalty=1.0, repetition_penalty=1.2, history=said,
    prompt_tokens=1, banned=said, logprobs=3,
)
model.step(samples=[SampleRow(row=0, **choice)])
print(sorted(set(sys.modules) - before))
"""


@pytest.mark.slow
@pytest.mark.guarantee("S81")
@pytest.mark.parametrize("isa", ["", "none"])
def test_a_chips_first_steps_import_nothing_that_its_warden_has_not(isa: str) -> None:
    tests = Path(__file__).resolve().parents[1]
    demo = tests.parent / "chipbus" / "demo"
    code = FIRST_STEPS.format(modules=PRELOADS["torch"], tests=str(tests), demo=str(demo), isa=isa)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=50, check=True)

    assert done.stdout.strip() == "[]"


def test_every_kind_names_an_actor_of_ours() -> None:
    assert set(ENTRIES) == {"tokenizer", "router", "replica", "chip"}
    assert all(entry.startswith("chipbus.actors.") for entry in ENTRIES.values())
    assert load_actor("chip", {"device": "null:0", "threads": 1}).handler_names()


def test_an_unknown_kind_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no kind of child 'os:system'; known: tokenizer, router, replica, chip"):
        load_actor("os:system", {})
