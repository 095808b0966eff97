"""The first file of a record: what ran, with which settings, on which checkpoint. Format 2; read by ``bus-replay``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import attrs
import msgspec

from ..errors import ConfigError

__all__ = ["RECORD_FORMAT", "RunManifest", "installed_version", "plain_settings", "write_manifest"]

RECORD_FORMAT = 2


def installed_version() -> str:
    """Of chipbus; "unknown" where nothing tells it: in a frozen application, or without a descriptor to look."""
    from importlib.metadata import PackageNotFoundError, version  # 15 ms, which importing chipbus need not take

    try:
        return version("chipbus")
    except (PackageNotFoundError, OSError):  # the first also where its file could not be looked for
        return "unknown"


@attrs.frozen(kw_only=True)
class RunManifest:
    """``run.json`` of a record."""

    format: int
    chipbus_version: str
    created_unix_s: float
    machine: str
    model_dir: str  # empty: no model was served
    fingerprint: str  # of the checkpoint, as kernels.qwen3.model computes it
    config: dict[str, str | bool | int | float | None]


def write_manifest(
    directory: Path, config: Mapping[str, object], *, model_dir: str = "", fingerprint: str = ""
) -> None:
    """Make ``directory`` a fresh record. Raises ``ConfigError`` if it holds one already: records are append-only.

    A run without a model (of an L3 worker) has neither directory nor fingerprint.
    """
    manifest = RunManifest(
        format=RECORD_FORMAT,
        chipbus_version=installed_version(),
        created_unix_s=time.time(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        model_dir=model_dir,
        fingerprint=fingerprint,
        config=plain_settings(config),
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "run.json").open("xb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    except FileExistsError as error:
        raise ConfigError(f"record directory {directory} already holds a run or is a file; name a new one") from error
    except OSError as error:
        raise ConfigError(f"record directory {directory} cannot be written: {error.strerror}") from error


def plain_settings(config: Mapping[str, object]) -> dict[str, str | bool | int | float | None]:
    """Settings as JSON has them."""
    return {
        name: value if isinstance(value, (str, int, float, type(None))) else str(value)
        for name, value in config.items()
    }
