"""A recorded run replays exactly in a fresh process, and a corrupted record is refused where it breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chipbus import Engine, SamplingParams


def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chipbus.tools.bus_replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("record") / "run"
    with Engine("demo", data_parallel_size=2, record=directory, threads=1) as engine:
        engine.generate(["replica", "chip", "page", "router"], SamplingParams(temperature=0, max_tokens=12))
        engine.generate(["ledger", "lane"], SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=8))
    return directory


@pytest.mark.guarantee("E11")
@pytest.mark.slow
def test_a_recorded_run_of_two_replicas_replays_with_zero_difference(record: Path) -> None:
    done = replay("dispatch", str(record))

    assert done.returncode == 0, done.stderr
    assert len(list(record.glob("chip.*.ledger"))) == 2


@pytest.mark.slow
def test_a_recorded_run_can_be_read(record: Path) -> None:
    done = replay("show", str(record))

    assert done.returncode == 0, done.stderr
    for word in ("Generate", "Submit", "Launch", "batch", "req-1"):
        assert word in done.stdout


@pytest.mark.slow
def test_a_corrupted_record_is_refused_where_it_breaks(record: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(record, copy)
    ledger = next(copy.glob("chip.0.0.*.ledger"))
    content = bytearray(ledger.read_bytes())
    content[len(content) // 2] ^= 1
    ledger.write_bytes(content)

    done = replay("dispatch", str(copy))

    assert done.returncode == 2
    assert ledger.name in done.stderr
    assert "byte" in done.stderr


@pytest.mark.slow
def test_recording_twice_into_one_directory_is_refused(record: Path) -> None:
    from chipbus.errors import ConfigError

    with pytest.raises(ConfigError, match="already"):
        Engine("demo", record=record)
