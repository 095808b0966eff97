"""The native tile engine: captured task graphs of built-in kernels, run in C++ on the cores of a cpu chip.

Owns nothing; the extension module ``chipbus.kernels._native`` is looked for when this is imported. Where it is missing
(no compiler when the package was built, another processor family) the torch executor runs the same graphs.

    task.h      a task, a window                cores.h     threads, ready queue, counters
    kernels.inl what tasks compute, once        vector_*.h  sixteen floats, per instruction set
    kernels_*   one file per instruction set    packing.h   weights in panels       mapping.h   their memory
                                                search.h    largest logits          module.cpp  the Python binding
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from ...errors import ConfigError

__all__ = ["library", "open_cores", "why_not"]

library: Any = None
"""The extension module, None if it is not built."""
with contextlib.suppress(ImportError):
    library = importlib.import_module("chipbus.kernels._native")


def why_not(isa: str = "") -> str:
    """Why this machine cannot run the kernels of an instruction set, by default of any; "" if it can."""
    if library is None:
        return "the extension module is not built: the package was installed without a C++20 compiler for x86-64"
    if isa:
        return str(library.why_not(isa))
    return "" if library.best_isa() else "this processor lacks AVX2, the least that the native kernels need"


def open_cores(threads: int, isa: str = "") -> Any:
    """Start the cores of one chip, by default with the best kernels this processor has. They end with the object.

    Raises ``ConfigError`` saying why not. isa: "amx", "avx512bf16", "avx512", "avx2"; "amx-emulated" is for tests.
    """
    reason = why_not(isa)
    if reason:
        raise ConfigError(f"the native engine cannot run here: {reason}")
    return library.Cores(threads, isa or library.best_isa())
