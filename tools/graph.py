"""``bus-run graph``: the task graph of one forward pass of a model, as numbers, JSON, pictures or a timeline.

Owns: with ``measure``, one cpu chip in this process while it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import attrs
import click
import numpy as np

from ..actors.plan import model_directory
from ..errors import ConfigError
from ..kernels.chips import open_chip
from ..kernels.diagnosis import (
    RunGraph,
    critical_path,
    run_of_capture,
    run_of_launch,
    scheduled,
    to_graph_svg,
    to_json,
    to_rings_svg,
    to_trace_events,
)
from ..kernels.dispatch import Completion, LaunchConfig
from ..kernels.graph import Task
from ..kernels.null import CostTable
from ..kernels.null_tiles import task_flop, tile_bytes
from ..kernels.program import nbytes
from ..kernels.qwen3 import graphs
from ..kernels.qwen3.model import ModelSpec
from ..kernels.qwen3.step import DecodeRow, Limits, ModelPrograms, PrefillRow, StepInput, build_step
from ..kernels.qwen3.tiling import Tiling
from ..topology.rings import RINGS, resolve_rings, suggest_rings
from .check import table

__all__ = ["Outputs", "Work", "graph"]

_PAGE_SIZE = 128
_MOST_DECODES = max(graphs.ROW_BUCKETS)
_MOST_TOKENS = max(graphs.PREFILL_BUCKETS)


@attrs.frozen
class Work:
    """One forward pass: the prompt tokens of one row, or (``prefill`` 0) a token for each of some rows."""

    prefill: int
    decode: int
    context: int  # tokens each row has before

    def __attrs_post_init__(self) -> None:
        for name, count, most in (("prefill", self.prefill, _MOST_TOKENS), ("decode", self.decode, _MOST_DECODES)):
            if count > most:
                raise ConfigError(f"--{name} is {count}; one graph takes at most {most}, more run in several windows")

    @property
    def tokens(self) -> int:
        """Computed in one pass."""
        return self.prefill or self.decode

    @property
    def rows(self) -> int:
        """Sequences."""
        return 1 if self.prefill else self.decode

    def limits(self) -> Limits:
        """The smallest that hold it."""
        length = self.context + (self.prefill or 1)
        pages = -(-length // _PAGE_SIZE)
        return Limits(
            max_num_seqs=self.rows,
            max_num_batched_tokens=max(self.tokens, self.rows * max(self.context, 1)),
            max_model_len=pages * _PAGE_SIZE,
            page_size=_PAGE_SIZE,
            num_pages=self.rows * pages,
        )

    def __str__(self) -> str:
        what = f"prefill of {self.prefill} tokens" if self.prefill else f"decode of {self.decode} rows"
        return f"{what}, context {self.context}"


@attrs.frozen(kw_only=True)
class Outputs:
    """Files to write, None for those not wanted."""

    json: Path | None
    svg: Path | None
    rings: Path | None
    trace: Path | None


def graph(model: str, work: Work, outputs: Outputs, *, dtype: str, tiling: Tiling, threads: int | None) -> None:
    """Print what the pass consists of and where its time goes; ``threads``: run it on so many, None: model its time."""
    spec = ModelSpec.from_directory(model_directory(model), dtype)
    programs = ModelPrograms.build(spec, work.limits(), tiling)
    run = _modelled(programs, work) if threads is None else _measured(programs, work, threads)
    run = attrs.evolve(run, name=f"{run.name.partition('@')[0]} of {Path(spec.path).name}", rings=resolve_rings())
    click.echo("\n".join(_lines(run, f"{spec.path}, {dtype}, {work}")))
    for file, view in (
        (outputs.json, to_json),
        (outputs.svg, to_graph_svg),
        (outputs.rings, to_rings_svg),
        (outputs.trace, to_trace_events),
    ):
        if file is not None:
            content = view(run)
            file.write_bytes(content.encode() if isinstance(content, str) else content)


def _modelled(programs: ModelPrograms, work: Work) -> RunGraph:
    """Traced like a chip would, with times from the null chip's table of costs."""
    buckets = graphs.PREFILL_BUCKETS if work.prefill else graphs.ROW_BUCKETS
    trace = graphs.trace_prefill if work.prefill else graphs.trace_decode
    captured = trace(dict(programs.prefill.static), graphs.bucket_of(work.tokens, buckets))
    cost = CostTable()
    took = [cost.of_task(_moved_bytes(task, work), task_flop(task)) for task in captured.tasks]
    return scheduled(run_of_capture(captured), took)


