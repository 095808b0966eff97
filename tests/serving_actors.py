"""Scripted actors around router and tokenizer, for runs in one process on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from chipbus.actors.handling import ANYHOW, Handling
from chipbus.actors.messages.serving import Generate, Submit, TextDelta, TextDone, TokenDelta, TokensDone
from chipbus.actors.sampling import SamplingParams
from chipbus.bus import Actor, Ask, Call, LocalSystem, Ready, handles, pack_tokens, unpack_tokens
from chipbus.errors import Aborted, ChipbusError

Script = Callable[[Submit], list[int]]


def counting(submit: Submit) -> list[int]:
    """The tokens a scripted replica answers with: they depend on the prompt, so mixed-up requests show."""
    first = int(unpack_tokens(submit.prompt_token_ids)[0])
    return [first * 1000 + index for index in range(submit.params.max_tokens)]


class Supervisor(Actor):
    """Hears who is ready."""

    def __init__(self) -> None:
        self.ready: list[str] = []

    @handles(Ready)
    def _ready(self, _message: Ready, _call: Call | None) -> None:
        self.ready.append(self.ctx.sender)


class ScriptedReplica(Actor):
    """Answers each ``Submit`` with those tokens of ``script`` it has not had, in deltas of seeded sizes and times."""

    def __init__(self, replica: int, script: Script = counting, *, pause_s: float = 1.0, refuses: bool = False) -> None:
        self.replica = replica
        self.script = script
        self.pause_s = pause_s
        self.refuses = refuses
        self.open: dict[str, Call] = {}
        self.seen: list[str] = []
        self.cancelled: list[tuple[str, str]] = []

    @handles(Submit)
    def _submit(self, submit: Submit, call: Call) -> None:
        self.seen.append(submit.request_id)
        if self.refuses and self.ctx.random.random() < 0.3:
            raise ChipbusError("the scripted replica refuses")
        earlier = self.open.pop(submit.request_id, None)
        if earlier is not None:
            earlier.fail(Aborted(f"a later attempt has taken the place of request {submit.request_id}"))
        self.open[submit.request_id] = call
        call.on_cancel(lambda reason: self._cancelled(submit.request_id, call, reason))
        self._next(submit, call, self.script(submit), len(submit.generated) // 4)

    def _cancelled(self, request_id: str, call: Call, reason: str) -> None:
        if self.open.get(request_id) is call:
            del self.open[request_id]
        self.cancelled.append((request_id, reason))

    def _next(self, submit: Submit, call: Call, tokens: list[int], index: int) -> None:
        if not call.is_open:
            return
        if index == len(tokens):
            del self.open[submit.request_id]
            call.reply(TokensDone(finish_reason="length", queued_s=0.25))
            return
        size = min(self.ctx.random.randint(1, 3), len(tokens) - index)
        call.item(TokenDelta(token_index=index, token_ids=pack_tokens(tokens[index : index + size])))
        pause_s = self.pause_s * self.ctx.random.random()
        self.ctx.after(pause_s, lambda: self._next(submit, call, tokens, index + size))


@attrs.define(eq=False)
class Answer:
    """Everything that came back for one ask."""

    message: Any
    ask: Ask | None = None
    items: list[Any] = attrs.field(factory=list)
    reply: Any = None
    error: ChipbusError | None = None
    ends: int = 0
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.ends > 0 or self.is_cancelled

    @property
    def tokens(self) -> list[int]:
        """Token ids of all deltas; they must have come in order, each once."""
        return self.tokens_behind(0)

    def tokens_behind(self, had: int) -> list[int]:
        """The same of an answer that went on behind ``had`` tokens."""
        ids: list[int] = []
        for item in self.items:
            if isinstance(item, TokenDelta | TextDelta):
                assert item.token_index == had + len(ids)
                ids += unpack_tokens(item.token_ids).tolist()
        return ids

    @property
    def text(self) -> str:
        """Text of all deltas and of the end."""
        pieces = [item.text for item in self.items if isinstance(item, TextDelta)]
        return "".join(pieces) + (self.reply.text if isinstance(self.reply, TextDone) else "")


class Asker(Actor):
    """Asks, and keeps what comes back: the host before a tokenizer, or a tokenizer before the router."""

    def __init__(self, to: str) -> None:
        self.to = to
        self.answers: list[Answer] = []

    def submit(
        self, prompt: list[int], *, timeout_s: float = 1e5, handling: Handling = ANYHOW, **params: Any
    ) -> Answer:
        """Ask the router."""
        message = Submit(
            request_id=f"r{len(self.answers)}",
            prompt_token_ids=pack_tokens(prompt),
            params=SamplingParams(**{"seed": 0, "max_tokens": 5, **params}),
            handling=handling,
        )
        return self.send(message, timeout_s)

    def generate(self, prompt: str | None = None, *, timeout_s: float = 1e5, **fields: Any) -> Answer:
        """Ask a tokenizer; fields of ``Generate`` by name, all others are sampling parameters."""
        known = {name: fields.pop(name) for name in ("prompt_token_ids", "turns") if name in fields}
        params = SamplingParams(**{"seed": 0, "max_tokens": 50, **fields})
        message = Generate(request_id=f"r{len(self.answers)}", prompt=prompt, params=params, **known)
        return self.send(message, timeout_s)

    def send(self, message: Any, timeout_s: float) -> Answer:
        return self.submit_again(Answer(message), timeout_s)

    def submit_again(self, answer: Answer, timeout_s: float = 1e5) -> Answer:
        """Ask with a message as it is."""

        def on_reply(reply: Any) -> None:
            answer.reply = reply
            answer.ends += 1

        def on_error(error: ChipbusError) -> None:
            answer.error = error
            answer.ends += 1

        answer.ask = self.ctx.ask(
            self.to,
            answer.message,
            timeout_s=timeout_s,
            on_reply=on_reply,
            on_error=on_error,
            on_item=answer.items.append,
        )
        self.answers.append(answer)
        return answer

    @staticmethod
    def cancel(answer: Answer) -> None:
        """Cancel an ask that is still open."""
        assert answer.ask is not None
        if answer.ask.is_open:
            answer.ask.cancel()
            answer.is_cancelled = True


def pass_time(system: LocalSystem, seconds: float) -> None:
    """Let everything happen that happens within ``seconds`` virtual seconds."""
    until_ns = system.clock.now_ns() + int(seconds * 1e9)
    system.run_until(lambda: system.clock.now_ns() >= until_ns, seconds)
