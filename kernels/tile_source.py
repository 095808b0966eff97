"""Where the code of a tile program is, and how a chip gets exactly that code: by file and by digest of the file.

Owns: modules loaded for programs whose own module is not loaded here, one per file content, for the process's life.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import attrs

from ..errors import InvalidArgs

__all__ = ["Source", "find_in_module", "is_loading"]

_loading: list[str] = []


def is_loading() -> bool:
    """Whether a program's file is being executed to get at the program: the wrong moment to start anything."""
    return bool(_loading)


@attrs.frozen(kw_only=True)
class Source:
    """A name at the top level of a module, and the sha256 (hexadecimal) of the file the module was read from."""

    module: str
    qualname: str
    file: str
    sha256: str

    @classmethod
    def of(cls, function: object) -> Source:
        """Of a function in the file that defines it. ``InvalidArgs`` if no other process could find it there."""
        module, qualname = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
        if not qualname.isidentifier():
            raise InvalidArgs(
                f"{qualname} of {module} is inside another definition; a chip can only load top-level names"
            )
        file = Path(getattr(getattr(function, "__code__", None), "co_filename", "")).absolute()
        if not file.is_file():
            raise InvalidArgs(
                f"{qualname} of {module} has no file; a chip loads programs from the file that defines them"
            )
        return cls(module=module, qualname=qualname, file=str(file), sha256=_sha256(file.read_bytes()))


def find_in_module(source: Source) -> object:
    """What the name stands for. The file is read, and executed if its module is not loaded in this process.

    As multiprocessing does, ``__main__`` is executed under another name, so its guarded part does not run.
    Raises ``InvalidArgs`` if the file is gone, has changed, cannot be executed or has no such name.
    """
    where = f"{source.module}:{source.qualname}"
    try:
        content = Path(source.file).read_bytes()
    except OSError as error:
        raise InvalidArgs(f"{where} cannot be loaded from {source.file}: {error.strerror}") from error
    if _sha256(content) != source.sha256:
        raise InvalidArgs(f"{where}: {source.file} has changed since the program was made; make and register it again")
    found = _lookup(sys.modules.get(source.module), source)
    if found is None:
        name = f"_chipbus_{source.sha256[:16]}"
        parent = source.module.rpartition(".")[0]
        found = _lookup(sys.modules.get(f"{parent}.{name}" if parent else name) or _load(name, content, source), source)
    if found is None:
        raise InvalidArgs(f"{where}: {source.file} defines no {source.qualname}")
    return found


def _lookup(module: ModuleType | None, source: Source) -> object:
    """The name in a module that was read from the source's file, content and all; else None."""
    if module is None or str(Path(getattr(module, "__file__", None) or "").absolute()) != source.file:
        return None
    found = vars(module).get(source.qualname)
    return found if getattr(getattr(found, "source", None), "sha256", "") == source.sha256 else None


def _load(name: str, content: bytes, source: Source) -> ModuleType:
    parent = source.module.rpartition(".")[0]
    root = str(Path(source.file).parents[source.module.count(".")])
    if root not in sys.path:
        sys.path.append(root)  # last, so that it hides nothing: the file may import its neighbours
    name = f"{parent}.{name}" if parent else name
    spec = importlib.util.spec_from_loader(name, loader=None, origin=source.file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = source.file
    sys.modules[name] = module
    _loading.append(name)
    try:
        # The bytes whose digest was checked, not whatever is in the file or in a .pyc by now.
        exec(compile(content, source.file, "exec"), vars(module))  # noqa: S102 (the user's program, by its digest)
    except BaseException as error:  # also SystemExit: a script may end in sys.exit()
        del sys.modules[name]
        raise InvalidArgs(
            f"{source.module}:{source.qualname}: executing {source.file} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        _loading.pop()
    return module


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
