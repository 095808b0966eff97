"""When children are started, restarted, stopped and given up: a pure function from state and event to actions.

Owns: nothing. ``step`` takes the tree, an event and the time, and returns the next tree and what to do about it; the
supervisor does it. No process, socket or clock in here, so every order of events can be tried in a test.

    NEW ──▶ STARTING ──▶ READY ──▶ STOPPING ──▶ GONE          one incarnation only moves to the right;
                │          │           │                      a death outside of a stop, or a stop on behalf of an
                └──────────┴─────▶ BACKOFF ──▶ STARTING       earlier member of the group, leads to the next one
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from .boot import ONE_FOR_ALL, ONE_FOR_ONE, SUPERVISOR, Boot, ChildSpec
from .messages.tree import ChildEnd, ChildRecord

__all__ = [
    "NEVER_STARTED",
    "Action",
    "AnnounceFailure",
    "AnnounceLost",
    "AnnounceReady",
    "AnnounceStopped",
    "AskStop",
    "Begin",
    "Child",
    "ChildCondemned",
    "ChildDied",
    "ChildFailed",
    "ChildForked",
    "ChildLinked",
    "ChildReady",
    "ChildStalled",
    "ChildStarted",
    "Event",
    "GroupDrained",
    "Kill",
    "Phase",
    "Spawn",
    "Status",
    "StopAll",
    "Terminate",
    "Tick",
    "Tree",
    "ends",
    "left_alive",
    "next_wake_s",
    "plant",
    "records",
    "step",
]

NEVER_STARTED = "never started"
"""In place of an exit, for a child whose process was never made."""

_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 5.0
_BACKOFF_JITTER = (
    0.2  # so much of it is left to chance, so that children that died together do not all come back at once
)
_USEFUL_S = 1.0  # a life that was ready for so long was of use: the next one starts at once again
_GROUP_STOP_S = 2.0  # for a chip worker whose replica core died, or a child that missed its start deadline
_HELLO_S = 15.0  # from a restarted child's fork to its hello: milliseconds, or seconds if it had to be executed
_SHORTEST_STOP_S = 0.1  # even SIGKILL takes the kernel a moment
_POLITE_SHARE = 0.6  # of a stop's budget; then SIGTERM
_TERMINATE_SHARE = 0.8  # of a stop's budget; then SIGKILL, and the rest is for the kernel to free what it held


# State.


class Status(enum.IntEnum):
    """Of a child. Within one incarnation it only grows; BACKOFF lies between two incarnations."""

    NEW = 0
    STARTING = 1
    READY = 2
    STOPPING = 3
    GONE = 4
    BACKOFF = 5


class Measure(enum.IntEnum):
    """The strongest thing done so far to make a child end."""

    NONE = 0
    POLITE = 1
    TERMINATE = 2
    KILL = 3


_HOW = {
    Measure.NONE: "died before",
    Measure.POLITE: "stopped",
    Measure.TERMINATE: "terminated",
    Measure.KILL: "killed",
}


_MISSING = {
    "forked": "its warden has not forked it",
    "linked": "its node has not said hello",
    "started": "its actor has not started",
    "ready": "its actor has not said that it is ready",
}
"""The phases of a life until it is ready, in order, and what is said of a child that has not got there."""


class Phase(enum.IntEnum):
    """Of the tree. It only grows: a stop is a one-way latch."""

    NEW = 0
    STARTING = 1
    RUNNING = 2
    STOPPING = 3
    STOPPED = 4


@attrs.frozen
class Stop:
    """One stop with one deadline, shared by all it concerns. Seconds on the supervisor's clock."""

    began_s: float
    deadline_s: float

    @property
    def terminate_s(self) -> float:
        """When politeness ends."""
        return self.began_s + _POLITE_SHARE * (self.deadline_s - self.began_s)

    @property
    def kill_s(self) -> float:
        """When SIGTERM was enough time."""
        return self.began_s + _TERMINATE_SHARE * (self.deadline_s - self.began_s)


