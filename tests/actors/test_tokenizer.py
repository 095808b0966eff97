"""Tokenizer between a host, the real router and a scripted replica: text whole, and cut at its end."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_actors import Answer, Asker, ScriptedReplica, Supervisor, pass_time
from small_tokenizers import TEXTS, byte_level_directory
from tokenizers import Tokenizer

from chipbus.actors.messages.routing import Routed
from chipbus.actors.messages.serving import (
    ChatTurn,
    Detokenize,
    Detokenized,
    Encoded,
    LogprobRow,
    Submit,
    TextDelta,
    TokenDelta,
    Tokenize,
    TokensDone,
)
from chipbus.actors.router import RouterActor
from chipbus.actors.tokenizer import TokenizerActor
from chipbus.bus import Actor, Call, LocalSystem, handles, pack_tokens, unpack_tokens
from chipbus.errors import BadFrame, CheckpointError, ContextTooLong, RequestInvalid, WorkerDied

ANSWER = "Grüße, 日本語 👩\u200d👩\u200d👧 e\u0301! END of it"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


class House:
    """A host, a tokenizer, the router and one scripted replica that answers with given tokens."""

    def __init__(self, directory: Path, tokens: list[int] | None = None, seed: int = 0, **config: object) -> None:
        self.system = LocalSystem(seed)
        self.supervisor, self.host = Supervisor(), Asker("tokenizer.0")
        self.directory, self.config = directory, {"max_model_len": 200, **config}
        self.tokens = tokens or []
        self.system.spawn("supervisor", self.supervisor)
        self.system.spawn("host", self.host)
        self.start_tokenizer()
        self.start_router()
        self.start_replica()
        self.run(lambda: set(self.host.ctx.peers()) == {"tokenizer.0"} and "replica.0" in self.router.ctx.peers())

    def start_tokenizer(self) -> None:
        tokenizer = TokenizerActor({"model": str(self.directory), "max_request_restarts": 3, **self.config})
        self.system.spawn("tokenizer.0", tokenizer, connect=("supervisor", "host"))

    def start_router(self) -> None:
        self.router = RouterActor({"replicas": ["replica.0"], "max_waiting": 100, "max_request_restarts": 3})
        self.system.spawn("router", self.router, connect=("supervisor", "tokenizer.0"))

    def start_replica(self) -> None:
        self.replica = ScriptedReplica(0, self.script)
        self.system.spawn("replica.0", self.replica, connect=("supervisor", "router"))

    def replace_replica(self, actor: Actor) -> None:
        """Another actor in the scripted replica's place."""
        self.system.kill("replica.0", "replaced")
        self.system.spawn("replica.0", actor, connect=("router",))
        self.run(lambda: self.router.ctx.peers().get("replica.0") == 2)

    def script(self, submit: Submit) -> list[int]:
        return self.tokens[: submit.params.max_tokens]

    def run(self, until, limit_s: float = 1e6) -> None:
        self.system.run_until(until, limit_s)

    def finish(self) -> None:
        self.run(lambda: all(answer.is_over for answer in self.host.answers))
        self.run(lambda: not self.replica.open and not any(self.router.load().values()))


def naive_end(reference: Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[int], str, str | None]:
    """Token ids, text and stop string by decoding ever longer prefixes at once."""
    for count in range(1, len(ids) + 1):
        text = reference.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")
        ends = [(text.index(s) + len(s), text.index(s), s) for s in stop if s in text]
        if ends:
            _, start, hit = min(ends)
            return ids[:count], text[:start], hit
    return ids, reference.decode(ids), None


@pytest.mark.guarantee("R30")
def test_a_prompt_is_encoded_once_and_its_answer_comes_back_as_text(directory, reference):
    house = House(directory, reference.encode(ANSWER).ids)
    answer = house.host.generate("the quick", max_tokens=150, temperature=0.5)
    house.finish()
    ids = reference.encode("the quick").ids
    assert answer.items[0] == Encoded(prompt="the quick", prompt_token_ids=pack_tokens(ids))
    assert answer.tokens == house.tokens
    assert answer.text == ANSWER
    assert answer.items[1] == Routed(replica=0, dp_rank=0, chosen_by="load")
    assert all("\N{REPLACEMENT CHARACTER}" not in item.text for item in answer.items[2:])
    assert (answer.reply.finish_reason, answer.reply.stop_reason) == ("length", None)
    assert answer.reply.tokens.queued_s == 0.25


def test_the_tokenizer_tells_the_supervisor_that_it_is_ready(directory):
    house = House(directory)
    house.run(lambda: sorted(house.supervisor.ready) == ["router", "tokenizer.0"])


