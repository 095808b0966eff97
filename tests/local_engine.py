"""A whole engine in one process on a virtual clock: the real actors under the real supervisor, on null chips."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import attrs

from chipbus.actors.boot import HOST, SUPERVISOR, ChildSpec
from chipbus.actors.config import EngineConfig
from chipbus.actors.handling import ANYHOW, Handling
from chipbus.actors.host import HostActor
from chipbus.actors.kinds import load_actor
from chipbus.actors.local_nursery import LocalNursery
from chipbus.actors.messages.serving import Generate
from chipbus.actors.messages.tree import CloseReport
from chipbus.actors.plan import plan_engine
from chipbus.actors.replica import ReplicaActor
from chipbus.actors.request import RequestState
from chipbus.actors.router import RouterActor
from chipbus.actors.sampling import SamplingParams
from chipbus.actors.supervisor import SupervisorActor
from chipbus.actors.text import TextModel
from chipbus.actors.tokenizer import TokenizerActor
from chipbus.actors.tree_actor import TreeEvents
from chipbus.bus import Actor, LinkFaults, LocalSystem, pack_tokens
from chipbus.errors import ChipbusError
from chipbus.kernels.null import null_token

__all__ = ["VOCAB", "LocalEngine", "expected_tokens"]

VOCAB = 1024  # of the demo model

_text_model = cache(TextModel)  # read once, not once a life: nothing is ever written to it


class _Tokenizer(TokenizerActor):
    def on_start(self) -> None:
        self._model = _text_model(Path(self._config.model))


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What null chips answer."""
    tokens = list(prompt)
    for position in range(len(prompt) - 1, len(prompt) - 1 + count):
        tokens.append(null_token(tokens[-1], position, VOCAB))
    return tokens[len(prompt) :]


@cache
def _plan(config: EngineConfig) -> Any:
    return plan_engine(config)


class LocalEngine:
    """Started when made. Equal seeds, faults and calls give the same run, event by event."""

    def __init__(self, seed: int, *, replicas: int = 1, faults: LinkFaults | None = None, **settings: Any) -> None:
        sizes = {"max_model_len": 64, "kv_pages": 20, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 32}
        config = EngineConfig(
            chip="null",
            data_parallel_size=replicas,
            max_restarts=1_000_000,
            **{"max_request_restarts": 20, **sizes, **settings},
        )
        self.system = LocalSystem(seed, directory=False)
        self.host = HostActor(config.max_request_restarts)
        self.deaths: list[ChipbusError] = []
        self.is_ready = False
        self.actors: dict[str, Actor] = {}
        self.states: list[RequestState] = []
        self.host.events = TreeEvents(
            on_bound=lambda: None, on_ready=self._ready, on_dead=self.deaths.append, on_progress=lambda _: None
        )
        self.nursery = LocalNursery(self.system, self._make)
        boot = attrs.evolve(_plan(config).boot(Path()), seed=seed)
        self.system.spawn(HOST, self.host)
        self.system.spawn(SUPERVISOR, SupervisorActor(boot, self.nursery))
        self.system.run_until(lambda: self.is_ready or self.deaths != [])
        assert self.deaths == []
        self.system.faults = faults  # not before: what goes wrong during the first start ends it
        self.names = [spec.name for spec in boot.children]

    def _ready(self) -> None:
        self.is_ready = True

    def _make(self, spec: ChildSpec, _: int) -> Actor:
        if spec.kind == "tokenizer":
            actor: Actor = _Tokenizer(spec.config)
        else:
            actor = load_actor(spec.kind, {**spec.config, **({"inline": True} if spec.kind == "chip" else {})})
        self.actors[spec.name] = actor
        return actor

    def submit(self, prompt: list[int], params: SamplingParams, handling: Handling = ANYHOW) -> RequestState:
        """Ask for one completion."""
        state = RequestState(f"r{len(self.states)}", 1, False, lambda: None)
        self.states.append(state)
        ids = pack_tokens(prompt)
        message = Generate(request_id=state.request_id, prompt_token_ids=ids, params=params, handling=handling)
        self.host.submit(message, 0, state, 1e5)
        return state

    def is_alive(self, name: str) -> bool:
        """Whether there is a process to strike."""
        return self.system.incarnation(name) > 0

    def is_idle(self) -> bool:
        """Every process is ready, and nothing of any request is held anywhere."""
        if any(record.state != "ready" for record in self.host.tree) or self.host._requests:
            return False
        for actor in self.actors.values():
            if isinstance(actor, TokenizerActor) and actor._streams:
                return False
            if isinstance(actor, RouterActor):
                actor.check_integrity()
                if actor._requests or any(actor.load().values()):
                    return False
            if isinstance(actor, ReplicaActor):
                scheduler = actor._scheduler
                scheduler.check_integrity()
                if actor._serving or actor._in_flight or scheduler.pages_free != scheduler.pages_total:
                    return False
        return True

    def close(self) -> CloseReport:
        """Stop everything. The host waits one second longer than it may take, which two long delays would use up."""
        faults = self.system.faults
        if faults is not None:
            self.system.faults = attrs.evolve(faults, longest_delay_s=min(0.2, faults.longest_delay_s))
        answers: list[Any] = []
        self.host.shut_down(5.0, answers.append)
        self.system.run_until(lambda: answers != [])
        assert isinstance(answers[0], CloseReport), answers[0]
        return answers[0]