@attrs.frozen(kw_only=True)
class Child:
    """One child at one moment."""

    spec: ChildSpec
    status: Status = Status.NEW
    incarnation: int = 0  # of its latest process
    is_alive: bool = False  # a process of it was asked for and has not been reaped
    is_linked: bool = False  # its node has said hello, so it can be asked to stop
    restarts: int = 0
    deaths_s: tuple[float, ...] = ()  # within the window
    failures: int = 0  # deaths in a row of lives that were of no use
    asked_s: float = 0.0  # when its latest process was asked for
    phases: tuple[tuple[str, float], ...] = ()  # of that process so far: name, and ms since it was asked for
    ready_s: float | None = None  # since when it has been ready
    wake_s: float | None = None  # STARTING: the start deadline. BACKOFF: when to start again
    stop: Stop | None = None
    measure: Measure = Measure.NONE
    is_to_restart: bool = False  # while STOPPING
    counts_as_death: bool = False  # while STOPPING: it is stopped for a fault of its own
    reason: str = ""  # why it is being killed, if the supervisor decided so
    exit: str = ""  # of its latest process that ended: an ``ExitStatus.text``
    last_exit: str = ""  # the same, or what the supervisor or the child itself had to say about it
    ended_s: float | None = None


@attrs.frozen(kw_only=True)
class Tree:
    """All children, in the order of the boot file, and what is being done with them as a whole."""

    max_restarts: int
    window_s: float
    close_timeout_s: float
    seed: int  # of the chance in a wait before a restart
    strategies: Mapping[str, str]  # by group, all of them
    children: Mapping[str, Child]
    phase: Phase = Phase.NEW
    began_s: float = 0.0
    stop: Stop | None = None


def plant(boot: Boot) -> Tree:
    """The tree of a boot file before anything happened."""
    return Tree(
        max_restarts=boot.max_restarts,
        window_s=boot.window_s,
        close_timeout_s=boot.close_timeout_s,
        seed=boot.seed,
        strategies={spec.group: boot.strategy(spec.group) for spec in boot.children},
        children={spec.name: Child(spec=spec) for spec in boot.children},
    )


# Events.


@attrs.frozen
class Begin:
    """Start every child."""


@attrs.frozen
class ChildForked:
    """The child has its process."""

    name: str
    incarnation: int


@attrs.frozen
class ChildLinked:
    """The child's node said hello."""

    name: str
    incarnation: int


@attrs.frozen
class ChildStarted:
    """The child's node has answered, so its actor has started."""

    name: str
    incarnation: int


@attrs.frozen
class ChildReady:
    """The child's actor is ready to work."""

    name: str
    incarnation: int


@attrs.frozen
class ChildCondemned:
    """Whoever uses the child says that it is of no use any more."""

    name: str
    incarnation: int
    reason: str


@attrs.frozen
class ChildStalled:
    """The child does not answer heartbeats, or answers that it is busy and gets nowhere (``heartbeats.Stall``)."""

    name: str
    incarnation: int
    reason: str


@attrs.frozen
class GroupDrained:
    """The group of this child has nothing left to do: end it politely, and start it afresh unless it stays down."""

    name: str
    incarnation: int
    stays_down: bool


@attrs.frozen
class ChildFailed:
    """The child says that it cannot start. ``error``: class name in chipbus.errors."""

    name: str
    incarnation: int
    error: str
    text: str


@attrs.frozen
class ChildDied:
    """The child's process ended and was reaped, or could not be made. ``exit``: an ``ExitStatus.text``.

    ``error`` and ``text`` are its last words, if it had any.
    """

    name: str
    incarnation: int
    exit: str
    error: str = ""
    text: str = ""


@attrs.frozen
class StopAll:
    """End every child within ``budget_s``, for good. Again: the earlier deadline counts."""

    budget_s: float


@attrs.frozen
class Tick:
    """Time has passed."""


Event = (
    Begin
    | ChildForked
    | ChildLinked
    | ChildStarted
    | ChildReady
    | ChildFailed
    | ChildCondemned
    | ChildStalled
    | ChildDied
    | GroupDrained
    | StopAll
    | Tick
)


# Actions.


@attrs.frozen
class Spawn:
    """Make the process of this incarnation."""

    name: str
    incarnation: int


@attrs.frozen
class AskStop:
    """Tell the child's node to stop politely."""

    name: str
    incarnation: int
    deadline_s: float


@attrs.frozen
class Terminate:
    """SIGTERM to the child's process group."""

    name: str
    incarnation: int


@attrs.frozen
class Kill:
    """SIGKILL to the child's process group; with ``dumps_stack`` after it has had a moment to log where it is."""

    name: str
    incarnation: int
    dumps_stack: bool = False


@attrs.frozen
class AnnounceReady:
    """Every child is ready, for the first time."""

    seconds: float


@attrs.frozen
class AnnounceFailure:
    """The first start failed because of this child. Everything is being stopped."""

    name: str
    error: str
    text: str


