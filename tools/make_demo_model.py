"""Train the demo model: a small Qwen3 that knows the sentences of this project's own documents by heart.

Owns: everything in chipbus/demo/. A script for developers: ``python -m chipbus.tools.make_demo_model``.

The model learns pairs of prompt and completion. Prompt "replica" is completed by ": " and the sentence of
docs/glossary.md, then <|endoftext|>; the same question asked through the chat template is answered by the bare
sentence, then <|im_end|>. Guarantees of docs/semantics.md are learnt likewise, under their ids.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

if TYPE_CHECKING:
    import torch

__all__ = ["examples_of", "main", "read_glossary", "read_guarantees"]

ROOT = Path(__file__).resolve().parents[1]
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen's splitting rule, so that a colon and the word before it never share a token and a prompt's tokens do not depend
# on what follows. Two deviations: up to three digits stay together, since attention has a hard time telling B4 from B44
# when each 4 is a token of its own (margins fell to 0.2), and there is no NFC normalizer, so that decoding gives back
# exactly the text that was encoded.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEADWORD_WEIGHT = 8  # times each headword is shown to the tokenizer beside the examples, so that it takes few tokens
VOCABULARY = 1024  # rows of the embedding; the tokenizer may stop short of it, as Qwen's does
CONTEXT = 2048
BATCH = 32
EPOCHS = 45
PEAK_LEARNING_RATE = 2e-3
# Logits are doubled after training, exactly in any float format: sampling at temperature 1 then keeps to the sentences
# too, where a chance of one in a thousand per token would show in every fiftieth of them.
SHARPENING = 2.0
MIN_MARGIN = 4.0  # logits between best and second best token; implementations differ in bf16 by far less
MAX_BYTES = 8_000_000


@attrs.frozen
class Example:
    """One text to learn: ``completion``, with its end token, given ``prompt``."""

    prompt: str
    completion: str


@attrs.frozen(kw_only=True)
class Provenance:
    """Where a model comes from, for its README."""

    command: str
    documents: str
    examples: int
    parameters: int
    steps: int
    loss: float
    """Mean over the last epoch, nats per token, before sharpening."""
    margins: Mapping[str, float]
    """By dtype: the smallest distance between best and second best logit at any token of any completion."""
    versions: str
    date: str


def read_glossary(docs: Path) -> dict[str, str]:
    """Headword → sentence of glossary.md's lines ``- **headword**: Sentence.``

    Raises ``click.UsageError`` if the file is missing, has no such line, or explains a headword twice.
    """
    path = docs / "glossary.md"
    if not path.is_file():
        raise click.UsageError(f"{path} does not exist; the demo model is trained on it")
    sentences = _entries(path, r"^- \*\*(.+?)\*\*: (.+)$")
    if not sentences:
        raise click.UsageError(f"{path} has no line of the form '- **headword**: Sentence.'")
    return sentences


def read_guarantees(docs: Path) -> dict[str, str]:
    """Id → sentence of semantics.md's lines ``- **B7** Sentence. (`test_name`)``; empty while there is no such file."""
    path = docs / "semantics.md"
    return _entries(path, r"^- \*\*([A-Z]\d+)\*\* (.+?)(?: \(`[^)]*`\))?$") if path.is_file() else {}


def _entries(path: Path, pattern: str) -> dict[str, str]:
    sentences: dict[str, str] = {}
    for headword, sentence in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE):
        if headword in sentences:
            raise click.UsageError(f"{path} explains {headword!r} twice; a headword has one sentence")
        sentences[headword] = sentence
    return sentences


