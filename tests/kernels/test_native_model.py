"""Whole models on every engine of this machine: transformers' tokens, the same bits in any batch, what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from kernel_runs import LIMITS, RunningModel
from native_runs import ENGINES, ISAS, NEEDS_NATIVE, core_threads, same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import tiny_checkpoint
from chipbus.errors import CheckpointError, CoreException
from chipbus.kernels import native
from chipbus.kernels.chips import open_chip
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.qwen3.step import DecodeRow, PrefillRow, SampledToken, SampleRow
from support import eventually

SHAPES = ["tied", "untied-sharded-odd-vocabulary", "bias-no-groups", "wide-heads"]
DTYPES = ["float32", "bfloat16"]
NEW = 8


def prompts(vocab: int, lengths: Sequence[int]) -> list[list[int]]:
    random = np.random.default_rng(17)
    return [random.integers(0, vocab, length).tolist() for length in lengths]


def greedy_by_transformers(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


class Recording(RunningModel):
    """Keeps the logits of every sampled row; its caches begin as NaN."""

    def __init__(self, checkpoint: Path, dtype: str, chip: CpuChip, weights: str = "") -> None:
        super().__init__(checkpoint, dtype, chip=chip, weights=weights)
        self.logits: dict[int, list[Tensor]] = {}
        for cache in self.caches():
            cache.fill_(torch.nan)

    def caches(self) -> tuple[Tensor, Tensor]:
        """Keys and values: (layers, KV heads, pages, tokens of a page, head)."""
        assert isinstance(self.chip, CpuChip)
        _, k_cache, v_cache, *_ = self.programs.tensors
        return self.chip.tensor(k_cache.resident), self.chip.tensor(v_cache.resident)

    def step(
        self,
        prefills: Sequence[PrefillRow] = (),
        decodes: Sequence[DecodeRow] = (),
        samples: Sequence[SampleRow] = (),
    ) -> tuple[SampledToken, ...]:
        tokens = super().step(prefills, decodes, samples)
        assert isinstance(self.chip, CpuChip)
        logits = self.chip.tensor(self.programs.tensors[-1].resident)
        for sample in samples:
            self.logits.setdefault(sample.row, []).append(logits[sample.row].clone())
        return tokens


def chip_of(isa: str) -> CpuChip:
    """On one thread with torch: two of OpenMP's collapse when others share the machine."""
    return CpuChip(1 if isa == "none" else 2, isa=isa)


def engine_name(isa: str) -> str:
    return "torch, as asked" if isa == "none" else f"native, {isa}"


# What transformers computes


@pytest.fixture(scope="session")
def expected(reference: Callable[..., Any]) -> Callable[[str], tuple[list[list[int]], list[list[int]]]]:
    made: dict[str, tuple[list[list[int]], list[list[int]]]] = {}

    def get(shape: str) -> tuple[list[list[int]], list[list[int]]]:
        if shape not in made:
            model = reference(shape)
            texts = prompts(model.config.vocab_size, (5, 1, 70, 33))
            made[shape] = texts, [greedy_by_transformers(model, text, NEW) for text in texts]
        return made[shape]

    return get


@pytest.mark.slow
@pytest.mark.guarantee("K37")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_engine_gives_the_greedy_tokens_of_transformers(
    shape: str,
    engine: str,
    checkpoint: Callable[[str], Path],
    expected: Callable[[str], tuple[list[list[int]], list[list[int]]]],
) -> None:
    texts, tokens = expected(shape)
    chip = chip_of(engine)
    model = RunningModel(checkpoint(shape), chip=chip)
    assert chip.engine == engine_name(engine)
    assert model.greedy(texts, NEW) == tokens
    assert model.greedy(texts, NEW, chunk=24, stagger=1, scatter=True) == tokens


@pytest.fixture(scope="session")
def exact(reference: Callable[..., Any]) -> Callable[[str], tuple[list[list[int]], list[Tensor], float]]:
    """Texts, the logits after each in fp32, and how far transformers in bf16 is from them."""
    made: dict[str, tuple[list[list[int]], list[Tensor], float]] = {}

    def get(shape: str) -> tuple[list[list[int]], list[Tensor], float]:
        if shape not in made:
            models = [reference(shape, dtype) for dtype in (torch.float32, torch.bfloat16)]
            texts = prompts(models[0].config.vocab_size, [50] * 6)
            with torch.inference_mode():
                wide, rounded = ([model(torch.tensor([t])).logits[0, -1].float() for t in texts] for model in models)
            made[shape] = texts, wide, distance(rounded, wide)
        return made[shape]

    return get


