"""Router: sends each request to one replica core, and its answers back. Present with one replica, too.

Owns: which replicas serve, where each open request is, and the load of each target. Thread: the bus loop.

    tokenizer ──Submit──▶ router ──Submit──▶ replica core
              ◀─ Routed, TokenDelta…, TokensDone ─
"""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import msgspec

from ..bus import Actor, Ask, Call, Ready, handles
from ..errors import BadFrame, ChipbusError, ConfigError, Overloaded, PeerGone, RestartLimit, WorkerDied
from .messages.routing import Routed
from .messages.serving import Submit, TokenDelta, TokensDone
from .messages.tree import GroupLost
from .router_policy import LoadLedger, Target

__all__ = ["RouterActor", "RouterConfig"]

_TOKEN_BYTES = 4


@attrs.frozen(kw_only=True)
class RouterConfig:
    """What a router is told at spawn."""

    replicas: tuple[str, ...]
    """Node names of the replica cores: ``replica.0``, …"""
    max_waiting: int
    """Requests held while no replica is up, before ``Overloaded``."""


@attrs.define(eq=False)
class _Request:
    """One open ``Submit``."""

    key: int
    submit: Submit
    call: Call
    target: Target | None = None  # None: no replica was up yet
    ask: Ask | None = None


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
        self._keys = itertools.count(1)
        self._requests: dict[int, _Request] = {}  # in order of arrival

    def on_peer_up(self, name: str) -> None:
        """A replica came up: it may serve, and requests that waited for one go out."""
        if name == "supervisor":
            self.ctx.tell("supervisor", Ready(seconds=0.0))
        elif name in self._targets:
            self._up.add(self._targets[name])
            for request in [request for request in self._requests.values() if request.target is None]:
                self._send(request)

    def on_peer_down(self, name: str, reason: str) -> None:
        """A replica ended. The bus has failed its asks, and thereby their requests, already."""
        if name in self._targets:
            self._up.discard(self._targets[name])

    @handles(Submit)
    def _submit(self, submit: Submit, call: Call) -> None:
        refusal = self._refusal()
        if refusal is not None:
            call.fail(refusal)
            return
        request = _Request(next(self._keys), submit, call)
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
        for request in list(self._requests.values()):
            if request.target == target:
                if request.ask is not None:
                    request.ask.cancel()
                error = WorkerDied(f"replica {target.replica} is lost: {lost.text}")
                self._fail(request, error if self._serving() else self._nobody())
            elif not self._serving():
                self._fail(request, self._nobody())

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
        return self._up.intersection(self._serving())

    def _refusal(self) -> ChipbusError | None:
        """Why a new request cannot even wait; None if it can be taken."""
        if not self._serving():
            return self._nobody()
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
        """Send a request to the least loaded replica; it keeps waiting if none is up."""
        target = self._load.choose(self._eligible())
        if target is None:
            return
        submit, call = request.submit, request.call
        request.target = target
        self._load.reserve(request.key, target, len(submit.prompt_token_ids) // _TOKEN_BYTES, submit.params.max_tokens)
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
            on_error=lambda error: self._failed(request, error),
            trace_id=call.trace_id,
        )
        call.item(Routed(replica=target.replica, dp_rank=target.dp_rank))

    def _item(self, request: _Request, item: object) -> None:
        if request.key not in self._requests:
            return
        if isinstance(item, TokenDelta):
            self._load.generated(request.key, len(item.token_ids) // _TOKEN_BYTES)
        request.call.item(item)

    def _done(self, request: _Request, target: Target, reply: object) -> None:
        if not self._end(request):
            return
        if isinstance(reply, TokensDone):
            request.call.reply(attrs.evolve(reply, replica=target.replica, dp_rank=target.dp_rank))
        else:
            request.call.fail(BadFrame(f"{target.name} ended a request with {type(reply).__name__}, not TokensDone"))

    def _failed(self, request: _Request, error: ChipbusError) -> None:
        self._fail(request, WorkerDied(f"the request was lost: {error}") if isinstance(error, PeerGone) else error)

    def _cancelled(self, request: _Request) -> None:
        """The tokenizer gave the request up, or died, or its deadline passed."""
        if self._end(request) and request.ask is not None:
            request.ask.cancel()

    def _fail(self, request: _Request, error: ChipbusError) -> None:
        if self._end(request):
            request.call.fail(error)

    def _end(self, request: _Request) -> bool:
        """Forget a request and its load; False if that happened before."""
        if self._requests.pop(request.key, None) is None:
            return False
        if request.target is not None:
            self._load.release(request.key)
        return True
