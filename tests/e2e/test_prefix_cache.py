"""The prefix cache with real numerics: what is found again gives the very bits that computing it again would give."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

import attrs
import pytest
from native_runs import NEEDS_NATIVE

from chipbus import Engine, RequestOutput, SamplingParams

TEXT = files("chipbus").joinpath("demo", "sentences.json").read_text("utf-8")[:400]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo", page_size=16, prefill_chunk_tokens=24, threads=1) as engine:
        yield engine


def numbers(output: RequestOutput) -> tuple[object, ...]:
    """Tokens and log-probabilities of a greedy answer and of a sampled one."""
    return tuple((completion.token_ids, completion.logprobs) for completion in output.outputs)


@pytest.mark.guarantee("R60")
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
def test_a_prompt_that_is_found_gives_the_bits_of_one_that_is_computed(engine: Engine, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=12, logprobs=3, ignore_eos=True)
    computed = engine.statistics().prompt_tokens
    [cold] = engine.generate([f"{temperature} {TEXT}"], params)
    [warm] = engine.generate([f"{temperature} {TEXT}"], params)
    length = len(cold.prompt_token_ids)

    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, (length - 1) // 16 * 16)
    assert warm.num_cached_tokens > 64, "a block of attention at least"
    assert numbers(warm) == numbers(cold)
    statistics = engine.statistics()
    assert statistics.prompt_tokens - computed == 2 * length - warm.num_cached_tokens
    assert statistics.pages_free == statistics.pages_total


@NEEDS_NATIVE
@pytest.mark.guarantee("R77")
@pytest.mark.slow
def test_a_conversation_that_goes_on_gives_the_bits_of_one_that_is_computed_anew(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=100, logprobs=3, ignore_eos=True)
    [first] = engine.generate([f"Now: {TEXT[:200]}"], params)
    said = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    turns = [[*said, 40, 41, 42], [*said, 50, 51]]
    found = engine.generate(turns, params)

    assert [output.num_cached_tokens for output in found] == [(len(said) - 1) // 16 * 16] * 2
    with Engine("demo", page_size=16, prefill_chunk_tokens=24, threads=1, prefix_cache=False) as cold:
        computed = cold.generate(turns, params)
    assert [output.num_cached_tokens for output in computed] == [0, 0]
    assert list(map(numbers, found)) == list(map(numbers, computed))


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    """Computes every prompt itself, whole."""
    with Engine("demo", page_size=16, prefix_cache=False, threads=1) as engine:
        yield engine


@pytest.mark.guarantee("R73")
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
def test_prompts_computed_at_the_same_time_give_the_bits_of_each_alone(
    engine: Engine, alone: Engine, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=8, logprobs=3, ignore_eos=True)
    several = attrs.evolve(params, n=4)
    start = f"at {temperature} "
    burst = [start + TEXT + end for end in (" a", " page", " a")] + [start + TEXT[:200] + " b", start + TEXT]
    computed = engine.statistics().prompt_tokens
    together = engine.generate(burst, params)
    [many] = engine.generate(["of " + start + TEXT], several)
    statistics = engine.statistics()

    assert [numbers(output) for output in together] == [numbers(alone.generate([text], params)[0]) for text in burst]
    assert numbers(many) == numbers(alone.generate(["of " + start + TEXT], several)[0])
    lengths = [len(output.prompt_token_ids) for output in together]
    assert sum(lengths[:3]) > 3 * 64, "more than a block of attention each"
    # A chunk of 24 ends in the middle of a page of 16, which the next one may begin anew.
    assert statistics.prompt_tokens - computed < 1.8 * (lengths[0] + len(many.prompt_token_ids))
    assert statistics.pages_free == statistics.pages_total
