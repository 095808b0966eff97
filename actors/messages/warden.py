"""The conversation between the supervisor and a warden: plain seqpacket, because a warden may have no bus.

A warden can be asked to fork a child the boot file names, whether it still answers, and to leave; nothing else. So it
can never compute.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "Exited", "FromWarden", "Leave", "Ping", "Pong", "Preloaded", "SpawnChild", "SpawnRefused", "Spawned", "ToWarden",
]  # fmt: skip


class SpawnChild(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Supervisor to warden, with the read end of the child's tether: fork the child of this name.

    With a second descriptor, of a memory file, if the child keeps weights.
    """

    name: str
    incarnation: int


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Supervisor to warden: end. All children are gone already."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Supervisor to warden: are you alive? Reply: ``Pong``."""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Warden to supervisor, once per ``Ping``: alive."""


class Preloaded(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Warden to supervisor, once: imports are done after ``seconds``, children can be forked (or executed)."""

    seconds: float
    error: str = ""  # class name in chipbus.errors if the imports failed; the warden ends
    text: str = ""


class Spawned(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Warden to supervisor, with the child's pidfd: it runs."""

    name: str
    incarnation: int
    pid: int
    is_forked: bool  # False: executed afresh, because the warden has more than one thread


class SpawnRefused(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Warden to supervisor: there is no such child, and there will be none."""

    name: str
    incarnation: int
    text: str


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Warden to supervisor, once per ``Spawned``: the child has ended; it is reaped next."""

    name: str
    incarnation: int
    code: int | None
    signum: int | None
    error: str = ""  # its last words: class name in chipbus.errors, and the sentence; "" if it said none
    text: str = ""


ToWarden = SpawnChild | Ping | Leave
FromWarden = Preloaded | Pong | Spawned | SpawnRefused | Exited
