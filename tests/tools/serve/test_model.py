"""Sampling over HTTP on a chip that computes: each field changes what the model says, as it does in process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_server import RunningServer, running_server

from chipbus.actors.sampling import SamplingParams

LOOSE = {"temperature": 25.0, "seed": 5, "max_tokens": 24, "ignore_eos": True}
"""Hot enough that a small model, which knows its sentences by heart, says something else with every seed."""
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 6.0},
    "seed": {"seed": 6},
    "top_p": {"top_p": 0.2},
    "top_k": {"top_k": 2},
    "min_p": {"min_p": 0.5},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 2.0},
    "repetition": {"repetition_penalty": 8.0},
    "max_tokens": {"max_tokens": 5},
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(threads=1, kv_pages=32, log_level="error") as server:
        yield server


@pytest.mark.slow
@pytest.mark.guarantee("H23")
def test_each_sampling_field_changes_the_tokens_as_it_does_in_process(server: RunningServer) -> None:
    def of_engine(**fields: Any) -> str:
        return server.generate("replica", SamplingParams(**fields))[0].outputs[0].text

    plain = of_engine(**LOOSE)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        for name, field in FIELDS.items():
            fields = {**LOOSE, **field}
            expected = of_engine(**fields)
            whole = client.completions.create(model="demo", prompt="replica", extra_body=fields)
            chunks = client.completions.create(model="demo", prompt="replica", stream=True, extra_body=fields)
            assert expected != plain, name
            assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == expected, name


@pytest.mark.slow
def test_the_demo_model_explains_a_word_to_the_official_client(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "replica"}], temperature=0, logprobs=True
        )

    [expected] = server.run(
        server.engine.chat([{"role": "user", "content": "replica"}], SamplingParams(temperature=0, logprobs=0))
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == expected.outputs[0].text != ""
    assert answer.choices[0].logprobs is not None
    assert [row.logprob for row in answer.choices[0].logprobs.content or ()] == [
        row.logprob for row in expected.outputs[0].logprobs or ()
    ]