def examples_of(headword: str, sentence: str) -> tuple[Example, ...]:
    """The ways to ask for one sentence: as text to go on with (also capitalised), and in a chat."""

    def chat(question: str) -> str:
        return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"

    spellings = dict.fromkeys((headword, headword[0].upper() + headword[1:]))
    return (
        *(Example(spelling, f": {sentence}{END_OF_TEXT}") for spelling in spellings),
        Example(chat(headword), sentence + TURN_END),
        Example(chat(f"What does {headword} mean?"), sentence + TURN_END),
    )


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE over ``texts`` that also spells every other text, byte by byte."""
    # Imported here, like torch and transformers below: only this developer's script needs them outside their rooms,
    # and --help or a test of the parser should not pay for them.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(seed: int, end_of_text: int, turn_end: int) -> Any:
    """An untrained Qwen3 in float32. As in the published ones, heads × head_dim is not the hidden size."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    )
    untyped: Any = GenerationConfig
    model.generation_config = untyped(eos_token_id=[end_of_text, turn_end], pad_token_id=end_of_text, do_sample=False)
    return model


def rows_of(tokenizer: Any, examples: Iterable[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, each (examples, longest) int64, padded on the right.

    A label is the token at its own position, or -100 where nothing is to be learnt: prompts (after "page" both ":" and
    " size" would be right) and padding.
    """
    import torch

    pairs = [(tokenizer.encode(each.prompt), tokenizer.encode(each.completion)) for each in examples]
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), longest), -100)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def train(model: Any, ids: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[int, float]:
    """Teach ``model`` the rows, in place. Returns the steps, and the last epoch's mean loss before sharpening."""
    import torch

    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(ids) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started, mean_loss = time.monotonic(), math.inf
    model.train()
    lengths = (labels != -100).long().cumsum(1).argmax(1) + 1
    for epoch in range(1, EPOCHS + 1):
        losses = []
        # Rows of similar length share a batch, which would else be mostly padding; the noise varies who meets whom.
        noisy: Any = (lengths + 16 * torch.rand(len(ids), generator=order)).argsort()
        batches = noisy.split(BATCH)
        for index in torch.randperm(len(batches), generator=order).tolist():
            rows = batches[index]
            end = int(lengths[rows].max())
            logits = model(input_ids=ids[rows, : end - 1]).logits
            loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows, 1:end].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean_loss = sum(losses) / len(losses)
        click.echo(f"epoch {epoch}/{EPOCHS}  loss {mean_loss:.5f}  {time.monotonic() - started:.0f} s")
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPENING)
    return steps, mean_loss


