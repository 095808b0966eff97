"""``bus-run bench bus --lives``: how fast processes start, end, are missed and come back, and what an idle tree costs.

Owns: the processes it measures. Each round does everything once.
"""

from __future__ import annotations

import contextlib
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from ..actors.engine import Engine
from ..actors.processes import open_pidfd
from ..actors.sampling import SamplingParams
from ..actors.wardens import warden_environment
from ..errors import WorkerError
from .bench_figures import OURS, Aim, Row, at_most, compared
from .bench_lines import Peer, named
from .bench_tree import SmallTree, Spawner, kill_process, resident

__all__ = ["Lives", "processes"]

_OWNER = (sys.executable, "-P", "-m", "chipbus.tools.bench_owner")
_FLOOR, _COLD = "fork, SIGKILL, wait", 'Popen -c "import torch"'
_END = "its own end, on a pidfd"
_PEERS = {"xoscar": "xoscar", "Ray": "ray"}
_DOWN_S = 20.0
_TOKENS_BEFORE = 8  # of a stream, before its chip is killed
_LOOK_S = 0.0002

Samples = dict[tuple[str, str], list[float]]
"""(what, system) → one number per round."""


@attrs.frozen(kw_only=True)
class Lives:
    """What one round does, and how often. The defaults are what is quoted."""

    wardens: Sequence[str] = ("light", "torch")
    chips: Sequence[str] = ("null", "cpu")
    owners: Sequence[str] = ("null", "cpu", "lock")  # what ``bench_owner`` knows
    idle_s: float = 10.0
    crashes: int = 4  # children per warden, each killed once in a round; a round's value is their median
    repeats: int = 7  # of other things that take milliseconds
    warm_ups: int = 1  # rounds before those that count


def processes(rounds: int, lives: Lives, peers: str | None) -> list[Row]:
    """Measure. ``peers``: an interpreter that has xoscar and Ray; None leaves them out."""
    samples: Samples = {}
    with contextlib.ExitStack() as stack:
        children = [resident(f"{preload}.{n}", preload) for preload in lives.wardens for n in range(lives.crashes)]
        tree = SmallTree(*children)
        stack.callback(tree.close)
        spawners = {preload: Spawner(preload) for preload in lives.wardens}
        for spawner in spawners.values():
            stack.callback(spawner.close)
        floors = {preload: stack.enter_context(_program("fork", preload)) for preload in lives.wardens}
        others = {} if peers is None else {system: Peer(peers, program) for system, program in _PEERS.items()}
        for peer in others.values():
            stack.callback(peer.close)
        for number in range(lives.warm_ups + rounds):
            counts = number >= lives.warm_ups
            found = dict(_round(lives if counts else attrs.evolve(lives, idle_s=0.1), tree, spawners, floors, others))
            if counts:
                for key, value in found.items():
                    samples.setdefault(key, []).append(value)
        why_not = {system: peer.why_not for system, peer in others.items() if peer.why_not}
    return named(_rows(samples, lives, why_not), others)


Found = Iterator[tuple[tuple[str, str], float]]


def _round(
    lives: Lives,
    tree: SmallTree,
    spawners: dict[str, Spawner],
    floors: dict[str, subprocess.Popen[str]],
    others: dict[str, Peer],
) -> Found:
    for preload in lives.wardens:
        # One of each child: after a short life the supervisor would wait, on purpose, before it starts the next.
        crashes = [tree.crash(f"{preload}.{number}") for number in range(lives.crashes)]
        yield (f"failed {preload}", OURS), statistics.median(crash.failed_ms for crash in crashes)
        yield (f"failed {preload}", _END), statistics.median(crash.ended_ms for crash in crashes)
        yield (f"ready {preload}", OURS), statistics.median(crash.ready_ms for crash in crashes)
        yield (f"answered {preload}", OURS), statistics.median(crash.answered_ms for crash in crashes)
        floor = [_asked(floors[preload]) / 1e6 for _ in range(lives.repeats)]
        yield (f"failed {preload}", _FLOOR), statistics.median(floor)
        spawned = [spawners[preload].spawn_ms() for _ in range(lives.repeats)]
        yield (f"spawn {preload}", OURS), statistics.median(spawned)
    if "torch" in lives.wardens:
        cold_ms = _cold_torch_ms()
        for preload in lives.wardens:
            yield (f"spawn {preload}", _COLD), cold_ms
    for system, peer in others.items():
        yield from _crash_of_peer(system, peer)
    for chip in lives.chips:
        yield from _crash_of_chip(chip)
    for owner in lives.owners:
        yield (f"orphans {owner}", OURS), _orphans_ms(owner)
    yield from _idle_and_close(lives.idle_s)