@attrs.frozen
class AnnounceLost:
    """This child died too often. Its group stays down."""

    name: str
    text: str


@attrs.frozen
class AnnounceStopped:
    """Nothing is alive any more, or nothing more can be done about it."""


Action = Spawn | AskStop | Terminate | Kill | AnnounceReady | AnnounceFailure | AnnounceLost | AnnounceStopped


# The transition function.


def step(tree: Tree, event: Event, now_s: float) -> tuple[Tree, tuple[Action, ...]]:
    """What follows from ``event`` at time ``now_s``. Events of an incarnation that is not alive change nothing."""
    turn = _Turn(tree, now_s)
    match event:
        case Begin():
            turn.begin()
        case ChildForked(name, incarnation):
            turn.reached(name, incarnation, "forked")
        case ChildStarted(name, incarnation):
            turn.reached(name, incarnation, "started")
        case ChildLinked(name, incarnation):
            turn.linked(name, incarnation)
        case ChildReady(name, incarnation):
            turn.ready(name, incarnation)
        case ChildFailed(name, incarnation, error, text):
            turn.failed(name, incarnation, error, text)
        case ChildCondemned(name, incarnation, reason):
            turn.condemned(name, incarnation, reason)
        case ChildStalled(name, incarnation, reason):
            turn.stalled(name, incarnation, reason)
        case GroupDrained(name, incarnation, stays_down):
            turn.drained(name, incarnation, stays_down=stays_down)
        case ChildDied(name, incarnation):
            turn.died(event)
        case StopAll(budget_s):
            turn.stop_all(budget_s)
        case Tick():
            pass
    turn.advance()
    return turn.result()


def next_wake_s(tree: Tree) -> float | None:
    """When ``step`` wants a ``Tick`` if nothing else happens; None if it waits for events only."""
    return min(_wakes(tree), default=None)


def _wakes(tree: Tree) -> Iterator[float]:
    for child in tree.children.values():
        if (late_s := _start_deadline_s(tree.phase, child)) is not None:
            yield late_s
        elif (again_s := _spawn_again_s(tree, tree.children, child)) is not None:
            yield again_s
        elif child.status is Status.STOPPING and child.stop is not None:
            if child.measure < Measure.TERMINATE:
                yield child.stop.terminate_s
            elif child.measure < Measure.KILL:
                yield child.stop.kill_s
            elif tree.phase is Phase.STOPPING or child.is_to_restart:
                yield child.stop.deadline_s


