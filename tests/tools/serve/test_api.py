"""The API over a real socket, with the official client and with httpx: every field, whole and streamed, one replica and
two, against the engine itself; and every row of the table of errors.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import openai
import pytest
from http_server import RunningServer, events_of, joined, running_server, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chipbus import errors
from chipbus.actors.handling import Handling
from chipbus.actors.outputs import RequestOutput
from chipbus.actors.sampling import SamplingParams
from chipbus.tools.serve import streams
from chipbus.tools.serve.failures import failure_of

HELLO = [{"role": "user", "content": "replica"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module", params=[1, 2], ids=["one replica", "two replicas"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with running_server(chip="null", data_parallel_size=request.param, log_level="error") as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def choices_of(server: RunningServer, path: str, is_stream: bool, **fields: Any) -> dict[int, dict[str, Any]]:
    """The choices of an answer, by index, however it came."""
    answer = server.post(path, stream=is_stream, **fields)
    assert answer.status_code == 200, answer.text
    if is_stream:
        events = events_of(answer.text)
        assert events[-1] == "[DONE]"
        return joined(events)
    return {choice["index"]: whole(choice) for choice in answer.json()["choices"]}


def choices_by(client: openai.OpenAI, path: str, is_stream: bool, **fields: Any) -> dict[int, dict[str, Any]]:
    """The same through the official client; what it has no name for travels in its ``extra_body``."""
    create: Any = client.chat.completions.create if path == CHAT else client.completions.create
    own = inspect.signature(create).parameters
    known, extra = ({name: fields[name] for name in fields if (name in own) == is_own} for is_own in (True, False))
    answer = create(model="demo", stream=is_stream, extra_body=extra, **known)
    if is_stream:
        return joined([chunk.model_dump(exclude_unset=True) for chunk in answer])
    return {choice["index"]: whole(choice) for choice in answer.model_dump(exclude_unset=True)["choices"]}


FIELDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.1},
    "seed": {"seed": 7},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "stop": {"stop": ["hold", "kcket"]},
    "stop included": {"stop": ["hold", "kcket"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": list(range(300, 600))},
    "stop ids late": {"stop_token_ids": list(range(16, 1024)), "min_tokens": 3},
    "ignore_eos": {"ignore_eos": True},
    "n": {"n": 3},
    "priority": {"priority": -1},
    "session": {"session_id": "one"},
    "replica": {"replica": 0},
    "rank": {"dp_rank": 0},
    "long": {"max_tokens": 200},
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.guarantee("H3")
def test_every_field_gives_what_the_engine_gives_streamed_or_not(
    server: RunningServer, client: openai.OpenAI, name: str
) -> None:
    fields = {"max_tokens": 12, **FIELDS[name]}
    names = {"session_id": "session", "priority": "priority", "replica": "replica", "dp_rank": "dp_rank"}
    placing = {names[key]: value for key, value in fields.items() if key in names}
    params = SamplingParams(**{key: value for key, value in fields.items() if key not in names})

    for path, prompt in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "replica of"})):
        handling = Handling(**placing)
        if path == CHAT:
            [expected] = server.run(server.engine.chat(HELLO, params, handling))
        else:
            [expected] = server.generate("replica of", params, handling)
        for is_stream in (False, True):
            got = choices_by(client, path, is_stream, **prompt, **fields)
            assert got == {
                part.index: {
                    "text": part.text,
                    "logprobs": None,
                    "finish_reason": part.finish_reason,
                    "stop_reason": part.stop_reason,
                }
                for part in expected.outputs
            }


@pytest.mark.parametrize("shape", ["text", "texts", "ids", "lists of ids"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_prompts_of_every_shape_are_answered_in_their_order(server: RunningServer, shape: str, is_stream: bool) -> None:
    prompt: Any = {"text": "a chip", "texts": ["a chip", "b", "a"], "ids": [40, 41], "lists of ids": [[40], [50, 60]]}
    params = SamplingParams(max_tokens=6, n=2)

    expected = server.generate(prompt[shape], params)
    got = choices_of(server, TEXT, is_stream, prompt=prompt[shape], max_tokens=6, n=2)

    assert {index: choice["text"] for index, choice in got.items()} == {
        2 * number + part.index: part.text for number, output in enumerate(expected) for part in output.outputs
    }


def logprobs_of(output: RequestOutput) -> list[Any]:
    rows = output.outputs[0].logprobs
    assert rows is not None
    return [(row.logprob, row.token_bytes, list(zip(row.top_bytes, row.top_logprobs, strict=True))) for row in rows]


@pytest.mark.parametrize("is_stream", [False, True])
def test_log_probabilities_have_one_row_per_token(server: RunningServer, is_stream: bool) -> None:
    params = SamplingParams(max_tokens=40, logprobs=2)
    [of_chat] = server.run(server.engine.chat(HELLO, params))
    [of_text] = server.generate("replica", params)

    chat = choices_of(server, CHAT, is_stream, messages=HELLO, max_tokens=40, logprobs=True, top_logprobs=2)[0]
    text = choices_of(server, TEXT, is_stream, prompt="replica", max_tokens=40, logprobs=2)[0]

    rows = chat["logprobs"]["content"]
    assert [
        (row["logprob"], bytes(row["bytes"]), [(bytes(top["bytes"]), top["logprob"]) for top in row["top_logprobs"]])
        for row in rows
    ] == logprobs_of(of_chat)
    assert b"".join(bytes(row["bytes"]) for row in rows).decode(errors="replace") == chat["text"]
    rows = text["logprobs"]
    assert rows["token_logprobs"] == [logprob for logprob, _, _ in logprobs_of(of_text)]
    assert len(rows["tokens"]) == len(rows["text_offset"]) == len(rows["top_logprobs"]) == 40
    assert rows["text_offset"][0] == 0
    for token, offset, top in zip(rows["tokens"], rows["text_offset"], rows["top_logprobs"], strict=True):
        assert token in top
        assert token.startswith("bytes:") or text["text"][offset:].startswith(token)


def test_the_official_client_reads_every_answer(server: RunningServer, client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": HELLO, "max_tokens": 9, "logprobs": True, "top_logprobs": 1}
    answer = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = client.completions.create(model="demo", prompt="replica", max_tokens=9)

    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    assert answer.system_fingerprint == server.service.fingerprint
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    [expected] = server.run(server.engine.chat(HELLO, SamplingParams(max_tokens=9)))
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 9 + answer.usage.prompt_tokens)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == answer.choices[0].message.content
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage and chunks[-1].usage.prompt_tokens_details}
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert text.object == "text_completion"
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").model_dump()["max_model_len"] == server.engine.plan.max_model_len
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_text_becomes_ids_and_ids_text(server: RunningServer) -> None:
    ids = server.post("/tokenize", prompt="replica of a chip").json()
    of_chat = server.post("/tokenize", messages=HELLO).json()

    assert ids["count"] == len(ids["tokens"]) > 1
    assert server.post("/detokenize", tokens=ids["tokens"]).json() == {"prompt": "replica of a chip"}
    [expected] = server.run(server.engine.chat(HELLO, SamplingParams(max_tokens=1)))
    assert tuple(of_chat["tokens"]) == expected.prompt_token_ids
    for wrong in ({}, {"prompt": "a", "messages": HELLO}):
        assert server.post("/tokenize", **wrong).status_code == 400
    assert server.post("/detokenize", tokens=["a"]).json()["error"]["param"] == "tokens"


def test_what_the_server_is_and_how_it_is(server: RunningServer) -> None:
    get = server.client.get

    assert get("/health").json() == {"status": "alive"}
    assert get("/ready").json() == {"status": "ready"}
    assert get("/version").json() == {"version": server.service.version}
    assert get("/v1/models").json()["data"][0]["owned_by"] == "chipbus"


@pytest.mark.guarantee("H4")
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.RequestInvalid("x", param="n"), 400, "invalid_request_error", None),
        (errors.BadTarget("x"), 400, "invalid_request_error", "bad_target"),
        (errors.ContextTooLong("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.Overloaded("x"), 429, "rate_limit_error", "queue_full"),
        (errors.PinOverloaded("x"), 429, "rate_limit_error", "pin_overloaded"),
        (errors.NotReady("x"), 503, "server_error", "not_ready"),
        (errors.EngineClosed("x"), 503, "server_error", "not_ready"),
        (errors.EngineDead("x"), 503, "server_error", "not_ready"),
        (errors.DeadlineExceeded("x"), 504, "timeout_error", "deadline_exceeded"),
        (errors.WorkerDied("x"), 500, "server_error", "worker_died"),
        (errors.KernelError("x"), 500, "server_error", "internal"),
        (errors.BadFrame("x"), 500, "server_error", "internal"),
        (ValueError("a prompt"), 500, "server_error", "internal"),
    ],
)
def test_each_error_class_has_its_status_type_and_code(error: Exception, status: int, kind: str, code: str) -> None:
    failure = failure_of(error)

    assert (failure.status, failure.type, failure.code) == (status, kind, code)
    assert (dict(failure.headers).get(b"retry-after") == b"1") is (status in (429, 503))
    assert "a prompt" not in failure.message


def failed(answer: Any) -> tuple[int, str, str | None, str | None]:
    """Status, type, code and param of an answer that is an error."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, error["type"], error["code"], error["param"]


