"""The least a server of this kind can do: the same framework streams events that are ready, with no engine behind it.

    python -m chipbus.tools.serve.bench_bare EVENTS

Prints its URL and serves ``POST /v1/completions`` until it is terminated.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

__all__ = ["main"]

_CHUNK = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"bare","choices":[{"index":0,'
    b'"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)


def main() -> None:
    """Serve on a free port of this host."""
    num_events = int(sys.argv[1])
    usage = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % num_events

    async def events() -> AsyncIterator[bytes]:
        for _ in range(num_events):
            yield _CHUNK
        yield usage
        yield b"data: [DONE]\n\n"

    async def complete(request: Request) -> StreamingResponse:
        await request.json()
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, access_log=False, log_level="warning")
    socket = config.bind_socket()
    socket.listen(1024)  # whoever reads the URL may connect
    print(f"http://127.0.0.1:{socket.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[socket])


if __name__ == "__main__":
    main()