def test_token_ids_and_conversations_are_prompts_too(directory, reference):
    house = House(directory, [20])
    ids = reference.encode("naïve <|im_end|>").ids
    by_ids = house.host.generate(prompt_token_ids=pack_tokens([*ids, -1, 10**6]))
    by_turns = house.host.generate(turns=(ChatTurn("user", "hi"),))
    house.finish()
    assert by_ids.items[0].prompt == "naïve <|im_end|>"
    assert unpack_tokens(by_ids.items[0].prompt_token_ids).tolist() == [*ids, -1, 10**6], "the replica judges ids"
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert by_turns.items[0] == Encoded(prompt=rendered, prompt_token_ids=pack_tokens(reference.encode(rendered).ids))


@pytest.mark.guarantee("R31")
@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"prompt": ""}, RequestInvalid, "the prompt is empty"),
        ({"prompt_token_ids": b""}, RequestInvalid, "the prompt is empty"),
        ({"prompt_token_ids": b"123"}, BadFrame, "multiple of 4"),
        ({}, RequestInvalid, "has 0 of prompt, prompt_token_ids and turns"),
        ({"prompt": "a", "prompt_token_ids": pack_tokens([1])}, RequestInvalid, "has 2 of prompt"),
        ({"turns": (ChatTurn("pirate", "arr"),)}, RequestInvalid, "no such role: pirate"),
        ({"prompt": "z" * 200}, ContextTooLong, "200 tokens; with max_model_len 200 it may have at most 199"),
    ],
)
def test_a_bad_request_is_refused_before_it_reaches_a_replica(directory, fields, error, says):
    house = House(directory, [20])
    answer = house.host.generate(**fields)
    house.finish()
    assert type(answer.error) is error
    assert says in str(answer.error)
    assert house.replica.seen == []


def test_the_budget_sent_on_is_what_the_context_leaves(directory):
    seen = []
    house = House(directory, [20] * 100, max_model_len=20)
    house.replica.script = lambda submit: seen.append(submit.params) or [20]
    house.host.generate("z" * 12, max_tokens=100, min_tokens=50)
    house.host.generate("z" * 12, max_tokens=3)
    house.finish()
    assert sorted((params.max_tokens, params.min_tokens) for params in seen) == [(3, 0), (8, 8)]


@pytest.mark.guarantee("R32")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("stop", "text", "hit"),
    [
        (["END"], ANSWER[: ANSWER.index("END")], "END"),
        (["not there", "語 👩"], "Grüße, 日本", "語 👩"),
        (["e\u0301!", "\u0301"], ANSWER[: ANSWER.index("\u0301")], "\u0301"),
        (["it", "t"], ANSWER[:-2], "it"),
        (["of it!"], ANSWER, None),
    ],
)
def test_a_stop_string_ends_text_and_tokens_at_the_same_place_however_deltas_are_cut(
    directory, reference, seed, stop, text, hit
):
    house = House(directory, reference.encode(ANSWER).ids, seed)
    answer = house.host.generate("a", max_tokens=150, stop=stop)
    house.finish()
    ids, naive_text, naive_hit = naive_end(reference, house.tokens, stop)
    assert (answer.tokens, answer.text, answer.reply.stop_reason) == (ids, text, hit)
    assert (naive_text, naive_hit) == (text, hit)
    assert answer.reply.finish_reason == ("stop" if hit else "length")
    assert (answer.reply.tokens.replica, answer.reply.tokens.chosen_by) == (0, "load")


def test_a_stop_string_cancels_the_replica(directory, reference):
    house = House(directory, reference.encode("END " * 20).ids)
    answer = house.host.generate("a", stop="END")
    house.finish()
    assert (answer.text, answer.tokens) == ("", house.tokens[: len(answer.tokens)])
    assert house.replica.cancelled == [("r0", "its caller cancelled it")]


def test_times_of_a_request_that_a_stop_string_ended_are_the_tokenizers(directory, reference):
    class Slow(Actor):
        @handles(Submit)
        def _submit(self, _submit: Submit, call: Call) -> None:
            for index, token_id in enumerate(reference.encode("abX").ids):
                self.ctx.after(2.0 + 3.0 * index, lambda i=index, t=token_id: call.item(delta(i, t, rows=0)))

    house = House(directory)
    house.replace_replica(Slow())
    answer = house.host.generate("a", stop="X")
    house.finish()
    assert (answer.reply.tokens.prefill_s, answer.reply.tokens.decode_s) == pytest.approx((2.0, 6.0))


