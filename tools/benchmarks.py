"""What ``bus-run bench`` measures, kernels and bus apart. Nothing here is a test: each prints figures with the machine
they hold for.

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

__all__ = ["answering", "engine", "machine", "start", "worker"]

_START_TIMEOUT_S = 300.0
_RUNS = 300  # per round, of an L3 worker
_FURTHER = 50  # programs of one orchestration


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


def worker(device: str, rounds: int) -> None:
    """Print what an L3 worker adds to its kernels: per run, per further program, per task; and how it ends."""
    import numpy as np

    from ..actors.l3 import L3Worker, Orchestrator
    from ..bus.bench_nodes import NodePair
    from ..kernels.bench_tasks import task_overhead_us, touch
    from ..kernels.faults import Fault

    configure_logging("error", "bench")
    names = ("ask", "one run", "further program", "task of a graph", "run and death")
    took: dict[str, list[float]] = {name: [] for name in names}
    closing: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        run_dir = Path(name)
        stack.enter_context(answering("nodes", run_dir))
        pair = NodePair(run_dir)
        stack.callback(pair.close)
        running = stack.enter_context(L3Worker(touch, devices=[device]))
        resident = running.alloc_tensor((8,), "float32")

        def chain(orchestrator: Orchestrator, count: int) -> None:
            for _ in range(count):
                orchestrator.submit_next_level(touch, resident, worker=0)

        def beyond_kernels(count: int) -> float:
            """Microseconds of a run of ``count`` programs that no kernel was running."""
            began = time.perf_counter()
            handle = running.submit(chain, count)
            handle.result()
            wall_us = 1e6 * (time.perf_counter() - began)
            return wall_us - sum(((t.end_ns or 0) - (t.begin_ns or 0)) / 1e3 for t in handle.graph().tasks)

        for number in range(rounds + 1):  # the first warms up
            ask = statistics.median(pair.measure(_RUNS)) / 1000
            one = statistics.median(beyond_kernels(1) for _ in range(_RUNS))
            longer = statistics.median(beyond_kernels(1 + _FURTHER) for _ in range(_RUNS // 10))
            if number:
                for key, value in (("ask", ask), ("one run", one), ("further program", (longer - one) / _FURTHER)):
                    took[key].append(value)
                took["task of a graph"].append(task_overhead_us())
    for _ in range(rounds):
        with L3Worker(touch, devices=["null:0"], faults={0: [Fault(kind="die")]}) as doomed:
            began = time.perf_counter()
            handle = doomed.submit(touch, np.zeros(8, np.float32))
            handle.wait()
            took["run and death"].append(1e3 * (time.perf_counter() - began))
            assert handle.error is not None
            began = time.perf_counter()
        closing.append(1e3 * (time.perf_counter() - began))
    click.echo(f"{machine()}; {device}, medians of {_RUNS} runs, {rounds} rounds")
    ratios = [one / ask for one, ask in zip(took["one run"], took["ask"], strict=True)]
    _print_rows(
        {
            "one run of one program, beyond its kernels": (took["one run"], "µs"),
            "an ask between two processes, in the same rounds": (took["ask"], "µs"),
            "one run over one ask": (ratios, "x"),
            "each further program of an orchestration": (took["further program"], "µs"),
            "each task of a captured graph, beyond its torch call": (took["task of a graph"], "µs"),
            "a launch that kills its chip, until the run has failed": (took["run and death"], "ms"),
            "close": (closing, "ms"),
        }
    )


@contextlib.contextmanager
def answering(kind: str, run_dir: Path) -> Iterator[None]:
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
