"""Router: the load ledger against sums, and the actor among scripted replicas in every order that may happen."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_actors import Answer, Asker, ScriptedReplica, Supervisor, counting, pass_time

from chipbus.actors.handling import ANYHOW, Handling, pinned_replica
from chipbus.actors.messages.routing import Routed, Withheld, Withhold
from chipbus.actors.messages.serving import Submit
from chipbus.actors.messages.tree import GroupLost
from chipbus.actors.router import RouterActor
from chipbus.actors.router_policy import LoadLedger, Sessions, Target
from chipbus.bus import Actor, Call, LocalSystem, handles, pack_tokens
from chipbus.errors import (
    Aborted,
    BadTarget,
    ChipbusError,
    ConfigError,
    DeadlineExceeded,
    NotReady,
    Overloaded,
    PinOverloaded,
    RequestInvalid,
    RestartLimit,
    WorkerDied,
)

TARGETS = [Target(n, n) for n in range(3)]


def test_the_least_loaded_target_is_chosen_and_ties_rotate():
    ledger = LoadLedger(TARGETS)
    chosen = []
    for key in range(6):
        target = ledger.choose(TARGETS)
        chosen.append(target.replica)
        ledger.reserve(key, target, 10, 10)
    assert chosen == [0, 1, 2, 0, 1, 2]
    ledger.release(1)
    assert ledger.choose(TARGETS) == TARGETS[1]
    assert ledger.choose([TARGETS[0], TARGETS[2]]) in (TARGETS[0], TARGETS[2])


def test_ties_rotate_also_when_nothing_is_under_way():
    ledger = LoadLedger(TARGETS)
    assert [ledger.choose(TARGETS).replica for _ in range(4)] == [0, 1, 2, 0]


def test_of_equally_loaded_targets_the_one_with_fewer_requests_is_chosen():
    ledger = LoadLedger(TARGETS[:2])
    ledger.reserve(1, TARGETS[0], 10, 0)
    ledger.reserve(2, TARGETS[0], 10, 0)
    ledger.reserve(3, TARGETS[1], 20, 0)
    assert [ledger.choose(TARGETS[:2]).replica for _ in range(3)] == [1, 1, 1]


def test_load_falls_by_the_prompt_at_the_first_token_and_by_one_for_each_token():
    ledger = LoadLedger(TARGETS)
    ledger.reserve(1, TARGETS[0], 100, 5)
    loads = [ledger.load(TARGETS[0])]
    for tokens in (0, 1, 2, 9):
        ledger.generated(1, tokens)
        loads.append(ledger.load(TARGETS[0]))
    assert loads == [105, 105, 4, 2, 0]
    ledger.release(1)
    assert ledger.load(TARGETS[0]) == 0


@pytest.mark.guarantee("R87")
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 50), st.integers(0, 20))))
@settings(max_examples=150, deadline=None, print_blob=True)
def test_every_load_is_the_sum_of_its_requests_whatever_happens(moves):
    ledger = LoadLedger(TARGETS)
    open_requests: dict[int, tuple[Target, int, int]] = {}
    for kind, key, a, b in moves:
        if kind == 0 and key not in open_requests:
            target = ledger.choose(TARGETS)
            loads = {t: sum(p + o for u, p, o in open_requests.values() if u == t) for t in TARGETS}
            assert loads[target] == min(loads.values())
            ledger.reserve(key, target, a, b)
            open_requests[key] = (target, a, b)
            with pytest.raises(AssertionError, match="reserved already"):
                ledger.reserve(key, target, a, b)
        elif kind == 1 and key in open_requests:
            target, prompt, output = open_requests[key]
            ledger.generated(key, b)
            open_requests[key] = (target, 0 if b else prompt, max(output - b, 0))
        elif kind == 2 and key in open_requests:
            ledger.release(key)
            del open_requests[key]
        ledger.check_integrity()
        for target in TARGETS:
            mine = [prompt + output for at, prompt, output in open_requests.values() if at == target]
            assert ledger.load(target) == sum(mine) >= 0
            assert ledger.num_requests(target) == len(mine)
    for key in list(open_requests):
        ledger.release(key)
        with pytest.raises(KeyError):
            ledger.release(key)
    assert [ledger.load(target) for target in TARGETS] == [0, 0, 0]
    assert not ledger.keys()


SECOND = 1_000_000_000


class NaiveSessions:
    """The same as a plain list of who was where when, longest unused first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: list[tuple[str, Target, int]] = []

    def at(self, session: str, now_ns: int) -> Target | None:
        found = [target for name, target, when in self.used if name == session and now_ns < when + 600 * SECOND]
        return found[0] if found else None

    def bind(self, session: str, target: Target, now_ns: int) -> None:
        others = [entry for entry in self.used if entry[0] != session and now_ns < entry[2] + 600 * SECOND]
        self.used = [*others, (session, target, now_ns)][-self.most :]

    def drop(self, target: Target) -> None:
        self.used = [entry for entry in self.used if entry[1] != target]


