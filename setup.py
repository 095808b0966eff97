"""Builds the one extension module; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("kernels/native")


def native() -> list[Extension]:
    """The native tile engine. Optional: without a compiler, or with CHIPBUS_BUILD_NATIVE=0, torch computes instead."""
    if os.environ.get("CHIPBUS_BUILD_NATIVE", "1") == "0":
        return []
    try:
        import pybind11
    except ImportError:  # only without build isolation; pyproject.toml names it
        return []
    flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-g0", *os.environ.get("CHIPBUS_NATIVE_FLAGS", "").split()]
    return [
        Extension(
            "chipbus.kernels._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in NATIVE.glob(pattern)),
            include_dirs=[pybind11.get_include()],
            language="c++",
            extra_compile_args=flags,
            extra_link_args=[*os.environ.get("CHIPBUS_NATIVE_FLAGS", "").split(), "-pthread"],
            optional=True,
        )
    ]


setup(ext_modules=native())
