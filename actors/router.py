"""Router: sends each request to one replica core, and its answers back. Present with one replica, too.

Owns: which replicas serve, where each open request is, what of its answer has come, the load of each target, and where
sessions are.
Thread: the bus loop.

    tokenizer ──Submit──▶ router ──Submit──▶ replica core
              ◀─ Routed, TokenDelta…, TokensDone ─

Who may serve a request: the replica it is pinned to, or any; of these those that are up, not lost for good, not being
ended, and whose queue has not refused it. Only then is one chosen: where its session is, else the least loaded. A
request nobody may serve now waits. Four refusals: ``BadTarget`` (no such replica), ``NotReady`` (lost for good),
``Overloaded`` (every queue is full) and ``PinOverloaded`` (that of its replica is).

When a replica core dies its requests go to another one, or to its next life, with the tokens that have come so far; the
answer goes on behind them.
"""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from ..bus import Actor, Ask, Call, Ready, count_tokens, handles
from ..errors import (
    Aborted,
    BadFrame,
    ChipbusError,
    ConfigError,
    NotReady,
    Overloaded,
    PeerGone,
    PinOverloaded,
    RestartLimit,
    WorkerDied,
)
from .attempts import Attempts
from .boot import SUPERVISOR
from .handling import pinned_replica
from .messages.routing import Routed, Withheld, Withhold
from .messages.serving import Submit, TokenDelta, TokensDone
from .messages.tree import GroupLost
from .router_policy import LoadLedger, Sessions, Target

__all__ = ["RouterActor", "RouterConfig"]


@attrs.frozen(kw_only=True)
class RouterConfig:
    """What a router is told at spawn."""

    replicas: tuple[str, ...]
    """Node names of the replica cores: ``replica.0``, …"""
    max_waiting: int
    """Requests held while no replica that may serve them is up, before ``Overloaded``."""
    max_request_restarts: int
    """Deaths of replica cores that a request survives without a token in between."""


