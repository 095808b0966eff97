"""Every exception chipbus raises, in one tree. Each docstring speaks to whoever catches it.

This module imports nothing of ours, so every room may import it. An error that crosses a process boundary
travels as its class name plus its text (see ``chipbus.bus``), so each class is built from its message alone.
"""

from __future__ import annotations

__all__ = [
    "Aborted",
    "BadFrame",
    "BusError",
    "CheckpointError",
    "ChipbusError",
    "ConfigError",
    "ContextTooLong",
    "DeadlineExceeded",
    "EngineClosed",
    "EngineDead",
    "KernelError",
    "LedgerCorrupt",
    "MailboxFull",
    "Overloaded",
    "PeerGone",
    "ReplayDiverged",
    "RequestError",
    "RequestInvalid",
    "RestartLimit",
    "StaleTensor",
    "StartFailed",
    "TopologyError",
    "WorkerDied",
    "WorkerError",
]


class ChipbusError(Exception):
    """Root of everything raised on purpose. ``str(error)`` is one sentence: what, where, the value, the rule."""


class ConfigError(ChipbusError, ValueError):
    """A setting, flag, file or field is wrong. Nothing was started. Fix the value; a retry alone is pointless."""


class CheckpointError(ConfigError):
    """A model directory cannot be used: missing, half-written, wrong tensor, unknown architecture."""


class TopologyError(ConfigError):
    """A placement is impossible or not offered yet. Nothing was started."""


class BusError(ChipbusError):
    """A message could not be delivered, understood or answered."""


class PeerGone(BusError):
    """The actor asked has ended; the text carries its exit. The ask may or may not have been executed."""


class DeadlineExceeded(BusError, TimeoutError):
    """No answer within the deadline. The work may still be going on; its late answer is counted and dropped."""


class MailboxFull(BusError):
    """A bounded queue is full. Nothing was queued; retry later."""


class BadFrame(BusError):
    """Bytes on a socket are no message of ours: unknown kind, wrong version, truncated, too long, left-over."""


class StaleTensor(BusError):
    """A shared-memory handle names memory that was freed or belongs to an earlier life."""


class WorkerError(ChipbusError):
    """A process of ours failed."""


class WorkerDied(WorkerError):
    """A worker ended while it held the request; the text carries its exit. It is restarted; a retry is sane."""


class RestartLimit(WorkerError):
    """A child died more often than its restart intensity allows. Its group stays down; the engine is unusable."""


class StartFailed(WorkerError):
    """A process did not become ready in time, or ended before. Everything started with it was stopped."""


class KernelError(WorkerError):
    """A dispatch failed on its chip: unknown program, wrong argument, a task that raised."""


class EngineDead(WorkerError):
    """The supervisor ended, and every process with it. Only ``close()`` is useful now; build a new engine."""


class EngineClosed(ChipbusError, RuntimeError):
    """The engine was closed, or is used in a forked copy of the process that made it."""


class RequestError(ChipbusError):
    """One request cannot be served. Other requests are untouched."""


class RequestInvalid(RequestError, ValueError):
    """A request's own fields are wrong: empty prompt, token id outside the vocabulary, unknown sampling field."""


class ContextTooLong(RequestInvalid):
    """The prompt alone leaves no room in the context. Shorten it."""


class Aborted(RequestError):
    """The caller cancelled the request. Its pages are free."""


class Overloaded(RequestError):
    """The queue for new requests is full. Nothing was queued; back off and retry."""


class LedgerCorrupt(ChipbusError):
    """A record breaks off or fails its checksum; the text names file and byte. Records before it are intact."""


class ReplayDiverged(ChipbusError):
    """A replayed dispatch gave another result than the recorded one; the text names the first difference."""
