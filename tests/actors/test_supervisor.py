"""Real supervisors over real processes: what happens when something dies, refuses, hangs, or is told to stop."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from supervised import PROGRAMS, Host, tree_of_four, worker

from chipbus.actors.messages.tree import ChildEnd, GroupLost, StartFailure, TreeReady, TreeReport, TreeReportRequest
from chipbus.actors.processes import ExitStatus, signal_group
from chipbus.bus import Progress
from support import descriptors, eventually, our_processes, weight_files

KILLED = "signal 9 (SIGKILL)"


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run directories of this test are made in a place of their own, which is empty again when it ends."""
    before = (our_processes(), descriptors(), threading.active_count())
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        monkeypatch.setenv("XDG_RUNTIME_DIR", home)
        yield
        eventually(lambda: our_processes() <= before[0], "every process is gone")
        eventually(lambda: not list(Path(home).iterdir()), "every run directory is gone")
        eventually(lambda: threading.active_count() <= before[2], "every thread is gone")
        eventually(lambda: descriptors() <= before[1], "every descriptor is closed")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wardens(host: Host) -> list[psutil.Process]:
    """Those that have got as far as calling themselves so."""
    found = []
    for process in psutil.Process(host.handle.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if process.name() == "warden.light":
                found.append(process)
    return found


def warden_of(host: Host) -> psutil.Process:
    eventually(lambda: len(wardens(host)) == 1, "there is one light warden")
    return wardens(host)[0]


def diary(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def by_name(ends: tuple[ChildEnd, ...]) -> dict[str, ChildEnd]:
    return {end.name: end for end in ends}


def test_a_tree_starts_is_introduced_to_itself_and_stops(tmp_path: Path) -> None:
    pages = tmp_path / "diary"
    with Host(*tree_of_four(diary=str(pages))) as host:
        assert host.hear(TreeReady).seconds < 20
        assert host.hear(Progress).unit == "bytes"
        assert [host.record(spec.name).parent for spec in host.boot.children] == [
            "supervisor", "supervisor", "supervisor", "replica.0",
        ]  # fmt: skip
        assert len(set(host.pids().values())) == 5
        for record in host.listener.trees[-1][1:]:
            assert sorted(record.phases, key=lambda phase: phase[1]) == list(record.phases)
            assert [name for name, _ in record.phases] == ["forked", "linked", "started", "ready"]
        eventually(lambda: "chip.0.0 1 up replica.0 1" in diary(pages), "the chip knows its replica core")
        eventually(lambda: "router 1 up replica.0 1" in diary(pages), "the router knows it, too")

        report = host.shut_down(5.0)

        assert [(end.how, end.exit) for end in report.children] == [("stopped", "exit code 0")] * 4
        assert report.left == ()
        assert report.seconds < 5
    assert host.handle.exit == ExitStatus(code=0)


@pytest.mark.guarantee("S5")
def test_a_killed_child_is_reaped_and_restarted_under_the_next_incarnation(tmp_path: Path) -> None:
    pages = tmp_path / "diary"
    with Host(*tree_of_four(diary=str(pages))) as host:
        host.hear(TreeReady)
        killed = host.record("router").pid
        os.kill(killed, signal.SIGKILL)

        again = host.record("router", incarnation=2)
        assert (again.restarts, again.last_exit) == (1, KILLED)
        assert again.pid != killed
        assert not psutil.pid_exists(killed)
        assert not (host.directory.path / "router.1.c").exists()


@pytest.mark.guarantee("S6")
def test_neighbours_hear_of_a_death_with_its_exit_before_they_hear_of_the_next_life(tmp_path: Path) -> None:
    pages = tmp_path / "diary"
    with Host(*tree_of_four(diary=str(pages))) as host:
        host.hear(TreeReady)
        for name in ("router", "tokenizer.0"):
            eventually(lambda: "tokenizer.0 1 up router 1" in diary(pages), "the tree is linked")
            eventually(lambda: "replica.0 1 up router 1" in diary(pages), "the tree is linked")
            os.kill(host.record(name).pid, signal.SIGKILL)
            host.record(name, incarnation=2)
            if name == "router":
                eventually(lambda: "replica.0 1 up router 2" in diary(pages), "the replica core has the new router")
                eventually(lambda: "tokenizer.0 1 up router 2" in diary(pages), "the tokenizer has it, too")
        assert host.hear_if(lambda m: m == ("down", "tokenizer.0", KILLED), "death of the tokenizer")
        assert host.hear_if(lambda m: m == ("up", "tokenizer.0"), "its next life")

        for neighbour in ("replica.0", "tokenizer.0"):
            heard = [line.split(" ", 2)[2] for line in diary(pages) if line.startswith(f"{neighbour} 1 ")]
            news = [words for words in heard if " router " in words]
            assert news[:3] == ["up router 1", f"down router {KILLED}", "up router 2"]


def test_a_dead_replica_core_takes_its_chip_along(tmp_path: Path) -> None:
    pages = tmp_path / "diary"
    with Host(*tree_of_four(diary=str(pages))) as host:
        host.hear(TreeReady)
        os.kill(host.record("replica.0").pid, signal.SIGKILL)

        assert host.record("replica.0", incarnation=2).last_exit == KILLED
        assert host.record("chip.0.0", incarnation=2).last_exit == "exit code 0"
        assert host.record("router").restarts == host.record("tokenizer.0").restarts == 0
        eventually(lambda: "chip.0.0 2 up replica.0 2" in diary(pages), "the new chip has the new core")
        assert not any(line.startswith("chip.0.0 1 up replica.0 2") for line in diary(pages))


@pytest.mark.slow
@pytest.mark.guarantee("S7")
def test_a_missed_start_deadline_fails_the_start_and_leaves_nothing() -> None:
    slow = worker("chip.0.0", "router", never_ready=True, start_timeout_s=2.0)
    with Host(worker("router"), slow) as host:
        failure = host.hear(StartFailure)

        text = "chip.0.0 was not ready within 2 s: its actor has not said that it is ready"
        assert failure == StartFailure("chip.0.0", "StartFailed", text)
        ends = by_name(host.shut_down(5.0).children)
        assert {end.how for end in ends.values()} == {"stopped"}


@pytest.mark.guarantee("S8")
@pytest.mark.parametrize(
    ("misbehaviour", "error", "text"),
    [
        ({"refuse": "no config.json in /x"}, "CheckpointError", "no config.json in /x"),
        ({"say_failure": "more pages than memory"}, "ConfigError", "more pages than memory"),
        ({"die_in": (1,)}, "StartFailed", "chip.0.0 ended with exit code 9 before every process was ready"),
        ({"kind": "nonsense"}, "ConfigError", "there is no kind of child 'nonsense'"),
        ({"preload": "broken"}, "StartFailed", "warden broken cannot import is_broken: RuntimeError: no such"),
    ],
)
def test_a_child_that_cannot_start_fails_the_start_with_its_own_words(
    misbehaviour: dict[str, object], error: str, text: str
) -> None:
    with Host(worker("router"), worker("chip.0.0", "router", **misbehaviour)) as host:
        failure = host.hear(StartFailure)

        assert (failure.child, failure.error) == ("chip.0.0", error)
        assert failure.text.startswith(text)
        assert host.shut_down(5.0).left == ()


@pytest.mark.slow
def test_a_failed_start_that_nobody_asks_about_ends_by_itself() -> None:
    with Host(worker("router", refuse="no"), close_timeout_s=0.2) as host:
        host.hear(StartFailure)

        assert host.handle.reap(20) == ExitStatus(code=0)


@pytest.mark.slow
@pytest.mark.guarantee("S9")
def test_the_report_names_every_child_and_how_it_ended_within_one_shared_deadline() -> None:
    with Host(
        worker("router"),
        worker("holds.0", holds_stop=True),
        worker("holds.1", holds_stop=True, ignores_sigterm=True),
        worker("stopped.0"),
    ) as host:
        host.hear(TreeReady)
        os.kill(host.record("stopped.0").pid, signal.SIGSTOP)

        report = host.shut_down(1.5)

        ends = by_name(report.children)
        assert {name: (end.how, end.exit) for name, end in ends.items()} == {
            "router": ("stopped", "exit code 0"),
            "holds.0": ("terminated", "signal 15 (SIGTERM)"),
            "holds.1": ("killed", KILLED),
            "stopped.0": ("killed", KILLED),
        }
        assert report.seconds < 1.5
        assert max(end.seconds for end in ends.values()) <= report.seconds
        assert report.left == ()
        assert set(report.freed) >= {"stopped.0.1.c", "stopped.0.1.d"}


def test_stopping_during_the_start_waits_for_no_import() -> None:
    with Host(worker("router"), worker("chip.0.0", "router", preload="slow")) as host:
        host.record("router")
        report = host.shut_down(10.0)

        assert by_name(report.children)["chip.0.0"].exit == "never started"
        assert report.seconds < 5


@pytest.mark.slow
def test_shutting_down_twice_gives_the_same_report() -> None:
    with Host(worker("router", holds_stop=True)) as host:
        host.hear(TreeReady)
        reports = []
        threads = [threading.Thread(target=lambda: reports.append(host.shut_down(0.6))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

        assert len(reports) == 2
        assert reports[0] == reports[1]


def test_sigterm_stops_the_whole_tree_politely() -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        os.kill(host.handle.pid, signal.SIGTERM)

        assert host.handle.reap(20) == ExitStatus(code=0)


@pytest.mark.guarantee("S10")
def test_a_child_that_dies_too_often_is_given_up_with_its_group_and_the_others_go_on(tmp_path: Path) -> None:
    pages = tmp_path / "diary"
    children = (
        worker("router", diary=str(pages)),
        worker("replica.0", "router", group="replica.0"),
        worker("chip.0.0", "replica.0", group="replica.0", die_in=(2, 3)),
    )
    with Host(*children, max_restarts=2) as host:
        host.hear(TreeReady)
        os.kill(host.record("chip.0.0").pid, signal.SIGKILL)

        lost = host.hear(GroupLost)
        assert lost.child == "chip.0.0"
        assert lost.text.startswith("chip.0.0 died 3 times within 30 s, 2 are allowed; the last time with exit code 9")
        host.record("chip.0.0", "gone", 3)
        host.record("replica.0", "gone")
        eventually(lambda: "router 1 lost chip.0.0" in diary(pages), "the router was told")
        os.kill(host.record("router").pid, signal.SIGKILL)
        host.record("router", incarnation=2)
        eventually(lambda: "router 2 lost chip.0.0" in diary(pages), "its next life was told, too")
        assert by_name(host.shut_down(5.0).children)["chip.0.0"].how == "died before"


@pytest.mark.guarantee("S11")
def test_a_killed_warden_is_replaced_its_children_live_on_and_their_deaths_are_still_reaped() -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        before = host.pids()
        warden = warden_of(host)
        warden.kill()
        eventually(lambda: [w for w in wardens(host) if w != warden] != [], "there is a new warden")
        assert all(is_running(pid) for pid in before.values())

        os.kill(before["router"], signal.SIGKILL)

        again = host.record("router", incarnation=2)
        assert again.last_exit == KILLED
        assert not psutil.pid_exists(before["router"])
        assert [end.how for end in host.shut_down(5.0).children] == ["stopped"] * 4


def test_a_warden_killed_together_with_its_children_is_survived() -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        warden = warden_of(host)
        for pid in (warden.pid, host.record("router").pid, host.record("tokenizer.0").pid):
            os.kill(pid, signal.SIGKILL)

        host.record("router", incarnation=2)
        host.record("tokenizer.0", incarnation=2)
        assert not [p for p in psutil.Process(host.handle.pid).children() if p.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.guarantee("M26")
def test_each_reaped_process_is_one_observation_from_its_death_being_seen_until_its_neighbours_were_told() -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        assert sum(host.ask(TreeReportRequest(), TreeReport).reaps.counts) == 0
        warden_of(host).suspend()  # who knows how its child ended, and does not say
        os.kill(host.record("router").pid, signal.SIGKILL)
        eventually(lambda: sum(host.ask(TreeReportRequest(), TreeReport).reaps.counts) == 1, "it is reaped")
        warden_of(host).resume()
        host.record("router", incarnation=2)

        reaps = host.ask(TreeReportRequest(), TreeReport).reaps
        assert sum(reaps.counts) == 1
        assert reaps.total > 0.2, "it was waited for the warden's word for a quarter of a second"


@pytest.mark.slow
def test_a_stopped_warden_delays_neither_the_news_of_a_death_nor_the_end() -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        host.hear_if(lambda m: m == ("up", "tokenizer.0"), "link to the tokenizer")
        os.kill(warden_of(host).pid, signal.SIGSTOP)
        os.kill(host.record("tokenizer.0").pid, signal.SIGKILL)

        assert host.hear_if(lambda m: m == ("down", "tokenizer.0", "exit status unknown"), "death of the tokenizer")
        report = host.shut_down(2.0)
        assert report.seconds < 2
        assert report.left == ()


STALL_S = 0.6


@pytest.mark.slow
@pytest.mark.guarantee("S22")
@pytest.mark.parametrize("victim", ["tokenizer.0", "router", "replica.0", "chip.0.0"])
def test_a_stopped_child_is_killed_and_replaced(victim: str) -> None:
    with Host(*tree_of_four(), stall_timeout_s=STALL_S) as host:
        host.hear(TreeReady)
        os.kill(host.record(victim).pid, signal.SIGSTOP)

        again = host.record(victim, incarnation=2)

        assert (again.restarts, again.last_exit) == (1, f"no answer to heartbeats for {STALL_S} s")
        others = {record.name for record in host.listener.trees[-1] if record.restarts} - {victim}
        assert others == ({"chip.0.0"} if victim == "replica.0" else set())


@pytest.mark.slow
def test_a_child_that_holds_its_interpreters_lock_is_killed_and_replaced() -> None:
    with Host(worker("router"), worker("holder", gil=True), stall_timeout_s=STALL_S) as host:
        host.hear(TreeReady)

        assert host.record("holder", incarnation=2).last_exit == f"no answer to heartbeats for {STALL_S} s"


@pytest.mark.slow
@pytest.mark.guarantee("S23")
def test_a_child_that_is_busy_and_gets_nowhere_is_killed_and_a_slow_one_is_not() -> None:
    children = (worker("stuck.0", busy="stuck"), worker("slow.0", busy="slow"))
    with Host(*children, stall_timeout_s=STALL_S) as host:
        host.hear(TreeReady)

        assert host.record("stuck.0", incarnation=2).last_exit == f"busy without progress for {STALL_S} s"
        threading.Event().wait(2 * STALL_S)
        assert host.record("slow.0").restarts == 0


@pytest.mark.slow
@pytest.mark.guarantee("S24")
@pytest.mark.parametrize("paused", ["router", "supervisor"])
def test_a_short_pause_and_a_pause_of_the_supervisor_itself_kill_nobody(paused: str) -> None:
    with Host(*tree_of_four(), stall_timeout_s=STALL_S) as host:
        host.hear(TreeReady)
        for _ in range(3):
            pid = host.record(paused).pid
            os.kill(pid, signal.SIGSTOP)
            threading.Event().wait(3 * STALL_S if paused == "supervisor" else STALL_S / 2)
            os.kill(pid, signal.SIGCONT)
            assert host.statistics().replicas == ()
            threading.Event().wait(STALL_S / 2)

        assert [record.restarts for record in host.listener.trees[-1]] == [0] * 5


@pytest.mark.slow
@pytest.mark.guarantee("S25")
def test_a_stopped_warden_is_replaced_and_its_children_live_on() -> None:
    with Host(*tree_of_four(), stall_timeout_s=STALL_S) as host:
        host.hear(TreeReady)
        before = host.pids()
        warden = warden_of(host)
        warden.suspend()
        eventually(lambda: [w for w in wardens(host) if w != warden] != [], "there is a new warden")
        assert host.pids() == before

        os.kill(before["router"], signal.SIGKILL)

        assert host.record("router", incarnation=2).last_exit == KILLED


@pytest.mark.slow
def test_statistics_are_those_of_the_replicas_that_answer_in_time() -> None:
    replicas = [worker(f"replica.{i}", kind="replica", mute=i == 1) for i in range(3)]
    with Host(*replicas) as host:
        host.hear(TreeReady)

        assert [row.replica for row in host.statistics().replicas] == [0, 2]
    with Host(worker("router")) as host:
        host.hear(TreeReady)
        assert host.statistics().replicas == ()


def test_a_supervisor_started_by_a_thread_outlives_that_thread() -> None:
    """Why the fate of processes hangs on pipes: the kernel's parent-death signal is scoped to the spawning thread."""
    hosts: list[Host] = []
    thread = threading.Thread(target=lambda: hosts.append(Host(*tree_of_four())))
    thread.start()
    thread.join(20)
    with hosts[0] as host:
        host.hear(TreeReady)
        assert [end.how for end in host.shut_down(5.0).children] == ["stopped"] * 4


@pytest.mark.slow
def test_the_supervisor_costs_nothing_while_nothing_happens() -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        tree = [psutil.Process(host.handle.pid), *psutil.Process(host.handle.pid).children(recursive=True)]
        assert len(tree) == 6
        before = [sum(p.cpu_times()[:2]) + 1e-4 * sum(p.num_ctx_switches()) for p in tree]
        threading.Event().wait(0.5)
        after = [sum(p.cpu_times()[:2]) + 1e-4 * sum(p.num_ctx_switches()) for p in tree]

        assert max(b - a for a, b in zip(before, after, strict=True)) < 0.02


@pytest.mark.guarantee("S17")
@pytest.mark.parametrize("preload", ["light", "threaded"])  # forked, and executed afresh
def test_each_life_of_a_child_that_keeps_weights_gets_the_memory_file_that_is_its_alone(
    preload: str, tmp_path: Path
) -> None:
    pages = tmp_path / "diary"
    chips = [worker(name, preload=preload, keeps_weights=True, diary=str(pages)) for name in ("chip.0.0", "chip.1.0")]
    with Host(worker("router", diary=str(pages)), *chips) as host:
        host.hear(TreeReady)
        for life in (1, 2):
            os.kill(host.record("chip.0.0", incarnation=life).pid, signal.SIGKILL)
        host.record("chip.0.0", incarnation=3)

        noted = [line.split(" ", 4) for line in diary(pages) if " weights " in line]
        of_one = [(life, number, words) for name, life, _, number, words in noted if name == "chip.0.0"]
        [(number, words)] = [(number, words) for name, _, _, number, words in noted if name == "chip.1.0"]
        assert [(life, words) for life, _, words in of_one] == [
            ("1", "left by "), ("2", "left by chip.0.0 1, "), ("3", "left by chip.0.0 1, chip.0.0 2, "),
        ]  # fmt: skip
        assert words == "left by "
        assert len({number for _, number, _ in of_one}) == 1
        assert number != of_one[0][1]
        assert len(weight_files(host.handle.pid)) == 2
        holders = psutil.Process(host.handle.pid).children(recursive=True)
        assert sorted(len(weight_files(p.pid)) for p in holders) == [0] * (len(holders) - 2) + [1, 1]
        freed = host.shut_down(5.0).freed
        assert {"packed weights of chip.0.0", "packed weights of chip.1.0"} <= set(freed)


@pytest.mark.guarantee("S18")
def test_a_memory_file_goes_with_a_child_that_is_given_up_and_with_the_tree_however_it_ends(tmp_path: Path) -> None:
    children = (
        worker("replica.0", group="replica.0"),
        worker("chip.0.0", "replica.0", group="replica.0", keeps_weights=True, die_in=(2,)),
        worker("chip.1.0", keeps_weights=True),
    )
    with Host(*children, max_restarts=1) as host:
        host.hear(TreeReady)
        os.kill(host.record("chip.0.0").pid, signal.SIGKILL)
        host.hear(GroupLost)
        host.record("chip.0.0", "gone", 2)
        eventually(lambda: len(weight_files(host.handle.pid)) == 1, "the file of the chip that is given up is closed")
        descendants = psutil.Process(host.handle.pid).children(recursive=True)
        signal_group(host.handle.process, signal.SIGKILL)

        assert host.handle.reap(10) == ExitStatus(signum=signal.SIGKILL)
        eventually(lambda: not any(is_running(p.pid) for p in descendants), "everyone who had it open is dead")


@pytest.mark.guarantee("S12")
def test_a_killed_supervisor_takes_everything_along() -> None:
    with Host(*tree_of_four(holds_stop=True)) as host:
        host.hear(TreeReady)
        descendants = psutil.Process(host.handle.pid).children(recursive=True)
        assert len(descendants) == 5

        signal_group(host.handle.process, signal.SIGKILL)

        assert host.handle.reap(10) == ExitStatus(signum=signal.SIGKILL)
        eventually(lambda: not any(is_running(p.pid) for p in descendants), "every descendant is dead")
        eventually(lambda: not host.directory.path.exists(), "the run directory is gone")
        host.listener.ctx.call_soon_threadsafe(lambda: None)


def test_killing_the_handle_ends_the_tree_in_any_state() -> None:
    with Host(*tree_of_four()) as host:
        os.kill(host.handle.pid, signal.SIGSTOP)
        host.handle.kill()
        host.handle.kill()

        assert host.handle.reap(10) == ExitStatus(signum=signal.SIGKILL)


def killed_host(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path, int, list[psutil.Process]]]:
    """A host application in a process of its own: it, its run directory, its supervisor's pid, its descendants."""
    command = [sys.executable, "-P", str(PROGRAMS / "host.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            directory = process.stdout.readline().strip()
            yield process, Path(directory), psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.guarantee("S13")
@pytest.mark.parametrize("state", ["idle", "gil", "early", "stopped supervisor", "stopped warden", "stopped children"])
def test_a_killed_host_application_leaves_no_process_socket_or_directory(state: str) -> None:
    for host, directory, descendants in killed_host(state):
        assert directory.exists()
        assert len(descendants) == 10 or state == "early"
        stopped = {"stopped supervisor": "supervisor", "stopped warden": "warden", "stopped children": "chip"}
        for process in descendants:
            if process.name().startswith(stopped.get(state, "nobody")):
                process.suspend()

        host.kill()
        host.wait(10)

        eventually(lambda: not any(is_running(p.pid) for p in descendants), "every descendant is dead")  # noqa: B023
        eventually(lambda: not directory.exists(), "the run directory is gone")  # noqa: B023


@pytest.mark.slow
def test_a_leaked_copy_of_the_tether_does_not_keep_the_tree_alive() -> None:
    """The second line: the supervisor also watches the host application itself."""
    for host, directory, descendants in killed_host("leak"):
        assert len(descendants) == 11
        (leaker,) = [p for p in descendants if p.name() == "sleep"]
        host.kill()
        host.wait(10)

        eventually(lambda: not any(is_running(p.pid) for p in descendants if p != leaker), "the tree is dead")  # noqa: B023
        eventually(lambda: not directory.exists(), "the run directory is gone")  # noqa: B023
        leaker.kill()


@pytest.mark.slow
@pytest.mark.guarantee("S14")
def test_random_kills_leave_no_zombie_no_twin_and_a_tree_that_comes_back() -> None:
    seed = 7
    chance = random.Random(seed)
    with Host(*tree_of_four(), max_restarts=1000) as host:
        host.hear(TreeReady)
        for _ in range(16):
            victims = [pid for name, pid in host.pids().items() if pid and name != "supervisor"]
            if chance.random() < 0.1:
                victims += [warden.pid for warden in wardens(host)]
            with contextlib.suppress(ProcessLookupError, IndexError):  # it, or all of them, are dead already
                os.kill(chance.choice(victims), signal.SIGKILL)
            threading.Event().wait(chance.random() * 0.03)

        def is_back() -> bool:
            """All is ready, and true: what was killed last may not have been told yet."""
            if any(record.state != "ready" for record in host.listener.trees[-1]):
                return False
            tree = psutil.Process(host.handle.pid).children(recursive=True)
            with contextlib.suppress(psutil.NoSuchProcess):
                alive = sorted(p.pid for p in tree if not p.name().startswith("warden"))
                told = sorted(pid for name, pid in host.pids().items() if name != "supervisor")
                return alive == told and not any(p.status() == psutil.STATUS_ZOMBIE for p in tree)
            return False

        eventually(is_back, f"every child is ready again, once, and nothing else is there (seed {seed})", 20)
