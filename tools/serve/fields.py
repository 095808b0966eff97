"""The fields of a request, once: name, rule, meaning and what becomes of it. JSON in, checked values out. Pure.

Owns: nothing. Nothing a client says is ignored silently: a field is used, or named here as ignored, or refused unless
it says what would happen anyway, or unknown and refused with the nearest name.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import msgspec

from ...actors.sampling import SamplingParams
from ...errors import RequestInvalid
from .failures import Refused

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "DETOKENIZE",
    "MAX_COMPLETIONS",
    "SAMPLING_NAMES",
    "TOKENIZE",
    "Field",
    "Fields",
    "Where",
    "parse",
]

MAX_STOPS = 64
MAX_STOP_IDS = 1024
MAX_COMPLETIONS = 256
"""Prompts of one request times completions of each."""
MAX_MESSAGES = 4096

Take = Callable[[Any], Any]
"""A JSON value, never null, as what is used; raises ``RequestInvalid`` with the rule."""


class Where(enum.Enum):
    """What becomes of a field."""

    SAMPLING = "used"  # goes to ``SamplingParams``, under its own name
    HANDLING = "used to place it"  # goes to ``Handling``
    SERVER = "used by the server"
    IGNORED = "ignored"
    NEUTRAL = "not supported"  # accepted if it says what would happen anyway


@attrs.frozen
class Field:
    """One field of a request. null stands for not given, unless the field must be."""

    name: str
    where: Where
    kind: str  # for people: "number", "text or list of texts", …
    text: str  # what it does
    take: Take
    is_needed: bool = False


Fields = Mapping[str, Field]


def parse(fields: Fields, body: bytes) -> dict[str, Any]:
    """The fields given, checked one by one, without those that are null.

    Raises ``RequestInvalid`` naming the field, ``Refused`` for what has no fields.
    """
    try:
        given = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # a DecodeError, or a UnicodeDecodeError
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON: {error}"
        raise Refused(400, f"the body {what}") from None
    if type(given) is not dict:
        raise Refused(400, f"the body is {_shown(given)}; it must be a JSON object")
    taken = {}
    for name, value in given.items():
        field = fields.get(name)
        if field is None:
            raise RequestInvalid(f"there is no field {_shown(name)} here; {_nearest(name, fields)}", param=name[:100])
        if value is not None:
            try:
                taken[name] = field.take(value)
            except RequestInvalid as error:
                if error.param:
                    raise
                raise RequestInvalid(f"{name} is {_shown(value)}; {error}", param=name) from None
    for field in fields.values():
        if field.is_needed and field.name not in taken:
            raise RequestInvalid(f"{field.name} is missing; it must be {field.kind}", param=field.name)
    return taken


def _nearest(name: str, fields: Fields) -> str:
    near = difflib.get_close_matches(name[:100], fields, n=1)
    return f"did you mean {near[0]!r}?" if near else "docs/serving.md lists those there are"


def _shown(value: object) -> str:
    """A value as it may be repeated in a sentence: what it is, and its text only if that is short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}…"


# Rules of single values. The ranges of sampling parameters are those of ``SamplingParams``, checked there.


def _must(rule: str) -> RequestInvalid:
    return RequestInvalid(f"it must be {rule}")


def _number(value: Any) -> Any:
    if type(value) is not float and type(value) is not int:  # True is no number
        raise _must("a number")
    return value


def _integer(value: Any) -> Any:
    if type(value) is not int:
        raise _must("an integer")
    return value


def _flag(value: Any) -> Any:
    if type(value) is not bool:
        raise _must("true or false")
    return value


def _text(value: Any) -> Any:
    if type(value) is not str:
        raise _must("text")
    return value


def _stops(value: Any) -> Any:
    texts = [value] if type(value) is str else value
    if type(texts) is not list or not all(type(text) is str for text in texts) or len(texts) > MAX_STOPS:
        raise _must(f"text or a list of at most {MAX_STOPS} texts")
    return tuple(texts)


