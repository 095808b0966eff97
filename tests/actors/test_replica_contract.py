"""What the router relies on in whatever answers ``Submit``: the real replica core and its stand-in keep the same rules.

The rules are those of ARCHITECTURE.md, "What the router programs against".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
import pytest
from replica_group import Replica, expected
from serving_actors import Answer, Asker, ScriptedReplica, Supervisor, counting

from chipbus.actors.messages.serving import Submit, TokenDelta
from chipbus.bus import LocalSystem, pack_tokens, unpack_tokens
from chipbus.errors import Aborted, DeadlineExceeded

PROMPT = [21, 22, 23]

Rule = Callable[["Callee"], None]


class Callee(Protocol):
    """A replica behind the asker's back."""

    system: LocalSystem
    asker: Asker

    def right(self, submit: Submit) -> list[int]: ...
    def holds(self) -> bool: ...


class RealCore(Replica):
    """The replica core with its chip worker, on a null chip."""

    def right(self, submit: Submit) -> list[int]:
        return expected(unpack_tokens(submit.prompt_token_ids).tolist(), submit.params.max_tokens)

    def holds(self) -> bool:
        scheduler = self.core._scheduler
        return bool(self.core._serving) or bool(self.core._in_flight) or scheduler.pages_free < scheduler.pages_total


class StandIn:
    """The scripted replica of the router's and the tokenizer's tests."""

    def __init__(self, seed: int) -> None:
        self.system, self.asker, self.replica = LocalSystem(seed), Asker("replica.0"), ScriptedReplica(0)
        self.system.spawn("supervisor", Supervisor())
        self.system.spawn("router", self.asker, connect=("supervisor",))
        self.system.spawn("replica.0", self.replica, connect=("router", "supervisor"))
        self.system.run_until(lambda: "replica.0" in self.asker.ctx.peers())

    def right(self, submit: Submit) -> list[int]:
        return counting(submit)

    def holds(self) -> bool:
        return bool(self.replica.open)


def ask(callee: Callee, *, max_tokens: int = 12, timeout_s: float = 1e5) -> Answer:
    return callee.asker.submit(PROMPT, max_tokens=max_tokens, ignore_eos=True, temperature=0, timeout_s=timeout_s)


def again(callee: Callee, first: Answer, had: int) -> Answer:
    """The same request once more, behind ``had`` of its tokens."""
    generated = pack_tokens(callee.right(first.message)[:had])
    return callee.asker.submit_again(Answer(attrs.evolve(first.message, generated=generated, attempt=2)))


def finish(callee: Callee) -> None:
    """Every ask ends, and nothing is held of any."""
    callee.system.run_until(lambda: all(answer.is_over for answer in callee.asker.answers), 1000)
    callee.system.run_until(lambda: not callee.holds(), 1000)


def each_request_gets_its_own_tokens_in_order_and_one_end(callee: Callee) -> None:
    answers = [ask(callee, max_tokens=count) for count in (1, 12, 40)]
    finish(callee)
    for answer in answers:
        assert answer.tokens == callee.right(answer.message)
        assert {type(item) for item in answer.items} == {TokenDelta}
        assert (answer.ends, answer.error, answer.reply.finish_reason) == (1, None, "length")


def an_answer_goes_on_behind_what_was_had(callee: Callee) -> None:
    first = ask(callee)
    finish(callee)
    for had in (1, 5, 11, 12):
        answer = again(callee, first, had)
        finish(callee)
        assert answer.tokens_behind(had) == callee.right(first.message)[had:]
        assert (answer.ends, answer.reply.finish_reason) == (1, "length")


def a_cancel_ends_it_and_nothing_more_comes(callee: Callee) -> None:
    answer, other = ask(callee, max_tokens=40), ask(callee, max_tokens=40)
    callee.system.run_until(lambda: len(answer.items) > 1)
    callee.asker.cancel(answer)
    came = len(answer.items)
    finish(callee)
    assert (len(answer.items), answer.ends) == (came, 0)
    assert other.tokens == callee.right(other.message)


def a_deadline_ends_it(callee: Callee) -> None:
    answer = ask(callee, timeout_s=1e-6)
    finish(callee)
    assert type(answer.error) is DeadlineExceeded


def the_death_of_the_caller_ends_it(callee: Callee) -> None:
    answer = ask(callee, max_tokens=40)
    callee.system.run_until(lambda: len(answer.items) > 1)
    callee.system.kill("router", "signal 9 (SIGKILL)")
    callee.system.run_until(lambda: not callee.holds(), 1000)


def a_later_attempt_takes_the_place_of_an_earlier_one(callee: Callee) -> None:
    first = ask(callee, max_tokens=40)
    callee.system.run_until(lambda: len(first.tokens) > 2)
    second = again(callee, first, 2)
    finish(callee)
    assert type(first.error) is Aborted
    assert second.tokens_behind(2) == callee.right(first.message)[2:]


RULES = [
    each_request_gets_its_own_tokens_in_order_and_one_end,
    an_answer_goes_on_behind_what_was_had,
    a_cancel_ends_it_and_nothing_more_comes,
    a_deadline_ends_it,
    the_death_of_the_caller_ends_it,
    a_later_attempt_takes_the_place_of_an_earlier_one,
]


@pytest.mark.guarantee("R88")
@pytest.mark.parametrize("make", [RealCore, StandIn])
@pytest.mark.parametrize("rule", RULES)
def test_whatever_answers_the_router_keeps_its_rules(make: Callable[[int], Callee], rule: Rule) -> None:
    for seed in range(5):
        rule(make(seed))
