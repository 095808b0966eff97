"""Model directories with small tokenizers, made on the spot: byte-level as Qwen's, and byte-fallback as Llama's."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}\n"
    "{%- if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message.role) }}{% endif %}\n"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "naïve café — über Straße; e\u0301 is an e with a combining mark",
    "日本語のテキスト 한국어 עברית العربية",
    "👩\u200d👩\u200d👧 🇩🇪 👍🏽 🤖",
)


def byte_level_directory(directory: Path) -> Path:
    """Byte-level BPE with few merges, so that most characters outside ASCII are spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("two words", special=False)])
    return _save(tokenizer, directory)


def byte_fallback_directory(directory: Path) -> Path:
    """Whole words with a leading ``▁``, and one token per byte for everything else; the first space is dropped."""
    words = {f"▁{word}": 300 + i for i, word in enumerate(("the", "quick", "brown", "fox", "café"))}
    pieces = {token: i for i, token in enumerate((*SPECIAL, "<unk>"))} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    letters = {letter: 400 + i for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz.!?\n")}
    tokenizer = Tokenizer(
        models.Unigram([(t, -1.0) for t in [*pieces, *words, *letters]], unk_id=3, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return _save(tokenizer, directory)


def _save(tokenizer: Tokenizer, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[2], "pad_token": {"content": SPECIAL[0]}, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
