"""``bus-run serve`` as a person runs it: whole processes, null chips; settings, key, signals, nothing left behind."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import psutil
import pytest
from http_server import running_server
from uvicorn import Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from chipbus.errors import ConfigError
from chipbus.tools import console
from chipbus.tools.run_commands import bus_run
from chipbus.tools.serve import connections
from chipbus.tools.serve.command import UVICORN, check_uvicorn
from chipbus.tools.serve.config import ServerConfig
from chipbus.tools.settings import resolve_settings
from support import comes_true, our_processes

BUS_RUN = [sys.executable, "-m", "chipbus.tools.bus_run"]
TEXT = "/v1/completions"
ENDLESS = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log
        assert process.stdout is not None
        self.url = process.stdout.readline().strip().removesuffix("/v1")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ends(self) -> tuple[int, str]:
        """Exit code and what it said."""
        code = self.process.wait(30)
        return code, self.log


@contextmanager
def served(tmp_path: Path, *arguments: str) -> Iterator[Served]:
    with (tmp_path / "log").open("w") as log:
        command = [*BUS_RUN, "serve", "--port", "0", "--chip", "null", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield Served(process, tmp_path / "log")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


def here(*arguments: str) -> int:
    return console.run("bus-run", lambda: bus_run, ["serve", *arguments])


@pytest.mark.slow
@pytest.mark.guarantee("H16")
def test_it_starts_serves_and_ends_on_sigterm_when_open_requests_have_ended(tmp_path: Path) -> None:
    with served(tmp_path, "--kv-pages", "64", "--served-model-name", "mine") as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            chat = {"model": "mine", "messages": [{"role": "user", "content": "chip"}], "max_tokens": 3}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
            for path in ("/", "/state.json", "/metrics", "/metrics.json"):
                assert client.get(path).status_code == 200
            with client.stream("POST", TEXT, json=ENDLESS) as answer:
                parts = answer.iter_text()
                text = next(parts)
                server.signal(signal.SIGTERM)
                assert comes_true(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 10)
                refused = httpx.post(f"{server.url}{TEXT}", json={"prompt": "b"})
                assert refused.json()["error"]["code"] == "not_ready"
                text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        code, said = server.ends()

    assert code == 0, said
    for words in (
        "chipbus 0.", 'chip = "null"  (flag --chip)', "kv_pages = 64  (flag --kv-pages)", "replica.0  chip.0.0  null:0",
        " 64      8,192 ", "ready in ", "as model 'mine'", "run directory ", "1 open requests may end within 300 s",
        "stopped; all requests ended",
    ):  # fmt: skip
        assert words in said, said
    assert len(said.splitlines()) < 30, "one screen"


@pytest.mark.slow
@pytest.mark.guarantee("H17")
def test_what_has_not_ended_in_time_is_dropped_and_told_so(tmp_path: Path) -> None:
    with served(tmp_path, "--drain-timeout", "0.01") as server:
        with httpx.stream("POST", f"{server.url}{TEXT}", json={**ENDLESS, "n": 8}, timeout=30) as answer:
            parts = answer.iter_text()
            text = next(parts)
            server.signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 (what came before it matters)
                for part in parts:
                    text += part
        code, said = server.ends()

    assert code == 0, said
    assert "1 requests had not ended and were dropped" in said
    assert text.count('"error"') == 1
    assert '"code":"not_ready"' in text
    assert "[DONE]" not in text


@pytest.mark.slow
@pytest.mark.guarantee("H18")
def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with (
        served(tmp_path) as server,
        httpx.stream("POST", f"{server.url}{TEXT}", json={**ENDLESS, "n": 8}, timeout=30) as answer,
    ):
        parts = answer.iter_text()
        next(parts)
        server.signal(signal.SIGINT)
        assert comes_true(lambda: "may end within" in server.log, 10)
        server.signal(signal.SIGINT)
        code, said = server.ends()

    assert code == 130, said
    assert said.splitlines()[-1] == "killed"


@pytest.mark.slow
def test_a_signal_while_it_starts_ends_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = [*BUS_RUN, "serve", "--port", "0", "--chip", "null"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert comes_true(lambda: bool(psutil.Process(process.pid).children()), 20)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=30)
    said = (tmp_path / "log").read_text()

    assert process.returncode == 0, said
    assert "stopped" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert shown == "" or shown.startswith("http://")


@pytest.mark.slow
@pytest.mark.guarantee("H19")
def test_the_end_of_the_engine_ends_the_server_with_code_1(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        [supervisor] = psutil.Process(server.process.pid).children()
        supervisor.kill()
        code, said = server.ends()

    assert code == 1, said
    assert said.splitlines()[-2].startswith("bus-run: the supervisor ended")


@pytest.mark.guarantee("H20")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "setting host is '0.0.0.0', which others can reach, and there is no key"),
        (["--host", "::"], "which others can reach"),
        (["--host", "chips.example"], "which others can reach"),
        (["--host", "203.0.113.7", "--insecure"], "cannot listen at 203.0.113.7 port 8000"),
        (["--host", "no such host", "--insecure"], "host 'no such host' is no address to listen at"),
        (["--port", "65536"], "setting port is 65536; it must be an integer in [0, 65535] (from flag --port)"),
        (["--api-key", "a b"], "setting api_key is no key; it must be printable ASCII"),
        (["--drain-timeout", "0"], "drain_timeout_s is 0"),
        (["--max-body-bytes", "0"], "max_body_bytes is 0"),
        (["/nowhere", "--port", "0"], "/nowhere is no directory"),
        (["--hots", "x"], "--host"),
    ],
)
def test_what_cannot_or_should_not_be_served_is_refused_before_anything_starts(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here("--chip", "null", *arguments) == 2

    shown = capfd.readouterr()
    assert shown.out == ""
    assert words in shown.err.splitlines()[0]
    assert len(shown.err.splitlines()) <= 2
    assert our_processes() == set()


def test_a_port_in_use_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert here("--chip", "null", "--port", str(port)) == 2

    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"bus-run: cannot listen at 127.0.0.1 port {port}: Address already in use"
    assert our_processes() == set()


def test_without_its_libraries_one_sentence_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)

    assert here("--chip", "null") == 2

    assert "needs the extra 'serve', pip install 'chipbus[serve]'" in capfd.readouterr().err


@pytest.mark.guarantee("H29")
@pytest.mark.parametrize("version", ["0.53.9", "0.55.0", "1.0.0", "0.5.4", "0.540.1"])
def test_another_uvicorn_than_the_one_it_overrides_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], version: str
) -> None:
    monkeypatch.setattr("uvicorn.__version__", version)

    assert here("--chip", "null") == 2

    said = capfd.readouterr().err.splitlines()
    assert said[0] == (
        f"bus-run: bus-run serve works with uvicorn 0.54, and {version} is installed: pip install 'chipbus[serve]'"
    )
    assert our_processes() == set()


def test_the_extra_and_the_tests_have_the_uvicorn_whose_insides_are_overridden() -> None:
    root = Path(__file__).resolve().parents[3]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    major, minor = UVICORN.split(".")

    assert f"uvicorn>={UVICORN},<{major}.{int(minor) + 1}" in extra
    check_uvicorn(re.search(r"^uvicorn==(.*)$", (root / "constraints.txt").read_text(), re.MULTILINE)[1])  # type: ignore[index]
    own = {name for name, value in vars(connections._Connection).items() if callable(value)}
    overridden = own - {"_give_up", "_lose_patience", "_count"}
    assert overridden == {
        "connection_made", "connection_lost", "data_received", "send_400_response", "_start_asgi_task",
        "on_message_begin", "on_url", "on_header", "on_headers_complete",
    }  # fmt: skip
    assert overridden <= vars(HttpToolsProtocol).keys()
    assert "capture_signals" in vars(Server)


@pytest.mark.guarantee("H21")
def test_a_setting_of_the_server_has_four_sources_and_the_key_is_never_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('host = "::1"\nport = 1\ndrain_timeout_s = 5\n')
    monkeypatch.setenv("CHIPBUS_PORT", "2")
    monkeypatch.setenv("CHIPBUS_API_KEY", "hidden-key")

    assert here("--print-config", "--config", str(file), "--drain-timeout", "7") == 0
    shown = capfd.readouterr().out
    rows = {line.split("  #")[0].strip(): line.split("# ")[-1] for line in shown.splitlines()}
    assert rows['host = "::1"'] == f"file {file}"
    assert rows["port = 2"] == "variable CHIPBUS_PORT"
    assert rows["drain_timeout_s = 7.0"] == "flag --drain-timeout"
    assert rows["insecure = false"] == "default"
    assert rows["# api_key is set, and not shown"] == "variable CHIPBUS_API_KEY"
    assert "hidden-key" not in shown + repr(ServerConfig(api_key="hidden-key"))

    assert console.run("bus-run", lambda: bus_run, ["check", "--print-config", "--config", str(file)]) == 0
    assert "port" not in capfd.readouterr().out, "it is no setting of this command, and no mistake either"


def test_every_setting_of_the_server_is_reached_by_variable_and_file(tmp_path: Path) -> None:
    others: dict[str, Any] = {
        "host": "::1", "port": 1, "served_model_name": "x", "api_key": "k", "insecure": True, "drain_timeout_s": 2.5,
        "max_body_bytes": 7,
    }  # fmt: skip
    assert set(others) == {field.name for field in attrs.fields(ServerConfig)}
    file = tmp_path / "c.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in others.items()))
    texts = {name: str(value).lower() for name, value in others.items()}

    for resolved in (
        resolve_settings({}, {}, file),
        resolve_settings(texts, {}, None),
        resolve_settings({}, {f"CHIPBUS_{name.upper()}": text for name, text in texts.items()}, None),
    ):
        assert resolved.server == ServerConfig(**others)


def test_a_loopback_address_needs_no_key() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServerConfig(host=host).check_exposure()
    ServerConfig(host="0.0.0.0", api_key="k").check_exposure()
    ServerConfig(host="0.0.0.0", insecure=True).check_exposure()
    with pytest.raises(ConfigError):
        ServerConfig(host="192.0.2.1").check_exposure()


@pytest.mark.guarantee("H22")
def test_without_the_key_nothing_but_health_is_answered() -> None:
    with running_server(chip="null", log_level="error", api_key="the-key") as server:
        with httpx.Client(base_url=server.url) as stranger:
            for path in ("/health", "/ready", "/version"):
                assert stranger.get(path).status_code == 200
            for path in ("/v1/models", "/metrics", "/state.json", "/events", "/nothing"):
                assert stranger.get(path).status_code == 401
            for given in (
                "",
                "the-key",
                "Bearer the-kez",
                "Bearer",
                "Bearer the-key2",
                "Basic the-key",
                "Token the-key",
            ):
                answer = stranger.post(TEXT, json={"prompt": "a"}, headers={"authorization": given})
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"].startswith("Bearer")
            for given in ("Bearer the-key", "bearer  the-key"):
                answer = stranger.post(TEXT, json={"prompt": "a", "max_tokens": 1}, headers={"authorization": given})
                assert answer.status_code == 200
        assert server.post(TEXT, prompt="a", max_tokens=1).status_code == 200