@pytest.mark.guarantee("R85")
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("request"), st.sampled_from("abcde"), st.sets(st.sampled_from(TARGETS), min_size=1)),
            st.tuples(st.just("wait"), st.sampled_from([1, 300, 599, 600])),
            st.tuples(st.just("drop"), st.sampled_from(TARGETS)),
            st.tuples(st.just("busy"), st.sampled_from(TARGETS), st.integers(1, 9)),
        ),
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None, print_blob=True)
def test_a_session_is_where_it_was_unless_forgotten_dropped_not_eligible_or_too_busy(moves):
    class Few(Sessions):
        MAX_SESSIONS = 3

    sessions, naive, ledger, now_ns, number = Few(), NaiveSessions(3), LoadLedger(TARGETS), 0, 0
    for move in moves:
        if move[0] == "request":
            _, session, eligible = move
            found = sessions.target(session, eligible, ledger, now_ns)
            at = naive.at(session, now_ns)
            open_requests = {target: ledger.num_requests(target) for target in eligible}
            stays = at in eligible and open_requests[at] - min(open_requests.values()) <= 8
            assert found == (at if stays else None)
            target = found or ledger.choose(eligible)
            sessions.bind(session, target, now_ns)
            naive.bind(session, target, now_ns)
            assert len(sessions) <= 3
        elif move[0] == "wait":
            now_ns += move[1] * SECOND
        elif move[0] == "drop":
            sessions.drop(move[1])
            naive.drop(move[1])
        else:
            for number in range(number, number + move[2]):  # noqa: B020
                ledger.reserve(str(number), move[1], 0, 0)
            number += 1


def test_a_hundred_thousand_sessions_are_kept_for_ten_minutes():
    assert (Sessions.MAX_SESSIONS, Sessions.TTL_S, Sessions.SLACK) == (100_000, 600, 8)


