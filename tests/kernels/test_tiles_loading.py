"""A chip gets a program's code from the file that defines it, whole and unchanged, or says why not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import tile_programs

from chipbus.errors import InvalidArgs
from chipbus.kernels.program import Program
from chipbus.kernels.tile_source import is_loading
from chipbus.kernels.tiles import load

HEAD = """
from chipbus.kernels.tile_source import is_loading
from chipbus.kernels.tiles import IN, OUT, incore, program, tensor

@incore(y=OUT)
def fill(y): y.fill_(VALUE)

@program(y=tensor("float32", "N", direction=OUT))
def filled(t, y, *, tile=4):
    for n in t.parallel(0, y.shape[0], tile):
        t.submit(fill, y[n : n + tile])
"""
TAIL = """
if __name__ == "__main__":
    import msgspec, sys
    made = filled.with_settings(tile=2).program
    sys.stdout.buffer.write(msgspec.msgpack.encode(made))
"""

Script = Callable[..., Program]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Runs a file in a process of its own, which describes its program; its modules are forgotten afterwards."""
    path_before, modules_before = list(sys.path), set(sys.modules)

    def run(name: str = "job.py", before: str = "VALUE = 1\n", after: str = "", module: str | None = None) -> Program:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before + HEAD + after + TAIL)
        command = [sys.executable, *(["-m", module] if module else [str(path)])]
        output = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=30, check=True).stdout
        return msgspec.msgpack.decode(output, type=Program)

    yield run
    sys.path[:] = path_before
    for name in set(sys.modules) - modules_before:
        del sys.modules[name]


def file_of(program: Program) -> Path:
    return Path(str(dict(program.static)["file"]))


def graph_of(program: Program) -> Any:
    return load(program).trace({"N": 5})[0]


@pytest.mark.guarantee("P7")
def test_a_script_is_loaded_without_running_its_guarded_part(script: Script, tmp_path: Path) -> None:
    made = script()
    assert dict(made.static)["module"] == "__main__"
    assert file_of(made) == tmp_path / "job.py"
    loaded = load(made)
    assert loaded.settings == {"tile": 2}
    assert loaded.function.__module__ != "__main__"
    assert len(graph_of(made).tasks) == 3
    assert load(made).function is loaded.function  # executed once


def test_a_program_of_this_process_is_found_without_executing_anything() -> None:
    smaller = tile_programs.staged.with_settings(tile=1)
    loaded = load(smaller.program)
    assert loaded.function is tile_programs.staged.function
    assert loaded.settings == {"tile": 1, "stages": 2}
    assert loaded.program == smaller.program


def test_a_file_may_import_its_neighbours_and_relatives(script: Script, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_job.py").write_text("VALUE = 3\n")
    assert len(graph_of(script(before="from neighbour_of_job import VALUE\n")).tasks) == 3
    (tmp_path / "kit_of_job").mkdir()
    (tmp_path / "kit_of_job" / "__init__.py").write_text("")
    (tmp_path / "kit_of_job" / "values.py").write_text("VALUE = 4\n")
    described = script("kit_of_job/job.py", before="from .values import VALUE\n", module="kit_of_job.job")
    static = {**dict(described.static), "module": "kit_of_job.job"}  # as if it had been imported, not run
    assert len(graph_of(attrs.evolve(described, static=tuple(static.items()))).tasks) == 3


@pytest.mark.guarantee("P8")
def test_a_file_that_changed_or_is_gone_is_refused(script: Script) -> None:
    made = script()
    load(made)
    file_of(made).write_text(file_of(made).read_text() + "\n")
    with pytest.raises(InvalidArgs, match=r"__main__:filled: /.*job\.py has changed since the program was made"):
        load(made)
    file_of(made).unlink()
    with pytest.raises(InvalidArgs, match=r"cannot be loaded from /.*job\.py: No such file or directory"):
        load(made)


def test_two_versions_of_a_file_are_two_programs(script: Script) -> None:
    first = load(script(before="VALUE = 1\n"))
    second = load(script(before="VALUE = 2\n"))
    assert first.program.digest != second.program.digest
    assert first.function.__globals__["VALUE"] != second.function.__globals__["VALUE"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("raise OSError('no such chip')", "OSError: no such chip"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
    ],
)
def test_a_file_that_cannot_be_executed_is_refused_with_its_error(script: Script, line: str, sentence: str) -> None:
    made = script(after=f"\nif __name__ != '__main__':\n    {line}\n")
    for _ in range(2):
        with pytest.raises(InvalidArgs, match=rf"__main__:filled: executing /.*job\.py failed: {sentence}"):
            load(made)
    assert not is_loading()


def test_code_can_tell_that_it_is_being_loaded(script: Script) -> None:
    made = script(after="\nLOADED = is_loading()\n")
    assert load(made).function.__globals__["LOADED"] is True
    assert not is_loading()


def test_only_programs_with_the_same_parameters_are_taken(script: Script) -> None:
    made = script()
    other = {**dict(made.static), "qualname": "fill"}
    with pytest.raises(InvalidArgs, match="defines no fill"):
        load(attrs.evolve(made, static=tuple(other.items())))
    with pytest.raises(InvalidArgs, match="has other parameters here than where it was made"):
        load(attrs.evolve(made, params=()))
    with pytest.raises(InvalidArgs, match="lacks 'sha256' in its static configuration"):
        load(attrs.evolve(made, static=made.static[:3]))
