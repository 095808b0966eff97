"""The commands of ``bus-run``: what each takes, and which module does it. Modules are loaded when their command runs.

Owns: nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .options import (
    HELP,
    engine_options,
    resolved_from,
    sampling_from,
    sampling_options,
    server_options,
    with_traceback,
)

__all__ = ["bus_run"]

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings=HELP)
@click.version_option(package_name="chipbus")
def bus_run() -> None:
    """Serve a language model from supervised processes on the chips of this host.

    Settings come from flags, CHIPBUS_* variables, a --config TOML file and defaults, in this order.
    Exit codes: 0 fine, 1 run failed, 2 wrong usage or configuration, 130 interrupted.
    """


@bus_run.command(context_settings=HELP)
@click.option(
    "-p", "--prompt", "prompts", metavar="TEXT", multiple=True,
    help="Text to continue; may be repeated, '-' reads one prompt from stdin. The demo model has one of its own.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt, one per line.")
@sampling_options
@engine_options
@with_traceback
def generate(prompts: tuple[str, ...], as_json: bool, print_config: bool, **options: Any) -> None:
    """Continue prompts with MODEL, a Hugging Face directory or 'demo'. Greedy unless --temperature is given."""
    from .generate import generate as run
    from .generate import read_prompts

    resolved = resolved_from(options)
    params = sampling_from(options)
    if print_config:
        click.echo(resolved.as_toml())
        return
    run(resolved.config, read_prompts(prompts, resolved.config.model), params, as_json=as_json)


@bus_run.command("serve", context_settings=HELP)
@server_options
@engine_options
@with_traceback
def serve_command(print_config: bool, **options: Any) -> None:
    """Serve MODEL, a Hugging Face directory or 'demo', over HTTP as OpenAI's API. Needs the extra 'serve'.

    Ctrl-C or SIGTERM: take no new requests and let the open ones end; once more: kill. docs/serving.md tells the rest.
    """
    from .serve.command import serve

    resolved = resolved_from(options)
    if print_config:
        click.echo(resolved.as_toml(with_server=True))
        return
    serve(resolved)


@bus_run.command(context_settings=HELP)
@click.option("--system", metavar="TEXT", default="", help="What the model is told before the conversation.")
@sampling_options
@engine_options
@with_traceback
def chat(system: str, print_config: bool, **options: Any) -> None:
    """Talk with MODEL, a Hugging Face directory or 'demo'. Greedy unless --temperature is given.

    At the prompt, /new begins a new conversation, and /exit, Ctrl-D or Ctrl-C leaves. During an answer Ctrl-C stops it.
    If stdin or stdout is no terminal, each line of stdin is a message and each line of stdout an answer.
    """
    from .chat import chat as run

    resolved = resolved_from(options)
    params = sampling_from(options)
    if print_config:
        click.echo(resolved.as_toml())
        return
    run(resolved.config, params, system)


@bus_run.command("page", context_settings=HELP)
@click.argument("source", metavar="DIRECTORY", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=_FILE, help="where to write it  [default: the directory's name with .html, here]")
@with_traceback
def page_command(source: Path, out: Path | None) -> None:
    """Write the status page of a record into one file that needs no server: how its run ended.

    Of the run directory of a running engine it shows what a guest is told: its processes, at this moment.
    """
    from .serve.page import page as run

    click.echo(run(source, out))


@bus_run.command(context_settings=HELP)
@click.option("--numerics", is_flag=True, help="also measure whether a token's bits depend on its batch; seconds")
@engine_options
@with_traceback
def check(print_config: bool, numerics: bool, **options: Any) -> None:
    """Validate settings and MODEL without starting anything; print the placement and the memory it needs."""
    from .check import check as run

    resolved = resolved_from(options)
    click.echo(resolved.as_toml() if print_config else run(resolved.config, numerics=numerics))


@bus_run.command("top", context_settings=HELP)
@click.argument("run_dir", required=False, type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="print the table once and leave")
@click.option("--json", "json_once", is_flag=True, help="print one JSON object and leave")
@with_traceback
def top_command(run_dir: Path | None, once: bool, json_once: bool) -> None:
    """What every process of the engine in RUN_DIR is at; without it, of the only engine of yours that runs."""
    from .top import top

    top(run_dir, once=once, json_once=json_once)


@bus_run.command("drain", context_settings=HELP)
@click.argument("replica")
@click.argument("run_dir", required=False, type=click.Path(path_type=Path))
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1), default=60.0, show_default=True,
              help="seconds for its requests to end; those that have not go on at another replica")  # fmt: skip
@click.option("--stay-down", is_flag=True, help="do not start it again")
@with_traceback
def drain_command(replica: str, run_dir: Path | None, timeout_s: float, stay_down: bool) -> None:
    """Give REPLICA (replica.0, …) no new requests, let those it has end, then start it afresh.

    Of the engine in RUN_DIR; without it, of the only engine of yours that runs. No request is lost.
    """
    from .drain import drain

    drain(replica, run_dir, timeout_s, stays_down=stay_down)


@bus_run.command("graph", context_settings=HELP)
@click.argument("model", default="demo")
@click.option("--prefill", type=click.IntRange(1), metavar="TOKENS", help="pass over so many prompt tokens of one row")
@click.option("--decode", type=click.IntRange(1), metavar="ROWS", help="pass over one token of each row  [default: 1]")
@click.option("--context", type=click.IntRange(0), default=128, show_default=True, help="tokens each row has before")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--fine", is_flag=True, help="cut operations into small tiles; otherwise a task is a whole operation")
@click.option("--measure", is_flag=True, help="run it on a cpu chip; otherwise its time is modelled")
@click.option("--threads", type=click.IntRange(1), help="compute threads of --measure; default: all cores")
@click.option("--json", "json_file", type=_FILE, help="write tasks, edges and times")
@click.option("--svg", "svg_file", type=_FILE, help="draw the dependency graph")
@click.option("--rings", "rings_file", type=_FILE, help="draw what the rings held")
@click.option("--trace", "trace_file", type=_FILE, help="write a timeline for ui.perfetto.dev")
@with_traceback
def graph_command(
    model: str,
    prefill: int | None,
    decode: int | None,
    context: int,
    dtype: str,
    fine: bool,
    measure: bool,
    threads: int | None,
    json_file: Path | None,
    svg_file: Path | None,
    rings_file: Path | None,
    trace_file: Path | None,
) -> None:
    """Tasks, edges and critical path of one forward pass of MODEL, a directory or 'demo', through all its layers."""
    from ..kernels.qwen3.tiling import COARSE, FINE
    from .graph import Outputs, Work, graph

    if prefill is not None and decode is not None:
        raise ConfigError("--prefill and --decode are given; a pass is one of them")
    work = Work(prefill or 0, decode or 1, context)
    outputs = Outputs(json=json_file, svg=svg_file, rings=rings_file, trace=trace_file)
    cores = len(os.sched_getaffinity(0))
    tiling = FINE if fine else COARSE
    graph(model, work, outputs, dtype=dtype, tiling=tiling, threads=(threads or cores) if measure else None)


@bus_run.group(context_settings=HELP)
def bench() -> None:
    """Measure on this machine. Figures of different runs differ; compare only within one."""


@bench.command("kernels", context_settings=HELP)
@click.argument("model", default="demo")
@click.option(
    "--line-server", is_flag=True,
    help="print 'ready', then answer 'decode B', 'decode B CONTEXT' and 'prefill T' with seconds",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="compute threads; default: all cores")
@click.option("--weights", type=click.Choice(["int8"]), help="keep matrices in it; default: bfloat16")
@click.option(
    "--isa", type=click.Choice(["amx", "avx512bf16", "avx512", "avx2", "none"]),
    help="kernels of the native engine, 'none' for torch; default: the best this processor has",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="measured; one more goes before")
@click.option("--trace", "trace_file", type=_FILE, help="write a decode step and a prefill for ui.perfetto.dev")
@with_traceback
def bench_kernels(
    model: str,
    line_server: bool,
    threads: int | None,
    weights: str | None,
    isa: str | None,
    rounds: int,
    trace_file: Path | None,
) -> None:
    """Speed of MODEL's programs on one cpu chip in this process, without bus and actors; a directory or 'demo'."""
    from .kernel_bench import Settings, kernel_lines, kernels

    settings = Settings(model=model, threads=threads, weights=weights or "", isa=isa or "")
    if line_server:
        kernel_lines(settings)
    else:
        kernels(settings, rounds=rounds, trace=trace_file)


