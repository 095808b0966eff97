"""A chip that computes nothing: the same programs with known tokens, modelled time and injected faults.

Owns: programs, residents and, instead of tensors, marks of which token each cache slot and each row stands for. It
checks what a real chip cannot: that every row reads exactly the context it continues. Tile programs write known numbers
that depend on all they read (``null_tiles``). No torch.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import CoreException, KernelError, MemoryExhausted
from ..topology.rings import RingUse
from .arguments import check_arguments, check_copy, check_kind, check_tensor, find_program, find_resident
from .captures import Capture, Captures
from .chips import Report
from .dispatch import Arg, Completion, Dispatch
from .faults import Fault
from .graph import Tile
from .null_tiles import corrupted_tile, null_values, task_flop, tile_bytes
from .program import DTYPE_BYTES, Direction, Program, TensorSpec, nbytes
from .qwen3.rows import RowPlan, check_rows, known_tokens, plan_rows, split_ragged

__all__ = ["CostTable", "Fault", "NullChip", "null_token"]

_MAX_GRAPHS = 64
_FIRST_TOKEN = 16  # ids below it are special in small tokenizers; a null chip never ends a text by chance
_WEIGHT = np.uint64(0x9E3779B97F4A7C15)  # odd: its powers tell positions apart modulo 2**64


def null_token(last_token: int, position: int, vocab: int) -> int:
    """The token a null chip chooses after ``last_token`` at ``position``, in a vocabulary of ``vocab`` ids.

    16 + (31 · last_token + 17 · position + 7) mod (vocab − 16): never one of the 16 lowest ids, where small tokenizers
    keep their special tokens; in a vocabulary of 32 or fewer ids, (31 · last_token + 17 · position + 7) mod vocab.
    Sampling settings change nothing, but a banned id gives way to the next higher one that is allowed (modulo vocab).
    """
    first = _FIRST_TOKEN if vocab > 2 * _FIRST_TOKEN else 0
    return first + (31 * last_token + 17 * position + 7) % (vocab - first)


@attrs.frozen(kw_only=True)
class CostTable:
    """Modelled chip time: a launch costs its overhead plus the longer of moving its bytes and doing its arithmetic.

    Defaults are the 2-core Xeon with AMX that the real cpu chip was measured on.
    """

    launch_ns: int = 20_000
    task_ns: int = 500  # of each task of a tile program
    bytes_per_s: float = 30e9
    flop_per_s: float = 2.5e12

    def ns(self, bytes_moved: float, flop: float) -> int:
        """Nanoseconds of one launch of a built-in program."""
        return self.launch_ns + self._work_ns(bytes_moved, flop)

    def of_task(self, bytes_moved: float, flop: float) -> int:
        """Nanoseconds of one task of a tile program, whose launch costs ``launch_ns`` besides."""
        return self.task_ns + self._work_ns(bytes_moved, flop)

    def _work_ns(self, bytes_moved: float, flop: float) -> int:
        return int(1e9 * max(bytes_moved / self.bytes_per_s, flop / self.flop_per_s))


class NullChip:
    """A ``Chip`` without numerics. Deterministic: equal commands give equal completions, times and digests.

    ``memory_bytes``: how much its residents may take; None: no limit.
    """

    def __init__(
        self, faults: Sequence[Fault] = (), cost: CostTable | None = None, *, memory_bytes: int | None = None
    ) -> None:
        self.engine = "null"
        self.is_uniform = True  # its tokens depend on the text alone
        self._faults = tuple(faults)
        self._cost = cost or CostTable()
        self._memory_bytes = memory_bytes
        self._programs: dict[bytes, Program] = {}
        self._captures = Captures(_MAX_GRAPHS)
        self._residents: dict[int, TensorSpec] = {}
        self._values: dict[int, Arg] = {}  # what copy_to and tile programs left; built-in programs do not look at it
        self._marks: dict[int, dict[str, NDArray[Any]]] = {}
        self._launches = 0
        self._allocs = 0
        self._closed = threading.Event()
        self.progress = 0

    @property
    def resident_bytes(self) -> int:
        """What a real chip would hold, without weights: they are not read."""
        return sum(nbytes(tensor.dtype, tensor.shape) for tensor in self._residents.values() if not tensor.source)

    @property
    def rings(self) -> tuple[RingUse, ...]:
        """See ``Chip.rings``."""
        return self._captures.rings

    def register(self, program: Program) -> None:
        """See ``Chip.register``."""
        self._check_open()
        check_kind(program, ("tile", *_KINDS))
        self._captures.register(program)
        self._programs[program.digest] = program

    def unregister(self, digest: bytes) -> None:
        """See ``Chip.unregister``."""
        self._check_open()
        self._captures.unregister(find_program(self._programs, digest, "unregister"))
        del self._programs[digest]

    def alloc(self, tensor: TensorSpec, report: Report | None = None) -> None:
        """See ``Chip.alloc``; weights are not read."""
        self._check_open()
        check_tensor(tensor, self._residents)
        self._allocs += 1
        what = f"resident {tensor.resident} of {tensor.dtype} {list(tensor.shape)}"
        if any(fault.kind == "refuse_alloc" and fault.dispatch == self._allocs for fault in self._faults):
            raise MemoryExhausted(f"{what} is refused: injected fault at allocation {self._allocs}")
        needed = 0 if tensor.source else nbytes(tensor.dtype, tensor.shape)
        if self._memory_bytes is not None and needed > self._memory_bytes - self.resident_bytes:
            free = self._memory_bytes - self.resident_bytes
            raise MemoryExhausted(f"{what} needs {needed:,} bytes; {free:,} are free on this null chip")
        self._residents[tensor.resident] = tensor
        if tensor.source and report is not None:
            report(1.0, 1.0)

    def free(self, resident: int) -> None:
        """See ``Chip.free``."""
        self._check_open()
        find_resident(self._residents, resident)
        del self._residents[resident]
        self._values.pop(resident, None)
        self._marks.pop(resident, None)

    def copy_to(self, resident: int, value: Arg) -> None:
        """See ``Chip.copy_to``; invisible to built-in programs."""
        self._check_open()
        check_copy(find_resident(self._residents, resident), value)
        self._values[resident] = value

    def copy_from(self, resident: int) -> Arg:
        """See ``Chip.copy_from``: what ``copy_to`` or a tile program left, else zeros."""
        self._check_open()
        tensor = find_resident(self._residents, resident)
        check_copy(tensor, None)
        return self._value(resident)

    def launch(self, dispatch: Dispatch, *, digest: bool = False) -> Completion:
        """See ``Chip.launch``; ``device_ns`` is modelled, digests of built-in programs are over tokens and places."""
        self._check_open()
        program = find_program(self._programs, dispatch.program, f"dispatch {dispatch.dispatch_id}")
        sizes = check_arguments(program, dispatch, self._residents)
        self._launches += 1
        faults = [f for f in self._faults if f.dispatch == self._launches and f.kind != "refuse_alloc"]
        run = _Run(self, program, dispatch)
        if program.kind == "tile":
            return self._launch_tiles(
                run, self._captures.of_tile(run.where, program, sizes, dispatch.config), faults, digest
            )
        slower = 1.0
        for fault in faults:
            self._strike(fault, run.where)
            if fault.kind == "slow":
                slower *= fault.factor
            run.is_corrupt |= fault.kind == "corrupt"
        bytes_moved, flop = _KINDS[program.kind](run)
        self.progress += 1
        return Completion(
            dispatch_id=dispatch.dispatch_id,
            outputs=tuple(run.outputs),
            device_ns=int(self._cost.ns(bytes_moved, flop) * slower),
            digests=run.digests() if digest else (),
            fault=_told(faults),
        )

    def _launch_tiles(self, run: _Run, capture: Capture, faults: Sequence[Fault], digest: bool) -> Completion:
        """Model the graph's tasks one after another, then write known numbers."""
        graph, cost = capture.graph, self._cost
        took = [cost.of_task(tile_bytes(task), task_flop(task)) for task in graph.tasks]
        corrupt: list[Tile] = []
        for fault in faults:
            at = None if fault.task is None or not took else min(fault.task, len(took) - 1)
            self._strike(
                fault, run.where if at is None else f"{run.where}: task {at} of {graph.name} ({graph.tasks[at].kernel})"
            )
            if fault.kind == "slow":
                for index in range(len(took)) if at is None else (at,):
                    took[index] = int(took[index] * fault.factor)
            if fault.kind == "corrupt":
                corrupt += filter(None, [corrupted_tile(graph, at or 0)])
        self._write_known(run, corrupt)
        self.progress += len(took)
        ends = np.cumsum([cost.launch_ns, *took], dtype="<i8")
        is_timed = run.dispatch.config is not None and run.dispatch.config.timeline
        return Completion(
            dispatch_id=run.dispatch.dispatch_id,
            outputs=tuple(run.outputs),
            device_ns=int(ends[-1]),
            digests=run.digests() if digest else (),
            task_times=np.stack([ends[:-1], ends[1:]], axis=1).tobytes() if is_timed else b"",
            graph=capture.name if is_timed else "",
            fault=_told(faults),
        )

    def _write_known(self, run: _Run, corrupt: Sequence[Tile]) -> None:
        params = run.program.params
        inputs = [
            (self._value(arg.resident) if arg.resident else arg).data
            for param, arg in zip(params, run.args.values(), strict=True)
            if param.direction is not Direction.OUT
        ]
        for param, arg in zip(params, run.args.values(), strict=True):
            if param.direction is Direction.IN:
                continue
            shape = self._residents[arg.resident].shape if arg.resident else arg.shape
            data = bytearray(null_values(run.program.name, param.name, inputs, param.dtype, shape))
            for tile in corrupt:
                if tile.buffer.name == param.name:
                    data[tile.byte_ranges()[0][0]] ^= 0xFF
            value = Arg(dtype=param.dtype, shape=shape, data=bytes(data))
            run.wrote(param.name, np.frombuffer(value.data, np.uint8))
            if arg.resident:
                self._values[arg.resident] = value
            else:
                run.outputs.append(value)

    def describe(self, graph: str) -> str:
        """See ``Chip.describe``; a null chip captures the graphs of tile programs only."""
        self._check_open()
        return self._captures.describe(graph)

    def close(self) -> None:
        """See ``Chip.close``; also ends a launch that hangs, from any thread."""
        self._closed.set()
        self._residents.clear()
        self._programs.clear()
        self._captures.clear()
        self._values.clear()
        self._marks.clear()

    def marks(self, resident: int, create: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """What stands for the contents of a resident; made at first use, when its part in a program is known."""
        if resident not in self._marks:
            self._marks[resident] = create()
        return self._marks[resident]

    def _value(self, resident: int) -> Arg:
        tensor = self._residents[resident]
        zeros = Arg(dtype=tensor.dtype, shape=tensor.shape, data=bytes(nbytes(tensor.dtype, tensor.shape)))
        return self._values.get(resident, zeros)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise KernelError("the chip is closed")

    def _strike(self, fault: Fault, where: str) -> None:
        """Let a fault happen that ends the launch, or holds it up."""
        if fault.kind == "fail":
            raise CoreException(f"{where}: injected fault at launch {fault.dispatch}")
        if fault.kind == "die":
            os._exit(13)
        if fault.kind == "stop":
            signal.raise_signal(signal.SIGSTOP)
        if fault.kind == "hang":
            self._closed.wait()
            raise KernelError(f"{where}: the chip was closed while it hung")


class _Run:
    """One launch on a null chip: its arguments by name, what it writes, and digests of that."""

    def __init__(self, chip: NullChip, program: Program, dispatch: Dispatch) -> None:
        self.chip = chip
        self.program = program
        self.dispatch = dispatch
        self.is_corrupt = False  # the first thing written will be wrong
        self.where = f"dispatch {dispatch.dispatch_id} of {program.name}"
        self.static: Mapping[str, Any] = dict(program.static)
        self.args = {param.name: arg for param, arg in zip(program.params, dispatch.args, strict=True)}
        self.outputs: list[Arg] = []
        self._written: dict[str, bytes] = {}

    def array(self, name: str) -> NDArray[Any]:
        return self.args[name].numpy()

    def slots(self, name: str) -> dict[str, NDArray[Any]]:
        """Marks of a KV cache: the token in each slot (-1: none), the sum over the context that ends there, and, while
        a launch is looked at, which of its rows writes it (-1: none)."""
        count = self.static["num_pages"] * self.static["page_size"]
        return self.chip.marks(
            self.args[name].resident,
            lambda: {
                "token": np.full(count, -1, np.int64),
                "context": np.zeros(count, np.uint64),
                "writer": np.full(count, -1, np.int64),
            },
        )

    def rows(self, name: str) -> NDArray[Any]:
        """Marks of a row buffer: (token, position) of each row, -1 if it was never written."""
        count = self.static["max_num_seqs"]
        return self.chip.marks(self.args[name].resident, lambda: {"row": np.full((count, 2), -1, np.int64)})["row"]

    def chosen(self) -> NDArray[np.int32]:
        """The token chosen last for each row, -1 if none was."""
        count = self.static["max_num_seqs"]
        return self.chip.marks(self.args["chosen"].resident, lambda: {"token": np.full(count, -1, np.int32)})["token"]

    def wrote(self, name: str, content: NDArray[Any]) -> None:
        data = content.tobytes()
        if self.is_corrupt and data:
            data, self.is_corrupt = bytes([data[0] ^ 0xFF]) + data[1:], False
        self._written[name] = data

    def give(self, name: str, array: NDArray[Any]) -> None:
        self.wrote(name, array)
        given = Arg.of(array)
        self.outputs.append(attrs.evolve(given, data=self._written[name]))

    def digests(self) -> tuple[bytes, ...]:
        return tuple(
            hashlib.blake2b(self._written[param.name], digest_size=16).digest()
            for param in self.program.params
            if param.direction is not Direction.IN
        )

    def layer_parameters(self) -> int:
        """Parameters of all layers, without embedding and norms."""
        s = self.static
        attention = s["hidden_size"] * s["head_dim"] * 2 * (s["num_heads"] + s["num_kv_heads"])
        return int(s["num_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"]))