INVALID = "invalid_request_error"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (TEXT, {"prompt": "a", "top_p": 2}, (400, INVALID, None, "top_p")),
        (TEXT, {"prompt": "a", "max_token": 2}, (400, INVALID, None, "max_token")),
        (TEXT, {"prompt": ""}, (400, INVALID, None, "prompt")),
        (TEXT, {"prompt": [2000]}, (400, INVALID, None, "prompt")),
        (TEXT, {"prompt": "a " * 3000}, (400, INVALID, "context_length_exceeded", "prompt")),
        (TEXT, {"prompt": [7] * 3000}, (400, INVALID, "context_length_exceeded", "prompt")),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 3000}]},
         (400, INVALID, "context_length_exceeded", "messages")),
        (TEXT, {"prompt": "a", "replica": 9}, (400, INVALID, "bad_target", "replica")),
        (TEXT, {"prompt": "a", "dp_rank": 2}, (400, INVALID, "bad_target", "dp_rank")),
        (TEXT, {"prompt": "a", "dp_rank": True}, (400, INVALID, "bad_target", "dp_rank")),
        (TEXT, {"prompt": "a", "model": "gpt"}, (404, INVALID, "model_not_found", "model")),
        (CHAT, {"messages": HELLO, "model": ""}, (404, INVALID, "model_not_found", "model")),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_as_such_and_never_as_a_stream(
    server: RunningServer, path: str, fields: dict[str, Any], expected: tuple[Any, ...], is_stream: bool
) -> None:
    assert failed(server.post(path, stream=is_stream, **fields)) == expected
    assert server.comes_to_rest()