def _ids(value: Any) -> Any:
    if type(value) is not list or not _are_ids(value):
        raise _must("a list of token ids, integers in [0, 2147483648)")
    return value


def _stop_ids(value: Any) -> Any:
    if len(_ids(value)) > MAX_STOP_IDS:
        raise _must(f"a list of at most {MAX_STOP_IDS} token ids")
    return tuple(value)


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value) and (not value or (min(value) >= 0 and max(value) < 2**31))


def _logprob_count(value: Any) -> Any:
    if type(value) is not int or not 0 <= value <= 20:
        raise _must("an integer in [0, 20]")
    return value


def _prompts(value: Any) -> list[Any]:
    """Any of the four shapes as a list of prompts, each a text or a list of ids."""
    if type(value) is str:
        return [value]
    if type(value) is list and value:
        if type(value[0]) is int and _are_ids(value):
            return [value]
        is_texts = all(type(item) is str for item in value)
        if is_texts or all(type(item) is list and _are_ids(item) for item in value):
            if len(value) > MAX_COMPLETIONS:
                raise _must(f"at most {MAX_COMPLETIONS} prompts")
            return value
    raise _must("text, a list of texts, a list of token ids, or a list of those lists; and not empty")


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NO_USE_IN_A_MESSAGE: dict[str, Sequence[Any]] = {
    "name": (), "refusal": (), "audio": (), "function_call": (), "tool_calls": ([],), "tool_call_id": (),
}  # fmt: skip


