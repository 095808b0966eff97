"""What ``bus-run bench`` measures. Nothing here is a test: each prints figures with the machine they hold for.

Owns: the processes it times, one at a time. Engines to compare run in fine alternation, for machines drift.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import click

from ..actors.config import EngineConfig
from ..actors.engine import Engine
from ..actors.logs import configure_logging
from ..actors.plan import plan_engine
from ..actors.sampling import SamplingParams
from ..errors import WorkerError
from .check import table
from .progress import progress_view

__all__ = ["bus", "engine", "kernel_lines", "kernels", "machine", "start"]

_START_TIMEOUT_S = 300.0
_ROUND_TRIPS = 2000  # per round
_KERNEL_WORK = (("decode", 1), ("decode", 4), ("decode", 16), ("prefill", 128), ("prefill", 512))


def machine() -> str:
    """This machine in a line, to be quoted with every figure."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the architecture must do
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def engine(config: EngineConfig, *, batch: int, prompt_tokens: int, tokens: int, rounds: int) -> None:
    """Print tokens per second, and the part of the step time that is not chip time, over ``rounds`` runs.

    Prompts are random token ids, decoding is greedy and never stops early, so any checkpoint will do.
    """
    configure_logging(config.log_level, "host")
    draw = random.Random(config.seed)  # noqa: S311 (repeatable on purpose)
    vocab_size = plan_engine(config).spec.vocab_size
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    rates, overheads, steps_ms = [], [], []
    with progress_view() as view, Engine(on_progress=view.show, **attrs.asdict(config)) as running:
        for number in range(rounds + 1):  # the first warms up
            prompts = [[draw.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
            before, began_s = running.statistics(), time.monotonic()
            running.generate(prompts, params)
            seconds, after = time.monotonic() - began_s, running.statistics()
            if number:
                step_ns, device_ns = after.step_ns - before.step_ns, after.device_ns - before.device_ns
                rates.append(batch * tokens / seconds)
                overheads.append(100 * (step_ns - device_ns) / step_ns)
                steps_ms.append(step_ns / 1e6 / (after.steps - before.steps))
    click.echo(
        f"{machine()}; {config.model}, {config.dtype}, batch {batch}, {prompt_tokens} + {tokens} tokens,"
        f" {rounds} rounds"
    )
    _print_rows(
        {
            "tokens per second, all requests": (rates, "tok/s"),
            "step": (steps_ms, "ms"),
            "engine overhead, step minus chip": (overheads, "% of the step"),
        }
    )


def start(rounds: int) -> None:
    """Print whole-process wall times, and as ratios to importing torch in the same run."""
    python = [sys.executable, "-c"]
    commands = {
        "bare interpreter": [*python, "pass"],
        "import chipbus": [*python, "import chipbus"],
        "import torch": [*python, "import torch"],
        "bus-run generate, demo, first token": [
            sys.executable, "-m", "chipbus.tools.bus_run", "generate", "demo", "--max-tokens", "1"
        ],
    }  # fmt: skip
    took: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):  # the first fills the file cache
        for name, command in commands.items():
            began_s = time.monotonic()
            _run(command)
            if number:
                took[name].append(1000 * (time.monotonic() - began_s))
    click.echo(f"{machine()}; medians of {rounds} rounds, interleaved")
    _print_rows({name: (values, "ms") for name, values in took.items()})
    torch_ms = statistics.median(took["import torch"])
    bare_ms = statistics.median(took["bare interpreter"])
    import_ms = statistics.median(took["import chipbus"]) - bare_ms
    click.echo(f"import chipbus costs {import_ms:.0f} ms over a bare interpreter")
    for name in ("import chipbus", "bus-run generate, demo, first token"):
        click.echo(f"{name}: {statistics.median(took[name]) / torch_ms:.2f} x import torch")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(  # noqa: S603 (a command of ours)
        command, capture_output=True, text=True, errors="replace", timeout=_START_TIMEOUT_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise WorkerError(f"{' '.join(command[1:])} ended with exit code {done.returncode}: {last}")


def kernels(checkpoint: Path, *, rounds: int, threads: int | None) -> None:
    """Print tokens per second of a checkpoint's programs on one chip in this process, without bus and actors."""
    from ..kernels.bench import KernelBench

    chosen = _threads(threads)
    took: dict[tuple[str, int], list[float]] = {work: [] for work in _KERNEL_WORK}
    running = KernelBench(checkpoint, chosen)
    try:
        for number in range(rounds + 1):  # the first warms up
            for (name, size), rates in took.items():
                seconds = running.decode(size) if name == "decode" else running.prefill(size)
                if number:
                    rates.append(size / seconds)
    finally:
        running.close()
    click.echo(f"{machine()}; {checkpoint}, bfloat16, {chosen} threads, {rounds} rounds")
    _print_rows({f"{name} {size}": (rates, "tok/s") for (name, size), rates in took.items()})


def kernel_lines(checkpoint: Path, *, threads: int | None) -> None:
    """Serve the two-line protocol by which engines are compared in fine alternation."""
    from ..kernels.bench import line_server

    line_server(checkpoint, _threads(threads))


def _threads(given: int | None) -> int:
    return given or len(os.sched_getaffinity(0))


def bus(rounds: int) -> None:
    """Print round trips of an ask between two node processes, and its ratio to bare sockets in the same run."""
    from ..bus.bench import PAYLOAD_BYTES, BarePair, NodePair

    configure_logging("warning", "bench")
    took: dict[str, list[float]] = {"ask": [], "bare sockets": []}
    ratios = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        run_dir = Path(name)
        pairs: dict[str, NodePair | BarePair] = {}
        for side, kind, pair in (("ask", "nodes", NodePair), ("bare sockets", "bare", BarePair)):
            stack.enter_context(_answering(kind, run_dir))
            pairs[side] = pair(run_dir)
            stack.callback(pairs[side].close)
        for number in range(rounds + 1):  # the first warms up
            medians = {side: statistics.median(pair.measure(_ROUND_TRIPS)) / 1000 for side, pair in pairs.items()}
            if number:
                for side, median in medians.items():
                    took[side].append(median)
                ratios.append(medians["ask"] / medians["bare sockets"])
    click.echo(f"{machine()}; {PAYLOAD_BYTES} B, medians of {_ROUND_TRIPS} round trips, {rounds} rounds, interleaved")
    _print_rows({"ask": (took["ask"], "µs"), "bare sockets": (took["bare sockets"], "µs"), "ratio": (ratios, "x")})


@contextlib.contextmanager
def _answering(kind: str, run_dir: Path) -> Iterator[None]:
    """The answering side in a process of its own, until the block ends."""
    command = [sys.executable, "-m", "chipbus.bus.bench", kind, str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 (our own)
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            process.stdout.readline()  # "ready", or nothing if it died, which connecting will tell
            yield
        finally:
            process.stdin.close()


def _print_rows(rows: Mapping[str, tuple[Sequence[float], str]]) -> None:
    cells = [
        (name, f"{statistics.median(values):,.2f}", f"{min(values):,.2f} .. {max(values):,.2f}", unit)
        for name, (values, unit) in rows.items()
    ]
    click.echo(table(("", "median", "range", "unit"), cells, numbers_from=1))
