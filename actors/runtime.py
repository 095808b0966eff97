"""A running engine, seen from the host application: prompts in, deltas out. Both engine facades stand on it.

Owns: the numbers and seeds of requests. The processes are the process tree's.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs

from ..bus import Progress, pack_tokens
from ..errors import ChipbusError, RequestInvalid
from .handling import Handling, pinned_replica
from .host import HostActor
from .manifest import installed_version, plain_settings, write_manifest
from .messages.serving import ChatTurn, Detokenize, Detokenized, Encoded, Generate, Tokenize
from .messages.tree import ChildRecord, CloseReport, Drain, Drained
from .outputs import Statistics
from .plan import EnginePlan
from .process_tree import ProcessTree, TreeSettings
from .report import EngineReport, Event
from .reporter import About
from .request import RequestState
from .sampling import SamplingParams
from .unicode_text import check_unicode

__all__ = ["Prompt", "Runtime", "TextAnswer", "detokenize_message", "tokenize_message"]

Prompt = str | Sequence[int] | Sequence[ChatTurn]
TextAnswer = Encoded | Detokenized | ChipbusError


class Runtime:
    """One engine's processes and requests. Made by ``start``; thread-safe; ``close`` is idempotent."""

    def __init__(self, plan: EnginePlan, on_progress: Callable[[Progress], None] | None) -> None:
        config = plan.config
        self.plan = plan
        self._seeds = random.Random(config.seed)  # noqa: S311 (repeatable on purpose)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._host = HostActor(config.max_request_restarts)
        settings = TreeSettings(
            what="engine",
            start_timeout_s=config.start_timeout_s,
            close_timeout_s=config.close_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            seed=config.seed,
            record=config.record,
            run_dir=config.run_dir,
        )
        version = installed_version()  # now: it opens files, and nobody would take down what a failure left behind
        self.processes = ProcessTree(self._host, settings, on_progress)
        self._host.reporter.about = About(
            version=version,
            model=config.model,
            chip=config.chip,
            run_dir=str(self.processes.run_dir),
            record=None if config.record is None else config.record.absolute(),  # the host may move
            config=plain_settings(attrs.asdict(config, recurse=False)),
        )

    @classmethod
    def start(
        cls,
        plan: EnginePlan,
        on_progress: Callable[[Progress], None] | None = None,
        on_made: Callable[[Runtime], None] | None = None,
    ) -> Runtime:
        """Start the tree and wait until every process is ready. ``on_made`` hears of the runtime before that.

        Raises the child's own error, or ``StartFailed``; then, as on Ctrl-C, nothing is left behind.
        """
        if plan.config.record is not None:
            config = attrs.asdict(plan.config, recurse=False)
            write_manifest(plan.config.record, config, model_dir=str(plan.model_dir), fingerprint=plan.spec.fingerprint)
        runtime = cls(plan, on_progress)
        if on_made is not None:
            on_made(runtime)
        runtime.processes.start(plan.boot)
        return runtime

    # Requests.

    def submit(
        self, prompt: Prompt, params: SamplingParams, handling: Handling, on_change: Callable[[], None]
    ) -> RequestState:
        """Send one prompt; returns its state."""
        self.processes.check_usable()
        pinned_replica(handling, len(self.plan.topology.replicas))
        fields = _prompt_fields(prompt)
        with self._lock:
            number = next(self._numbers)
            seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        request_id = f"req-{number}"
        state = RequestState(request_id, params.n, params.logprobs is not None, on_change)
        for index in range(params.n):
            child = request_id if params.n == 1 else f"{request_id}.{index}"
            message = Generate(
                request_id=child,
                params=attrs.evolve(params, n=1, seed=(seed + index) % 2**63),
                handling=handling,
                **fields,
            )
            self.processes.post(partial(self._host.submit, message, index, state, self.plan.config.request_timeout_s))
        return state

    def abort(self, request_id: str) -> None:
        """Cancel a prompt, all its completions; an unknown or ended id is ignored."""
        self.processes.post(partial(self._host.abort, request_id))

    def leave(self, state: RequestState) -> None:
        """Its caller reads no further: abort it, unless it is over."""
        if not state.is_over:
            self.abort(state.request_id)

    # Text.

    def ask_about_text(self, message: Tokenize | Detokenize, on_done: Callable[[TextAnswer], None]) -> None:
        """Ask the tokenizer; ``on_done`` is called once, on the bus thread."""
        self.processes.check_usable()
        timeout_s = self.plan.config.request_timeout_s
        self.processes.post(partial(self._host.ask_about_text, message, timeout_s, on_done))

    # What is going on.

    def tree(self) -> tuple[ChildRecord, ...]:
        """The latest picture of the processes."""
        return self.processes.records()

    def fetch_statistics(self) -> Statistics:
        """Ask the replicas now; those that do not answer in time are missing from the sum."""
        self.processes.check_usable()
        answered = threading.Event()
        self.processes.post(lambda: self._host.refresh_statistics(lambda _: answered.set()))
        while not answered.wait(0.2) and self.processes.death is None and not self.processes.is_closing:
            pass
        return self.latest_statistics()

    def latest_statistics(self) -> Statistics:
        """The latest snapshot, without asking anybody."""
        rows = self._host.replicas
        return Statistics(
            replicas=len(rows),
            pages_total=sum(r.pages_total for r in rows),
            pages_free=sum(r.pages_free for r in rows),
            running=sum(r.running for r in rows),
            waiting=sum(r.waiting for r in rows),
            requests=self._host.reporter.meter.requests,
            steps=sum(r.steps for r in rows),
            prompt_tokens=sum(r.prompt_tokens for r in rows),
            tokens_generated=sum(r.tokens_generated for r in rows),
            step_ns=sum(r.step_ns for r in rows),
            device_ns=sum(r.device_ns for r in rows),
            restarts=sum(r.restarts for r in self._host.tree),
        )

    def report(self) -> EngineReport:
        """Ask the processes now, or share an answer of the last half second; who does not answer is as last known."""
        self.processes.check_usable()
        answers: list[EngineReport] = []
        answered = threading.Event()

        def settle(report: EngineReport) -> None:
            answers.append(report)
            answered.set()

        self.processes.post(lambda: self._host.reporter.ask(settle))
        while not answered.wait(0.2):
            self.processes.check_usable()
        return answers[0]

    def events(self, after: int) -> list[Event]:
        """Events with a number above ``after``, as far as they are kept."""
        return [event for event in self._host.reporter.log.events if event.number > after]

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called on the bus thread after new events and at the end; returns what ends that."""
        return self._host.reporter.log.listen(callback)

    def drain(self, replica: str, timeout_s: float, *, stays_down: bool) -> bool:
        """End a replica when its requests have ended; whether they had within ``timeout_s``."""
        self.processes.check_usable()
        answers: list[Drained | ChipbusError] = []
        answered = threading.Event()

        def settle(answer: Drained | ChipbusError) -> None:
            answers.append(answer)
            answered.set()

        message = Drain(replica=replica, timeout_s=timeout_s, stays_down=stays_down)
        self.processes.post(lambda: self._host.drain(message, settle))
        while not answered.wait(0.2):
            self.processes.check_usable()
        if isinstance(answers[0], ChipbusError):
            raise answers[0]
        return answers[0].is_empty

    def close(self) -> CloseReport:
        """Stop every process under one deadline and report how each ended. A second call returns the same report."""
        return self.processes.close()


def tokenize_message(prompt: str | Sequence[ChatTurn]) -> Tokenize:
    """The question which ids text or a conversation has."""
    if isinstance(prompt, str):
        check_unicode(prompt, "the prompt")
        return Tokenize(prompt=prompt)
    return Tokenize(turns=tuple(prompt))


def detokenize_message(token_ids: Sequence[int]) -> Detokenize:
    """The question which text ids have; raises ``RequestInvalid`` for what is no id."""
    return Detokenize(token_ids=pack_tokens([_int32(token_id) for token_id in token_ids]))


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        check_unicode(prompt, "the prompt")
        return {"prompt": prompt}
    if isinstance(prompt, Sequence) and prompt and all(isinstance(turn, ChatTurn) for turn in prompt):
        return {"turns": tuple(prompt)}
    if isinstance(prompt, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return {"prompt_token_ids": pack_tokens([_int32(i) for i in prompt])}
    raise RequestInvalid(f"a prompt is text or a sequence of token ids, not {type(prompt).__name__}")


def _int32(token_id: object) -> int:
    if not isinstance(token_id, int) or isinstance(token_id, bool):
        raise RequestInvalid(f"token id {token_id!r} is no integer")
    if not 0 <= token_id < 2**31:
        raise RequestInvalid(f"token id {token_id} is outside [0, 2147483648)")
    return token_id
