"""The cpu chip: tile programs and the Qwen3 programs with torch, on the threads and the memory of this machine.

Owns nothing beyond what a ``TorchChip`` owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .chips import Kept, Report
from .graph import TaskGraph
from .memory import available_bytes
from .native import open_cores
from .native.model import NativeModel
from .native.shapes import engine_of
from .program import DTYPE_BYTES, TensorSpec
from .qwen3 import graphs
from .qwen3.rows import check_rows, known_tokens, plan_rows, split_ragged
from .qwen3.step import SAMPLE_COLUMNS
from .sampling import Choice, choose
from .torch_chip import Executor, Launch, Runner, TorchChip
from .weights import spec_of

__all__ = ["CpuChip"]

_CACHE_LINE = 64  # as torch aligns: a vector load across two lines takes twice as long

_Trace = Callable[[Mapping[str, Any], int], TaskGraph]


class CpuChip(TorchChip):
    """A ``Chip`` of ``threads`` cores. Equal dispatches on equal residents give equal bits, for the same threads.

    A model's programs run on the native engine where it can be had and takes the model's shapes, else with torch; tile
    programs are Python functions and always run with torch. ``isa``: see ``native.open_cores``; "none": torch alone.
    """

    def __init__(
        self,
        threads: int,
        max_graphs: int | None = None,
        *,
        isa: str = "",
        check_numerics: bool = False,
        kept: Kept | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        limit = {} if max_graphs is None else {"max_graphs": max_graphs}
        super().__init__(torch.device("cpu"), _RUNNERS, **limit, check_numerics=check_numerics)
        self.isa = isa
        self.engine = engine_of(isa=isa)
        self.native = None if self.engine.startswith("torch") else NativeModel(open_cores(threads, isa), kept)

    @property
    def progress(self) -> int:
        """See ``Chip.progress``."""
        return super().progress + (0 if self.native is None else self.native.ended)

    def free_bytes(self) -> int:
        """Memory of the machine, or of the cgroup this process is in."""
        return available_bytes()

    def synchronize(self) -> None:
        """Nothing is queued: a kernel has ended when its call returns."""

    def zeros(self, count: int) -> Tensor:
        """Zeros that take memory as they are written; torch.zeros would touch them all. numpy asks for huge pages."""
        memory = np.zeros(count + _CACHE_LINE, np.uint8)
        begin = -memory.ctypes.data % _CACHE_LINE
        return torch.from_numpy(memory[begin : begin + count])

    def load(self, tensor: TensorSpec, report: Report | None) -> tuple[Mapping[str, Any], int]:
        """Weights packed for the engine that will run the model's programs."""
        spec = spec_of(tensor)
        self.engine = engine_of(spec, tensor.weights, self.isa)
        self.is_uniform = self.native is not None and self.engine.startswith("native")
        if self.native is not None and self.is_uniform:
            return self.native.load(tensor, spec, report)
        return super().load(tensor, report)

    def free(self, resident: int) -> None:
        """See ``Chip.free``."""
        super().free(resident)
        if self.native is not None:
            self.native.free(resident)

    def close(self) -> None:
        """See ``Chip.close``."""
        super().close()
        if self.native is not None:
            self.native.close()


def _replay(launch: Launch, trace: _Trace, size: int, fill: Callable[[Any], None]) -> None:
    """One window through the program's graph for a bucket."""
    chip = launch.chip
    assert isinstance(chip, CpuChip)
    graph: Executor
    weights = launch.args["weights"].resident
    if chip.native is not None and chip.native.has(weights):
        static = chip.native.tiled(weights, launch.static, size)
        capture = chip.capture_builtin(launch, f"{size}.native", lambda: trace(static, size))
        graph = chip.bind(launch, capture, partial(chip.native.bind, chip, capture))
    else:
        capture = chip.capture_builtin(launch, str(size), lambda: trace(launch.static, size))
        graph = chip.bind_torch(launch, capture, size, getattr(torch, launch.static["dtype"]))
    fill(graph.window)
    launch.run(capture, graph)


def _wrote_rows(launch: Launch, name: str, rows: Sequence[int]) -> None:
    launch.wrote(name, lambda: [launch.tensor(name).index_select(0, torch.as_tensor(rows, dtype=torch.int64))])


def _wrote_slots(launch: Launch, name: str, slots: NDArray[Any]) -> None:
    def pieces() -> Iterable[Tensor]:
        by_slot = launch.tensor(name).flatten(2, 3)
        return [by_slot.index_select(2, torch.as_tensor(slots, dtype=torch.int64))]

    launch.wrote(name, pieces)