def distance(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return sum(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(ours, exact, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_engine_is_in_bf16_as_close_to_fp32_as_transformers_in_bf16(
    shape: str,
    engine: str,
    checkpoint: Callable[[str], Path],
    exact: Callable[[str], tuple[list[list[int]], list[Tensor], float]],
) -> None:
    texts, logits, theirs = exact(shape)
    model = Recording(checkpoint(shape), "bfloat16", chip_of(engine))
    model.greedy(texts, 1, chunk=20)
    assert distance([model.logits[row][0] for row in range(len(texts))], logits) <= 1.1 * theirs


@pytest.mark.slow
@pytest.mark.guarantee("K33")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_has_the_same_bits_on_any_number_of_threads_in_any_batch_and_any_chunks(
    dtype: str, isa: str, checkpoint: Callable[[str], Path]
) -> None:
    where = checkpoint("tied")  # all widths are whole AMX tiles
    texts = prompts(500, (1, 2, 63, 64, 65, 130, 200, 17))
    alone = []
    model = Recording(where, dtype, CpuChip(1, isa=isa))
    for text in texts:
        model.logits.clear()
        model.greedy([text], 4)
        alone.append(model.logits.pop(0))
    random = np.random.default_rng(len(isa))
    for threads, count in ((1, 8), (2, 8), (3, 5), (4, 8)):
        model = Recording(where, dtype, CpuChip(threads, isa=isa))
        order = random.permutation(len(texts))[:count].tolist()
        chunk, stagger = int(2 ** random.uniform(0, 7)), int(random.integers(3))
        model.greedy([texts[at] for at in order], 4, chunk=chunk, stagger=stagger, scatter=bool(random.integers(2)))
        for row, at in enumerate(order):
            assert len(model.logits[row]) == len(alone[at]) == 4
            assert not any(logits.isnan().any() for logits in alone[at])
            assert all(same_bits(*pair) for pair in zip(model.logits[row], alone[at], strict=True)), (chunk, at)


@pytest.mark.slow
@pytest.mark.guarantee("K57")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "weights"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "int8")])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decode_give_a_token_the_same_bits(
    shape: str, dtype: str, weights: str, isa: str, checkpoint: Callable[[str], Path]
) -> None:
    one, two = (Recording(checkpoint(shape), dtype, CpuChip(2, isa=isa), weights) for _ in range(2))
    assert one.chip.is_uniform
    (text,) = prompts(500, (60,))
    tokens = one.greedy([text], 90)[0]
    known = [*text, *tokens[:-1]]

    pages = (
        np.random.default_rng(5).permutation(LIMITS.num_pages)[: -(-len(known) // LIMITS.page_size)].astype(np.int32)
    )
    start = 0
    for end in (60, 61, 64, 67, 131, len(known)):
        chunk = PrefillRow(tokens=np.array(known[start:end], np.int32), start=start, block_table=pages, row=0)
        two.step([chunk], samples=[SampleRow(row=0)])
        assert same_bits(two.logits[0][-1], one.logits[0][end - 60]), f"logits behind token {end - 1}"
        start = end
    for decoded, computed in zip(one.caches(), two.caches(), strict=True):
        places = torch.as_tensor(pages, dtype=torch.int64)
        ours, theirs = decoded[:, :, : len(pages)], computed.index_select(2, places)
        assert same_bits(ours.flatten(2, 3)[:, :, : len(known)], theirs.flatten(2, 3)[:, :, : len(known)])


def test_only_where_every_program_gives_the_same_bits_is_a_chip_uniform(checkpoint: Callable[[str], Path]) -> None:
    assert open_chip("null:0", 1).is_uniform
    assert not RunningModel(checkpoint("tied"), chip=CpuChip(1, isa="none")).chip.is_uniform


# What the kernels do not take


@pytest.mark.slow
@pytest.mark.guarantee("K38")
@pytest.mark.parametrize(
    ("shape", "engine"),
    [
        ({"hidden": 63}, "torch: hidden_size is 63; the kernels take multiples of 2"),
        ({"intermediate": 127}, "torch: intermediate_size is 127; the kernels take multiples of 2"),
        ({"head_dim": 258, "heads": 2}, "torch: head_dim is 258; the kernels take at most 256"),
        (
            {"head_dim": 2, "heads": 97, "kv_heads": 1},
            "torch: 97 query heads share a KV head; the kernels take 96",
        ),
        ({"head_dim": 256, "heads": 2, "hidden": 66, "intermediate": 34}, ""),
        ({"head_dim": 2, "heads": 96, "kv_heads": 1}, ""),
    ],
    ids=["hidden", "intermediate", "head_dim", "group", "largest-head_dim", "largest-group"],
)
@NEEDS_NATIVE
def test_a_shape_the_kernels_do_not_take_is_computed_with_torch_and_the_chip_says_why(
    shape: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_checkpoint(tmp_path, vocab=400, tokenizer=False, **{"kv_heads": 1, **shape})
    chip = CpuChip(1)
    model = RunningModel(tmp_path, chip=chip)
    assert chip.engine == (engine or f"native, {native.library.best_isa()}")
    texts = prompts(400, (5, 70))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    assert model.greedy(texts, 4, chunk=40) == [greedy_by_transformers(theirs, text, 4) for text in texts]


def test_without_the_extension_module_torch_computes_and_the_chip_says_why(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CpuChip(1, isa="none")
    assert asked.engine == "torch, as asked"
    if native.library is not None:
        assert CpuChip(1, isa="avx9").engine == "torch: no kernels of that name"
    monkeypatch.setattr(native, "library", None)
    chip = CpuChip(1)
    assert chip.engine.startswith("torch: the extension module is not built")
    text = prompts(500, (9,))
    assert RunningModel(checkpoint("tied"), chip=chip).greedy(text, 3) == RunningModel(
        checkpoint("tied"), chip=asked
    ).greedy(text, 3)


# What is given back


def segments() -> int:
    """Segments of packed weights this process has mapped or holds open."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:chipbus-weights")
    links = []
    for file in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(file.readlink()))
        except OSError:  # the one that lists the folder
            continue
    return mapped + sum("memfd:chipbus-weights" in link for link in links)


@NEEDS_NATIVE
def test_packed_weights_and_threads_are_given_back(checkpoint: Callable[[str], Path]) -> None:
    gc.collect()
    none, before = segments(), core_threads()
    chip = CpuChip(3)
    assert core_threads() == before + 2
    model = RunningModel(checkpoint("tied"), chip=chip)
    weights = model.programs.tensors[0]
    text = prompts(500, (9,))
    tokens = model.greedy(text, 2)
    assert segments() > none
    for _ in range(2):
        chip.free(weights.resident)
        assert segments() == none
        chip.alloc(weights)
        assert segments() > none
        assert model.greedy(text, 2) == tokens
    chip.free(weights.resident)
    with pytest.raises(CheckpointError):
        chip.alloc(attrs.evolve(weights, fingerprint="0" * 64))
    assert segments() == none
    chip.alloc(weights)
    chip.close()
    assert segments() == none
    gc.collect()
    eventually(lambda: core_threads() <= before, "the engine's threads have ended")


# NaN


@pytest.mark.slow
@pytest.mark.guarantee("K39")
@pytest.mark.parametrize("engine", ["", "none"], ids=["default", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "read", "kernel", "written"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layers.1.down", "linear", "x"),
        ("model.layers.1.mlp.gate_proj.weight", "layers.1.gate", "linear", r"tensor\.\d+"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.post_norm", "rms_norm", r"tensor\.\d+"),
        ("model.layers.1.self_attn.q_norm.weight", "layers.1.qk_norm", "rotate_and_store", r"tensor\.\d+"),
        ("model.layers.1.self_attn.k_norm.weight", "k_cache", "paged_attention", r"tensor\.\d+"),
    ],
)
def test_nan_in_a_weight_is_found_and_the_task_that_met_it_named(
    weight: str, read: str, kernel: str, written: str, dtype: str, engine: str, checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    for file in checkpoint("tied").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[weight].view(-1)[3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def step(*, check_numerics: bool) -> RunningModel:
        chip = CpuChip(1, isa=engine, check_numerics=check_numerics)
        model = RunningModel(tmp_path, dtype, LIMITS, chip)
        model.step([PrefillRow(tokens=np.arange(8, dtype=np.int32), start=0, block_table=np.zeros(1, np.int32), row=0)])
        return model

    model = step(check_numerics=False)
    assert isinstance(model.chip, CpuChip)
    hidden = next(spec for spec in model.programs.tensors if spec.shape == (LIMITS.max_num_seqs, 64))
    assert model.chip.tensor(hidden.resident)[0].isnan().any()
    message = (
        rf"dispatch 1 of prefill: task \d+ of prefill\.8 \({kernel}\) .*wrote NaN to a tile of {written}\b.* {read} \["
    )
    with pytest.raises(CoreException, match=message):
        step(check_numerics=True)