def _forward(run: _Run, plan: RowPlan) -> tuple[float, float]:
    """Check that each row continues what its pages hold, then leave marks of its tokens. Returns bytes and flop."""
    page_size, tables = run.static["page_size"], plan.tables.astype(np.int64)
    powers = np.cumprod(np.full(max(plan.ends), _WEIGHT, np.uint64), dtype=np.uint64)
    k_cache, v_cache, hidden = run.slots("k_cache"), run.slots("v_cache"), run.rows("hidden")
    starts, ends, offsets = np.array(plan.starts), np.array(plan.ends), np.array(plan.offsets)

    # All rows at once: what they read, one row after another. A row may read what those before it write.
    first, lengths = np.cumsum(starts) - starts, ends - starts
    reader = np.repeat(np.arange(len(starts)), starts)
    positions = np.arange(len(reader)) - first[reader]
    slots = tables[reader, positions // page_size] * page_size + positions % page_size
    tokens, found = plan.tokens.astype(np.int64), {name: k_cache[name][plan.slots] for name in ("token", "context")}
    k_cache["token"][plan.slots] = tokens
    expected, before = _contexts(k_cache["token"][slots], powers[positions], first, starts)
    added, _ = _contexts(tokens, powers[plan.positions], offsets[:-1], lengths)
    context = np.repeat(before, lengths) + added
    k_cache["context"][plan.slots] = context
    k_cache["writer"][plan.slots] = np.repeat(np.arange(len(starts)), lengths)
    is_wrong = (k_cache["token"][slots] < 0) | (k_cache["context"][slots] != expected)
    is_wrong |= k_cache["writer"][slots] >= reader
    k_cache["writer"][plan.slots] = -1
    if is_wrong.any():
        for name, marks in found.items():
            k_cache[name][plan.slots] = marks
        at = int(is_wrong.argmax())
        raise KernelError(
            f"{run.where}: row {reader[at]} reads position {positions[at]} from page {slots[at] // page_size}, offset"
            f" {slots[at] % page_size}, which holds no token of its context"
        )
    v_cache["token"][plan.slots] = tokens
    v_cache["context"][plan.slots] = context
    kept = np.array(plan.rows) >= 0
    hidden[np.array(plan.rows)[kept]] = np.stack([tokens[offsets[1:] - 1], ends - 1], axis=1)[kept]
    written = np.stack([plan.tokens, plan.positions, plan.slots])
    run.wrote("k_cache", written)
    run.wrote("v_cache", written)
    run.wrote("hidden", hidden[[row for row in plan.rows if row >= 0]])
    parameters, item = run.layer_parameters(), DTYPE_BYTES[run.static["dtype"]]
    token_bytes = 2 * run.static["num_layers"] * run.static["num_kv_heads"] * run.static["head_dim"] * item
    return parameters * item + token_bytes * sum(plan.ends), 2.0 * parameters * len(plan.tokens)


def _contexts(
    tokens: NDArray[np.int64], powers: NDArray[np.uint64], first: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """What each token stands behind, itself included, as one number; rows have ``lengths`` from ``first`` on. And each
    row's last number, 0 if the row is empty.

    Sums are modulo 2**64, so those of one row are differences of those over all.
    """
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((tokens + 1).astype(np.uint64) * powers)])
    return sums[1:] - np.repeat(sums[first], lengths), sums[first + lengths] - sums[first]