def test_a_character_cut_off_by_the_budget_is_shown_and_may_complete_a_stop_string(directory, reference):
    (cut_off, *_) = reference.encode("日").ids
    house = House(directory, [cut_off])
    shown = house.host.generate("a", max_tokens=1)
    hit = house.host.generate("a", max_tokens=1, stop="\N{REPLACEMENT CHARACTER}")
    too_early = house.host.generate("a", max_tokens=1, min_tokens=1, stop="\N{REPLACEMENT CHARACTER}")
    house.finish()
    assert [answer.text for answer in (shown, hit, too_early)] == [
        "\N{REPLACEMENT CHARACTER}",
        "",
        "\N{REPLACEMENT CHARACTER}",
    ]
    assert [answer.reply.finish_reason for answer in (shown, hit, too_early)] == ["length", "stop", "length"]
    assert hit.reply.stop_reason == "\N{REPLACEMENT CHARACTER}"
    assert len(hit.tokens) == 1


def test_stop_strings_count_only_after_min_tokens(directory, reference):
    ids = reference.encode("aXbXc").ids
    assert len(ids) == 5
    house = House(directory, ids)
    answer = house.host.generate("a", stop="X", min_tokens=2)
    house.finish()
    assert (answer.text, answer.tokens, answer.reply.stop_reason) == ("aXb", ids[:4], "X")


@pytest.mark.guarantee("X2")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stop", ["END", "e\u0301!", "語 👩"])
def test_what_ends_a_request_is_in_its_text_if_asked_for(directory, reference, seed, stop):
    house = House(directory, reference.encode(ANSWER).ids, seed)
    cut, whole = (
        house.host.generate("a", max_tokens=150, stop=stop, include_stop_str_in_output=kept) for kept in (False, True)
    )
    house.finish()
    assert whole.text == cut.text + stop == ANSWER[: ANSWER.index(stop) + len(stop)]
    assert whole.tokens == cut.tokens
    assert whole.reply.stop_reason == cut.reply.stop_reason == stop
    resumed = Answer(attrs.evolve(whole.message, generated=pack_tokens(whole.tokens), attempt=2))
    house.host.submit_again(resumed)
    house.finish()
    assert (resumed.text, resumed.reply.stop_reason) == ("", stop)


@pytest.mark.guarantee("R33")
def test_the_token_that_ends_a_request_is_in_its_ids_and_not_in_its_text(directory, reference):
    ids = reference.encode("ab.").ids

    class Ends(ScriptedReplica):
        @handles(Submit)
        def _submit(self, submit: Submit, call: Call) -> None:
            call.item(TokenDelta(token_index=0, token_ids=pack_tokens(ids)))
            stop = ids[-1] if submit.params.stop_token_ids else None
            call.reply(TokensDone(finish_reason="stop", stop_token_id=stop))

    house = House(directory, eos_token_ids=ids[-1:])
    house.replace_replica(Ends(0))
    by_id = house.host.generate("a", stop_token_ids=ids[-1:], ignore_eos=True)
    by_eos = house.host.generate("a")
    ignored = house.host.generate("a", ignore_eos=True)
    too_early = house.host.generate("a", min_tokens=3)
    kept = house.host.generate("a", include_stop_str_in_output=True)
    house.finish()
    assert (kept.text, kept.tokens) == ("ab.", ids)
    assert [answer.text for answer in (by_id, by_eos, ignored, too_early)] == ["ab", "ab", "ab.", "ab."]
    assert all(answer.tokens == ids for answer in (by_id, by_eos, ignored, too_early))
    assert [answer.reply.stop_reason for answer in (by_id, by_eos)] == [ids[-1], None]


def deltas(house: House, *items: TokenDelta) -> Answer:
    """What the host gets when a replica sends these items."""

    class Sends(Actor):
        @handles(Submit)
        def _submit(self, _submit: Submit, call: Call) -> None:
            for item in items:
                call.item(item)
            call.reply(TokensDone(finish_reason="length"))

    house.replace_replica(Sends())
    answer = house.host.generate("a", logprobs=0)
    house.finish()
    return answer


def delta(index: int, *ids: int, rows: int | None = None) -> TokenDelta:
    logprobs = tuple(LogprobRow(token_id, -0.5) for token_id in ids[:rows])
    return TokenDelta(token_index=index, token_ids=pack_tokens(ids), logprobs=logprobs)


