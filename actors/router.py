"""Router: sends each request to one replica core, and its answers back. Present with one replica, too.

Owns: which replicas serve, where each open request is, what of its answer has come, and the load of each target.
Thread: the bus loop.

    tokenizer ──Submit──▶ router ──Submit──▶ replica core
              ◀─ Routed, TokenDelta…, TokensDone ─

When a replica core dies its requests go to another one, or to its next life, with the tokens that have come so far; the
answer goes on behind them.
"""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from ..bus import Actor, Ask, Call, Ready, count_tokens, handles
from ..errors import Aborted, BadFrame, ChipbusError, ConfigError, Overloaded, PeerGone, RestartLimit, WorkerDied
from .attempts import Attempts
from .boot import SUPERVISOR
from .messages.routing import Routed, Withheld, Withhold
from .messages.serving import Submit, TokenDelta, TokensDone
from .messages.tree import GroupLost
from .router_policy import LoadLedger, Target

__all__ = ["RouterActor", "RouterConfig"]


@attrs.frozen(kw_only=True)
class RouterConfig:
    """What a router is told at spawn."""

    replicas: tuple[str, ...]
    """Node names of the replica cores: ``replica.0``, …"""
    max_waiting: int
    """Requests held while no replica is up, before ``Overloaded``."""
    max_request_restarts: int
    """Deaths of replica cores that a request survives without a token in between."""


@attrs.define(eq=False)
class _Request:
    """One open ``Submit``."""

    submit: Submit
    call: Call
    attempts: Attempts
    generated: bytearray  # packed ids of the answer so far
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
    """Serves ``Submit`` asks from tokenizers by asking the replica with the least pending tokens."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = msgspec.convert(config, RouterConfig)
        self._targets = {name: _target(name) for name in self._config.replicas}
        self._load = LoadLedger(tuple(self._targets.values()))
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

    @handles(Submit)
    def _submit(self, submit: Submit, call: Call) -> None:
        earlier = self._requests.get(submit.request_id)
        if earlier is not None:  # its asker has lost it, and the word of that is still on its way
            self._withdraw(earlier)
            self._fail(earlier, Aborted(f"a later attempt has taken the place of request {submit.request_id}"))
        refusal = self._refusal(submit)
        if refusal is not None:
            call.fail(refusal)
            return
        attempts = Attempts(self._config.max_request_restarts, submit.attempt)
        request = _Request(submit, call, attempts, bytearray(submit.generated))
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
        for request in [r for r in self._requests.values() if r.target == target]:
            self._withdraw(request)
            self._lose(request, WorkerDied(f"replica {target.replica} is lost: {lost.text}"))
        if not self._serving():
            for request in list(self._requests.values()):
                self._fail(request, self._nobody())

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

    def _serving(self) -> list[Target]:
        """Replicas that are up or will be again."""
        return [target for target in self._targets.values() if target not in self._lost]

    def _eligible(self) -> set[Target]:
        linked = self.ctx.peers()  # without one that is just going, whose asks fail before ``on_peer_down``
        serving = self._up.intersection(self._serving()).difference(self._withheld)
        return {target for target in serving if target.name in linked}

    def _refusal(self, submit: Submit) -> ChipbusError | None:
        """Why a request cannot even wait; None if it can be taken. One that was admitted before always may wait."""
        if not self._serving():
            return self._nobody()
        if submit.attempt > 1:
            return None
        waiting = 0 if self._eligible() else len(self._requests)
        if waiting >= self._config.max_waiting:
            return Overloaded(
                f"no replica is up and {waiting} requests wait for one; at most {self._config.max_waiting} may"
                " (max_waiting)"
            )
        return None

    def _nobody(self) -> ChipbusError:
        reasons = "; ".join(f"replica {target.replica}: {text}" for target, text in self._lost.items())
        return RestartLimit(f"no replica is left to serve the request ({reasons})")

    def _send(self, request: _Request) -> None:
        """Send a request to the least loaded replica that may take it; it keeps waiting if none is up."""
        target = self._load.choose(self._eligible() - request.full)
        if target is None:
            return
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
        call.item(Routed(replica=target.replica, dp_rank=target.dp_rank))

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
            request.call.reply(attrs.evolve(reply, replica=target.replica, dp_rank=target.dp_rank))
        else:
            request.call.fail(BadFrame(f"{target.name} ended a request with {type(reply).__name__}, not TokensDone"))

    def _failed(self, request: _Request, target: Target, error: ChipbusError) -> None:
        """Its replica died, or will not have it: another one may."""
        if isinstance(error, PeerGone):
            self._lose(request, error)
        elif isinstance(error, Overloaded) and self._eligible() - request.full - {target}:
            self._release(request)
            request.full.add(target)
            self._send(request)
        else:
            self._fail(request, error)

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
