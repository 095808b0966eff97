"""How one request wants its tokens chosen. Pure data; travels inside ``Generate`` and ``Submit``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from ..errors import RequestInvalid
from .unicode_text import check_unicode

__all__ = ["SamplingParams", "sampling_from_mapping"]

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _number(low: float, high: float, *, low_open: bool = False, whole: bool = False) -> Check:
    """Validator: a finite number in [low, high], or (low, high] with ``low_open``; bool is not a number."""

    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value > high or value < low or (low_open and value == low):
            interval = f"{'(' if low_open else '['}{low:g}, {high:g}]"
            raise RequestInvalid(
                f"SamplingParams.{field.name} is {value!r}; it must be {'an integer' if whole else 'a number'}"
                f" in {interval}",
                param=field.name,
            )

    return check


def _optional(check: Check) -> Check:
    def maybe(owner: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value is not None:
            check(owner, field, value)

    return maybe


def _flag(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestInvalid(f"SamplingParams.{field.name} is {value!r}; it must be True or False", param=field.name)


def _as_strings(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _strings(_: Any, field: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    for item in value:
        if not isinstance(item, str) or not item:
            rule = "each entry must be a non-empty string"
            raise RequestInvalid(f"SamplingParams.{field.name} holds {item!r}; {rule}", param=field.name)
        check_unicode(item, f"an entry of SamplingParams.{field.name}", param=field.name)


def _token_ids(_: Any, field: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 2**31:
            rule = "each entry must be a token id >= 0"
            raise RequestInvalid(f"SamplingParams.{field.name} holds {item!r}; {rule}", param=field.name)


def _field(default: Any, check: Check, converter: Callable[[Any], Any] | None = None) -> Any:
    return attrs.field(default=default, converter=converter, metadata={"check": check})


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Checked when made; raises ``RequestInvalid`` naming the field.

    Names and meanings follow vLLM's, so that a user can switch by changing an import.
    """

    max_tokens: int = _field(256, _number(1, 2**31 - 1, whole=True))
    """Most tokens generated; capped to what the context leaves after the prompt."""
    temperature: float = _field(1.0, _number(0, 100))
    """Logits are divided by it; 0 is greedy (lowest token id wins a tie)."""
    top_p: float = _field(1.0, _number(0, 1, low_open=True))
    """Keep the smallest set of tokens whose probabilities add up to at least this; 1 keeps all."""
    top_k: int = _field(0, _number(0, 2**31 - 1, whole=True))
    """Keep this many most probable tokens; 0 keeps all."""
    min_p: float = _field(0.0, _number(0, 1))
    """Drop tokens less probable than this fraction of the most probable one; 0 drops none."""
    seed: int | None = _field(None, _optional(_number(0, 2**63 - 1, whole=True)))
    """Equal seed, prompt and parameters give equal tokens on every replica. None: drawn at admission, and recorded."""
    stop: tuple[str, ...] = _field((), _strings, converter=_as_strings)
    """Texts that end the request; the text before the first of them is returned."""
    stop_token_ids: tuple[int, ...] = _field((), _token_ids, converter=tuple)
    """Token ids that end the request, besides the model's own end-of-sequence ids."""
    include_stop_str_in_output: bool = _field(False, _flag)
    """Text that ends the request, a stop string or the text of a stop token, is returned, too."""
    ignore_eos: bool = _field(False, _flag)
    """Go on past the model's end-of-sequence ids."""
    min_tokens: int = _field(0, _number(0, 2**31 - 1, whole=True))
    """No end-of-sequence or stop id is chosen before this many tokens."""
    logprobs: int | None = _field(None, _optional(_number(0, 20, whole=True)))
    """For every token its log-probability and those of this many most probable ones; None gives none."""
    n: int = _field(1, _number(1, 64, whole=True))
    """Completions per prompt; completion i uses seed + i."""
    presence_penalty: float = _field(0.0, _number(-2, 2))
    """Subtracted from the logit of every token already generated."""
    frequency_penalty: float = _field(0.0, _number(-2, 2))
    """Subtracted from a token's logit once for every time it was generated."""
    repetition_penalty: float = _field(1.0, _number(0, 10, low_open=True))
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, arXiv:1909.05858)."""

    def __attrs_post_init__(self) -> None:
        if not self._is_usual:
            for field in attrs.fields(SamplingParams):
                field.metadata["check"](self, field, getattr(self, field.name))
        if self.min_tokens > self.max_tokens:
            raise RequestInvalid(
                f"SamplingParams.min_tokens is {self.min_tokens}; it must not exceed max_tokens, {self.max_tokens}",
                param="min_tokens",
            )

    @property
    def _is_usual(self) -> bool:
        """Nothing that needs a closer look: it is made in every process a request passes, and checked each time."""
        temperature, seed = self.temperature, self.seed
        others = (
            self.top_p, self.top_k, self.min_p, self.stop, self.stop_token_ids, self.include_stop_str_in_output,
            self.min_tokens, self.logprobs, self.n, self.presence_penalty, self.frequency_penalty,
            self.repetition_penalty,
        )  # fmt: skip
        return (
            others == _USUAL
            and tuple(map(type, others)) == _USUAL_TYPES  # True is no 1
            and type(self.max_tokens) is int
            and 1 <= self.max_tokens < 2**31
            and type(self.ignore_eos) is bool
            and type(temperature) in (float, int)
            and 0.0 <= temperature <= 100.0
            and (seed is None or (type(seed) is int and 0 <= seed < 2**63))
        )


_USUAL: tuple[Any, ...] = (1.0, 0, 0.0, (), (), False, 0, None, 1, 0.0, 0.0, 1.0)
_USUAL_TYPES = tuple(map(type, _USUAL))


def sampling_from_mapping(fields: Mapping[str, Any]) -> SamplingParams:
    """``SamplingParams`` from names and values; an unknown name raises ``RequestInvalid`` with the nearest match."""
    known = [field.name for field in attrs.fields(SamplingParams)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise RequestInvalid(f"SamplingParams has no field {name!r}; {hint}")
    return SamplingParams(**fields)