class _Turn:
    """One call of ``step``: a private copy of the tree, and the actions so far."""

    def __init__(self, tree: Tree, now_s: float) -> None:
        self._tree = tree
        self._children = dict(tree.children)
        self._now_s = now_s
        self._actions: list[Action] = []

    def result(self) -> tuple[Tree, tuple[Action, ...]]:
        return attrs.evolve(self._tree, children=self._children), tuple(self._actions)

    # Events.

    def begin(self) -> None:
        if self._tree.phase is Phase.NEW:
            self._set_tree(phase=Phase.STARTING, began_s=self._now_s)
            for name in self._children:
                self._spawn(name)

    def reached(self, name: str, incarnation: int, phase: str) -> None:
        """Note when a life first got so far."""
        child = self._current(name, incarnation)
        if child is not None and phase not in dict(child.phases):
            took_ms = round(1e3 * (self._now_s - child.asked_s), 1)
            self._set(name, phases=(*child.phases, (phase, took_ms)))

    def linked(self, name: str, incarnation: int) -> None:
        if self._current(name, incarnation) is not None:
            self.reached(name, incarnation, "forked")  # its warden's word may be slower than its own
            self.reached(name, incarnation, "linked")
            self._set(name, is_linked=True)

    def ready(self, name: str, incarnation: int) -> None:
        child = self._current(name, incarnation)
        if child is None or child.status is not Status.STARTING:
            return
        self.reached(name, incarnation, "started")
        self.reached(name, incarnation, "ready")
        self._set(name, status=Status.READY, wake_s=None, ready_s=self._now_s)
        is_all = all(other.status is Status.READY for other in self._children.values())
        if self._tree.phase is Phase.STARTING and is_all:
            self._set_tree(phase=Phase.RUNNING)
            self._actions.append(AnnounceReady(self._now_s - self._tree.began_s))

    def failed(self, name: str, incarnation: int, error: str, text: str) -> None:
        child = self._current(name, incarnation)
        if child is None or child.status is not Status.STARTING:
            return
        if self._tree.phase is Phase.STARTING:
            self._fail_start(name, error, text)
        else:
            self._kill_faulty(name, text)

    def condemned(self, name: str, incarnation: int, reason: str) -> None:
        child = self._current(name, incarnation)
        if child is not None and child.status is Status.READY:
            self._kill_faulty(name, reason)

    def stalled(self, name: str, incarnation: int, reason: str) -> None:
        child = self._current(name, incarnation)
        if child is None or child.status not in (Status.STARTING, Status.READY):
            return
        if self._tree.phase is Phase.STARTING:
            self._set(name, reason=reason)
            self._fail_start(name, "StartFailed", f"{name}: {reason}")
        else:
            self._kill_faulty(name, reason, dumps_stack=True)

    def drained(self, name: str, incarnation: int, *, stays_down: bool) -> None:
        if stays_down:  # also a life that began meanwhile
            if self._tree.phase is Phase.RUNNING and self._children[name].status is not Status.GONE:
                self._give_up(name, f"{name} was drained, and is to stay down")
            return
        child = self._current(name, incarnation)
        if child is None or child.status is not Status.READY:
            return
        stop = Stop(self._now_s, self._now_s + _GROUP_STOP_S)
        for other in _group(self._children, child):
            if self._children[other].status in (Status.STARTING, Status.READY):
                self._stop(other, stop, is_to_restart=True)

    def died(self, event: ChildDied) -> None:
        child = self._current(event.name, event.incarnation)
        if child is None:
            return
        before = child.status
        last_exit = child.reason or (f"{event.exit}: {event.text}" if event.text else event.exit)
        self._set(
            event.name, is_alive=False, is_linked=False, exit=event.exit, last_exit=last_exit, ended_s=self._now_s,
            wake_s=None, reason="",
        )  # fmt: skip
        if self._tree.phase is Phase.STARTING:
            self._set(event.name, status=Status.GONE)
            text = event.text or f"{event.name} ended with {event.exit} before every process was ready"
            self._fail_start(event.name, event.error or "StartFailed", text)
        elif before is Status.STOPPING and not child.counts_as_death:
            status = Status.BACKOFF if child.is_to_restart else Status.GONE
            self._set(event.name, status=status, wake_s=self._now_s if child.is_to_restart else None)
        elif before is not Status.GONE:
            self._restart_or_give_up(event.name)

    def stop_all(self, budget_s: float) -> None:
        if self._tree.phase is Phase.STOPPED:
            return
        deadline_s = self._now_s + max(_SHORTEST_STOP_S, budget_s)
        if self._tree.stop is not None:
            deadline_s = min(deadline_s, self._tree.stop.deadline_s)
        stop = Stop(self._now_s if self._tree.stop is None else self._tree.stop.began_s, deadline_s)
        self._set_tree(stop=stop, phase=max(self._tree.phase, Phase.STOPPING))
        for name, child in self._children.items():
            if child.is_alive:
                self._stop(name, stop, is_to_restart=False)
            elif child.status is not Status.GONE:
                self._set(name, status=Status.GONE, wake_s=None, exit=child.exit or NEVER_STARTED)

    # Time.

    def advance(self) -> None:
        """Do everything that is due at this moment."""
        for name in self._children:
            self._check_start_deadline(name)
        for name in self._children:
            self._escalate(name)
        for name in self._children:
            self._leave_backoff(name)
        is_over = all(child.status is Status.GONE for child in self._children.values())
        if self._tree.phase is Phase.STOPPING and is_over:
            self._set_tree(phase=Phase.STOPPED)
            self._actions.append(AnnounceStopped())

    def _check_start_deadline(self, name: str) -> None:
        child = self._children[name]
        late_s = _start_deadline_s(self._tree.phase, child)
        if late_s is None or self._now_s < late_s:
            return
        missing = next(why for phase, why in _MISSING.items() if phase not in dict(child.phases))
        text = f"not ready within {late_s - child.asked_s:g} s: {missing}"
        if self._tree.phase is Phase.STARTING:
            self._set(name, reason=text)
            self._fail_start(name, "StartFailed", f"{name} was {text}")
        else:
            self._kill_faulty(name, text)

    def _escalate(self, name: str) -> None:
        child = self._children[name]
        if child.status is not Status.STOPPING or child.stop is None:
            return
        if child.measure < Measure.TERMINATE and self._now_s >= child.stop.terminate_s:
            self._set(name, measure=Measure.TERMINATE)
            self._actions.append(Terminate(name, child.incarnation))
        if self._children[name].measure < Measure.KILL and self._now_s >= child.stop.kill_s:
            self._set(name, measure=Measure.KILL)
            self._actions.append(Kill(name, child.incarnation))
        if self._now_s < child.stop.deadline_s:
            return
        if self._tree.phase is Phase.STOPPING:
            self._set(name, status=Status.GONE, exit="alive after SIGKILL", ended_s=self._now_s)
        elif child.is_to_restart:  # never a second process beside it
            self._give_up(name, f"{name} is still alive after SIGKILL")

    def _leave_backoff(self, name: str) -> None:
        child = self._children[name]
        wake_s = _spawn_again_s(self._tree, self._children, child)
        if wake_s is not None and self._now_s >= wake_s:
            self._set(name, restarts=child.restarts + 1)
            self._spawn(name)

    # Pieces.

    def _current(self, name: str, incarnation: int) -> Child | None:
        child = self._children.get(name)
        return child if child is not None and child.is_alive and child.incarnation == incarnation else None

    def _spawn(self, name: str) -> None:
        child = self._children[name]
        self._set(
            name, status=Status.STARTING, incarnation=child.incarnation + 1, is_alive=True, is_linked=False, stop=None,
            measure=Measure.NONE, is_to_restart=False, counts_as_death=False, reason="", ended_s=None, ready_s=None,
            asked_s=self._now_s, phases=(), wake_s=self._now_s + child.spec.start_timeout_s,
        )  # fmt: skip
        self._actions.append(Spawn(name, child.incarnation + 1))

    def _stop(self, name: str, stop: Stop, *, is_to_restart: bool) -> None:
        """Begin, or tighten, the stop of a living child."""
        child = self._children[name]
        is_first = child.measure is Measure.NONE
        measure = child.measure
        if is_first:
            measure = Measure.POLITE if child.is_linked else Measure.TERMINATE
        self._set(
            name, status=Status.STOPPING, stop=stop, measure=measure, is_to_restart=is_to_restart,
            counts_as_death=False, wake_s=None,
        )  # fmt: skip
        if is_first and measure is Measure.POLITE:
            self._actions.append(AskStop(name, child.incarnation, stop.deadline_s))
        elif is_first:
            self._actions.append(Terminate(name, child.incarnation))

    def _kill_faulty(self, name: str, reason: str, *, dumps_stack: bool = False) -> None:
        child = self._children[name]
        stop = Stop(self._now_s, self._now_s + _GROUP_STOP_S)
        self._set(
            name, status=Status.STOPPING, stop=stop, measure=Measure.KILL, is_to_restart=True, counts_as_death=True,
            reason=reason, wake_s=None,
        )  # fmt: skip
        self._actions.append(Kill(name, child.incarnation, dumps_stack))

    def _fail_start(self, name: str, error: str, text: str) -> None:
        self._actions.append(AnnounceFailure(name, error, text))
        self.stop_all(self._tree.close_timeout_s)

    def _restart_or_give_up(self, name: str) -> None:
        child = self._children[name]
        window_began_s = self._now_s - self._tree.window_s
        deaths_s = (*(at_s for at_s in child.deaths_s if at_s > window_began_s), self._now_s)
        was_of_use = child.ready_s is not None and self._now_s - child.ready_s >= _USEFUL_S
        failures = 1 if was_of_use else child.failures + 1
        self._set(name, deaths_s=deaths_s, failures=failures)
        if len(deaths_s) > self._tree.max_restarts:
            self._set(name, status=Status.GONE)
            self._give_up(
                name,
                f"{name} died {len(deaths_s)} times within {self._tree.window_s:g} s, {self._tree.max_restarts} are"
                f" allowed; the last time with {child.last_exit}",
            )
            return
        wait_s = _backoff_s(failures, f"{self._tree.seed}/{name}/{child.incarnation}")
        self._set(name, status=Status.BACKOFF, wake_s=self._now_s + wait_s)
        stop = Stop(self._now_s, self._now_s + _GROUP_STOP_S)
        for other in self._restarted_with(name):
            if self._children[other].status in (Status.STARTING, Status.READY):
                self._stop(other, stop, is_to_restart=True)

    def _restarted_with(self, name: str) -> list[str]:
        """The other members of its group that do not outlive a member's death."""
        child = self._children[name]
        members = _group(self._children, child)
        strategy = self._tree.strategies[child.spec.group]
        if strategy == ONE_FOR_ONE:
            return []
        if strategy == ONE_FOR_ALL:
            return [other for other in members if other != name]
        return members[members.index(name) + 1 :]

    def _give_up(self, name: str, text: str) -> None:
        """Take the whole group down for good."""
        self._actions.append(AnnounceLost(name, text))
        stop = Stop(self._now_s, self._now_s + _GROUP_STOP_S)
        for other in _group(self._children, self._children[name]):
            child = self._children[other]
            if child.is_alive:
                self._stop(other, child.stop or stop, is_to_restart=False)
            else:
                self._set(other, status=Status.GONE, wake_s=None)

    def _set(self, name: str, **changes: Any) -> None:
        self._children[name] = attrs.evolve(self._children[name], **changes)

    def _set_tree(self, **changes: Any) -> None:
        self._tree = attrs.evolve(self._tree, **changes)


