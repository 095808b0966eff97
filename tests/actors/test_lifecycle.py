"""The supervisor's decisions, tried without processes: one event after another, and in random order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chipbus.actors.boot import ONE_FOR_ALL, ONE_FOR_ONE, STRATEGIES, Boot, ChildSpec
from chipbus.actors.lifecycle import (
    NEVER_STARTED,
    Action,
    AnnounceFailure,
    AnnounceLost,
    AnnounceReady,
    AnnounceStopped,
    AskStop,
    Begin,
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
    Tree,
    ends,
    left_alive,
    next_wake_s,
    plant,
    records,
    step,
)
from chipbus.errors import ConfigError

CHILDREN = (
    ChildSpec(name="tokenizer.0", kind="tokenizer", connect=("host", "router"), start_timeout_s=10),
    ChildSpec(name="router", kind="router", start_timeout_s=10),
    ChildSpec(name="replica.0", kind="replica", group="replica.0", connect=("router",), start_timeout_s=10),
    ChildSpec(name="chip.0.0", kind="chip", group="replica.0", connect=("replica.0",), start_timeout_s=10),
    ChildSpec(name="chip.0.1", kind="chip", group="replica.0", connect=("replica.0",), start_timeout_s=10),
)
NAMES = tuple(spec.name for spec in CHILDREN)
GROUP = NAMES[2:]
KILLED = "signal 9 (SIGKILL)"


def dependants(strategy: str, position: int) -> tuple[str, ...]:
    """Of the group's members, those that may not run while the one at ``position`` does not."""
    if strategy == ONE_FOR_ONE:
        return ()
    return GROUP[position + 1 :] if strategy != ONE_FOR_ALL else GROUP[:position] + GROUP[position + 1 :]


def boot(**changes: object) -> Boot:
    return attrs.evolve(Boot(run_dir="/nowhere", host_pid=1, children=CHILDREN, close_timeout_s=10), **changes)  # type: ignore[arg-type]


class Play:
    """A tree, its clock, and everything it asked for."""

    def __init__(self, asked: Boot) -> None:
        self.tree: Tree = plant(asked)
        self.now_s = 100.0
        self.actions: list[Action] = []

    def feed(self, event: Event, at_s: float | None = None) -> list[Action]:
        """Take one step; returns its actions."""
        self.now_s = self.now_s if at_s is None else at_s
        self.tree, actions = step(self.tree, event, self.now_s)
        self.actions += actions
        return list(actions)

    def die(self, name: str, exit_text: str = KILLED, **words: str) -> list[Action]:
        return self.feed(ChildDied(name, self.tree.children[name].incarnation, exit_text, **words))

    def come_up(self, name: str) -> list[Action]:
        incarnation = self.tree.children[name].incarnation
        return self.feed(ChildLinked(name, incarnation)) + self.feed(ChildReady(name, incarnation))

    def status(self, name: str) -> Status:
        return self.tree.children[name].status


def running(**changes: object) -> Play:
    play = Play(boot(**changes))
    play.feed(Begin())
    for name in NAMES:
        play.come_up(name)
    assert play.tree.phase is Phase.RUNNING
    return play


def test_every_child_is_started_at_once_and_ready_is_announced_when_the_last_one_is() -> None:
    play = Play(boot())

    assert play.feed(Begin()) == [Spawn(name, 1) for name in NAMES]
    assert [play.come_up(name) for name in NAMES[:-1]] == [[]] * 4
    play.now_s += 2.5
    assert play.come_up(NAMES[-1]) == [AnnounceReady(2.5)]


def test_a_dead_child_is_started_again_at_once_under_the_next_incarnation() -> None:
    play = running()

    assert play.die("router") == [Spawn("router", 2)]
    assert play.tree.children["router"].restarts == 1
    assert play.tree.children["router"].last_exit == KILLED


def test_a_dead_replica_core_takes_its_chips_along_and_nobody_else() -> None:
    play = running()

    actions = play.die("replica.0")

    assert [type(a) for a in actions] == [AskStop, AskStop]
    assert play.die("chip.0.1", "exit code 0") == []
    assert play.die("chip.0.0", "exit code 0") == [Spawn("replica.0", 2), Spawn("chip.0.0", 2), Spawn("chip.0.1", 2)]
    assert play.status("router") is play.status("tokenizer.0") is Status.READY


