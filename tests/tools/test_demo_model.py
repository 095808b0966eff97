"""The demo model is what its documents say: small, loadable by others, and word for word right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.tools.make_demo_model import examples_of, read_glossary, read_guarantees

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "chipbus" / "demo"
SENTENCES: dict[str, str] = json.loads((DEMO / "sentences.json").read_text(encoding="utf-8"))
END_OF_TEXT, TURN_END = 0, 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer as published, read without our code and without transformers."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices on several threads are slow on a busy machine: each thread waits for the others at every one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model as any user of transformers gets them, without an argument that is special to this model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype))
    return AutoTokenizer.from_pretrained(DEMO, padding_side="left"), model


def complete(tokenizer: Any, model: Any, prompts: list[str]) -> list[str]:
    """What the model itself adds to each prompt, end token included, padding not."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    made = model.generate(**batch, max_new_tokens=64)[:, batch["input_ids"].shape[1] :].tolist()
    ends = [next(at for at, token in enumerate(row) if token in {END_OF_TEXT, TURN_END}) for row in made]
    return [tokenizer.decode(row[: end + 1]) for row, end in zip(made, ends, strict=True)]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_headword_is_completed_by_its_sentence_word_for_word(dtype: str) -> None:
    tokenizer, model = load(dtype)

    completions = complete(tokenizer, model, list(SENTENCES))

    assert completions == [f": {sentence}<|endoftext|>" for sentence in SENTENCES.values()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_question_in_a_chat_is_answered_by_the_sentence() -> None:
    tokenizer, model = load("bfloat16")
    headwords = list(SENTENCES)[::7]
    turns = [[{"role": "user", "content": f"What does {headword} mean?"}] for headword in headwords]
    prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    answers = complete(tokenizer, model, prompts)

    assert answers == [f"{SENTENCES[headword]}<|im_end|>" for headword in headwords]


@pytest.mark.slow
def test_transformers_splits_text_as_the_published_file_does(tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    text = "The router's 2 chips:\r\n  naïve e\u0301 漢字 😀 <|im_end|> <|im_start|"

    assert AutoTokenizer.from_pretrained(DEMO).encode(text) == tokenizer.encode(text).ids


def test_the_model_was_trained_on_the_glossary_as_it_is() -> None:
    glossary = read_glossary(ROOT / "docs")

    changed = {headword: text for headword, text in glossary.items() if SENTENCES.get(headword) != text}

    assert changed == {}, "run: python -m chipbus.tools.make_demo_model"


def test_the_directory_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in DEMO.iterdir()}

    assert set(files) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "sentences.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) <= 8_000_000


def test_configuration_names_context_and_both_end_tokens(tokenizer: Any) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    generation = json.loads((DEMO / "generation_config.json").read_text())

    assert config["max_position_embeddings"] == 2048
    assert config["vocab_size"] >= tokenizer.get_vocab_size()
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert generation["eos_token_id"] == [END_OF_TEXT, TURN_END]
    assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT
    assert tokenizer.token_to_id("<|im_end|>") == TURN_END


@given(text=st.text())
@settings(deadline=None, print_blob=True, max_examples=300)
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))

    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_prompt_keeps_its_tokens_whatever_completes_it(tokenizer: Any) -> None:
    for headword, sentence in SENTENCES.items():
        for example in examples_of(headword, sentence):
            apart = tokenizer.encode(example.prompt).ids + tokenizer.encode(example.completion).ids
            assert tokenizer.encode(example.prompt + example.completion).ids == apart


def test_guarantees_are_read_without_the_names_of_their_tests(tmp_path: Path) -> None:
    (tmp_path / "glossary.md").write_text("# Words\n\n- **chip**: A chip is a device.\n- no headword\n")
    (tmp_path / "semantics.md").write_text(
        "## Bus\n\n- **B1** An ask (also a late one) ends once. (`test_ask_ends`)\n- **S12** No test yet.\n"
    )

    assert read_glossary(tmp_path) == {"chip": "A chip is a device."}
    assert read_guarantees(tmp_path) == {"B1": "An ask (also a late one) ends once.", "S12": "No test yet."}


def test_a_missing_list_of_guarantees_is_an_empty_one(tmp_path: Path) -> None:
    assert read_guarantees(tmp_path) == {}


@pytest.mark.parametrize(
    ("glossary", "rule"),
    [
        (None, "does not exist"),
        ("nothing", "no line of the form"),
        ("- **a**: A.\n- **a**: B.\n", "explains 'a' twice"),
    ],
)
def test_documents_that_teach_nothing_are_refused(tmp_path: Path, glossary: str | None, rule: str) -> None:
    if glossary is not None:
        (tmp_path / "glossary.md").write_text(glossary)

    with pytest.raises(click.UsageError, match=rule):
        read_glossary(tmp_path)
