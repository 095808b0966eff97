"""Builds the one extension module; everything else about the package is in pyproject.toml."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("kernels/native")
# GCC 12 takes what avx512fintrin.h leaves undefined on purpose for a mistake.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


def native() -> list[Extension]:
    """The native tile engine. Optional: without a compiler, or with CHIPBUS_BUILD_NATIVE=0, torch computes instead."""
    if os.environ.get("CHIPBUS_BUILD_NATIVE", "1") == "0" or platform.machine() != "x86_64":
        return []
    try:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile
    except ImportError:  # only without build isolation; pyproject.toml names it
        return []
    ParallelCompile().install()  # a file per core; setuptools alone compiles one after the other
    sources = sorted(NATIVE.glob("*.cpp"), key=lambda path: (path.name != "module.cpp", path))  # the longest first
    return [
        Extension(
            "chipbus.kernels._native",
            sources=[str(path) for path in sources],
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in NATIVE.glob(pattern)),
            include_dirs=[pybind11.get_include()],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


setup(ext_modules=native())
