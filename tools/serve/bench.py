"""``bus-run bench serve``: what a whole server does, in process and over HTTP, beside other servers in the same rounds.

Owns: the servers it measures, each in a process of its own; all stay up, idle, while another one works.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from ...actors.engine import Engine
from ...actors.logs import configure_logging
from ...actors.sampling import SamplingParams
from ...errors import WorkerError
from ..bench_figures import Row, as_json, as_table, at_least, at_most, command_line, compared, today
from ..benchmarks import machine
from .load import LoadResult, run_load

__all__ = ["Peers", "serve"]

_START_S = 600.0
_END_S = 30.0
_NULL = {"chip": "null", "max_num_seqs": 256, "max_waiting": 4096, "kv_pages": 4096}
_PROMPT, _TOKENS = 16, 4  # of one request to a null chip
_AT_ONCE = 64
_IDLE_ASKS = 200
_PATH = "/v1/completions"
_SIZES = (f"--max-num-seqs={_AT_ONCE}", "--max-model-len=512", f"--kv-pages={4 * _AT_ONCE}")
"""Of ours with a checkpoint: room for every stream, and no more, as the others are in memory, too."""

Work = Sequence[tuple[Sequence[int], int]]
"""Prompts, as token ids, and how many tokens each is to be continued by."""


@attrs.frozen(kw_only=True)
class Peers:
    """Other servers, as far as they are here. Each has the checkpoint in its own format beside the directory MODEL."""

    openvino: str = ""
    """Interpreter of an environment with openvino-genai; it reads MODEL-openvino-bf16."""
    llama: str = ""
    """``llama-server`` of llama.cpp; it reads MODEL-bf16.gguf."""


def serve(model: str, rounds: int, *, peers: Peers, requests: int, soak_s: float, json_file: Path | None) -> None:
    """Print requests per second on a null chip; of a checkpoint also tokens per second beside the peers."""
    configure_logging("error", "bench")
    where = machine()
    click.echo(f"{where}; {today()}; {command_line()}; medians over {rounds} interleaved rounds")
    rows = _null_rows(rounds, requests)
    if model != "demo":
        rows += _checkpoint_rows(model, rounds, peers)
    click.echo(as_table(rows))
    if soak_s:
        click.echo(_soak(soak_s))
    if json_file is not None:
        json_file.write_bytes(as_json(where, rounds, rows))


# Null chips: what everything costs but the numerics.


def _null_rows(rounds: int, requests: int) -> list[Row]:
    draw = random.Random(0)  # noqa: S311 (repeatable on purpose)
    prompts = [[draw.randrange(10, 200) for _ in range(_PROMPT)] for _ in range(requests)]
    params = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    bodies = [_body(prompt, _TOKENS) for prompt in prompts]
    took: dict[str, list[float]] = {name: [] for name in ("in process", "http", "bare", "first", "layers")}
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine("demo", None, **_NULL))  # type: ignore[arg-type]
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in _NULL.items()]
        server = stack.enter_context(_serving("chipbus", _bus_run("serve", "demo", "--port=0", *flags)))
        bare = stack.enter_context(
            _serving("bare", [sys.executable, "-m", "chipbus.tools.serve.bench_bare", str(_TOKENS)])
        )
        for number in range(rounds + 1):  # the first warms up
            began_s = time.perf_counter()
            engine.generate(prompts, params)
            in_process = requests / (time.perf_counter() - began_s)
            http = run_load(server, _PATH, bodies, _AT_ONCE)
            least = run_load(bare, _PATH, bodies, _AT_ONCE)
            device_s = _device_s(server)
            idle = run_load(server, _PATH, [_body(prompts[0], 1)] * _IDLE_ASKS, 1)
            device_s = (_device_s(server) - device_s) / _IDLE_ASKS
            first_s = statistics.median(answer.first_s for answer in idle.answers)
            if number:
                took["in process"].append(in_process)
                took["http"].append(requests / http.seconds)
                took["bare"].append(requests / least.seconds)
                took["first"].append(1e3 * first_s)
                took["layers"].append(1e3 * (first_s - device_s))
    size = f"{_PROMPT} + {_TOKENS} tokens, null chip"
    return [
        *compared(f"requests in process, {size}", "/s", took["in process"], {}, aim=at_least(3000)),
        *compared(
            f"requests over HTTP, streamed, {_AT_ONCE} at once, {size}", "/s", took["http"],
            {"starlette alone": took["bare"]}, aim=at_least(800),
        ),
        *compared("first token over HTTP, idle, one request", "ms", took["first"], {}),
        *compared("of it not the chip's", "ms", took["layers"], {}, aim=at_most(5.0)),
    ]  # fmt: skip


def _device_s(address: tuple[str, int]) -> float:
    report = json.loads(_get(address, "/state.json"))
    return float(sum(replica["device_ns"] for replica in report["replicas"])) / 1e9


# A checkpoint: many streams at once.


def _checkpoint_rows(model: str, rounds: int, peers: Peers) -> list[Row]:
    """Output tokens per second of ``_AT_ONCE`` concurrent streams of mixed lengths, the same for everybody."""
    draw = random.Random(1)  # noqa: S311 (repeatable on purpose)
    work = [
        ([draw.randrange(10, 2000) for _ in range(draw.randrange(16, 129))], draw.randrange(16, 129))
        for _ in range(_AT_ONCE)
    ]
    threads = len(os.sched_getaffinity(0))
    measured: dict[str, list[float] | str] = {}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_serving("chipbus", _bus_run("serve", model, "--port=0", *_SIZES)))
        systems: dict[str, Callable[[Work], float]] = {"chipbus": lambda todo: _http_rate(ours, todo)}
        if peers.openvino:
            name, rate = stack.enter_context(_openvino(peers.openvino, f"{model.rstrip('/')}-openvino-bf16", threads))
            systems[name] = rate
        if peers.llama:
            systems["llama.cpp server"] = stack.enter_context(
                _llama(peers.llama, f"{model.rstrip('/')}-bf16.gguf", threads)
            )
        for number in range(rounds + 1):
            for name, rate_of in systems.items():
                value = rate_of(work)
                if number:
                    values = measured.setdefault(name, [])
                    assert isinstance(values, list)
                    values.append(value)
    ours_measured = measured.pop("chipbus")
    assert isinstance(ours_measured, list)
    figure = f"output tokens, {_AT_ONCE} streams at once, prompts and answers of 16 to 128 tokens, bf16"
    return compared(figure, "tok/s", ours_measured, measured, aims=dict.fromkeys(measured, at_least(1.0)))


def _http_rate(address: tuple[str, int], work: Work) -> float:
    result: LoadResult = run_load(address, _PATH, [_body(prompt, tokens) for prompt, tokens in work], _AT_ONCE)
    wanted = sum(tokens for _, tokens in work)
    if result.tokens != wanted:
        raise WorkerError(f"a server generated {result.tokens} tokens where {wanted} were asked for")
    return result.tokens / result.seconds


@contextlib.contextmanager
def _openvino(python: str, exported: str, threads: int) -> Iterator[tuple[str, Callable[[Work], float]]]:
    script = Path(__file__).with_name("bench_openvino.py")
    with _process([python, "-P", str(script), exported, str(threads), str(_AT_ONCE)], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        first = _line(process, "")
        word, _, name = first.partition(" ")
        if word != "ready":
            raise WorkerError(f"OpenVINO GenAI does not start: {first}")

        def rate(work: Work) -> float:
            assert process.stdin is not None
            process.stdin.write(json.dumps(work).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process, "")
            seconds, tokens = map(float, answer.split())
            return tokens / seconds

        yield name, rate


@contextlib.contextmanager
def _llama(binary: str, gguf: str, threads: int) -> Iterator[Callable[[Work], float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = 512 * _AT_ONCE  # cut into equal parts, one per stream
    command = [
        binary, "-m", gguf, "-t", str(threads), "-c", str(context), "-np", str(_AT_ONCE), "-fa", "on", "--no-warmup",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with _process(command, stdout=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError):
                _get(("127.0.0.1", port), "/health")
                break
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise WorkerError(f"{binary} does not start")
            time.sleep(0.2)
        yield lambda work: _http_rate(("127.0.0.1", port), work)


# Memory over a long time.


def _soak(seconds: float) -> str:
    """Load a server on null chips for so long; resident memory of all its processes after the first and last tenth."""
    bodies = [_body([10 + i % 100] * _PROMPT, _TOKENS) for i in range(2000)]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in _NULL.items()]
    samples: list[tuple[float, int]] = []
    served = 0
    with _serving("chipbus", _bus_run("serve", "demo", "--port=0", *flags)) as address:
        began_s = time.monotonic()
        while (age_s := time.monotonic() - began_s) < seconds:
            run_load(address, _PATH, bodies, _AT_ONCE)
            served += len(bodies)
            samples.append((age_s, _resident_bytes(address)))
    tenth = max(len(samples) // 10, 1)
    early = statistics.median(size for _, size in samples[tenth : 2 * tenth] or samples[:1]) / 2**20
    late = statistics.median(size for _, size in samples[-tenth:]) / 2**20
    return (
        f"soak: {served:,} requests in {seconds:g} s; resident memory of all processes {early:.1f} MiB in the second"
        f" tenth, {late:.1f} MiB in the last ({late - early:+.1f} MiB)"
    )


def _resident_bytes(address: tuple[str, int]) -> int:
    report = json.loads(_get(address, "/state.json"))
    total = 0
    for pid in (process["record"]["pid"] for process in report["processes"]):  # the server's own among them
        with contextlib.suppress(OSError):  # one that is being restarted has none
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


# Servers as processes.


def _bus_run(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "chipbus.tools.bus_run", *arguments]


@contextlib.contextmanager
def _serving(name: str, command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A server that prints its URL; where it listens."""
    with _process(command) as process:
        line = _line(process, "http://")
        found = re.search(r"http://([\d.]+):(\d+)", line)
        if found is None:
            raise WorkerError(f"server {name} does not start: {line}")
        yield found[1], int(found[2])


@contextlib.contextmanager
def _process(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    options: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **streams}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        try:
            process = subprocess.Popen(command, cwd=directory, **options)  # noqa: S603 (ours, or named by the user)
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be run: {error.strerror}") from error
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _line(process: subprocess.Popen[bytes], containing: str) -> str:
    """The next line of its output that contains this text; the last one there was, if none does."""
    assert process.stdout is not None
    last = "it said nothing"
    deadline_s = time.monotonic() + _START_S
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left_s)[0]:
            break
        line = process.stdout.readline().decode(errors="replace").strip()
        if not line and process.poll() is not None:
            break
        if line and containing in line:
            return line
        last = line or last
    return last


def _get(address: tuple[str, int], path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}{path}", timeout=10) as answer:
        return bytes(answer.read())


def _body(prompt: Sequence[int], tokens: int) -> bytes:
    fields = {
        "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(fields).encode()
