"""What an answer looks like on the wire: OpenAI's objects, whole or as the chunks of a stream. Pure but for its counts.

Owns: per answer, which tokens have been told. What all chunks of one answer share is encoded once.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from ...actors.messages.serving import LogprobRow
from ...actors.outputs import CompletionOutput, RequestOutput

__all__ = ["CHAT_SHAPE", "DONE", "TEXT_SHAPE", "Answer", "Shape"]

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Said for a probability of 0: JSON has no infinity."""

_json = msgspec.json.Encoder().encode


@attrs.frozen(kw_only=True)
class Shape:
    """What differs between the two endpoints."""

    prefix: str  # of the id
    whole: str  # name of the object
    chunk: str
    first: bytes  # members of a choice before its first text; empty: none are needed
    opens: bytes  # before a text in a chunk
    closes: bytes
    is_chat: bool


CHAT_SHAPE = Shape(
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    first=b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
    opens=b'"delta":{"content":',
    closes=b"}",
    is_chat=True,
)
TEXT_SHAPE = Shape(
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    first=b"",
    opens=b'"text":',
    closes=b"",
    is_chat=False,
)


class Answer:
    """One answer to one request, of one or several prompts with ``n`` completions each.

    Completion i of prompt p is choice p · n + i.
    """

    def __init__(
        self, shape: Shape, *, created: int, model: str, fingerprint: str, run: str, n: int, with_usage: bool = False
    ) -> None:
        self._shape = shape
        self._created = created
        self._model = model
        self._fingerprint = fingerprint
        self._run = run
        self._n = n
        self._with_usage = with_usage
        self._head = b""  # of every chunk, from "data: " to a choice's index
        self._tail = b""
        self._begun: set[int] = set()
        self._offsets: dict[int, _Offsets] = {}
        self._completion_tokens = 0
        self._prompts: dict[int, tuple[int, int]] = {}  # tokens of each prompt, and how many of them were cached

    @property
    def completion_tokens(self) -> int:
        """Tokens told so far, over all choices."""
        return self._completion_tokens

    def _members(self, request_id: str, name: str) -> dict[str, Any]:
        return {
            "id": f"{self._shape.prefix}{self._run}-{request_id.removeprefix('req-')}",
            "object": name,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    # A stream.

    def chunks(self, prompt: int, delta: RequestOutput) -> bytes:
        """What is new of one prompt, as events; empty if there is nothing to tell yet."""
        if not self._head:
            self._open(delta.request_id)
        shape, head, tail = self._shape, self._head, self._tail
        self._prompts[prompt] = (len(delta.prompt_token_ids), delta.num_cached_tokens)
        pieces: list[bytes] = []
        for part in delta.outputs:
            index = prompt * self._n + part.index
            self._completion_tokens += len(part.token_ids)
            start = b"%s%d," % (head, index)
            if index not in self._begun:
                self._begun.add(index)
                if shape.first:
                    pieces += (start, shape.first, tail)
            if not (part.text or part.finish_reason or part.logprobs):
                continue  # half a character, or what may become a stop string
            pieces += (start, shape.opens, _json(part.text), shape.closes)
            if part.logprobs:
                pieces += (b',"logprobs":', _json(self._logprobs(index, part.logprobs)))
            else:
                pieces.append(b',"logprobs":null')
            if part.finish_reason is None:
                pieces.append(b',"finish_reason":null}')
            else:
                pieces.append(b',"finish_reason":%s,' % _json(part.finish_reason))
                pieces.append(_json(_ending(delta, part))[1:])
            pieces.append(tail)
        return b"".join(pieces)

    def _open(self, request_id: str) -> None:
        members = _json(self._members(request_id, self._shape.chunk))[:-1]
        usage = b',"usage":null' if self._with_usage else b""
        self._head = b'data: %s%s,"choices":[{"index":' % (members, usage)
        self._tail = b"]}\n\n"
        self._last = b"data: %s" % members

    def last_words(self) -> bytes:
        """After the last chunk: usage, if it is wanted, and the mark of a good end."""
        if not self._with_usage:
            return DONE
        return b'%s,"choices":[],"usage":%s}\n\n%s' % (self._last, _json(self._usage()), DONE)

    # A whole.

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Everything at once."""
        choices = []
        for prompt, output in enumerate(outputs):
            self._prompts[prompt] = (len(output.prompt_token_ids), output.num_cached_tokens)
            for part in output.outputs:
                index = prompt * self._n + part.index
                self._completion_tokens += len(part.token_ids)
                text = {"message": {"role": "assistant", "content": part.text, "refusal": None}}
                choices.append(
                    {
                        "index": index,
                        **(text if self._shape.is_chat else {"text": part.text}),
                        "logprobs": None if part.logprobs is None else self._logprobs(index, part.logprobs),
                        "finish_reason": part.finish_reason,
                        **_ending(output, part),
                    }
                )
        return {**self._members(outputs[0].request_id, self._shape.whole), "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }

    def _logprobs(self, index: int, rows: Sequence[LogprobRow]) -> dict[str, Any]:
        if self._shape.is_chat:
            return {"content": [_chat_row(row) for row in rows], "refusal": None}
        offsets = self._offsets.setdefault(index, _Offsets())
        return {
            "text_offset": [offsets.next(row.token_bytes) for row in rows],
            "token_logprobs": [_finite(row.logprob) for row in rows],
            "tokens": [_token_text(row.token_bytes) for row in rows],
            "top_logprobs": [
                {
                    **dict(zip(map(_token_text, row.top_bytes), map(_finite, row.top_logprobs), strict=True)),
                    _token_text(row.token_bytes): _finite(row.logprob),
                }
                for row in rows
            ],
        }


class _Offsets:
    """Where the text of each token begins, in characters, when tokens may be parts of a character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, token_bytes: bytes) -> int:
        """Of the token that comes next; of one that goes on within a character, where that one begins."""
        if self._decoder.getstate()[0] and not 0x80 <= (token_bytes or b"a")[0] < 0xC0:
            self._characters += len(self._decoder.decode(b"", final=True))  # it never became a character
        offset = self._characters
        self._characters += len(self._decoder.decode(token_bytes))
        return offset


def _ending(output: RequestOutput, part: CompletionOutput) -> dict[str, Any]:
    """What a choice tells at its end besides OpenAI's members."""
    return {
        "stop_reason": part.stop_reason,
        "chipbus": {"replica": output.replica, "dp_rank": output.dp_rank, "attempt": output.attempt},
    }


def _chat_row(row: LogprobRow) -> dict[str, Any]:
    return {
        "token": _token_text(row.token_bytes),
        "logprob": _finite(row.logprob),
        "bytes": list(row.token_bytes),
        "top_logprobs": [
            {"token": _token_text(each), "logprob": _finite(logprob), "bytes": list(each)}
            for each, logprob in zip(row.top_bytes, row.top_logprobs, strict=True)
        ],
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _token_text(token_bytes: bytes) -> str:
    r"""A token as text; one that is no whole character as OpenAI writes it, ``bytes:\xe2\x82``."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
