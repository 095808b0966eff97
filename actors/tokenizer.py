"""Tokenizer: text to token ids once per request, and tokens back to text as they come.

Owns: per open request, its decoder, its stop strings, and how many tokens it has had. Thread: the bus loop.

    host ──Generate──▶ tokenizer ──Submit──▶ router
         ◀─ Encoded, TextDelta…, TextDone ─  ◀─ Routed, TokenDelta…, TokensDone ─

What ends a request is cut the same way however the tokens arrive: token ids go up to and including the token that
completed the end (end-of-sequence, stop id, or the last character of a stop string); text goes up to, and without, the
text of that end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import msgspec

from ..bus import Actor, Ask, Call, Ready, handles, pack_tokens, unpack_tokens
from ..errors import BadFrame, ChipbusError, PeerGone, RequestInvalid, WorkerDied
from .messages.routing import Routed
from .messages.serving import Encoded, Generate, Submit, TextDelta, TextDone, TokenDelta, TokensDone
from .sampling import SamplingParams
from .scheduler import check_prompt_length, stop_ids
from .text import StopScanner, TextModel

__all__ = ["TokenizerActor", "TokenizerConfig"]


@attrs.frozen(kw_only=True)
class TokenizerConfig:
    """What a tokenizer is told at spawn."""

    model: str
    """Directory with tokenizer.json."""
    max_model_len: int
    """Longest context, prompt and output together, in tokens."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's own ends of text. Needed only where one of them is no special token of the tokenizer."""


