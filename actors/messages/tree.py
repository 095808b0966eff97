"""The conversation about processes: host engine ↔ supervisor ↔ children."""

from __future__ import annotations

import attrs

from ...bus import UNOBSERVED, Histogram, Lane, NodeReport, message
from ...errors import ConfigError
from .launching import ChipReport

__all__ = [
    "AllReplicaStatistics",
    "ChildEnd",
    "ChildRecord",
    "CloseReport",
    "Condemn",
    "Drain",
    "Drained",
    "GroupLost",
    "ProcessReport",
    "ProgramStatistics",
    "ReplicaStatistics",
    "ReplicaStatisticsRequest",
    "Shutdown",
    "StartError",
    "StartFailure",
    "TreeChanged",
    "TreeReady",
    "TreeReport",
    "TreeReportRequest",
]


@attrs.frozen(kw_only=True)
class ChildRecord:
    """One process of the tree, as ``Engine.tree()`` lists it."""

    name: str  # "router", "chip.0.0"
    kind: str  # supervisor | tokenizer | router | replica | chip
    pid: int  # 0 while there is none
    parent: str  # logical parent: "supervisor", or the replica whose group it belongs to; "" for the supervisor
    state: str  # new | starting | ready | draining | stopping | backoff | gone
    incarnation: int  # n-th life, from 1
    restarts: int
    last_exit: str = ""  # "", "exit code 1", "signal 9 (SIGKILL)", "not ready within 30 s: …"
    phases: tuple[tuple[str, float], ...] = ()
    """How its start went, once that is over: "forked", "linked", "started", "ready", in ms since it was asked."""


@message(0x0401, lane=Lane.CHILD)
@attrs.frozen
class TreeChanged:
    """Supervisor tells host: the whole tree as it is now."""

    children: tuple[ChildRecord, ...]


@message(0x0402, lane=Lane.CHILD)
@attrs.frozen
class TreeReady:
    """Supervisor tells host, once: every child is ready, ``seconds`` after the supervisor began."""

    seconds: float


@message(0x0403, lane=Lane.CHILD)
@attrs.frozen
class StartFailure:
    """Supervisor tells host: the first start did not succeed; everything is being stopped.

    ``error`` is the class name in chipbus.errors that the engine raises, ``text`` its sentence.
    """

    child: str
    error: str
    text: str


@message(0x0404, lane=Lane.CHILD)
@attrs.frozen
class GroupLost:
    """Supervisor tells host and router: this child (and its group) died too often and stays down."""

    child: str
    text: str


@message(0x0405, lane=Lane.STOP)
@attrs.frozen
class Shutdown:
    """Host asks supervisor: stop everything within ``budget_s``. Reply: ``CloseReport``, after which it exits."""

    budget_s: float


@attrs.frozen(kw_only=True)
class ChildEnd:
    """How one process ended."""

    name: str
    incarnation: int
    how: str  # "stopped" (by itself after a polite stop) | "terminated" (SIGTERM) | "killed" (SIGKILL) | "died before"
    exit: str  # "exit code 0", "signal 9 (SIGKILL)"
    seconds: float  # from the stop to the reap


@message(0x0406, lane=Lane.STOP)
@attrs.frozen(kw_only=True)
class CloseReport:
    """What ``Engine.close()`` returns: each child and how it ended, what was freed, what (if anything) was left."""

    children: tuple[ChildEnd, ...]
    seconds: float
    freed: tuple[str, ...] = ()  # run directory, sockets, segments, by name
    left: tuple[str, ...] = ()  # anything that could not be removed; empty in a clean close


@message(0x0407, lane=Lane.HEALTH)
@attrs.frozen
class ReplicaStatisticsRequest:
    """Asked by the host through the supervisor and passed on to each replica core. Reply: ``ReplicaStatistics``."""


