"""What an operator wants to know of, numbered and bounded: lives of processes, and requests that did not go well.

Owns: the newest events of one engine. Thread: the bus thread writes; ``events`` is replaced whole, so any may read it.

When a chip dies with a thousand requests on it, or a flood of them is refused, one event a second and kind says so,
with their number: what happened to processes stays in sight.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .messages.tree import ChildRecord
from .report import MOST_EVENTS, Event, Restarts

__all__ = ["EventLog", "ProcessLog", "changes", "restart_reason"]

JOIN_NS = 1_000_000_000
_LIVING = ("starting", "ready", "draining", "stopping")


class EventLog:
    """Takes events and tells listeners of them, on the bus thread."""

    def __init__(self, on_event: Callable[[Event], None] = lambda _: None) -> None:
        self.events: tuple[Event, ...] = ()
        self._on_event = on_event
        self._number = 0
        self._told_ns: dict[tuple[str, str], int] = {}
        self._held: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._listeners: dict[object, Callable[[], None]] = {}

    def add(self, kind: str, subject: str, text: str) -> None:
        """Something happened."""
        self._number += 1
        event = Event(number=self._number, at_unix_s=time.time(), kind=kind, subject=subject, text=text)
        self.events = (*self.events[1 - MOST_EVENTS :], event)
        self._on_event(event)
        self.notify()

    def add_request(self, kind: str, request_id: str, error: str, text: str, now_ns: int) -> None:
        """Something happened to a request; of one kind and error, a second's further ones wait for ``flush``."""
        key = (kind, error)
        if self._held[key] or now_ns - self._told_ns.get(key, -JOIN_NS) < JOIN_NS:
            self._held[key] += 1
        else:
            self._told_ns[key] = now_ns
            self.add(kind, request_id, text)

    @property
    def is_holding(self) -> bool:
        """Whether a ``flush`` has something to tell."""
        return any(self._held.values())

    def flush(self, now_ns: int) -> None:
        """Tell of the requests that waited."""
        for (kind, error), count in self._held.items():
            if count:
                self._told_ns[kind, error] = now_ns
                self.add(kind, f"{count} request{'s' * (count > 1)}", error)
        self._held.clear()

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called, on the bus thread, when there is news; returns what ends that. Any thread."""
        key = object()
        with self._lock:
            self._listeners[key] = callback

        def forget() -> None:
            with self._lock:
                self._listeners.pop(key, None)

        return forget

    def notify(self) -> None:
        """Call every listener."""
        with self._lock:
            listeners = list(self._listeners.values())
        for callback in listeners:
            callback()


class ProcessLog:
    """What became of each process, from one picture of the tree to the next."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._before: tuple[ChildRecord, ...] = ()
        self._restarts: Counter[tuple[str, str]] = Counter()
        self.exits = 0

    def saw(self, tree: Sequence[ChildRecord]) -> None:
        """The supervisor sent its next picture."""
        before = {record.name: record for record in self._before}
        self._before = tuple(tree)
        for record in tree:
            old = before.get(record.name)
            for kind, text in changes(old, record):
                self._log.add(kind, record.name, text)
            if old is not None:
                self.exits += _ends_between(old, record)
                if record.restarts > old.restarts:
                    self._restarts[record.name, restart_reason(record.last_exit)] += record.restarts - old.restarts

    def restarts(self) -> tuple[Restarts, ...]:
        """So far."""
        return tuple(Restarts(worker, reason, count) for (worker, reason), count in sorted(self._restarts.items()))


def changes(old: ChildRecord | None, new: ChildRecord) -> Iterator[tuple[str, str]]:
    """Kinds and texts of the events between two pictures of one process, in order; ``old`` is None in the first."""
    lived, life = (False, 0) if old is None else (old.state in _LIVING, old.incarnation)
    is_same = lived and new.incarnation == life
    if old is not None and _ends_between(old, new):
        yield "exit", new.last_exit
    if new.state not in _LIVING:
        return
    if not is_same:
        yield "started" if new.incarnation == 1 else "restart", f"life {new.incarnation}"
    was = old.state if old is not None and is_same else ""
    if new.state in ("ready", "draining") and was not in ("ready", "draining"):
        yield "ready", f"pid {new.pid}" + "".join(f", after {ms:.0f} ms" for _, ms in new.phases[-1:])
    if new.state == "draining" and was != "draining":
        yield "draining", "its requests end, or go on elsewhere"


def _ends_between(old: ChildRecord, new: ChildRecord) -> int:
    """How many lives of a process ended between two pictures: all it has had, but the one it has."""
    before, now = (record.incarnation - (record.state in _LIVING) for record in (old, new))
    return max(0, now - before)


def restart_reason(last_exit: str) -> str:
    """One of few words for how a life ended, from what there is to say about it."""
    if match := re.match(r"signal \d+ \((SIG\w+)\)", last_exit):
        return match[1]
    match = re.match(r"exit code \d+|signal \d+|exit status unknown", last_exit)
    return match[0] if match else "replaced"
