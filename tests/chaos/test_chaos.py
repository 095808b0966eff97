"""Both halves of chaos, sized for every run of the suite: a thousand seeds in virtual time, and some real faults.

``make chaos`` does the second at length.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEEDS = 1000


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", str(HERE / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.guarantee("S50")
def test_a_thousand_seeds_of_kills_freezes_and_bad_links_lose_nothing() -> None:
    halves = [run("seeds.py", str(first), "--count", str(SEEDS // 2)) for first in (1, 1 + SEEDS // 2)]
    said = [half.communicate(timeout=390)[0] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], "\n".join(said)
    assert all(f"{SEEDS // 2} seeds in" in text for text in said)


@pytest.mark.slow
@pytest.mark.guarantee("S51")
def test_a_seed_repeats_its_run_exactly() -> None:
    tales = [run("seeds.py", "14", "--tell").communicate(timeout=50)[0] for _ in range(2)]
    assert "(life 1)" in tales[0]  # something was struck
    assert tales[0] == tales[1]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.guarantee("S52")
def test_real_faults_under_load_lose_nothing_and_leave_nothing() -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    process = run("chaos.py", "--seed", str(seed), "--faults", "15", "--stall-timeout", "3")
    said = process.communicate(timeout=190)[0]
    assert process.returncode == 0, f"seed {seed}: {said}"
    assert "0 lost, 0 wrong" in said
