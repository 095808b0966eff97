"""Which replica serves a request: the one its session is at, else least pending tokens. Pure policy: no bus, no clock.

Owns: the load of each target, as sums over the requests sent there, and where sessions are. All tokens flow through the
router, so loads are exact up to messages on their way; no load reports are needed, and none can be stale.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

import attrs

__all__ = ["LoadLedger", "Sessions", "Target"]


@attrs.frozen(order=True)
class Target:
    """What a request can be sent to. ``dp_rank`` is global; each replica holds one rank: its own number."""

    replica: int
    dp_rank: int

    @property
    def name(self) -> str:
        """The replica core's node name."""
        return f"replica.{self.replica}"


@attrs.define
class _Reservation:
    target: Target
    prompt_tokens: int  # not known to be computed yet
    output_tokens: int  # that may still come

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


class LoadLedger:
    """Pending tokens of each target: what its requests may still compute.

    A request counts from ``reserve`` to ``release``, each called once for it: its prompt until the first token comes,
    and every token it may still generate.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = tuple(targets)
        self._load: Counter[Target] = Counter()
        self._open: Counter[Target] = Counter()
        self._reservations: dict[str, _Reservation] = {}
        self._first = 0  # where the search begins: after the target chosen last, so ties rotate

    def choose(self, eligible: Collection[Target]) -> Target:
        """Of the eligible targets, at least one, that with the fewest pending tokens, then the fewest requests."""
        order = self._targets[self._first :] + self._targets[: self._first]
        candidates = [target for target in order if target in eligible]
        chosen = min(candidates, key=lambda target: (self._load[target], self._open[target]))
        self._first = (self._targets.index(chosen) + 1) % len(self._targets)
        return chosen

    def reserve(self, key: str, target: Target, prompt_tokens: int, output_tokens: int) -> None:
        """A request is sent to ``target``."""
        assert key not in self._reservations, f"request {key} is reserved already"
        reservation = self._reservations[key] = _Reservation(target, prompt_tokens, output_tokens)
        self._load[target] += reservation.tokens
        self._open[target] += 1

    def generated(self, key: str, num_tokens: int) -> None:
        """Tokens of a request came: its prompt is computed, and so many fewer are to come."""
        reservation = self._reservations[key]
        before = reservation.tokens
        if num_tokens:
            reservation.prompt_tokens = 0
        reservation.output_tokens = max(reservation.output_tokens - num_tokens, 0)
        self._load[reservation.target] -= before - reservation.tokens

    def release(self, key: str) -> None:
        """A request ended there, in whatever way."""
        reservation = self._reservations.pop(key)
        self._load[reservation.target] -= reservation.tokens
        self._open[reservation.target] -= 1

    def load(self, target: Target) -> int:
        """Pending tokens of a target."""
        return self._load[target]

    def num_requests(self, target: Target) -> int:
        """Requests that are at a target."""
        return self._open[target]

    def keys(self) -> Collection[str]:
        """Requests that count now."""
        return self._reservations.keys()

    def check_integrity(self) -> None:
        """Assert that every sum is the sum of its parts."""
        for target in self._targets:
            mine = [reservation for reservation in self._reservations.values() if reservation.target == target]
            assert self._open[target] == len(mine)
            assert self._load[target] == sum(reservation.tokens for reservation in mine) >= 0


@attrs.frozen
class _Binding:
    target: Target
    until_ns: int


class Sessions:
    """Where each session is: at the target that served its last request, while that is no worse than another.

    A session is forgotten ``TTL_S`` after its last request, or when ``MAX_SESSIONS`` others have had one since.
    """

    MAX_SESSIONS = 100_000
    TTL_S = 600
    SLACK = 8  # requests that its target may have more than the least busy one

    def __init__(self) -> None:
        self._bindings: OrderedDict[str, _Binding] = OrderedDict()  # longest unused first, so expired ones are in front

    def __len__(self) -> int:
        return len(self._bindings)

    def target(self, session: str, eligible: Collection[Target], loads: LoadLedger, now_ns: int) -> Target | None:
        """Where the session is, if that is eligible and not too busy; else None."""
        self._expire(now_ns)
        binding = self._bindings.get(session)
        if binding is None or binding.target not in eligible:
            return None
        slack = loads.num_requests(binding.target) - min(map(loads.num_requests, eligible))
        return binding.target if slack <= self.SLACK else None

    def bind(self, session: str, target: Target, now_ns: int) -> None:
        """A request of the session is sent to ``target``."""
        self._expire(now_ns)
        self._bindings[session] = _Binding(target, now_ns + self.TTL_S * 1_000_000_000)
        self._bindings.move_to_end(session)
        if len(self._bindings) > self.MAX_SESSIONS:
            self._bindings.popitem(last=False)

    def drop(self, target: Target) -> None:
        """What a target held of its sessions is gone."""
        for session in [session for session, binding in self._bindings.items() if binding.target == target]:
            del self._bindings[session]

    def _expire(self, now_ns: int) -> None:
        while self._bindings and next(iter(self._bindings.values())).until_ns <= now_ns:
            self._bindings.popitem(last=False)