def test_what_is_no_request_of_the_api_is_told_in_its_shape(server: RunningServer) -> None:
    client = server.client

    assert failed(client.get("/nothing"))[:3] == (404, INVALID, "not_found")
    assert failed(client.get("/v1/models/"))[0] == 404
    wrong = client.get(CHAT)
    assert failed(wrong)[:3] == (405, INVALID, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert failed(client.post("/health"))[:3] == (405, INVALID, "method_not_allowed")
    assert failed(client.post(CHAT, content=b"{}"))[:3] == (415, INVALID, "unsupported_content_type")
    as_json = {"content-type": "Application/JSON; charset=utf-8"}
    assert failed(client.post(CHAT, content=b"{", headers=as_json)) == (400, INVALID, None, None)
    assert failed(client.post(CHAT, content=b"{}", headers=as_json)) == (400, INVALID, None, "messages")
    twice = {"x-data-parallel-rank": "1"}
    answer = client.post(TEXT, json={"prompt": "a", "dp_rank": 0}, headers=twice)
    assert failed(answer) == (400, INVALID, "bad_target", "dp_rank")


@pytest.mark.guarantee("H25")
def test_without_a_key_only_localhost_and_addresses_are_answered_to(server: RunningServer) -> None:
    """A web page that gave its own name the address of this host is not let in; who probes health is."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "x]", "[x"):
        answer = server.client.post(TEXT, json={"prompt": "a"}, headers={"host": host})
        assert failed(answer)[:3] == (403, INVALID, "wrong_host")
        assert server.client.get("/health", headers={"host": host}).status_code == 200
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "10.0.0.7", "a.localhost"):
        answer = server.client.post(TEXT, json={"prompt": "a", "max_tokens": 1}, headers={"host": host})
        assert answer.status_code == 200


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"]),
    st.sampled_from(["/", "/v1/", "/v1/models/", "/v1/completions", "/v1/chat/completions/", "/tokenize", "/ready?"]),
    st.text(max_size=12),
)
def test_any_method_on_any_path_is_answered(server: RunningServer, method: str, path: str, more: str) -> None:
    answer = server.client.request(method, path + quote(more))

    assert answer.status_code in (200, 404, 405, 415)
    assert method == "HEAD" or answer.status_code == 200 or failed(answer)[0] == answer.status_code


@pytest.mark.guarantee("H5")
def test_while_it_drains_new_requests_are_told_to_come_back(server: RunningServer) -> None:
    server.service.state = "draining"
    try:
        for answer in (server.client.get("/ready"), server.post(TEXT, prompt="a"), server.post(CHAT, messages=HELLO)):
            assert failed(answer)[:3] == (503, "server_error", "not_ready")
            assert answer.headers["retry-after"] == "1"
        assert server.client.get("/health").status_code == 200
    finally:
        server.service.state = "serving"
    assert server.client.get("/ready").status_code == 200


@pytest.mark.guarantee("H6")
def test_a_stream_that_waits_says_so_in_comments(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_S", 0.0001)

    with server.client.stream("POST", TEXT, json={"prompt": "a", "max_tokens": 200, "stream": True}) as answer:
        text = answer.read().decode()

    [expected] = server.generate("a", SamplingParams(max_tokens=200))
    assert ": waiting\n\n" in text
    assert joined(events_of(text))[0]["text"] == expected.outputs[0].text


def test_ids_are_never_given_twice(server: RunningServer) -> None:
    answers = [server.post(path, **prompt, max_tokens=1).json()["id"] for path, prompt in itertools.product(
        (TEXT, TEXT), ({"prompt": "a"}, {"prompt": ["a", "b"]}))]  # fmt: skip
    assert len(set(answers)) == len(answers)