def test_a_dead_chip_leaves_its_replica_core_alone() -> None:
    play = running()

    assert play.die("chip.0.1") == [Spawn("chip.0.1", 2)]
    assert play.status("replica.0") is play.status("chip.0.0") is Status.READY


def test_in_one_for_all_every_member_restarts_with_any_and_all_start_together() -> None:
    play = running(strategies={"replica.0": ONE_FOR_ALL})

    assert [type(a) for a in play.die("chip.0.0")] == [AskStop, AskStop]
    assert play.die("chip.0.1", "exit code 0") == []
    assert play.die("replica.0", "exit code 0") == [Spawn("replica.0", 2), Spawn("chip.0.0", 2), Spawn("chip.0.1", 2)]

    play.die("chip.0.0")  # of no use: this one waits, and all with it
    play.die("chip.0.1", "exit code 0")
    play.die("replica.0", "exit code 0")
    assert [play.status(name) for name in NAMES[2:]] == [Status.BACKOFF] * 3
    assert play.feed(Tick(), at_s=play.now_s + 0.05) == [Spawn(name, 3) for name in NAMES[2:]]
    assert play.status("router") is Status.READY


def test_in_one_for_one_nobody_restarts_with_another_but_the_group_is_given_up_as_one() -> None:
    play = running(strategies={"replica.0": ONE_FOR_ONE}, max_restarts=1)

    assert play.die("replica.0") == [Spawn("replica.0", 2)]
    assert [type(a) for a in play.die("replica.0")] == [AnnounceLost, AskStop, AskStop]


