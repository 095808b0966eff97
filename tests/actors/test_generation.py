"""What a model's author suggests for sampling: the file's values as transformers reads them, wrong ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from chipbus import AsyncEngine
from chipbus.actors.config import EngineConfig
from chipbus.actors.generation import generation_defaults
from chipbus.actors.plan import plan_engine
from chipbus.actors.sampling import SamplingParams
from chipbus.errors import CheckpointError

QWEN3 = {  # as published with Qwen3-0.6B
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def write(directory: Path, **fields: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.guarantee("X9")
def test_suggested_sampling_is_what_the_file_states(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    fields = {**QWEN3, "min_p": None, "repetition_penalty": 1.05, "max_new_tokens": 512}
    defaults = generation_defaults(write(tmp_path, **fields))
    reference = GenerationConfig.from_pretrained(tmp_path)
    assert defaults == {
        "temperature": reference.temperature,
        "top_k": reference.top_k,
        "top_p": reference.top_p,
        "repetition_penalty": reference.repetition_penalty,
        "max_tokens": reference.max_new_tokens,
    }
    assert SamplingParams(**defaults).top_k == 20
    with pytest.raises(TypeError):
        defaults["top_k"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": "hot"}, "temperature cannot be used: SamplingParams.temperature is 'hot'"),
        ({"top_p": 1.5}, r"top_p cannot be used: .*\(0, 1\]"),
        ({"top_k": 2.5}, "top_k cannot be used: .*integer"),
        ({"max_new_tokens": 0}, "max_new_tokens cannot be used: SamplingParams.max_tokens is 0"),
        ({"repetition_penalty": True}, "repetition_penalty cannot be used"),
    ],
)
def test_a_suggestion_that_cannot_be_followed_is_refused_by_file_and_field(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {says}"):
        generation_defaults(write(tmp_path, **fields))


def test_an_engine_tells_what_its_model_suggests() -> None:
    assert AsyncEngine("demo").generation_defaults == plan_engine(EngineConfig()).generation_defaults == {}
