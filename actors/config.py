"""Every setting of an engine, once: arguments, flags, variables and TOML keys all derive from these fields."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import ConfigError

__all__ = ["EngineConfig", "config_from_mapping"]


def _refuse(field: attrs.Attribute[Any], value: object, rule: str) -> None:
    raise ConfigError(f"setting {field.name} is {value!r}; it must be {rule}")


def _whole(low: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
            _refuse(field, value, f"an integer of at least {low}")

    return check


def _seconds(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value <= 0:
        _refuse(field, value, "a number of seconds above 0")


def _one_of(*allowed: str) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value not in allowed:
            _refuse(field, value, allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}")

    return check


def _yes_or_no(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, bool):
        _refuse(field, value, "true or false")


def _text(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not value:
        _refuse(field, value, "a non-empty string")


def _setting(default: Any, help_text: str, check: Any, converter: Any = None, flags: tuple[str, ...] = ()) -> Any:
    """One field. ``None`` as default means: derived from model and machine, so None also passes the check.

    ``flags`` are its spellings on a command line, if they are not just the field's name with dashes.
    """
    validator = attrs.validators.optional(check) if default is None else check
    return attrs.field(
        default=default, validator=validator, converter=converter, metadata={"help": help_text, "flags": flags}
    )


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Settings of one engine. Each is checked here (``ConfigError``), their combination by ``plan.plan_engine``."""

    model: str = _setting("demo", "Hugging Face directory, or 'demo'", _text, converter=str)
    data_parallel_size: int = _setting(1, "replicas", _whole(1), flags=("--data-parallel-size", "-dp"))
    tensor_parallel_size: int = _setting(1, "chips per replica", _whole(1), flags=("--tensor-parallel-size", "-tp"))
    layers: str | None = _setting(None, "layer span, e.g. 0:14 or 14:output", _text)
    devices: str | None = _setting(None, "comma-separated chips, e.g. cpu:0,cpu:1", _text)
    chip: str = _setting("cpu", "kind of chip: cpu, or null (no numerics, modelled time)", _text)
    dtype: str = _setting("bfloat16", "bfloat16 or float32", _one_of("bfloat16", "float32"))
    weights: str | None = _setting(None, "int8: keep matrices in it; default: the dtype", _one_of("int8"))
    threads: int | None = _setting(None, "compute threads per chip; default: cores / chips", _whole(1))
    max_model_len: int | None = _setting(None, "context in tokens; default: what model and memory allow", _whole(1))
    max_num_seqs: int = _setting(16, "requests running at once, per replica", _whole(1))
    max_num_batched_tokens: int = _setting(4096, "tokens per step, per replica", _whole(1))
    prefill_chunk_tokens: int = _setting(2048, "longest piece of a prompt in one step", _whole(1))
    prefix_cache: bool = _setting(True, "keep pages of prompts for later prompts that begin alike", _yes_or_no)
    page_size: int = _setting(128, "tokens per KV page", _whole(1), flags=("--page-size", "--block-size"))
    kv_pages: int | None = _setting(None, "KV pages per replica; default: what fits", _whole(1))
    seed: int = _setting(0, "draws the seeds of requests that bring none", _whole(0), flags=("--engine-seed",))
    record: Path | None = _setting(
        None, "directory to record the run in", attrs.validators.instance_of(Path), attrs.converters.optional(Path)
    )
    run_dir: Path | None = _setting(
        None,
        "directory for the engine's sockets while it runs, one engine at a time; default: a fresh one",
        attrs.validators.instance_of(Path),
        attrs.converters.optional(Path),
    )
    check_numerics: bool = _setting(
        False, "end a request with the task that wrote NaN, where one did; slower", _yes_or_no
    )
    max_restarts: int = _setting(5, "deaths of one child allowed within 30 s", _whole(0))
    max_request_restarts: int = _setting(
        3, "restarts of a request that do not get it one token further, before WorkerDied", _whole(0)
    )
    stall_timeout_s: float = _setting(
        10.0, "until a process that stopped or is stuck is replaced, seconds", _seconds, flags=("--stall-timeout",)
    )
    start_timeout_s: float = _setting(
        300.0, "until every process is ready, seconds", _seconds, flags=("--start-timeout",)
    )
    close_timeout_s: float = _setting(
        10.0, "until every process is gone, seconds", _seconds, flags=("--close-timeout",)
    )
    request_timeout_s: float = _setting(
        3600.0, "longest life of one request, seconds", _seconds, flags=("--request-timeout",)
    )
    max_waiting: int = _setting(1024, "requests queued per replica before Overloaded", _whole(1))
    log_level: str = _setting("warning", "debug, info, warning or error", _one_of("debug", "info", "warning", "error"))


def config_from_mapping(settings: Mapping[str, Any]) -> EngineConfig:
    """``EngineConfig`` from names and values; an unknown name raises ``ConfigError`` with the nearest match."""
    known = [field.name for field in attrs.fields(EngineConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"there is no setting {name!r}; {hint}")
    return EngineConfig(**settings)