def _forward(
    launch: Launch,
    trace: _Trace,
    tokens: NDArray[Any],
    lengths: NDArray[Any],
    starts: str,
    buckets: tuple[int, ...],
) -> None:
    plan = plan_rows(
        launch.where,
        launch.static,
        tokens,
        launch.array(starts),
        lengths,
        launch.array("block_tables"),
        launch.array("rows"),
    )
    total = len(plan.tokens)
    for begin in range(0, total, buckets[-1]):
        end = min(begin + buckets[-1], total)
        fill = methodcaller("fill_tokens", plan=plan, page_size=launch.static["page_size"], begin=begin, end=end)
        _replay(launch, trace, graphs.bucket_of(end - begin, buckets), fill)
        launch.read(plan.context(begin, end) * _position_bytes(launch.static))
    _wrote_slots(launch, "k_cache", plan.slots)
    _wrote_slots(launch, "v_cache", plan.slots)
    _wrote_rows(launch, "hidden", [row for row in plan.rows if row >= 0])


def _position_bytes(static: Mapping[str, Any]) -> int:
    """Of the keys and values of one position, in all layers."""
    per_layer: int = 2 * static["num_kv_heads"] * static["head_dim"] * DTYPE_BYTES[static["dtype"]]
    return per_layer * int(static["num_layers"])


def _prefill(launch: Launch) -> None:
    tokens, lengths = launch.array("tokens"), launch.array("lengths")
    _forward(launch, graphs.trace_prefill, tokens, lengths, "starts", graphs.PREFILL_BUCKETS)


def _decode(launch: Launch) -> None:
    tokens = known_tokens(launch.where, launch.array("tokens"), launch.tensor("chosen").numpy())
    _forward(launch, graphs.trace_decode, tokens, np.ones_like(tokens), "positions", graphs.ROW_BUCKETS)


def _by_rows(launch: Launch, trace: _Trace, target: str) -> None:
    rows: list[int] = check_rows(launch.where, launch.static, launch.array("rows")).tolist()
    buckets = graphs.ROW_BUCKETS
    for begin in range(0, len(rows), buckets[-1]):
        part = rows[begin : begin + buckets[-1]]
        _replay(launch, trace, graphs.bucket_of(len(part), buckets), methodcaller("fill_rows", part))
    _wrote_rows(launch, target, rows)


def _final_norm(launch: Launch) -> None:
    _by_rows(launch, graphs.trace_final_norm, "normed")


def _lm_head(launch: Launch) -> None:
    _by_rows(launch, graphs.trace_lm_head, "logits")


def _sample(launch: Launch) -> None:
    rows = check_rows(launch.where, launch.static, launch.array("rows")).tolist()
    vocab = launch.static["vocab_size"]
    ragged = (
        split_ragged(launch.where, name, launch.array(name), launch.array(f"{name}_ends"), vocab)
        for name in ("history", "banned")
    )
    logits = launch.tensor("logits").numpy()
    widest = launch.args["top_ids"].shape[1]
    top_ids = np.zeros((len(rows), widest), np.int32)
    top_logprobs = np.full((len(rows), widest), -math.inf, np.float32)
    assert isinstance(launch.chip, CpuChip)
    search = {} if launch.chip.native is None else {"largest": launch.chip.native.largest}
    chosen = []
    for at, (row, values, history, banned) in enumerate(
        zip(rows, launch.array("settings").tolist(), *ragged, strict=True)
    ):
        settings = dict(zip(SAMPLE_COLUMNS, values, strict=True))
        for whole in ("top_k", "prompt_tokens", "logprobs"):
            settings[whole] = int(settings[whole])
        one = choose(logits[row], Choice(**settings, history=history, banned=banned), **search)
        count = min(len(one.top_ids), widest)
        top_ids[at, :count], top_logprobs[at, :count] = one.top_ids[:count], one.top_logprobs[:count]
        chosen.append(one)
    token_ids = np.array([one.token_id for one in chosen], np.int32)
    launch.tensor("chosen").numpy()[rows] = token_ids
    _wrote_rows(launch, "chosen", rows)
    launch.give("token_ids", token_ids)
    launch.give("logprobs", np.array([one.logprob for one in chosen], np.float32))
    launch.give("top_ids", top_ids)
    launch.give("top_logprobs", top_logprobs)


_RUNNERS: Mapping[str, Runner] = {
    "qwen3.prefill": _prefill,
    "qwen3.decode": _decode,
    "qwen3.final_norm": _final_norm,
    "qwen3.lm_head": _lm_head,
    "qwen3.sample": _sample,
}