class House:
    """One client, a router, and scripted replicas."""

    def __init__(self, replicas: int = 1, seed: int = 0, max_waiting: int = 100, **scripted: object) -> None:
        self.system = LocalSystem(seed)
        self.scripted = scripted
        self.names = [f"replica.{n}" for n in range(replicas)]
        self.max_waiting = max_waiting
        self.supervisor = Supervisor()
        self.replicas: dict[str, ScriptedReplica] = {}
        self.gone: list[ScriptedReplica] = []
        self.clients: list[Asker] = []
        self.system.spawn("supervisor", self.supervisor)
        self.start_client()
        self.start_router()

    def start_client(self) -> None:
        self.client = Asker("router")
        self.clients.append(self.client)
        self.system.spawn("tokenizer.0", self.client, connect=("supervisor",))

    def start_router(self) -> None:
        self.router = RouterActor({"replicas": self.names, "max_waiting": self.max_waiting, "max_request_restarts": 3})
        self.system.spawn("router", self.router, connect=("supervisor", "tokenizer.0"))
        self.run(lambda: "tokenizer.0" in self.router.ctx.peers())

    def start_replicas(self) -> None:
        for name in self.names:
            self.start_replica(name)

    def start_replica(self, name: str) -> None:
        replica = self.replicas[name] = ScriptedReplica(int(name.split(".")[1]), **self.scripted)  # type: ignore[arg-type]
        self.system.spawn(name, replica, connect=("supervisor", "router"))
        self.run(lambda: "router" in replica.ctx.peers() or "router" not in self.alive())

    def alive(self) -> set[str]:
        return {name for name in ["router", "tokenizer.0", *self.names] if self.system.incarnation(name)}

    def kill(self, name: str) -> None:
        self.system.kill(name, "signal 9 (SIGKILL)")

    def run(self, until, limit_s: float = 1e6) -> None:
        """Run; the router's books are checked between any two events."""

        def done() -> bool:
            self.router.check_integrity()
            return until()

        self.system.run_until(done, limit_s)

    def finish(self) -> None:
        self.run(lambda: all(answer.is_over for answer in self.client.answers))

    def settle(self) -> None:
        """Nothing is under way any more, anywhere."""
        self.run(lambda: not any(self.router.load().values()) and not any(r.open for r in self.replicas.values()))


class Deaf(Actor):
    """Takes requests and never answers."""

    @handles(Submit)
    def _submit(self, _message: Submit, call: Call) -> None:
        pass


def submit(house: House, prompt: list[int] | None = None, **params: object) -> Answer:
    return house.client.submit(prompt or [1, 2, 3], **params)


@pytest.mark.guarantee("R20")
def test_a_request_passes_through_with_one_replica_and_its_end_names_the_replica():
    house = House()
    house.start_replicas()
    answer = submit(house, max_tokens=7)
    house.finish()
    assert answer.items[0] == Routed(replica=0, dp_rank=0, chosen_by="load")
    assert answer.tokens == counting(answer.message)
    assert (answer.reply.replica, answer.reply.dp_rank, answer.reply.queued_s) == (0, 0, 0.25)
    house.settle()


def test_the_router_tells_the_supervisor_that_it_is_ready():
    house = House()
    house.run(lambda: house.supervisor.ready == ["router"])


@pytest.mark.guarantee("R21")
def test_requests_go_to_the_replica_with_the_fewest_pending_tokens():
    house = House(replicas=2, pause_s=100.0)
    house.start_replicas()
    long = submit(house, [1] * 50, max_tokens=100)
    house.run(lambda: any("r0" in replica.seen for replica in house.replicas.values()))
    busy = next(name for name, replica in house.replicas.items() if "r0" in replica.seen)
    short = [submit(house, [2], max_tokens=2) for _ in range(5)]
    house.run(lambda: all(answer.items for answer in short))
    assert {answer.items[0].replica for answer in short} == {1 - int(busy[-1])}
    house.finish()
    assert long.reply.replica == int(busy[-1])
    house.settle()


def test_load_is_exact_while_tokens_flow():
    house = House(pause_s=50.0)
    house.start_replicas()
    answer = submit(house, [1, 2, 3], max_tokens=40)
    seen = set()

    def ended() -> bool:
        load = house.router.load()["replica.0"]
        seen.add(load)
        return answer.is_over

    house.run(ended)
    assert {43, 0} <= seen <= {43, *range(41)}
    assert len(seen) > 10


@pytest.mark.guarantee("R22")
def test_a_cancel_reaches_the_replica_and_frees_the_load():
    house = House(pause_s=100.0)
    house.start_replicas()
    answer = submit(house)
    house.run(lambda: len(answer.items) > 1)
    house.client.cancel(answer)
    house.settle()
    assert house.replicas["replica.0"].cancelled == [("r0", "its caller cancelled it")]