def _messages(value: Any) -> list[dict[str, str]]:
    if type(value) is not list or not value:
        raise _must("a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise _must(f"at most {MAX_MESSAGES} messages")
    return [_message(f"messages[{position}]", message) for position, message in enumerate(value)]


def _message(where: str, message: Any) -> dict[str, str]:
    if type(message) is not dict:
        raise RequestInvalid(f"{where} is {_shown(message)}; it must be an object with role and content", param=where)
    for name, value in message.items():
        if name in ("role", "content") or value is None:
            continue
        if name not in _NO_USE_IN_A_MESSAGE or value not in _NO_USE_IN_A_MESSAGE[name]:
            text = f"{where} has {_shown(name)}, which is not supported"
            raise RequestInvalid(text, param=f"{where}.{name[:100]}")
    role = message.get("role")
    if type(role) is not str or role not in _ROLES:
        roles = ", ".join(_ROLES)
        raise RequestInvalid(f"{where}.role is {_shown(role)}; it must be one of {roles}", param=f"{where}.role")
    return {"role": _ROLES[role], "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    if type(content) is str:
        return content
    rule = 'it must be text, or a list of {"type": "text", "text": …}'
    if type(content) is not list or not content:
        raise RequestInvalid(f"{where} is {_shown(content)}; {rule}", param=where)
    parts = []
    for position, part in enumerate(content):
        is_text = type(part) is dict and part.keys() == {"type", "text"} and part["type"] == "text"
        if not is_text or type(part["text"]) is not str:
            raise RequestInvalid(f"{where}[{position}] is {_shown(part)}; {rule}", param=f"{where}[{position}]")
        parts.append(part["text"])
    return "".join(parts)


def _stream_options(value: Any) -> bool:
    """Whether usage is wanted."""
    if type(value) is not dict:
        raise _must("an object")
    for name, option in value.items():
        if name == "include_usage" and type(option) is bool:
            continue
        if name == "include_obfuscation" and option is False:
            continue
        text = f"stream_options.{name[:100]} is {_shown(option)}; there is include_usage, true or false"
        raise RequestInvalid(text, param=f"stream_options.{name[:100]}")
    return bool(value.get("include_usage", False))


def _tools(value: Any) -> list[Any]:
    if type(value) is not list or not all(type(tool) is dict for tool in value):
        raise _must("a list of objects")
    return value


def _plain_text_only(value: Any) -> Any:
    if value != {"type": "text"}:
        raise _must('{"type": "text"}: no other format is supported')
    return value


def _neutral(*allowed: Any) -> Take:
    """Only what would happen anyway; ``True`` is not 1 here, either."""

    def take(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            shown = ", ".join(msgspec.json.encode(one).decode() for one in (None, *allowed))
            raise RequestInvalid(f"this server does not support it and takes only {shown}")
        return value

    return take


def _anything(value: Any) -> Any:
    return value


# The tables.

_SAMPLING = (
    Field("temperature", Where.SAMPLING, "number", "0 is greedy; default 1, or the model's", _number),
    Field("top_p", Where.SAMPLING, "number", "smallest set of tokens whose probabilities add up to it", _number),
    Field("top_k", Where.SAMPLING, "integer", "keep so many most probable tokens; 0 keeps all", _integer),
    Field("min_p", Where.SAMPLING, "number", "drop tokens below this fraction of the most probable", _number),
    Field("seed", Where.SAMPLING, "integer", "equal seed, equal tokens; completion i uses seed + i", _integer),
    Field("stop", Where.SAMPLING, "text or list of texts", "end before the first of them", _stops),
    Field("stop_token_ids", Where.SAMPLING, "list of integers", "end at any of these tokens", _stop_ids),
    Field("include_stop_str_in_output", Where.SAMPLING, "boolean", "the text that ends it is returned, too", _flag),
    Field("ignore_eos", Where.SAMPLING, "boolean", "go on past the model's end of text", _flag),
    Field("min_tokens", Where.SAMPLING, "integer", "no end before so many tokens", _integer),
    Field("n", Where.SAMPLING, "integer", "completions per prompt, at most 64", _integer),
    Field("presence_penalty", Where.SAMPLING, "number", "subtracted for tokens already generated", _number),
    Field("frequency_penalty", Where.SAMPLING, "number", "subtracted once for every time generated", _number),
    Field("repetition_penalty", Where.SAMPLING, "number", "divides logits of tokens seen; 1 is off", _number),
    Field("max_tokens", Where.SAMPLING, "integer", "most tokens generated; default 256, or the model's", _integer),
)
_HANDLING = (
    Field("priority", Where.HANDLING, "integer", "lower goes first; default 0", _anything),
    Field("session_id", Where.HANDLING, "text", "requests of one session go to one replica; also X-Session-Id", _text),
    Field("replica", Where.HANDLING, "integer", "serve it at this replica and nowhere else", _anything),
    Field("dp_rank", Where.HANDLING, "integer", "serve it at this rank; also X-Data-Parallel-Rank", _anything),
)
_COMMON = (
    Field("model", Where.SERVER, "text", "the served model's name; may be left out", _text),
    Field("stream", Where.SERVER, "boolean", "answer as server-sent events", _flag),
    Field("stream_options", Where.SERVER, "object", "include_usage: a last chunk with usage", _stream_options),
    Field("user", Where.IGNORED, "anything", "ignored", _anything),
    Field("metadata", Where.IGNORED, "anything", "ignored", _anything),
    Field("store", Where.IGNORED, "anything", "ignored", _anything),
    Field("logit_bias", Where.NEUTRAL, "object", "only {}", _neutral({})),
    Field("service_tier", Where.NEUTRAL, "text", "only auto or default", _neutral("auto", "default")),
    Field("best_of", Where.NEUTRAL, "integer", "only 1", _neutral(1)),
    Field("use_beam_search", Where.NEUTRAL, "boolean", "only false", _neutral(False)),
    Field("length_penalty", Where.NEUTRAL, "number", "only 1", _neutral(1, 1.0)),
    Field("skip_special_tokens", Where.NEUTRAL, "boolean", "only true", _neutral(True)),
    Field("prompt_logprobs", Where.NEUTRAL, "integer", "only null", _neutral()),
    Field("truncate_prompt_tokens", Where.NEUTRAL, "integer", "only null", _neutral()),
    Field("safety_identifier", Where.NEUTRAL, "text", "only null", _neutral()),
    Field("prompt_cache_key", Where.NEUTRAL, "text", "only null: see session_id", _neutral()),
    Field("response_format", Where.NEUTRAL, "object", 'only {"type": "text"}', _plain_text_only),
    *_HANDLING,
    *_SAMPLING,
)


def _table(*fields: Field) -> Fields:
    table = {field.name: field for field in fields}
    assert len(table) == len(fields)
    return table


CHAT = _table(
    Field("messages", Where.SERVER, "list of messages", "role and content of each turn", _messages, is_needed=True),
    Field("max_completion_tokens", Where.SERVER, "integer", "new name of max_tokens", _integer),
    Field("logprobs", Where.SERVER, "boolean", "log-probability of every token", _flag),
    Field("top_logprobs", Where.SERVER, "integer", "and of so many most probable ones, at most 20", _logprob_count),
    Field("tools", Where.SERVER, "list of objects", 'only with tool_choice "none"', _tools),
    Field("tool_choice", Where.NEUTRAL, "text", 'only "none"', _neutral("none")),
    Field("parallel_tool_calls", Where.NEUTRAL, "boolean", "changes nothing without tools", _flag),
    Field("functions", Where.NEUTRAL, "list", "only []", _neutral([])),
    Field("function_call", Where.NEUTRAL, "text", 'only "none"', _neutral("none")),
    Field("modalities", Where.NEUTRAL, "list", 'only ["text"]', _neutral(["text"])),
    Field("audio", Where.NEUTRAL, "object", "only null", _neutral()),
    Field("prediction", Where.NEUTRAL, "object", "only null", _neutral()),
    Field("reasoning_effort", Where.NEUTRAL, "text", 'only "none"', _neutral("none")),
    Field("verbosity", Where.NEUTRAL, "text", "only null", _neutral()),
    Field("web_search_options", Where.NEUTRAL, "object", "only null", _neutral()),
    Field("add_generation_prompt", Where.NEUTRAL, "boolean", "only true", _neutral(True)),
    Field("chat_template", Where.NEUTRAL, "text", "only null", _neutral()),
    Field("chat_template_kwargs", Where.NEUTRAL, "object", "only {}", _neutral({})),
    *_COMMON,
)
"""``POST /v1/chat/completions``."""

COMPLETIONS = _table(
    Field(
        "prompt", Where.SERVER, "text, list of texts, ids, list of ids", "what to go on from", _prompts, is_needed=True
    ),
    Field("logprobs", Where.SAMPLING, "integer", "log-probabilities of so many tokens, at most 20", _logprob_count),
    Field("echo", Where.NEUTRAL, "boolean", "only false", _neutral(False)),
    Field("suffix", Where.NEUTRAL, "text", "only null", _neutral()),
    *_COMMON,
)
"""``POST /v1/completions``."""

TOKENIZE = _table(
    Field("model", Where.SERVER, "text", "the served model's name; may be left out", _text),
    Field("prompt", Where.SERVER, "text", "either this", _text),
    Field("messages", Where.SERVER, "list of messages", "or this", _messages),
)
"""``POST /tokenize``."""

DETOKENIZE = _table(
    Field("model", Where.SERVER, "text", "the served model's name; may be left out", _text),
    Field("tokens", Where.SERVER, "list of integers", "token ids", _ids, is_needed=True),
)
"""``POST /detokenize``."""

SAMPLING_NAMES = frozenset(field.name for table in (CHAT, COMPLETIONS) for field in table.values()
                           if field.where == Where.SAMPLING)  # fmt: skip
assert {field.name for field in attrs.fields(SamplingParams)} >= SAMPLING_NAMES
