"""Chip worker: its compute thread alone uses the chip, in order of arrival."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from chipbus.actors.chip import ChipActor, ThreadCompute
from chipbus.actors.messages.launching import (
    AllocTensor,
    ChipReport,
    ChipReportRequest,
    Completion,
    Dispatch,
    Done,
    FreeTensor,
    Launch,
    RegisterProgram,
)
from chipbus.bus import Ready, SystemClock
from chipbus.errors import ChipbusError, KernelError
from chipbus.kernels.chips import Chip
from chipbus.kernels.null import NullChip
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import Limits, ModelPrograms
from chipbus.topology.rings import RingUse

DEMO = Path(__file__).resolve().parents[2] / "chipbus" / "demo"


class Heard:
    """The bus thread of a test: callbacks posted to it are kept until they are asked for."""

    def __init__(self) -> None:
        self.posted: list[object] = []
        self.some = threading.Semaphore(0)

    def post(self, callback: object) -> None:
        self.posted.append(callback)
        self.some.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.some.acquire(timeout=10)


class Log:
    """What is logged, by level."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []

    def info(self, event: str, **facts: object) -> None:
        self.lines.append(("info", event, facts))

    def warning(self, event: str, **facts: object) -> None:
        self.lines.append(("warning", event, facts))


class DelayedBus:
    """A context whose bus thread hears of nothing until the test lets it."""

    def __init__(self, heard: Heard) -> None:
        self.call_soon_threadsafe = heard.post
        self.ledger = None
        self.clock = SystemClock()
        self.told: list[object] = []
        self.log = Log()

    def tell(self, _to: str, message: object) -> None:
        self.told.append(message)

    tell_ready = tell


class Answers:
    """The reply port of a command."""

    trace_id = bytes(16)

    def __init__(self) -> None:
        self.replies: list[object] = []
        self.errors: list[ChipbusError] = []
        self.reply, self.fail = self.replies.append, self.errors.append
        self.items: list[object] = []
        self.item = self.items.append


def test_a_command_that_arrives_before_the_chip_is_known_to_be_open_is_carried_out() -> None:
    """The compute thread may run it before the bus thread hears that the chip was opened (seen on a busy machine)."""
    heard, answers = Heard(), Answers()
    actor = ChipActor({"device": "null:0", "threads": 1})
    bus = DelayedBus(heard)
    actor.ctx = bus  # type: ignore[assignment]
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, page_size=4, num_pages=2)
    program = ModelPrograms.build(ModelSpec.from_directory(DEMO), limits).decode

    actor.on_start()
    actor._register(RegisterProgram(program), answers)  # type: ignore[arg-type]
    heard.wait(2)
    assert actor._compute is not None
    actor._compute.close(lambda: None)
    heard.wait(1)
    for callback in heard.posted:
        callback()  # type: ignore[operator]

    assert answers.errors == []
    assert [type(reply) for reply in answers.replies] == [Done]
    assert [type(message) for message in bus.told] == [Ready]


def test_a_chip_is_busy_while_it_has_jobs_and_its_progress_moves_inside_one() -> None:
    heard, answers = Heard(), Answers()
    go_on = threading.Event()

    class SlowChip(NullChip):
        def free(self, resident: int) -> None:
            self.progress += 1
            heard.post(lambda: None)
            go_on.wait(10)

    actor = ChipActor({"device": "null:0", "threads": 1})
    actor.ctx = DelayedBus(heard)  # type: ignore[assignment]
    actor.open_chip = SlowChip  # type: ignore[method-assign]
    assert (actor.is_busy(), actor.progress()) == (False, 0)
    actor.on_start()
    heard.wait(1)
    actor._free(FreeTensor(1), answers)  # type: ignore[arg-type]
    heard.wait(1)
    assert (actor.is_busy(), actor.progress()) == (True, 1)

    go_on.set()
    assert actor._compute is not None
    actor._compute.close(lambda: None)
    heard.wait(2)
    for callback in heard.posted:
        callback()  # type: ignore[operator]

    assert (actor.is_busy(), actor.progress()) == (False, 2)


class NamedChip(ChipActor):
    """On a null chip that says what it is told to of its engine."""

    def __init__(self, engine: str) -> None:
        super().__init__({"device": "null:0", "threads": 1})
        self._named = engine

    def open_chip(self) -> Chip:
        chip = NullChip()
        chip.engine = self._named
        return chip