def test_the_death_of_the_caller_is_a_cancel():
    house = House(pause_s=100.0)
    house.start_replicas()
    submit(house)
    house.run(lambda: bool(house.replicas["replica.0"].open))
    house.kill("tokenizer.0")
    house.settle()
    assert [request_id for request_id, _ in house.replicas["replica.0"].cancelled] == ["r0"]


@pytest.mark.guarantee("R23")
def test_the_requests_of_a_dead_replica_go_on_at_another_one_at_once():
    house = House(replicas=2, pause_s=100.0)
    house.start_replicas()
    answers = [submit(house, max_tokens=30) for _ in range(4)]
    house.run(lambda: all(len(answer.items) > 1 for answer in answers))
    began_ns = house.system.clock.now_ns()
    house.kill("replica.0")
    lost = [answer for answer in answers if answer.items[0].replica == 0]
    assert len(lost) == 2
    moved = Routed(replica=1, dp_rank=1, chosen_by="load")
    house.run(lambda: all(moved in answer.items for answer in lost))
    assert house.system.clock.now_ns() == began_ns
    house.finish()
    for answer in answers:
        assert answer.tokens == counting(answer.message)
        assert answer.reply.replica == 1


def test_a_request_that_only_costs_replicas_is_refused():
    house = House(pause_s=100.0)
    house.start_replicas()
    answer = submit(house)
    house.run(lambda: len(answer.items) > 1)
    for _ in range(3):
        house.kill("replica.0")
        house.run(lambda: "replica.0" not in house.router.ctx.peers())
        house.replicas.pop("replica.0", None)
        house.system.spawn("replica.0", Deaf(), connect=("router",))
        house.run(lambda: house.router.load()["replica.0"] > 0)
        assert not answer.is_over
    house.kill("replica.0")
    house.finish()
    assert type(answer.error) is WorkerDied
    assert "signal 9 (SIGKILL)" in str(answer.error)
    assert "max_request_restarts" in str(answer.error)
    house.settle()


def test_a_later_attempt_takes_the_place_of_the_one_under_way():
    house = House(pause_s=100.0)
    house.start_replicas()
    first = submit(house)
    house.run(lambda: len(first.tokens) > 1)
    again = house.client.submit_again(
        Answer(attrs.evolve(first.message, generated=pack_tokens(first.tokens[:1]), attempt=2))
    )
    house.finish()
    assert type(first.error) is Aborted
    assert again.tokens_behind(1) == counting(again.message)[1:]
    house.settle()


def test_a_full_replica_is_passed_over():
    house = House(replicas=2)
    house.system.spawn("replica.0", Full(), connect=("router",))
    house.start_replica("replica.1")
    answers = [submit(house) for _ in range(5)]
    house.finish()
    assert {answer.reply.replica for answer in answers} == {1}
    house.settle()


def test_a_replica_serves_again_after_its_restart():
    house = House()
    house.start_replicas()
    house.kill("replica.0")
    pass_time(house.system, 1)
    answer = submit(house)
    pass_time(house.system, 1)
    assert not answer.is_over, "it waits"
    house.start_replica("replica.0")
    house.finish()
    assert answer.tokens == counting(answer.message)


@pytest.mark.guarantee("R24")
def test_requests_wait_for_a_replica_bounded_by_number_and_deadline():
    house = House(max_waiting=2)
    waiting, impatient = submit(house), submit(house, timeout_s=5.0)
    refused = submit(house)
    house.run(lambda: impatient.is_over and refused.is_over)
    assert type(refused.error) is Overloaded
    assert "2 requests wait for one; at most 2 may" in str(refused.error)
    assert type(impatient.error) is DeadlineExceeded
    assert not waiting.is_over
    house.start_replicas()
    house.finish()
    assert waiting.tokens == counting(waiting.message)
    assert house.replicas["replica.0"].seen == ["r0"]