@attrs.frozen
class ProgramStatistics:
    """All dispatches of one program by one replica core."""

    program: str  # "prefill", "decode", …
    dispatches: int
    tokens: int  # rows or tokens they were given
    device_ns: int


@message(0x0408, lane=Lane.HEALTH)
@attrs.frozen(kw_only=True)
class ReplicaStatistics:
    """One replica core's state; the sum over replicas is ``Engine.statistics()``."""

    replica: int
    pages_total: int
    pages_free: int
    running: int
    waiting: int
    steps: int
    tokens_generated: int
    prompt_tokens: int  # computed by prefill
    step_ns: int  # wall time of all steps
    device_ns: int  # chip time of all dispatches
    pages_cached: int = 0  # of the free pages, those that hold a prefix another prompt may begin with
    pending_tokens: int = 0  # prompt tokens to compute plus tokens that may still be generated
    preemptions: int = 0  # requests sent back to waiting
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of these, found there
    programs: tuple[ProgramStatistics, ...] = ()  # dispatches by program
    incarnation: int = 1  # life of the replica core; what counts up counts from its beginning
    step_tokens: Histogram = UNOBSERVED  # tokens that each step computed
    poisoned_lanes: int = 0  # chips that were given up, and take no work until they are replaced


@message(0x0409, lane=Lane.HEALTH)
@attrs.frozen
class AllReplicaStatistics:
    """Supervisor's reply to the host's ``ReplicaStatisticsRequest``: those replicas that answered in time."""

    replicas: tuple[ReplicaStatistics, ...]


@message(0x040A, lane=Lane.CHILD)
@attrs.frozen
class StartError:
    """Child tells supervisor, instead of ``Ready``: it cannot start. It is ended by the supervisor, or ends itself.

    ``error`` is a class name in chipbus.errors, ``text`` its sentence. An actor may as well raise in ``on_start``.
    """

    error: str
    text: str


@message(0x040B, lane=Lane.CHILD)
@attrs.frozen
class Condemn:
    """Told to the supervisor by the owner of a child's work: this life of it is of no use any more.

    It is killed, which counts as a death of its own. An incarnation that has ended meanwhile is let be.
    """

    child: str
    incarnation: int
    reason: str


@message(0x040E, lane=Lane.HEALTH)
@attrs.frozen
class TreeReportRequest:
    """Asked of the supervisor, by anybody of our user: what is everybody at? Reply: ``TreeReport``."""


@attrs.frozen
class ProcessReport:
    """One process of the tree, and what its node says; None if it has none yet, or did not answer in time."""

    record: ChildRecord
    node: NodeReport | None
    chip: ChipReport | None = None  # of a chip worker that answered


@message(0x040F, lane=Lane.HEALTH)
@attrs.frozen(kw_only=True)
class TreeReport:
    """The host application, the supervisor and every child, in start order."""

    processes: tuple[ProcessReport, ...]
    refused: int  # messages of guests that asked for more than this
    reaps: Histogram = UNOBSERVED  # seconds from seeing that a process has ended until its neighbours were told


def _seconds(_: object, __: object, value: float) -> None:
    if not 0 < value < 1e9:  # nor is it NaN
        raise ConfigError(f"a drain's timeout is {value!r}; it must be a number of seconds above 0")


@message(0x040C, lane=Lane.CHILD)
@attrs.frozen(kw_only=True)
class Drain:
    """Asked of the supervisor by the host, or by a guest: end a replica as soon as its requests have ended.

    Reply: ``Drained``. Errors: ``ConfigError`` if there is no such replica, it is not ready, or the last one.
    """

    replica: str  # node name of its core
    timeout_s: float = attrs.field(validator=_seconds)  # for its requests to end; the others go on elsewhere
    stays_down: bool = False  # instead of being started afresh


@message(0x040D, lane=Lane.CHILD)
@attrs.frozen
class Drained:
    """The supervisor's reply: the replica is being ended. ``is_empty``: all its requests had ended by themselves."""

    is_empty: bool
