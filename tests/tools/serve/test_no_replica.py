"""What a client, a load balancer and an operator see while the only replica core is really down."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest
from http_server import RunningServer, running_server
from prometheus_client.parser import text_string_to_metric_families as parse

from support import eventually

ASKS = (
    ("/v1/completions", {"prompt": "replica"}),
    ("/v1/completions", {"prompt": "replica", "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "replica"}]}),
)


def pid_of(server: RunningServer, name: str) -> int:
    return next(record.pid for record in server.engine.tree() if record.name == name)


@contextmanager
def held_up_restarts(server: RunningServer) -> Iterator[None]:
    """No process is forked meanwhile: the fork server of the light ones is stopped."""
    children = psutil.Process(pid_of(server, "supervisor")).children()
    [warden] = [child for child in children if child.name() == "warden.light"]
    warden.suspend()
    try:
        yield
    finally:
        warden.resume()


def samples_of(answer: httpx.Response) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels."""
    assert answer.status_code == 200
    families = parse(answer.text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


@pytest.mark.slow
@pytest.mark.guarantee("H27")
def test_while_the_only_replica_core_is_down_requests_are_refused_and_everything_else_tells_so() -> None:
    with running_server(chip="null", stall_timeout_s=600.0, log_level="error") as server:
        client = server.client
        before = samples_of(client.get("/metrics"))
        assert (before["chipbus_ready", "demo"], before["chipbus_worker_up", "replica.0"]) == (1, 1)
        assert client.get("/ready").json() == {"status": "ready"}
        with held_up_restarts(server):
            os.kill(pid_of(server, "replica.0"), signal.SIGKILL)
            eventually(lambda: client.get("/ready").status_code == 503, "the load balancer is told")

            for path, body in ASKS:
                refused = server.post(path, **body)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert refused.headers["content-type"] == "application/json", "a stream was not begun"
                error = refused.json()["error"]
                assert (error["type"], error["code"]) == ("server_error", "not_ready")
                assert error["message"] == "no replica is ready; try again a little later, or elsewhere"
            assert client.get("/ready").json()["error"]["code"] == "not_ready"
            assert client.get("/health").json() == {"status": "alive"}, "a restart of the server would help nobody"
            assert client.get("/v1/models").status_code == client.get("/version").status_code == 200
            assert client.post("/tokenize", json={"prompt": "replica"}).json()["count"] > 0

            eventually(
                lambda: samples_of(client.get("/metrics")).get(("chipbus_reap_seconds_count",), 0) >= 1,
                "a report of after the death",
            )
            down = samples_of(client.get("/metrics"))
            assert (down["chipbus_ready", "demo"], down["chipbus_worker_up", "replica.0"]) == (0, 0)
            assert (down["chipbus_pages", "0", "demo"], down["chipbus_num_requests_open", "demo"]) == (0, 0)
            assert down["chipbus_worker_up", "router"] == down["chipbus_worker_up", "tokenizer.0"] == 1
            assert down["chipbus_http_responses_total", "503"] >= len(ASKS) + 1
            assert down["chipbus_request_started_total", "demo"] == 0, "what is refused at the door is no request"
            state = client.get("/state.json").json()
            assert not state["is_ready"]
            assert ("exit", "replica.0") in {(event["kind"], event["subject"]) for event in state["events"]}

        eventually(lambda: client.get("/ready").status_code == 200, "the next life is ready", within_s=20)
        assert server.post("/v1/completions", prompt="replica", max_tokens=2).status_code == 200
        assert server.comes_to_rest()
