"""The real supervisor over actors of the one-process system: whole trees on a virtual clock, in any order of events."""

from __future__ import annotations

from signal import SIGTERM
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_engine import LocalEngine, expected_tokens
from serving_actors import pass_time
from supervised import tree_of_four, worker

from chipbus.actors.boot import HOST, SUPERVISOR, Boot, ChildSpec
from chipbus.actors.local_nursery import LocalNursery
from chipbus.actors.messages.tree import (
    ChildRecord,
    CloseReport,
    Drain,
    Drained,
    GroupLost,
    Shutdown,
    StartFailure,
    TreeChanged,
    TreeReady,
)
from chipbus.actors.router import RouterActor
from chipbus.actors.sampling import SamplingParams
from chipbus.actors.supervisor import SupervisorActor
from chipbus.bus import Actor, LocalSystem, PeerDown, PeerUp, Ready, handles
from chipbus.errors import CheckpointError, ConfigError

KILLED = "signal 9 (SIGKILL)"
SEEDS = st.integers(0, 2**32)
PROMPT = [20, 30, 40, 50, 60, 70]
VOCAB = 1024  # of the demo model

Note = tuple[str, int, str, str, int]  # who, which life of it, "up" or "down", of whom, which life


class Worker(Actor):
    """Ready at once, and writes down what it hears of its peers; misbehaves as its configuration asks."""

    def __init__(self, config: dict[str, Any], diary: list[Note]) -> None:
        self.config = config
        self.diary = diary

    def on_start(self) -> None:
        if "refuse" in self.config:
            raise CheckpointError(self.config["refuse"])
        if self.ctx.incarnation in self.config.get("die_in", ()):
            raise ZeroDivisionError("as told")
        self.ctx.tell_ready(SUPERVISOR, Ready(0.0))

    def on_stop(self) -> None:
        if self.config.get("holds_stop"):
            self.ctx.hold_stop()

    def on_peer_up(self, name: str) -> None:
        self.note("up", name, self.ctx.peers()[name])

    def on_peer_down(self, name: str, reason: str) -> None:
        self.note(f"down {reason}", name, 0)

    def note(self, what: str, name: str, life: int) -> None:
        self.diary.append((self.ctx.name, self.ctx.incarnation, what, name, life))


class Listener(Worker):
    """The host: keeps everything the supervisor says."""

    def __init__(self, diary: list[Note]) -> None:
        super().__init__({}, diary)
        self.tree: dict[str, ChildRecord] = {}
        self.heard: list[Any] = []

    def on_start(self) -> None:
        pass

    @handles(TreeChanged)
    def _changed(self, message: TreeChanged, _: object) -> None:
        self.tree = {record.name: record for record in message.children}

    @handles(TreeReady)
    @handles(StartFailure)
    @handles(GroupLost)
    def _keep(self, message: Any, _: object) -> None:
        self.heard.append(message)


class Tree:
    """One tree of workers below a real supervisor, with its host, in one process."""

    SUPERVISOR: type[SupervisorActor] = SupervisorActor

    def __init__(self, seed: int, *children: ChildSpec, **options: Any) -> None:
        self.system = LocalSystem(seed, directory=False)
        self.diary: list[Note] = []
        self.workers: dict[str, Worker] = {}
        self.host = Listener(self.diary)
        self.nursery = LocalNursery(self.system, self._make)
        boot = Boot(run_dir="", host_pid=0, children=children, seed=seed, **options)
        self.system.spawn(HOST, self.host)
        self.supervisor = self.SUPERVISOR(boot, self.nursery)
        self.system.spawn(SUPERVISOR, self.supervisor)

    def _make(self, spec: ChildSpec, _: int) -> Worker:
        self.workers[spec.name] = Worker(spec.config, self.diary)
        return self.workers[spec.name]

    def hear(self, kind: type) -> Any:
        self.system.run_until(lambda: any(isinstance(message, kind) for message in self.host.heard))
        return next(message for message in self.host.heard if isinstance(message, kind))

    def wait_for(self, name: str, state: str = "ready", incarnation: int = 1) -> ChildRecord:
        def is_so() -> bool:
            record = self.host.tree.get(name)
            return record is not None and (record.state, record.incarnation) == (state, incarnation)

        self.system.run_until(is_so)
        return self.host.tree[name]

    def shut_down(self, budget_s: float = 5.0) -> CloseReport:
        answers: list[Any] = []
        self.host.ctx.ask(
            SUPERVISOR, Shutdown(budget_s), timeout_s=budget_s + 1, on_reply=answers.append, on_error=answers.append
        )
        self.system.run_until(lambda: answers != [])
        assert isinstance(answers[0], CloseReport)
        assert all(self.system.incarnation(name) == 0 for name in self.host.tree)
        return answers[0]


