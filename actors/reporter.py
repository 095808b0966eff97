"""Everything there is to tell about an engine, put together: what its host counts, and what its processes answer.

Owns: the engine's meter, events and totals over lives; the latest answers of supervisor and replica cores; the files of
a recorded run. Thread: the bus thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from ..bus import UNOBSERVED, Context, Timer
from ..bus.logs import safe_name
from ..errors import Aborted, ChipbusError, EngineClosed, RequestError
from .boot import HOST, SUPERVISOR
from .event_log import JOIN_NS, EventLog, ProcessLog
from .lives import NodeLives, ReplicaLives
from .messages.serving import TextDone
from .messages.tree import (
    AllReplicaStatistics,
    ChildRecord,
    ProcessReport,
    ReplicaStatistics,
    ReplicaStatisticsRequest,
    TreeReport,
    TreeReportRequest,
)
from .meter import Meter, OpenRequest
from .report import EngineReport, Event
from .run_files import RunFiles

__all__ = ["About", "Reporter", "is_ready"]

ANSWERS_AGE_NS = 500_000_000
"""So long the processes' answers are shared, however many ask; half as long as a page waits between two looks."""
ANSWERS_TIMEOUT_S = 3.0  # the supervisor itself gives replica cores two seconds
WRITE_S = 2.0  # at most so often the report of a recorded run is written, and only while something changes


@attrs.frozen(kw_only=True)
class About:
    """What does not change while an engine lives."""

    version: str = ""
    model: str = ""
    chip: str = ""
    run_dir: str = ""
    record: Path | None = None
    config: dict[str, str | bool | int | float | None] = attrs.Factory(dict)


