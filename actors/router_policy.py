"""Which replica serves a request: least pending tokens. Pure policy: no bus, no clock.

Owns: the load of each target, as sums over the requests sent there. All tokens flow through the router, so it is exact
up to messages on their way; no load reports are needed, and none can be stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import attrs

__all__ = ["LoadLedger", "Target"]


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

    def choose(self, eligible: Collection[Target]) -> Target | None:
        """The eligible target with the fewest pending tokens, then the fewest requests; None if there is none."""
        order = self._targets[self._first :] + self._targets[: self._first]
        candidates = [target for target in order if target in eligible]
        if not candidates:
            return None
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

    def keys(self) -> Collection[str]:
        """Requests that count now."""
        return self._reservations.keys()

    def check_integrity(self) -> None:
        """Assert that every sum is the sum of its parts."""
        for target in self._targets:
            mine = [reservation for reservation in self._reservations.values() if reservation.target == target]
            assert self._open[target] == len(mine)
            assert self._load[target] == sum(reservation.tokens for reservation in mine) >= 0