@pytest.mark.guarantee("S30")
def test_the_waits_before_restarts_grow_until_a_life_was_of_use() -> None:
    def waits(seed: int) -> list[float]:
        play = running(max_restarts=99, window_s=1e6, seed=seed)
        found = []
        for _ in range(10):
            play.die("router")
            died_s, wake_s = play.now_s, next_wake_s(play.tree)
            found.append(0.0 if play.status("router") is Status.STARTING else (wake_s or 0) - died_s)
            play.feed(Tick(), at_s=died_s + found[-1])
            play.come_up("router")
            play.now_s += 0.9
        play.now_s += 0.1
        assert play.die("router") == [Spawn("router", 12)]
        assert play.status("router") is Status.STARTING
        play.die("router")
        assert play.status("router") is Status.BACKOFF
        return found

    longest = [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert all(0.8 * most <= wait <= most for wait, most in zip(waits(0), longest, strict=True))
    assert waits(0) == waits(0)
    assert waits(0) != waits(1)


def test_one_death_too_many_gives_up_the_group_and_only_the_group() -> None:
    play = running(max_restarts=2)
    for _ in range(2):
        play.die("chip.0.0")
        play.die("chip.0.1")
        play.feed(Tick(), at_s=play.now_s + 1)
        play.come_up("chip.0.0")
        play.come_up("chip.0.1")

    actions = play.die("chip.0.0")

    assert isinstance(actions[0], AnnounceLost)
    assert "died 3 times within 30 s, 2 are allowed; the last time with signal 9" in actions[0].text
    assert {a.name for a in actions[1:] if isinstance(a, AskStop)} == {"replica.0", "chip.0.1"}
    play.die("replica.0", "exit code 0")
    play.die("chip.0.1", "exit code 0")
    assert [play.status(n) for n in NAMES] == [Status.READY, Status.READY, Status.GONE, Status.GONE, Status.GONE]
    play.feed(Tick(), at_s=play.now_s + 100)
    assert not [a for a in play.actions if isinstance(a, Spawn) and a.incarnation > 3]


def test_a_death_before_everything_is_ready_fails_the_start_with_the_childs_own_words() -> None:
    play = Play(boot())
    play.feed(Begin())

    actions = play.die("chip.0.0", "exit code 1", error="CheckpointError", text="no config.json in /models/x")

    assert actions[0] == AnnounceFailure("chip.0.0", "CheckpointError", "no config.json in /models/x")
    assert {a.name for a in actions[1:]} == {n for n in NAMES if n != "chip.0.0"}
    assert play.tree.phase is Phase.STOPPING


def test_a_child_that_says_it_cannot_start_fails_the_start_while_it_lives() -> None:
    play = Play(boot())
    play.feed(Begin())
    play.feed(ChildLinked("replica.0", 1))

    actions = play.feed(ChildFailed("replica.0", 1, "ConfigError", "more pages than memory"))

    assert actions[0] == AnnounceFailure("replica.0", "ConfigError", "more pages than memory")
    assert AskStop("replica.0", 1, play.now_s + 10) in actions


def test_a_missed_start_deadline_fails_the_first_start_and_costs_a_restart_later() -> None:
    play = Play(boot())
    play.feed(Begin())
    assert next_wake_s(play.tree) == play.now_s + 10
    late = play.feed(Tick(), at_s=play.now_s + 10)
    assert late[0] == AnnounceFailure(
        "tokenizer.0", "StartFailed", "tokenizer.0 was not ready within 10 s: its warden has not forked it"
    )

    play = running()
    play.die("router")
    assert play.feed(Tick(), at_s=play.now_s + 10) == [Kill("router", 2)]
    play.die("router")
    assert play.tree.children["router"].last_exit == "not ready within 10 s: its warden has not forked it"
    assert play.tree.children["router"].exit == KILLED
    assert len(play.tree.children["router"].deaths_s) == 2


@pytest.mark.guarantee("S31")
@pytest.mark.parametrize(
    ("reached", "sentence"),
    [
        ((), "its warden has not forked it"),
        ((ChildForked,), "its node has not said hello"),
        ((ChildForked, ChildLinked), "its actor has not started"),
        ((ChildForked, ChildLinked, ChildStarted), "its actor has not said that it is ready"),
    ],
)
def test_a_start_is_timed_by_phase_and_a_missed_deadline_names_the_one_it_hung_in(
    reached: tuple[type[Event], ...], sentence: str
) -> None:
    play = running()
    play.die("router")
    asked_s = play.now_s
    for count, event in enumerate(reached, start=1):
        play.feed(event("router", 2), at_s=asked_s + count)  # type: ignore[call-arg]
        play.feed(event("router", 2), at_s=asked_s + count + 0.5)  # type: ignore[call-arg]
    shown = {record.name: record for record in records(play.tree, {})}
    assert shown["router"].phases == ()
    play.feed(Tick(), at_s=asked_s + 10)

    assert play.tree.children["router"].reason == f"not ready within 10 s: {sentence}"
    shown = {record.name: record for record in records(play.tree, {})}
    names = ("forked", "linked", "started")[: len(reached)]
    assert shown["router"].phases == tuple((name, 1e3 * count) for count, name in enumerate(names, start=1))


def test_a_restarted_child_that_is_stopped_before_its_hello_is_not_waited_for_until_the_end() -> None:
    play = running()
    slow = attrs.evolve(play.tree.children["router"].spec, start_timeout_s=300.0)
    play.tree = attrs.evolve(
        play.tree, children={**play.tree.children, "router": attrs.evolve(play.tree.children["router"], spec=slow)}
    )
    play.die("router")
    asked_s = play.now_s
    play.feed(ChildForked("router", 2), at_s=asked_s + 1)

    assert next_wake_s(play.tree) == asked_s + 16
    assert play.feed(Tick(), at_s=asked_s + 16) == [Kill("router", 2)]
    assert play.tree.children["router"].reason == "not ready within 16 s: its node has not said hello"


def test_who_is_ready_has_started() -> None:
    play = running()
    play.die("router")
    play.feed(ChildForked("router", 2))
    play.now_s += 0.0123
    play.come_up("router")

    shown = {record.name: record for record in records(play.tree, {})}
    assert shown["router"].phases == (("forked", 0.0), ("linked", 12.3), ("started", 12.3), ("ready", 12.3))


def test_a_stalled_child_is_killed_after_its_stack_and_counts_as_a_death_of_its_own() -> None:
    play = running()

    assert play.feed(ChildStalled("router", 1, "no answer to heartbeats for 10 s")) == [Kill("router", 1, True)]
    assert play.feed(ChildStalled("router", 1, "no answer to heartbeats for 10 s")) == []
    assert play.die("router") == [Spawn("router", 2)]
    assert play.tree.children["router"].last_exit == "no answer to heartbeats for 10 s"
    assert len(play.tree.children["router"].deaths_s) == 1


def test_a_child_that_stalls_before_everything_is_ready_fails_the_start() -> None:
    play = Play(boot())
    play.feed(Begin())
    play.feed(ChildLinked("router", 1))

    actions = play.feed(ChildStalled("router", 1, "no answer to heartbeats for 10 s"))

    assert actions[0] == AnnounceFailure("router", "StartFailed", "router: no answer to heartbeats for 10 s")


def test_a_stop_escalates_under_one_shared_deadline_and_ends() -> None:
    play = running()
    began_s = play.now_s

    polite = play.feed(StopAll(10.0))
    assert polite == [AskStop(name, 1, began_s + 10) for name in NAMES]
    play.die("router", "exit code 0")
    assert play.feed(Tick(), at_s=began_s + 5.9) == []
    assert play.feed(Tick(), at_s=began_s + 6) == [Terminate(name, 1) for name in NAMES if name != "router"]
    play.die("tokenizer.0", "signal 15 (SIGTERM)")
    assert play.feed(Tick(), at_s=began_s + 8) == [Kill(name, 1) for name in NAMES[2:]]
    play.die("replica.0")
    play.die("chip.0.0")
    assert play.feed(Tick(), at_s=began_s + 10) == [AnnounceStopped()]

    assert left_alive(play.tree) == ["chip.0.1"]
    assert {end.name: (end.how, end.exit, end.seconds) for end in ends(play.tree)} == {
        "tokenizer.0": ("terminated", "signal 15 (SIGTERM)", 6.0),
        "router": ("stopped", "exit code 0", 0.0),
        "replica.0": ("killed", KILLED, 8.0),
        "chip.0.0": ("killed", KILLED, 8.0),
        "chip.0.1": ("killed", "alive after SIGKILL", 10.0),
    }


def test_a_second_stop_can_only_shorten_the_first() -> None:
    play = running()
    play.feed(StopAll(10.0))
    play.feed(StopAll(60.0))
    assert play.tree.stop is not None
    assert play.tree.stop.deadline_s == play.now_s + 10

    play.now_s += 1
    actions = play.feed(StopAll(0.0))

    assert [a for a in actions if isinstance(a, Kill)] == [Kill(name, 1) for name in NAMES]


def test_a_stop_is_sticky_also_for_children_about_to_be_started_again() -> None:
    play = running()
    play.die("replica.0")
    play.die("router")
    play.die("router")
    assert [play.status(n) for n in NAMES[1:4]] == [Status.BACKOFF, Status.BACKOFF, Status.STOPPING]

    play.feed(StopAll(10.0))
    for name in ("chip.0.0", "chip.0.1", "tokenizer.0"):
        play.die(name, "exit code 0")

    assert play.actions[-1] == AnnounceStopped()
    assert all(play.status(name) is Status.GONE for name in NAMES)


def test_a_child_that_is_not_on_the_bus_yet_is_terminated_at_once() -> None:
    play = Play(boot())
    play.feed(Begin())

    assert play.feed(StopAll(10.0)) == [Terminate(name, 1) for name in NAMES]


def test_the_report_names_children_that_were_dead_or_never_started() -> None:
    play = running()
    play.die("router")
    play.die("router")
    assert play.status("router") is Status.BACKOFF
    play.feed(StopAll(10.0))
    for name in NAMES:
        play.die(name, "exit code 0")
    by_name = {end.name: end for end in ends(play.tree)}
    assert (by_name["router"].how, by_name["router"].exit, by_name["router"].incarnation) == ("died before", KILLED, 2)

    play = Play(boot())
    assert play.feed(StopAll(1.0)) == [AnnounceStopped()]
    assert {(end.how, end.exit) for end in ends(play.tree)} == {("died before", NEVER_STARTED)}


def test_an_unkillable_member_takes_its_group_down_instead_of_getting_a_twin() -> None:
    play = running()
    play.die("replica.0")
    for at_s in (1.2, 1.6, 2.0):
        play.feed(Tick(), at_s=100 + at_s)

    lost = [a for a in play.actions if isinstance(a, AnnounceLost)]

    assert [a.text for a in lost] == ["chip.0.0 is still alive after SIGKILL"]
    play.die("chip.0.0")
    play.die("chip.0.1")
    assert not [a for a in play.actions if isinstance(a, Spawn) and a.incarnation > 1]


def test_news_of_an_earlier_incarnation_changes_nothing() -> None:
    play = running()
    play.die("router")
    before = play.tree

    for event in (ChildDied("router", 1, KILLED), ChildReady("router", 1), ChildFailed("router", 1, "X", "y")):
        assert play.feed(event) == []
    assert play.tree == before


def test_the_tree_is_shown_with_logical_parents() -> None:
    play = running()
    play.die("replica.0")
    shown = {record.name: record for record in records(play.tree, {"router": 17})}

    assert (shown["router"].pid, shown["router"].parent, shown["router"].state) == (17, "supervisor", "ready")
    assert (shown["replica.0"].parent, shown["replica.0"].state) == ("supervisor", "backoff")
    assert (shown["chip.0.1"].parent, shown["chip.0.1"].state) == ("replica.0", "stopping")


def test_a_boot_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    asked = boot(run_dir=str(tmp_path), record="/records")

    assert Boot.read(asked.write()) == asked


@pytest.mark.parametrize(
    ("children", "sentence"),
    [
        ((), "names at least one child"),
        ((ChildSpec(name="a", kind="x"), ChildSpec(name="a", kind="x")), "'a' is taken"),
        ((ChildSpec(name="host", kind="x"),), "'host' is taken"),
        ((ChildSpec(name="a", kind="x", connect=("b",)),), "a connects to 'b'"),
    ],
)
def test_a_tree_that_cannot_be_is_refused_with_the_rule(children: tuple[ChildSpec, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        boot(children=children).check()


@pytest.mark.parametrize(
    ("strategies", "sentence"),
    [
        ({"replica.1": ONE_FOR_ALL}, "group 'replica.1', which has no members"),
        ({"": ONE_FOR_ALL}, "group '', which has no members"),
        ({"replica.0": "all"}, "group replica.0 has strategy 'all'; known: one_for_one, rest_for_one, one_for_all"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused_with_the_rule(strategies: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        boot(strategies=strategies).check()


def test_a_damaged_boot_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "boot.json"
    path.write_text('{"run_dir": 5}')

    with pytest.raises(ConfigError, match=r"boot\.json is no boot file"):
        Boot.read(path)


class AnyOrder(RuleBasedStateMachine):
    """Children die, get ready, fail and hang in any order while time passes; what may never happen never does."""

    MAX_RESTARTS = 1

    def __init__(self) -> None:
        super().__init__()
        self.play = Play(boot())
        self.strategy = ""
        self.alive: dict[str, int] = {}  # the world's processes
        self.own_deaths: dict[str, list[float]] = {name: [] for name in NAMES}
        self.lost: set[str] = set()
        self.stopped_at_s: float | None = None
        self.announced: Counter[str] = Counter()

    @initialize(is_up=st.booleans(), strategy=st.sampled_from(STRATEGIES))
    def begin(self, is_up: bool, strategy: str) -> None:
        limits = {"max_restarts": self.MAX_RESTARTS, "window_s": 30, "close_timeout_s": 3}
        self.strategy = strategy
        self.play = Play(boot(strategies={"replica.0": strategy}, **limits))
        self.do(Begin())
        for name, incarnation in list(self.alive.items()) if is_up else ():
            self.do(ChildLinked(name, incarnation))
            self.do(ChildReady(name, incarnation))

    def do(self, event: Event) -> None:
        was_stopping = self.play.tree.phase >= Phase.STOPPING
        for action in self.play.feed(event):
            self.announced[type(action).__name__] += 1
            match action:
                case Spawn(name, incarnation):
                    assert name not in self.alive, "two incarnations of one child would live at once"
                    assert not was_stopping, "a stop is sticky"
                    assert name not in self.lost, "a group that was given up stays down"
                    self.alive[name] = incarnation
                case AskStop(name, incarnation) | Terminate(name, incarnation) | Kill(name, incarnation):
                    assert self.alive.get(name) == incarnation, "a signal must never reach another life"
                case AnnounceLost(name):
                    group = self.play.tree.children[name].spec.group
                    self.lost |= {spec.name for spec in CHILDREN if spec.group == group} if group else {name}
        if self.stopped_at_s is None and self.play.tree.phase >= Phase.STOPPING:
            self.stopped_at_s = self.play.now_s

    def some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.alive)), label="child")

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def become_ready(self, data: st.DataObject) -> None:
        name = self.some(data)
        self.do(ChildLinked(name, self.alive[name]))
        self.do(ChildReady(name, self.alive[name]))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), exit_text=st.sampled_from([KILLED, "exit code 0", "exit code 1"]))
    def die(self, data: st.DataObject, exit_text: str) -> None:
        name = self.some(data)
        child = self.play.tree.children[name]
        if child.status < Status.STOPPING or child.counts_as_death:
            self.own_deaths[name].append(self.play.now_s)
        self.do(ChildDied(name, self.alive.pop(name), exit_text))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def say_failure(self, data: st.DataObject) -> None:
        name = self.some(data)
        self.do(ChildFailed(name, self.alive[name], "ConfigError", "no"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def condemn(self, data: st.DataObject) -> None:
        name = self.some(data)
        self.do(ChildCondemned(name, self.alive[name], "its kernel hangs"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        name = self.some(data)
        self.do(ChildStalled(name, self.alive[name], "no answer"))

    @rule(name=st.sampled_from(NAMES), age=st.integers(1, 3))
    def late_news(self, name: str, age: int) -> None:
        incarnation = self.play.tree.children[name].incarnation - age
        before = self.play.tree
        self.do(ChildDied(name, incarnation, KILLED))
        self.do(ChildReady(name, incarnation))
        self.do(ChildCondemned(name, incarnation, "late"))
        self.do(ChildStalled(name, incarnation, "late"))
        assert {n: c.incarnation for n, c in before.children.items()} == {
            n: c.incarnation for n, c in self.play.tree.children.items()
        }

    @rule(seconds=st.floats(0.0, 40.0))
    def pass_time(self, seconds: float) -> None:
        until_s = self.play.now_s + seconds
        for _ in range(200):
            wake_s = next_wake_s(self.play.tree)
            if wake_s is None or wake_s > until_s:
                break
            self.play.now_s = max(self.play.now_s, wake_s)
            self.do(Tick())
        else:
            raise AssertionError("the timer spins")
        self.play.now_s = until_s

    @rule(budget_s=st.floats(0.0, 20.0))
    def stop(self, budget_s: float) -> None:
        self.do(StopAll(budget_s))

    @invariant()
    def the_next_wake_up_lies_ahead(self) -> None:
        wake_s = next_wake_s(self.play.tree)
        assert wake_s is None or wake_s >= self.play.now_s

    @invariant()
    def intensity_is_respected(self) -> None:
        for name, child in self.play.tree.children.items():
            recent = [at_s for at_s in self.own_deaths[name] if at_s > self.play.now_s - 30]
            if len(recent) > self.MAX_RESTARTS:
                assert name in self.lost or self.stopped_at_s is not None
            assert child.incarnation <= 1 + child.restarts

    @invariant()
    def nobody_starts_beside_what_it_must_be_restarted_with(self) -> None:
        """A member that was started again is never older than one it depends on, unless that one is going, too."""
        if self.stopped_at_s is not None or self.lost & set(GROUP):
            return
        for position, name in enumerate(GROUP):
            if self.play.status(name) not in (Status.BACKOFF, Status.STOPPING):
                continue
            for other in dependants(self.strategy, position):
                child = self.play.tree.children[other]
                is_own_fault = self.play.tree.children[name].counts_as_death  # it is being killed, not dead yet
                assert is_own_fault or child.status not in (Status.STARTING, Status.READY), (name, other)

    @invariant()
    def announcements_come_once(self) -> None:
        assert self.announced["AnnounceStopped"] <= 1
        assert self.announced["AnnounceReady"] + self.announced["AnnounceFailure"] <= 1

    def teardown(self) -> None:
        """Whatever happened, a stop ends in GONE for every child, within its deadline, even if nothing dies."""
        self.do(StopAll(5.0))
        assert self.play.tree.stop is not None
        self.pass_time(5.0)
        assert self.play.tree.phase is Phase.STOPPED
        assert all(child.status is Status.GONE for child in self.play.tree.children.values())
        assert self.announced["AnnounceStopped"] == 1
        assert {end.name for end in ends(self.play.tree)} == set(NAMES)
        assert set(left_alive(self.play.tree)) == set(self.alive)
        for name, incarnation in sorted(self.alive.items()):
            self.do(ChildDied(name, incarnation, KILLED))
        assert next_wake_s(self.play.tree) is None


@pytest.mark.slow
@pytest.mark.guarantee("S1")
def test_no_order_of_events_makes_two_lives_of_a_child_undoes_a_stop_or_leaves_one_without_an_end() -> None:
    chosen = settings(max_examples=200, stateful_step_count=40, deadline=None, print_blob=True)

    run_state_machine_as_test(AnyOrder, settings=chosen)
