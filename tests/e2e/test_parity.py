"""Whole engines against transformers: greedy tokens in fp32 are the same, however the work was cut up."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import tiny_checkpoint
from chipbus import Engine, SamplingParams

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(2, 60)), [7, 7, 7], list(range(100, 20, -3)), [11, 13]]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def reference(directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(count):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(directory)
    return directory, reference(directory, PROMPTS, 10)


@pytest.mark.guarantee("E10")
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data_parallel_size": 2},
        {"prefill_chunk_tokens": 7, "page_size": 4},
        {"max_num_seqs": 2, "max_num_batched_tokens": 16, "page_size": 8},
        {
            "kv_pages": 20,
            "page_size": 4,
            "max_model_len": 72,
        },  # too few for all at once
    ],
    ids=["plain", "dp2", "chunked", "narrow", "preempting"],
)
def test_greedy_tokens_equal_transformers(
    checkpoint: tuple[Path, list[list[int]]], settings: dict[str, object]
) -> None:
    directory, expected = checkpoint
    with Engine(str(directory), dtype="float32", threads=1, **settings) as engine:
        together = [list(o.outputs[0].token_ids) for o in engine.generate(PROMPTS, GREEDY)]
        alone = [list(engine.generate(prompt, GREEDY)[0].outputs[0].token_ids) for prompt in PROMPTS[:2]]

        assert together == expected
        assert alone == expected[:2]
        statistics = engine.statistics()
        assert statistics.pages_free == statistics.pages_total
