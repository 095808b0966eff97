"""How often a request may be taken up again after whoever worked on it died. Pure policy: no clock, no bus.

Each process keeps one of these for every request it has passed on: the host for deaths of the tokenizer, the tokenizer
for those of the router, the router for those of replica cores, a replica core for those of its chip.
"""

from __future__ import annotations

import attrs

__all__ = ["Attempts"]


@attrs.define
class Attempts:
    """The restart budget of one request, as one of its owners sees it.

    What counts are losses without a token in between: a request that gets on is not what kills its workers, however
    often they die, and one that never does would take every worker of the engine with it.
    """

    limit: int
    """Losses in a row, without progress, after which it is taken up again."""
    number: int = 1
    """Of the attempt under way, from 1."""
    _in_a_row: int = 0
    _num_tokens: int = 0

    def lost(self, num_tokens: int) -> bool:
        """Its worker is gone, and ``num_tokens`` of its tokens had been delivered: may there be another attempt?"""
        if num_tokens > self._num_tokens:
            self._in_a_row, self._num_tokens = 0, num_tokens
        self._in_a_row += 1
        self.number += 1
        return self._in_a_row <= self.limit

    def spent(self, cause: object) -> str:
        """The sentence for a request that ends because of it."""
        return (
            f"the request was lost {self._in_a_row} times in a row without getting a token further; at most"
            f" {self.limit} restarts are made (max_request_restarts). The last time: {cause}"
        )
