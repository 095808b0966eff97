"""Imports go one way, and heavy libraries stay in their room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "bus": {"bus", "errors"},
    "topology": {"topology", "errors"},
    "kernels": {"kernels", "topology", "errors"},
    "actors": {"actors", "bus", "kernels", "topology", "errors"},
    "tools": {"tools", "actors", "bus", "kernels", "topology", "errors", "front door"},
}
ONLY_IN = {
    "zmq": {"bus"},
    "torch": {"kernels"},
    "safetensors": {"kernels"},
    "tokenizers": {"actors"},
    "click": {"tools"},
}
OF_THE_SERVER = {"starlette", "uvicorn", "uvloop", "httptools", "prometheus_client"}  # an extra: may not be installed
TRAINING_SCRIPT = "tools/make_demo_model.py"  # a developer's script, imported by nothing; it needs torch to train
PROCESS_CALLS = {
    "fork",
    "forkpty",
    "kill",
    "killpg",
    "waitpid",
    "waitid",
    "wait",
    "wait3",
    "wait4",
    "pidfd_open",
    "posix_spawn",
    "execv",
    "execve",
    "system",
    "popen",
    "setsid",
    "pidfd_send_signal",
}


def sources() -> Iterator[tuple[str, Path]]:
    for room in MAY_IMPORT:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield room, path


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "chipbus":
        return f"!{parts[0]}"
    return parts[1] if len(parts) > 1 else "front door"


def imported(room: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of each import: a room of ours, or "!name" for a foreign top-level package."""
    package = ["chipbus", room, *path.relative_to(ROOT / room).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, room_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "chipbus":  # "from .. import errors"
                for alias in node.names:
                    yield node.lineno, alias.name if alias.name in {*MAY_IMPORT, "errors"} else "front door"
            else:
                yield node.lineno, room_of(module)


def test_imports_go_one_way_between_rooms() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room} imports {target}"
        for room, path in sources()
        for line, target in imported(room, path)
        if not target.startswith("!") and target not in MAY_IMPORT[room]
    ]

    assert wrong == []


def test_heavy_libraries_stay_in_their_room() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {target[1:]} is used in {room}, allowed in {', '.join(ONLY_IN[target[1:]])}"
        for room, path in sources()
        for line, target in imported(room, path)
        if target[1:] in ONLY_IN and room not in ONLY_IN[target[1:]] and str(path.relative_to(ROOT)) != TRAINING_SCRIPT
    ]

    assert wrong == []


def test_libraries_of_the_server_stay_in_its_folder() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {target[1:]} is used outside tools/serve"
        for room, path in sources()
        for line, target in imported(room, path)
        if target[1:] in OF_THE_SERVER and not path.is_relative_to(ROOT / "tools" / "serve")
    ]

    assert wrong == []


def test_the_command_line_loads_without_the_servers_libraries() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in sorted(OF_THE_SERVER))
    code = (
        f"import sys; {blocked}import chipbus.tools.run_commands, chipbus.tools.flags_page, chipbus.tools.serve.config"
    )

    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_process_calls_live_in_one_module() -> None:
    wrong = []
    for room, path in sources():
        if str(path.relative_to(ROOT)) == "actors/processes.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in {"os", "signal"}
                and node.attr in PROCESS_CALLS
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}")
            if (
                isinstance(node, ast.Import | ast.ImportFrom)
                and room != "tools"  # the benchmark of start-up times whole commands from outside
                and any(a.name.split(".")[0] in {"subprocess", "multiprocessing"} for a in node.names)
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: import of subprocess or multiprocessing")

    assert wrong == []


def test_the_walker_sees_a_forbidden_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above can fail: planted edges are found in a copy of the layout."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus" / "planted.py").write_text(
        "from ..actors.engine import x\nimport torch\nfrom .. import topology\n"
    )

    targets = [target for room, path in sources() for _, target in imported(room, path)]

    assert targets == ["actors", "!torch", "topology"]


@pytest.mark.parametrize(
    "module", ["chipbus", "chipbus.actors.engine", "chipbus.actors.supervisor", "chipbus.actors.replica"]
)
def test_torch_is_loaded_only_by_chips(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_every_public_name_loads_and_is_documented() -> None:
    import chipbus

    undocumented = []
    for name in chipbus.__all__:
        value = getattr(chipbus, name)
        if not (value.__doc__ or "").strip():
            undocumented.append(name)
        if isinstance(value, type):
            for attribute, member in vars(value).items():
                if callable(member) and not attribute.startswith("_") and not (member.__doc__ or "").strip():
                    undocumented.append(f"{name}.{attribute}")

    assert undocumented == []


def test_every_error_is_documented_and_in_one_tree() -> None:
    from chipbus import errors

    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.ChipbusError)
        assert error.__doc__
        text = str(error("one sentence"))
        assert str(error(text)) == text  # an error that crosses the bus is made from its text
        if issubclass(error, errors.NumberedError):
            assert text == f"{error.name} ({error.code}): one sentence\nhint: {error.hint}"
        else:
            assert text == "one sentence"