@pytest.mark.guarantee("R25")
def test_a_lost_group_is_left_out_and_the_last_one_ends_service():
    house = House(replicas=2, pause_s=100.0)
    house.start_replicas()
    answers = [submit(house, max_tokens=30) for _ in range(2)]
    house.run(lambda: all(len(answer.items) > 1 for answer in answers))
    house.supervisor.ctx.tell("router", GroupLost("chip.0.0", "chip.0.0 died 6 times in 30 s"))
    first = next(answer for answer in answers if answer.items[0].replica == 0)
    house.run(lambda: Routed(replica=1, dp_rank=1, chosen_by="load") in first.items)
    after = [submit(house, max_tokens=2) for _ in range(3)]
    house.run(lambda: all(answer.is_over for answer in after))
    assert {answer.reply.replica for answer in after} == {1}
    house.supervisor.ctx.tell("router", GroupLost("replica.1", "replica.1 died 6 times in 30 s"))
    house.supervisor.ctx.tell("router", GroupLost("tokenizer.0", "not the router's business"))
    house.finish()
    late = submit(house)
    house.finish()
    assert type(late.error) is NotReady
    assert {type(answer.error) for answer in answers} == {RestartLimit}
    for answer in (*answers, late):
        assert "replica 0: chip.0.0 died 6 times in 30 s; replica 1: replica.1 died" in str(answer.error)
    house.settle()


def test_waiting_requests_fail_when_the_last_replica_is_lost():
    house = House()
    answer = submit(house)
    pass_time(house.system, 1)
    assert not answer.is_over
    house.supervisor.ctx.tell("router", GroupLost("replica.0", "gone"))
    house.finish()
    assert type(answer.error) is RestartLimit


def test_an_error_of_the_replica_reaches_the_caller_as_it_is():
    house = House()
    house.system.spawn("replica.0", Full(), connect=("router",))
    answer = submit(house)
    house.finish()
    assert type(answer.error) is Overloaded
    assert str(answer.error) == "8 requests are waiting"
    house.settle()


def test_an_end_that_is_no_end_fails_the_request():
    class Odd(Actor):
        @handles(Submit)
        def _submit(self, _message: Submit, call: Call) -> None:
            call.reply(Routed(replica=0, dp_rank=0))

    house = House()
    house.system.spawn("replica.0", Odd(), connect=("router",))
    answer = submit(house)
    house.finish()
    assert "replica.0 ended a request with Routed, not TokensDone" in str(answer.error)
    house.settle()


@pytest.mark.parametrize("name", ["router", "replica", "replica.x", "chip.0"])
def test_a_replica_must_have_a_number(name):
    with pytest.raises(ConfigError, match=r"is not replica\.N"):
        RouterActor({"replicas": [name], "max_waiting": 1, "max_request_restarts": 3})


class Full(Actor):
    """A replica whose queue is full."""

    @handles(Submit)
    def _submit(self, _message: Submit, call: Call) -> None:
        call.fail(Overloaded("8 requests are waiting"))


@pytest.mark.guarantee("R80")
@pytest.mark.parametrize("pin", [{"replica": 0}, {"dp_rank": 0}, {"replica": 0, "dp_rank": 0}])
def test_a_pinned_request_goes_where_it_is_pinned_to_and_waits_for_its_next_life(pin):
    house = House(replicas=2, pause_s=10.0)
    house.start_replicas()
    busy = submit(house, [1] * 50, max_tokens=100, handling=Handling(replica=0))
    pinned = [submit(house, max_tokens=20, handling=Handling(**pin)) for _ in range(3)]
    house.run(lambda: all(len(answer.items) > 1 for answer in pinned))
    house.kill("replica.0")
    late = submit(house, handling=Handling(**pin, session="a"))
    free = submit(house, handling=Handling(session="a"))
    house.run(lambda: free.is_over)
    assert free.reply.replica == 1
    assert not any(answer.is_over for answer in (*pinned, late)), "they wait, though another one is up"
    house.start_replica("replica.0")
    house.finish()
    for answer in (busy, *pinned, late):
        assert (answer.reply.replica, answer.reply.chosen_by) == (0, "pin")
        assert answer.tokens == counting(answer.message)
    house.settle()