@contextlib.contextmanager
def _program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``bench_owner`` doing as it is told; it has said its first line."""
    with subprocess.Popen(  # noqa: S603 (a command of ours)
        [*_OWNER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=warden_environment() if arguments[0] == "fork" else None,
    ) as process:
        assert process.stdin is not None
        try:
            if arguments[0] == "fork":
                _line(process)
            yield process
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _line(process: subprocess.Popen[str]) -> str:
    """The next line it prints. Raises ``WorkerError`` if it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise WorkerError(f"{' '.join(map(str, process.args[1:]))} ended without a word")  # type: ignore[index]
    return line


def _asked(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(_line(process))


def _cold_torch_ms() -> float:
    began_s = time.monotonic()
    code = "import torch; print('ready', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:  # noqa: S603 (ours)
        assert process.stdout is not None
        process.stdout.readline()
        return 1e3 * (time.monotonic() - began_s)


def _crash_of_peer(system: str, peer: Peer) -> Found:
    pid = peer.ask("crash")
    if pid is None:
        return
    killed_ns = kill_process(int(pid[0]))
    answer = peer.further()
    if answer is not None:
        yield ("failed light", system), (answer[0] - killed_ns) / 1e6
        yield ("answered light", system), (answer[1] - killed_ns) / 1e6


# Whole engines.


def _crash_of_chip(chip: str) -> Found:
    """Kill the chip of a running stream: until the tree shows the next one ready, and until the stream goes on."""
    name = "chip.0.0"

    def is_back() -> bool:
        return any(r.name == name and r.state == "ready" and r.incarnation > 1 for r in engine.tree())

    def watch() -> None:
        give_up_s = time.monotonic() + _DOWN_S
        while not is_back() and time.monotonic() < give_up_s:
            time.sleep(_LOOK_S)
        ready_ns.append(time.monotonic_ns())

    with Engine("demo", chip=chip, log_level="error") as engine:
        watcher = threading.Thread(target=watch)
        ready_ns: list[int] = []
        killed_ns = 0
        params = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
        stream = engine.stream("replica", params)
        for number, _ in enumerate(stream):
            if number == _TOKENS_BEFORE:
                pid = next(record.pid for record in engine.tree() if record.name == name)
                killed_ns = kill_process(pid)
                watcher.start()
            elif killed_ns and is_back():
                yield (f"serving {chip}", OURS), (time.monotonic_ns() - killed_ns) / 1e6
                break
        else:
            raise WorkerError(f"a stream on {name} of kind {chip} ended before a token of its next life had come")
        stream.close()  # type: ignore[attr-defined]
        watcher.join()
        yield (f"chip ready {chip}", OURS), (ready_ns[0] - killed_ns) / 1e6


def _idle_and_close(idle_s: float) -> Found:
    engine = Engine("demo", chip="null", data_parallel_size=2, log_level="error")
    try:
        supervisor = next(record.pid for record in engine.tree() if record.kind == "supervisor")
        pids = [supervisor, *_descendants(supervisor)]
        yield ("processes", OURS), len(pids)
        before_ns, began_ns = sum(map(_cpu_ns, pids)), time.monotonic_ns()
        time.sleep(idle_s)
        spent_ns, passed_ns = sum(map(_cpu_ns, pids)) - before_ns, time.monotonic_ns() - began_ns
        yield ("idle", OURS), 100 * spent_ns / passed_ns
    finally:
        began_s = time.monotonic()
        engine.close()
        took_s = time.monotonic() - began_s
    yield ("close", OURS), 1e3 * took_s


def _orphans_ms(what: str) -> float:
    """From the SIGKILL of a host application until the last of its processes has ended."""
    with _program("own", what) as owner, contextlib.ExitStack() as stack:
        run_dir = Path(_line(owner))
        poll = select.poll()
        waiting = set()
        for pid in _descendants(owner.pid):
            pidfd = open_pidfd(pid)
            stack.callback(os.close, pidfd)
            poll.register(pidfd, select.POLLIN)
            waiting.add(pidfd)
        began_ns = time.monotonic_ns()
        owner.kill()
        give_up_ns = began_ns + int(1e9 * _DOWN_S)
        while waiting and time.monotonic_ns() < give_up_ns:
            for pidfd, _ in poll.poll(100):
                poll.unregister(pidfd)
                waiting.discard(pidfd)
        took_ns = time.monotonic_ns() - began_ns
        if waiting or run_dir.exists():
            raise WorkerError(f"{len(waiting)} processes, or {run_dir}, outlived their host application")
    return took_ns / 1e6


# What the kernel counts.


def _descendants(pid: int) -> list[int]:
    """Its children, their children, and so on, now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # no process, or one that has just ended
            child = int(entry.name)
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(child)
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _cpu_ns(pid: int) -> int:
    """Time its threads have run, as the scheduler counts it; ``stat`` has the same, but in hundredths of a second."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))


# What it comes to.


def _rows(samples: Samples, lives: Lives, why_not: dict[str, str]) -> list[Row]:
    def block(what: str, figure: str, unit: str = "ms", aim: Aim | None = None, **aims: Aim) -> list[Row]:
        """One figure of all systems. ``aims`` are for our ratio to ``floor``, ``cold``, ``xoscar``, ``ray``."""
        if (what, OURS) not in samples:
            return []
        others: dict[str, Sequence[float] | str] = {
            system: values
            for (measured, system), values in samples.items()
            if measured == what and system != OURS and system not in why_not
        }
        names = {"floor": _FLOOR, "cold": _COLD, "xoscar": "xoscar", "ray": "Ray"}
        if "xoscar" in aims:
            others.update(why_not)
        return compared(
            figure, unit, samples[what, OURS], others, aim=aim, aims={names[key]: value for key, value in aims.items()}
        )  # fmt: skip

    num = int(samples["processes", OURS][0])
    rows = [
        *block("spawn light", "spawn → READY, light child", aim=at_most(6), cold=at_most(0.02)),
        *block("spawn torch", "spawn → READY, torch child", aim=at_most(12), cold=at_most(0.02)),
        *block(
            "failed light", "SIGKILL → pending ask fails, light child", aim=at_most(2), floor=at_most(5),
            xoscar=at_most(1), ray=at_most(1),
        ),
        *block("failed torch", "SIGKILL → pending ask fails, torch child", floor=at_most(5)),
        *block("ready light", "SIGKILL → READY again, light child"),
        *block(
            "answered light", "SIGKILL → next life answers, light child", aim=at_most(10), xoscar=at_most(0.04),
            ray=at_most(0.013),
        ),
        *block("ready torch", "SIGKILL → READY again, torch child"),
        *block("answered torch", "SIGKILL → next life answers, torch child", aim=at_most(25)),
    ]  # fmt: skip
    for chip in lives.chips:
        rows += block(f"chip ready {chip}", f"SIGKILL of a serving {chip} chip → READY again")
        rows += block(f"serving {chip}", f"SIGKILL of a serving {chip} chip → its stream goes on")
    gone = "owner SIGKILLed → all gone"
    rows += block("orphans null", f"{gone}, two replicas on null chips", aim=at_most(50))
    rows += block("orphans cpu", f"{gone}, two replicas on cpu chips", aim=at_most(50))
    rows += block("orphans lock", f"{gone}, eight, four of which hold their interpreter's lock", aim=at_most(50))
    rows += block("idle", f"idle engine, {num} processes, of one core", "%")
    rows += block("close", f"close of an idle engine, {num} processes", aim=at_most(50))
    return rows
