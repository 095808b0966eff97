"""Every metric of ``/metrics``, declared once: name, type, labels, meaning, and where in a report it stands. Pure.

Owns: nothing. What is exposed (``metrics.py``), docs/metrics.md and the tests of dashboard and alerts derive from it.
Labels have few values: names of processes, replicas, programs, classes of errors; never the id of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs

from ...actors.messages.tree import ReplicaStatistics
from ...actors.report import EngineReport
from ...bus import Histogram, NodeReport
from ...bus.mailbox import LANE_BOUND, READ_BOUND

__all__ = ["GROUPS", "HTTP_RESPONSES", "METRICS", "PREFIX", "Metric", "model_of"]

PREFIX = "chipbus_"

Samples = Iterable[tuple[tuple[str, ...], float | Histogram]]
"""Label values, in the order of the metric's labels, and what was measured."""


def _prefixed(name: str) -> str:
    return PREFIX + name


@attrs.frozen(kw_only=True)
class Metric:
    """One family. ``name`` is whole, with the prefix, and ends in ``_total`` if it is a counter."""

    group: str
    name: str = attrs.field(converter=_prefixed)
    kind: str  # gauge | counter | histogram
    labels: tuple[str, ...]
    help: str
    read: Callable[[EngineReport], Samples]


def model_of(report: EngineReport) -> str:
    """The model's name as a label: of a directory, its last part."""
    return report.model.rstrip("/").rpartition("/")[2]


def _engine(read: Callable[[EngineReport], float | Histogram]) -> Callable[[EngineReport], Samples]:
    """One sample, labelled with the model."""
    return lambda report: [((model_of(report),), read(report))]


def _replicas(read: Callable[[ReplicaStatistics], float | Histogram]) -> Callable[[EngineReport], Samples]:
    """One sample per replica."""
    return lambda report: [((str(row.replica), model_of(report)), read(row)) for row in report.replicas]


def _programs(field: str, scale: float = 1.0) -> Callable[[EngineReport], Samples]:
    """One sample per replica and program."""
    return lambda report: [
        ((str(row.replica), model_of(report), use.program), getattr(use, field) * scale)
        for row in report.replicas
        for use in row.programs
    ]


def _nodes(read: Callable[[NodeReport], float]) -> Callable[[EngineReport], Samples]:
    """One sample per process that answered."""
    return lambda report: [((p.record.name,), read(p.node)) for p in report.processes if p.node is not None]


def _counters(*names: str) -> Callable[[EngineReport], Samples]:
    """The sum of some of what a node counts, one sample per process."""
    return lambda report: [((t.name,), sum(t.counters.get(name, 0) for name in names)) for t in report.totals]


def _chip_use(report: EngineReport) -> Samples:
    return [
        ((p.record.name, program), share)
        for p in report.processes
        if p.chip is not None
        for program, share in p.chip.busy
    ]


def _ring_use(report: EngineReport) -> Samples:
    """Resources by the name of the parameter that sizes them."""
    return [
        ((p.record.name, str(ring), resource), most)
        for p in report.processes
        if p.chip is not None
        for ring, use in enumerate(p.chip.rings)
        for resource, most in (
            ("ring_task_window", use.tasks), ("ring_heap", use.heap_bytes), ("ring_dep_pool", use.dep_entries),
        )
    ]  # fmt: skip


def _up(report: EngineReport) -> Samples:
    states = {p.record.name: p.record.state for p in report.processes}
    return [((name,), float(state in ("ready", "draining"))) for name, state in states.items()]


def _silent(report: EngineReport) -> Samples:
    return [
        ((p.record.name,), float(p.node is None)) for p in report.processes if p.record.state in ("ready", "draining")
    ]


def _mailboxes(report: EngineReport) -> Samples:
    return [
        ((p.record.name, lane), depth) for p in report.processes if p.node is not None for lane, depth in p.node.lanes
    ]


# Shown from the first scrape on: Prometheus does not see how a counter came to its first value.
_EXPECTED_ERRORS = (
    "Aborted", "BadTarget", "ContextTooLong", "DeadlineExceeded", "NotReady", "Overloaded", "PinOverloaded",
    "RequestInvalid", "WorkerDied",
)  # fmt: skip


def _finished(report: EngineReport) -> Samples:
    counts = {"length": 0, "stop": 0, **report.finished}
    return [((model_of(report), reason), count) for reason, count in sorted(counts.items())]


def _failed(report: EngineReport) -> Samples:
    counts = {**dict.fromkeys(_EXPECTED_ERRORS, 0), **report.failed}
    return [((model_of(report), error), count) for error, count in sorted(counts.items())]


