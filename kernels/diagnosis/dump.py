"""Writes down what a program was given or gave back, as much of it as is asked for.

Owns nothing but the files it writes: ``index.json``, and at level "values" one ``.npy`` per array. The index is an
object with ``format``, ``program``, ``digest`` (of the program), ``level`` and ``arguments``, a list of ``DumpedArg``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs
import msgspec
import numpy as np

from ..dispatch import Arg
from ..program import Direction, Program

__all__ = ["DUMP_LEVELS", "DumpLevel", "DumpedArg", "dump_arguments"]

DumpLevel = Literal["none", "shapes", "digests", "values"]
DUMP_LEVELS: tuple[DumpLevel, ...] = ("none", "shapes", "digests", "values")
"""Each says all that the one before it says."""

_FORMAT = 1
_STRANGE = re.compile(r"[^\w.-]")


@attrs.frozen(kw_only=True)
class DumpedArg:
    """One argument in ``index.json``."""

    name: str
    direction: str  # "in", "out" or "inout"
    dtype: str
    shape: tuple[int | str, ...]  # of the array; of the parameter, symbols and all, where there is no array
    resident: int = 0  # id of the tensor on the chip; 0: given by value
    digest: str = ""  # blake2b-16 over the bytes, in hexadecimal: what ``Completion.digests`` holds for whole arrays
    file: str = ""  # the array; bfloat16, which numpy lacks, widened to float32
    left_out: str = ""  # why digest or file are missing at a level that has them


def dump_arguments(
    directory: Path,
    program: Program,
    args: Sequence[Arg],
    *,
    level: DumpLevel,
    outputs: Sequence[Arg] = (),
    residents: Mapping[int, Arg] | None = None,
    max_bytes: int = 64 << 20,
) -> tuple[DumpedArg, ...]:
    """Write the arguments of one launch to ``directory``, which is made; level "none" writes nothing at all.

    args:      in the order of the program's parameters
    outputs:   ``Completion.outputs``, to tell what OUT and INOUT arguments by value held afterwards
    residents: by id, the residents whose content is to be told, too, as ``Chip.copy_from`` gives them
    max_bytes: of all ``.npy`` files together; arrays that do not fit any more are left out, and the index says so
    """
    if level == "none":
        return ()
    directory.mkdir(parents=True, exist_ok=True)
    free = max_bytes
    entries = []
    written = iter(outputs)
    for number, (param, arg) in enumerate(zip(program.params, args, strict=True)):
        if arg.resident:
            content = (residents or {}).get(arg.resident)
        else:
            content = arg if param.direction is Direction.IN else next(written, arg)
        entry = DumpedArg(
            name=param.name,
            direction=param.direction.value,
            dtype=content.dtype if content else param.dtype,
            shape=content.shape if content else param.shape,
            resident=arg.resident,
        )
        if level != "shapes":
            if content is None:
                entry = attrs.evolve(entry, left_out=f"resident {arg.resident}: its content was not read")
            elif not content.data and 0 not in content.shape:
                entry = attrs.evolve(entry, left_out="an output that is not there yet")
            else:
                digest = hashlib.blake2b(content.data, digest_size=16).hexdigest()
                entry = attrs.evolve(entry, digest=digest)
                if level == "values":
                    file = directory / f"{number:02d}_{_STRANGE.sub('_', param.name)}.npy"
                    entry, free = _with_file(entry, content, file, free, max_bytes)
        entries.append(entry)
    index = {
        "format": _FORMAT, "program": program.name, "digest": program.digest.hex(), "level": level,
        "arguments": msgspec.to_builtins(entries),
    }  # fmt: skip
    (directory / "index.json").write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1))
    return tuple(entries)


def _with_file(entry: DumpedArg, content: Arg, file: Path, free: int, max_bytes: int) -> tuple[DumpedArg, int]:
    array = content.numpy()
    if array.nbytes > free:
        reason = f"{array.nbytes} bytes; {free} of {max_bytes} are left"
        return attrs.evolve(entry, left_out=reason), free
    np.save(file, array)
    return attrs.evolve(entry, file=file.name), free - array.nbytes
