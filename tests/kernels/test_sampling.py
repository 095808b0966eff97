"""Token choice against a plain numpy reference in fp64: bans, penalties, truncation, draws, log-probabilities."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chipbus.kernels.sampling import Choice, choose

PLAIN = Choice(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    uniform=0.0,
    prompt_tokens=0,
    logprobs=-1,
    history=np.zeros(0, np.int32),
    banned=np.zeros(0, np.int32),
)


def with_settings(**changes: Any) -> Choice:
    for name in ("history", "banned"):
        if name in changes:
            changes[name] = np.array(changes[name], np.int32)
    return attrs.evolve(PLAIN, **changes)


def adjusted(logits: NDArray[np.float64], choice: Choice) -> NDArray[np.float64]:
    out = logits.copy()
    for token in set(choice.history.tolist()):
        out[token] = (
            out[token] / choice.repetition_penalty if out[token] > 0 else out[token] * choice.repetition_penalty
        )
    generated = choice.history[choice.prompt_tokens :].tolist()
    for token in set(generated):
        out[token] -= choice.presence_penalty + choice.frequency_penalty * generated.count(token)
    if len(set(choice.banned.tolist())) < len(out):
        out[choice.banned] = -np.inf
    return out


def kept_weights(logits: NDArray[np.float64], choice: Choice) -> NDArray[np.float64]:
    """Weight of every token, 0 where it may not be chosen."""
    scaled = adjusted(logits, choice) / choice.temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    keep = [token for token in order if weights[token] > 0 and weights[token] >= choice.min_p]
    if choice.top_k:
        keep = keep[: choice.top_k]
    if choice.top_p < 1:
        shares = np.cumsum(weights[keep]) / weights[keep].sum()
        keep = keep[: int(np.searchsorted(shares, choice.top_p)) + 1]
    out = np.zeros_like(weights)
    out[keep] = weights[keep]
    return out


choices = st.builds(
    with_settings,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    uniform=st.floats(0, 1, exclude_max=True),
    prompt_tokens=st.just(3),
    history=st.lists(st.integers(0, 19), min_size=3, max_size=9),
    banned=st.lists(st.integers(0, 19), max_size=4),
)


@settings(deadline=None, print_blob=True, max_examples=300)
@given(choice=choices, seed=st.integers(0, 10_000), vocab=st.sampled_from([20, 513, 1500]))
@pytest.mark.guarantee("K6")
def test_a_draw_falls_where_the_inverse_cdf_says(choice: Choice, seed: int, vocab: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)
    token = choose(logits, choice).token_id
    weights = kept_weights(logits.astype(np.float64), choice)
    if weights[token] == 0:  # allowed only where fp32 decides the edge of the nucleus or of min_p the other way
        near = attrs.evolve(choice, top_p=min(1.0, choice.top_p * (1 + 1e-5)), min_p=choice.min_p * (1 - 1e-5))
        weights = kept_weights(logits.astype(np.float64), near)
        assert weights[token] > 0
        return
    upper = weights[: token + 1].sum() / weights.sum()
    lower = upper - weights[token] / weights.sum()
    slack = 1e-5
    assert lower - slack <= choice.uniform <= upper + slack


@settings(deadline=None, print_blob=True, max_examples=200)
@given(choice=choices, seed=st.integers(0, 10_000))
def test_greedy_takes_the_largest_adjusted_logit(choice: Choice, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, 300).astype(np.float32)
    token = choose(logits, attrs.evolve(choice, temperature=0.0)).token_id
    assert token == int(adjusted(logits.astype(np.float64), choice).argmax())


@pytest.mark.guarantee("K7")
@pytest.mark.parametrize("vocab", [10, 5000, 151_936])
def test_ties_go_to_the_lowest_id(vocab: int) -> None:
    logits = np.zeros(vocab, np.float32)
    logits[[vocab - 1, vocab // 2, 3]] = 5.0
    assert choose(logits, with_settings(temperature=0.0)).token_id == 3
    assert choose(logits, with_settings(top_k=1, uniform=0.999)).token_id == 3
    assert choose(logits, with_settings(top_k=2, uniform=0.999)).token_id == vocab // 2
    assert choose(logits, with_settings(top_p=1e-6, uniform=0.999)).token_id == 3
    found = choose(logits, with_settings(temperature=0.0, logprobs=5))
    assert found.top_ids == [*sorted([3, vocab // 2, vocab - 1]), 0, 1]


def test_every_uniform_number_chooses_a_token_that_may_be_chosen() -> None:
    logits = np.full(1300, -1e4, np.float32)
    logits[[5, 511, 512, 1299]] = [0.0, -1.0, -2.0, -3.0]
    allowed = {5, 511, 512, 1299}
    drawn = {choose(logits, with_settings(uniform=u)).token_id for u in np.linspace(0, 1, 2001)[:-1]}
    assert drawn == allowed
    edge = float(np.nextafter(1.0, 0.0))
    assert choose(logits, with_settings(uniform=edge)).token_id == 1299
    assert choose(logits, with_settings(uniform=0.0)).token_id == 5


def test_draws_follow_the_distribution() -> None:
    logits = np.random.default_rng(3).normal(0, 1, 700).astype(np.float32)
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    drawn = np.array([choose(logits, with_settings(uniform=float(u))).token_id for u in uniforms[::10]])
    exact = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    counted = np.bincount(drawn, minlength=700) / len(drawn)
    assert np.abs(np.cumsum(counted) - np.cumsum(exact)).max() < 1e-3


@pytest.mark.guarantee("K8")
def test_log_probabilities_are_of_the_logits_as_they_came() -> None:
    logits = np.random.default_rng(4).normal(0, 3, 900).astype(np.float32)
    wide = logits.astype(np.float64)
    exact = wide - np.log(np.exp(wide).sum())
    choice = with_settings(
        temperature=0.2, top_k=2, repetition_penalty=2.0, presence_penalty=2.0, history=range(40), banned=[7],
        logprobs=20, uniform=0.4,
    )  # fmt: skip
    found = choose(logits, choice)
    assert found.logprob == pytest.approx(float(exact[found.token_id]), abs=1e-5)
    order = np.argsort(-exact, kind="stable")[:20]
    assert found.top_ids == order.tolist()
    assert found.top_logprobs == pytest.approx(exact[order].tolist(), abs=1e-5)
    none = choose(logits, with_settings(logprobs=0))
    assert (none.top_ids, none.top_logprobs) == ([], [])
    assert none.logprob == pytest.approx(float(exact[none.token_id]), abs=1e-5)


def test_banned_ids_are_never_chosen_unless_nothing_is_left() -> None:
    logits = np.arange(6, dtype=np.float32)
    assert choose(logits, with_settings(temperature=0.0, banned=[5, 4, 4])).token_id == 3
    assert choose(logits, with_settings(banned=[0, 1, 2, 4, 5], uniform=0.99)).token_id == 3
    assert choose(logits, with_settings(temperature=0.0, banned=range(6))).token_id == 5


def test_penalties_count_output_and_repetition_counts_the_prompt_too() -> None:
    logits = np.array([4.0, 3.9, -1.0, 0.0], np.float32)
    history = [0, 1, 1]  # the prompt is [0]

    def greedy(**changes: Any) -> int:
        return choose(logits, with_settings(temperature=0.0, history=history, prompt_tokens=1, **changes)).token_id

    assert greedy(presence_penalty=2.0) == 0
    assert greedy(presence_penalty=-2.0) == 1
    assert greedy(frequency_penalty=-0.1) == 1
    assert greedy(repetition_penalty=10.0) == 0  # both are divided
    assert (
        choose(logits, with_settings(temperature=0.0, history=[0], prompt_tokens=1, repetition_penalty=2.0)).token_id
        == 1
    )


def test_logits_stay_as_they_are() -> None:
    logits = np.random.default_rng(5).normal(0, 1, 50).astype(np.float32)
    before = logits.copy()
    choose(
        logits,
        with_settings(history=[1, 2, 3], presence_penalty=1.0, repetition_penalty=1.5, banned=[4], top_k=5, top_p=0.5),
    )
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("top_p", [0.5, 0.99, 0.9999])
def test_a_flat_distribution_needs_more_than_the_first_candidates(top_p: float) -> None:
    logits = np.zeros(5000, np.float32)
    kept = {choose(logits, with_settings(top_p=top_p, uniform=u)).token_id for u in (0.0, 0.999999)}
    assert kept == {0, int(np.ceil(5000 * top_p - 1e-9)) - 1}
