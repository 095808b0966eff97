"""One step of a Qwen3 model as dispatches: the five programs, their arguments, and how a step becomes launches.

Owns nothing: values in, values out, no torch. A replica core builds dispatches here, chips execute them.

    prefill ─┐                                   (weights, k_cache, v_cache: resident, shared by all programs)
             ├─▶ hidden ─▶ final_norm ─▶ normed ─▶ lm_head ─▶ logits ─▶ sample ─▶ token ids, log-probabilities
    decode ──┘   one row per running sequence; the buffers stay on the chip between the programs
       ▲                                                                              │
       └────────────────────────── chosen, also on the chip ◀─────────────────────────┘

So a step can be sent before the tokens of the one before it are known: see ``chosen_token``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, KernelError
from ..dispatch import Arg, Completion, Dispatch
from ..program import Direction, Param, Program, TensorSpec
from .model import ModelSpec
from .tiling import COARSE, Tiling

__all__ = [
    "SAMPLE_COLUMNS",
    "DecodeRow",
    "Limits",
    "ModelPrograms",
    "PrefillRow",
    "SampleRow",
    "SampledToken",
    "StepInput",
    "build_step",
    "chosen_token",
    "read_step",
]

Int32 = NDArray[np.int32]
_NO_IDS: Int32 = np.zeros(0, np.int32)

# Resident ids, per chip. One model per chip, so they are constants.
_WEIGHTS, _K_CACHE, _V_CACHE, _HIDDEN, _NORMED, _LOGITS, _CHOSEN = range(1, 8)

SAMPLE_COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "uniform",
    "prompt_tokens",
    "logprobs",
)
"""Columns of the sample program's ``settings``, float64 so that ids, counts and the uniform number keep every bit."""
_columns = attrgetter(*SAMPLE_COLUMNS[:-1])  # all but ``logprobs``, which may be None and is -1 then