@pytest.mark.guarantee("S19")
@settings(max_examples=40)
@given(SEEDS, st.sampled_from(["tokenizer.0", "router", "replica.0", "chip.0.0"]))
def test_in_one_process_too_a_killed_child_comes_back_and_its_neighbours_hear_of_its_death_first(
    seed: int, victim: str
) -> None:
    tree = Tree(seed, *tree_of_four())
    assert tree.hear(TreeReady).seconds < 1
    before = tree.wait_for(victim)
    tree.system.run_until(lambda: len([note for note in tree.diary if note[2] == "up"]) == 5 + 8)
    del tree.diary[:]
    neighbours = {other.name for other in tree_of_four() if victim in other.connect}
    neighbours |= {name for spec in tree_of_four() if spec.name == victim for name in spec.connect}
    if victim == "replica.0":
        neighbours.remove("chip.0.0")  # it is restarted along with its replica core

    tree.nursery.kill(victim)

    again = tree.wait_for(victim, incarnation=2)
    assert (again.restarts, again.last_exit) == (1, KILLED)
    assert again.pid not in (0, before.pid)

    def news(neighbour: str) -> list[tuple[str, int]]:
        return [(what, life) for who, own, what, name, life in tree.diary if (who, own, name) == (neighbour, 1, victim)]

    tree.system.run_until(lambda: all(len(news(neighbour)) == 2 for neighbour in neighbours))
    assert all(news(neighbour) == [(f"down {KILLED}", 0), ("up", 2)] for neighbour in neighbours)


@pytest.mark.guarantee("S20")
@settings(max_examples=40)
@given(SEEDS)
def test_in_one_process_too_the_restart_limit_holds_and_a_stop_is_answered_with_every_end(seed: int) -> None:
    tree = Tree(
        seed,
        worker("router", holds_stop=True),
        worker("replica.0", "router", group="replica.0"),
        worker("chip.0.0", "replica.0", group="replica.0", die_in=(2, 3)),
        worker("stays.0", "router"),
        max_restarts=2,
    )
    tree.hear(TreeReady)
    tree.nursery.kill("chip.0.0")

    lost = tree.hear(GroupLost)
    assert lost.child == "chip.0.0"
    assert lost.text.endswith("2 are allowed; the last time with exit code 1: ZeroDivisionError: as told")
    tree.wait_for("chip.0.0", "gone", 3)
    tree.wait_for("replica.0", "gone")
    pass_time(tree.system, 0.1)  # else everything since the last death happens at one moment of virtual time
    report = tree.shut_down()

    assert [(end.name, end.how, end.exit) for end in report.children] == [
        ("router", "terminated", "signal 15 (SIGTERM)"),
        ("replica.0", "died before", "exit code 0"),
        ("chip.0.0", "died before", "exit code 1"),
        ("stays.0", "stopped", "exit code 0"),
    ]
    assert report.left == ()
    assert report.seconds <= 5


class Forgetful(SupervisorActor):
    """Half of what it says about peers, and of what it is told when a child is ready, is lost."""

    def _tell(self, name: str, message: object) -> None:
        if not isinstance(message, PeerUp | PeerDown) or self.ctx.random.random() < 0.5:
            super()._tell(name, message)

    @handles(Ready)
    def _half_ready(self, message: Ready, call: Any) -> None:
        if self.ctx.random.random() < 0.5:
            self._ready(message, call)


class ForgetfulTree(Tree):
    SUPERVISOR = Forgetful


