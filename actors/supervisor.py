"""The supervisor: decides who lives, restarts what dies, tells the others, and never waits.

Owns: the tree's state (``lifecycle.Tree``). How a child is made and how its end is noticed is its nursery's part, so
the same actor runs over real processes and in the one-process system. Thread: its bus loop.

    messages, nursery ──events──▶ lifecycle.step ──actions──▶ messages, nursery

It is also the directory of the bus: a child that says hello is announced to those that connect to it, and a child that
ends is announced to everyone it was linked with, before its next life can be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from signal import SIGKILL, SIGTERM
from typing import Any

import attrs

from ..bus import (
    Actor,
    Call,
    NodeReport,
    NodeReportRequest,
    PeerDown,
    PeerUp,
    Ping,
    Pong,
    Progress,
    Ready,
    Series,
    Stop,
    Timer,
    handles,
)
from ..errors import BusError, ChipbusError, MailboxFull, PeerGone, StartFailed
from .boot import HOST, ROUTER, SUPERVISOR, Boot
from .draining import Draining
from .heartbeats import Heartbeats
from .lifecycle import (
    NEVER_STARTED,
    Action,
    AnnounceFailure,
    AnnounceLost,
    AnnounceReady,
    AnnounceStopped,
    AskStop,
    Begin,
    Child,
    ChildCondemned,
    ChildDied,
    ChildFailed,
    ChildForked,
    ChildLinked,
    ChildReady,
    ChildStalled,
    ChildStarted,
    Event,
    Kill,
    Phase,
    Spawn,
    Status,
    StopAll,
    Terminate,
    Tick,
    ends,
    left_alive,
    next_wake_s,
    plant,
    records,
    step,
)
from .messages.launching import ChipReport, ChipReportRequest
from .messages.tree import (
    AllReplicaStatistics,
    ChildRecord,
    CloseReport,
    Condemn,
    Drain,
    GroupLost,
    ProcessReport,
    ReplicaStatistics,
    ReplicaStatisticsRequest,
    Shutdown,
    StartError,
    StartFailure,
    TreeChanged,
    TreeReady,
    TreeReport,
    TreeReportRequest,
)
from .nursery import LifeEnd, Nursery, NurseryEvents

__all__ = ["SupervisorActor"]

STATISTICS_TIMEOUT_S = 2.0
REPORT_TIMEOUT_S = 0.5
_REAP_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_GUEST = "guest."
_DUMP_S = 0.05  # for a stuck process to write its stack; it takes 1 ms
_ROUNDING_S = 2e-9  # a tick just before its time does nothing; on a virtual clock it would then come again for ever


Handler = Callable[["SupervisorActor", Any, Call | None], None]


def _of_the_tree(handler: Handler) -> Handler:
    """A handler for messages of the host and of children. A guest's is refused, and counted."""

    @wraps(handler)
    def checked(self: SupervisorActor, message: Any, call: Call | None) -> None:
        if not self.refuses_guest(message, call):
            handler(self, message, call)

    return checked