@attrs.frozen
class Limits:
    """What one replica is sized for. Checked when made: ``ConfigError``."""

    max_num_seqs: int
    """Sequences running at once: rows of the hidden, normed, logits and chosen buffers."""
    max_num_batched_tokens: int
    """Prompt tokens of one step."""
    max_model_len: int
    """Longest context, prompt and output together, in tokens."""
    page_size: int
    """Tokens per KV page."""
    num_pages: int
    """KV pages on the chip."""

    def __attrs_post_init__(self) -> None:
        for field in attrs.fields(Limits):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; it must be an integer of at least 1")

    @property
    def pages_per_sequence(self) -> int:
        """Pages a context of ``max_model_len`` takes."""
        return -(-self.max_model_len // self.page_size)


@attrs.frozen(kw_only=True)
class ModelPrograms:
    """The five programs of one model under one set of limits, and the residents they share."""

    spec: ModelSpec
    limits: Limits
    prefill: Program
    decode: Program
    final_norm: Program
    lm_head: Program
    sample: Program
    tensors: tuple[TensorSpec, ...]
    """To allocate in this order: weights, key cache, value cache, hidden, normed, chosen, logits."""

    @property
    def programs(self) -> tuple[Program, ...]:
        """To register, any order."""
        return (self.prefill, self.decode, self.final_norm, self.lm_head, self.sample)

    @classmethod
    def build(cls, spec: ModelSpec, limits: Limits, tiling: Tiling = COARSE, *, weights: str = "") -> ModelPrograms:
        """Describe programs and residents; pure, so every process that builds them gets the same digests.

        ``weights``: what matrices are kept in, "int8" or "" for the model's dtype.
        """
        cache_shape = (spec.num_layers, spec.num_kv_heads, limits.num_pages, limits.page_size, spec.head_dim)
        rows = limits.max_num_seqs
        tensors = (
            TensorSpec(_WEIGHTS, spec.dtype, (), spec.path, spec.fingerprint, weights),
            TensorSpec(_K_CACHE, spec.dtype, cache_shape),
            TensorSpec(_V_CACHE, spec.dtype, cache_shape),
            TensorSpec(_HIDDEN, spec.dtype, (rows, spec.hidden_size)),
            TensorSpec(_NORMED, spec.dtype, (rows, spec.hidden_size)),
            TensorSpec(_CHOSEN, "int32", (rows,)),
            TensorSpec(_LOGITS, "float32", (rows, spec.vocab_size)),
        )

        def kept(name: str, tensor: TensorSpec, direction: Direction = Direction.IN) -> Param:
            return Param(name, tensor.dtype, tensor.shape, direction, resident=True)

        def given(name: str, *shape: int | str, dtype: str = "int32") -> Param:
            return Param(name, dtype, shape)

        def wanted(name: str, dtype: str, *shape: int | str) -> Param:
            return Param(name, dtype, shape, Direction.OUT)

        parameters, k_cache, v_cache, hidden, normed, chosen, logits = tensors
        state = (
            kept("weights", parameters),
            kept("k_cache", k_cache, Direction.INOUT),
            kept("v_cache", v_cache, Direction.INOUT),
            kept("hidden", hidden, Direction.OUT),
        )
        static: tuple[tuple[str, int | float | str | bool], ...] = (
            ("vocab_size", spec.vocab_size),
            ("hidden_size", spec.hidden_size),
            ("intermediate_size", spec.intermediate_size),
            ("num_layers", spec.num_layers),
            ("num_heads", spec.num_heads),
            ("num_kv_heads", spec.num_kv_heads),
            ("head_dim", spec.head_dim),
            ("rms_norm_eps", spec.rms_norm_eps),
            ("rope_theta", spec.rope_theta),
            ("tie_word_embeddings", spec.tie_word_embeddings),
            ("attention_bias", spec.attention_bias),
            ("dtype", spec.dtype),
            ("weights", weights),
            ("max_num_seqs", limits.max_num_seqs),
            ("max_num_batched_tokens", limits.max_num_batched_tokens),
            ("max_model_len", limits.max_model_len),
            ("page_size", limits.page_size),
            ("num_pages", limits.num_pages),
            *tiling.static,
        )

        def program(name: str, *params: Param) -> Program:
            return Program(name, f"qwen3.{name}", static, params)

        return cls(
            spec=spec,
            limits=limits,
            tensors=tensors,
            prefill=program(
                "prefill",
                *state,
                given("tokens", "T"),
                given("starts", "R"),
                given("lengths", "R"),
                given("block_tables", "R", "P"),
                given("rows", "R"),
            ),
            decode=program(
                "decode",
                *state,
                given("tokens", "B"),
                given("positions", "B"),
                given("block_tables", "B", "P"),
                given("rows", "B"),
                kept("chosen", chosen),
            ),
            final_norm=program(
                "final_norm",
                kept("weights", parameters),
                kept("hidden", hidden),
                kept("normed", normed, Direction.OUT),
                given("rows", "N"),
            ),
            lm_head=program(
                "lm_head",
                kept("weights", parameters),
                kept("normed", normed),
                kept("logits", logits, Direction.OUT),
                given("rows", "N"),
            ),
            sample=program(
                "sample",
                kept("logits", logits),
                given("rows", "N"),
                given("settings", "N", len(SAMPLE_COLUMNS), dtype="float64"),
                given("history", "H"),
                given("history_ends", "N"),
                given("banned", "Z"),
                given("banned_ends", "N"),
                wanted("token_ids", "int32", "N"),
                wanted("logprobs", "float32", "N"),
                wanted("top_ids", "int32", "N", "K"),
                wanted("top_logprobs", "float32", "N", "K"),
                kept("chosen", chosen, Direction.OUT),
            ),
        )


@attrs.frozen(kw_only=True, eq=False)
class PrefillRow:
    """One chunk of one sequence: ``tokens`` take positions ``start`` … ``start + len(tokens) - 1``.

    ``block_table`` lists the sequence's pages in order of position and covers at least those positions; everything
    before ``start`` must be in them already, or be written by prefill rows before it in the same step. The hidden state
    of the last token goes to ``row`` (-1: to nowhere).
    """

    tokens: Int32  # (n,), n >= 1
    start: int
    block_table: Int32  # (pages,)
    row: int


@attrs.frozen(kw_only=True, eq=False)
class DecodeRow:
    """One more token of one sequence: ``token`` takes ``position``; its hidden state goes to ``row``."""

    token: int  # an id, or ``chosen_token`` of a row
    position: int
    block_table: Int32
    row: int


@attrs.frozen(kw_only=True, eq=False)
class SampleRow:
    """Choose a token from the logits of ``row``. Field meanings are ``SamplingParams``'.

    ``uniform`` in [0, 1) is drawn by the core from (request seed, token index): chips have no randomness, so a step
    replays exactly. ``history`` is the prompt's ``prompt_tokens`` ids and then those generated; only penalties read it,
    so it may be empty without them. ``banned`` ids are never chosen (end ids before min_tokens).
    """

    row: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    uniform: float = 0.0
    history: Int32 = _NO_IDS
    prompt_tokens: int = 0
    banned: Int32 = _NO_IDS
    logprobs: int | None = None  # how many top entries to report besides the chosen one's; None: no log-probabilities


@attrs.frozen(kw_only=True, eq=False)
class StepInput:
    """One scheduler turn: chunks, single tokens, and the rows of which the next token is wanted.

    Every row of ``samples`` is written by a prefill or decode row of the same step.
    """

    step_id: int
    prefills: tuple[PrefillRow, ...] = ()
    decodes: tuple[DecodeRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()


@attrs.frozen
class SampledToken:
    """What ``sample`` chose for one row.

    Log-probabilities are of the raw distribution: softmax of the logits before bans, penalties, temperature and
    truncation, so they compare across requests with other settings. None and empty if not asked for.
    """

    token_id: int
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()  # most probable first, lower id first on ties
    top_logprobs: tuple[float, ...] = ()


def chosen_token(row: int) -> int:
    """Stands for the token that ``sample`` chose for buffer row ``row`` when it last ran, in an earlier step."""
    return -1 - row


def build_step(programs: ModelPrograms, step: StepInput, first_dispatch_id: int) -> tuple[Dispatch, ...]:
    """The dispatches of one step, in launch order: prefill, decode, final_norm, lm_head, sample, as far as needed."""
    planned: list[tuple[Program, tuple[Arg, ...]]] = []
    state = tuple(Arg(resident=resident) for resident in (_WEIGHTS, _K_CACHE, _V_CACHE, _HIDDEN))
    if step.prefills:
        planned.append((programs.prefill, state + _prefill_args(step.prefills)))
    if step.decodes:
        planned.append((programs.decode, (*state, *_decode_args(step.decodes), Arg(resident=_CHOSEN))))
    if step.samples:
        rows = _ints([sample.row for sample in step.samples])
        weights, hidden, normed, logits = (Arg(resident=id_) for id_ in (_WEIGHTS, _HIDDEN, _NORMED, _LOGITS))
        planned.append((programs.final_norm, (weights, hidden, normed, rows)))
        planned.append((programs.lm_head, (weights, normed, logits, rows)))
        planned.append((programs.sample, (logits, rows, *_sample_args(step.samples), Arg(resident=_CHOSEN))))
    return tuple(
        Dispatch(dispatch_id=first_dispatch_id + index, step_id=step.step_id, program=program.digest, args=args)
        for index, (program, args) in enumerate(planned)
    )


def read_step(step: StepInput, completions: Sequence[Completion]) -> tuple[SampledToken, ...]:
    """The sampled tokens, in the order of ``step.samples``, from the completions of ``build_step``'s dispatches.

    Raises ``KernelError`` if the last completion does not carry one token per sample row.
    """
    if not step.samples:
        return ()
    outputs = [arg.numpy() for arg in completions[-1].outputs] if completions else []
    if len(outputs) != 4 or outputs[0].shape != (len(step.samples),):
        raise KernelError(
            f"step {step.step_id}: the last completion carries outputs of shapes {[o.shape for o in outputs]};"
            f" the sample program returns 4, one row for each of {len(step.samples)} samples"
        )
    token_ids, logprobs, top_ids, top_logprobs = (output.tolist() for output in outputs)
    return tuple(
        SampledToken(token_ids[i])
        if sample.logprobs is None
        else SampledToken(
            token_ids[i], logprobs[i], tuple(top_ids[i][: sample.logprobs]), tuple(top_logprobs[i][: sample.logprobs])
        )
        for i, sample in enumerate(step.samples)
    )


def _ints(values: Sequence[int]) -> Arg:
    return Arg(dtype="int32", shape=(len(values),), data=array("i", values).tobytes())


def _padded(tables: Sequence[Int32]) -> Arg:
    """Block tables as one rectangle; -1 where a sequence has no page."""
    rectangle = np.full((len(tables), max(map(len, tables))), -1, np.int32)
    for row, table in enumerate(tables):
        rectangle[row, : len(table)] = table
    return Arg.of(rectangle)


def _joined(arrays: Sequence[Int32]) -> tuple[Arg, Arg]:
    """Ragged rows as one array and the end of each row in it."""
    if not any(map(len, arrays)):
        return _ints(()), _ints([0] * len(arrays))
    ends = np.cumsum([len(array) for array in arrays], dtype=np.int32)
    return Arg.of(np.concatenate(arrays).astype(np.int32, copy=False)), Arg.of(ends)


def _prefill_args(prefills: Sequence[PrefillRow]) -> tuple[Arg, ...]:
    return (
        Arg.of(np.concatenate([row.tokens for row in prefills]).astype(np.int32, copy=False)),
        _ints([row.start for row in prefills]),
        _ints([len(row.tokens) for row in prefills]),
        _padded([row.block_table for row in prefills]),
        _ints([row.row for row in prefills]),
    )


def _decode_args(decodes: Sequence[DecodeRow]) -> tuple[Arg, ...]:
    return (
        _ints([row.token for row in decodes]),
        _ints([row.position for row in decodes]),
        _padded([row.block_table for row in decodes]),
        _ints([row.row for row in decodes]),
    )


def _sample_args(samples: Sequence[SampleRow]) -> tuple[Arg, ...]:
    count = len(samples)
    widest = max(sample.logprobs or 0 for sample in samples)
    rows = [(*_columns(sample), -1 if sample.logprobs is None else sample.logprobs) for sample in samples]
    return (
        Arg.of(np.array(rows, np.float64)),
        *_joined([sample.history for sample in samples]),
        *_joined([sample.banned for sample in samples]),
        Arg.out("int32", (count,)),
        Arg.out("float32", (count,)),
        Arg.out("int32", (count, widest)),
        Arg.out("float32", (count, widest)),
    )