@pytest.mark.guarantee("S29")
@settings(max_examples=40)
@given(SEEDS, st.sampled_from(["tokenizer.0", "router", "replica.0", "chip.0.0"]))
def test_what_is_lost_of_the_directory_and_of_ready_is_made_good_by_a_heartbeat(seed: int, victim: str) -> None:
    tree = ForgetfulTree(seed, *tree_of_four(), stall_timeout_s=4.0)
    assert tree.hear(TreeReady).seconds < 1.1 + 0.1
    before = {name: tree.wait_for(name).incarnation for name in tree.workers}
    tree.nursery.kill(victim)
    tree.wait_for(victim, incarnation=before[victim] + 1)

    def is_whole() -> bool:
        lives = {name: tree.host.tree[name].incarnation for name in tree.workers} | {HOST: 1}
        pairs = [(spec.name, peer) for spec in tree_of_four() for peer in spec.connect]
        seen = {**{name: worker.ctx.peers() for name, worker in tree.workers.items()}, HOST: tree.host.ctx.peers()}
        is_linked = all(seen[a].get(b) == lives[b] and seen[b].get(a) == lives[a] for a, b in pairs)
        return is_linked and all(record.state == "ready" for record in tree.host.tree.values())

    tree.system.run_until(is_whole, limit_s=2.2)  # two beats: one for the link, one for the word that it is ready


@pytest.mark.parametrize("seed", range(5))
def test_a_child_that_cannot_start_fails_the_start_with_its_own_words(seed: int) -> None:
    tree = Tree(seed, worker("router"), worker("chip.0.0", "router", refuse="no config.json in /x"))

    failure = tree.hear(StartFailure)

    assert (failure.child, failure.error, failure.text) == ("chip.0.0", "CheckpointError", "no config.json in /x")
    assert tree.shut_down().left == ()


@pytest.mark.parametrize("seed", range(5))
def test_sigterm_stops_the_whole_tree(seed: int) -> None:
    tree = Tree(seed, *tree_of_four())
    tree.hear(TreeReady)

    tree.nursery.terminate()

    tree.system.run_until(lambda: tree.system.incarnation(SUPERVISOR) == 0)
    assert all(tree.system.incarnation(spec.name) == 0 for spec in tree_of_four())


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_during_the_start_withdraws_what_has_not_begun(seed: int) -> None:
    tree = Tree(seed, *tree_of_four())
    tree.system.run_until(lambda: tree.host.tree != {})

    report = tree.shut_down()

    assert [(end.how, end.exit) for end in report.children] == [("died before", "never started")] * 4


def test_equal_seeds_give_equal_lives() -> None:
    def life(seed: int) -> list[Note]:
        tree = Tree(seed, *tree_of_four())
        tree.hear(TreeReady)
        tree.nursery.kill("router", SIGTERM)
        tree.wait_for("router", incarnation=2)
        tree.shut_down()
        return tree.diary

    assert life(1) == life(1)
    assert life(1) != life(2)


@pytest.mark.guarantee("S21")
@pytest.mark.parametrize("seed", range(6))
def test_an_engines_own_actors_serve_under_the_supervisor_in_one_process_also_when_a_chip_is_killed(seed: int) -> None:
    engine = LocalEngine(seed)
    state = engine.submit(PROMPT, SamplingParams(seed=0, max_tokens=20, ignore_eos=True))
    if seed % 2:
        engine.system.run_until(lambda: state.drain() is not None)
        engine.nursery.kill("chip.0.0")

    engine.system.run_until(lambda: state.is_over)

    assert list(state.whole().outputs[0].token_ids) == expected_tokens(PROMPT, 20)
    report = engine.close()
    assert [(end.name, end.how) for end in report.children] == [
        ("tokenizer.0", "stopped"), ("router", "stopped"), ("replica.0", "stopped"), ("chip.0.0", "stopped"),
    ]  # fmt: skip
    assert report.children[-1].incarnation == 1 + seed % 2
    assert report.left == ()


@pytest.mark.guarantee("S53")
@pytest.mark.parametrize("seed", range(10))
def test_while_one_replica_is_stuck_the_others_go_on_and_none_of_its_requests_waits_for_it_longer(seed: int) -> None:
    engine = LocalEngine(seed, replicas=2)
    params = SamplingParams(seed=0, max_tokens=20, ignore_eos=True)
    states = [engine.submit([20 + n], params) for n in range(4)]
    router = engine.actors["router"]
    assert isinstance(router, RouterActor)
    engine.system.run_until(lambda: all(router.load().values()) and states[3].token_ids(0) != [])
    began_ns = engine.system.clock.now_ns()
    engine.system.freeze("replica.0", 1e8)
    of_the_other = [state for state in states if router._requests[state.request_id].target.replica == 1]

    engine.system.run_until(lambda: all(state.is_over for state in of_the_other))
    assert engine.system.clock.now_ns() - began_ns < 1e9, "before anybody can have noticed that replica 0 is stuck"

    engine.system.run_until(lambda: all(state.is_over for state in states))
    for number, state in enumerate(states):
        assert list(state.whole().outputs[0].token_ids) == expected_tokens([20 + number], 20)
    assert engine.close().left == ()


