"""The example kernels: short, runnable, right; and right for shapes their own checks do not try."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chipbus.kernels.golden import golden

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "kernels"
NAMES = ["matmul", "paged_attention", "rms_norm", "rope", "softmax"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """An example as a module."""

    def get(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return get


def test_every_example_is_known_here_and_short() -> None:
    files = sorted(FOLDER.glob("*.py"))
    assert [file.stem for file in files] == NAMES
    assert [file.name for file in files if len(file.read_text().splitlines()) > 40] == []


@pytest.mark.guarantee("P9")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_one_line_when_it_is_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(rf"{name}: \d shapes, max error \d\.\de-\d\d\n", capsys.readouterr().out)


@pytest.mark.slow
def test_an_example_is_a_script() -> None:
    done = subprocess.run([sys.executable, FOLDER / "matmul.py"], capture_output=True, timeout=60, check=True)
    assert done.stdout.startswith(b"matmul: 4 shapes")


@pytest.mark.parametrize(
    ("name", "settings", "shapes"),
    [
        ("matmul", {"tile_m": 3, "tile_n": 5, "tile_k": 7}, [(1, 1, 1), (7, 8, 9), (6, 14, 5), (0, 4, 4)]),
        ("rms_norm", {"tile_t": 2, "tile_h": 3}, [(1, 1), (5, 7), (2, 3), (9, 9), (0, 4)]),
        ("rope", {"tile_t": 3}, [(3, 1, 2, 1), (7, 3, 8, 4), (0, 1, 4, 2)]),
        ("softmax", {"tile_m": 2, "tile_n": 3}, [(1, 1), (4, 6), (5, 7), (2, 1), (0, 3)]),
    ],
)
def test_examples_are_right_with_any_tiles(
    example: Callable[[str], Any], name: str, settings: dict[str, int], shapes: list[tuple[int, ...]]
) -> None:
    module = example(name)
    plain = getattr(module, "plain", lambda a, b: a @ b)
    golden(getattr(module, name).with_settings(**settings), plain, shapes, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "longest"),
    [((1, 1, 1, 4, 1, 1, 1), 1), ((2, 3, 1, 8, 5, 3, 4), 12), ((4, 1, 6, 2, 2, 5, 1), 5), ((2, 2, 2, 2, 7, 2, 7), 14)],
)
def test_paged_attention_is_right_for_any_pages_and_lengths(
    example: Callable[[str], Any], shape: tuple[int, ...], longest: int
) -> None:
    module = example("paged_attention")
    ranges = {"table": (0, shape[4]), "n": (1, longest + 1)}
    for seed in range(3):
        golden(module.paged_attention, module.plain, [shape], inputs=ranges, atol=1e-5, seed=seed)
