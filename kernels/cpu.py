"""The cpu chip: the Qwen3 programs with torch, on the threads of the machine.

Owns: programs, resident tensors and weights, bound graphs (bounded, least recently used goes first). One thread.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import KernelError
from .arguments import check_arguments, check_copy, check_tensor, find_program, find_resident
from .chips import Report
from .dispatch import Arg, Completion, Dispatch
from .graph import TaskGraph
from .program import Direction, Program, TensorSpec, nbytes
from .qwen3 import graphs
from .qwen3.rows import check_rows, plan_rows, split_ragged
from .qwen3.step import SAMPLE_COLUMNS
from .sampling import Choice, choose
from .torch_executor import BoundGraph
from .torch_kernels import Window, Workspace
from .weights import load_weights

__all__ = ["CpuChip"]

_MAX_GRAPHS = 64  # all buckets of the five programs are 33; a second set of limits fits beside them

_Trace = Callable[[Mapping[str, Any], int], TaskGraph]


class CpuChip:
    """A ``Chip`` of ``threads`` cores. Equal dispatches on equal residents give equal bits, for the same threads."""

    def __init__(self, threads: int, max_graphs: int = _MAX_GRAPHS) -> None:
        torch.set_num_threads(threads)
        self._max_graphs = max_graphs
        self._programs: dict[bytes, Program] = {}
        self._statics: dict[bytes, Mapping[str, Any]] = {}
        self._residents: dict[int, TensorSpec] = {}
        self._tensors: dict[int, Tensor] = {}
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._weight_bytes: dict[int, int] = {}
        self._graphs: OrderedDict[tuple[bytes, int, tuple[int, ...]], BoundGraph] = OrderedDict()
        self._workspaces: dict[torch.dtype, Workspace] = {}
        self._is_open = True

    @property
    def resident_bytes(self) -> int:
        """See ``Chip.resident_bytes``; untouched pages of a tensor count too, although they take no memory yet."""
        return sum(tensor.nbytes for tensor in self._tensors.values()) + sum(self._weight_bytes.values())

    @property
    def num_graphs(self) -> int:
        """Bound graphs held now."""
        return len(self._graphs)

    def register(self, program: Program) -> None:
        """See ``Chip.register``."""
        self._check_open()
        if program.kind not in _KINDS:
            raise KernelError(f"program {program.name} is of kind {program.kind!r}; known are {', '.join(_KINDS)}")
        self._programs[program.digest] = program
        self._statics[program.digest] = dict(program.static)

    def alloc(self, tensor: TensorSpec, report: Report | None = None) -> None:
        """See ``Chip.alloc``."""
        self._check_open()
        check_tensor(tensor, self._residents)
        if tensor.source:
            with torch.inference_mode():
                spec, self._weights[tensor.resident] = load_weights(tensor, report)
            self._weight_bytes[tensor.resident] = spec.weights_bytes
        else:
            self._tensors[tensor.resident] = _zeros(tensor)
        self._residents[tensor.resident] = tensor

    def free(self, resident: int) -> None:
        """See ``Chip.free``; graphs bound to the resident go with it."""
        self._check_open()
        find_resident(self._residents, resident)
        for memory in (self._residents, self._tensors, self._weights, self._weight_bytes):
            memory.pop(resident, None)
        for key in [key for key in self._graphs if resident in key[2]]:
            del self._graphs[key]

    def copy_to(self, resident: int, value: Arg) -> None:
        """See ``Chip.copy_to``."""
        self._check_open()
        check_copy(find_resident(self._residents, resident), value)
        tensor = self._tensors[resident]
        if value.data:
            _bytes_of(tensor)[:] = np.frombuffer(value.data, np.uint8)

    def copy_from(self, resident: int) -> Arg:
        """See ``Chip.copy_from``."""
        self._check_open()
        spec = find_resident(self._residents, resident)
        check_copy(spec, None)
        return Arg(dtype=spec.dtype, shape=spec.shape, data=_bytes_of(self._tensors[resident]).tobytes())

    def launch(self, dispatch: Dispatch, *, digest: bool = False) -> Completion:
        """See ``Chip.launch``; ``device_ns`` is the wall time of the kernels, digests not included."""
        self._check_open()
        program = find_program(self._programs, dispatch)
        check_arguments(program, dispatch, self._residents)
        launch = _Launch(self, program, dispatch)
        began = time.perf_counter_ns()
        with torch.inference_mode():
            written = _KINDS[program.kind](launch)
            device_ns = time.perf_counter_ns() - began
            outputs = tuple(
                Arg.of(written[param.name])
                for param in program.params
                if param.direction is Direction.OUT and not param.resident
            )
            digests = launch.digests(written) if digest else ()
        return Completion(dispatch_id=dispatch.dispatch_id, outputs=outputs, device_ns=device_ns, digests=digests)

    def close(self) -> None:
        """See ``Chip.close``."""
        self._is_open = False
        for memory in (self._programs, self._residents, self._tensors, self._weights, self._weight_bytes, self._graphs):
            memory.clear()

    def tensor(self, resident: int) -> Tensor:
        """The memory of a resident tensor, for programs and tests."""
        return self._tensors[resident]

    def bound_graph(self, launch: _Launch, trace: _Trace, size: int) -> BoundGraph:
        """The program's graph for a bucket, bound to the dispatch's residents; traced at first use."""
        residents = tuple(arg.resident for arg in launch.args.values() if arg.resident)
        key = (launch.program.digest, size, residents)
        graph = self._graphs.get(key)
        if graph is None:
            memory: dict[str, Tensor] = {}
            for name, arg in launch.args.items():
                if arg.resident in self._weights:
                    memory |= self._weights[arg.resident]
                elif arg.resident:
                    memory[name] = self._tensors[arg.resident]
            dtype: torch.dtype = getattr(torch, launch.static["dtype"])
            workspace = self._workspaces.setdefault(dtype, Workspace(dtype))
            graph = BoundGraph(trace(launch.static, size), memory, Window.of(size), workspace)
            self._graphs[key] = graph
            if len(self._graphs) > self._max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph

    def static_of(self, program: Program) -> Mapping[str, Any]:
        """A registered program's configuration by name."""
        return self._statics[program.digest]

    def _check_open(self) -> None:
        if not self._is_open:
            raise KernelError("the chip is closed")


