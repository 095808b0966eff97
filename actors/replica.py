"""Replica core: takes requests, decides steps, has its chip compute them, and sends the tokens back.

Owns: the requests of one replica (through its scheduler), and what its chip holds: programs, weights, KV cache.
Thread: the bus loop. No torch: the core only describes work.

    Submit ──▶ scheduler ──Batch──▶ build_step ──Dispatch…──▶ chip worker
    TokenDelta ◀── apply ◀── read_step ◀──Completion…──┘

The chip never waits for the core: a step is sent while the one before it is computed (``scheduler.DEPTH``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from ..bus import Actor, Call, Progress, Ready, Series, handles, pack_tokens, unpack_tokens
from ..errors import Aborted, BadTarget, ChipbusError, RequestError, WorkerDied, WorkerLost
from ..kernels.dispatch import Completion, Dispatch
from ..kernels.qwen3.model import ModelSpec
from ..kernels.qwen3.step import Limits, ModelPrograms, build_step, read_step
from .attempts import Attempts
from .boot import SUPERVISOR
from .handling import Handling
from .lane import ChipLane, LaneState, Outcome
from .messages.launching import AllocTensor, RegisterProgram
from .messages.serving import LogprobRow, Submit, TokenDelta, TokensDone
from .messages.tree import ProgramStatistics, ReplicaStatistics, ReplicaStatisticsRequest, StartError
from .scheduler import DEPTH, Batch, Ending, RowKind, Scheduler, SchedulerConfig, TokenEvent

__all__ = ["ReplicaActor", "ReplicaConfig"]

_STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)  # vLLM's


@attrs.frozen(kw_only=True)
class ReplicaConfig:
    """What a replica core is told at spawn."""

    replica: int
    dp_rank: int
    chip: str  # name of its chip worker
    model_dir: str
    dtype: str
    weights: str = ""  # what matrices are kept in: "int8", or "" for ``dtype``
    limits: Limits
    prefill_chunk_tokens: int
    prefix_cache: bool = True
    max_waiting: int
    max_request_restarts: int
    load_timeout_s: float  # for one program or tensor to become resident
    step_timeout_s: float  # for one dispatch


@attrs.define(eq=False)
class _Serving:
    """One request's reply port and its times, nanoseconds on the bus clock."""

    call: Call
    arrived_ns: int
    attempts: Attempts  # on lives of the chip
    num_prompt_tokens: int
    num_tokens: int  # of its answer, delivered by this or an earlier life
    first_step_ns: int = 0
    first_token_ns: int = 0
    prompt_end: int = 0  # how far steps of this life have come in its prompt
    num_cached_tokens: int = 0  # of these positions, those they found computed


@attrs.define(eq=False)
class _Step:
    """A step on the chip, or on its way there and back."""

    batch: Batch
    dispatches: tuple[Dispatch, ...]
    began_ns: int
    outcomes: Sequence[Outcome] | None = None  # once it has ended
    is_spoilt: bool = False  # the step before it failed, so whatever comes of this one does not count


@attrs.define(eq=False)
class _ProgramCount:
    """What one program was given so far."""

    name: str
    dispatches: int = 0
    tokens: int = 0
    device_ns: int = 0