@pytest.mark.guarantee("K46")
@pytest.mark.parametrize(
    ("engine", "level"),
    [("native, avx2", "info"), ("torch: this processor lacks AVX2", "warning"), ("torch, as asked", "info")],
)
def test_which_engine_computes_a_model_is_said_once_and_as_a_warning_where_nobody_asked_for_it(
    engine: str, level: str
) -> None:
    heard, answers = Heard(), Answers()
    actor = NamedChip(engine)
    bus = DelayedBus(heard)
    actor.ctx = bus  # type: ignore[assignment]
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, page_size=4, num_pages=2)
    tensors = ModelPrograms.build(ModelSpec.from_directory(DEMO), limits).tensors

    actor.on_start()
    for tensor in tensors:
        actor._alloc(AllocTensor(tensor), answers)  # type: ignore[arg-type]
    assert actor._compute is not None
    actor._compute.close(lambda: None)
    heard.wait(4 + len(tensors))  # opened, progress and engine of the weights, what each command ended with, closed
    for callback in heard.posted:
        callback()  # type: ignore[operator]
    actor._report(ChipReportRequest(), answers)  # type: ignore[arg-type]

    assert bus.log.lines == [(level, "chip.engine", {"engine": engine})]
    assert answers.errors == []
    assert isinstance(answers.replies[-1], ChipReport)
    assert answers.replies[-1].engine == engine


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (ZeroDivisionError("by zero"), KernelError, "ZeroDivisionError"),
        (ChipbusError("as it is"), ChipbusError, "as it is"),
    ],
)
def test_what_a_job_raises_is_reported_as_a_typed_error_and_the_next_job_runs(
    raised: Exception, expected: type[Exception], words: str
) -> None:
    heard = Heard()
    outcomes: list[tuple[object, ChipbusError | None]] = []
    compute = ThreadCompute(heard.post)

    def fail() -> None:
        raise raised

    compute.submit(fail, lambda value, error: outcomes.append((value, error)))
    compute.submit(lambda: 7, lambda value, error: outcomes.append((value, error)))
    heard.wait(2)
    compute.close(lambda: None)
    heard.wait(1)
    for callback in heard.posted:
        callback()  # type: ignore[operator]

    assert isinstance(outcomes[0][1], expected)
    assert words in str(outcomes[0][1])
    assert outcomes[1] == (7, None)


def test_a_chip_tells_how_busy_it_is_also_in_the_middle_of_a_launch_and_after_one_that_failed() -> None:
    heard, answers = Heard(), Answers()
    go_on = threading.Event()

    class SlowChip(NullChip):
        rings = (RingUse(tasks=3),)

        def launch(self, dispatch: Dispatch, *, digest: bool = False) -> Completion:
            if dispatch.dispatch_id == 1:
                raise KernelError("it does not want to")
            heard.post(lambda: None)
            go_on.wait(10)
            return Completion(dispatch_id=dispatch.dispatch_id)

    actor = ChipActor({"device": "null:0", "threads": 1})
    actor.ctx = DelayedBus(heard)  # type: ignore[assignment]
    actor.open_chip = SlowChip  # type: ignore[method-assign]
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, page_size=4, num_pages=2)
    programs = ModelPrograms.build(ModelSpec.from_directory(DEMO), limits)

    def report() -> ChipReport:
        actor._report(ChipReportRequest(), answers)  # type: ignore[arg-type]
        last = answers.replies[-1]
        assert isinstance(last, ChipReport)
        return last

    actor.on_start()
    assert report().busy == report().rings == ()
    for program in (programs.prefill, programs.decode):
        actor._register(RegisterProgram(program), answers)  # type: ignore[arg-type]
    digests = (programs.prefill.digest, programs.decode.digest)
    dispatches = [Dispatch(dispatch_id=n, step_id=1, program=digest, args=()) for n, digest in enumerate(digests, 1)]
    actor._launch(Launch(tuple(dispatches)), answers)  # type: ignore[arg-type]
    heard.wait(4)  # opened, two registered, in the second dispatch
    first, second = dict(report().busy), dict(report().busy)
    go_on.set()
    assert actor._compute is not None
    actor._compute.close(lambda: None)
    heard.wait(2)

    assert first.keys() == second.keys() == {"prefill", "decode"}
    assert 0 < first["prefill"] <= 1
    assert 0 < first["decode"] <= 1
    assert second["decode"] > first["decode"] / 2, "it goes on while the other thread computes"
    after = report()
    assert dict(after.busy).keys() == {"prefill", "decode"}
    assert after.rings == (RingUse(tasks=3),)