def _used(row: ReplicaStatistics) -> float:
    return 1 - row.pages_free / row.pages_total if row.pages_total else 0.0


GROUPS = {
    "engine": "The engine",
    "scheduler": "Scheduler",
    "kv": "KV cache",
    "tokens": "Tokens",
    "requests": "Requests",
    "latency": "Latencies",
    "chips": "Chips",
    "bus": "Bus",
    "supervision": "Supervision",
    "record": "Record",
    "http": "HTTP",
}

_MODEL, _REPLICA, _PROGRAM, _ACTOR, _WORKER = (
    ("model",), ("replica", "model"), ("replica", "model", "program"), ("actor",), ("worker",),
)  # fmt: skip

METRICS: tuple[Metric, ...] = (
    Metric(
        group="engine", name="ready", kind="gauge", labels=_MODEL,
        help="1 if some replica takes requests and all its chips can compute, else 0.",
        read=_engine(lambda report: float(report.is_ready)),
    ),
    Metric(
        group="engine", name="engine_info", kind="gauge", labels=("model", "chip", "version"),
        help="Always 1; what is served, on which kind of chip, by which version.",
        read=lambda report: [((model_of(report), report.chip, report.version), 1.0)],
    ),
    Metric(
        group="engine", name="start_time_seconds", kind="gauge", labels=_MODEL,
        help="When the engine was started, in seconds since 1970.",
        read=_engine(lambda report: report.started_unix_s),
    ),
    Metric(
        group="scheduler", name="num_requests_running", kind="gauge", labels=_REPLICA,
        help="Requests in the batch of a replica.", read=_replicas(lambda row: row.running),
    ),
    Metric(
        group="scheduler", name="num_requests_waiting", kind="gauge", labels=_REPLICA,
        help="Requests that wait at a replica to be admitted.", read=_replicas(lambda row: row.waiting),
    ),
    Metric(
        group="scheduler", name="pending_tokens", kind="gauge", labels=_REPLICA,
        help="Prompt tokens to compute plus tokens that may still be generated.",
        read=_replicas(lambda row: row.pending_tokens),
    ),
    Metric(
        group="scheduler", name="num_preemptions_total", kind="counter", labels=_REPLICA,
        help="Requests whose pages were taken back, and which were computed again later.",
        read=_replicas(lambda row: row.preemptions),
    ),
    Metric(
        group="scheduler", name="steps_total", kind="counter", labels=_REPLICA,
        help="Steps that ended.", read=_replicas(lambda row: row.steps),
    ),
    Metric(
        group="scheduler", name="step_seconds_total", kind="counter", labels=_REPLICA,
        help="Time that steps took, from the decision to their tokens.", read=_replicas(lambda row: row.step_ns / 1e9),
    ),
    Metric(
        group="scheduler", name="iteration_tokens_total", kind="histogram", labels=_REPLICA,
        help="Tokens that a step computed: of prompts, and one of each request that decodes. A histogram, as vLLM's.",
        read=_replicas(lambda row: row.step_tokens),
    ),
    Metric(
        group="kv", name="kv_cache_usage_perc", kind="gauge", labels=_REPLICA,
        help="Share of the KV pages that requests hold, 0 to 1.", read=_replicas(_used),
    ),
    Metric(
        group="kv", name="pages", kind="gauge", labels=_REPLICA,
        help="KV pages; 0 while the replica is down.", read=_replicas(lambda row: row.pages_total),
    ),
    Metric(
        group="kv", name="pages_free", kind="gauge", labels=_REPLICA,
        help="KV pages that no request holds.", read=_replicas(lambda row: row.pages_free),
    ),
    Metric(
        group="kv", name="pages_cached", kind="gauge", labels=_REPLICA,
        help="Of the free KV pages, those that hold a prefix another prompt may begin with.",
        read=_replicas(lambda row: row.pages_cached),
    ),
    Metric(
        group="kv", name="prefix_cache_queries_total", kind="counter", labels=_REPLICA,
        help="Prompt tokens that were looked up in the prefix cache.", read=_replicas(lambda row: row.prefix_queries),
    ),
    Metric(
        group="kv", name="prefix_cache_hits_total", kind="counter", labels=_REPLICA,
        help="Of these, tokens that were found there and not computed again.",
        read=_replicas(lambda row: row.prefix_hits),
    ),
    Metric(
        group="tokens", name="prompt_tokens_total", kind="counter", labels=_MODEL,
        help="Tokens of the prompts that were asked for.", read=_engine(lambda report: report.prompt_tokens),
    ),
    Metric(
        group="tokens", name="generation_tokens_total", kind="counter", labels=_MODEL,
        help="Generated tokens that reached their callers.", read=_engine(lambda report: report.output_tokens),
    ),
    Metric(
        group="tokens", name="prefill_tokens_total", kind="counter", labels=_REPLICA,
        help="Tokens computed as prompts: of prompts, and of what is computed again after a loss or preemption.",
        read=_replicas(lambda row: row.prompt_tokens),
    ),
    Metric(
        group="tokens", name="sampled_tokens_total", kind="counter", labels=_REPLICA,
        help="Tokens that a replica generated.", read=_replicas(lambda row: row.tokens_generated),
    ),
    Metric(
        group="requests", name="num_requests_open", kind="gauge", labels=_MODEL,
        help="Completions under way, wherever they are.", read=_engine(lambda report: report.open_total),
    ),
    Metric(
        group="requests", name="request_started_total", kind="counter", labels=_MODEL,
        help="Completions that were asked for; a request with n = 2 is two.",
        read=_engine(lambda report: report.requests_total),
    ),
    Metric(
        group="requests", name="request_success_total", kind="counter", labels=("model", "finished_reason"),
        help="Completions that ended well, by finish reason.", read=_finished,
    ),
    Metric(
        group="requests", name="request_failure_total", kind="counter", labels=("model", "code"),
        help="Completions that did not, by the name of the error in chipbus.errors; Aborted: the caller went away.",
        read=_failed,
    ),
    Metric(
        group="requests", name="request_retry_total", kind="counter", labels=_MODEL,
        help="Further lives of completions whose process died; known when they end, or when the tokenizer dies.",
        read=_engine(lambda report: report.retries_total),
    ),
    Metric(
        group="latency", name="time_to_first_token_seconds", kind="histogram", labels=_MODEL,
        help="From the call to the first token, of completions that ended well.",
        read=_engine(lambda report: report.latencies.time_to_first_token),
    ),
    Metric(
        group="latency", name="inter_token_latency_seconds", kind="histogram", labels=_MODEL,
        help="From one delta of a completion to the next; a delta is one token unless the caller is behind.",
        read=_engine(lambda report: report.latencies.inter_token),
    ),
    Metric(
        group="latency", name="request_time_per_output_token_seconds", kind="histogram", labels=_MODEL,
        help="Mean time per token after the first, of completions that ended well.",
        read=_engine(lambda report: report.latencies.per_output_token),
    ),
    Metric(
        group="latency", name="e2e_request_latency_seconds", kind="histogram", labels=_MODEL,
        help="From the call to the end, of completions that ended well.",
        read=_engine(lambda report: report.latencies.e2e),
    ),
    Metric(
        group="latency", name="request_queue_time_seconds", kind="histogram", labels=_MODEL,
        help="From the arrival at a replica to the first step, of completions that ended well.",
        read=_engine(lambda report: report.latencies.queued),
    ),
    Metric(
        group="latency", name="request_prefill_time_seconds", kind="histogram", labels=_MODEL,
        help="From the first step to the first token, of completions that ended well.",
        read=_engine(lambda report: report.latencies.prefill),
    ),
    Metric(
        group="latency", name="request_decode_time_seconds", kind="histogram", labels=_MODEL,
        help="From the first token to the last, of completions that ended well.",
        read=_engine(lambda report: report.latencies.decode),
    ),
    Metric(
        group="chips", name="dispatch_total", kind="counter", labels=_PROGRAM,
        help="Dispatches of a program that ended.", read=_programs("dispatches"),
    ),
    Metric(
        group="chips", name="dispatch_seconds_total", kind="counter", labels=_PROGRAM,
        help="Time that the chip took for these dispatches, modelled on a null chip.",
        read=_programs("device_ns", 1e-9),
    ),
    Metric(
        group="chips", name="dispatch_tokens_total", kind="counter", labels=_PROGRAM,
        help="Tokens or rows these dispatches were given.", read=_programs("tokens"),
    ),
    Metric(
        group="chips", name="chip_busy_ratio", kind="gauge", labels=("chip", "program"),
        help="Share of the last minute that a chip ran the program, by its own clock, 0 to 1; one under way counts.",
        read=_chip_use,
    ),
    Metric(
        group="chips", name="ring_high_water", kind="gauge", labels=("chip", "ring", "resource"),
        help="The most a task graph of the chip has held of a ring: tasks, bytes of heap or entries, by the parameter "
        "that sizes it.",
        read=_ring_use,
    ),
    Metric(
        group="bus", name="mailbox_depth", kind="gauge", labels=("actor", "lane"),
        help="Messages that wait for an actor.", read=_mailboxes,
    ),
    Metric(
        group="bus", name="mailbox_limit", kind="gauge", labels=("lane",),
        help="Above so many the lane takes no more; of work, no more is read from peers.",
        read=lambda _: [
            ((lane,), READ_BOUND if lane == "work" else LANE_BOUND)
            for lane in ("kill", "stop", "child", "health", "work")
        ],
    ),
    Metric(
        group="bus", name="open_asks", kind="gauge", labels=_ACTOR,
        help="Questions of an actor that are not answered yet.", read=_nodes(lambda node: node.open_asks),
    ),
    Metric(
        group="bus", name="oldest_ask_seconds", kind="gauge", labels=_ACTOR,
        help="Since when it waits for the oldest of them.", read=_nodes(lambda node: node.waits_s),
    ),
    Metric(
        group="bus", name="credit_wait_seconds", kind="histogram", labels=_ACTOR,
        help="How long asks of an actor waited for a peer to take more, sent at last or not; only those that had to.",
        read=lambda report: [((totals.name,), totals.credit_waits) for totals in report.totals],
    ),
    Metric(
        group="bus", name="dropped_stale_messages_total", kind="counter", labels=_ACTOR,
        help="Messages of a life that was over, and answers nobody waited for any more; dropped.",
        read=_counters("late_frames", "late_answers"),
    ),
    Metric(
        group="bus", name="bad_frames_total", kind="counter", labels=_ACTOR,
        help="Bytes on a socket that were no message, of a peer or a stranger; dropped.",
        read=_counters("bad_frames", "foreign_frames"),
    ),
    Metric(
        group="bus", name="bus_events_total", kind="counter", labels=("actor", "event"),
        help="Everything a node counts that should be rare, by the name it has in the log (bus.counted).",
        read=lambda report: [((t.name, event), n) for t in report.totals for event, n in sorted(t.counters.items())],
    ),
    Metric(
        group="supervision", name="worker_up", kind="gauge", labels=_WORKER,
        help="1 if the process is ready or draining, else 0.", read=_up,
    ),
    Metric(
        group="supervision", name="worker_silent", kind="gauge", labels=_WORKER,
        help="Of processes that are up: 1 if it did not answer within half a second, else 0.", read=_silent,
    ),
    Metric(
        group="supervision", name="worker_incarnation", kind="gauge", labels=_WORKER,
        help="Which life of the process this is, from 1.",
        read=lambda report: [((p.record.name,), p.record.incarnation) for p in report.processes],
    ),
    Metric(
        group="supervision", name="worker_restarts_total", kind="counter", labels=("worker", "reason"),
        help="Lives after the first, by how the last one ended: a signal, an exit code, or replaced by the supervisor.",
        read=lambda report: [((row.worker, row.reason), row.count) for row in report.restarts],
    ),
    Metric(
        group="supervision", name="reaped_children_total", kind="counter", labels=(),
        help="Lives of processes that have ended.", read=lambda report: [((), report.exits)],
    ),
    Metric(
        group="supervision", name="reap_seconds", kind="histogram", labels=(),
        help="From seeing that a process has ended until its neighbours were told.",
        read=lambda report: [((), report.reaps)],
    ),
    Metric(
        group="supervision", name="poisoned_lanes", kind="gauge", labels=_REPLICA,
        help="Chips of a replica that missed a deadline or refused a command: they take no work until replaced.",
        read=_replicas(lambda row: row.poisoned_lanes),
    ),
    Metric(
        group="record", name="ledger_bytes_total", kind="counter", labels=_ACTOR,
        help="Bytes written to ledgers; 0 without --record.",
        read=lambda report: [((totals.name,), totals.ledger_bytes) for totals in report.totals],
    ),
    Metric(
        group="record", name="ledger_write_failures_total", kind="counter", labels=_ACTOR,
        help="Ledgers that the disk refused a write, and that record nothing more.",
        read=lambda report: [((totals.name,), totals.ledger_failures) for totals in report.totals],
    ),
)  # fmt: skip

HTTP_RESPONSES = Metric(
    group="http", name="http_responses_total", kind="counter", labels=("status",),
    help="Answers of the server by HTTP status; a stream that fails after it began is one of 200.",
    read=lambda _: [],  # the server's own; no report has it
)  # fmt: skip