@pytest.mark.guarantee("R81")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"replica": 2}, "replica 2 is outside [0, 2)"),
        ({"dp_rank": 2}, "dp_rank 2 is outside [0, 2)"),
        ({"replica": 0, "dp_rank": 7}, "dp_rank 7 is outside [0, 2)"),
        ({"replica": 0, "dp_rank": 1}, "replica 0 holds dp_rank 0, not 1; give one of the two"),
        ({"replica": 1, "dp_rank": 0}, "replica 1 holds dp_rank 1, not 0; give one of the two"),
    ],
)
def test_a_target_that_is_none_is_refused_with_the_rule(fields, says):
    house = House(replicas=2)
    house.start_replicas()
    answer = submit(house, handling=Handling(**fields))
    house.finish()
    assert (type(answer.error), str(answer.error)) == (BadTarget, says)
    assert not any(replica.seen for replica in house.replicas.values())


def test_a_session_is_text_that_can_travel():
    for wrong in ("\ud800", "x" * 257, 5, None):
        with pytest.raises(RequestInvalid, match="session is"):
            Handling(session=wrong)


def test_none_is_no_rank_and_zero_is_one():
    assert pinned_replica(Handling(), 2) is None
    assert pinned_replica(Handling(dp_rank=0), 2) == pinned_replica(Handling(replica=0), 1) == 0
    for wrong in (True, -1, "0", 1.0, 2**31):
        for name in ("replica", "dp_rank"):
            with pytest.raises(BadTarget, match=name):
                Handling(**{name: wrong})


@pytest.mark.guarantee("R82")
def test_a_request_pinned_to_a_full_replica_is_refused_though_another_has_room():
    house = House(replicas=2, max_waiting=1)
    house.system.spawn("replica.0", Full(), connect=("router",))
    house.start_replica("replica.1")
    refused, served = submit(house, handling=Handling(replica=0)), submit(house)
    house.finish()
    assert type(refused.error) is PinOverloaded
    assert str(refused.error) == "replica 0, which the request is pinned to, takes no more: 8 requests are waiting"
    assert served.reply.replica == 1
    house.kill("replica.0")
    house.run(lambda: "replica.0" not in house.router.ctx.peers())
    waiting = submit(house, handling=Handling(replica=0))
    pass_time(house.system, 1)
    refused, served = submit(house, handling=Handling(replica=0)), submit(house)
    house.run(lambda: refused.is_over and served.is_over)
    assert type(refused.error) is PinOverloaded
    assert "is not up and 1 requests wait for one; at most 1 may" in str(refused.error)
    assert served.reply.replica == 1
    assert not waiting.is_over


def test_what_was_admitted_before_waits_however_many_wait_already():
    house = House(max_waiting=1)
    submit(house)
    pass_time(house.system, 1)
    again = house.client.submit_again(Answer(attrs.evolve(submit(house).message, request_id="again", attempt=2)))
    pass_time(house.system, 1)
    assert not again.is_over
    house.start_replicas()
    house.finish()
    assert again.tokens == counting(again.message)


def test_when_every_queue_is_full_the_request_is_refused():
    house = House(replicas=2)
    for name in house.names:
        house.system.spawn(name, Full(), connect=("router",))
    house.run(lambda: len(house.router.ctx.peers()) == 4)
    answer = submit(house)
    house.finish()
    assert type(answer.error) is Overloaded
    assert len([item for item in answer.items if isinstance(item, Routed)]) == 2


