"""What the children of a benchmark's tree run, and what they are asked.

Owns: nothing. A module of its own, because the program that loads it (``bench_tree``) runs as ``__main__``.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import attrs

from ..actors.kinds import PRELOADS
from ..bus import Actor, Call, Lane, Ready, handles, message

__all__ = ["ENTRIES", "WARDENS", "Name", "Resident", "Stay", "WhoIsIt"]

ENTRIES = {"resident": f"{__name__}:Resident"}
WARDENS = {name: (*modules, __name__) for name, modules in PRELOADS.items()}
"""As large as those of an engine."""
_HOLD_S = 60


@message(0x01F7, lane=Lane.WORK)
@attrs.frozen
class Stay:
    """An ask that is never answered."""


@message(0x01F8, lane=Lane.WORK)
@attrs.frozen
class WhoIsIt:
    """Reply: ``Name``."""


@message(0x01F9, lane=Lane.WORK)
@attrs.frozen
class Name:
    """The process that answers."""

    pid: int


class Resident(Actor):
    """Ready at once. With ``holds_lock`` in its configuration it then holds its interpreter's lock, in C."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._holds_lock = bool(config.get("holds_lock"))

    def on_start(self) -> None:
        """Nothing has to be loaded."""
        self.ctx.tell("supervisor", Ready(0.0))

    def on_peer_up(self, name: str) -> None:
        """``Ready`` leaves at the end of the turn in which the link came up; the second timer is due after that."""
        if self._holds_lock and name == "supervisor":
            self.ctx.after(0.0, self._next_turn)

    def _next_turn(self) -> None:
        self.ctx.after(0.0, self._hold)

    def _hold(self) -> None:
        ctypes.PyDLL(None).sleep(_HOLD_S)

    @handles(Stay)
    def _stay(self, _: Stay, call: Call) -> None:
        pass

    @handles(WhoIsIt)
    def _who(self, _: WhoIsIt, call: Call) -> None:
        call.reply(Name(os.getpid()))
