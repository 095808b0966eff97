"""The synchronous facade: what a host application uses in five lines."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ..bus import Progress, unpack_tokens
from ..errors import ChipbusError, RequestInvalid
from ..topology import Topology
from .config import config_from_mapping
from .handling import ANYHOW, Handling
from .messages.serving import ChatTurn, Detokenize, Detokenized, Encoded, Tokenize
from .messages.tree import ChildRecord, CloseReport
from .outputs import RequestOutput, Statistics
from .plan import plan_engine
from .process_tree import close_when_forgotten
from .report import EngineReport
from .request import RequestState
from .runtime import Prompt, Runtime, TextAnswer, detokenize_message, tokenize_message
from .sampling import SamplingParams
from .unicode_text import check_unicode

__all__ = ["Engine", "as_prompts", "as_turns"]


def as_prompts(prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[Prompt]:
    """One prompt or many → many: text and a flat sequence of ids are one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise RequestInvalid(f"prompts are text, token ids, or a list of either, not {type(prompts).__name__}")
    if not prompts:
        raise RequestInvalid("prompts is empty; give at least one prompt")
    if all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_turns(messages: Sequence[Mapping[str, str]]) -> tuple[ChatTurn, ...]:
    """``[{"role": …, "content": …}, …]`` → turns; raises ``RequestInvalid`` naming the wrong entry."""
    turns = []
    for position, entry in enumerate(messages):
        if set(entry) != {"role", "content"} or not all(isinstance(v, str) for v in entry.values()):
            raise RequestInvalid(f"message {position} is {dict(entry)!r}; it must have the texts 'role' and 'content'")
        for name, text in entry.items():
            check_unicode(text, f"the {name} of message {position}")
        turns.append(ChatTurn(**entry))
    if not turns:
        raise RequestInvalid("messages is empty; give at least one message")
    return tuple(turns)


