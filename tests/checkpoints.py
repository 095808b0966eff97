"""Random-weight Qwen3 checkpoints in real Hugging Face format, small enough to be made inside a test session.

Made with ``transformers``, the independent reference, so that what the tests load is what a user would download.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

__all__ = ["tiny_checkpoint"]

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_checkpoint(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 515,
    context: int = 1024,
    tied: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    rope_theta: float = 1e6,
    rope_at_top: bool = False,
    eos: int | list[int] | None = None,
    shard_bytes: int | None = None,
    tokenizer: bool = True,
    seed: int = 0,
) -> Path:
    """Write a checkpoint to ``path`` and return it.

    Weights are drawn so large that layers outweigh the embedding: greedy texts wander instead of repeating one token.
    ``rope_at_top`` writes rope_theta where transformers 4 did; ``shard_bytes`` splits the weights into several files.
    The tokenizer is a byte-level BPE of ``vocab`` - 3 or fewer ids with Qwen's special tokens as ids 0, 1, 2.
    """
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:  # not all ones, so that a forgotten norm shows
                parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
    model.generation_config.eos_token_id = eos
    model.to(dtype).save_pretrained(path, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    if rope_at_top:
        written: dict[str, Any] = json.loads((path / "config.json").read_text())
        written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
        (path / "config.json").write_text(json.dumps(written))
    if tokenizer:
        _tokenizer(vocab).save_pretrained(path)
    return path


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    text = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    trained.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT
    return fast
