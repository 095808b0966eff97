"""Records made without an engine: real chips, real ledgers, the entries chip workers, replica cores and nodes write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import msgspec
import numpy as np

from chipbus.actors.manifest import RECORD_FORMAT, RunManifest
from chipbus.bus import LedgerWriter
from chipbus.kernels.chips import Chip, open_chip
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import (
    DecodeRow,
    Limits,
    ModelPrograms,
    PrefillRow,
    SampleRow,
    StepInput,
    build_step,
    read_step,
)

LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32, page_size=4, num_pages=16)
NULL_SPEC = ModelSpec(
    path="/models/nowhere", dtype="float32", vocab_size=64, hidden_size=8, intermediate_size=16, num_layers=1,
    num_heads=2, num_kv_heads=1, head_dim=4, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True,
    attention_bias=False, max_context=64, eos_token_ids=(1,), fingerprint="f" * 64,
)  # fmt: skip


@attrs.define
class Recording:
    """A record being made: one replica, one chip, requests that each get a prompt and some tokens."""

    directory: Path
    spec: ModelSpec = NULL_SPEC
    device: str = "null:0"
    claimed_device: str = ""  # written into the record instead of ``device``
    incarnation: int = 1
    falsify: Callable[[str, tuple[bytes, ...]], tuple[bytes, ...]] = lambda _, digests: digests

    def write_manifest(self, **changes: Any) -> None:
        manifest = RunManifest(
            format=RECORD_FORMAT, chipbus_version="0", created_unix_s=0.0, machine="a test", model_dir=self.spec.path,
            fingerprint=self.spec.fingerprint, config={"dtype": self.spec.dtype, "chip": self.device[:-2]},
        )  # fmt: skip
        self.directory.mkdir(exist_ok=True)
        (self.directory / "run.json").write_bytes(msgspec.json.encode({**msgspec.to_builtins(manifest), **changes}))

    def run(self, prompts: dict[str, list[int]], num_tokens: int = 4, *, ends: bool = True) -> None:
        """Serve ``prompts`` (by request id) one after another, recording every command and decision."""
        programs = ModelPrograms.build(self.spec, LIMITS)
        chip = open_chip(self.device, 1)
        ledger = LedgerWriter(self.directory, "chip.0.0", self.incarnation, {})
        core = LedgerWriter(self.directory, "replica.0", self.incarnation, {})
        ledger.append("chip", {"device": self.claimed_device or self.device, "threads": 1})
        for program in programs.programs:
            chip.register(program)
            ledger.append("register", {"program": msgspec.msgpack.encode(program)})
        for tensor in programs.tensors:
            chip.alloc(tensor)
            ledger.append("alloc", {"tensor": msgspec.msgpack.encode(tensor)})
        step_id, dispatch_id = 1, 1
        for number, (request_id, prompt) in enumerate(prompts.items()):
            trace_id = f"{number + 1:032x}"
            table = np.arange(8, dtype=np.int32)
            core.append("message", message_fields("in", "router", "ASK", "Submit", trace_id))
            last, start = prompt, 0
            for _ in range(num_tokens):
                step = self._step(step_id, last, start, table)
                core.append("batch", batch_fields(step_id, request_id, trace_id, start, len(last)))
                dispatches = build_step(programs, step, dispatch_id)
                completions = []
                for dispatch in dispatches:
                    completion = chip.launch(dispatch, digest=True)
                    completions.append(completion)
                    name = next(p.name for p in programs.programs if p.digest == dispatch.program)
                    recorded = attrs.evolve(completion, digests=self.falsify(name, completion.digests))
                    ledger.append("dispatch", dispatch_fields(dispatch, recorded, trace_id))
                step_id, dispatch_id, start = step_id + 1, dispatch_id + len(dispatches), start + len(last)
                last = [read_step(step, completions)[0].token_id]
        free_and_close(chip, ledger, programs)
        if ends:
            ledger.close()
            core.close()
        else:
            ledger.flush()
            core.flush()

    def _step(self, step_id: int, tokens: list[int], start: int, table: np.ndarray[Any, Any]) -> StepInput:
        if len(tokens) == 1 and start:
            decode = DecodeRow(token=tokens[0], position=start, block_table=table, row=0)
            return StepInput(step_id=step_id, decodes=(decode,), samples=(SampleRow(row=0),))
        prefill = PrefillRow(tokens=np.array(tokens, np.int32), start=start, block_table=table, row=0)
        return StepInput(step_id=step_id, prefills=(prefill,), samples=(SampleRow(row=0),))


def free_and_close(chip: Chip, ledger: LedgerWriter, programs: ModelPrograms) -> None:
    for tensor in programs.tensors:
        chip.free(tensor.resident)
        ledger.append("free", {"resident": tensor.resident})
    chip.close()


def message_fields(direction: str, peer: str, kind: str, name: str, trace_id: str) -> dict[str, Any]:
    """What a node writes for one envelope."""
    return {
        "direction": direction, "peer": peer, "peer_incarnation": 1, "incarnation": 1, "kind": kind, "type": name,
        "type_id": 1, "correlation": 1, "lane": "WORK", "deadline_ns": 0, "trace_id": trace_id, "position": 0,
        "body_bytes": 12,
    }  # fmt: skip


def batch_fields(step_id: int, request_id: str, trace_id: str, start: int, length: int) -> dict[str, Any]:
    """What a replica core writes for one step."""
    kind = "decode" if start else "prefill"
    row = {"request_id": request_id, "trace_id": trace_id, "kind": kind, "start": start, "length": length}
    return {"step_id": step_id, "rows": [row], "preempted": [], "running": 1, "waiting": 0}


def dispatch_fields(dispatch: Any, completion: Any, trace_id: str) -> dict[str, Any]:
    """What a chip worker writes for one dispatch."""
    return {
        "dispatch": msgspec.msgpack.encode(dispatch),
        "completion": msgspec.msgpack.encode(completion),
        "step_id": dispatch.step_id,
        "trace_id": trace_id,
    }