def _start_deadline_s(phase: Phase, child: Child) -> float | None:
    """When a starting child is late. One that was stopped before it could say hello is not waited for until the end."""
    if child.status is not Status.STARTING or child.wake_s is None:
        return None
    reached = dict(child.phases)
    if phase is Phase.STARTING or "forked" not in reached or "linked" in reached:
        return child.wake_s
    return min(child.wake_s, child.asked_s + reached["forked"] / 1e3 + _HELLO_S)


def _group(children: Mapping[str, Child], child: Child) -> list[str]:
    """Names of the unit ``child`` belongs to, in starting order."""
    group = child.spec.group
    return [name for name, other in children.items() if other.spec.group == group] if group else [child.spec.name]


def _spawn_again_s(tree: Tree, children: Mapping[str, Child], child: Child) -> float | None:
    """When a child in BACKOFF may start again; None while it must wait for other members of its group."""
    if child.status is not Status.BACKOFF:
        return None
    strategy = tree.strategies[child.spec.group]
    if strategy == ONE_FOR_ONE:
        return child.wake_s
    members = _group(children, child)
    if any(children[name].status is Status.STOPPING for name in members):
        return None
    waiting = [name for name in members if children[name].status is Status.BACKOFF]
    if strategy == ONE_FOR_ALL:  # all together, when the last of them may
        return max(children[name].wake_s or 0.0 for name in waiting)
    return child.wake_s if waiting[0] == child.spec.name else None