@bench.command("engine", context_settings=HELP)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="requests at once")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="per request")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="generated per request")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="measured; one more goes before")
@engine_options
@with_traceback
def bench_engine(batch: int, prompt_tokens: int, tokens: int, rounds: int, print_config: bool, **options: Any) -> None:
    """Engine overhead (the part of a step that is not chip time) and tokens per second of MODEL."""
    from .benchmarks import engine

    resolved = resolved_from(options)
    if print_config:
        click.echo(resolved.as_toml())
        return
    engine(resolved.config, batch=batch, prompt_tokens=prompt_tokens, tokens=tokens, rounds=rounds)


@bench.command("start", context_settings=HELP)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="of each, interleaved")
@with_traceback
def bench_start(rounds: int) -> None:
    """Whole-process times: a bare interpreter, import chipbus, import torch, bus-run generate to its first token."""
    from .benchmarks import start

    start(rounds)


@bench.command("worker", context_settings=HELP)
@click.option("--device", default="cpu:0", show_default=True, help="the chip, for example null:0")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="measured; one more goes before")
@with_traceback
def bench_worker(device: str, rounds: int) -> None:
    """What an L3 worker adds to its kernels: per run, per further program, per task; and how fast it ends."""
    from .benchmarks import worker

    worker(device, rounds)


