"""``bus-run graph``: what it prints is what the graph and the chip say, and its files are what they are named."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from chipbus.kernels.diagnosis import critical_path, find_races, run_graph_from_json
from chipbus.tools import console
from chipbus.tools.run_commands import bus_run

LAYERS = 4  # of the demo model


def here(*arguments: str) -> int:
    return console.run("bus-run", lambda: bus_run, ["graph", *arguments])


def facts(out: str) -> dict[str, str]:
    return {line[:15].strip(): line[15:] for line in out.splitlines() if line[:15].strip() and line[15:]}


@pytest.mark.guarantee("D7")
def test_a_modelled_pass_is_told_in_numbers_and_written_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {flag: tmp_path / f"{flag}.out" for flag in ("json", "svg", "rings", "trace")}
    flags = [part for flag, path in files.items() for part in (f"--{flag}", str(path))]
    assert here("demo", "--decode", "3", *flags) == 0

    out = capsys.readouterr().out
    run = run_graph_from_json(files["json"].read_bytes())
    assert [task.label for task in run.tasks].count("paged_attention") == LAYERS
    told = facts(out)
    assert told["tasks"] == str(len(run.tasks))
    assert told["edges"].startswith(f"{len(run.edges)}: ")
    path = critical_path(run)
    assert told["critical path"].startswith(f"{len(path.tasks)} tasks, {path.length_ns / 1e6:.3f} ms of ")
    assert "decode of 3 rows, context 128: graph decode.8 of demo, modelled clock" in out
    assert "\nlinear " in out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["0", "1", "2", "3"]  # one line per ring
    assert find_races(run) == []
    assert len(json.loads(files["trace"].read_bytes())["traceEvents"]) > len(run.tasks) + 2 * len(run.edges)
    for flag in ("svg", "rings"):
        assert ET.fromstring(files[flag].read_text()).tag.endswith("svg")


def test_small_tiles_are_more_tasks_with_the_same_work(tmp_path: Path) -> None:
    runs = []
    for flags in ((), ("--fine",)):
        assert here("demo", "--decode", "8", "--json", str(tmp_path / "run.json"), *flags) == 0
        runs.append(run_graph_from_json((tmp_path / "run.json").read_bytes()))
    coarse, fine = ({task.label for task in run.tasks} for run in runs)
    assert coarse == fine
    assert len(runs[1].tasks) > 3 * len(runs[0].tasks)


@pytest.mark.slow
@pytest.mark.parametrize("work", [("--prefill", "70", "--context", "0"), ("--decode", "2", "--context", "5")])
def test_a_measured_pass_has_the_times_of_a_real_chip(
    work: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("demo", *work, "--measure", "--threads", "1", "--json", str(tmp_path / "run.json")) == 0

    out = capsys.readouterr().out
    assert "wall clock" in out
    run = run_graph_from_json((tmp_path / "run.json").read_bytes())
    assert [task.label for task in run.tasks].count("paged_attention") % LAYERS == 0  # cut as the engine likes
    busy = 100 * sum(task.duration_ns for task in run.tasks) / run.wall_ns
    assert facts(out)["busy"] == f"core.0 {busy:.0f} %"
    ends = [0]
    for task in sorted(run.tasks, key=lambda task: task.begin_ns or 0):  # one thread, one task after another
        assert task.begin_ns is not None
        assert task.end_ns is not None
        assert ends[-1] <= task.begin_ns < task.end_ns
        ends.append(task.end_ns)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prefill", "5000"), "--prefill is 5000; one graph takes at most 1024"),
        (("--decode", "70"), "--decode is 70; one graph takes at most 64"),
        (("--prefill", "4", "--decode", "4"), "--prefill and --decode are given; a pass is one of them"),
        (("/nowhere",), "/nowhere"),
    ],
)
def test_what_cannot_be_one_graph_is_refused(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_modelled_pass_loads_no_torch() -> None:
    code = (
        "import sys; from chipbus.tools.run_commands import bus_run;"
        " bus_run(['graph', 'demo'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False).returncode == 0