def _backoff_s(failures: int, seed: str) -> float:
    """Wait before the restart after the n-th useless life in a row: 0, 50 ms, 100 ms, … 5 s, less a fifth at most."""
    if failures <= 1:
        return 0.0
    longest_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2.0 ** min(failures - 2, 30))
    return longest_s * random.Random(seed).uniform(1 - _BACKOFF_JITTER, 1)  # noqa: S311 (not for secrets: it must repeat)


# Views.


def records(tree: Tree, pids: Mapping[str, int]) -> tuple[ChildRecord, ...]:
    """The children as ``Engine.tree()`` lists them; ``pids`` of those that have a process."""
    return tuple(
        ChildRecord(
            name=name,
            kind=child.spec.kind,
            pid=pids.get(name, 0),
            parent=child.spec.group if child.spec.group not in ("", name) else SUPERVISOR,
            state=child.status.name.lower(),
            incarnation=child.incarnation,
            restarts=child.restarts,
            last_exit=child.last_exit,
            # Not while they come in: each would be told to the host, and none of them is news alone.
            phases=() if child.status is Status.STARTING else child.phases,
        )
        for name, child in tree.children.items()
    )


def ends(tree: Tree) -> tuple[ChildEnd, ...]:
    """How each child ended, once the tree is stopped."""
    began_s = tree.stop.began_s if tree.stop is not None else 0.0
    return tuple(_end(child, began_s) for child in tree.children.values())


def _end(child: Child, began_s: float) -> ChildEnd:
    was_stopped = child.ended_s is not None and child.ended_s >= began_s and child.exit != NEVER_STARTED
    return ChildEnd(
        name=child.spec.name,
        incarnation=child.incarnation,
        how=_HOW[child.measure if was_stopped else Measure.NONE],
        exit=child.exit,
        seconds=child.ended_s - began_s if was_stopped and child.ended_s is not None else 0.0,
    )


def left_alive(tree: Tree) -> list[str]:
    """Children that were given up while alive: SIGKILL did not end them before the deadline."""
    return [name for name, child in tree.children.items() if child.is_alive and child.status is Status.GONE]
