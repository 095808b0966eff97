"""What a Qwen3 checkpoint is: its shape, its tensors and its memory, read and checked without torch.

Owns nothing: a ``ModelSpec`` is a value. Field names on the left of each check are those of Hugging Face's config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from ...errors import CheckpointError
from ..checkpoint import StoredTensor, read_json, read_tensors
from ..program import DTYPE_BYTES, nbytes

__all__ = ["ModelSpec"]

_ARCHITECTURE = "Qwen3ForCausalLM"
_DTYPES = ("bfloat16", "float32")
_SAMPLE_BYTES = 256  # per tensor, hashed into the fingerprint


@attrs.frozen(kw_only=True)
class ModelSpec:
    """A dense Qwen3 model in a directory, to be computed in ``dtype``. Make it with ``from_directory``."""

    path: str
    """Absolute directory."""
    dtype: str
    """What weights, activations and KV cache are computed and kept in: "bfloat16" or "float32"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool
    max_context: int
    """Positions the model was made for, in tokens."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a text: generation_config.json's, else config.json's; empty if neither names any."""
    fingerprint: str
    """Hex digest of configuration, tensor headers and a sample of each tensor's bytes; the same in any directory."""

    @classmethod
    def from_directory(cls, path: str | Path, dtype: str = "bfloat16") -> ModelSpec:
        """Read and check a Hugging Face directory: config.json, generation_config.json, safetensors headers.

        Raises ``CheckpointError`` with one sentence naming the file, field or tensor, what was found and what is
        expected. Reads no weights beyond a few bytes of each, so it takes milliseconds.
        """
        directory = Path(path).absolute()
        if dtype not in _DTYPES:
            raise CheckpointError(f"dtype is {dtype!r}; supported are {', '.join(_DTYPES)}")
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is no directory; a model is a Hugging Face directory")
        if not (directory / "config.json").exists():
            raise CheckpointError(f"{directory} has no config.json; a model is a Hugging Face directory")
        config = read_json(directory / "config.json")
        where = directory / "config.json"
        _refuse_unsupported(config, where)
        stored = read_tensors(directory)
        heads = _count(config, "num_attention_heads", where)
        spec = cls(
            path=str(directory),
            dtype=dtype,
            vocab_size=_count(config, "vocab_size", where),
            hidden_size=_count(config, "hidden_size", where),
            intermediate_size=_count(config, "intermediate_size", where),
            num_layers=_count(config, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=_count(config, "num_key_value_heads", where, default=heads),
            head_dim=_count(config, "head_dim", where, default=_stored_head_dim(config, stored, heads, where)),
            rms_norm_eps=_positive(config, "rms_norm_eps", where, default=1e-6),
            rope_theta=_rope_theta(config, where),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            max_context=_count(config, "max_position_embeddings", where),
            eos_token_ids=_eos_token_ids(config, directory),
            fingerprint="",
        )
        if spec.num_heads % spec.num_kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads is {spec.num_heads}; it must be a multiple of num_key_value_heads,"
                f" {spec.num_kv_heads}"
            )
        if spec.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim is {spec.head_dim}; rotary embedding needs an even one")
        spec._check_tensors(stored)
        return attrs.evolve(spec, fingerprint=spec._fingerprint(stored))

    @property
    def weights_bytes(self) -> int:
        """Memory all weights take on a chip, in ``dtype``; a tied embedding counts once."""
        return sum(nbytes(self.dtype, shape) for _, shape in self.tensor_shapes())

    def page_bytes(self, page_size: int) -> int:
        """Memory one KV page of ``page_size`` tokens takes: keys and values of every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * page_size * DTYPE_BYTES[self.dtype]

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor the model needs, in the order the layers use them."""
        hidden, heads, kv_heads = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            for name, rows, columns in (
                ("q_proj", heads, hidden),
                ("k_proj", kv_heads, hidden),
                ("v_proj", kv_heads, hidden),
                ("o_proj", hidden, heads),
            ):
                yield f"{prefix}self_attn.{name}.weight", (rows, columns)
                if self.attention_bias:
                    yield f"{prefix}self_attn.{name}.bias", (rows,)
            yield prefix + "self_attn.q_norm.weight", (self.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (self.head_dim,)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate_size, hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate_size, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, self.intermediate_size)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of every matrix of a linear, in the order the programs use them: those that ``weights`` is about.

        Queries, keys and values are one matrix. The head is the last, also where it is the embedding's table.
        """
        hidden, inner, heads = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        mixed = heads + 2 * self.num_kv_heads * self.head_dim
        layer = [(mixed, hidden), (hidden, heads), (inner, hidden), (inner, hidden), (hidden, inner)]
        return self.num_layers * layer + [(self.vocab_size, hidden)]

    def _check_tensors(self, stored: Mapping[str, StoredTensor]) -> None:
        needed = set()
        for name, shape in self.tensor_shapes():
            needed.add(name)
            if name not in stored:
                raise CheckpointError(f"{self.path} lacks the tensor {name} of shape {list(shape)}")
            if stored[name].shape != shape:
                raise CheckpointError(
                    f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)};"
                    f" config.json asks for {list(shape)}"
                )
        for name, tensor in stored.items():
            # Published tied checkpoints repeat the head (Qwen3-0.6B does), old ones store the rotary table: unused.
            is_harmless = name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
            if name not in needed and not is_harmless:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} of shape {list(tensor.shape)} is no part of a {_ARCHITECTURE} with"
                    f" {self.num_layers} layers, attention_bias={self.attention_bias}"
                )

    def _fingerprint(self, stored: Mapping[str, StoredTensor]) -> str:
        digest = hashlib.sha256()
        fields = {field.name: getattr(self, field.name) for field in attrs.fields(ModelSpec)}
        for machine_bound in ("path", "dtype", "fingerprint"):
            del fields[machine_bound]
        digest.update(json.dumps(fields, sort_keys=True).encode())
        for name in sorted(stored):
            tensor = stored[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            # From the middle: a fine-tune that keeps names and shapes still gets another fingerprint.
            with tensor.file.open("rb") as file:
                file.seek(tensor.begin + (tensor.end - tensor.begin) // 2)
                digest.update(file.read(min(_SAMPLE_BYTES, tensor.end - file.tell())))
        return digest.hexdigest()


def _refuse_unsupported(config: Mapping[str, Any], where: Path) -> None:
    """Everything a checkpoint may ask for that these programs do not compute, by name."""
    names = config.get("architectures") or [config.get("model_type", "of no stated architecture")]
    if names not in ([_ARCHITECTURE], ["qwen3"]):
        raise CheckpointError(
            f"{where}: architecture {', '.join(map(str, names))} is not supported; supported is {_ARCHITECTURE}"
        )
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(f"{where}: weights quantized with {method!r} are not supported; use the bf16 checkpoint")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {config['hidden_act']!r}; supported is 'silu'")
    windowed = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise CheckpointError(f"{where}: layer_types is {layer_types!r}; it must be a list")
    if set(layer_types) - {"full_attention"} or (windowed and not layer_types):
        kind = next((kind for kind in layer_types if kind != "full_attention"), "sliding_attention")
        raise CheckpointError(f"{where}: layers with {kind!r} are not supported; supported is 'full_attention'")


def _count(config: Mapping[str, Any], name: str, where: Path, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {name} is {value!r}; it must be an integer of at least 1")
    return value


def _positive(config: Mapping[str, Any], name: str, where: Path, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{where}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _stored_head_dim(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], heads: int, where: Path
) -> int | None:
    """Head dim of a config that does not state it: the tensors know; transformers would assume 128."""
    if config.get("head_dim") is not None:
        return None
    norm = stored.get("model.layers.0.self_attn.q_norm.weight")
    return norm.shape[0] if norm and len(norm.shape) == 1 else _count(config, "hidden_size", where) // heads


def _rope_theta(config: Mapping[str, Any], where: Path) -> float:
    """Base of the rotary embedding: under rope_parameters (transformers 5), in rope_scaling, or at the top level."""
    nested: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters"):
        found = config.get(place) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{where}: {place} is {found!r}; it must be an object")
        nested |= found
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported; supported is 'default'")
    partial = nested.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor is {partial!r}; supported is 1.0")
    return _positive({**config, **nested}, "rope_theta", where, default=10000.0)


def _eos_token_ids(config: Mapping[str, Any], directory: Path) -> tuple[int, ...]:
    where = directory / "generation_config.json"
    found = read_json(where).get("eos_token_id") if where.exists() else None
    if found is None:
        where, found = directory / "config.json", config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{where}: eos_token_id is {found!r}; it must be a token id or a list of them")
    return tuple(ids)
