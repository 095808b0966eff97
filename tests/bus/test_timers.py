"""Timers: order, cancelling, and no growth by timers that were cancelled."""

from __future__ import annotations

from chipbus.bus.timers import COMPACT_ABOVE, TimerQueue


def run_due(timers: TimerQueue, now_ns: int) -> None:
    while (callback := timers.pop_due(now_ns)) is not None:
        callback()


def test_timers_fire_by_due_time_then_by_creation() -> None:
    timers, fired = TimerQueue(), []
    for name, due_ns in (("b", 20), ("a", 10), ("c", 20), ("later", 30)):
        timers.at(due_ns, lambda name=name: fired.append(name))  # type: ignore[misc]

    run_due(timers, 29)

    assert fired == ["a", "b", "c"]
    assert timers.next_due_ns() == 30


def test_a_cancelled_timer_does_not_fire_and_cancel_is_idempotent() -> None:
    timers, fired = TimerQueue(), []
    first = timers.at(1, lambda: fired.append(1))
    second = timers.at(2, lambda: [fired.append(2), second.cancel()])  # type: ignore[func-returns-value]
    first.cancel()
    first.cancel()

    run_due(timers, 5)

    assert fired == [2]
    assert len(timers) == 0
    assert timers.next_due_ns() is None


def test_a_callback_may_add_and_cancel_timers() -> None:
    timers, fired = TimerQueue(), []
    doomed = timers.at(2, lambda: fired.append("doomed"))
    timers.at(1, lambda: (doomed.cancel(), timers.at(1, lambda: fired.append("new"))))  # type: ignore[func-returns-value]

    run_due(timers, 2)

    assert fired == ["new"]


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = TimerQueue()
    for due_ns in range(20 * COMPACT_ABOVE):
        timers.at(10**9 + due_ns, lambda: None).cancel()
    timers.at(10**10, lambda: None)

    assert len(timers) == 1
    assert len(timers._heap) <= COMPACT_ABOVE + 2
