"""What a request may say: every field of every table, what it becomes, and how it is refused. No server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from chipbus.actors.handling import ANYHOW, Handling
from chipbus.actors.sampling import SamplingParams
from chipbus.errors import BadTarget, ContextTooLong, RequestInvalid
from chipbus.tools.serve.failures import Refused, failure_of
from chipbus.tools.serve.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Where, parse
from chipbus.tools.serve.reference import page
from chipbus.tools.serve.wanted import Wanted, chat_wanted, completion_wanted

HELLO = [{"role": "user", "content": "hello"}]
ROWS = (
    ("temperature", 0.5), ("top_p", 0.5), ("top_k", 5), ("min_p", 0.25), ("seed", 7), ("stop", ("a", "b")),
    ("stop_token_ids", (3, 4)), ("ignore_eos", True), ("min_tokens", 2), ("n", 3), ("presence_penalty", 1),
    ("frequency_penalty", -1.5), ("repetition_penalty", 1.5), ("max_tokens", 9), ("include_stop_str_in_output", True),
)  # fmt: skip


def chat(headers: Any = (), **fields: Any) -> Wanted:
    return chat_wanted(json.dumps({"messages": HELLO, **fields}).encode(), headers, {})


def complete(headers: Any = (), **fields: Any) -> Wanted:
    return completion_wanted(json.dumps({"prompt": "hello", **fields}).encode(), headers, {}, 100)


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(("name", "value"), ROWS)
def test_a_sampling_field_reaches_the_engine_under_its_own_name(ask: Any, name: str, value: Any) -> None:
    assert ask(**{name: value}).params == SamplingParams(**{name: value})
    assert ask(**{name: None}).params == SamplingParams()


def test_every_sampling_field_is_among_those() -> None:
    names = {name for name, _ in ROWS} | {"logprobs"}

    assert {field.name for field in COMPLETIONS.values() if field.where is Where.SAMPLING} == names
    assert {field.name for field in attrs.fields(SamplingParams)} == names


@pytest.mark.guarantee("H26")
def test_what_is_left_out_is_as_the_model_suggests() -> None:
    suggested = {"temperature": 0.6, "top_k": 20, "max_tokens": 50}
    body = json.dumps({"messages": HELLO, "top_k": 0, "max_tokens": None}).encode()

    assert chat_wanted(body, (), suggested).params == SamplingParams(temperature=0.6, top_k=0, max_tokens=50)
    body = json.dumps({"prompt": "hello", "temperature": 1}).encode()
    assert completion_wanted(body, (), suggested, 100).params == SamplingParams(temperature=1, top_k=20, max_tokens=50)


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert complete(logprobs=3).params.logprobs == 3
    assert complete(logprobs=0).params.logprobs == 0
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).params.logprobs == 4
    assert chat(logprobs=False, top_logprobs=0).params.logprobs is None


def test_both_names_of_the_budget_are_one() -> None:
    assert chat(max_completion_tokens=5).params.max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).params.max_tokens == 5
    with pytest.raises(RequestInvalid, match="max_tokens is 4 and max_completion_tokens is 5"):
        chat(max_completion_tokens=5, max_tokens=4)


def test_what_places_a_request_comes_from_body_or_header() -> None:
    assert complete().handling is ANYHOW
    assert complete(priority=-1, session_id="s", replica=1, dp_rank=0).handling == Handling(
        priority=-1, session="s", replica=1, dp_rank=0
    )
    assert complete([(b"x-data-parallel-rank", b"0"), (b"x-session-id", b"s")]).handling == Handling(
        session="s", dp_rank=0
    )
    both = [(b"x-data-parallel-rank", b"1"), (b"x-data-parallel-rank", b"01"), (b"x-session-id", b"s")]
    assert chat(both, dp_rank=1, session_id="s").handling == Handling(session="s", dp_rank=1)


@pytest.mark.guarantee("H1")
@pytest.mark.parametrize(
    ("headers", "fields", "words"),
    [
        ([(b"x-data-parallel-rank", b"1")], {"dp_rank": 0}, "they must agree"),
        ([(b"x-data-parallel-rank", b"1"), (b"x-data-parallel-rank", b"0")], {}, "they must agree"),
        ([(b"x-data-parallel-rank", b"-1")], {}, "decimal integer"),
        ([(b"x-data-parallel-rank", b"one")], {}, "decimal integer"),
        ([(b"x-data-parallel-rank", b"")], {}, "decimal integer"),
        ([(b"x-data-parallel-rank", b"0x1")], {}, "decimal integer"),
        ([], {"dp_rank": True}, "dp_rank is True"),
        ([], {"dp_rank": "1"}, "dp_rank is '1'"),
        ([], {"replica": -1}, "replica is -1"),
        ([], {"replica": 0.0}, "replica is 0.0"),
    ],
)
def test_a_rank_that_is_none_or_two_is_a_bad_target(headers: Any, fields: Any, words: str) -> None:
    for ask in (chat, complete):
        with pytest.raises(BadTarget, match=words) as caught:
            ask(headers, **fields)
        assert caught.value.param in ("dp_rank", "replica")


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": True}, "temperature", "temperature is True; it must be a number"),
        ({"temperature": -1}, "temperature", r"temperature is -1; it must be a number in \[0, 100\]"),
        ({"temperature": "hot"}, "temperature", "it must be a number"),
        ({"top_k": 1.0}, "top_k", "it must be an integer"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"n": 65}, "n", "n is 65"),
        ({"n": 0}, "n", "n is 0"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "must not exceed max_tokens, 3"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"stop": 5}, "stop", "it must be text or a list"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": [1]}, "stop", "it must be text or a list"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "token ids"),
        ({"stop_token_ids": 4}, "stop_token_ids", "token ids"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"priority": 0.5}, "priority", "it must be an integer"),
        ({"session_id": "x" * 257}, "session_id", "at most 256"),
        ({"session_id": 5}, "session_id", "it must be text"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "include_usage"),
        ({"stream": True, "stream_options": []}, "stream_options", "object"),
        ({"model": 1}, "model", "it must be text"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support it and takes only null, {}"),
        ({"best_of": 2}, "best_of", "takes only null, 1"),
        ({"best_of": True}, "best_of", "takes only null, 1"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no other format"),
        ({"service_tier": "flex"}, "service_tier", "takes only"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"quux": None}, "quux", "docs/serving.md"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21"),
        ({"logprobs": -1}, "logprobs", "logprobs is -1"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_rule(ask: Any, fields: Any, param: str, words: str) -> None:
    with pytest.raises(RequestInvalid, match=words) as caught:
        ask(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": "all"}, "tools"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt": "x"}, "prompt"),
        ({"echo": False}, "echo"),
    ],
)
def test_a_wrong_chat_names_the_place(fields: Any, param: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, ""),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 64}, "n"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": HELLO}, "messages"),
    ],
)
def test_a_wrong_completion_names_the_field(fields: Any, param: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        complete(**fields)
    assert caught.value.param == param


def test_ids_that_cannot_fit_are_refused_before_they_are_sent() -> None:
    with pytest.raises(ContextTooLong, match="100 tokens"):
        complete(prompt=[5] * 100)
    assert complete(prompt=[5] * 99).prompts == [[5] * 99]


def test_the_four_shapes_of_a_prompt() -> None:
    assert complete(prompt="a").prompts == ["a"]
    assert complete(prompt=["a", "b"]).prompts == ["a", "b"]
    assert complete(prompt=[1, 2]).prompts == [[1, 2]]
    assert complete(prompt=[[1], [2, 3]]).prompts == [[1], [2, 3]]


def test_a_message_is_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "x", "name": None},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "y", "tool_calls": []},
    ]

    assert chat(messages=messages).messages == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "y"},
    ]


@pytest.mark.guarantee("H2")
def test_no_field_is_ignored_but_those_that_say_so() -> None:
    """One that is not supported is taken with its neutral value, which changes nothing, and refused with another."""
    plain = {"user": "u", "metadata": {"a": "b"}, "store": True}
    neutral = {
        "logit_bias": {}, "service_tier": "auto", "best_of": 1, "use_beam_search": False, "length_penalty": 1.0,
        "skip_special_tokens": True, "response_format": {"type": "text"},
    }  # fmt: skip
    of_chat = {
        "tool_choice": "none", "tools": [{"type": "function"}], "parallel_tool_calls": True, "functions": [],
        "function_call": "none", "modalities": ["text"], "reasoning_effort": "none", "add_generation_prompt": True,
        "chat_template_kwargs": {},
    }  # fmt: skip

    assert chat(**plain, **neutral, **of_chat) == chat()
    assert complete(**plain, **neutral, echo=False) == complete()
    for table, ask in ((CHAT, chat), (COMPLETIONS, complete)):
        assert {field.name for field in table.values() if field.where is Where.IGNORED} == set(plain)
        for field in table.values():
            assert field.name in ("messages", "prompt") or ask(**{field.name: None}) == ask()
            if field.where is Where.NEUTRAL and field.name != "parallel_tool_calls":
                with pytest.raises(RequestInvalid) as caught:
                    ask(**{field.name: "something"})
                assert caught.value.param == field.name


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON"), (b"{", "no JSON"), (b"\xff", "no JSON"), (b"[1]", "be a JSON object"), (b"null", "object"),
        (b"[" * 100_000, "nested too deeply"), (b'{"seed": 1e999}', "no JSON"), (b'{"a": NaN}', "no JSON"),
        (b'{"prompt": "\\ud800"}', "no JSON"), (b'{"prompt": "\xff"}', "no JSON"), (b"{}", "prompt is missing"),
        (b'{"prompt": "a"} x', "no JSON"), (b'{"\\u0000' + b"a" * 1000 + b'": 1}', "there is no field"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(body: bytes, words: str) -> None:
    with pytest.raises((RequestInvalid, Refused), match=words) as caught:
        parse(COMPLETIONS, body)
    assert failure_of(caught.value).status == 400
    assert len(str(caught.value)) < 300


def test_the_page_of_the_server_is_fresh() -> None:
    document = Path(__file__).resolve().parents[3] / "docs" / "serving.md"

    assert document.read_text() == page() + "\n", "run: python -m chipbus.tools.serve.reference > docs/serving.md"
    for table in (CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE):
        assert all(f"| `{name}` | " in page() for name in table)
