"""From the checked fields of a request to what the engine is asked: prompts, sampling, handling. Pure.

Owns: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from ...actors.handling import ANYHOW, Handling
from ...actors.sampling import SamplingParams
from ...actors.scheduler import check_prompt_length
from ...errors import BadTarget, RequestInvalid
from .fields import CHAT, COMPLETIONS, MAX_COMPLETIONS, SAMPLING_NAMES, parse

__all__ = ["Wanted", "chat_wanted", "completion_wanted"]

RANK_HEADER = b"x-data-parallel-rank"
SESSION_HEADER = b"x-session-id"

Headers = Sequence[tuple[bytes, bytes]]


@attrs.frozen(kw_only=True)
class Wanted:
    """One request to generate."""

    model: str | None
    messages: Sequence[Mapping[str, str]] = ()
    prompts: Sequence[str | Sequence[int]] = ()  # empty for a chat
    params: SamplingParams
    handling: Handling
    is_stream: bool
    with_usage: bool
    """A stream ends with a chunk that has the usage."""


def chat_wanted(body: bytes, headers: Headers, defaults: Mapping[str, Any]) -> Wanted:
    """A body of ``POST /v1/chat/completions``. Raises ``RequestInvalid``, ``BadTarget``.

    defaults: fields of ``SamplingParams`` for what is left out
    """
    given = parse(CHAT, body)
    if given.get("tools") and given.get("tool_choice") != "none":
        raise RequestInvalid('tools are given; they are taken only with tool_choice "none"', param="tools")
    newer, older = given.get("max_completion_tokens"), given.get("max_tokens")
    if newer is not None:
        if older not in (None, newer):
            text = f"max_tokens is {older} and max_completion_tokens is {newer}; give one of them"
            raise RequestInvalid(text, param="max_tokens")
        given["max_tokens"] = newer
    top = given.pop("top_logprobs", None)
    if given.pop("logprobs", False):
        given["logprobs"] = top or 0
    elif top:
        raise RequestInvalid("top_logprobs is given without logprobs, which must be true", param="top_logprobs")
    names = {"max_tokens": "max_completion_tokens"} if older is None else {}
    return _wanted(given, headers, defaults, names, messages=given["messages"])


def completion_wanted(body: bytes, headers: Headers, defaults: Mapping[str, Any], max_model_len: int) -> Wanted:
    """A body of ``POST /v1/completions``, as above. Raises ``RequestInvalid``, ``BadTarget``, ``ContextTooLong``."""
    given = parse(COMPLETIONS, body)
    prompts = given["prompt"]
    for prompt in prompts:
        if type(prompt) is list:  # before millions of ids are packed and sent
            check_prompt_length(len(prompt), max_model_len)
    wanted = _wanted(given, headers, defaults, {}, prompts=prompts)
    if len(prompts) * wanted.params.n > MAX_COMPLETIONS:
        text = (
            f"{len(prompts)} prompts with n {wanted.params.n}; at most {MAX_COMPLETIONS} completions are made at once"
        )
        raise RequestInvalid(text, param="n")
    return wanted


def _wanted(
    given: dict[str, Any], headers: Headers, defaults: Mapping[str, Any], names: Mapping[str, str], **prompt: Any
) -> Wanted:
    is_stream = given.get("stream", False)
    if "stream_options" in given and not is_stream:
        raise RequestInvalid("stream_options is given without stream, which must be true", param="stream_options")
    try:
        params = SamplingParams(**{**defaults, **{name: given[name] for name in given.keys() & SAMPLING_NAMES}})
    except RequestInvalid as error:  # in the client's words
        param = names.get(error.param, error.param)
        raise RequestInvalid(str(error).replace(f"SamplingParams.{error.param}", param), param=param) from None
    return Wanted(
        model=given.get("model"),
        params=params,
        handling=_handling(given, headers),
        is_stream=is_stream,
        with_usage=given.get("stream_options", False),
        **prompt,
    )


def _handling(given: Mapping[str, Any], headers: Headers) -> Handling:
    """From body and headers; what both say must be the same."""
    ranks = [_rank(value) for name, value in headers if name == RANK_HEADER]
    sessions = [value.decode(errors="replace") for name, value in headers if name == SESSION_HEADER]
    fields = {name: given[name] for name in ("priority", "replica", "dp_rank") if name in given}
    if "session_id" in given:
        sessions.append(given["session_id"])
    if sessions:
        if not _is_one(sessions):
            raise RequestInvalid("session_id and X-Session-Id name different sessions", param="session_id")
        fields["session"] = sessions[0]
    try:
        if not fields and not ranks:
            return ANYHOW
        handling = Handling(**fields)
        if not ranks:
            return handling
        if not _is_one([*ranks, *([] if handling.dp_rank is None else [handling.dp_rank])]):
            text = (
                f"dp_rank is {handling.dp_rank} and X-Data-Parallel-Rank {', '.join(map(str, ranks))}; they must agree"
            )
            raise BadTarget(text, param="dp_rank")
        return attrs.evolve(handling, dp_rank=ranks[0])
    except RequestInvalid as error:
        if error.param != "session":
            raise
        raise RequestInvalid(str(error).replace("session is", "session_id is"), param="session_id") from None


def _rank(value: bytes) -> int:
    if not value.isdigit() or len(value) > 10:  # bytes: ASCII digits alone
        raise BadTarget(f"X-Data-Parallel-Rank is {value[:50]!r}; it must be a decimal integer", param="dp_rank")
    return int(value)


def _is_one(values: Iterable[object]) -> bool:
    return len(set(values)) == 1
