"""An engine at one moment, in full: what its metrics, its status page and its JSON are made of. Frozen records."""

from __future__ import annotations

import attrs

from .messages.tree import ProcessReport, ReplicaStatistics

__all__ = ["EngineReport", "Event", "Histogram", "Latencies", "RequestRow"]

REPORT_SCHEMA = 1


@attrs.frozen
class Histogram:
    """Observations by size. ``counts[i]`` are those in (bounds[i - 1], bounds[i]]; the last one is above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds; not cumulative
    total: float  # sum of all observations


@attrs.frozen(kw_only=True)
class Latencies:
    """Seconds, one observation per request that ended well; of ``inter_token``, one per delta after the first."""

    time_to_first_token: Histogram
    inter_token: Histogram
    per_output_token: Histogram
    e2e: Histogram
    queued: Histogram
    prefill: Histogram
    decode: Histogram


@attrs.frozen(kw_only=True)
class RequestRow:
    """One completion under way."""

    request_id: str
    replica: int | None  # None: not known yet
    state: str  # waiting (no token yet) | running
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    age_s: float
    attempt: int


@attrs.frozen(kw_only=True)
class Event:
    """Something an operator wants to know of. ``number`` counts from 1, without gaps."""

    number: int
    at_unix_s: float
    kind: str  # started | ready | exit | restart | lost | draining | retried | failed | refused
    subject: str  # name of a process, or id of a request
    text: str


@attrs.frozen(kw_only=True)
class EngineReport:
    """Everything there is to tell about one engine."""

    schema: int = REPORT_SCHEMA
    at_unix_s: float
    started_unix_s: float
    version: str
    model: str
    chip: str
    run_dir: str
    record: str  # "" if it does not record
    config: dict[str, str | bool | int | float | None]
    is_ready: bool  # at least one replica takes requests
    processes: tuple[ProcessReport, ...]
    replicas: tuple[ReplicaStatistics, ...]
    requests_total: int  # completions ever asked for
    retries_total: int  # lives of requests after the first
    finished: dict[str, int]  # completions that ended well, by finish reason
    failed: dict[str, int]  # those that did not, by name of the error class
    prompt_tokens: int  # of requests that were encoded
    output_tokens: int  # that reached the caller
    latencies: Latencies  # since the start
    recent: Latencies  # of the last ``recent_s``
    recent_s: float
    recent_prompt_tokens: int  # in the last ``recent_s``
    recent_output_tokens: int
    open: tuple[RequestRow, ...]  # the oldest ones, at most 200
    open_total: int
    events: tuple[Event, ...]  # the newest ones, at most 200, in order