@pytest.mark.guarantee("R83")
def test_a_replica_lost_for_good_ends_what_is_pinned_to_it_and_refuses_more():
    house = House(replicas=2, pause_s=10.0)
    house.start_replicas()
    pinned, free = submit(house, max_tokens=50, handling=Handling(replica=0)), submit(house, max_tokens=50)
    house.run(lambda: len(pinned.items) > 1)
    house.supervisor.ctx.tell("router", GroupLost("replica.0", "replica.0 died 6 times in 30 s"))
    house.run(lambda: pinned.is_over)
    late, other = submit(house, handling=Handling(dp_rank=0)), submit(house, handling=Handling(replica=1))
    house.finish()
    assert [type(answer.error) for answer in (pinned, late)] == [RestartLimit, NotReady]
    for answer in (pinned, late):
        assert "pinned to stays down (replica 0: replica.0 died 6 times in 30 s)" in str(answer.error)
    assert [answer.reply.replica for answer in (free, other)] == [1, 1]
    house.settle()


@pytest.mark.guarantee("R84")
def test_a_session_stays_where_it_is_until_that_is_too_busy_or_dies():
    house = House(replicas=3, pause_s=100.0)
    house.start_replicas()
    in_session = Handling(session="s")
    [first, *others] = [submit(house, handling=in_session) for _ in range(9)]
    house.run(lambda: all(answer.items for answer in (first, *others)))
    home = first.items[0].replica
    assert first.items[0].chosen_by == "load"
    assert {(answer.items[0].replica, answer.items[0].chosen_by) for answer in others} == {(home, "session")}
    moved = submit(house, handling=in_session)
    house.run(lambda: moved.items)
    assert (moved.items[0].replica != home, moved.items[0].chosen_by) == (True, "load")
    after = submit(house, handling=in_session)
    house.run(lambda: after.items)
    assert after.items[0] == attrs.evolve(moved.items[0], chosen_by="session")
    house.kill(f"replica.{after.items[0].replica}")
    del house.replicas[f"replica.{after.items[0].replica}"]
    house.run(lambda: "Routed" in [type(item).__name__ for item in after.items[1:]])
    later = submit(house, handling=in_session)
    house.run(lambda: later.items)
    [gone, there] = [item.replica for item in after.items if isinstance(item, Routed)]
    assert there != gone
    assert (later.items[0].replica, later.items[0].chosen_by) == (there, "session"), "it went on with its requests"
    house.finish()
    house.settle()


@pytest.mark.parametrize("seed", range(3))
def test_a_session_does_not_outlive_the_replica_it_was_at(seed):
    house = House(replicas=2, seed=seed)
    house.start_replicas()
    first = submit(house, handling=Handling(session="s"))
    house.finish()
    home = f"replica.{first.reply.replica}"
    house.kill(home)
    house.run(lambda: home not in house.router.ctx.peers())
    house.start_replica(home)
    again = submit(house, handling=Handling(session="s"))
    house.finish()
    assert [answer.reply.chosen_by for answer in (first, again)] == ["load", "load"]


def test_the_record_says_who_chose_the_replica():
    class Ledger:
        def __init__(self):
            self.entries = []

        def append(self, kind, content):
            self.entries.append((kind, content))

    house = House(replicas=2)
    house.start_replicas()
    house.router.ctx.ledger = ledger = Ledger()
    answers = [submit(house, handling=handling) for handling in (ANYHOW, Handling(replica=1), Handling(session="x"))]
    answers.append(submit(house, handling=Handling(session="x")))
    house.finish()
    assert [(kind, content["chosen_by"]) for kind, content in ledger.entries] == [
        ("route", answer.reply.chosen_by) for answer in answers
    ]
    assert [answer.reply.chosen_by for answer in answers] == ["load", "pin", "load", "session"]


