"""An engine at one moment, in full: what its metrics, its status page and its JSON are made of. Frozen records."""

from __future__ import annotations

import attrs

from ..bus import UNOBSERVED, Histogram
from .messages.tree import ProcessReport, ReplicaStatistics

__all__ = [
    "MOST_EVENTS", "MOST_ROWS", "REPORT_SCHEMA", "EngineReport", "Event", "Latencies", "ProcessTotals", "RequestRow",
    "Restarts",
]  # fmt: skip

REPORT_SCHEMA = 1
MOST_EVENTS = 200
"""Events that an engine keeps, and a report holds: the newest."""
MOST_ROWS = 200
"""Requests that a report holds: the oldest."""


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

    def since(self, earlier: Latencies) -> Latencies:
        """``Histogram.since``, of each."""
        names = [field.name for field in attrs.fields(Latencies)]
        return Latencies(**{name: getattr(self, name).since(getattr(earlier, name)) for name in names})


@attrs.frozen(kw_only=True)
class RequestRow:
    """One completion under way."""

    request_id: str
    replica: int | None  # None: no token has come yet
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
    subject: str  # name of a process, id of a request, or "12 requests" for those of one second after the first
    text: str  # never of what a request says


@attrs.frozen
class Restarts:
    """How often a process was started again after one kind of end."""

    worker: str  # name of the process
    reason: str  # "SIGKILL" | "exit code 1" | "replaced": the supervisor ended it, for silence or the like
    count: int


@attrs.frozen(kw_only=True)
class ProcessTotals:
    """What the node of one process has counted, in all its lives together, as far as it has been heard."""

    name: str
    counters: dict[str, int]  # events of the bus: late_frames, bad_frames, …
    ledger_bytes: int  # written
    ledger_failures: int  # writes the disk refused; nothing is recorded after one
    credit_waits: Histogram = UNOBSERVED  # seconds that its asks waited for credit, of those that had to


@attrs.frozen(kw_only=True)
class EngineReport:
    """Everything there is to tell about one engine."""

    schema: int = REPORT_SCHEMA
    at_unix_s: float
    started_unix_s: float
    version: str
    model: str
    chip: str  # kind
    run_dir: str
    record: str  # "" if it does not record
    config: dict[str, str | bool | int | float | None]
    is_ready: bool  # at least one replica takes requests
    is_closed: bool = False  # the last report of an engine that was closed in order
    processes: tuple[ProcessReport, ...]  # the host application first; no node where none answered
    replicas: tuple[ReplicaStatistics, ...]  # what counts up is over all lives; what is there now is 0 while it is down
    totals: tuple[ProcessTotals, ...]
    restarts: tuple[Restarts, ...]
    exits: int  # lives of processes that have ended
    reaps: Histogram = UNOBSERVED  # as ``TreeReport.reaps``
    requests_total: int  # completions ever asked for
    retries_total: int  # lives of requests after the first
    finished: dict[str, int]  # completions that ended well, by finish reason
    failed: dict[str, int]  # those that did not, by name of the error class
    prompt_tokens: int  # of requests that were encoded
    output_tokens: int  # that reached the caller
    latencies: Latencies  # since the start
    recent: Latencies  # of the last ``recent_s``
    recent_s: float  # 60 to 65 s, less only while the engine is younger
    recent_prompt_tokens: int  # in the last ``recent_s``
    recent_output_tokens: int
    open: tuple[RequestRow, ...]  # the oldest ones, at most ``MOST_ROWS``
    open_total: int
    events: tuple[Event, ...]  # the newest ones, at most ``MOST_EVENTS``, in order
