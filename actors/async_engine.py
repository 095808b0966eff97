"""The asyncio facade: same names, same items, no ZeroMQ in the host's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ..bus import Progress, unpack_tokens
from ..errors import ChipbusError, EngineClosed
from ..topology import Topology
from .config import config_from_mapping
from .engine import as_prompts, as_turns
from .handling import ANYHOW, Handling
from .messages.serving import Detokenize, Detokenized, Encoded, Tokenize
from .messages.tree import ChildRecord, CloseReport
from .outputs import RequestOutput, Statistics
from .plan import EnginePlan, plan_engine
from .process_tree import close_when_forgotten
from .report import EngineReport, Event
from .request import RequestState
from .runtime import Prompt, Runtime, TextAnswer, detokenize_message, tokenize_message
from .sampling import SamplingParams

__all__ = ["AsyncEngine"]


class AsyncEngine:
    """``Engine`` for asyncio: ``async with AsyncEngine("demo") as engine: async for delta in engine.stream(…): …``.

    Starting and closing run on a worker thread, so the event loop goes on. Errors are those of ``Engine``.
    """

    def __init__(
        self,
        model: str = "demo",
        topology: Topology | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> None:
        """Checks the settings (``ConfigError``); ``async with`` starts the processes."""
        self._plan = plan_engine(config_from_mapping({"model": model, **settings}), topology)
        self._on_progress = on_progress
        self._started: Runtime | None = None
        self._woken: _Wakes | None = None

    @property
    def plan(self) -> EnginePlan:
        """What this engine is, or will be: settings, model, placement, sizes."""
        return self._plan

    @property
    def death(self) -> ChipbusError | None:
        """What ended the engine's processes before ``close``; None while they live."""
        return self._runtime.processes.death

    @property
    def _runtime(self) -> Runtime:
        if self._started is None:
            raise EngineClosed("this engine was not started; use it in 'async with'")
        return self._started

    def _wakes(self) -> _Wakes:
        """Those of the running loop."""
        if self._woken is None or not self._woken.is_for(asyncio.get_running_loop()):
            self._woken = _Wakes()
        return self._woken

    async def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> list[RequestOutput]:
        """As ``Engine.generate``; cancelling the task aborts the requests."""
        return await self._finish(as_prompts(prompts), params, handling)

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> list[RequestOutput]:
        """As ``Engine.chat``."""
        return await self._finish([as_turns(messages)], params, handling)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As ``Engine.stream``; leaving the loop, ``aclose()`` or cancelling aborts."""
        return self._stream(prompt, params, handling)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        handling: Handling | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As ``Engine.stream_chat``; see ``stream``."""
        return self._stream(as_turns(messages), params, handling)

    async def _stream(
        self, prompt: Prompt, params: SamplingParams | None, handling: Handling | None
    ) -> AsyncGenerator[RequestOutput, None]:
        changed = asyncio.Event()
        state = self._runtime.submit(prompt, params or SamplingParams(), handling or ANYHOW, self._wakes().of(changed))
        try:
            while True:
                await changed.wait()
                changed.clear()
                delta = state.drain()
                if delta is not None:
                    yield delta
                    if delta.finished:
                        return
        finally:
            self._runtime.leave(state)

    async def _finish(
        self, prompts: Sequence[Prompt], params: SamplingParams | None, handling: Handling | None
    ) -> list[RequestOutput]:
        changed = asyncio.Event()
        pending: list[RequestState] = []
        wanted, handled = params or SamplingParams(), handling or ANYHOW
        try:
            # One by one, so that those sent are aborted if a later one is refused.
            pending.extend(
                self._runtime.submit(prompt, wanted, handled, self._wakes().of(changed)) for prompt in prompts
            )
            while not all(state.is_over for state in pending):
                await changed.wait()
                changed.clear()
            return [state.whole() for state in pending]
        except BaseException:
            for state in pending:
                self._runtime.leave(state)
            raise

    def abort(self, request_id: str) -> None:
        """As ``Engine.abort``; does not wait."""
        self._runtime.abort(request_id)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """As ``Engine.tokenize``."""
        message = tokenize_message(prompt if isinstance(prompt, str) else as_turns(prompt))
        answer = await self._about_text(message)
        assert isinstance(answer, Encoded)
        ids: list[int] = unpack_tokens(answer.prompt_token_ids).tolist()
        return ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """As ``Engine.detokenize``."""
        answer = await self._about_text(detokenize_message(token_ids))
        assert isinstance(answer, Detokenized)
        return answer.text

    async def _about_text(self, message: Tokenize | Detokenize) -> Encoded | Detokenized:
        answers: list[TextAnswer] = []
        answered = asyncio.Event()
        wake = self._wakes().of(answered)

        def settle(answer: TextAnswer) -> None:
            answers.append(answer)
            wake()

        self._runtime.ask_about_text(message, settle)
        await answered.wait()
        if isinstance(answers[0], ChipbusError):
            raise answers[0]
        return answers[0]

    def statistics(self) -> Statistics:
        """The latest snapshot, refreshed soon after a request ends; never a round trip."""
        return self._runtime.latest_statistics()

    async def report(self) -> EngineReport:
        """See ``Engine.report``."""
        return await asyncio.to_thread(self._runtime.report)

    async def events(self, after: int = 0) -> AsyncGenerator[Event, None]:
        """Events as they happen, from the first kept one whose number is above ``after``; ends with the engine.

        A reader who is more than 200 behind misses the oldest; the numbers say so.
        """
        changed = asyncio.Event()
        forget = self._runtime.listen(self._wakes().of(changed))
        try:
            while True:
                is_over = self._runtime.processes.is_over
                for event in self._runtime.events(after):
                    after = event.number
                    yield event
                if is_over:
                    return
                await changed.wait()
                changed.clear()
        finally:
            forget()

    def tree(self) -> list[ChildRecord]:
        """As ``Engine.tree``."""
        return list(self._runtime.tree())

    async def drain(self, replica: str, timeout_s: float = 60.0, *, stays_down: bool = False) -> bool:
        """See ``Engine.drain``."""
        return await asyncio.to_thread(lambda: self._runtime.drain(replica, timeout_s, stays_down=stays_down))

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """See ``Engine.generation_defaults``; there before the start, too."""
        return self._plan.generation_defaults

    @property
    def run_dir(self) -> str:
        """See ``Engine.run_dir``."""
        return str(self._runtime.processes.run_dir)

    async def close(self) -> CloseReport:
        """As ``Engine.close``."""
        return await asyncio.to_thread(self._runtime.close)

    async def __aenter__(self) -> Self:
        made: list[Runtime] = []
        is_unwanted = threading.Event()

        def on_made(runtime: Runtime) -> None:
            made.append(runtime)
            if is_unwanted.is_set():
                runtime.processes.give_up_start()

        start = asyncio.ensure_future(asyncio.to_thread(Runtime.start, self._plan, self._on_progress, on_made))
        try:
            self._started = await asyncio.shield(start)
        except asyncio.CancelledError:  # the thread cannot be cancelled, but it can be told
            is_unwanted.set()
            for runtime in made:
                runtime.processes.give_up_start()
            with contextlib.suppress(ChipbusError):  # it took down what it had built
                await asyncio.to_thread((await start).close)
            raise
        close_when_forgotten(self, self._started.processes)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Wakes:
    """The bus thread's word to one event loop: however many requests change before it looks, it is woken once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed: set[asyncio.Event] = set()  # each once, however long the loop does not look
        self._is_woken = False

    def is_for(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether it is this loop that is woken."""
        return self._loop is loop

    def of(self, changed: asyncio.Event) -> Callable[[], None]:
        """What sets ``changed`` in the loop, to be called on any thread."""

        def on_change() -> None:
            if self._loop.is_closed():  # it needs no waking, and nobody would take this out again
                return
            self._changed.add(changed)
            if not self._is_woken:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._wake)

        return on_change

    def _wake(self) -> None:
        self._is_woken = False  # first: what is added from here on is told again, or found below
        while self._changed:
            self._changed.pop().set()