class TokenizerActor(Actor):
    """Serves ``Generate`` asks from the host through the router."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = msgspec.convert(config, TokenizerConfig)
        self._load_s = 0.0

    def on_start(self) -> None:
        """Load the model's tokenizer. Raises ``CheckpointError``."""
        began_ns = self.ctx.clock.now_ns()
        self._model = TextModel(Path(self._config.model))
        self._load_s = (self.ctx.clock.now_ns() - began_ns) / 1e9

    def on_peer_up(self, name: str) -> None:
        """Loading is over when links come up."""
        if name == "supervisor":
            self.ctx.tell("supervisor", Ready(seconds=self._load_s))

    @handles(Generate)
    def _generate(self, request: Generate, call: Call) -> None:
        try:
            prompt, token_ids = self._encode(request)
            check_prompt_length(len(token_ids) // 4, self._config.max_model_len)
        except ChipbusError as error:
            call.fail(error)
            return
        call.item(Encoded(prompt=prompt, prompt_token_ids=token_ids))
        room = self._config.max_model_len - len(token_ids) // 4
        params = request.params
        if params.max_tokens > room:
            params = attrs.evolve(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        stream = _Stream(call, self._model, params, stop_ids(params, self._config.eos_token_ids), self.ctx.clock.now_ns)
        stream.ask = self.ctx.ask(
            "router",
            Submit(request_id=request.request_id, prompt_token_ids=token_ids, params=params),
            timeout_s=max(call.deadline_ns - self.ctx.clock.now_ns(), 1) / 1e9,
            on_item=stream.on_item,
            on_reply=stream.on_reply,
            on_error=stream.on_error,
            trace_id=call.trace_id,
            wait_for_link=True,
        )
        call.on_cancel(lambda _reason: stream.ask.cancel())

    def _encode(self, request: Generate) -> tuple[str, bytes]:
        """Prompt and packed ids of a request."""
        given = [request.prompt is not None, request.prompt_token_ids is not None, bool(request.turns)]
        if sum(given) != 1:
            raise RequestInvalid(
                f"request {request.request_id!r} has {sum(given)} of prompt, prompt_token_ids and turns; one is needed"
            )
        if request.prompt_token_ids is not None:
            return self._model.decode(unpack_tokens(request.prompt_token_ids).tolist()), request.prompt_token_ids
        if request.prompt is not None:
            return request.prompt, pack_tokens(self._model.encode(request.prompt))
        rendered = self._model.render(request.turns)
        return rendered, pack_tokens(self._model.encode_chat(rendered))


class _Stream:
    """The way back of one request: tokens in, text out, until whichever end comes first."""

    ask: Ask

    def __init__(
        self, call: Call, model: TextModel, params: SamplingParams, stops: frozenset[int], now_ns: Callable[[], int]
    ) -> None:
        self._call = call
        self._detokenizer = model.detokenizer()
        self._scanner = StopScanner(params.stop)
        self._min_tokens = params.min_tokens
        self._stops = stops
        self._now_ns = now_ns
        self._num_tokens = 0
        self._began_ns = self._first_ns = self._last_ns = now_ns()
        self._routed = Routed(replica=0, dp_rank=0)

    def on_item(self, item: object) -> None:
        """``Routed`` once, then ``TokenDelta``s."""
        if isinstance(item, Routed):
            self._routed = item
        elif isinstance(item, TokenDelta):
            try:
                self._take(item)
            except BadFrame as error:
                self.ask.cancel()
                self._call.fail(error)

    def on_reply(self, reply: object) -> None:
        """The replica ended the request; give out what was held back."""
        if not isinstance(reply, TokensDone):
            self._call.fail(BadFrame(f"the router ended a request with {type(reply).__name__}, not TokensDone"))
            return
        text, hit = self._scanner.feed(self._detokenizer.flush(), may_stop=self._num_tokens > self._min_tokens)
        if hit is None:
            text += self._scanner.flush()
        else:
            reply = attrs.evolve(reply, finish_reason="stop", stop_token_id=None)
        reason = reply.stop_token_id if hit is None else hit
        self._call.reply(TextDone(text=text, finish_reason=reply.finish_reason, stop_reason=reason, tokens=reply))

    def on_error(self, error: ChipbusError) -> None:
        """The request failed further down."""
        self._call.fail(WorkerDied(f"the request was lost: {error}") if isinstance(error, PeerGone) else error)

    def _take(self, delta: TokenDelta) -> None:
        """Pass on new tokens with their text; tokens had before are dropped, and missing ones raise ``BadFrame``."""
        token_ids, rows = unpack_tokens(delta.token_ids).tolist(), delta.logprobs
        if rows and len(rows) != len(token_ids):
            raise BadFrame(f"{len(rows)} rows of log-probabilities came with {len(token_ids)} tokens")
        known = self._num_tokens - delta.token_index
        if known < 0:
            raise BadFrame(f"token {self._num_tokens} of the answer is missing; {delta.token_index} came next")
        token_ids, rows = token_ids[known:], rows[known:]
        if not token_ids:
            return
        first = self._num_tokens
        text, hit = self._text_of(token_ids)
        self._last_ns = self._now_ns()
        self._first_ns = self._first_ns if first else self._last_ns
        taken = self._num_tokens - first
        self._call.item(
            TextDelta(token_index=first, text=text, token_ids=pack_tokens(token_ids[:taken]), logprobs=rows[:taken])
        )
        if hit is not None:
            self._stop(hit)

    def _text_of(self, token_ids: list[int]) -> tuple[str, str | None]:
        """Text that may be given out after these tokens, and the stop string that the last one taken completed."""
        pieces = []
        for token_id in token_ids:
            may_stop = self._num_tokens >= self._min_tokens
            is_end = may_stop and token_id in self._stops
            piece, hit = self._scanner.feed("" if is_end else self._detokenizer.add(token_id), may_stop=may_stop)
            self._num_tokens += 1
            pieces.append(piece)
            if hit is not None:
                return "".join(pieces), hit
        return "".join(pieces), None

    def _stop(self, hit: str) -> None:
        """A stop string came, so nothing after it is wanted. Times are the tokenizer's: the replica's are not heard."""
        self.ask.cancel()
        done = TokensDone(
            finish_reason="stop",
            replica=self._routed.replica,
            dp_rank=self._routed.dp_rank,
            prefill_s=(self._first_ns - self._began_ns) / 1e9,
            decode_s=(self._last_ns - self._first_ns) / 1e9,
        )
        self._call.reply(TextDone(text="", finish_reason="stop", stop_reason=hit, tokens=done))