@pytest.mark.guarantee("R34")
def test_tokens_that_come_twice_are_dropped_and_missing_ones_fail_the_request(directory):
    answer = deltas(House(directory), delta(0, 20, 21), delta(0, 20, 21, 22), delta(1, 21, 22), delta(3, 23))
    assert answer.tokens == [20, 21, 22, 23]
    rows = [row.token_id for item in answer.items if isinstance(item, TextDelta) for row in item.logprobs]
    assert rows == [20, 21, 22, 23]
    answer = deltas(House(directory), delta(0, 20), delta(2, 22))
    assert type(answer.error) is BadFrame
    assert "token 1 of the answer is missing; 2 came next" in str(answer.error)
    answer = deltas(House(directory), delta(0, 20, 21, rows=1))
    assert "1 rows of log-probabilities came with 2 tokens" in str(answer.error)


def test_log_probabilities_are_cut_with_the_tokens(directory, reference):
    ids = reference.encode("aXbcd").ids
    house = House(directory)

    class Sends(Actor):
        @handles(Submit)
        def _submit(self, _submit: Submit, call: Call) -> None:
            call.item(delta(0, *ids))

    house.replace_replica(Sends())
    answer = house.host.generate("a", stop="X", logprobs=0)
    house.finish()
    (item,) = [item for item in answer.items if isinstance(item, TextDelta)]
    assert [row.token_id for row in item.logprobs] == answer.tokens == ids[:2]


@pytest.mark.guarantee("X3")
def test_a_row_of_log_probabilities_carries_the_bytes_of_its_tokens(directory, reference):
    house = House(directory)
    ids = reference.encode("日<|im_end|>").ids
    first, *others = ids
    row = LogprobRow(first, -0.5, top_ids=(others[-1], 10**6), top_logprobs=(-1.0, -2.0))
    answer = deltas(house, TokenDelta(0, pack_tokens([first]), (row,)), delta(1, *others))
    rows = [row for item in answer.items if isinstance(item, TextDelta) for row in item.logprobs]
    assert b"".join(row.token_bytes for row in rows) == "日<|im_end|>".encode()
    assert len(rows[0].token_bytes) < 3, "part of a character"
    assert rows[0].top_bytes == (b"<|im_end|>", b"")


@pytest.mark.guarantee("X4")
def test_text_and_conversations_have_ids_and_ids_have_a_text(directory, reference):
    house = House(directory)
    conversation = (ChatTurn("user", "naïve"),)
    rendered = "<|im_start|>user\nnaïve<|im_end|>\n<|im_start|>assistant\n"
    ids = reference.encode(rendered).ids
    answers = [
        house.host.send(message, 10.0)
        for message in (
            Tokenize(prompt=rendered),
            Tokenize(turns=conversation),
            Detokenize(token_ids=pack_tokens([*ids, 10**6])),
            Tokenize(turns=(ChatTurn("pirate", "arr"),)),
            Tokenize(prompt=""),
            Detokenize(token_ids=pack_tokens([20] * 401)),
            Tokenize(prompt="z" * 10**6),
        )
    ]
    house.finish()
    assert [answer.reply for answer in answers] == [
        Encoded(prompt=rendered, prompt_token_ids=pack_tokens(ids)),
        Encoded(prompt=rendered, prompt_token_ids=pack_tokens(ids)),
        Detokenized(text=rendered),
        None,
        Encoded(prompt="", prompt_token_ids=b""),
        None,
        None,
    ]
    assert [type(answer.error) for answer in answers[3:]] == [
        RequestInvalid, type(None), ContextTooLong, ContextTooLong,
    ]  # fmt: skip
    assert house.replica.seen == []


def test_an_end_that_is_no_end_fails_the_request(directory):
    class Odd(Actor):
        @handles(Submit)
        def _submit(self, _message: Submit, call: Call) -> None:
            call.reply(Routed(replica=0, dp_rank=0))

    house = House(directory)
    house.system.kill("router", "replaced")
    house.system.spawn("router", Odd(), connect=("tokenizer.0",))
    pass_time(house.system, 1)
    answer = house.host.generate("a")
    house.run(lambda: answer.is_over)
    assert "the router ended a request with Routed, not TokensDone" in str(answer.error)


def test_a_model_directory_without_tokenizer_is_refused_at_start(tmp_path):
    actor = TokenizerActor({"model": str(tmp_path), "max_model_len": 10, "max_request_restarts": 3})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        LocalSystem(0).spawn("tokenizer.0", actor)


