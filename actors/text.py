"""Text ↔ token ids: a model directory's tokenizer and chat template, incremental decoding, stop strings.

Owns: per request, the bytes of a character not complete yet (``Detokenizer``) and the text that may still turn out to
be a stop string (``StopScanner``).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from tokenizers import Tokenizer, decoders

from ..errors import CheckpointError, ContextTooLong, RequestInvalid
from .chat_template import ChatTemplate
from .messages.serving import ChatTurn
from .unicode_text import check_unicode

__all__ = ["Detokenizer", "StopScanner", "TextModel"]

_MAX_REASON = 1000  # characters of what a template says against a conversation


class Detokenizer(Protocol):
    """Turns token ids into text as they come. What ``add`` returned never changes later.

    All pieces plus ``flush()`` together are what decoding all ids at once gives, special tokens skipped. (Byte-fallback
    tokenizers may mark ill-formed bytes differently, since they take back what was well-formed before them.)
    """

    def add(self, token_id: int) -> str:
        """Text that is complete now; never ends inside a character."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come: an unfinished character as U+FFFD. Call it once, last."""
        ...


class _ByteDetokenizer:
    """For byte-level tokenizers, whose tokens are strings of bytes: exact for every sequence of ids, O(1) per byte."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        # Replaces each maximal ill-formed part by one U+FFFD, as the Unicode standard recommends and tokenizers does.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other tokenizer: decodes a short window of tokens again and takes what is new.

    The window reaches back to the last but one place where the text was complete, because a token's text can depend on
    the token before it (a leading space). Special tokens and ids without a token are no part of any text, so they never
    come into it. A character spread over byte tokens is held back until its last byte, or one that cannot be its next.
    Where a decoder has no byte tokens a text that ends in U+FFFD may be such a character; after ``_LONGEST`` tokens (a
    character has at most four bytes) U+FFFD is what the model said, and is given out.
    """

    _LONGEST = 4

    def __init__(
        self, decode: Callable[[Sequence[int]], str], token_of: Callable[[int], str | None], *, has_byte_tokens: bool
    ) -> None:
        self._decode = decode
        self._token_of = token_of
        self._window: list[int] = []
        self._context = 0  # tokens of the window that are given out already
        self._given = ""  # their text, as the window alone decodes it
        self._bytes = codecs.getincrementaldecoder("utf-8")() if has_byte_tokens else None

    def add(self, token_id: int) -> str:
        token = self._token_of(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        return "" if self._is_cut(token, text) else self._give(text)

    def _is_cut(self, token: str, text: str) -> bool:
        """Whether the window ends inside a character."""
        if self._bytes is None:
            may_be = text.endswith("\N{REPLACEMENT CHARACTER}")
            return may_be and len(self._window) - self._context < self._LONGEST
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is None:
            self._bytes.reset()
            return False
        try:
            self._bytes.decode(bytes.fromhex(byte[1]))
        except UnicodeDecodeError:
            self._bytes.reset()
        return self._bytes.getstate()[0] != b""

    def flush(self) -> str:
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._given = self._decode(self._window)
        return new


class StopScanner:
    """Finds the first stop string in text that comes in pieces, and gives out text only when it cannot be part of one.

    The first is the one that ends first; of several ending at the same character, the longest. So the result depends
    on the text alone, not on how it was cut into pieces. Cost: one comparison per character and stop string, amortised
    (Knuth, Morris, Pratt 1977). With ``keeps`` the stop string belongs to the text, so nothing is held back.
    """

    def __init__(self, stop: Iterable[str], *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._stops = sorted(stop, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # per stop string: characters of it that end the text so far
        self._held = ""

    def feed(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Next piece of text → (text that may be given out, the stop string found).

        After a stop string was found, all text up to it has been given out and nothing more may be fed. With
        ``may_stop`` False (before ``min_tokens``) a stop string that ends in this piece is ordinary text.
        """
        if not self._stops:
            return text, None
        buffered = self._held + text
        begin = len(self._held)
        for offset, character in enumerate(text):
            for index, stop in enumerate(self._stops):
                if self._advance(index, character) and may_stop:
                    self._held = ""
                    return buffered[: begin + offset + 1 - (0 if self._keeps else len(stop))], stop
        keep = 0 if self._keeps else max(self._matched)
        cut = len(buffered) - keep
        self._held = buffered[cut:]
        return buffered[:cut], None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, character: str) -> bool:
        """Feed one character to one stop string's automaton; True if the stop string ends here."""
        stop, borders, length = self._stops[index], self._borders[index], self._matched[index]
        while length and stop[length] != character:
            length = borders[length - 1]
        if stop[length] == character:
            length += 1
        complete = length == len(stop)
        self._matched[index] = borders[length - 1] if complete else length
        return complete


def _borders(pattern: str) -> list[int]:
    """For each prefix of ``pattern``: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = borders[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        borders[position] = length
    return borders


class TextModel:
    """Everything textual of a Hugging Face model directory: ``tokenizer.json``, special tokens, chat template."""

    def __init__(self, directory: Path) -> None:
        """Load. Raises ``CheckpointError`` naming the file that is missing or wrong."""
        path = directory / "tokenizer.json"
        try:
            document = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"tokenizer file {path} cannot be read: {_reason(error)}") from error
        try:
            self._tokenizer = Tokenizer.from_str(document)
        except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
            raise CheckpointError(f"tokenizer file {path} is not a tokenizer: {error}") from error
        # A file may carry the settings of the run that trained it; a prompt is refused, never cut or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._is_byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        self._has_byte_tokens = '"ByteFallback"' in _state(self._tokenizer.decoder)
        self._token_bytes: dict[int, bytes] = {}
        self._shown_bytes: dict[int, bytes] = {}
        self._chat = _load_chat(directory)
        self._name = directory.name

    def encode(self, text: str, context: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens the model wants around it. Raises ``RequestInvalid``.

        ``ContextTooLong`` if a beginning of it has more than twice as many tokens as ``context``; then the rest is not
        looked at, so that one endless prompt takes nobody's time.
        """
        return self._encode(text, context, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of all ids at once, special tokens included; ids without a token, also negative ones, give nothing."""
        return str(self._tokenizer.decode([i for i in token_ids if i >= 0], skip_special_tokens=False))

    def render(self, turns: Sequence[ChatTurn]) -> str:
        """A conversation as the model's chat template writes it, ready for the model's next turn.

        Raises ``RequestInvalid`` if there is no template or it refuses the conversation.
        """
        if self._chat is None:
            raise RequestInvalid(
                f"model {self._name} has no chat template (tokenizer_config.json or chat_template.jinja); use a prompt"
            )
        try:
            return self._chat.render([{"role": turn.role, "content": turn.content} for turn in turns])
        except Exception as error:  # a template is a program of the model's author and may raise anything
            why = str(error)[:_MAX_REASON]
            raise RequestInvalid(f"the chat template of model {self._name} failed: {why}") from error

    def encode_chat(self, rendered: str, context: int | None = None) -> list[int]:
        """``encode`` for a rendered conversation; the template wrote all special tokens already."""
        return self._encode(rendered, context, add_special_tokens=False)

    def shown_bytes(self, token_id: int) -> bytes:
        """What one token stands for, for whoever looks at tokens one by one; none for an id without a token.

        Of a byte-level token these are its exact bytes, maybe part of a character; of a special token, its name. A
        token of any other tokenizer that is no byte has no bytes of its own: these are of the text it adds behind
        another token.
        """
        known = self._shown_bytes.get(token_id)
        if known is None:
            known = self._shown_bytes[token_id] = self._show(token_id)
        return known

    def _show(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if token_id in self._special:
            return token.encode()
        if self._is_byte_level:
            return self._bytes_of(token_id)
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        before = self._tokenizer.encode("a", add_special_tokens=False).ids  # at the start of a text spaces may be cut
        alone, context = self.decode([token_id]), self.decode(before)
        behind = self.decode([*before, token_id])
        return (behind[len(context) :] if behind.startswith(context) else alone).encode()

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder for one request's generated ids."""
        if self._is_byte_level:
            return _ByteDetokenizer(self._bytes_of)
        return _WindowDetokenizer(
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            self._token_of,
            has_byte_tokens=self._has_byte_tokens,
        )

    def _encode(self, text: str, context: int | None, *, add_special_tokens: bool) -> list[int]:
        check_unicode(text, "the prompt")
        if context is not None:
            self._check_beginnings(text, context)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _check_beginnings(self, text: str, context: int) -> None:
        """Encode ever longer beginnings. Where one is cut its last word may be in more tokens; hence twice."""
        size = 8 * context
        while size < len(text):
            count = len(self._tokenizer.encode(text[:size], add_special_tokens=False))
            if count > 2 * context:
                raise ContextTooLong(
                    f"the first {size} of the prompt's {len(text)} characters have {count} tokens; with max_model_len"
                    f" {context} it may have at most {context - 1}"
                )
            size *= 2

    def _token_of(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None if it is special, or there is none."""
        return None if token_id in self._special else self._tokenizer.id_to_token(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        """The bytes one token stands for; none for special and unknown tokens."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self._token_of(token_id)
            known = self._token_bytes[token_id] = _byte_level(token) if token else b""
        return known


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable bytes stand for themselves, others for U+0100 upwards (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # as sentencepiece writes them


def _state(decoder: Any) -> str:
    """A decoder as JSON text; tokenizers tells nothing else about the parts of a sequence."""
    return "" if decoder is None else bytes(decoder.__getstate__()).decode()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token, written as plain text
        return token.encode()


def _load_chat(directory: Path) -> ChatTemplate | None:
    """The chat template: ``chat_template.jinja`` if there is one, else the field of ``tokenizer_config.json``."""
    path = directory / "tokenizer_config.json"
    config: Any = {}
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"tokenizer configuration {path} cannot be read: {_reason(error)}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"tokenizer configuration {path} is a {type(config).__name__}; it must be an object")
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    path_of_template = directory / "chat_template.jinja"
    if path_of_template.exists():
        path = path_of_template
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"chat template {path} cannot be read: {_reason(error)}") from error
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"the chat template in {path} is not a template: it is {source!r}")
    special = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            special[name] = token
    try:
        return ChatTemplate(source, special)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template in {path} is not a template: {error}") from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
