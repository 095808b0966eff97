"""``ModelSpec.from_directory``: real directories are understood, wrong ones refused in one sentence with both sides."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from chipbus.errors import CheckpointError
from chipbus.kernels.checkpoint import read_tensors
from chipbus.kernels.qwen3.model import ModelSpec


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a shape that a test may damage."""

    def make(shape: str = "tied") -> Path:
        return Path(shutil.copytree(checkpoint(shape), tmp_path / shape))

    return make


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; ``...`` removes one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(changes)
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, its data kept."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + length :])


def append(path: Path, name: str, shape: list[int]) -> None:
    """One more tensor of float32 zeros at the end of a safetensors file."""

    def add(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * math.prod(shape)]}

    edit_header(path, add)
    with path.open("ab") as file:
        file.write(bytes(4 * math.prod(shape)))


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    return change


def set_entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def test_a_plain_checkpoint_is_described(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.from_directory(checkpoint("tied"), "bfloat16")
    assert attrs.evolve(spec, path="", fingerprint="") == ModelSpec(
        path="",
        dtype="bfloat16",
        vocab_size=515,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        attention_bias=False,
        max_context=1024,
        eos_token_ids=(),
        fingerprint="",
    )
    attention, mlp, norms = 64 * 128 + 2 * 64 * 64 + 128 * 64, 3 * 64 * 128, 2 * 64 + 2 * 32
    assert spec.weights_bytes == 2 * (515 * 64 + 2 * (attention + mlp + norms) + 64)
    assert spec.page_bytes(16) == 2 * 2 * 2 * 32 * 16 * 2
    assert ModelSpec.from_directory(checkpoint("tied"), "float32").page_bytes(16) == 2 * spec.page_bytes(16)


def test_shards_bias_and_both_places_of_rope_theta_are_read(checkpoint: Callable[[str], Path]) -> None:
    sharded = checkpoint("untied-sharded-odd-vocabulary")
    assert not (sharded / "model.safetensors").exists()
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert ModelSpec.from_directory(sharded).vocab_size == 1021
    at_top = ModelSpec.from_directory(checkpoint("bias-no-groups"))
    assert (at_top.attention_bias, at_top.rope_theta) == (True, 1e6)
    assert ModelSpec.from_directory(checkpoint("wide-heads")).rope_theta == 1e4


def test_end_ids_come_from_generation_config_and_else_from_config(copy: Callable[[str], Path]) -> None:
    path = copy("wide-heads")
    assert ModelSpec.from_directory(path).eos_token_ids == (2, 7)
    edit(path / "config.json", eos_token_id=9)
    assert ModelSpec.from_directory(path).eos_token_ids == (2, 7)
    (path / "generation_config.json").unlink()
    assert ModelSpec.from_directory(path).eos_token_ids == (9,)


def test_head_dim_is_taken_from_the_tensors_if_config_is_silent(copy: Callable[[str], Path]) -> None:
    path = copy("wide-heads")
    edit(path / "config.json", head_dim=...)
    assert ModelSpec.from_directory(path).head_dim == 64


def test_a_tied_checkpoint_may_repeat_its_head_and_rotary_tables(copy: Callable[[str], Path]) -> None:
    path = copy("tied")
    append(path / "model.safetensors", "lm_head.weight", [515, 64])
    append(path / "model.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq", [16])
    assert ModelSpec.from_directory(path).tie_word_embeddings


def test_the_fingerprint_follows_content_and_not_place(copy: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy("tied")
    before = ModelSpec.from_directory(path).fingerprint
    moved = shutil.copytree(path, tmp_path / "moved")
    assert ModelSpec.from_directory(moved, "float32").fingerprint == before
    raw = bytearray((moved / "model.safetensors").read_bytes())
    raw[-1000:] = bytes(1000)
    (moved / "model.safetensors").write_bytes(raw)
    assert ModelSpec.from_directory(moved).fingerprint != before


CONFIG_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is not supported; supported is Qwen3For"),
    ({"architectures": ..., "model_type": "gpt2"}, "architecture gpt2 is not supported"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn' is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": ...}, "rope type 'linear' is not supported"),
    ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1; it must be a number above 0"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "weights quantized with 'fp8' are not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layers with 'sliding_attention' are not supported"),
    ({"layer_types": ..., "use_sliding_window": True, "sliding_window": 9}, "layers with 'sliding_attention' are not"),
    ({"layer_types": 3}, "layer_types is 3; it must be a list"),
    ({"num_hidden_layers": 10**9}, "lacks the tensor model.layers.2.input_layernorm.weight of shape [64]"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be an integer of at least 1"),
    ({"hidden_size": "64"}, "hidden_size is '64'; it must be an integer of at least 1"),
    ({"vocab_size": ...}, "vocab_size is None; it must be an integer"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads, 3"),
    ({"head_dim": 33}, "head_dim is 33; rotary embedding needs an even one"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
    ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight of shape [64]"),
    ({"num_hidden_layers": 1}, "model.layers.1."),
    ({"tie_word_embeddings": False}, "lacks the tensor lm_head.weight of shape [515, 64]"),
    ({"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.q_proj.bias of shape [128]"),
    ({"vocab_size": 516}, "tensor model.embed_tokens.weight has shape [515, 64]; config.json asks for [516, 64]"),
    ({"intermediate_size": 64}, "mlp.gate_proj.weight has shape [128, 64]; config.json asks for [64, 64]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), CONFIG_ERRORS, ids=[sentence[:40] for _, sentence in CONFIG_ERRORS])
def test_a_config_that_cannot_be_computed_is_refused(
    changes: dict[str, Any], sentence: str, copy: Callable[[str], Path]
) -> None:
    path = copy("tied")
    edit(path / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_directory(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


HEADER_ERRORS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (rename("model.norm.weight", "model.nrom.weight"), "lacks the tensor model.norm.weight of shape [64]"),
    (set_entry("model.norm.weight", dtype="F8_E4M3"), "model.norm.weight is stored as F8_E4M3; supported are BF16"),
    (set_entry("model.norm.weight", shape=[63]), "needs 252 bytes; the header gives it 256"),
    (set_entry("model.norm.weight", shape=[8, 8]), "has shape [8, 8]; config.json asks for [64]"),
    (lambda header: header.update(extra=dict(header["model.norm.weight"])), "overlaps the tensor before it"),
    (lambda header: header.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        "tensor extra of shape [0] is no part of"),
    (lambda header: header.pop("model.layers.0.mlp.up_proj.weight"), "leaves bytes before it that no tensor owns"),
    (set_entry("model.norm.weight", data_offsets=[10**9, 10**9 + 256]), "bytes long but its header describes 1000"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), HEADER_ERRORS, ids=[sentence[:40] for _, sentence in HEADER_ERRORS])
def test_a_file_with_wrong_tensors_is_refused(
    change: Callable[[dict[str, Any]], None], sentence: str, copy: Callable[[str], Path]
) -> None:
    path = copy("tied")
    edit_header(path / "model.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_directory(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.guarantee("K3")
def test_a_half_written_file_is_refused_with_both_sizes(copy: Callable[[str], Path]) -> None:
    file = copy("tied") / "model.safetensors"
    whole = file.stat().st_size
    for keep, sentence in (
        (whole - 1, f"is {whole - 1} bytes long but its header describes {whole}; the file is cut off"),
        (100, "is 100 bytes long and its header claims"),
        (3, "is 3 bytes long and its header claims"),
        (0, "is 0 bytes long and its header claims"),
    ):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=sentence):
            ModelSpec.from_directory(file.parent)


@pytest.mark.parametrize("header", [b"[]", b'{"', b"\xff\xfe{}", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_a_broken_header_is_refused(header: bytes, copy: Callable[[str], Path]) -> None:
    file = copy("tied") / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="broken header"):
        ModelSpec.from_directory(file.parent)


def test_missing_files_are_named(copy: Callable[[str], Path], tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            ModelSpec.from_directory(path)
        return str(caught.value)

    assert "is no directory" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused(empty)
    path = copy("tied")
    (path / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle file, which is never read" in refused(path)
    (path / "config.json").write_text('{"architectures"')
    assert "is not valid JSON" in refused(path)
    (path / "config.json").write_text("[]")
    assert "holds list; it must hold a JSON object" in refused(path)


def test_an_index_that_disagrees_with_its_shards_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("untied-sharded-odd-vocabulary")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))

    def refused() -> str:
        with pytest.raises(CheckpointError) as caught:
            ModelSpec.from_directory(path)
        return str(caught.value)

    edit(index, weight_map={**weight_map, "model.norm.weight": shards[0]})
    assert f"{shards[0]} lacks the tensor model.norm.weight" in refused()
    edit(index, weight_map={**weight_map, "model.norm.weight": "../model.safetensors"})
    assert "a shard is a file in the same directory" in refused()
    edit(index, weight_map=[])
    assert "has no weight_map" in refused()
    edit(index, weight_map=weight_map)
    (path / shards[-1]).unlink()
    assert f"lacks {shards[-1]}, which model.safetensors.index.json names" in refused()


@pytest.mark.guarantee("X5")
def test_a_tensor_is_in_the_one_shard_that_the_index_names(copy: Callable[[str], Path]) -> None:
    path = copy("untied-sharded-odd-vocabulary")
    whole = ModelSpec.from_directory(path)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    assert len(shards) > 2

    edit(index, weight_map={name: shard for name, shard in weight_map.items() if name != "model.norm.weight"})
    assert ModelSpec.from_directory(path) == whole, "as transformers, which reads whatever its shards hold"

    edit(index, weight_map={**weight_map, "model.phantom.weight": shards[0]})
    with pytest.raises(
        CheckpointError, match=rf"{shards[0]} lacks the tensor model.phantom.weight, which model.*index"
    ):
        ModelSpec.from_directory(path)

    edit(index, weight_map=weight_map)
    double = next(name for name, shard in weight_map.items() if shard == shards[1])
    append(path / shards[0], double, list(read_tensors(path)[double].shape))
    with pytest.raises(CheckpointError, match=rf"{shards[0]} and {shards[1]} both hold the tensor {double}"):
        ModelSpec.from_directory(path)


def test_wrong_end_ids_and_dtypes_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("tied")
    edit(path / "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(CheckpointError, match="eos_token_id is \\['</s>'\\]; it must be a token id or a list"):
        ModelSpec.from_directory(path)
    with pytest.raises(CheckpointError, match="dtype is 'float16'; supported are bfloat16, float32"):
        ModelSpec.from_directory(path, "float16")


@pytest.mark.guarantee("K4")
def test_describing_a_model_and_its_steps_loads_no_torch(checkpoint: Callable[[str], Path]) -> None:
    code = (
        "import sys; from chipbus.kernels import open_chip; from chipbus.kernels.qwen3.model import ModelSpec;"
        "from chipbus.kernels import graph, memory; from chipbus.kernels.qwen3 import graphs, step;"
        f"ModelSpec.from_directory({str(checkpoint('tied'))!r}); open_chip('null:0', 1);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
