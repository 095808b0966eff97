"""``bus-run check``: what an engine with these settings would be, without starting one.

Owns: nothing. Everything printed comes from the same plan an engine starts from.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..actors.config import EngineConfig
from ..actors.plan import EnginePlan, plan_engine
from ..actors.text import TextModel
from ..kernels.memory import available_bytes
from ..kernels.native.shapes import engine_of

__all__ = ["check", "described", "table"]


def check(config: EngineConfig, *, numerics: bool = False) -> str:
    """Validate and describe; raises the ``ConfigError`` an engine with these settings would raise.

    ``numerics``: run the kernels at the model's shapes, and tell which of them keep a token's bits in every batch; and
    how far int8 weights, if asked for, move the logits.
    """
    plan = plan_engine(config)
    TextModel(plan.model_dir)  # the plan reads no tokenizer; a tokenizer actor would refuse a broken one at start
    told = described(plan, available_bytes())
    if not numerics:
        return told
    from ..kernels.accuracy import compare_logits  # imports torch
    from ..kernels.numerics import Widths, probe_classes

    isa = "none" if engine_of(plan.spec, plan.weights).startswith("torch") else ""  # what will serve, no other
    found: list[object] = [
        probe_classes(config.dtype, plan.threads, Widths.of(plan.spec), weights=plan.weights, isa=isa)
    ]
    if plan.weights:
        found.append(compare_logits(plan.spec, plan.weights, plan.threads))
    return "\n\n".join([told, *map(str, found)])


def described(plan: EnginePlan, available: int) -> str:
    """Model, placement table and memory budget; ``available`` is how many bytes can be allocated now."""
    spec, limits, replicas = plan.spec, plan.limits, plan.topology.replicas
    kv_bytes = limits.num_pages * plan.page_bytes
    buffer_bytes = plan.replica_bytes - plan.weights_bytes - kv_bytes

    def budget(copies: int) -> tuple[str, ...]:
        sizes = [plan.weights_bytes, kv_bytes, buffer_bytes, plan.replica_bytes]
        counts = [limits.num_pages, limits.num_pages * limits.page_size]
        return (*(f"{copies * count:,}" for count in counts), *(_mib(copies * size) for size in sizes))

    kept = f", {plan.weights} weights," if plan.weights else ""
    served = engine_of(spec, plan.weights)
    engines = dict.fromkeys(served if chip.device.kind == "cpu" else chip.device.kind for chip in plan.topology.chips)
    head = ("replica", "chip", "device", "KV pages", "KV tokens", "weights", "KV memory", "buffers", "total")
    rows = [(place.name, chip.name, str(chip.device), *budget(1)) for place in replicas for chip in place.chips]
    rows.append(("all", "", "", *budget(len(replicas))))
    lines = [
        f"model      {plan.model_dir}",
        f"           {spec.num_layers} layers, {spec.vocab_size:,} token ids, fingerprint {spec.fingerprint[:16]}",
        f"computed   in {spec.dtype}{kept} with {plan.threads} threads per chip",
        f"engine     {', '.join(engines)}",
        f"context    {plan.max_model_len:,} tokens",
        f"step       at most {limits.max_num_seqs} requests, {limits.max_num_batched_tokens:,} tokens, per replica",
        f"KV page    {limits.page_size} tokens, {_mib(plan.page_bytes)}",
        "",
        table(head, rows, numbers_from=3),
        "",
        f"{_mib(len(replicas) * plan.replica_bytes)} needed, {_mib(available)} available",
    ]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    """Aligned columns; those from index ``numbers_from`` on to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column >= numbers_from else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