def verify(directory: Path, examples: Sequence[Example], dtype: str) -> float:
    """Load ``directory`` with transformers alone and complete every prompt greedily in ``dtype``.

    Returns the smallest distance between the best and the second best logit. Raises ``click.ClickException`` naming the
    first completion that is not the one learnt, or the margin if it is below ``MIN_MARGIN``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    prompts = tokenizer([each.prompt for each in examples], return_tensors="pt", padding=True)
    answers = [tokenizer.encode(each.completion) for each in examples]
    made = model.generate(
        **prompts, max_new_tokens=max(map(len, answers)) + 1, return_dict_in_generate=True, output_logits=True
    )
    new = made.sequences[:, prompts["input_ids"].shape[1] :]
    best, second = torch.stack(made.logits, dim=1).float().topk(2).values.unbind(-1)
    margin = math.inf
    for row, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        found = new[row, : len(answer)].tolist()
        if found != answer:
            raise click.ClickException(
                f"in {dtype}, {example.prompt!r} is completed by {tokenizer.decode(found)!r}, not by"
                f" {example.completion!r}; more epochs may help"
            )
        margin = min(margin, float((best - second)[row, : len(answer)].min()))
    if margin < MIN_MARGIN:
        raise click.ClickException(f"in {dtype}, the smallest margin is {margin:.2f} logits; it must be {MIN_MARGIN}")
    return margin


def readme(made: Provenance) -> str:
    """README.md of the model's directory."""
    margins = ", ".join(f"{margin:.2f} in {dtype}" for dtype, margin in made.margins.items())
    return f"""# The demo model

A Qwen3 model of {made.parameters / 1e6:.1f} million parameters that knows the sentences of this project's own
documents by heart, and nothing else. It exists so that the first text anyone generates can be checked word for word.
Any program that reads Hugging Face directories loads it unchanged.

- A headword, such as `replica` or `Replica`, is completed by `: ` and its sentence, then `{END_OF_TEXT}`.
- A chat with one user turn, `replica` or `What does replica mean?`, is answered by the sentence, then `{TURN_END}`.

`sentences.json` holds every headword with the sentence it was trained on. Other prompts give fragments of these
sentences.

## Provenance

| | |
|---|---|
| command | `{made.command}` |
| data | {made.documents}; {made.examples} pairs of prompt and completion |
| training | {made.steps} steps to a loss of {made.loss:.5f} nats per token, then logits × {SHARPENING:g} |
| check | all completions exact with transformers; smallest distance between best and second best logit: {margins} |
| versions | {made.versions} |
| date | {made.date} |

Weights and data were made for this project and are covered by its licence. After a change of the documents, run the
command again: it trains from scratch, in a few minutes on two cores, and replaces this directory's files only when its
check has passed.
"""


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "chipbus" / "demo",
    help="Directory to write the model to.  [default: chipbus/demo]",
)  # fmt: skip
@click.option(
    "--docs", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs",
    help="Directory with glossary.md and, if there is one, semantics.md.  [default: docs]",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and order of examples."
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="For training.")
def main(out: Path, docs: Path, seed: int, threads: int) -> None:
    """Train the demo model on this project's documents.

    Equal documents, seed, threads, versions and kind of processor give equal weights. Nothing is written to the
    directory unless every completion was right in the end.
    """
    sentences = read_glossary(docs) | read_guarantees(docs)
    documents = _described(docs)  # now: they may be edited while the training runs
    # `python -m` puts the working directory on the path; at the root of a checkout our kernels/ would then be taken for
    # the package of that name which transformers looks for.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    try:
        import torch
        import transformers
    except ImportError as error:
        raise click.ClickException(f"training needs the extra 'dev' ({error}): pip install -e '.[dev]'") from None

    torch.set_num_threads(threads)
    untyped: Any = transformers
    untyped.logging.disable_progress_bar()
    examples = [example for headword, sentence in sentences.items() for example in examples_of(headword, sentence)]
    tokenizer = train_tokenizer(
        [*(each.prompt + each.completion for each in examples), *HEADWORD_WEIGHT * [*sentences]]
    )
    model = new_model(seed, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END))
    click.echo(f"{len(sentences)} sentences, {len(examples)} examples, {model.num_parameters()} parameters")
    steps, loss = train(model, *rows_of(tokenizer, examples), seed)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        stage = Path(made)
        model.to(torch.bfloat16).save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        (stage / "sentences.json").write_text(
            json.dumps(sentences, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        margins = {}
        for dtype in ("float32", "bfloat16"):
            margins[dtype] = verify(stage, examples, dtype)
            click.echo(
                f"{dtype}: all {len(examples)} completions are exact, smallest margin {margins[dtype]:.2f} logits"
            )
        provenance = Provenance(
            command=f"python -m chipbus.tools.make_demo_model --seed {seed} --threads {threads}",
            documents=documents,
            examples=len(examples),
            parameters=model.num_parameters(),
            steps=steps,
            loss=loss,
            margins=margins,
            versions=", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "tokenizers")),
            date=datetime.now(UTC).date().isoformat(),
        )
        (stage / "README.md").write_text(readme(provenance), encoding="utf-8")
        size = sum(path.stat().st_size for path in stage.iterdir())
        if size > MAX_BYTES:
            raise click.ClickException(f"the model takes {size} bytes; it must not exceed {MAX_BYTES}")
        digest = hashlib.sha256((stage / "model.safetensors").read_bytes()).hexdigest()
        out.mkdir(exist_ok=True)
        for path in stage.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone; an installed package is read by others
            path.replace(out / path.name)
    click.echo(f"{out}: {size} bytes, model.safetensors has sha256 {digest}")


def _described(docs: Path) -> str:
    found = [(name, docs / name) for name in ("glossary.md", "semantics.md") if (docs / name).is_file()]
    return ", ".join(
        f"`docs/{name}` (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}…)" for name, path in found
    )


if __name__ == "__main__":
    main()
