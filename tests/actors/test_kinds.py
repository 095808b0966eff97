"""The two tables of what a child may be and what is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_every_kind_names_an_actor_of_ours() -> None:
    assert set(ENTRIES) == {"tokenizer", "router", "replica", "chip"}
    assert all(entry.startswith("chipbus.actors.") for entry in ENTRIES.values())
    assert load_actor("chip", {"device": "null:0", "threads": 1}).handler_names()


def test_an_unknown_kind_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no kind of child 'os:system'; known: tokenizer, router, replica, chip"):
        load_actor("os:system", {})
