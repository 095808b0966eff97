"""Replica core and chip worker on null chips, in one process on a virtual clock, in every order that may happen."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_group import VOCAB, Replica, expected
from serving_actors import Answer

from chipbus.actors.handling import Handling
from chipbus.actors.messages.serving import Submit
from chipbus.actors.messages.tree import ReplicaStatistics, ReplicaStatisticsRequest
from chipbus.actors.sampling import SamplingParams
from chipbus.bus import pack_tokens
from chipbus.errors import (
    Aborted,
    BadTarget,
    ChipbusError,
    ContextTooLong,
    KernelError,
    Overloaded,
    RequestInvalid,
    WorkerDied,
)
from chipbus.kernels.null import Fault, NullChip

BEGINNING = list(range(30, 50))  # five pages
PROMPTS = st.one_of(
    st.lists(st.integers(16, VOCAB - 1), min_size=1, max_size=30),
    st.builds(
        lambda count, tail: [*BEGINNING[:count], *tail],
        st.integers(4, len(BEGINNING)),
        st.lists(st.integers(16, VOCAB - 1), max_size=5),
    ),
)


def ask(replica: Replica, *prompts: list[int], **params: Any) -> list[Answer]:
    params = {"max_tokens": 10, "ignore_eos": True, "temperature": 0, **params}
    return [replica.asker.submit(prompt, **params) for prompt in prompts]


def submit(prompt: list[int], *, max_tokens: int, generated: bytes = b"") -> Submit:
    """A second attempt."""
    params = SamplingParams(seed=0, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    ids = pack_tokens(prompt)
    return Submit(request_id="again", prompt_token_ids=ids, params=params, generated=generated, attempt=2)


@pytest.mark.guarantee("R40")
@settings(deadline=None, max_examples=25, print_blob=True)
@given(
    seed=st.integers(0, 2**16),
    prompts=st.lists(PROMPTS, min_size=1, max_size=6),
    num_pages=st.integers(16, 40),
)
def test_tokens_do_not_depend_on_what_shares_the_replica(seed: int, prompts: list[list[int]], num_pages: int) -> None:
    replica = Replica(seed, num_pages=num_pages)

    answers = ask(replica, *prompts)
    replica.finish()

    assert [answer.tokens for answer in answers] == [expected(prompt, 10) for prompt in prompts]
    assert all(answer.ends == 1 and answer.reply.finish_reason == "length" for answer in answers)


@pytest.mark.guarantee("R41")
@settings(deadline=None, max_examples=25, print_blob=True)
@given(seed=st.integers(0, 2**16), after_tokens=st.integers(0, 25))
def test_a_dead_chip_costs_no_token(seed: int, after_tokens: int) -> None:
    replica = Replica(seed)
    prompts = [[20, 21, 22], BEGINNING, [*BEGINNING, 60], [60]]
    answers = ask(replica, *prompts)
    replica.system.run_until(lambda: sum(len(answer.tokens) for answer in answers) >= after_tokens)

    replica.system.kill("chip.0.0", "signal 9 (SIGKILL)")
    replica.start_chip()
    replica.finish()

    assert [answer.tokens for answer in answers] == [expected(prompt, 10) for prompt in prompts]
    assert all(answer.error is None for answer in answers)


@pytest.mark.guarantee("R76")
@pytest.mark.parametrize("is_uniform", [True, False])
def test_behind_a_death_a_uniform_chip_is_given_the_tokens_so_far_in_chunks(is_uniform: bool) -> None:
    replica = Replica(3, is_uniform=is_uniform)
    prompt, generated = list(range(20, 31)), expected(list(range(20, 31)), 20)
    again = Answer(submit(prompt, max_tokens=22, generated=pack_tokens(generated)))
    replica.asker.submit_again(again)
    replica.finish()
    told = Answer(ReplicaStatisticsRequest())
    replica.asker.submit_again(told)
    replica.system.run_until(lambda: told.is_over)

    assert again.tokens_behind(20) == expected(prompt, 22)[20:]
    assert again.reply.num_cached_tokens == 0
    assert told.reply.prompt_tokens == (31 if is_uniform else 11)
    assert told.reply.steps == (4 + 1 if is_uniform else 2 + 20 + 1), "of 8 tokens each, or of one"


@pytest.mark.guarantee("R42")
def test_a_request_that_only_costs_chips_is_refused_and_the_others_go_on() -> None:
    replica = Replica(7, max_num_seqs=1)
    [poison, innocent] = ask(replica, [20, 21], [22, 23])
    for life in (1, 2, 3, 4):
        assert not poison.is_over
        replica.system.run_until(
            lambda n=life: replica.core.ctx.peers().get("chip.0.0") == n and replica.core._in_flight
        )
        replica.system.kill("chip.0.0", "signal 11 (SIGSEGV)")
        replica.start_chip()
    replica.finish()

    assert isinstance(poison.error, WorkerDied)
    assert "lost 4 times in a row without getting a token further; at most 3 restarts" in str(poison.error)
    assert "signal 11 (SIGSEGV)" in str(poison.error)
    assert innocent.tokens == expected([22, 23], 10)
    assert innocent.reply.attempt == 1


@pytest.mark.guarantee("R44")
def test_a_request_that_gets_on_survives_any_number_of_chips() -> None:
    replica = Replica(7)
    [answer] = ask(replica, [20, 21])
    for count in range(1, 10):
        replica.system.run_until(lambda n=count: len(answer.tokens) >= n and replica.core._in_flight != [])
        replica.system.kill("chip.0.0", "signal 9 (SIGKILL)")
        replica.start_chip()
    replica.finish()

    assert answer.tokens == expected([20, 21], 10)
    assert answer.reply.attempt == 10


@pytest.mark.guarantee("R45")
@settings(deadline=None, max_examples=50, print_blob=True)
@given(seed=st.integers(0, 2**16), had=st.integers(0, 10), stop_at=st.integers(0, 10), min_tokens=st.integers(0, 5))
def test_an_answer_goes_on_behind_the_tokens_that_were_had(seed: int, had: int, stop_at: int, min_tokens: int) -> None:
    whole = expected([20, 21, 22], 10)
    stop = {"stop_token_ids": whole[stop_at : stop_at + 1], "min_tokens": min_tokens}
    replica = Replica(seed)
    [alone] = ask(replica, [20, 21, 22], **stop)
    replica.finish()
    had = min(had, len(alone.tokens))

    resumed = Answer(attrs.evolve(alone.message, generated=pack_tokens(alone.tokens[:had]), attempt=2))
    replica.asker.submit_again(resumed)
    replica.finish()

    assert resumed.tokens_behind(had) == alone.tokens[had:]
    assert resumed.reply.finish_reason == alone.reply.finish_reason
    assert resumed.reply.stop_token_id == alone.reply.stop_token_id


def test_a_later_attempt_takes_the_place_of_the_one_that_is_served() -> None:
    replica = Replica(4)
    [first] = ask(replica, [20, 21])
    replica.system.run_until(lambda: len(first.tokens) >= 2)

    again = Answer(attrs.evolve(first.message, generated=pack_tokens(first.tokens[:1]), attempt=2))
    replica.asker.submit_again(again)
    replica.finish()

    assert isinstance(first.error, Aborted)
    assert again.tokens_behind(1) == expected([20, 21], 10)[1:]


def test_a_full_queue_is_no_reason_to_refuse_what_was_admitted_before() -> None:
    replica = Replica(1)
    ask(replica, *([[20, 21]] * 9))
    again = Answer(submit([20], max_tokens=3))
    replica.asker.submit_again(again)
    replica.finish()

    assert any(isinstance(answer.error, Overloaded) for answer in replica.asker.answers)
    assert again.tokens == expected([20], 3)


@pytest.mark.parametrize(("generated", "said"), [([VOCAB], str(VOCAB)), ([20] * 11, "11 tokens were generated before")])
def test_tokens_that_cannot_have_been_generated_are_refused(generated: list[int], said: str) -> None:
    replica = Replica(1)
    answer = Answer(submit([20], max_tokens=10, generated=pack_tokens(generated)))
    replica.asker.submit_again(answer)
    replica.finish()

    assert isinstance(answer.error, RequestInvalid)
    assert said in str(answer.error)


@pytest.mark.guarantee("R43")
def test_a_failed_dispatch_fails_its_requests_and_no_others() -> None:
    replica = Replica(3, Fault(dispatch=6, kind="fail"), max_num_seqs=1)

    [failing, fine] = ask(replica, [20, 21], [22, 23])
    replica.finish()

    assert isinstance(failing.error, KernelError)
    assert fine.tokens == expected([22, 23], 10)


@pytest.mark.guarantee("R65")
@settings(deadline=None, max_examples=40, print_blob=True)
@given(seed=st.integers(0, 2**16), behind=st.integers(1, 9), after_tokens=st.integers(1, 6))
def test_a_failed_dispatch_spares_the_step_behind_it(seed: int, behind: int, after_tokens: int) -> None:
    replica = Replica(seed)
    failed: list[set[str]] = []
    fail = replica.core._step_failed

    def step_failed(step: Any, error: ChipbusError) -> None:
        failed.append({row.request_id for row in step.batch.record.rows if row.request_id in replica.core._serving})
        fail(step, error)

    replica.core._step_failed = step_failed  # type: ignore[method-assign]
    prompts = [[20, 21, 22], BEGINNING, [*BEGINNING, 60], [*BEGINNING[:12], 70, 71]]
    ask(replica, *prompts[:2])
    first = replica.asker.answers[0]
    replica.system.run_until(lambda: len(first.items) >= after_tokens)
    chip = replica.chip._chip
    assert isinstance(chip, NullChip)
    chip._faults = (Fault(dispatch=chip._launches + behind, kind="fail"),)
    ask(replica, *prompts[2:])
    replica.finish()

    answers = {answer.message.request_id: answer for answer in replica.asker.answers}
    assert len(failed) == 1, "what fails behind it, because it failed, does not count"
    assert {name for name, answer in answers.items() if answer.error is not None} == failed[0]
    for answer, prompt in zip(answers.values(), prompts, strict=True):
        assert answer.tokens == expected(prompt, 10)[: len(answer.tokens)]
        assert len(answer.tokens) == 10 or isinstance(answer.error, KernelError)


@settings(deadline=None, max_examples=40, print_blob=True)
@given(seed=st.integers(0, 2**16), dispatch=st.integers(1, 12), death=st.booleans())
def test_of_prompts_that_begin_alike_nobody_is_lost_with_who_computed_for_all(
    seed: int, dispatch: int, death: bool
) -> None:
    replica = Replica(seed, *(() if death else (Fault(dispatch=dispatch, kind="fail"),)))
    prompts = [BEGINNING, [*BEGINNING, 60], [*BEGINNING[:12], 70], [80, 81], BEGINNING]
    answers = ask(replica, *prompts)
    if death:
        replica.system.run_until(lambda: replica.core._next_dispatch_id > dispatch)
        replica.system.kill("chip.0.0", "signal 9 (SIGKILL)")
        replica.start_chip()
    replica.finish()

    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.tokens == expected(prompt, 10)[: len(answer.tokens)]
        assert len(answer.tokens) == 10 or isinstance(answer.error, KernelError)
    assert not death or all(answer.error is None for answer in answers)
    assert answers[0].error is None or any(answer.error is None for answer in answers), "who comes next goes on"


def test_a_burst_of_prompts_that_begin_alike_is_told_what_was_found_and_the_statistics_add_up() -> None:
    replica = Replica(3)
    prompts = [[*BEGINNING, 60 + number] for number in range(4)]
    answers = ask(replica, *prompts, max_tokens=3)
    replica.finish()
    told = Answer(ReplicaStatisticsRequest())
    replica.asker.submit_again(told)
    replica.system.run_until(lambda: told.is_over)

    found = [answer.reply.num_cached_tokens for answer in answers]
    assert min(found[1:]) >= 8, "at least what the first chunk fills is found by the others"
    assert told.reply.prompt_tokens == 20 + 4, "each page once, and each prompt's last token"
    assert (told.reply.prefix_queries, told.reply.prefix_hits) == (4 * 21, 4 * 21 - 24)
    assert sum(found) == told.reply.prefix_hits, "found before its first chunk or between two"


@pytest.mark.guarantee("R66")
def test_the_chip_has_its_next_step_before_it_is_done_with_one() -> None:
    replica = Replica(3)
    [answer] = ask(replica, [20, 21], max_tokens=40)
    replica.system.run_until(lambda: len(answer.tokens) == 3)
    idle = []
    finish = replica.core._finish_step

    def finish_step(step: Any, completions: Any) -> None:
        idle.append(replica.chip._jobs_given == replica.chip._jobs_done)
        finish(step, completions)

    replica.core._finish_step = finish_step  # type: ignore[method-assign]
    replica.finish()

    assert answer.tokens == expected([20, 21], 40)
    assert idle == [False] * (len(idle) - 1) + [True]
    assert len(idle) > 30


def test_a_cancelled_request_gives_its_pages_back_at_once() -> None:
    replica = Replica(5)
    [cancelled, other] = ask(replica, [20, 21], [22, 23])
    replica.system.run_until(lambda: len(cancelled.tokens) >= 2)

    replica.asker.cancel(cancelled)
    cancelled.is_cancelled = True
    replica.finish()

    assert other.tokens == expected([22, 23], 10)
    assert not isinstance(cancelled.error, Aborted)
    assert len(cancelled.tokens) < 10


def test_refusals_are_typed_and_keep_nothing() -> None:
    replica = Replica(1)

    answers = ask(replica, [], [VOCAB], [20] * 64, *([[20]] * 8))
    replica.finish()

    assert isinstance(answers[0].error, RequestInvalid)
    assert str(VOCAB) in str(answers[1].error)
    assert isinstance(answers[2].error, ContextTooLong)
    assert any(isinstance(answer.error, Overloaded) for answer in answers[3:])


def test_the_core_reports_ready_only_when_its_chip_can_serve() -> None:
    replica = Replica(2)
    assert replica.core._lane.is_ready or not replica.core._is_reported_ready

    replica.system.run_until(lambda: replica.core._is_reported_ready)

    assert replica.core._lane.is_ready


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> tuple[int, list[float]]:
        replica = Replica(seed)
        answers = ask(replica, [20, 21, 22], list(range(30, 50)), [60])
        replica.finish()
        return replica.system.clock.now_ns(), [answer.reply.queued_s + answer.reply.decode_s for answer in answers]

    assert run(11) == run(11)


@pytest.mark.guarantee("R58")
def test_a_request_is_told_how_much_of_its_prompt_was_found_and_the_statistics_add_up() -> None:
    replica = Replica(3, max_num_seqs=1)
    prompt = list(range(20, 33))
    answers = ask(replica, prompt, prompt, [*prompt[:6], 50, 51, 52], max_tokens=3)
    replica.finish()
    told = Answer(ReplicaStatisticsRequest())
    replica.asker.submit_again(told)
    replica.system.run_until(lambda: told.is_over)

    assert [answer.reply.num_cached_tokens for answer in answers] == [0, 12, 4]
    statistics = told.reply
    assert (statistics.prefix_queries, statistics.prefix_hits) == (13 + 13 + 9, 16)
    assert statistics.prompt_tokens == 13 + 1 + 5
    assert (statistics.pages_free, statistics.pages_cached) == (statistics.pages_total, 4)
    assert (statistics.pending_tokens, statistics.preemptions) == (0, 0)
    programs = {program.program: (program.dispatches, program.tokens) for program in statistics.programs}
    each = (statistics.steps, statistics.tokens_generated)
    assert programs == {
        "prefill": (4, 19),  # of 13 tokens 8 and 5, as a chunk has 8; of the others one each
        "decode": (6, 6),
        "final_norm": (9, 9),
        "lm_head": (9, 9),
        "sample": (9, 9),
    }
    assert each == (10, 9)
    assert statistics.device_ns == sum(program.device_ns for program in statistics.programs) > 0


@pytest.mark.guarantee("R59")
def test_a_request_with_a_lower_priority_number_overtakes_those_that_wait() -> None:
    replica = Replica(3, max_num_seqs=1)
    ask(replica, [20, 21], [22, 23])
    urgent = Answer(attrs.evolve(submit([24, 25], max_tokens=3), handling=Handling(priority=-1), attempt=1))
    replica.asker.submit_again(urgent)
    replica.system.run_until(lambda: urgent.is_over)

    assert not replica.asker.answers[1].items
    replica.finish()


@pytest.mark.guarantee("R69")
@pytest.mark.parametrize("pin", [{"replica": 1}, {"dp_rank": 1}])
def test_a_core_refuses_what_is_pinned_to_another(pin: dict[str, int]) -> None:
    replica = Replica(3)
    astray, right = (
        Answer(attrs.evolve(submit([24, 25], max_tokens=3), request_id=f"r{n}", handling=Handling(**where), attempt=1))
        for n, where in enumerate((pin, dict.fromkeys(pin, 0)))
    )
    replica.asker.submit_again(astray)
    replica.asker.submit_again(right)
    replica.system.run_until(lambda: astray.is_over and right.is_over)

    assert type(astray.error) is BadTarget
    assert f"{next(iter(pin))} 1 was asked of the core that is" in str(astray.error)
    assert right.error is None


def statistics_of(replica: Replica) -> ReplicaStatistics:
    told = Answer(ReplicaStatisticsRequest())
    replica.asker.submit_again(told)
    replica.system.run_until(lambda: told.is_over)
    statistics: ReplicaStatistics = told.reply
    return statistics


@pytest.mark.guarantee("M24")
def test_each_step_is_one_observation_of_the_tokens_it_computed() -> None:
    replica = Replica(3, max_num_seqs=2)
    ask(replica, list(range(20, 33)), [40], [50, 51, 52], max_tokens=3)
    replica.finish()

    statistics = statistics_of(replica)

    computed = {program.program: program.tokens for program in statistics.programs}
    assert sum(statistics.step_tokens.counts) == statistics.steps
    assert statistics.step_tokens.total == computed["prefill"] + computed["decode"] == 17 + 6
    assert statistics.step_tokens.counts[:3] != (statistics.steps, 0, 0), "a chunk of eight with one that decodes"


@pytest.mark.guarantee("M29")
def test_a_chip_that_was_given_up_is_a_poisoned_lane_until_it_is_replaced() -> None:
    replica = Replica(5)
    assert statistics_of(replica).poisoned_lanes == 0
    assert replica.chip._compute is not None
    replica.chip._compute.submit = lambda *_: None  # type: ignore[method-assign]
    [answer] = ask(replica, [20, 21])
    replica.system.run_until(lambda: replica.core._lane.first_cause is not None, limit_s=100)

    assert statistics_of(replica).poisoned_lanes == 1
    replica.system.kill("chip.0.0", "signal 9 (SIGKILL)")
    replica.system.run_until(lambda: "chip.0.0" not in replica.core.ctx.peers())
    assert statistics_of(replica).poisoned_lanes == 0
    replica.start_chip()
    replica.finish()
    assert answer.is_over