class Engine:
    """Serves one model from supervised processes of its own; ready when the constructor returns.

        with Engine("demo") as engine:
            print(engine.generate("replica")[0].outputs[0].text)

    Any thread may call it; it installs no signal handlers and starts one child process. Raises ``ConfigError`` and its
    subclasses before anything is started, ``StartFailed`` or a child's own error if starting fails; then nothing is
    left.
    """

    def __init__(
        self,
        model: str = "demo",
        topology: Topology | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> None:
        """``settings`` are the fields of ``EngineConfig``. ``on_progress`` is called on the engine's own thread."""
        config = config_from_mapping({"model": model, **settings})
        self._runtime = Runtime.start(plan_engine(config, topology), on_progress)
        self._finalizer = close_when_forgotten(self, self._runtime.processes)

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many (text or token ids); outputs in the order of the prompts.

        Raises the first failing prompt's ``RequestError`` or ``WorkerError``; the other prompts are aborted then.
        """
        return self._finish(as_prompts(prompts), params, handling)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> list[RequestOutput]:
        """Complete a conversation, ``[{"role": …, "content": …}, …]``, through the model's chat template."""
        return self._finish([as_turns(messages)], params, handling)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> Iterator[RequestOutput]:
        """Deltas of one prompt as they come. A slow reader gets fewer, larger deltas. Leaving the loop aborts."""
        return self._stream(prompt, params, handling)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> Iterator[RequestOutput]:
        """``stream`` for a conversation, as ``chat`` takes it."""
        return self._stream(as_turns(messages), params, handling)

    def _stream(
        self, prompt: Prompt, params: SamplingParams | None, handling: Handling | None
    ) -> Iterator[RequestOutput]:
        changed = threading.Condition()
        state = self._runtime.submit(prompt, params or SamplingParams(), handling or ANYHOW, _notify(changed))
        deltas = self._deltas(state, changed)
        # A generator that was never begun has nothing to leave; so whoever drops it aborts all the same.
        weakref.finalize(deltas, self._runtime.leave, state).atexit = False
        return deltas

    def _deltas(self, state: RequestState, changed: threading.Condition) -> Iterator[RequestOutput]:
        try:
            while True:
                with changed:
                    delta = state.drain()
                    while delta is None:
                        changed.wait()
                        delta = state.drain()
                yield delta
                if delta.finished:
                    return
        finally:
            self._runtime.leave(state)

    def _finish(
        self, prompts: Sequence[Prompt], params: SamplingParams | None, handling: Handling | None
    ) -> list[RequestOutput]:
        changed = threading.Condition()
        pending: list[RequestState] = []
        wanted, handled = params or SamplingParams(), handling or ANYHOW
        try:
            # One by one, so that those sent are aborted if a later one is refused.
            pending.extend(self._runtime.submit(prompt, wanted, handled, _notify(changed)) for prompt in prompts)
            outputs = []
            for state in pending:
                with changed:
                    changed.wait_for(lambda s=state: s.is_over)  # type: ignore[misc]
                outputs.append(state.whole())
            return outputs
        except BaseException:
            for state in pending:
                self._runtime.leave(state)
            raise

    def abort(self, request_id: str) -> None:
        """End a request, by the id that its outputs carry, wherever it is; whoever reads it gets ``Aborted``.

        An id that is unknown or has ended changes nothing.
        """
        self._runtime.abort(request_id)

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids the model would see of a text or of a conversation (``chat``), its special tokens included.

        Raises ``RequestInvalid``. The tokenizer actor is asked: nothing is loaded in the host application.
        """
        message = tokenize_message(prompt if isinstance(prompt, str) else as_turns(prompt))
        answer = self._about_text(message)
        assert isinstance(answer, Encoded)
        ids: list[int] = unpack_tokens(answer.prompt_token_ids).tolist()
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; an id without a token gives none. Raises ``RequestInvalid``."""
        answer = self._about_text(detokenize_message(token_ids))
        assert isinstance(answer, Detokenized)
        return answer.text

    def _about_text(self, message: Tokenize | Detokenize) -> Encoded | Detokenized:
        answers: list[TextAnswer] = []
        answered = threading.Event()

        def settle(answer: TextAnswer) -> None:
            answers.append(answer)
            answered.set()

        self._runtime.ask_about_text(message, settle)
        while not answered.wait(0.2):
            self._runtime.processes.check_usable()
        if isinstance(answers[0], ChipbusError):
            raise answers[0]
        return answers[0]

    def statistics(self) -> Statistics:
        """Pages, requests and times now, asked from the replicas; raises ``EngineClosed`` or ``EngineDead``."""
        return self._runtime.fetch_statistics()

    def report(self) -> EngineReport:
        """Everything there is to tell, for metrics and status pages; raises ``EngineClosed`` or ``EngineDead``.

        What processes answer is asked at most twice a second, however many call; what the engine counts is of now.
        """
        return self._runtime.report()

    def tree(self) -> list[ChildRecord]:
        """Every process of this engine: name, kind, pid, parent, state, incarnation, restarts."""
        return list(self._runtime.tree())

    def drain(self, replica: str, timeout_s: float = 60.0, *, stays_down: bool = False) -> bool:
        """Give a replica ("replica.0") no new requests, let those it has end, then start it afresh, or leave it down.

        Requests that have not ended within ``timeout_s`` go on at another replica; none is lost. Returns whether all
        had ended. Raises ``ConfigError`` if there is no such replica, it is not ready, or is the last one.
        """
        return self._runtime.drain(replica, timeout_s, stays_down=stays_down)

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Fields of ``SamplingParams`` that the model's generation_config.json states; the engine does not use them."""
        return self._runtime.plan.generation_defaults

    @property
    def run_dir(self) -> str:
        """Where its sockets are, for ``bus-run top``; gone when the engine is closed."""
        return str(self._runtime.processes.run_dir)

    def close(self) -> CloseReport:
        """Stop every process under one deadline (``close_timeout_s``); a second call returns the same report."""
        report = self._runtime.close()
        self._finalizer.detach()
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _notify(changed: threading.Condition) -> Callable[[], None]:
    def on_change() -> None:
        with changed:
            changed.notify_all()

    return on_change