@attrs.define(eq=False)
class _Request:
    """One open ``Submit``."""

    submit: Submit
    call: Call
    attempts: Attempts
    generated: bytearray  # packed ids of the answer so far
    pin: Target | None  # the one replica that may serve it; None: any may
    chosen_by: str = ""
    target: Target | None = None  # None: it waits for a replica
    ask: Ask | None = None
    full: set[Target] = attrs.field(factory=set)  # replicas whose queue would not take it

    @property
    def key(self) -> str:
        """Its id."""
        return self.submit.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens of its answer that have come."""
        return count_tokens(self.generated)


def _target(name: str) -> Target:
    kind, _, number = name.partition(".")
    if kind != "replica" or not number.isdecimal():
        raise ConfigError(f"replica {name!r} is not replica.N")
    return Target(int(number), int(number))


class RouterActor(Actor):
    """Serves ``Submit`` asks from tokenizers by asking replicas."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = msgspec.convert(config, RouterConfig)
        self._targets = {name: _target(name) for name in self._config.replicas}
        self._load = LoadLedger(tuple(self._targets.values()))
        self._sessions = Sessions()
        self._up: set[Target] = set()
        self._lost: dict[Target, str] = {}  # replicas that stay down, and why
        self._withheld: dict[Target, Call] = {}  # replicas that get nothing new until their next life
        self._requests: dict[str, _Request] = {}  # in order of arrival

    def on_peer_up(self, name: str) -> None:
        """A replica came up: it may serve, and requests that waited for one go out."""
        if name == SUPERVISOR:
            self.ctx.tell_ready(SUPERVISOR, Ready(seconds=0.0))
        elif name in self._targets:
            self._up.add(self._targets[name])
            self._withheld.pop(self._targets[name], None)
            for request in [request for request in self._requests.values() if request.target is None]:
                self._send(request)

    def on_peer_down(self, name: str, reason: str) -> None:
        """A replica ended. The bus has failed its asks already, so its requests wait for another one."""
        if name in self._targets:
            self._up.discard(self._targets[name])
            self._sessions.drop(self._targets[name])

    @handles(Submit)
    def _submit(self, submit: Submit, call: Call) -> None:
        earlier = self._requests.get(submit.request_id)
        if earlier is not None:  # its asker has lost it, and the word of that is still on its way
            self._withdraw(earlier)
            self._fail(earlier, Aborted(f"a later attempt has taken the place of request {submit.request_id}"))
        number = pinned_replica(submit.handling, len(self._targets))
        attempts = Attempts(self._config.max_request_restarts, submit.attempt)
        pin = None if number is None else self._targets[f"replica.{number}"]
        request = _Request(submit, call, attempts, bytearray(submit.generated), pin)
        refusal = self._refusal(request)
        if refusal is not None:
            call.fail(refusal)
            return
        self._requests[request.key] = request
        call.on_cancel(lambda _reason: self._cancelled(request))
        self._send(request)

    @handles(GroupLost)
    def _group_lost(self, lost: GroupLost, _call: Call | None) -> None:
        """A replica stays down for good, told by the name of its core or of one of its chips."""
        number = lost.child.split(".")[1] if lost.child.startswith(("replica.", "chip.")) else ""
        target = self._targets.get(f"replica.{number}")
        if target is None:
            return
        self._lost[target] = lost.text
        self._sessions.drop(target)
        for request in [r for r in self._requests.values() if r.target == target]:
            self._withdraw(request)
            self._lose(request, WorkerDied(f"replica {target.replica} is lost: {lost.text}"))
        for request in [r for r in self._requests.values() if not self._serving(r)]:
            self._fail(request, RestartLimit(self._nobody(request)))

    @handles(Withhold)
    def _withhold(self, message: Withhold, call: Call | None) -> None:
        """A replica is to end, when its requests have ended or their time is over."""
        target = self._targets.get(message.replica)
        if call is None:
            return
        if target is None or self.ctx.peers().get(message.replica) != message.incarnation:
            call.reply(Withheld())  # that life has ended by itself
            return
        self._withheld[target] = call
        self._tell_withheld(target)

    def _tell_withheld(self, target: Target | None) -> None:
        """Answer if nothing is there any more."""
        call = self._withheld.get(target) if target is not None else None
        if (
            call is not None
            and call.is_open
            and not any(request.target == target for request in self._requests.values())
        ):
            call.reply(Withheld())

    def load(self) -> dict[str, int]:
        """Pending tokens by replica."""
        return {name: self._load.load(target) for name, target in self._targets.items()}

    def check_integrity(self) -> None:
        """Assert that exactly the requests that are at a replica count in its load."""
        self._load.check_integrity()
        assert set(self._load.keys()) == {r.key for r in self._requests.values() if r.target is not None}
        assert all(request.call.is_open for request in self._requests.values())

    def _serving(self, request: _Request) -> set[Target]:
        """Replicas that may serve a request, now or later."""
        allowed = set(self._targets.values()) if request.pin is None else {request.pin}
        return allowed.difference(self._lost)

    def _eligible(self, request: _Request) -> set[Target]:
        """Replicas that may serve it now."""
        linked = self.ctx.peers()  # without one that is just going, whose asks fail before ``on_peer_down``
        serving = self._serving(request).intersection(self._up).difference(self._withheld, request.full)
        return {target for target in serving if target.name in linked}

    def _refusal(self, request: _Request) -> ChipbusError | None:
        """Why a request cannot even wait; None if it can be taken. One that was admitted before always may wait."""
        if not self._serving(request):
            return NotReady(self._nobody(request))
        if request.submit.attempt > 1 or self._eligible(request):
            return None
        waiting = sum(other.target is None for other in self._requests.values())
        if waiting < self._config.max_waiting:
            return None
        rule = f"{waiting} requests wait for one; at most {self._config.max_waiting} may (max_waiting)"
        if request.pin is None:
            return Overloaded(f"no replica is up and {rule}")
        return PinOverloaded(f"replica {request.pin.replica}, which the request is pinned to, is not up and {rule}")

    def _nobody(self, request: _Request) -> str:
        """Why no replica will ever serve it."""
        lost = [target for target in self._lost if request.pin in (None, target)]
        reasons = "; ".join(f"replica {target.replica}: {self._lost[target]}" for target in lost)
        if request.pin is not None:
            return f"the replica that the request is pinned to stays down ({reasons})"
        return f"no replica is left to serve the request ({reasons})"

    def _choose(self, request: _Request) -> tuple[Target, str] | None:
        """The replica to send it to and who chose that; None if it has to wait."""
        eligible, session, now_ns = self._eligible(request), request.submit.handling.session, self.ctx.clock.now_ns()
        if not eligible:
            return None
        target, chosen_by = request.pin, "pin"
        if target is None and session:
            target, chosen_by = self._sessions.target(session, eligible, self._load, now_ns), "session"
        if target is None:
            target, chosen_by = self._load.choose(eligible), "load"
        if session:
            self._sessions.bind(session, target, now_ns)
        return target, chosen_by

    def _send(self, request: _Request) -> None:
        """Send a request to a replica that may serve it; it keeps waiting if none is up."""
        choice = self._choose(request)
        if choice is None:
            return
        target, request.chosen_by = choice
        call, had = request.call, request.num_tokens
        submit = attrs.evolve(request.submit, generated=bytes(request.generated), attempt=request.attempts.number)
        request.target = target
        prompt_tokens = count_tokens(submit.prompt_token_ids) + had
        self._load.reserve(request.key, target, prompt_tokens, max(submit.params.max_tokens - had, 0))
        if self.ctx.ledger is not None:
            self.ctx.ledger.append(
                "route",
                {
                    "request_id": submit.request_id,
                    "trace_id": call.trace_id.hex(),
                    "replica": target.replica,
                    "dp_rank": target.dp_rank,
                    "chosen_by": request.chosen_by,
                    "load_tokens": [self._load.load(other) for other in self._targets.values()],
                },
            )
        request.ask = self.ctx.ask(
            target.name,
            submit,
            timeout_s=max(call.deadline_ns - self.ctx.clock.now_ns(), 1) / 1e9,
            on_item=lambda item: self._item(request, item),
            on_reply=lambda reply: self._done(request, target, reply),
            on_error=lambda error: self._failed(request, target, error),
            trace_id=call.trace_id,
        )
        call.item(Routed(replica=target.replica, dp_rank=target.dp_rank, chosen_by=request.chosen_by))

    def _is_open(self, request: _Request) -> bool:
        return self._requests.get(request.key) is request

    def _item(self, request: _Request, item: object) -> None:
        if not self._is_open(request):
            return
        if isinstance(item, TokenDelta):
            self._take(request, item)
        else:
            request.call.item(item)

    def _take(self, request: _Request, delta: TokenDelta) -> None:
        """Pass on what is new of it."""
        try:
            new = delta.after(request.num_tokens)
        except BadFrame as error:
            self._withdraw(request)
            self._fail(request, error)
            return
        if new is not None:
            request.generated += new.token_ids
            self._load.generated(request.key, new.num_tokens)
            request.call.item(new)

    def _done(self, request: _Request, target: Target, reply: object) -> None:
        if not self._end(request):
            return
        if isinstance(reply, TokensDone):
            by = request.chosen_by
            done = attrs.evolve(reply, replica=target.replica, dp_rank=target.dp_rank, chosen_by=by)
            request.call.reply(done)
        else:
            request.call.fail(BadFrame(f"{target.name} ended a request with {type(reply).__name__}, not TokensDone"))

    def _failed(self, request: _Request, target: Target, error: ChipbusError) -> None:
        """Its replica died, or will not have it: another one may."""
        if isinstance(error, PeerGone):
            self._lose(request, error)
        elif isinstance(error, Overloaded):
            self._refused(request, target, error)
        else:
            self._fail(request, error)

    def _refused(self, request: _Request, target: Target, error: Overloaded) -> None:
        """Its queue is full: another one's may not be."""
        if not self._is_open(request):
            return
        self._release(request)
        request.full.add(target)
        if self._eligible(request):
            self._send(request)
        elif request.pin is None:
            self._fail(request, error)
        else:
            pinned = f"replica {target.replica}, which the request is pinned to, takes no more"
            self._fail(request, PinOverloaded(f"{pinned}: {error}"))

    def _lose(self, request: _Request, error: ChipbusError) -> None:
        """Nobody works on the request any more: another replica does, unless that has happened too often."""
        if not self._is_open(request):
            return
        self._release(request)
        request.full.clear()
        if request.attempts.lost(request.num_tokens):
            self._send(request)
        else:
            self._fail(request, WorkerDied(request.attempts.spent(error)))

    def _cancelled(self, request: _Request) -> None:
        """The tokenizer gave the request up, or died, or its deadline passed."""
        if self._end(request):
            self._withdraw(request)

    def _withdraw(self, request: _Request) -> None:
        """Nothing more is heard of it from its replica."""
        if request.ask is not None:
            request.ask.cancel()

    def _fail(self, request: _Request, error: ChipbusError) -> None:
        if self._end(request):
            request.call.fail(error)

    def _end(self, request: _Request) -> bool:
        """Forget a request and its load; False if that happened before."""
        if not self._is_open(request):
            return False
        del self._requests[request.key]
        self._release(request)
        return True

    def _release(self, request: _Request) -> None:
        """It is at no replica any more."""
        if request.target is not None:
            target, request.target = request.target, None
            self._load.release(request.key)
            self._tell_withheld(target)