def _moved_bytes(task: Task, work: Work) -> int:
    """As the null chip counts for tile programs, but of tables and caches only the rows that are touched."""
    sizes = [nbytes(tile.buffer.dtype, tile.shape) for _, tile in task.args]
    match task.kernel:
        case "load_rows":
            return 2 * sizes[-1]
        case "store_rows" | "rotate_and_store":
            return 2 * sizes[0]
        case "paged_attention":
            _, pages, page_size, _ = task.args[1][1].shape
            queries = task.args[0][1].shape[0]
            read = work.context + work.prefill if work.prefill else queries * (work.context + 1)
            return sizes[0] + sizes[-1] + 2 * sizes[1] * read // (pages * page_size)
    return tile_bytes(task)


def _measured(programs: ModelPrograms, work: Work, threads: int) -> RunGraph:
    """The second of two equal passes on a cpu chip: the first one packs weights."""
    chip = open_chip("cpu:0", threads)
    try:
        for program in programs.programs:
            chip.register(program)
        for tensor in programs.tensors:
            chip.alloc(tensor)
        draw = np.random.default_rng(0)
        vocab = programs.spec.vocab_size
        per_row = programs.limits.pages_per_sequence
        tables = [np.arange(row * per_row, (row + 1) * per_row, dtype=np.int32) for row in range(work.rows)]

        def prompts(length: int, start: int) -> tuple[PrefillRow, ...]:
            return tuple(
                PrefillRow(
                    tokens=draw.integers(0, vocab, length, dtype=np.int32), start=start, block_table=table, row=row
                )
                for row, table in enumerate(tables)
            )

        def launch(step: StepInput, *, timeline: bool) -> Completion:
            [dispatch] = build_step(programs, step, 1)
            return chip.launch(attrs.evolve(dispatch, config=LaunchConfig(timeline=timeline)))

        if work.context:
            launch(StepInput(step_id=1, prefills=prompts(work.context, 0)), timeline=False)
        decodes = tuple(
            DecodeRow(token=int(draw.integers(0, vocab)), position=work.context, block_table=table, row=row)
            for row, table in enumerate(tables)
        )
        prefills = prompts(work.prefill, work.context) if work.prefill else ()
        step = StepInput(step_id=2, prefills=prefills, decodes=() if prefills else decodes)
        launch(step, timeline=True)
        return run_of_launch(launch(step, timeline=True), chip.describe)
    finally:
        chip.close()


def _lines(run: RunGraph, title: str) -> Iterable[str]:
    path = critical_path(run)
    reasons = Counter(reason.value for edge in run.edges for reason in edge.reasons)
    yield f"{title}: graph {run.name}, {run.clock} clock"
    yield f"tasks          {len(run.tasks):,}"
    yield f"edges          {len(run.edges):,}: {', '.join(f'{count:,} {name}' for name, count in reasons.items())}"
    yield (
        f"critical path  {len(path.tasks):,} tasks, {path.length_ns / 1e6:,.3f} ms of {run.wall_ns / 1e6:,.3f} ms"
        f" from first begin to last end"
    )
    if run.clock == "wall":
        yield f"busy           {_busy(run)}"
    yield ""
    took: Counter[str] = Counter()
    for task in run.tasks:
        took[task.label] += task.duration_ns
    counts = Counter(task.label for task in run.tasks)
    on_path = Counter(run.tasks[index].label for index in path.tasks)
    total = max(sum(took.values()), 1)
    rows = [
        (label, f"{counts[label]:,}", f"{on_path[label]:,}", f"{ns / 1e6:,.3f}", f"{100 * ns / total:.1f}")
        for label, ns in took.most_common()
    ]
    yield table(("kernel", "tasks", "on the path", "ms", "%"), rows, numbers_from=1)
    yield ""
    yield from _ring_lines(run)


def _busy(run: RunGraph) -> str:
    """Of the time from first begin to last end, what each core spent in tasks."""
    took: Counter[str] = Counter()
    for task in run.tasks:
        took[task.lane] += task.duration_ns
    cores = sorted(took.items(), key=lambda item: (len(item[0]), item[0]))  # core.10 after core.9
    return ", ".join(f"{lane} {100 * ns / max(run.wall_ns, 1):.0f} %" for lane, ns in cores)


def _ring_lines(run: RunGraph) -> Iterable[str]:
    """What each ring held at most, and the sizes that would have been enough."""
    enough = suggest_rings(run.high_water)
    suggested = [
        [asked] * RINGS if isinstance(asked, int) else list(asked or ())
        for asked in (enough.ring_task_window, enough.ring_heap, enough.ring_dep_pool)
    ]
    rows = [
        (
            str(ring),
            *(f"{value:,}" for value in (use.tasks, use.heap_bytes, use.dep_entries)),
            *(f"{values[ring]:,}" for values in suggested),
        )
        for ring, use in enumerate(run.high_water)
    ]
    head = ("ring", "tasks", "heap bytes", "dep entries", "ring_task_window", "ring_heap", "ring_dep_pool")
    yield "most held, and sizes that are enough"
    yield table(head, rows, numbers_from=0)
