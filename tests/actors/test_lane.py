"""A lane to one chip: order, credit, what a death and a hang mean. In one process, on the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chipbus.actors.chip import ChipActor
from chipbus.actors.lane import ChipLane, LaneState, Outcome
from chipbus.actors.messages.launching import (
    AllocTensor,
    ChipReport,
    ChipReportRequest,
    Copied,
    CopyFrom,
    CopyTo,
    Done,
    FreeTensor,
    Launch,
    RegisterProgram,
)
from chipbus.actors.messages.tree import Condemn
from chipbus.bus import Actor, Call, LocalSystem, error_of, failure_of, handles
from chipbus.errors import (
    ChipbusError,
    DeviceUnusable,
    KernelError,
    SchedulerTimeout,
    TaskAborted,
    WorkerLost,
)
from chipbus.kernels import Arg, Completion, Dispatch, TensorSpec
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import Limits, ModelPrograms

DEMO = Path(__file__).resolve().parents[2] / "chipbus" / "demo"
LIMITS = Limits(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=16, page_size=4, num_pages=8)
PROGRAMS = ModelPrograms.build(ModelSpec.from_directory(DEMO), LIMITS)
SETUP = [*map(RegisterProgram, PROGRAMS.programs), *map(AllocTensor, PROGRAMS.tensors)]


class Owner(Actor):
    """Uses one chip, and keeps what it hears."""

    def __init__(self, setup: Sequence[object] = SETUP) -> None:
        self.setup = setup
        self.heard: list[Any] = []
        self.lane: ChipLane

    def on_start(self) -> None:
        self.lane = ChipLane(
            self.ctx,
            "chip.0",
            depth=2,
            launch_timeout_s=10.0,
            command_timeout_s=5.0,
            prepare=lambda: self.setup,
            on_ready=lambda: self.heard.append("ready"),
            on_lost=self.heard.append,
            on_refused=lambda error: self.heard.append(("refused", error)),
        )

    def on_peer_up(self, name: str) -> None:
        if name == "chip.0":
            self.lane.peer_up()

    def on_peer_down(self, name: str, reason: str) -> None:
        if name == "chip.0":
            self.lane.peer_down(reason)

    def launch(self, *dispatches: Dispatch, after: Sequence[Sequence[int]] = ()) -> list[Sequence[Outcome]]:
        got: list[Sequence[Outcome]] = []
        self.lane.launch(dispatches, after, got.append)
        return got

    def command(self, message: object) -> list[Any]:
        got: list[Any] = []
        self.lane.command(message, got.append, got.append)
        return got


class Supervisor(Actor):
    """Hears who is condemned."""

    def __init__(self) -> None:
        self.condemned: list[Condemn] = []

    def on_peer_up(self, name: str) -> None:
        del name

    @handles(Condemn)
    def _condemn(self, message: Condemn, _: Call | None) -> None:
        self.condemned.append(message)


class DeafChip(Actor):
    """Takes commands and launches and never answers one; its bus thread says what it is at, if it may."""

    def __init__(self, *, answers_health: bool, running: str = "dispatch 7") -> None:
        self.answers_health = answers_health
        self.running = running
        self.launches: list[Call] = []

    @handles(RegisterProgram)
    def _register(self, _: RegisterProgram, call: Call) -> None:
        call.reply(Done())

    @handles(AllocTensor)
    def _alloc(self, _: AllocTensor, call: Call) -> None:
        call.reply(Done())

    @handles(Launch)
    def _launch(self, _: Launch, call: Call) -> None:
        self.launches.append(call)

    @handles(FreeTensor)
    def _free(self, _: FreeTensor, call: Call) -> None:
        self.launches.append(call)

    @handles(ChipReportRequest)
    def _report(self, _: ChipReportRequest, call: Call) -> None:
        if self.answers_health:
            call.reply(ChipReport(committed_bytes=1, running=self.running, running_s=9.0))


def grow(chip: Actor | None = None, setup: Sequence[object] = SETUP) -> tuple[LocalSystem, Owner, Supervisor]:
    """A system in which the lane is ready, or its chip has refused."""
    system, owner, supervisor = LocalSystem(seed=1), Owner(setup), Supervisor()
    system.spawn("supervisor", supervisor)
    system.spawn("host", owner, connect=("supervisor",))
    system.spawn("chip.0", chip or chip_actor(), connect=("host", "supervisor"))
    system.run_until(lambda: bool(owner.heard), 60)
    return system, owner, supervisor


def chip_actor() -> ChipActor:
    return ChipActor({"device": "null:0", "threads": 1, "inline": True})


def decode(dispatch_id: int, token: int = 3, page: int = 0) -> Dispatch:
    """One decode dispatch of one row at position 0."""
    ints = [np.array(values, np.int32) for values in ([token], [0], [[page]], [0])]
    by_value = iter(Arg.of(array) for array in ints)
    args = tuple(next(by_value) if not p.resident else Arg(resident=_resident(p.name)) for p in PROGRAMS.decode.params)
    return Dispatch(dispatch_id=dispatch_id, step_id=1, program=PROGRAMS.decode.digest, args=args)


def _resident(name: str) -> int:
    order = ("weights", "k_cache", "v_cache", "hidden", "normed", "chosen", "logits")
    return PROGRAMS.tensors[order.index(name)].resident


def test_a_lane_is_ready_after_the_last_command_of_its_preparation() -> None:
    _, owner, _ = grow()

    assert owner.heard == ["ready"]
    assert owner.lane.is_ready
    assert owner.lane.committed_bytes > 0


def test_one_message_runs_many_dispatches_and_gives_one_outcome_for_each() -> None:
    system, owner, _ = grow()

    got = owner.launch(decode(1), decode(2, page=1), decode(3, page=2))
    system.run_until(lambda: bool(got), 60)

    assert [outcome.dispatch_id for outcome in got[0] if isinstance(outcome, Completion)] == [1, 2, 3]


@pytest.mark.guarantee("C1")
def test_a_failed_dispatch_takes_along_only_what_depends_on_it() -> None:
    system, owner, _ = grow()
    wrong = decode(2, token=-1)

    got = owner.launch(decode(1), wrong, decode(3, page=1), decode(4, page=2), after=((), (0,), (1,), (0,)))
    system.run_until(lambda: bool(got), 60)

    first, failed, aborted, untouched = got[0]
    assert isinstance(first, Completion)
    assert isinstance(untouched, Completion)
    assert isinstance(failed, KernelError)
    assert "token id -1" in str(failed)
    assert isinstance(aborted, TaskAborted)
    assert aborted.first_cause == str(failed)
    assert owner.lane.is_ready


def test_no_more_launches_go_out_than_there_is_credit() -> None:
    system, owner, _ = grow()
    credit = []

    first = owner.launch(decode(1))
    credit.append(owner.lane.has_credit)
    owner.launch(decode(2, page=1))
    credit.append(owner.lane.has_credit)
    system.run_until(lambda: bool(first), 60)

    assert credit == [True, False]
    assert owner.lane.has_credit


def test_commands_and_launches_keep_their_order() -> None:
    setup = [AllocTensor(TensorSpec(resident=1, dtype="float32", shape=(2,)))]
    system, owner, _ = grow(setup=setup)
    value = Arg.of(np.array([1.5, 2.5], np.float32))

    owner.command(CopyTo(1, value))
    copied = owner.command(CopyFrom(1))
    freed = owner.command(FreeTensor(1))
    again = owner.command(FreeTensor(1))
    system.run_until(lambda: bool(again), 60)

    assert copied == [Copied(value)]
    assert isinstance(freed[0], Done)
    assert isinstance(again[0], KernelError)
    assert owner.lane.committed_bytes == 0


def test_a_chip_that_refuses_its_preparation_is_of_no_use() -> None:
    nothing = TensorSpec(resident=0, dtype="float32", shape=(2,))
    _, owner, _ = grow(setup=[AllocTensor(nothing), AllocTensor(nothing)])

    [(what, error)] = owner.heard
    assert what == "refused"
    assert "ids are integers above 0" in str(error)
    assert owner.lane.state is LaneState.CONDEMNED
    assert owner.lane.unusable().first_cause == str(error)


def test_a_death_ends_all_that_is_in_flight_once_and_a_new_life_is_prepared_anew() -> None:
    system, owner, _ = grow(DeafChip(answers_health=True))
    launched, freed = owner.launch(decode(1), decode(2)), owner.command(FreeTensor(1))

    system.kill("chip.0", "signal 9 (SIGKILL)")
    system.run_until(lambda: len(owner.heard) == 2, 60)

    assert owner.heard[0] == "ready"
    assert isinstance(owner.heard[1], WorkerLost)
    assert "signal 9 (SIGKILL)" in str(owner.heard[1])
    assert [type(outcome) for outcome in launched[0]] == [WorkerLost, WorkerLost]
    assert len(launched) == len(freed) == 1
    assert not owner.lane.has_credit
    refused = owner.command(FreeTensor(1))
    system.run_until(lambda: bool(refused), 60)
    assert isinstance(refused[0], DeviceUnusable)
    assert refused[0].first_cause == str(owner.heard[1])

    system.spawn("chip.0", chip_actor(), connect=("host", "supervisor"))
    system.run_until(lambda: len(owner.heard) == 3, 60)
    assert owner.lane.is_ready
    assert owner.lane.incarnation == 2
    again = owner.launch(decode(3))
    system.run_until(lambda: bool(again), 60)
    assert isinstance(again[0][0], Completion)


@pytest.mark.guarantee("C2")
@pytest.mark.parametrize(
    ("chip", "detail"),
    [
        (DeafChip(answers_health=True), "sub-class S1, running-stalled: dispatch 7 for 9.0 s"),
        (DeafChip(answers_health=True, running=""), "an answer was lost"),
        (DeafChip(answers_health=False), "its process does not answer"),
    ],
)
def test_a_launch_that_never_ends_is_a_scheduler_timeout_that_says_why_and_has_the_chip_replaced(
    chip: DeafChip, detail: str
) -> None:
    system, owner, supervisor = grow(chip)

    first, second = owner.launch(decode(1)), owner.launch(decode(2))
    system.run_until(lambda: bool(supervisor.condemned), 60)
    system.run_until(lambda: bool(first), 60)

    [error] = first[0]
    assert isinstance(error, SchedulerTimeout)
    assert "dispatches 1 to 1 did not end within 10 s" in error.detail
    assert detail in error.detail
    assert supervisor.condemned[0].child == "chip.0"
    assert supervisor.condemned[0].incarnation == 1
    assert not owner.lane.has_credit
    assert second == []

    system.kill("chip.0", "signal 9 (SIGKILL)")  # what the supervisor does
    system.run_until(lambda: bool(second), 60)
    [lost] = second[0]
    assert isinstance(lost, WorkerLost)
    assert lost.first_cause == str(error)


def test_an_error_keeps_its_class_its_number_and_its_first_cause_across_the_bus() -> None:
    error: ChipbusError = TaskAborted("dispatch 2 was not run").caused_by(SchedulerTimeout("chip.0: hangs"))

    back = error_of(failure_of(error))
    assert type(back) is TaskAborted
    assert str(back) == str(error)
    assert back.code == 107022
    assert back.first_cause.startswith("SCHEDULER_TIMEOUT (100): chip.0: hangs")