@pytest.mark.guarantee("R35")
@pytest.mark.parametrize("victim", ["router", "replica.0"])
def test_a_death_further_down_costs_no_token_and_no_text(directory, reference, victim):
    house = House(directory, reference.encode(ANSWER).ids)
    answer = house.host.generate("a", max_tokens=150)
    start = {"router": house.start_router, "replica.0": house.start_replica}[victim]
    for items in (3, 8, 15):
        house.run(lambda n=items: len(answer.items) >= n)
        house.system.kill(victim, "signal 9 (SIGKILL)")
        start()
    house.finish()
    assert answer.tokens == house.tokens
    assert answer.text == ANSWER


def test_a_request_that_only_costs_routers_is_a_typed_error_that_says_how(directory, reference):
    house = House(directory, reference.encode(ANSWER).ids)
    answer = house.host.generate("a", max_tokens=150)
    house.run(lambda: len(answer.items) > 2)
    house.system.kill("replica.0", "killed first")
    for _ in range(4):
        assert not answer.is_over
        house.run(lambda: house.router._requests)
        house.system.kill("router", "signal 9 (SIGKILL)")
        house.start_router()
    house.run(lambda: answer.is_over)
    assert type(answer.error) is WorkerDied
    assert "signal 9 (SIGKILL)" in str(answer.error)
    house.start_replica()


@pytest.mark.guarantee("R37")
@given(
    st.integers(0, 200),
    st.sampled_from([(), ("e",), ("the", "語 👩"), ("ö", "END o")]),
    st.sampled_from([*TEXTS, ANSWER]),
)
@settings(max_examples=100, deadline=None, print_blob=True)
def test_the_next_life_makes_the_rest_of_the_text(directory, reference, had, stop, text):
    house = House(directory, reference.encode(text).ids)
    whole = house.host.generate("a", max_tokens=150, stop=stop)
    house.finish()
    given = [item for item in whole.items if isinstance(item, TextDelta)][:had]
    tokens = [token for item in given for token in unpack_tokens(item.token_ids).tolist()]
    resumed = Answer(attrs.evolve(whole.message, generated=pack_tokens(tokens), attempt=2))
    house.host.submit_again(resumed)
    house.finish()
    assert tokens + resumed.tokens_behind(len(tokens)) == whole.tokens
    assert "".join(item.text for item in given) + resumed.text == whole.text
    assert (resumed.reply.finish_reason, resumed.reply.stop_reason) == (
        whole.reply.finish_reason,
        whole.reply.stop_reason,
    )


def test_a_cancel_goes_all_the_way_down(directory, reference):
    house = House(directory, reference.encode(ANSWER).ids)
    answer = house.host.generate("a", max_tokens=150)
    house.run(lambda: len(answer.items) > 2)
    house.host.cancel(answer)
    house.finish()
    assert [request_id for request_id, _ in house.replica.cancelled] == ["r0"]


moves = st.lists(
    st.one_of(
        st.tuples(
            st.just("generate"), st.integers(0, 30), st.sampled_from([(), ("e",), ("the", "語 👩"), ("ö", "END o")])
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("pass"), st.floats(0.0, 3.0)),
        st.tuples(st.sampled_from(["tokenizer.0", "router", "replica.0"])),
    ),
    max_size=15,
)


@pytest.mark.guarantee("R36")
@given(moves, st.integers(0, 2**32), st.sampled_from([*TEXTS, ANSWER]))
@settings(max_examples=60, deadline=None, print_blob=True)
def test_whatever_happens_every_request_ends_once_with_its_text(directory, reference, moves, seed, text):
    house = House(directory, reference.encode(text).ids, seed)
    starts = {"tokenizer.0": house.start_tokenizer, "router": house.start_router, "replica.0": house.start_replica}
    for move in moves:
        if move[0] == "generate":
            house.host.generate("a", max_tokens=move[1] + 1, stop=move[2])
        elif move[0] == "cancel" and house.host.answers:
            house.host.cancel(house.host.answers[move[1] % len(house.host.answers)])
        elif move[0] == "pass":
            pass_time(house.system, move[1])
        elif move[0] in starts:
            house.system.kill(move[0], "signal 9 (SIGKILL)")
            starts[move[0]]()
    house.finish()
    for answer in house.host.answers:
        assert answer.ends == (0 if answer.is_cancelled else 1)
        params = answer.message.params
        ids, whole, hit = naive_end(reference, house.tokens[: params.max_tokens], list(params.stop))
        assert answer.tokens == ids[: len(answer.tokens)]
        assert whole.startswith(answer.text)
        if answer.reply is not None:
            assert (answer.tokens, answer.text, answer.reply.stop_reason) == (ids, whole, hit)
    assert not house.router.ctx.counters().get("handler_failures")
