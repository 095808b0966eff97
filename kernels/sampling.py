"""Choose tokens from logits: penalties, bans, truncation and one uniform number per row, all given by value.

Owns nothing, has no randomness. One row in, one token out; rows never influence each other. In numpy: on one row of a
large vocabulary its argmax and partition are 10 to 20 times faster than torch's, and its results do not depend on a
number of threads.

Order of operations (vLLM's): repetition, frequency and presence penalty → bans → greedy, or temperature → min_p →
top_k → top_p, each over what the ones before left → inverse CDF in ascending token id. Reported log-probabilities are
those of the logits as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from . import native

__all__ = ["Choice", "Chosen", "choose"]

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_CDF_BLOCK = 512  # weights are added up in blocks first, so that a draw scans one block and not the vocabulary
_FIRST_CANDIDATES = 1024  # sorted for top_p before more are; enough unless the distribution is flat


@attrs.frozen(kw_only=True, eq=False)
class Choice:
    """How one row's token is chosen; fields as in ``SampleRow``."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    uniform: float
    prompt_tokens: int
    logprobs: int  # -1: none
    history: NDArray[np.int32]
    banned: NDArray[np.int32]


@attrs.frozen(eq=False)
class Chosen:
    """The token, its raw log-probability and the most probable ones (nan and empty if not asked for)."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


def _argmax(values: Floats) -> int:
    return int(values.argmax())


def choose(logits: Floats, choice: Choice, largest: Callable[[Floats], int] = _argmax) -> Chosen:
    """Choose from ``logits`` (V,), which stay as they are. If every token is banned, bans are ignored.

    largest: the index of an array's largest number, the lowest among equals.
    """
    adjusted = _adjusted(logits, choice)
    token = largest(adjusted) if choice.temperature == 0 else _draw(adjusted, choice)
    if choice.logprobs < 0:
        return Chosen(token, float("nan"), [], [])
    most = logits.max()
    total = float(most) + float(np.log(np.exp(logits - most).sum(dtype=np.float64)))
    top = _descending(logits, min(choice.logprobs, len(logits)))
    return Chosen(token, float(logits[token]) - total, top.tolist(), (logits[top].astype(np.float64) - total).tolist())


def _adjusted(logits: Floats, choice: Choice) -> Floats:
    """Logits after penalties and bans: the same array if there are none."""
    history = choice.history
    has_counts = choice.presence_penalty != 0 or choice.frequency_penalty != 0
    adjusted = logits
    if len(history) and choice.repetition_penalty != 1:
        seen, _ = _distinct(history)
        picked, factor = logits[seen], np.float32(choice.repetition_penalty)
        adjusted = _replaced(adjusted, seen, np.where(picked > 0, picked / factor, picked * factor))
    if len(history) > choice.prompt_tokens and has_counts:
        seen, counts = _distinct(history[choice.prompt_tokens :])
        less = choice.presence_penalty + choice.frequency_penalty * counts
        adjusted = _replaced(adjusted, seen, adjusted[seen] - less.astype(np.float32))
    if len(choice.banned) and len(_distinct(choice.banned)[0]) < len(logits):
        adjusted = _replaced(adjusted, choice.banned, np.float32(-np.inf))
    return adjusted


def _distinct(ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], Ids]:
    """The different ones among at least one, ascending, and how often there is each.

    np.unique says the same, but imports numpy.ma when it is first used: 9 ms before the first token of a chip's life.
    """
    ids = np.sort(ids)
    begins = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    return ids[begins], np.diff(begins, append=len(ids))


def _replaced(logits: Floats, ids: NDArray[Any], values: Any) -> Floats:
    changed = logits.copy()
    changed[ids] = values
    return changed


def _draw(logits: Floats, choice: Choice) -> int:
    weights = logits / np.float32(choice.temperature)
    weights -= weights.max()  # the most probable token has weight 1
    np.exp(weights, out=weights)
    if choice.top_k == 0 and choice.top_p == 1 and choice.min_p == 0:
        return _inverse_cdf(weights, choice.uniform)
    kept = None
    if choice.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(choice.min_p))
    if choice.top_k > 0:
        kept = _largest(weights, kept, choice.top_k)
    if choice.top_p < 1:
        kept = _nucleus(weights, kept, choice.top_p)
    kept = np.sort(np.arange(len(weights)) if kept is None else kept)
    return int(kept[_inverse_cdf(weights[kept], choice.uniform)])


def _descending(values: Floats, count: int) -> Ids:
    """Ids of the ``count`` largest values, largest first, the lower id first among equals."""
    if count == 0:
        return np.empty(0, np.intp)
    if count == len(values):
        return np.argsort(-values, kind="stable")
    if native.library is not None and values.flags.c_contiguous:
        return np.array(native.library.top(values, count), np.intp)
    candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def _largest(weights: Floats, kept: Ids | None, count: int) -> Ids:
    """The ``count`` largest of those kept (ascending ids; None: all), largest first."""
    if kept is None:
        return _descending(weights, min(count, len(weights)))
    return kept[_descending(weights[kept], min(count, len(kept)))]


def _nucleus(weights: Floats, kept: Ids | None, top_p: float) -> Ids:
    """The smallest set of those kept, most probable first, whose share of their total is at least ``top_p``."""
    kept = None if kept is None else np.sort(kept)
    among = weights if kept is None else weights[kept]
    target = top_p * float(among.sum(dtype=np.float64))
    count = min(_FIRST_CANDIDATES, len(among))
    while True:
        order = _descending(among, count)
        reached = np.cumsum(among[order], dtype=np.float64)
        if reached[-1] >= target or count == len(among):
            break
        count = min(8 * count, len(among))
    nucleus = order[: int(np.searchsorted(reached, target)) + 1]
    return nucleus if kept is None else kept[nucleus]


def _inverse_cdf(weights: Floats, uniform: float) -> int:
    """The lowest index at which the running sum of weights exceeds ``uniform`` times their total."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _CDF_BLOCK), dtype=np.float64))
    target = uniform * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    inside = weights[block * _CDF_BLOCK : (block + 1) * _CDF_BLOCK]
    before = sums[block - 1] if block else 0.0
    at = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target - before, side="right"))
    # Rounding between the two levels may point past the block's last token that can be chosen: take that one.
    return block * _CDF_BLOCK + min(at, int(np.flatnonzero(inside)[-1]))