class _Launch:
    """One dispatch on a cpu chip, its arguments by name."""

    def __init__(self, chip: CpuChip, program: Program, dispatch: Dispatch) -> None:
        self.chip = chip
        self.program = program
        self.where = f"dispatch {dispatch.dispatch_id} of {program.name}"
        self.static = chip.static_of(program)
        self.args = {param.name: arg for param, arg in zip(program.params, dispatch.args, strict=True)}

    def array(self, name: str) -> NDArray[Any]:
        return self.args[name].numpy()

    def tensor(self, name: str) -> Tensor:
        return self.chip.tensor(self.args[name].resident)

    def digests(self, written: Mapping[str, Any]) -> tuple[bytes, ...]:
        """One per OUT and INOUT parameter. ``written``: an array by value, or which rows or slots of a resident."""
        digests = []
        for param in self.program.params:
            if param.direction is Direction.IN:
                continue
            content = written[param.name]
            if param.resident:
                places = torch.as_tensor(content, dtype=torch.int64)
                tensor = self.tensor(param.name)
                by_place = tensor.flatten(2, 3) if tensor.dim() == 5 else tensor
                content = _bytes_of(by_place.index_select(2 if tensor.dim() == 5 else 0, places))
            digests.append(hashlib.blake2b(np.ascontiguousarray(content).data, digest_size=16).digest())
        return tuple(digests)


def _forward(launch: _Launch, lengths: NDArray[Any], starts: str, buckets: tuple[int, ...]) -> Mapping[str, Any]:
    plan = plan_rows(
        launch.where,
        launch.static,
        launch.array("tokens"),
        launch.array(starts),
        lengths,
        launch.array("block_tables"),
        launch.array("rows"),
    )
    total = len(plan.tokens)
    for begin in range(0, total, buckets[-1]):
        end = min(begin + buckets[-1], total)
        graph = launch.chip.bound_graph(launch, graphs.trace_forward, graphs.bucket_of(end - begin, buckets))
        graph.window.fill_tokens(plan, launch.static["page_size"], begin, end)
        graph.run(launch.where)
    return {"k_cache": plan.slots, "v_cache": plan.slots, "hidden": [row for row in plan.rows if row >= 0]}


def _prefill(launch: _Launch) -> Mapping[str, Any]:
    return _forward(launch, launch.array("lengths"), "starts", graphs.PREFILL_BUCKETS)


def _decode(launch: _Launch) -> Mapping[str, Any]:
    lengths = np.ones_like(launch.array("tokens"))
    return _forward(launch, lengths, "positions", graphs.row_buckets(launch.static["dtype"]))


def _by_rows(launch: _Launch, trace: _Trace) -> list[int]:
    rows: list[int] = check_rows(launch.where, launch.static, launch.array("rows")).tolist()
    buckets = graphs.row_buckets(launch.static["dtype"])
    for begin in range(0, len(rows), buckets[-1]):
        part = rows[begin : begin + buckets[-1]]
        graph = launch.chip.bound_graph(launch, trace, graphs.bucket_of(len(part), buckets))
        graph.window.fill_rows(part)
        graph.run(launch.where)
    return rows


def _final_norm(launch: _Launch) -> Mapping[str, Any]:
    return {"normed": _by_rows(launch, graphs.trace_final_norm)}


def _lm_head(launch: _Launch) -> Mapping[str, Any]:
    return {"logits": _by_rows(launch, graphs.trace_lm_head)}


def _sample(launch: _Launch) -> Mapping[str, Any]:
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
    chosen = []
    for at, (row, values, history, banned) in enumerate(
        zip(rows, launch.array("settings").tolist(), *ragged, strict=True)
    ):
        settings = dict(zip(SAMPLE_COLUMNS, values, strict=True))
        for whole in ("top_k", "prompt_tokens", "logprobs"):
            settings[whole] = int(settings[whole])
        one = choose(logits[row], Choice(**settings, history=history, banned=banned))
        count = min(len(one.top_ids), widest)
        top_ids[at, :count], top_logprobs[at, :count] = one.top_ids[:count], one.top_logprobs[:count]
        chosen.append(one)
    return {
        "token_ids": np.array([one.token_id for one in chosen], np.int32),
        "logprobs": np.array([one.logprob for one in chosen], np.float32),
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }


_KINDS: Mapping[str, Callable[[_Launch], Mapping[str, Any]]] = {
    "qwen3.prefill": _prefill,
    "qwen3.decode": _decode,
    "qwen3.final_norm": _final_norm,
    "qwen3.lm_head": _lm_head,
    "qwen3.sample": _sample,
}


def _zeros(tensor: TensorSpec) -> Tensor:
    """Zeros that take memory as they are written, where torch.zeros would touch them all. numpy asks for huge pages."""
    try:
        memory = np.zeros(nbytes(tensor.dtype, tensor.shape), np.uint8)
    except MemoryError:
        size = nbytes(tensor.dtype, tensor.shape)
        raise KernelError(
            f"resident {tensor.resident} of {tensor.dtype} {list(tensor.shape)} needs {size} bytes; the machine refused"
        ) from None
    return torch.from_numpy(memory).view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's memory as bytes (zero-copy if it is contiguous)."""
    array: NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return array
