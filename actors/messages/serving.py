"""The conversation a request is served in: engine → tokenizer → router → replica core, answered as a stream.

``Generate`` and ``Submit`` are asks. Their items are deltas, their reply ends the request, cancelling them aborts it.
"""

from __future__ import annotations

import attrs

from ...bus import TOKEN_BYTES, Lane, TokenIds, count_tokens, message
from ...errors import BadFrame
from ..handling import ANYHOW, Handling
from ..sampling import SamplingParams

__all__ = [
    "ChatTurn",
    "Detokenize",
    "Detokenized",
    "Encoded",
    "Generate",
    "LogprobRow",
    "Submit",
    "TextDelta",
    "TextDone",
    "TokenDelta",
    "Tokenize",
    "TokensDone",
]


@attrs.frozen
class ChatTurn:
    """One turn of a conversation to be rendered by the model's chat template."""

    role: str
    content: str


@message(0x0201, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Generate:
    """Engine asks tokenizer: serve this prompt. Exactly one of ``prompt``, ``prompt_token_ids``, ``turns`` is given.

    Items: first ``Encoded``, then ``TextDelta``, and a ``Routed`` before the first one from another replica or life.
    Reply: ``TextDone``. Errors: ``RequestInvalid``, ``ContextTooLong``, ``BadTarget``, ``NotReady``, ``Overloaded``,
    ``PinOverloaded``, ``WorkerDied``, ``RestartLimit``.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: TokenIds | None = None
    turns: tuple[ChatTurn, ...] = ()
    params: SamplingParams  # seed is resolved: never None
    handling: Handling = ANYHOW
    generated: TokenIds = b""  # what has been delivered already, with its text; the answer goes on behind it
    attempt: int = 1


@message(0x0202, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Encoded:
    """The prompt as the model sees it. Always the first item of a ``Generate``, and the reply to a ``Tokenize``."""

    prompt: str  # decoded from the ids if the caller gave ids
    prompt_token_ids: TokenIds


@attrs.frozen
class LogprobRow:
    """Log-probabilities at one generated position, natural logarithm."""

    token_id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    token_bytes: bytes = b""  # what the token stands for: maybe part of a character, of a special token its name
    top_bytes: tuple[bytes, ...] = ()  # the same of ``top_ids``


@message(0x0203, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class TextDelta:
    """Tokenizer to engine: text and tokens since the last delta; ``token_index`` is the index of the first of them.

    ``text`` never ends inside a character, nor inside a possible stop string.
    """

    token_index: int
    text: str
    token_ids: TokenIds
    logprobs: tuple[LogprobRow, ...] = ()

    def merge(self, later: TextDelta) -> TextDelta | None:
        """Both in one, for a reader that is behind; None if they are no neighbours."""
        if later.token_index != self.token_index + count_tokens(self.token_ids):
            return None
        return TextDelta(
            token_index=self.token_index,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
        )


@message(0x0204, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Submit:
    """Tokenizer asks router, and router asks replica core: continue these ids.

    Items: ``TokenDelta``. Reply: ``TokensDone``. Errors as for ``Generate``. One whose ``request_id`` is being served
    takes the place of that one: the asker has lost it.
    """

    request_id: str
    prompt_token_ids: TokenIds
    params: SamplingParams
    handling: Handling = ANYHOW
    generated: TokenIds = b""  # what has been delivered already; the answer goes on behind it
    attempt: int = 1  # above 1 it was admitted before, so no full queue refuses it


@message(0x0205, lane=Lane.WORK)
@attrs.frozen
class TokenDelta:
    """Generated token ids, in order; ``token_index`` counts generated tokens from 0 and fences duplicates."""

    token_index: int
    token_ids: TokenIds
    logprobs: tuple[LogprobRow, ...] = ()

    @property
    def num_tokens(self) -> int:
        """How many it brings."""
        return count_tokens(self.token_ids)

    def after(self, num_tokens: int) -> TokenDelta | None:
        """What is new to whoever has had ``num_tokens`` tokens; None if nothing is.

        Raises ``BadFrame`` if a token between is missing, or if it has log-probabilities for other than all its tokens.
        """
        if self.logprobs and len(self.logprobs) != self.num_tokens:
            raise BadFrame(f"{len(self.logprobs)} rows of log-probabilities came with {self.num_tokens} tokens")
        known = num_tokens - self.token_index
        if known < 0:
            raise BadFrame(f"token {num_tokens} of the answer is missing; {self.token_index} came next")
        if known >= self.num_tokens:
            return None
        return TokenDelta(num_tokens, self.token_ids[known * TOKEN_BYTES :], self.logprobs[known:]) if known else self

    def merge(self, later: TokenDelta) -> TokenDelta | None:
        """Both in one, for a reader that is behind; None if they are no neighbours."""
        if later.token_index != self.token_index + self.num_tokens:
            return None
        return TokenDelta(self.token_index, self.token_ids + later.token_ids, self.logprobs + later.logprobs)


@message(0x0206, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class TokensDone:
    """The last word on a ``Submit``; its pages are free when this is sent. Times in seconds, replica's clock."""

    finish_reason: str  # "stop" | "length"
    stop_token_id: int | None = None
    replica: int = 0
    dp_rank: int = 0
    chosen_by: str = ""  # who chose the replica: "pin", "session" or "load"; filled in by the router
    attempt: int = 1
    num_cached_tokens: int = 0
    queued_s: float = 0.0  # from arrival at the replica core to the first step that computed any of it
    prefill_s: float = 0.0  # from then to the first token
    decode_s: float = 0.0  # from the first token to the last


@message(0x0207, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class TextDone:
    """The last word on a ``Generate``: text held back until now, and how it ended."""

    text: str
    finish_reason: str  # "stop" | "length"
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it; None for the model's own end
    tokens: TokensDone


@message(0x020B, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Tokenize:
    """Engine asks tokenizer: what would the model see of this? Either ``prompt`` or ``turns`` is given.

    Reply: ``Encoded``. Errors: ``RequestInvalid``; ``ContextTooLong`` only for what is over twice too long.
    """

    prompt: str | None = None
    turns: tuple[ChatTurn, ...] = ()


@message(0x020C, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Detokenize:
    """Engine asks tokenizer: which text are these ids? Reply: ``Detokenized``. Error: ``ContextTooLong``, as there."""

    token_ids: TokenIds


@message(0x020D, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Detokenized:
    """The tokenizer's reply: the text of all ids, special tokens included; an id without a token gives none."""

    text: str
