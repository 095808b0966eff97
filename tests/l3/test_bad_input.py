"""Bad input gets the numbered error at once, names what is wrong with what was expected, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from l3_local import ADD, BUMP, FILL, LocalWorker, vector

from chipbus.actors.l3 import L3Worker, RunConfig, orchestration
from chipbus.errors import ConfigError, InvalidArgs, NumberedError, SyncStartInvalid, UnknownProgram, WrongArity
from chipbus.kernels import Direction, Param, Program
from chipbus.kernels.faults import Fault
from chipbus.topology.rings import RingRequest

OTHER = Program("other", "test.other", (), (Param("x", "float32", ("N",)),))
STAYS = Program("stays", "test.bump", (), (Param("x", "float32", ("N",), Direction.INOUT, resident=True),))
BY_VALUE = Program("by_value", "test.bump", (), (Param("x", "float32", ("N",), Direction.INOUT),))


def read_only() -> Any:
    array = vector(1, 2)
    array.flags.writeable = False
    return array


def freed(worker: LocalWorker) -> Any:
    x = worker.alloc_tensor((2,), "float32")
    worker.free_tensor(x)
    return x


def foreign(_: LocalWorker) -> Any:
    return LocalWorker().alloc_tensor((2,), "float32")


CALLS: dict[str, tuple[Callable[[LocalWorker], object], type[Exception], str]] = {
    "unregistered program": (
        lambda w: w.run(OTHER, vector(1)),
        UnknownProgram,
        "other is not registered on this worker; registered: add, bump, fill, mix, boom",
    ),
    "no program at all": (lambda w: w.run(7), WrongArity, "program is a int; expected a program"),
    "too few arguments": (lambda w: w.run(ADD, vector(1)), WrongArity, "add: 1 arguments given; expected 3 (a: in"),
    "too many arguments": (lambda w: w.run(BUMP, vector(1), 1), WrongArity, "bump: 2 arguments given; expected 1"),
    "an argument of no use": (
        lambda w: w.run(BUMP, [1.0, 2.0]),
        WrongArity,
        "bump, argument 0 (x): list given; expected a numpy array or a tensor of this worker",
    ),
    "text for an array": (lambda w: w.run(BUMP, "x"), WrongArity, "argument 0 (x): str given"),
    "wrong dtype": (
        lambda w: w.run(BUMP, np.zeros(2)),
        InvalidArgs,
        "bump, argument 0 (x): dtype is float64; expected float32",
    ),
    "wrong dtype of a tensor": (
        lambda w: w.run(BUMP, w.alloc_tensor((2,), "int32")),
        InvalidArgs,
        "bump, argument 0 (x): dtype is int32; expected float32",
    ),
    "wrong rank": (
        lambda w: w.run(BUMP, np.zeros((2, 2), np.float32)),
        InvalidArgs,
        "bump, argument 0 (x): shape is [2, 2]; expected ['N']",
    ),
    "shapes that disagree": (
        lambda w: w.run(ADD, vector(1, 2), vector(1, 2, 3), vector(0, 0)),
        InvalidArgs,
        "add, argument 1 (b): shape is [3]; expected ['N'] with {'N': 2}",
    ),
    "array that cannot be written": (
        lambda w: w.run(BUMP, read_only()),
        InvalidArgs,
        "bump, argument 0 (x): the array is read-only; its direction is inout",
    ),
    "array that is not dense": (
        lambda w: w.run(BUMP, np.zeros((2, 3), np.float32)[:, 0]),
        InvalidArgs,
        "bump, argument 0 (x): the array is not contiguous",
    ),
    "number for an output": (lambda w: w.run(FILL, 1.0, 2.0), WrongArity, "fill, argument 0 (x): float given"),
    "array where a tensor is needed": (
        lambda w: w.run(STAYS, vector(1)),
        InvalidArgs,
        "stays, argument 0 (x): given by value; expected a resident tensor",
    ),
    "tensor where an array is needed": (
        lambda w: w.run(BY_VALUE, w.alloc_tensor((2,), "float32")),
        InvalidArgs,
        "expected an array by value",
    ),
    "tensor of another chip": (
        lambda w: w.run(BUMP, w.alloc_tensor((2,), "float32", worker_id=1)),
        InvalidArgs,
        "on worker 1) given; the program runs on worker 0",
    ),
    "freed tensor": (lambda w: w.run(BUMP, freed(w)), InvalidArgs, "on worker 0) was freed before"),
    "foreign tensor": (lambda w: w.run(BUMP, foreign(w)), InvalidArgs, "belongs to another L3 worker"),
    "double free": (lambda w: w.free_tensor(freed(w)), InvalidArgs, "free: tensor"),
    "free of a foreign tensor": (lambda w: w.free_tensor(foreign(w)), InvalidArgs, "belongs to another L3 worker"),
    "free of no tensor": (lambda w: w.free_tensor(5), WrongArity, "free_tensor: int given"),
    "copy to a freed tensor": (lambda w: w.copy_to(freed(w), vector(1, 2)), InvalidArgs, "was freed before"),
    "copy of the wrong shape": (
        lambda w: w.copy_to(w.alloc_tensor((2,), "float32"), vector(1)),
        InvalidArgs,
        "copy_to: shape is [1]; expected [2]",
    ),
    "copy of no array": (
        lambda w: w.copy_to(w.alloc_tensor((2,), "float32"), [1, 2]),
        WrongArity,
        "copy_to: list given; expected a numpy array",
    ),
    "copy from a freed tensor": (lambda w: w.copy_from(freed(w)), InvalidArgs, "was freed before"),
    "copy that is too large": (
        lambda w: w.copy_from(w.alloc_tensor((1 << 24,), "float32")),
        InvalidArgs,
        "copy_from: 67,108,864 bytes; at most",
    ),
    "unknown dtype": (lambda w: w.alloc_tensor((2,), "float8"), InvalidArgs, "alloc_tensor: dtype is 'float8'"),
    "shape without axes": (lambda w: w.alloc_tensor((), "float32"), InvalidArgs, "shape is []; expected at least one"),
    "shape of zero": (lambda w: w.alloc_tensor((2, 0), "float32"), InvalidArgs, "shape is [2, 0]"),
    "shape of text": (lambda w: w.alloc_tensor("22", "float32"), WrongArity, "shape is '22'"),
    "shape of fractions": (lambda w: w.alloc_tensor((1.5,), "float32"), WrongArity, "expected integers"),
    "unknown worker": (lambda w: w.alloc_tensor((2,), "float32", worker_id=2), InvalidArgs, "worker_id is 2; expected"),
    "worker that is no number": (lambda w: w.run(BUMP, vector(1), worker="0"), InvalidArgs, "worker is '0'"),
    "run on an unknown worker": (lambda w: w.run(BUMP, vector(1), worker=-1), InvalidArgs, "worker is -1; expected"),
    "config of another kind": (lambda w: w.run(BUMP, vector(1), config={}), WrongArity, "config is a dict"),
    "registration of no program": (lambda w: w.register("bump"), WrongArity, "program is a str; expected a program"),
    "unregistration of an unknown program": (lambda w: w.unregister(OTHER), UnknownProgram, "other is not registered"),
    "stacked: workers twice": (
        lambda w: w.alloc_stacked_tensor(np.zeros((2, 2), np.float32), [0, 0]),
        InvalidArgs,
        "worker_ids are [0, 0]; expected at least one, all different",
    ),
    "stacked: wrong number of slices": (
        lambda w: w.alloc_stacked_tensor(np.zeros((3, 2), np.float32), [0, 1]),
        InvalidArgs,
        "shape is [3, 2]; expected 2 slices along axis 0",
    ),
    "stacked: text": (lambda w: w.alloc_stacked_tensor(np.zeros((2, 2)), "01"), WrongArity, "worker_ids is '01'"),
    "stacked: no tensor": (lambda w: w.copy_stacked_from(vector(1)), WrongArity, "ndarray given; expected a stacked"),
}


@pytest.mark.guarantee("W1")
@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused_with_a_numbered_error_and_changes_nothing(case: str) -> None:
    call, kind, words = CALLS[case]
    worker = LocalWorker(chips=2)
    if case in ("array where a tensor is needed", "tensor where an array is needed"):
        worker.register(STAYS)
        worker.register(BY_VALUE)

    with pytest.raises(kind) as caught:
        call(worker)

    assert words in str(caught.value)
    assert isinstance(caught.value, NumberedError)
    assert str(caught.value).startswith("INVALID_ARGS (5): ")
    assert "\nhint: " in str(caught.value)
    assert worker.commands["chip.0"].count("launch") == 0
    worker.check_nothing_leaks()
    out = vector(0)
    worker.run(ADD, vector(1), vector(2), out)
    assert out.tolist() == [3]
    worker.close()


ORCHESTRATIONS: dict[str, tuple[Callable[[Any, Any], object], type[Exception], str]] = {
    "worker out of range": (lambda o, x: o.submit_next_level(BUMP, x, worker=2), InvalidArgs, "worker is 2; expected"),
    "after of nothing": (
        lambda o, x: o.submit_next_level(BUMP, x, worker=0, after=[None] * 4),
        InvalidArgs,
        "bump: after names None; expected ids of tasks of this run",
    ),
    "after of a task that is not there": (
        lambda o, x: o.submit_next_level(BUMP, x, worker=0, after=[99]),
        InvalidArgs,
        "after names 99",
    ),
    "group wider than the worker": (
        lambda o, x: o.submit_group(BUMP, [[x]] * 3, workers=[0, 1, 2]),
        SyncStartInvalid,
        "3 members are to start together on 2 chips",
    ),
    "group with a chip twice": (
        lambda o, x: o.submit_group(BUMP, [[x], [x]], workers=[0, 0]),
        InvalidArgs,
        "workers are [0, 0]; expected at least one, all different",
    ),
    "group without members": (lambda o, _: o.submit_group(BUMP, [], workers=[]), InvalidArgs, "workers are []"),
    "group with too few arguments": (
        lambda o, x: o.submit_group(BUMP, [[x]], workers=[0, 1]),
        WrongArity,
        "1 lists of arguments for 2 workers",
    ),
    "host callable of unknown name": (
        lambda o, x: o.submit_sub("norm", x),
        UnknownProgram,
        "there is no host callable 'norm' on this worker; given: log",
    ),
    "host callable that cannot be called": (lambda o, x: o.submit_sub(5, x), WrongArity, "5 cannot be called"),
    "host callable with wrong arguments": (
        lambda o, x: o.submit_sub("log", x, x),
        WrongArity,
        "log(x): 2 arguments given",
    ),
    "tensor for a host callable": (
        lambda o, _: o.submit_sub("log", o.deferred("d", (2,), "float32", worker=0)),
        WrongArity,
        "log, argument 0: DeferredTensor given; host callables take host arrays",
    ),
    "deferred tensor that must exist": (
        lambda o, _: o.deferred("gone", (2,), "float32", worker=1, must_exist=True),
        InvalidArgs,
        "deferred tensor 'gone': it does not exist on worker 1",
    ),
    "deferred tensor of another shape": (
        lambda o, _: [o.deferred("d", (n,), "float32", worker=0) for n in (2, 3)],
        InvalidArgs,
        "expected float32 [3]",
    ),
    "deferred tensor with a wrong upload": (
        lambda o, _: o.deferred("d", (2,), "float32", worker=0, upload=vector(1)),
        InvalidArgs,
        "deferred tensor 'd': shape is [1]; expected [2]",
    ),
    "wait for a number": (lambda o, _: o.wait(3), WrongArity, "wait: int given"),
    "scope that is too deep": (lambda o, _: _nest(o, 65), InvalidArgs, "scopes nest 64 deep"),
}


def _nest(orch: Any, depth: int) -> None:
    if depth:
        with orch.scope():
            _nest(orch, depth - 1)


@pytest.mark.guarantee("W2")
@pytest.mark.parametrize("case", ORCHESTRATIONS)
def test_a_wrong_submit_raises_inside_the_orchestration_and_the_next_run_is_clean(case: str) -> None:
    call, kind, words = ORCHESTRATIONS[case]
    worker = LocalWorker(chips=2, subs={"log": lambda x: None})
    x = vector(1, 2)

    with pytest.raises(kind) as caught:
        worker.run(lambda orch: call(orch, x))

    assert words in str(caught.value)
    assert isinstance(caught.value, NumberedError)
    worker.run(BUMP, x)
    assert x.tolist() == [2, 3]
    worker.check_nothing_leaks()


@orchestration(subs={"log": 2})
def needs_log(orch: Any) -> None:
    orch.submit_sub("log", 1, 2)


@orchestration(devices=["null:0", "null:1"])
def needs_two(orch: Any) -> None:
    del orch


CONSTRUCTORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "text instead of programs": (lambda: L3Worker("bump"), WrongArity, "programs is 'bump'"),  # type: ignore[arg-type]
    "bytes instead of programs": (lambda: L3Worker(b"bump"), TypeError, "programs is b'bump'"),  # type: ignore[arg-type]
    "no programs": (lambda: L3Worker([]), ValueError, "programs is empty"),
    "programs of another kind": (lambda: L3Worker([BUMP, 5]), WrongArity, "program 1 is a int"),  # type: ignore[list-item]
    "devices as text": (lambda: L3Worker(BUMP, "null:0"), WrongArity, "devices is 'null:0'"),
    "no devices": (lambda: L3Worker(BUMP, []), ConfigError, "devices is empty"),
    "a device twice": (lambda: L3Worker(BUMP, ["null:0", "null:0"]), InvalidArgs, "null:0 is given twice"),
    "a negative device": (lambda: L3Worker(BUMP, ["null:-1"]), InvalidArgs, "device 'null:-1'"),
    "devices of two kinds": (lambda: L3Worker(BUMP, ["null:0", "cpu:0"]), InvalidArgs, "kinds"),
    "programs with different devices": (
        lambda: L3Worker([BUMP, needs_two], ["null:0"]),
        InvalidArgs,
        "needs_two was made for null:0, null:1; the worker has null:0",
    ),
    "host callable missing": (
        lambda: L3Worker([BUMP, needs_log], ["null:0"]),
        InvalidArgs,
        "needs_log needs the host callable 'log'; given: none",
    ),
    "host callable of wrong arity": (
        lambda: L3Worker([BUMP, needs_log], ["null:0"], subs={"log": lambda x: None}),
        WrongArity,
        "log(x): 2 arguments given",
    ),
    "host callable that is none": (lambda: L3Worker(BUMP, ["null:0"], subs={"log": 5}), WrongArity, "maps 'log' to 5"),  # type: ignore[dict-item]
    "depth of one": (lambda: L3Worker(BUMP, ["null:0"], depth=1), ConfigError, "depth is 1"),
    "no sub workers": (lambda: L3Worker(BUMP, ["null:0"], sub_workers=0), ConfigError, "sub_workers is 0"),
    "a deadline of zero": (lambda: L3Worker(BUMP, ["null:0"], run_timeout_s=0), ConfigError, "run_timeout_s is 0"),
    "a deadline of text": (
        lambda: L3Worker(BUMP, ["null:0"], close_timeout_s="3"),  # type: ignore[arg-type]
        ConfigError,
        "close_timeout_s is '3'",
    ),
    "no threads": (lambda: L3Worker(BUMP, ["null:0"], threads=0), ConfigError, "threads is 0"),
    "faults of a chip that is not there": (
        lambda: L3Worker(BUMP, ["null:0"], faults={1: [Fault(kind="fail")]}),
        ConfigError,
        "faults are given for worker 1",
    ),
    "window that is no power of two": (
        lambda: L3Worker(BUMP, ["null:0"], rings=RingRequest(ring_task_window=12)),
        ConfigError,
        "ring_task_window is 12",
    ),
    "heap that is too small": (
        lambda: L3Worker(BUMP, ["null:0"], rings=RingRequest(ring_heap=512)),
        ConfigError,
        "ring_heap is 512",
    ),
    "rings larger than free memory": (
        lambda: L3Worker(BUMP, ["cpu:0"], rings=RingRequest(ring_heap=1 << 50)),
        MemoryError,
        "MEMORY_ALLOCATION (207001)",
    ),
}


@pytest.mark.guarantee("W3")
@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_a_worker_that_cannot_be_is_refused_before_anything_starts(case: str) -> None:
    make, kind, words = CONSTRUCTORS[case]

    with pytest.raises(kind) as caught:
        make()

    assert words in str(caught.value)


def test_a_run_config_keeps_the_ring_rules() -> None:
    with pytest.raises(ConfigError, match="ring_dep_pool is 3"):
        RunConfig(rings=RingRequest(ring_dep_pool=3))