class Reporter:
    """Of one engine. ``open`` it on the bus thread before anything is counted."""

    def __init__(self) -> None:
        self.about = About()  # set by the engine's owner before the bus runs
        self.log = EventLog(self._new_event)
        self._processes = ProcessLog(self.log)
        self._replicas = ReplicaLives()
        self._nodes = NodeLives()
        self._latest: dict[tuple[str, int], ProcessReport] = {}  # by name and life
        self._reaps = UNOBSERVED
        self._tree: tuple[ChildRecord, ...] = ()
        self._answered_ns: int | None = None
        self._waiting: list[Callable[[EngineReport], None]] = []
        self._files: RunFiles | None = None
        self._has_written = False
        self._write_timer: Timer | None = None
        self._flush_timer: Timer | None = None
        self._is_over = False
        self._started_unix_s = time.time()

    def open(self, ctx: Context) -> None:
        """Begin to count."""
        self._ctx = ctx
        self.meter = Meter(ctx.clock.now_ns())
        if self.about.record is not None:
            self._files = RunFiles(self.about.record)

    # What happens.

    def touch(self) -> None:
        """Something has changed: a recorded run shows it soon."""
        if self._files is not None and self._write_timer is None and not self._is_over:
            self._write_timer = self._ctx.after(WRITE_S, self._write_due)

    def begin(self, request_id: str, now_ns: int) -> OpenRequest:
        """A completion was asked for."""
        self.touch()
        return self.meter.begin(request_id, now_ns)

    def delta(self, request: OpenRequest, num_tokens: int, now_ns: int) -> None:
        """Tokens of it reached the caller."""
        self.touch()
        self.meter.delta(request, num_tokens, now_ns)

    def retry(self, request: OpenRequest, attempt: int, error: ChipbusError) -> None:
        """It was lost on its way, and goes on."""
        self.meter.retry(request, attempt)
        self._request_event("retried", request, type(error).__name__, f"attempt {attempt}, after {safe_name(error)}")

    def finish(self, request: OpenRequest, done: TextDone) -> None:
        """It ended well."""
        self.touch()
        attempt, now_ns = done.tokens.attempt, self._ctx.clock.now_ns()
        if attempt > request.attempt:  # it was lost further down, which those who noticed have said nothing of
            self._request_event("retried", request, "WorkerDied", f"it took {attempt} attempts")
        self.meter.retry(request, attempt)
        self.meter.finish(request, done, now_ns)
        self._ctx.log.info(
            "request.finished", request=request.request_id, finish_reason=done.finish_reason, attempt=attempt,
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens, replica=done.tokens.replica,
            ttft_s=request.ttft_s, queued_s=done.tokens.queued_s, e2e_s=request.age_s(now_ns),
        )  # fmt: skip

    def fail(self, request: OpenRequest, error: ChipbusError) -> None:
        """It ended with an error, or was aborted."""
        self.touch()
        self.meter.fail(request, error)
        kind = type(error).__name__
        if not isinstance(error, (Aborted, EngineClosed)):  # those are the callers' own doing
            self._request_event(
                "refused" if isinstance(error, RequestError) else "failed", request, kind, safe_name(error)
            )
        self._ctx.log.info(
            "request.failed", request=request.request_id, error=kind, attempt=request.attempt,
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens, ttft_s=request.ttft_s,
            e2e_s=request.age_s(self._ctx.clock.now_ns()),
        )  # fmt: skip

    def saw_tree(self, tree: Sequence[ChildRecord]) -> None:
        """The supervisor sent its next picture."""
        self._tree = tuple(tree)
        self._processes.saw(tree)
        if not self._has_written and is_ready(tree):  # from the first moment a recorded run has a report
            self._write(self.report())
        self.touch()

    def saw_replicas(self, rows: Sequence[ReplicaStatistics]) -> None:
        """Replica cores have answered."""
        self._replicas.saw(rows)

    def _request_event(self, kind: str, request: OpenRequest, error: str, text: str) -> None:
        now_ns = self._ctx.clock.now_ns()
        self.log.add_request(kind, request.request_id, error, text, now_ns)
        if self.log.is_holding and self._flush_timer is None:
            self._flush_timer = self._ctx.after(JOIN_NS / 1e9, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        self.log.flush(self._ctx.clock.now_ns())

    def _new_event(self, event: Event) -> None:
        if self._files is not None:
            self._files.event(event)
            self.touch()

    # Reports.

    def ask(self, on_done: Callable[[EngineReport], None]) -> None:
        """A report, from answers that are at most half a second old; of processes that do not answer, what is known."""
        if self._is_over or (
            self._answered_ns is not None and self._ctx.clock.now_ns() - self._answered_ns < ANSWERS_AGE_NS
        ):
            on_done(self.report())
            return
        self._waiting.append(on_done)
        if len(self._waiting) > 1:
            return
        left = {"tree", "replicas"}

        def settle(what: str) -> None:
            left.discard(what)
            if not left:
                self._answered_ns = self._ctx.clock.now_ns()
                self._tell_waiting()

        def on_tree(reply: object) -> None:
            assert isinstance(reply, TreeReport)
            self._latest = {(process.record.name, process.record.incarnation): process for process in reply.processes}
            for (name, life), process in self._latest.items():
                if process.node is not None:
                    self._nodes.saw(name, life, process.node)
            self._reaps = reply.reaps
            settle("tree")

        def on_replicas(reply: object) -> None:
            assert isinstance(reply, AllReplicaStatistics)
            self.saw_replicas(reply.replicas)
            settle("replicas")

        def unheard(what: str) -> Callable[[ChipbusError], None]:
            return lambda _: settle(what)

        for what, message, on_reply in (
            ("tree", TreeReportRequest(), on_tree),
            ("replicas", ReplicaStatisticsRequest(), on_replicas),
        ):
            self._ctx.ask(SUPERVISOR, message, timeout_s=ANSWERS_TIMEOUT_S, on_reply=on_reply, on_error=unheard(what))

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            report = self.report()
            for on_done in waiting:
                on_done(report)

    def report(self, *, is_closed: bool = False) -> EngineReport:
        """What is known now."""
        now_ns, about, meter = self._ctx.clock.now_ns(), self.about, self.meter
        recent = meter.recent(now_ns)
        up = {record.name for record in self._tree if record.state in ("ready", "draining")}
        return EngineReport(
            at_unix_s=time.time(),
            started_unix_s=self._started_unix_s,
            version=about.version,
            model=about.model,
            chip=about.chip,
            run_dir=about.run_dir,
            record="" if about.record is None else str(about.record),
            config=about.config,
            is_ready=not self._is_over and is_ready(self._tree),
            is_closed=is_closed,
            processes=self._process_reports(),
            replicas=self._replicas.totals(up),
            totals=self._nodes.totals(),
            restarts=self._processes.restarts(),
            exits=self._processes.exits,
            reaps=self._reaps,
            requests_total=meter.requests,
            retries_total=meter.retries,
            finished=dict(meter.finished),
            failed=dict(meter.failed),
            prompt_tokens=meter.prompt_tokens,
            output_tokens=meter.output_tokens,
            latencies=meter.latencies(),
            recent=recent.latencies,
            recent_s=recent.seconds,
            recent_prompt_tokens=recent.prompt_tokens,
            recent_output_tokens=recent.output_tokens,
            open=meter.rows(now_ns),
            open_total=meter.num_open,
            events=self.log.events,
        )

    def _process_reports(self) -> tuple[ProcessReport, ...]:
        """The host application, and the tree as it was last heard, with what these very lives said."""
        host = ChildRecord(name=HOST, kind=HOST, pid=os.getpid(), parent="", state="ready", incarnation=1, restarts=0)
        heard = {**self._latest, (HOST, 1): ProcessReport(host, self._ctx.report())}
        silent = ProcessReport(host, None)

        def report(record: ChildRecord) -> ProcessReport:
            said = heard.get((record.name, record.incarnation), silent) if _answers(record) else silent
            return attrs.evolve(said, record=record)

        return tuple(map(report, (host, *self._tree)))

    # A recorded run, and the end.

    def _write_due(self) -> None:
        self._write_timer = None
        self.ask(self._write)

    def _write(self, report: EngineReport) -> None:
        if self._files is not None:
            self._has_written = True
            self._files.report(report)

    def end(self) -> None:
        """Nothing more is served: who waits gets what is known, and listeners may look for the end."""
        self._is_over = True
        self._tell_waiting()
        if self._files is not None:  # nor, of an engine that never began, is there anything to tell
            self._write(self.report())
        self.log.notify()

    def close(self) -> None:
        """Every process has ended: the last report of a recorded run says so."""
        if self._files is not None:
            self.log.flush(self._ctx.clock.now_ns())
            self._files.report(self.report(is_closed=True))
            self._files = None


def _answers(record: ChildRecord) -> bool:
    return record.state in ("starting", "ready", "draining", "stopping")


def is_ready(tree: Sequence[ChildRecord]) -> bool:
    """Whether a request would be served now: a replica core is ready, not draining, and so is every chip of it."""
    return any(
        core.kind == "replica"
        and core.state == "ready"
        and all(chip.state == "ready" for chip in tree if chip.kind == "chip" and chip.parent == core.name)
        for core in tree
    )
