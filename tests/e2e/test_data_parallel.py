"""Two replicas, as users meet them: chosen or given, replaced one after the other, failing to start together."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import attrs
import pytest
from local_engine import expected_tokens

from chipbus import Engine, Handling, SamplingParams, errors
from chipbus.actors.boot import ChildSpec
from chipbus.actors.plan import EnginePlan
from support import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine("demo", chip="null", data_parallel_size=2) as engine:
        yield engine


@pytest.mark.guarantee("E52")
def test_a_target_is_checked_where_it_is_given_and_told_in_the_output(engine: Engine) -> None:
    for replica in (0, 1):
        output = engine.generate([20, 21], GREEDY, Handling(replica=replica))[0]
        assert (output.replica, output.dp_rank, output.chosen_by) == (replica, replica, "pin")
    assert engine.generate([20], GREEDY)[0].chosen_by == "load"
    for handling, says in (
        (Handling(dp_rank=2), r"^dp_rank 2 is outside \[0, 2\)$"),
        (Handling(replica=0, dp_rank=1), "^replica 0 holds dp_rank 0, not 1; give one of the two$"),
    ):
        before = engine.statistics().requests
        with pytest.raises(errors.BadTarget, match=says) as caught:
            engine.generate([20, 21], GREEDY, handling)
        assert caught.value.param == "dp_rank"
        assert engine.statistics().requests == before, "nothing was sent"


class Caller(threading.Thread):
    """Asks again and again until told to stop, and keeps every answer that is not the right one."""

    def __init__(self, engine: Engine, first: int, handling: Handling) -> None:
        super().__init__(daemon=True)
        self.served_by: set[int | None] = set()
        self.wrong: list[object] = []
        self.enough = threading.Event()
        self.answers = 0
        self._engine, self._prompt, self._handling = engine, [first], handling
        self.start()

    def run(self) -> None:
        right = expected_tokens(self._prompt, 60)
        while not self.enough.is_set() and not self.wrong:
            try:
                output = self._engine.generate(self._prompt, GREEDY, self._handling)[0]
            except errors.ChipbusError as error:
                self.wrong.append(error)
                return
            if list(output.outputs[0].token_ids) != right:
                self.wrong.append(output)
            self.served_by.add(output.replica)
            self.answers += 1


@pytest.mark.slow
@pytest.mark.guarantee("E53")
def test_replicas_replaced_one_after_the_other_under_load_lose_and_change_nothing(engine: Engine) -> None:
    places = [Handling(), Handling(), Handling(session="s"), Handling(replica=0), Handling(replica=1)]
    callers = [Caller(engine, 30 + n, handling) for n, handling in enumerate(places)]

    for name in ("replica.0", "replica.1"):
        seen = [caller.answers for caller in callers]
        assert engine.drain(name)
        eventually(lambda n=name: lives(engine)[n] == (2, "ready"), f"{name} is back")  # type: ignore[misc]
        eventually(lambda s=seen: all(c.answers > n or c.wrong for c, n in zip(callers, s, strict=True)), "all went on")  # type: ignore[misc]

    for caller in callers:
        caller.enough.set()
        caller.join(20)
    assert [caller.wrong for caller in callers] == [[], [], [], [], []]
    assert callers[3].served_by == {0}
    assert callers[4].served_by == {1}
    assert lives(engine) == {"replica.0": (2, "ready"), "replica.1": (2, "ready")}


def lives(engine: Engine) -> dict[str, tuple[int, str]]:
    return {r.name: (r.incarnation, r.state) for r in engine.tree() if r.kind == "replica"}


@pytest.mark.slow
@pytest.mark.guarantee("E54")
def test_one_replica_that_cannot_start_ends_the_start_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    children = EnginePlan.children

    def one_is_broken(plan: EnginePlan) -> tuple[ChildSpec, ...]:
        return tuple(
            attrs.evolve(child, config={**child.config, "model_dir": "/nowhere"})
            if child.name == "replica.1"
            else child
            for child in children(plan)
        )

    monkeypatch.setattr(EnginePlan, "children", one_is_broken)
    with pytest.raises(errors.CheckpointError, match="/nowhere is no directory"):
        Engine("demo", chip="null", data_parallel_size=2)