@bench.command("bus", context_settings=HELP)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="measured; one more goes before")
@click.option(
    "--peers", metavar="PYTHON", default=sys.executable,
    help="interpreter of an environment with xoscar, uvloop and ray; default: this one",
)  # fmt: skip
@click.option("--lives", is_flag=True, help="also start, kill and end processes; minutes")
@click.option("--json", "json_file", type=_FILE, help="write every value of every round")
@with_traceback
def bench_bus(rounds: int, peers: str, lives: bool, json_file: Path | None) -> None:
    """What the bus and the supervisor promise, messages and processes, beside other systems in the same run."""
    from .bus_bench import bus

    bus(rounds, peers=peers, lives=lives, json_file=json_file)


@bench.command("serve", context_settings=HELP)
@click.argument("model", default="demo")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="measured; one more goes before")
@click.option("--requests", type=click.IntRange(1), default=4000, show_default=True, help="per round, to a null chip")
@click.option(
    "--openvino", metavar="PYTHON", default="", help="interpreter with openvino-genai; reads MODEL-openvino-bf16"
)
@click.option("--llama", metavar="PROGRAM", default="", help="llama-server of llama.cpp; reads MODEL-bf16.gguf")
@click.option("--soak", "soak_s", type=click.FloatRange(0), default=0, help="then load a server for so many seconds")
@click.option("--json", "json_file", type=_FILE, help="write every value of every round")
@with_traceback
def bench_serve(
    model: str, rounds: int, requests: int, openvino: str, llama: str, soak_s: float, json_file: Path | None
) -> None:
    """A whole server on null chips, in process and over HTTP; of a checkpoint MODEL its output beside other servers."""
    from .serve.bench import Peers, serve

    peers = Peers(openvino=openvino, llama=llama)
    serve(model, rounds, peers=peers, requests=requests, soak_s=soak_s, json_file=json_file)
