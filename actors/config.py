"""Every setting of an engine, once: arguments, flags, variables and TOML keys all derive from these fields."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import ConfigError
from .setting import one_of, seconds, setting, text, whole, yes_or_no

__all__ = ["EngineConfig", "config_from_mapping"]


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Settings of one engine. Each is checked here (``ConfigError``), their combination by ``plan.plan_engine``."""

    model: str = setting("demo", "Hugging Face directory, or 'demo'", text, converter=str)
    data_parallel_size: int = setting(1, "replicas", whole(1), flags=("--data-parallel-size", "-dp"))
    tensor_parallel_size: int = setting(1, "chips per replica", whole(1), flags=("--tensor-parallel-size", "-tp"))
    layers: str | None = setting(None, "layer span, e.g. 0:14 or 14:output", text)
    devices: str | None = setting(None, "comma-separated chips, e.g. cpu:0,cpu:1", text)
    chip: str = setting("cpu", "kind of chip: cpu, or null (no numerics, modelled time)", text)
    dtype: str = setting("bfloat16", "bfloat16 or float32", one_of("bfloat16", "float32"))
    weights: str | None = setting(None, "int8: keep matrices in it; default: the dtype", one_of("int8"))
    threads: int | None = setting(None, "compute threads per chip; default: cores / chips", whole(1))
    max_model_len: int | None = setting(None, "context in tokens; default: what model and memory allow", whole(1))
    max_num_seqs: int = setting(16, "requests running at once, per replica", whole(1))
    max_num_batched_tokens: int = setting(4096, "tokens per step, per replica", whole(1))
    prefill_chunk_tokens: int = setting(2048, "longest piece of a prompt in one step", whole(1))
    prefix_cache: bool = setting(True, "share pages among prompts that begin alike, now and later", yes_or_no)
    page_size: int = setting(128, "tokens per KV page", whole(1), flags=("--page-size", "--block-size"))
    kv_pages: int | None = setting(None, "KV pages per replica; default: what fits", whole(1))
    seed: int = setting(0, "draws the seeds of requests that bring none", whole(0), flags=("--engine-seed",))
    record: Path | None = setting(
        None, "directory to record the run in", attrs.validators.instance_of(Path), attrs.converters.optional(Path)
    )
    run_dir: Path | None = setting(
        None,
        "directory for the engine's sockets while it runs, one engine at a time; default: a fresh one",
        attrs.validators.instance_of(Path),
        attrs.converters.optional(Path),
    )
    check_numerics: bool = setting(
        False, "end a request with the task that wrote NaN, where one did; slower", yes_or_no
    )
    max_restarts: int = setting(5, "deaths of one child allowed within 30 s", whole(0))
    max_request_restarts: int = setting(
        3, "restarts of a request that do not get it one token further, before WorkerDied", whole(0)
    )
    stall_timeout_s: float = setting(
        10.0, "until a process that stopped or is stuck is replaced, seconds", seconds, flags=("--stall-timeout",)
    )
    start_timeout_s: float = setting(
        300.0, "until every process is ready, seconds", seconds, flags=("--start-timeout",)
    )
    close_timeout_s: float = setting(10.0, "until every process is gone, seconds", seconds, flags=("--close-timeout",))
    request_timeout_s: float = setting(
        3600.0, "longest life of one request, seconds", seconds, flags=("--request-timeout",)
    )
    max_waiting: int = setting(1024, "requests queued per replica before Overloaded", whole(1))
    log_level: str = setting("warning", "debug, info, warning or error", one_of("debug", "info", "warning", "error"))


def config_from_mapping(settings: Mapping[str, Any]) -> EngineConfig:
    """``EngineConfig`` from names and values; an unknown name raises ``ConfigError`` with the nearest match."""
    known = [field.name for field in attrs.fields(EngineConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"there is no setting {name!r}; {hint}")
    return EngineConfig(**settings)
