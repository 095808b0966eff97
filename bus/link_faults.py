"""What may go wrong between the actors of a ``LocalSystem``, beyond the order of events. Pure data.

Links between real processes of one host lose, repeat and mix up nothing while both ends live. These faults are there to
show that nothing relies on it.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

__all__ = ["LinkFaults"]


def _nobody(_sender: str, _receiver: str, _control: bool) -> bool:
    return False


@attrs.frozen(kw_only=True)
class LinkFaults:
    """Chances per record that is about to arrive, each in [0, 1]; at most one of them befalls it at a time."""

    drop: float = 0.0
    """It never arrives."""
    duplicate: float = 0.0
    """It arrives now, and once more behind what is on its way."""
    delay: float = 0.0
    """It, and what is behind it on the same socket, arrives later."""
    longest_delay_s: float = 1.0
    """Virtual seconds."""
    spares: Callable[[str, str, bool], bool] = _nobody
    """(sender, receiver, is control socket) → nothing is dropped there."""
