"""What would be published can be installed: an sdist, and the wheel that is built from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from chipbus.kernels import native

ROOT = Path(__file__).resolve().parents[2]
SDIST = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
COMPUTE = """
from pathlib import Path
import numpy as np
import chipbus
from chipbus.kernels import native
print(Path(chipbus.__file__).parent)
if native.library is not None:
    values = np.array([[1, 3, 2], [5, 4, 0]], np.float32)
    print(native.open_cores(2).largest(values.ctypes.data, 12, [1, 0], 3))
"""


def call(where: Path, *command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=where, capture_output=True, text=True, timeout=350, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of_the_tree() -> set[str]:
    """Every Python file of every package folder, as installed."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for package, folder in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }


@pytest.mark.slow
@pytest.mark.timeout(400)  # it compiles the native engine
def test_a_wheel_built_from_the_sdist_is_whole_and_computes(tmp_path: Path) -> None:
    tree, made, home = tmp_path / "tree", tmp_path / "made", tmp_path / "home"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "tests")
    shutil.copytree(ROOT, tree, ignore=ignored)
    made.mkdir()

    sdist = made / call(tree, sys.executable, "-c", SDIST, made).splitlines()[-1]
    call(made, sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", sdist)
    (wheel,) = made.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()
    demo = {f"chipbus/demo/{path.name}" for path in (ROOT / "chipbus" / "demo").iterdir()}
    assert names >= demo | {"chipbus/py.typed"}
    assert names >= {f"chipbus/tools/serve/{name}" for name in ("page.html", "grafana.json", "alerts.yml")}
    extension = f"chipbus/kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert (extension in names) == (native.library is not None)  # as where these tests run, so here

    venv.create(home)  # sees what this environment has, but for the package itself
    python = home / "bin" / "python"
    (found,) = (home / "lib").glob("python*/site-packages")
    (found / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python)
    call(made, *pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)

    said = call(tmp_path, python, "-c", COMPUTE).split("\n", 1)
    assert Path(said[0]) == found / "chipbus"
    assert said[1].strip() == ("[0, 1]" if native.library is not None else "")
    assert call(tmp_path, home / "bin" / "bus-run", "generate", "--max-tokens", "4").strip()
