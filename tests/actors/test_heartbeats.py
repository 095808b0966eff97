"""Silent and stuck, by the numbers: the two rules, and what a watcher's own pause may count for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipbus.actors.heartbeats import Heartbeats, Stall

SILENT = "no answer to heartbeats for 4 s"
STUCK = "busy without progress for 4 s"


class Watch:
    """One peer, asked once a second."""

    def __init__(self) -> None:
        self.heartbeats = Heartbeats(4.0)
        self.now_s = 100.0
        self.heartbeats.beat({"chip": 1}, self.now_s)

    def beat(self, after_s: float = 1.0, life: int = 1) -> list[str]:
        self.now_s += after_s
        return [stall.reason for stall in self.heartbeats.beat({"chip": life}, self.now_s)]

    def answer(self, progress: int = 0, is_busy: bool = False, life: int = 1) -> None:
        self.heartbeats.answered("chip", life, progress, is_busy=is_busy)


@pytest.mark.parametrize(("timeout_s", "interval_s"), [(0.4, 0.1), (4.0, 1.0), (60.0, 2.0)])
def test_a_beat_is_a_quarter_of_the_timeout_and_two_seconds_at_most(timeout_s: float, interval_s: float) -> None:
    assert Heartbeats(timeout_s).interval_s == interval_s


def test_who_never_answers_is_silent_after_the_timeout_and_not_before() -> None:
    watch = Watch()

    assert [watch.beat() for _ in range(4)] == [[], [], [], [SILENT]]


def test_one_answer_in_time_begins_the_count_again() -> None:
    watch = Watch()
    assert [watch.beat() for _ in range(3)] == [[], [], []]
    watch.answer()

    assert [watch.beat() for _ in range(5)] == [[], [], [], [], [SILENT]]


def test_who_answers_busy_with_the_same_progress_is_stuck() -> None:
    watch = Watch()
    found = []
    for _ in range(5):
        watch.answer(7, is_busy=True)
        found.append(watch.beat())

    assert found == [[], [], [], [STUCK], [STUCK]]


@pytest.mark.parametrize("break_off", [(8, True), (7, False)])
def test_progress_or_a_moment_of_rest_begins_the_count_again(break_off: tuple[int, bool]) -> None:
    watch = Watch()
    for _ in range(3):
        watch.answer(7, is_busy=True)
        assert watch.beat() == []
    watch.answer(*break_off)
    assert watch.beat() == []  # the first second of the new count, if it is busy
    for _ in range(2):
        watch.answer(break_off[0], is_busy=True)
        assert watch.beat() == []


def test_a_busy_one_that_was_stopped_for_less_than_the_timeout_is_not_stuck_when_it_goes_on() -> None:
    watch = Watch()
    watch.answer(7, is_busy=True)
    assert [watch.beat() for _ in range(4)] == [[], [], [], []]  # one of rest, three without an answer
    watch.answer(7, is_busy=True)  # its bus thread was faster than its compute thread

    assert watch.beat() == []


def test_answers_of_another_life_count_for_nothing() -> None:
    watch = Watch()
    assert [watch.beat(life=2) for _ in range(4)] == [[], [], [], []]
    watch.answer(life=1)

    assert watch.beat(life=2) == [SILENT]


def test_who_is_not_watched_any_more_is_forgotten() -> None:
    watch = Watch()
    assert [watch.beat() for _ in range(3)] == [[], [], []]
    watch.heartbeats.beat({}, watch.now_s)

    assert [watch.beat() for _ in range(4)] == [[], [], [], []]


@given(st.lists(st.floats(0.0, 1e6), max_size=3))
def test_however_long_the_watcher_itself_was_away_each_beat_counts_for_one_interval(away_s: list[float]) -> None:
    watch = Watch()
    for seconds in away_s:
        assert watch.beat(seconds) == []
        watch.answer()
    watch.answer()

    assert [watch.beat(3600.0) for _ in range(5)] == [[], [], [], [], [SILENT]]
    assert watch.heartbeats.beat({"chip": 1}, watch.now_s) == [Stall("chip", 1, SILENT)]