def drain(engine: LocalEngine, replica: str, timeout_s: float, *, stays_down: bool = False) -> list[object]:
    heard: list[object] = []
    engine.host.drain(Drain(replica=replica, timeout_s=timeout_s, stays_down=stays_down), heard.append)
    return heard


@pytest.mark.guarantee("S54")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("timeout_s", [60.0, 1e-6])
def test_a_drained_replica_ends_or_hands_on_its_requests_and_comes_back(seed: int, timeout_s: float) -> None:
    engine = LocalEngine(seed, replicas=2)
    params = SamplingParams(seed=0, max_tokens=20, ignore_eos=True)
    states = [engine.submit([20 + n], params) for n in range(4)]
    router = engine.actors["router"]
    assert isinstance(router, RouterActor)
    engine.system.run_until(lambda: all(router.load().values()))

    heard = drain(engine, "replica.1", timeout_s)
    engine.system.run_until(lambda: heard != [])
    assert isinstance(heard[0], Drained)
    assert heard[0].is_empty == (timeout_s > 1)
    engine.system.run_until(lambda: all(state.is_over for state in states))
    for number, state in enumerate(states):
        assert list(state.whole().outputs[0].token_ids) == expected_tokens([20 + number], 20)
    engine.system.run_until(engine.is_idle)
    assert {r.name: r.incarnation for r in engine.host.tree if r.kind in ("replica", "chip")} == {
        "replica.0": 1, "chip.0.0": 1, "replica.1": 2, "chip.1.0": 2,
    }  # fmt: skip
    assert engine.close().left == ()


def test_a_replica_can_be_drained_for_good_but_not_the_last_one() -> None:
    engine = LocalEngine(3, replicas=2)
    said = []
    for replica, stays_down in [("replica.7", False), ("replica.0", True), ("replica.0", False), ("replica.1", True)]:
        heard = drain(engine, replica, 5.0, stays_down=stays_down)
        engine.system.run_until(lambda h=heard: h != [])  # type: ignore[misc]
        said.append(str(heard[0]))
    assert said[0] == "'replica.7' is no replica of this engine; its replicas are replica.0, replica.1"
    assert said[1] == "Drained(is_empty=True)"
    assert said[2].removeprefix("replica.0 is ").partition(";")[0] in ("gone", "stopping")
    assert said[3] == "replica.1 is the last replica that serves, so it cannot stay down; drain it without that"
    state = engine.submit([20], SamplingParams(seed=0, max_tokens=5, ignore_eos=True))
    engine.system.run_until(lambda: state.is_over)
    assert state.whole().replica == 1
    assert engine.close().left == ()


@pytest.mark.parametrize("seed", range(3))
def test_a_replica_drained_for_good_stays_down_also_if_it_dies_meanwhile(seed: int) -> None:
    engine = LocalEngine(seed, replicas=2)
    states = [engine.submit([20 + n], SamplingParams(seed=0, max_tokens=30, ignore_eos=True)) for n in range(4)]
    router = engine.actors["router"]
    assert isinstance(router, RouterActor)
    engine.system.run_until(lambda: all(router.load().values()))
    heard = drain(engine, "replica.1", 60.0, stays_down=True)
    engine.system.run_until(lambda: any(record.state == "draining" for record in engine.host.tree))
    engine.nursery.kill("replica.1")

    engine.system.run_until(lambda: heard != [] and all(state.is_over for state in states))
    assert isinstance(heard[0], Drained)
    engine.system.run_until(lambda: [r.state for r in engine.host.tree if r.name == "replica.1"] == ["gone"])
    assert [list(state.whole().outputs[0].token_ids) for state in states] == [
        expected_tokens([20 + number], 30) for number in range(4)
    ]
    assert engine.close().left == ()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_drain_takes_some_seconds(seconds: float) -> None:
    with pytest.raises(ConfigError, match="must be a number of seconds above 0"):
        Drain(replica="replica.0", timeout_s=seconds)
