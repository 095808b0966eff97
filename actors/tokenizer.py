"""Tokenizer: text to token ids once per request, and tokens back to text as they come.

Owns: per open request, its decoder, its stop strings, and the tokens it has had. Thread: the bus loop.

    host ──Generate──▶ tokenizer ──Submit──▶ router
         ◀─ Encoded, TextDelta…, TextDone ─  ◀─ Routed, TokenDelta…, TokensDone ─

What ends a request is cut the same way however the tokens arrive: token ids go up to and including the token that
completed the end (end-of-sequence, stop id, or the last character of a stop string); text goes up to, and without, the
text of that end, or with it if that is asked for. The text of the first tokens depends on those alone; so when this
process dies, its next life makes the same of the tokens the host has had, and goes on behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import msgspec

from ..bus import Actor, Ask, Call, Context, Ready, count_tokens, handles, pack_tokens, unpack_tokens
from ..errors import BadFrame, ChipbusError, ContextTooLong, PeerGone, RequestInvalid, WorkerDied
from .attempts import Attempts
from .boot import ROUTER, SUPERVISOR
from .messages.routing import Routed
from .messages.serving import (
    ChatTurn,
    Detokenize,
    Detokenized,
    Encoded,
    Generate,
    LogprobRow,
    Submit,
    TextDelta,
    TextDone,
    TokenDelta,
    Tokenize,
    TokensDone,
)
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
    max_request_restarts: int
    """Deaths of the router that a request survives without a token in between."""


class TokenizerActor(Actor):
    """Serves ``Generate`` asks from the host through the router."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = msgspec.convert(config, TokenizerConfig)
        self._load_s = 0.0
        self._streams: dict[str, _Stream] = {}

    def on_start(self) -> None:
        """Load the model's tokenizer. Raises ``CheckpointError``."""
        began_ns = self.ctx.clock.now_ns()
        self._model = TextModel(Path(self._config.model))
        self._load_s = (self.ctx.clock.now_ns() - began_ns) / 1e9

    def on_peer_up(self, name: str) -> None:
        """Loading is over when links come up."""
        if name == SUPERVISOR:
            self.ctx.tell_ready(SUPERVISOR, Ready(seconds=self._load_s))

    @handles(Generate)
    def _generate(self, request: Generate, call: Call) -> None:
        try:
            prompt, token_ids = self._encode(request)
            check_prompt_length(count_tokens(token_ids), self._config.max_model_len)
        except ChipbusError as error:
            call.fail(error)
            return
        call.item(Encoded(prompt=prompt, prompt_token_ids=token_ids))
        room = self._config.max_model_len - count_tokens(token_ids)
        params = request.params
        if params.max_tokens > room:
            params = attrs.evolve(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        submit = Submit(
            request_id=request.request_id, prompt_token_ids=token_ids, params=params, handling=request.handling
        )
        attempts = Attempts(self._config.max_request_restarts, request.attempt)
        stop_at = stop_ids(params, self._config.eos_token_ids)
        earlier = self._streams.get(request.request_id)
        if earlier is not None:  # the host has lost it, and the word of that is still on its way
            earlier.cancel()
        end = partial(self._forget, request.request_id, call)
        stream = _Stream(self.ctx, call, self._model, submit, attempts, stop_at, end)
        self._streams[request.request_id] = stream
        stream.begin(request.generated)

    @handles(Tokenize)
    def _tokenize(self, question: Tokenize, call: Call) -> None:
        prompt, token_ids = self._encoded(question.prompt, question.turns)
        call.reply(Encoded(prompt=prompt, prompt_token_ids=token_ids))

    @handles(Detokenize)
    def _detokenize(self, question: Detokenize, call: Call) -> None:
        token_ids, most = unpack_tokens(question.token_ids), 2 * self._config.max_model_len
        if len(token_ids) > most:
            raise ContextTooLong(f"{len(token_ids)} token ids are more than {most}, twice what the context holds")
        call.reply(Detokenized(text=self._model.decode(token_ids.tolist())))

    def _forget(self, request_id: str, call: Call) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.call is call:  # a later attempt may have taken its place
            del self._streams[request_id]

    def _encode(self, request: Generate) -> tuple[str, bytes]:
        """Prompt and packed ids of a request."""
        given = [request.prompt is not None, request.prompt_token_ids is not None, bool(request.turns)]
        if sum(given) != 1:
            raise RequestInvalid(
                f"request {request.request_id!r} has {sum(given)} of prompt, prompt_token_ids and turns; one is needed"
            )
        if request.prompt_token_ids is not None:
            token_ids = unpack_tokens(request.prompt_token_ids)
            check_prompt_length(len(token_ids), self._config.max_model_len)
            return self._model.decode(token_ids.tolist()), request.prompt_token_ids
        return self._encoded(request.prompt, request.turns)

    def _encoded(self, prompt: str | None, turns: Sequence[ChatTurn]) -> tuple[str, bytes]:
        """Text and packed ids of a prompt, or of a conversation."""
        if prompt is not None:
            return prompt, pack_tokens(self._model.encode(prompt, self._config.max_model_len))
        rendered = self._model.render(turns)
        return rendered, pack_tokens(self._model.encode_chat(rendered, self._config.max_model_len))


class _Stream:
    """The way of one request through the router: tokens in, text out, until whichever end comes first."""

    def __init__(
        self,
        ctx: Context,
        call: Call,
        model: TextModel,
        submit: Submit,
        attempts: Attempts,
        stop_at: frozenset[int],
        on_end: Callable[[], None],
    ) -> None:
        self._ctx = ctx
        self.call = call
        self._submit = submit
        self._attempts = attempts
        self._stop_at = stop_at
        self._on_end = on_end
        self._shown_bytes = model.shown_bytes
        self._detokenizer = model.detokenizer()
        self._keeps_end = submit.params.include_stop_str_in_output
        self._scanner = StopScanner(submit.params.stop, keeps=self._keeps_end)
        self._token_ids: list[int] = []  # of the answer, as far as they have been passed on
        self._ask: Ask | None = None
        self._began_ns = self._first_ns = self._last_ns = ctx.clock.now_ns()
        self._routed = Routed(replica=0, dp_rank=0)
        self._has_told_route = True

    def begin(self, generated: bytes) -> None:
        """Go on behind ``generated``, packed tokens that the host has had from an earlier life, with their text."""
        self.call.on_cancel(lambda _reason: self.cancel())
        _, hit = self._text_of(unpack_tokens(generated).tolist())
        if hit is None:
            self._send()
        else:
            self._stop(hit)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        if self._ask is not None:
            self._ask.cancel()
        self._on_end()

    def _send(self) -> None:
        """Ask the router for the rest; it may be starting just now."""
        call = self.call
        self._ask = self._ctx.ask(
            ROUTER,
            attrs.evolve(self._submit, generated=pack_tokens(self._token_ids), attempt=self._attempts.number),
            timeout_s=max(call.deadline_ns - self._ctx.clock.now_ns(), 1) / 1e9,
            on_item=self._on_item,
            on_reply=self._on_reply,
            on_error=self._on_error,
            trace_id=call.trace_id,
            wait_for_link=True,
        )

    def _on_item(self, item: object) -> None:
        """``Routed`` whenever a replica was chosen, then ``TokenDelta``s."""
        if isinstance(item, Routed):
            self._routed, self._has_told_route = item, False
        elif isinstance(item, TokenDelta):
            try:
                self._take(item)
            except BadFrame as error:
                self._fail(error)

    def _on_reply(self, reply: object) -> None:
        """The replica ended the request; give out what was held back."""
        if not isinstance(reply, TokensDone):
            self._fail(BadFrame(f"the router ended a request with {type(reply).__name__}, not TokensDone"))
            return
        may_stop = len(self._token_ids) > self._submit.params.min_tokens
        text, hit = self._scanner.feed(self._detokenizer.flush(), may_stop=may_stop)
        if hit is None:
            text += self._scanner.flush()
        else:
            reply = attrs.evolve(reply, finish_reason="stop", stop_token_id=None)
        reason = reply.stop_token_id if hit is None else hit
        self._end(TextDone(text=text, finish_reason=reply.finish_reason, stop_reason=reason, tokens=reply))

    def _on_error(self, error: ChipbusError) -> None:
        """The request failed further down, or the router died: the next one goes on where this one was."""
        if not isinstance(error, PeerGone):
            self._fail(error)
        elif self._attempts.lost(len(self._token_ids)):
            self._send()
        else:
            self._fail(WorkerDied(self._attempts.spent(error)))

    def _take(self, delta: TokenDelta) -> None:
        """Pass on what is new of it, with its text. Raises ``BadFrame``."""
        first = len(self._token_ids)
        new = delta.after(first)
        if new is None:
            return
        text, hit = self._text_of(unpack_tokens(new.token_ids).tolist())
        self._last_ns = self._ctx.clock.now_ns()
        self._first_ns = self._first_ns if first else self._last_ns
        taken = self._token_ids[first:]
        rows = tuple(self._shown(row) for row in new.logprobs[: len(taken)])
        if not self._has_told_route:  # along with the first tokens from there, which wake the host anyway
            self._has_told_route = True
            self.call.item(self._routed)
        self.call.item(TextDelta(token_index=first, text=text, token_ids=pack_tokens(taken), logprobs=rows))
        if hit is not None:
            self._stop(hit)

    def _shown(self, row: LogprobRow) -> LogprobRow:
        top = tuple(map(self._shown_bytes, row.top_ids))
        return attrs.evolve(row, token_bytes=self._shown_bytes(row.token_id), top_bytes=top)

    def _text_of(self, token_ids: list[int]) -> tuple[str, str | None]:
        """Text that may be given out after these tokens, and the stop string that the last one taken completed."""
        pieces = []
        for token_id in token_ids:
            may_stop = len(self._token_ids) >= self._submit.params.min_tokens
            is_end = may_stop and token_id in self._stop_at and not self._keeps_end
            piece, hit = self._scanner.feed("" if is_end else self._detokenizer.add(token_id), may_stop=may_stop)
            self._token_ids.append(token_id)
            pieces.append(piece)
            if hit is not None:
                return "".join(pieces), hit
        return "".join(pieces), None

    def _stop(self, hit: str) -> None:
        """A stop string came, so nothing after it is wanted. Times are the tokenizer's: the replica's are not heard."""
        done = TokensDone(
            finish_reason="stop",
            replica=self._routed.replica,
            dp_rank=self._routed.dp_rank,
            chosen_by=self._routed.chosen_by,
            attempt=self._attempts.number,
            prefill_s=(self._first_ns - self._began_ns) / 1e9,
            decode_s=(self._last_ns - self._first_ns) / 1e9,
        )
        self._end(TextDone(text="", finish_reason="stop", stop_reason=hit, tokens=done))

    def _end(self, done: TextDone) -> None:
        self.call.reply(done)
        self.cancel()

    def _fail(self, error: ChipbusError) -> None:
        self.call.fail(error)
        self.cancel()
