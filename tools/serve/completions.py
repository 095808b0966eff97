"""``POST /v1/chat/completions`` and ``POST /v1/completions``, whole or as a stream.

Owns: nothing beyond one request. A client that leaves aborts what it asked for, streaming or not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...actors.outputs import RequestOutput
from .answers import CHAT_SHAPE, TEXT_SHAPE, Answer
from .http import CallerLeft, Json, body_of, cancelled_if_caller_leaves, send_json, told
from .service import Service
from .streams import EventStream
from .wanted import Wanted, chat_wanted, completion_wanted

__all__ = ["routes"]


def routes(service: Service) -> list[Route]:
    """The two endpoints."""
    both = _Completions(service)
    return [
        Route("/v1/chat/completions", Json(both.chat, blamed="messages"), methods=["POST"]),
        Route("/v1/completions", Json(both.text, blamed="prompt"), methods=["POST"]),
    ]


class _Completions:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._defaults = service.engine.generation_defaults

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A conversation."""
        body = await body_of(scope, receive, self._service.max_body_bytes)
        await self._serve(chat_wanted(body, scope["headers"], self._defaults), scope, receive, send)

    async def text(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Prompts."""
        body = await body_of(scope, receive, self._service.max_body_bytes)
        wanted = completion_wanted(body, scope["headers"], self._defaults, self._service.max_model_len)
        await self._serve(wanted, scope, receive, send)

    async def _serve(self, wanted: Wanted, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        service.check_model(wanted.model)
        answer = Answer(
            CHAT_SHAPE if wanted.messages else TEXT_SHAPE,
            created=int(time.time()),
            model=service.model,
            fingerprint=service.fingerprint,
            run=service.run,
            n=wanted.params.n,
            with_usage=wanted.with_usage,
        )
        with service.admitted(answer):
            if wanted.is_stream:
                await self._stream(wanted, answer, scope, receive, send)
            else:
                async with cancelled_if_caller_leaves(receive):
                    outputs = await self._outputs(wanted)
                await send_json(send, answer.whole(outputs))

    async def _outputs(self, wanted: Wanted) -> list[RequestOutput]:
        engine = self._service.engine
        if wanted.messages:
            return await engine.chat(wanted.messages, wanted.params, wanted.handling)
        return await engine.generate(wanted.prompts, wanted.params, wanted.handling)  # type: ignore[arg-type]

    def _deltas(self, wanted: Wanted) -> list[AsyncGenerator[RequestOutput, None]]:
        engine = self._service.engine
        if wanted.messages:
            return [engine.stream_chat(wanted.messages, wanted.params, wanted.handling)]
        return [engine.stream(prompt, wanted.params, wanted.handling) for prompt in wanted.prompts]

    async def _stream(self, wanted: Wanted, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send)
        sources = self._deltas(wanted)
        try:
            async with cancelled_if_caller_leaves(receive):
                if len(sources) == 1:
                    last = await _pass_on(0, sources[0], answer, stream)
                else:
                    last = await _pass_all_on(sources, answer, stream)
            await stream.write(last + answer.last_words(), is_last=True)
        except CallerLeft:
            raise
        except Exception as error:
            if not stream.has_begun:
                raise
            await stream.fail(told(error, scope["path"]))
        finally:
            stream.close()


async def _pass_on(
    prompt: int, source: AsyncGenerator[RequestOutput, None], answer: Answer, stream: EventStream
) -> bytes:
    """Send what comes of one prompt; returns the end of it, which goes together with what follows."""
    async with aclosing(source) as deltas:
        async for delta in deltas:
            events = answer.chunks(prompt, delta)
            if delta.finished:
                return events
            if events:
                await stream.write(events)
    return b""


async def _pass_all_on(
    sources: list[AsyncGenerator[RequestOutput, None]], answer: Answer, stream: EventStream
) -> bytes:
    """The same of several prompts, as it comes. The first failure ends all."""

    async def one(prompt: int, source: AsyncGenerator[RequestOutput, None]) -> None:
        await stream.write(await _pass_on(prompt, source, answer, stream))

    tasks = [asyncio.ensure_future(one(prompt, source)) for prompt, source in enumerate(sources)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return b""