class SupervisorActor(Actor):
    """Runs one tree of children, from ``Begin`` until everything is stopped and reported."""

    def __init__(self, boot: Boot, nursery: Nursery) -> None:
        self._boot = boot
        self._nursery = nursery
        self._tree = plant(boot)
        self._events: deque[Event] = deque()
        self._is_stepping = False
        self._timer: Timer | None = None
        self._shutdowns: list[Call] = []
        self._is_to_end = False  # when everything is stopped
        self._is_leaving = False
        self._lost: list[GroupLost] = []
        self._draining = Draining(self._feed)
        self._guests: set[str] = set()
        self._refused = 0  # messages of guests
        self._reaps = Series(_REAP_S)
        self._heartbeats = Heartbeats(boot.stall_timeout_s)
        self._told: tuple[ChildRecord, ...] = ()

    # Hooks.

    def on_start(self) -> None:
        """Start every child."""
        self.ctx.connect(HOST, 1)
        self._nursery.open(
            self.ctx,
            NurseryEvents(
                on_spawned=lambda name, incarnation: self._feed(ChildForked(name, incarnation)),
                on_ended=self._life_ended,
                on_terminated=self._terminated,
                may_spawn=lambda: self._tree.phase < Phase.STOPPING,
            ),
        )
        self._feed(Begin())
        self._beat()

    def on_stop(self) -> None:
        """The host asked the node itself to stop: the same as ``Shutdown``, without a report."""
        self.ctx.hold_stop()
        self._is_to_end = True
        self._feed(StopAll(self._boot.close_timeout_s))

    def on_peer_up(self, name: str) -> None:
        """A child is on the bus: introduce it."""
        if name.startswith(_GUEST):
            self._let_in(name)
        child = self._living(name)
        if child is None or self.ctx.peers().get(name) != child.incarnation:
            return
        self._feed(ChildLinked(name, child.incarnation))
        if self._tree.children[name].status is Status.STOPPING:
            return
        self._tell(name, Ping())  # its answer says that the actor has started
        for other in self._boot.children:
            if name in other.connect and self._is_linked(other.name):
                self._tell(other.name, PeerUp(name, child.incarnation))
        for peer in child.spec.connect:
            if peer == HOST:
                self._tell(name, PeerUp(HOST, 1))
            elif self._is_linked(peer):
                self._tell(name, PeerUp(peer, self._life_of(peer)))
        if name == ROUTER:  # it may be new: it has not heard
            for lost in self._lost:
                self._tell(ROUTER, lost)

    # Guests.

    def obeys(self, sender: str) -> bool:
        """Only the host application may stop it. Who is up it says itself."""
        return sender == HOST

    def refuses_guest(self, message: object, call: Call | None) -> bool:
        """Whether the message being handled is a guest's, who may ask for a report or a drain, and nothing else."""
        sender = self.ctx.sender
        if sender == HOST or sender in self._tree.children:
            return False
        self._refused += 1
        self.ctx.log.warning("guest.refused", guest=sender, message=type(message).__name__)
        if call is not None:
            call.fail(BusError(f"{sender} is a guest: it may ask for a report or a drain, and nothing else"))
        return True

    def _let_in(self, name: str) -> None:
        if name in self._guests:
            return
        self._guests.add(name)

        def gone() -> None:
            self._guests.discard(name)
            life = self.ctx.peers().get(name)
            if life is not None:
                self.ctx.peer_down(name, life, "it has left")

        self._nursery.watch_guest(int(name.removeprefix(_GUEST)), gone)

    @handles(TreeReportRequest)
    def _report_tree(self, _: TreeReportRequest, call: Call | None) -> None:
        if call is None:
            return
        names = {name for name in (HOST, *self._tree.children) if name == HOST or self._is_linked(name)}
        names &= self.ctx.peers().keys()
        waiting: set[tuple[str, type]] = {(name, NodeReportRequest) for name in names}
        waiting |= {(name, ChipReportRequest) for name in names if self._is_chip(name)}
        nodes: dict[str, NodeReport] = {}
        chips: dict[str, ChipReport] = {}

        def settle(name: str, question: type, answer: NodeReport | ChipReport | None) -> None:
            waiting.discard((name, question))
            if isinstance(answer, NodeReport):
                nodes[name] = answer
            elif answer is not None:
                chips[name] = answer
            if not waiting:
                nodes[SUPERVISOR] = self.ctx.report()
                host = ChildRecord(
                    name=HOST, kind=HOST, pid=self._boot.host_pid, parent="", state="ready", incarnation=1, restarts=0
                )
                processes = tuple(
                    ProcessReport(record, nodes.get(record.name), chips.get(record.name))
                    for record in (host, *self._records())
                )
                call.reply(TreeReport(processes=processes, refused=self._refused, reaps=self._reaps.read()))

        if not waiting:
            settle("", NodeReportRequest, None)
        for name, question in sorted(waiting, key=str):
            self.ctx.ask(
                name,
                question(),
                timeout_s=REPORT_TIMEOUT_S,
                on_reply=partial(settle, name, question),
                on_error=lambda _, name=name, question=question: settle(name, question, None),  # type: ignore[misc]
            )

    def _is_chip(self, name: str) -> bool:
        return name in self._tree.children and self._tree.children[name].spec.kind == "chip"

    def _living(self, name: str) -> Child | None:
        """The child of that name whose current life has been asked for and is not over."""
        child = self._tree.children.get(name)
        return child if child is not None and child.is_alive else None

    def _speaker(self) -> Child | None:
        """The child whose message is being handled; None if that life of it is over, whatever it had to say."""
        child = self._living(self.ctx.sender)
        return child if child is not None and child.incarnation == self.ctx.sender_incarnation else None

    def _is_linked(self, name: str) -> bool:
        child = self._tree.children[name]
        return child.is_linked and child.status in (Status.STARTING, Status.READY)

    # Heartbeats.

    def _beat(self) -> None:
        """Judge who is silent or stuck, then ask everybody again."""
        watched = {name: child.incarnation for name, child in self._tree.children.items() if self._is_linked(name)}
        stalls = self._heartbeats.beat(watched, self._now_s())
        for name in watched:
            self._tell(name, self._news_for(name))
        for stall in stalls:
            self.ctx.log.error("child.stalled", child=stall.name, life=stall.incarnation, reason=stall.reason)
            self._feed(ChildStalled(stall.name, stall.incarnation, stall.reason))
        self.ctx.after(self._heartbeats.interval_s, self._beat)

    def _news_for(self, name: str) -> Ping:
        """What a child should know of its neighbours: whatever of it was lost on the way is made good."""
        connect = self._tree.children[name].spec.connect
        up = [(peer, self._life_of(peer)) for peer in connect if peer == HOST or self._is_linked(peer)]
        ended = []
        for peer in self._neighbours(name):
            child = self._tree.children[peer]
            life = child.incarnation - child.is_alive
            if life:
                ended.append((peer, life))
        return Ping(tuple(up), tuple(ended))

    def _life_of(self, peer: str) -> int:
        return 1 if peer == HOST else self._tree.children[peer].incarnation

    def _neighbours(self, name: str) -> list[str]:
        """Children that have, or should have, a link with that one."""
        connect = self._tree.children[name].spec.connect
        return [spec.name for spec in self._boot.children if spec.name in connect or name in spec.connect]

    @handles(Pong)
    @_of_the_tree
    def _pong(self, message: Pong, _: Call | None) -> None:
        child = self._speaker()
        if child is None:
            return
        if child.status is Status.STARTING:
            self._feed(ChildStarted(self.ctx.sender, child.incarnation))
            if message.ready is not None:
                self._ready(message.ready, None)
        # One that is starting has a deadline for whatever it is busy with.
        is_busy = message.is_busy and child.status is Status.READY
        self._heartbeats.answered(self.ctx.sender, child.incarnation, message.progress, is_busy=is_busy)

    # Messages from children.

    @handles(Ready)
    @_of_the_tree
    def _ready(self, message: Ready, _: Call | None) -> None:
        name = self.ctx.sender
        child = self._speaker()
        if child is None or child.status is not Status.STARTING:  # or it says so again
            return
        self._feed(ChildReady(name, child.incarnation))
        phases = {f"{phase}_ms": took_ms for phase, took_ms in self._tree.children[name].phases}
        self.ctx.log.info(
            "child.ready", child=name, life=child.incarnation, pid=self._nursery.pid(name), **phases,
            actor_s=message.seconds, detail=message.detail,
        )  # fmt: skip

    @handles(StartError)
    @_of_the_tree
    def _start_error(self, message: StartError, _: Call | None) -> None:
        child = self._speaker()
        if child is not None:
            self._feed(ChildFailed(self.ctx.sender, child.incarnation, message.error, message.text))

    @handles(Condemn)
    @_of_the_tree
    def _condemn(self, message: Condemn, _: Call | None) -> None:
        spec = self._boot.spec(message.child)
        if spec is None or self.ctx.sender not in spec.connect:  # only whom it serves may say so
            self.ctx.log.warning("condemn.refused", child=message.child, sender=self.ctx.sender)
            return
        self.ctx.log.error("child.condemned", child=message.child, reason=message.reason)
        self._feed(ChildCondemned(message.child, message.incarnation, message.reason))

    @handles(Progress)
    @_of_the_tree
    def _progress(self, message: Progress, _: Call | None) -> None:
        self._tell(HOST, attrs.evolve(message, phase=f"{self.ctx.sender} {message.phase}"))

    # Messages from the host.

    @handles(Shutdown)
    @_of_the_tree
    def _shutdown(self, message: Shutdown, call: Call | None) -> None:
        if call is not None:
            self._shutdowns.append(call)
        self._is_to_end = True
        self._feed(StopAll(message.budget_s))
        if self._tree.phase is Phase.STOPPED:
            self._leave()

    @handles(ReplicaStatisticsRequest)
    @_of_the_tree
    def _statistics(self, message: ReplicaStatisticsRequest, call: Call | None) -> None:
        if call is None:
            return
        names = [name for name, child in self._tree.children.items() if child.spec.kind == "replica"]
        waiting = {name for name in names if self._is_linked(name)}
        answers: dict[str, ReplicaStatistics] = {}

        def fail(name: str, _: ChipbusError) -> None:
            settle(name, None)

        def settle(name: str, answer: ReplicaStatistics | None) -> None:
            waiting.discard(name)
            if answer is not None:
                answers[name] = answer
            if not waiting:
                call.reply(AllReplicaStatistics(tuple(answers[n] for n in names if n in answers)))

        if not waiting:
            call.reply(AllReplicaStatistics(()))
        for name in sorted(waiting):
            self.ctx.ask(
                name,
                message,
                timeout_s=STATISTICS_TIMEOUT_S,
                on_reply=partial(settle, name),
                on_error=partial(fail, name),
            )

    # Messages from the host or a guest.

    @handles(Drain)
    def _drain(self, message: Drain, call: Call | None) -> None:
        if call is not None:
            self._draining.begin(self.ctx, self._tree, message, call)
            self._tell_tree()

    # Events from the nursery.

    def _terminated(self) -> None:
        self.ctx.log.warning("supervisor.terminated")
        self._is_to_end = True
        self._feed(StopAll(self._boot.close_timeout_s))
        if self._tree.phase is Phase.STOPPED:
            self._leave()

    def _life_ended(self, end: LifeEnd) -> None:
        """Neighbours hear of it in this turn; what to do about it is decided in the next one."""
        child = self._tree.children[end.name]
        if child.is_linked:
            self._tell_down(child, f"{end.exit}, {child.reason}" if child.reason else end.exit)
        if end.pid:
            self._reaps.observe((self.ctx.clock.now_ns() - end.seen_ns) / 1e9)
        self.ctx.call_soon_threadsafe(lambda: self._follow(end))

    def _follow(self, end: LifeEnd) -> None:
        is_stopping = self._tree.children[end.name].status is Status.STOPPING
        log = self.ctx.log.info if is_stopping else self.ctx.log.warning
        log("child.exited", child=end.name, life=end.incarnation, pid=end.pid, exit=end.exit, reason=end.text)
        self._feed(ChildDied(end.name, end.incarnation, end.exit, end.error, end.text))

    def _tell_down(self, child: Child, reason: str) -> None:
        gone = child.spec.name
        self.ctx.peer_down(gone, child.incarnation, reason)
        if HOST in child.spec.connect:
            self._tell(HOST, PeerDown(gone, child.incarnation, reason))
        for name in self._neighbours(gone):
            if self._tree.children[name].is_linked:
                self._tell(name, PeerDown(gone, child.incarnation, reason))

    # State machine.

    def _feed(self, event: Event) -> None:
        """Take one step, and those that its actions cause; then arm the timer and show the tree."""
        self._events.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._events:
                self._tree, actions = step(self._tree, self._events.popleft(), self._now_s())
                for action in actions:
                    self._do(action)
        finally:
            self._is_stepping = False
        for name, child in self._tree.children.items():
            if child.status is Status.GONE:
                self._nursery.drop(name)
        self._arm_timer()
        self._tell_tree()

    def _do(self, action: Action) -> None:
        match action:
            case Spawn(name, incarnation):
                self._spawn(name, incarnation)
            case AskStop(name, _, deadline_s):
                self._tell(name, Stop(int(deadline_s * 1e9)))
            case Terminate(name, incarnation):
                self._nursery.signal(name, incarnation, SIGTERM)
            case Kill(name, incarnation, dumps_stack):
                if dumps_stack:
                    self._nursery.dump_stack(name, incarnation)
                    self.ctx.after(_DUMP_S, lambda: self._nursery.signal(name, incarnation, SIGKILL))
                else:
                    self._nursery.signal(name, incarnation, SIGKILL)
            case AnnounceReady(seconds):
                self.ctx.log.info("tree.ready", seconds=seconds)
                self._tell(HOST, TreeReady(seconds))
            case AnnounceFailure(name, error, text):
                self.ctx.log.error("tree.start_failed", child=name, reason=text)
                self._tell(HOST, StartFailure(name, error, text))
                self.ctx.after(2 * self._boot.close_timeout_s, self._end_unasked)
            case AnnounceLost(name, text):
                self.ctx.log.error("group.lost", child=name, reason=text)
                self._lost.append(GroupLost(name, text))
                self._tell(HOST, self._lost[-1])
                if ROUTER in self._tree.children and self._is_linked(ROUTER):
                    self._tell(ROUTER, self._lost[-1])
            case AnnounceStopped():
                if self._is_to_end:
                    self._leave()

    def _spawn(self, name: str, incarnation: int) -> None:
        try:
            self._nursery.spawn(self._tree.children[name].spec, incarnation)
        except StartFailed as error:
            self._events.append(ChildDied(name, incarnation, NEVER_STARTED, "StartFailed", str(error)))

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_s = next_wake_s(self._tree)
        if wake_s is not None:
            self._timer = self.ctx.after(max(0.0, wake_s - self._now_s()) + _ROUNDING_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._feed(Tick())

    def _now_s(self) -> float:
        return self.ctx.clock.now_ns() / 1e9

    # The end.

    def _end_unasked(self) -> None:
        """A failed start is answered by the host's ``Shutdown``. If that never comes, end all the same."""
        self._is_to_end = True
        if self._tree.phase is Phase.STOPPED:
            self._leave()

    def _leave(self) -> None:
        """All children are gone: let the nursery close, then report."""
        if not self._is_leaving:
            self._is_leaving = True
            self._nursery.leave(self._report)

    def _report(self, left: tuple[str, ...]) -> None:
        stop = self._tree.stop
        report = CloseReport(
            children=ends(self._tree),
            seconds=0.0 if stop is None else self._now_s() - stop.began_s,
            freed=tuple(self._nursery.freed),
            left=(*left_alive(self._tree), *left),
        )
        for call in self._shutdowns:
            call.reply(report)
        self._shutdowns.clear()
        self.ctx.stop()

    # Telling.

    def _tell(self, name: str, message: object) -> None:
        """Tell a peer that may be gone, or may not be reading. What it misses it learns from the next tree or death."""
        try:
            self.ctx.tell(name, message)
        except (PeerGone, MailboxFull) as error:
            self.ctx.log.debug("tell.failed", to=name, message=type(message).__name__, reason=str(error))

    def _tell_tree(self) -> None:
        """Show the host the tree, if it looks different from what it was shown last."""
        tree = self._records()
        if tree != self._told:
            self._told = tree
            self._tell(HOST, TreeChanged(tree))

    def _records(self) -> tuple[ChildRecord, ...]:
        state = {Phase.RUNNING: "ready", Phase.STOPPING: "stopping", Phase.STOPPED: "stopping"}
        own = ChildRecord(
            name=SUPERVISOR, kind=SUPERVISOR, pid=self._nursery.pid(SUPERVISOR), parent="",
            state=state.get(self._tree.phase, "starting"), incarnation=1, restarts=0,
        )  # fmt: skip
        children = records(self._tree, {name: self._nursery.pid(name) for name in self._tree.children})
        return (own, *(attrs.evolve(r, state="draining") if self._is_draining(r) else r for r in children))

    def _is_draining(self, record: ChildRecord) -> bool:
        return record.state == "ready" and record.name in self._draining.names
