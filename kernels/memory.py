"""How much memory a placement takes and how much there is, before anything is allocated. No torch.

Owns nothing; reads /proc and the cgroup this process is in.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .program import DTYPE_BYTES, INT8_GROUP, nbytes
from .qwen3.graphs import scratch_bytes
from .qwen3.model import ModelSpec
from .qwen3.step import Limits, ModelPrograms

__all__ = ["available_bytes", "check_memory", "default_kv_pages", "replica_bytes", "weights_bytes"]

_PROCESS_BYTES = 320 << 20  # a chip worker with torch loaded and oneDNN's own buffers, measured
_INT8_GROUP_BYTES = 8  # a scale, and the sum of the values that some instruction sets need
_KV_SHARE = 0.5  # of the memory left after everything else: the default leaves room for the rest of the machine


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be allocated now without swapping: the kernel's MemAvailable, or less inside a limited cgroup."""
    fields = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    found = [int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:"]
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        root = cgroups if is_v2 else cgroups / "memory"
        limit_name, usage_name = (
            ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        group = root / path.lstrip("/")
        for level in (group, *group.parents):  # a limit may be set on any ancestor
            limit = _number(level / limit_name)
            if limit is not None:
                found.append(max(0, limit - (_number(level / usage_name) or 0) + _reclaimable(level / "memory.stat")))
            if level == root:
                break
    return min(found)


def weights_bytes(spec: ModelSpec, weights: str = "") -> int:
    """Memory a model's weights take on a chip, with matrices kept in ``weights``: "int8", or "" for the dtype.

    A tied embedding is there twice: as a table to read rows from, and packed as the head.
    """
    table = spec.vocab_size * spec.hidden_size
    item = DTYPE_BYTES[spec.dtype]
    total = spec.weights_bytes + (table * item if spec.tie_word_embeddings else 0)
    if weights == "int8":
        matrices = sum(rows * columns for rows, columns in spec.matrices())
        groups = sum(rows * -(-columns // INT8_GROUP) for rows, columns in spec.matrices())
        total += matrices + _INT8_GROUP_BYTES * groups - matrices * item
    return total


def replica_bytes(spec: ModelSpec, limits: Limits, weights: str = "") -> int:
    """Memory one replica's chip takes: weights, KV cache, row buffers, scratch, and the process around them."""
    programs = ModelPrograms.build(spec, limits)
    kept = sum(nbytes(tensor.dtype, tensor.shape) for tensor in programs.tensors if not tensor.source)
    return _PROCESS_BYTES + weights_bytes(spec, weights) + kept + scratch_bytes(dict(programs.prefill.static))


def default_kv_pages(
    spec: ModelSpec,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    page_size: int,
    replicas: int,
    available: int | None = None,
    weights: str = "",
) -> int:
    """KV pages per replica when nobody says: enough for every sequence at full length, or half the memory left.

    ``available`` is what ``available_bytes`` says by default. Raises ``ConfigError`` with both numbers if not even one
    sequence of ``max_model_len`` fits.
    """
    available = available_bytes() if available is None else available
    one = Limits(max_num_seqs, max_num_batched_tokens, max_model_len, page_size, -(-max_model_len // page_size))
    left = available // replicas - (replica_bytes(spec, one, weights) - one.num_pages * spec.page_bytes(page_size))
    fitting = int(left * _KV_SHARE) // spec.page_bytes(page_size)
    if fitting < one.num_pages:
        # Refuses with both numbers, unless the half was too cautious.
        check_memory(spec, one, replicas, available, weights)
    return min(max(fitting, one.num_pages), max_num_seqs * one.num_pages)


def check_memory(
    spec: ModelSpec, limits: Limits, replicas: int, available: int | None = None, weights: str = ""
) -> None:
    """Raise ``ConfigError`` with both numbers if ``replicas`` of these limits do not fit in ``available`` bytes."""
    available = available_bytes() if available is None else available
    needed = replicas * replica_bytes(spec, limits, weights)
    if needed > available:
        kept, pages = weights_bytes(spec, weights), limits.num_pages * spec.page_bytes(limits.page_size)
        raise ConfigError(
            f"{replicas} replica{'s' * (replicas > 1)} with {limits.num_pages} KV pages of {limits.page_size} tokens"
            f" need {_gib(needed)} of memory ({_gib(kept)} weights and {_gib(pages)} KV pages each);"
            f" {_gib(available)} is available: fewer pages, a shorter context or fewer replicas"
        )


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _reclaimable(path: Path) -> int:
    """Page cache the kernel gives back under pressure, charged to the group."""
    try:
        fields = (line.split() for line in path.read_text().splitlines())
        return sum(int(words[1]) for words in fields if words[0] in ("inactive_file", "total_inactive_file"))
    except OSError:
        return 0


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