moves = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(1, 9),
            st.integers(1, 12),
            st.sampled_from([2.0, 10.0, 300.0]),
            st.sampled_from([ANYHOW, ANYHOW, Handling(replica=0), Handling(session="a"), Handling(session="b")]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("pass"), st.floats(0.0, 3.0)),
        st.tuples(st.just("replica"), st.integers(0, 2)),
        st.tuples(st.just("router")),
        st.tuples(st.just("client")),
    ),
    max_size=25,
)


@pytest.mark.guarantee("R26")
@given(moves, st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=60, deadline=None, print_blob=True)
def test_whatever_happens_every_request_ends_once_with_its_own_tokens_and_the_load_is_zero(moves, seed, replicas):
    house = House(replicas, seed, max_waiting=4, refuses=True)
    house.start_replicas()
    for move in moves:
        if move[0] == "submit":
            prompt = [len(house.client.answers) + 1] * move[1]
            house.client.submit(prompt, max_tokens=move[2], timeout_s=move[3], handling=move[4])
        elif move[0] == "cancel" and house.client.answers:
            house.client.cancel(house.client.answers[move[1] % len(house.client.answers)])
        elif move[0] == "pass":
            pass_time(house.system, move[1])
        elif move[0] == "replica":
            name = house.names[move[1] % replicas]
            if name in house.alive():
                house.kill(name)
                del house.replicas[name]
            else:
                house.start_replica(name)
        elif move[0] == "router":
            house.kill("router")
            house.start_router()
        elif move[0] == "client":
            house.kill("tokenizer.0")
            house.start_client()
            house.run(lambda: "tokenizer.0" in house.router.ctx.peers())
    for name in set(house.names) - house.alive():
        house.start_replica(name)
    house.finish()
    house.settle()
    for answer in house.client.answers:
        assert answer.ends == (0 if answer.is_cancelled else 1)
        expected = counting(answer.message)
        assert answer.tokens == expected[: len(answer.tokens)]
        if answer.reply is not None:
            assert answer.tokens == expected
            routed = [item for item in answer.items if isinstance(item, Routed)]
            last = answer.reply
            assert routed[-1] == Routed(replica=last.replica, dp_rank=last.dp_rank, chosen_by=last.chosen_by)
            pin, session = answer.message.handling.replica, answer.message.handling.session
            if pin is not None:
                assert {(item.replica, item.chosen_by) for item in routed} == {(pin, "pin")}
            else:
                assert {item.chosen_by for item in routed} <= ({"load", "session"} if session else {"load"})
        elif answer.error is not None:
            assert type(answer.error) in (
                WorkerDied,
                DeadlineExceeded,
                Overloaded,
                PinOverloaded,
                ChipbusError,
            ) or "router" in str(answer.error)
    assert not house.router.ctx.counters().get("handler_failures")


@pytest.mark.guarantee("R27")
def test_a_replica_that_is_withheld_ends_what_it_has_and_gets_nothing_new():
    house = House(replicas=2, pause_s=10.0)
    house.start_replicas()
    old = [submit(house, max_tokens=20) for _ in range(4)]
    house.run(lambda: all(len(answer.items) > 1 for answer in old))
    heard = []
    house.supervisor.ctx.ask(
        "router",
        Withhold(replica="replica.0", incarnation=1),
        timeout_s=1e5,
        on_reply=heard.append,
        on_error=heard.append,
    )
    pass_time(house.system, 0.001)
    new = [submit(house, max_tokens=2) for _ in range(4)]
    house.run(lambda: heard != [])
    assert heard == [Withheld()]
    house.run(lambda: all(answer.is_over for answer in old if answer.items[0].replica == 0))  # told on other links
    house.finish()
    assert {answer.reply.replica for answer in new} == {1}
    assert {answer.reply.replica for answer in old} == {0, 1}
    house.kill("replica.0")
    house.start_replica("replica.0")
    after = [submit(house) for _ in range(4)]
    house.finish()
    assert {answer.reply.replica for answer in after} == {0, 1}
    house.settle()