class ReplicaActor(Actor):
    """Serves ``Submit`` asks from the router with one chip worker."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = msgspec.convert(config, ReplicaConfig)
        self._serving: dict[str, _Serving] = {}
        self._in_flight: list[_Step] = []  # in the order in which the chip computes them
        self._last_end_ns = 0
        self._is_reported_ready = False
        self._next_dispatch_id = 1
        self._steps = self._tokens_generated = self._prompt_tokens = self._step_ns = 0
        self._step_tokens = Series(_STEP_TOKENS)

    def on_start(self) -> None:
        """Read the model's description; the chip follows when it is up."""
        self._began_ns = self.ctx.clock.now_ns()
        spec = ModelSpec.from_directory(self.config.model_dir, self.config.dtype)
        self._programs = ModelPrograms.build(spec, self.config.limits, weights=self.config.weights)
        self._counts = {program.digest: _ProgramCount(program.name) for program in self._programs.programs}
        self._scheduler = Scheduler(
            SchedulerConfig(
                limits=self.config.limits,
                prefill_chunk_tokens=self.config.prefill_chunk_tokens,
                max_waiting=self.config.max_waiting,
                vocab_size=spec.vocab_size,
                eos_token_ids=spec.eos_token_ids,
                prefix_cache=self.config.prefix_cache,
            )
        )
        self._lane = ChipLane(
            self.ctx,
            self.config.chip,
            depth=DEPTH,
            launch_timeout_s=self.config.step_timeout_s,
            command_timeout_s=self.config.load_timeout_s,
            prepare=lambda: [
                *map(RegisterProgram, self._programs.programs),
                *map(AllocTensor, self._programs.tensors),
            ],
            on_ready=self._chip_is_ready,
            on_lost=self._chip_is_lost,
            on_refused=self._chip_refused,
            on_progress=self._relay_progress,
        )

    # The chip: made ready whenever it comes up, given up when it goes.

    def on_peer_up(self, name: str) -> None:
        """The chip worker is up; a router or supervisor needs nothing from here."""
        if name == self.config.chip:
            self._lane.peer_up()

    def on_peer_down(self, name: str, reason: str) -> None:
        """The chip worker is gone; for any other the bus has done what there is to do."""
        if name == self.config.chip:
            self._lane.peer_down(reason)

    def _chip_is_lost(self, lost: WorkerLost) -> None:
        """The KV cache went with the chip: compute prompts and tokens so far again on the next one."""
        steps, self._in_flight = self._in_flight, []
        for request_id in dict.fromkeys(row.request_id for step in steps for row in step.batch.record.rows):
            serving = self._serving.get(request_id)
            if serving is not None and not serving.attempts.lost(serving.num_tokens):
                self._fail(request_id, WorkerDied(serving.attempts.spent(lost)))
        for step in reversed(steps):
            self._scheduler.drop(step.batch)
        self._scheduler.lose_pages()

    def _relay_progress(self, item: Progress) -> None:
        if not self._is_reported_ready:
            self.ctx.tell(SUPERVISOR, item)

    def _chip_refused(self, error: ChipbusError) -> None:
        self.ctx.log.error("chip.refused", chip=self.config.chip, error=str(error))
        # Without weights there is no replica. The supervisor ends this life, in the chip's own words.
        self.ctx.tell(SUPERVISOR, StartError(type(error).__name__, str(error)))

    def _chip_is_ready(self) -> None:
        if not self._is_reported_ready:
            self._is_reported_ready = True
            seconds = (self.ctx.clock.now_ns() - self._began_ns) / 1e9
            detail = f"{self._lane.committed_bytes / 2**20:.0f} MiB resident"
            self.ctx.tell_ready(SUPERVISOR, Ready(seconds=seconds, detail=detail))
        self._scheduler.is_uniform = self._lane.is_uniform
        self._launch()

    # Requests.

    @handles(Submit)
    def _submit(self, message: Submit, call: Call) -> None:
        request_id = message.request_id
        prompt, generated = unpack_tokens(message.prompt_token_ids), unpack_tokens(message.generated)
        self._fail(request_id, Aborted(f"a later attempt has taken the place of request {request_id}"))
        try:
            self._check_pin(message.handling)
            ending = self._scheduler.add(
                request_id, prompt, message.params, generated,
                priority=message.handling.priority, is_admitted=message.attempt > 1,
            )  # fmt: skip
        except RequestError as refusal:  # its caller is told; nothing has failed here that a log should tell
            call.fail(refusal)
            return
        attempts = Attempts(self.config.max_request_restarts, message.attempt)
        serving = _Serving(call, self.ctx.clock.now_ns(), attempts, len(prompt), len(generated))
        if ending is not None:  # only its last word was lost
            serving.first_step_ns = serving.first_token_ns = serving.arrived_ns
            self._end(serving, ending)
            return
        self._serving[request_id] = serving
        call.on_cancel(lambda _: self._abort(request_id, call))
        self._launch()

    def _check_pin(self, handling: Handling) -> None:
        """Whoever sends a request that is pinned elsewhere is at fault; serving it here would only hide that."""
        for name, mine in (("replica", self.config.replica), ("dp_rank", self.config.dp_rank)):
            wanted = getattr(handling, name)
            if wanted not in (None, mine):
                raise BadTarget(f"{name} {wanted} was asked of the core that is {name} {mine}", param=name)

    def _abort(self, request_id: str, call: Call) -> None:
        serving = self._serving.get(request_id)
        if serving is not None and serving.call is call:  # a later attempt may have taken its place
            del self._serving[request_id]
            self._scheduler.abort(request_id)

    def _fail(self, request_id: str, error: ChipbusError) -> None:
        serving = self._serving.pop(request_id, None)
        self._scheduler.abort(request_id)
        if serving is not None:
            serving.call.fail(error)

    # Steps.

    def _launch(self) -> None:
        """Start the next steps, as far as the chip takes them."""
        while self._can_launch() and (batch := self._scheduler.next_batch()) is not None:
            self._launch_batch(batch)

    def _can_launch(self) -> bool:
        """Not behind a step that does not count. An answer that was lost keeps its step in flight without credit."""
        is_free = self._lane.has_credit and len(self._in_flight) < DEPTH
        return is_free and not any(step.is_spoilt for step in self._in_flight)

    def _launch_batch(self, batch: Batch) -> None:
        now_ns = self.ctx.clock.now_ns()
        for row in batch.record.rows:
            serving = self._serving[row.request_id]
            serving.first_step_ns = serving.first_step_ns or now_ns
            if row.kind is RowKind.PREFILL:
                start, end = (min(at, serving.num_prompt_tokens) for at in (row.start, row.start + row.length))
                serving.num_cached_tokens += max(start - serving.prompt_end, 0)
                serving.prompt_end = max(end, serving.prompt_end)
        dispatches = build_step(self._programs, batch.step, self._next_dispatch_id)
        self._next_dispatch_id += len(dispatches)
        step = _Step(batch, dispatches, now_ns)
        self._in_flight.append(step)
        self._record(batch)
        trace_id = self._serving[batch.record.rows[0].request_id].call.trace_id
        after = [[*range(position)][-1:] for position in range(len(dispatches))]  # each works on what the last one left
        self._lane.launch(dispatches, after, lambda outcomes: self._ended(step, outcomes), trace_id)

    def _ended(self, step: _Step, outcomes: Sequence[Outcome]) -> None:
        """Take in what came back, in the order of the steps."""
        if any(isinstance(outcome, WorkerLost) for outcome in outcomes):
            return  # on_lost says it, and is about more than this step
        step.outcomes = outcomes
        while self._in_flight and (ended := self._in_flight[0].outcomes) is not None:
            step = self._in_flight.pop(0)
            error = next((outcome for outcome in ended if isinstance(outcome, ChipbusError)), None)
            if step.is_spoilt:
                self._scheduler.drop(step.batch)
            elif error is not None:
                self._step_failed(step, error)
            else:
                self._finish_step(step, [outcome for outcome in ended if isinstance(outcome, Completion)])
        self._launch()

    def _step_failed(self, step: _Step, error: ChipbusError) -> None:
        """A dispatch failed: its requests fail with the chip's words, the others go on.

        The step behind it went on from what this one left. What it computes for requests of its own is computed again.
        """
        self.ctx.log.error("step.failed", step_id=step.batch.record.step_id, error=str(error))
        for row in step.batch.record.rows:
            self._fail(row.request_id, error)
        self._scheduler.drop(step.batch)
        for behind in self._in_flight:
            behind.is_spoilt = True

    def _finish_step(self, step: _Step, completions: Sequence[Completion]) -> None:
        tokens = read_step(step.batch.step, completions)
        now_ns = self.ctx.clock.now_ns()
        self._steps += 1
        self._count(step.dispatches, completions)
        prompt_tokens = sum(len(row.tokens) for row in step.batch.step.prefills)
        self._prompt_tokens += prompt_tokens
        self._step_tokens.observe(prompt_tokens + len(step.batch.step.decodes))
        for event in self._scheduler.apply(step.batch, tokens):
            self._deliver(event, now_ns)
        began_ns = max(step.began_ns, self._last_end_ns)  # steps overlap; their times do not
        self._last_end_ns = self.ctx.clock.now_ns()
        self._step_ns += self._last_end_ns - began_ns

    def _deliver(self, event: TokenEvent, now_ns: int) -> None:
        serving = self._serving[event.request_id]
        serving.first_token_ns = serving.first_token_ns or now_ns
        self._tokens_generated += 1
        token = event.token
        rows: tuple[LogprobRow, ...] = ()
        if token.logprob is not None:
            rows = (LogprobRow(token.token_id, token.logprob, token.top_ids, token.top_logprobs),)
        ids = pack_tokens([token.token_id])
        serving.num_tokens = event.token_index + 1
        serving.call.item(TokenDelta(token_index=event.token_index, token_ids=ids, logprobs=rows))
        if event.ending is not None and serving.call.is_open:  # it closes if nobody reads
            del self._serving[event.request_id]
            self._end(serving, event.ending)

    def _end(self, serving: _Serving, ending: Ending) -> None:
        serving.call.reply(
            TokensDone(
                finish_reason=ending.finish_reason,
                stop_token_id=ending.stop_token_id,
                replica=self.config.replica,
                dp_rank=self.config.dp_rank,
                attempt=serving.attempts.number,
                num_cached_tokens=serving.num_cached_tokens,
                queued_s=(serving.first_step_ns - serving.arrived_ns) / 1e9,
                prefill_s=(serving.first_token_ns - serving.first_step_ns) / 1e9,
                decode_s=(self.ctx.clock.now_ns() - serving.first_token_ns) / 1e9,
            )
        )

    # What others ask.

    def progress(self) -> int:
        """Steps so far."""
        return self._steps

    @handles(ReplicaStatisticsRequest)
    def _statistics(self, _message: ReplicaStatisticsRequest, call: Call) -> None:
        counts = self._counts.values()
        call.reply(
            ReplicaStatistics(
                replica=self.config.replica,
                pages_total=self._scheduler.pages_total,
                pages_free=self._scheduler.pages_free,
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                steps=self._steps,
                tokens_generated=self._tokens_generated,
                prompt_tokens=self._prompt_tokens,
                step_ns=self._step_ns,
                device_ns=sum(count.device_ns for count in counts),
                pages_cached=self._scheduler.pages_cached,
                pending_tokens=self._scheduler.pending_tokens,
                preemptions=self._scheduler.preemptions,
                prefix_queries=self._scheduler.prefix_queries,
                prefix_hits=self._scheduler.prefix_hits,
                programs=tuple(ProgramStatistics(c.name, c.dispatches, c.tokens, c.device_ns) for c in counts),
                incarnation=self.ctx.incarnation,
                step_tokens=self._step_tokens.read(),
                poisoned_lanes=int(self._lane.state is LaneState.CONDEMNED),
            )
        )

    def _count(self, dispatches: Sequence[Dispatch], completions: Sequence[Completion]) -> None:
        for dispatch, completion in zip(dispatches, completions, strict=True):
            count = self._counts[dispatch.program]
            count.dispatches += 1
            # What is first given by value has one element for each token, or each row, that is to be computed.
            count.tokens += next(arg.shape[0] for arg in dispatch.args if not arg.resident)
            count.device_ns += completion.device_ns

    def _record(self, batch: Batch) -> None:
        """The batch decision, with the ids that tie callers' requests to the step."""
        if self.ctx.ledger is None:
            return
        self.ctx.ledger.append(
            "batch",
            {
                "step_id": batch.record.step_id,
                "rows": [
                    {
                        "request_id": row.request_id,
                        "trace_id": self._serving[row.request_id].call.trace_id.hex(),
                        "kind": row.kind,
                        "start": row.start,
                        "length": row.length,
                    }
                    for row in batch.record.rows
                ],
                "preempted": list(batch.record.preempted),
                "running": self._scheduler.num_running,
                "waiting": self._scheduler.num_waiting,
            },
        )