def _prefill(run: _Run) -> tuple[float, float]:
    names = ("tokens", "starts", "lengths", "block_tables", "rows")
    return _forward(run, plan_rows(run.where, run.static, *(run.array(name) for name in names)))


def _decode(run: _Run) -> tuple[float, float]:
    tokens, positions, tables, rows = (run.array(name) for name in ("tokens", "positions", "block_tables", "rows"))
    tokens = known_tokens(run.where, tokens, run.chosen())
    return _forward(run, plan_rows(run.where, run.static, tokens, positions, np.ones_like(tokens), tables, rows))


def _read_rows(run: _Run, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Row numbers and marks; a row nothing was written to is a fault of the caller that a real chip cannot see."""
    rows = check_rows(run.where, run.static, run.array("rows"))
    marks = run.rows(name)[rows]
    if (marks < 0).any():
        raise KernelError(f"{run.where}: row {rows[int((marks < 0).any(axis=1).argmax())]} of {name} was never written")
    return rows, marks


def _pass_rows(run: _Run, source: str, target: str) -> int:
    rows, marks = _read_rows(run, source)
    run.rows(target)[rows] = marks
    run.wrote(target, marks)
    return len(rows)


def _final_norm(run: _Run) -> tuple[float, float]:
    count = _pass_rows(run, "hidden", "normed")
    return 2.0 * count * run.static["hidden_size"] * DTYPE_BYTES[run.static["dtype"]], 0.0


def _lm_head(run: _Run) -> tuple[float, float]:
    count = _pass_rows(run, "normed", "logits")
    size = run.static["vocab_size"] * run.static["hidden_size"]
    return float(size * DTYPE_BYTES[run.static["dtype"]]), 2.0 * size * count


def _sample(run: _Run) -> tuple[float, float]:
    rows, marks = _read_rows(run, "logits")
    vocab, widest = run.static["vocab_size"], run.args["top_ids"].shape[1]
    split_ragged(run.where, "history", run.array("history"), run.array("history_ends"), vocab)
    banned = split_ragged(run.where, "banned", run.array("banned"), run.array("banned_ends"), vocab)
    tokens = []
    for (last_token, position), ids in zip(marks.tolist(), banned, strict=True):
        refused, token = set(ids.tolist()), null_token(last_token, position, vocab)
        while token in refused and len(refused) < vocab:
            token = (token + 1) % vocab
        tokens.append(token)
    chosen = np.array(tokens, np.int32)
    run.chosen()[rows] = chosen
    run.wrote("chosen", chosen)
    ranks = np.arange(widest, dtype=np.int32)
    run.give("token_ids", chosen)
    run.give("logprobs", np.full(len(rows), -0.5, np.float32))
    run.give("top_ids", (chosen[:, None] + ranks) % vocab)
    run.give("top_logprobs", np.broadcast_to(-0.5 - ranks.astype(np.float32), (len(rows), widest)))
    return 4.0 * len(rows) * vocab, 0.0


def _told(faults: Sequence[Fault]) -> str:
    """The faults of a launch that went on, for its completion."""
    return ", ".join(
        fault.kind
        + (f" at task {fault.task}" if fault.task is not None else "")
        + (f" by {fault.factor:g}" if fault.kind == "slow" else "")
        for fault in faults
    )


_KINDS: Mapping[str, Callable[[_Run], tuple[float, float]]] = {
    "qwen3.prefill": _prefill,
    "qwen3.decode": _decode,
    "qwen3.final_norm": _final_norm,
    "qwen3.lm_head": _lm_head,
    "qwen3.sample": _sample,
}
