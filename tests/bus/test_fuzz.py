"""Any bytes as any message: a message of that type or ``BadFrame``, and no memory that the bytes only claim to need."""

from __future__ import annotations

import tracemalloc
import types
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

import attrs
import bus_actors  # noqa: F401 (its messages are fuzzed, too)
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chipbus.actors.messages.launching
import chipbus.actors.messages.routing  # noqa: F401
from chipbus.actors.messages.serving import Generate, Submit
from chipbus.actors.messages.tree import Drain
from chipbus.bus.registry import decode, encode, registered
from chipbus.errors import BadFrame

ROWS = list(registered())
STRICTER = (Generate, Submit, Drain)
"""Messages with rules of their own beside their fields' types: a number of seconds, sampling parameters."""
THOROUGH = settings(deadline=None, print_blob=True, max_examples=600)
MOST_BYTES = 2**20  # allocated while 64 bytes are decoded; measured: 16 KiB, most of it the error's text
FOUR_GIB = b"\xff\xff\xff\xff"
CLAIMS = [b"\xdd" + FOUR_GIB, b"\xdf" + FOUR_GIB, b"\xc6" + FOUR_GIB, b"\xdb" + FOUR_GIB, b"\xc9" + FOUR_GIB + b"\x01"]
"""msgpack heads of an array, a map, bytes, text and an extension with 4 GiB of content."""


@cache
def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, as the registered messages have them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        (meta,) = arguments[1:]
        if arguments[0] is int:
            return st.integers(meta.ge, meta.le if meta.lt is None else meta.lt - 1)
        kind = st.binary if arguments[0] is bytes else st.text
        return kind(min_size=meta.min_length or 0, max_size=min(meta.max_length, 20))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple:
        if arguments[1:] == (...,):
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, arguments))
    if attrs.has(hint):
        return messages(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    plain = {int: st.integers(-(2**63), 2**64 - 1), float: st.floats(allow_nan=False), str: st.text(max_size=20)}
    plain |= {bytes: st.binary(max_size=20), bool: st.booleans(), type(None): st.none()}
    return plain[hint]


@cache
def messages(cls: type) -> st.SearchStrategy[Any]:
    """Objects of a message class, checked by nothing but its types."""
    hints = typing.get_type_hints(cls, include_extras=True)

    def build(fields: dict[str, Any]) -> Any:
        made = cls.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        return made

    return st.fixed_dictionaries({field.name: values(hints[field.name]) for field in attrs.fields(cls)}).map(build)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Random bytes, or a message's with one thing wrong: cut off, bits flipped, spliced, a length of 4 GiB."""
    how = draw(st.sampled_from(["random", "cut", "flip", "splice", "claim", "whole"]))
    if how == "random":
        return draw(st.binary(max_size=300))
    body = bytearray(encode(draw(st.sampled_from(ROWS).flatmap(lambda row: messages(row.cls)))))
    place = draw(st.integers(0, len(body) - 1))
    if how == "cut":
        return bytes(body[:place])
    if how == "flip":
        for _ in range(draw(st.integers(1, 4))):
            body[draw(st.integers(0, len(body) - 1))] ^= 1 << draw(st.integers(0, 7))
    if how == "splice":
        other = encode(draw(st.sampled_from(ROWS).flatmap(lambda row: messages(row.cls))))
        return bytes(body[:place] + other[draw(st.integers(0, len(other) - 1)) :])
    if how == "claim":
        return bytes(body[:place] + draw(st.sampled_from(CLAIMS)) + body[place:])
    return bytes(body)


def decoded(row: Any, body: bytes) -> object | None:
    """The message, checked to be one of that type; None for a ``BadFrame``."""
    try:
        found: object = decode(row.type_id, body)
    except BadFrame:
        return None
    assert type(found) is row.cls
    return found


@pytest.mark.guarantee("B68")
@THOROUGH
@given(row=st.sampled_from(ROWS), body=bodies())
def test_any_bytes_as_any_message_give_it_or_a_bad_frame(row: Any, body: bytes) -> None:
    found = decoded(row, body)
    if found is not None:
        assert decoded(row, encode(found)) is not None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cls.__name__)
@given(data=st.data())
@settings(deadline=None, print_blob=True, max_examples=15)
def test_each_message_survives_and_each_of_its_beginnings_is_a_bad_frame(row: Any, data: st.DataObject) -> None:
    message = data.draw(messages(row.cls))
    body = encode(message)

    found = decoded(row, body)
    if row.cls not in STRICTER:
        assert found is not None
    assert found is None or encode(found) == body
    for end in range(min(len(body), 200)):
        assert decoded(row, body[:end]) is None


def claims_in(row: Any) -> Iterator[bytes]:
    """Bodies of 64 bytes that announce 4 GiB: the whole, each field, and what is inside a field."""
    for claim in CLAIMS:
        yield claim
        for field in attrs.fields(row.cls):
            name = b"\x81" + msgspec.msgpack.encode(field.name)
            for inside in (b"", b"\x91", b"\x91\x92", b"\x81\xa1x"):
                for filling in (b"\x00", b"\x90", b"\x80", b"\xa0"):
                    yield (name + inside + claim + filling * 64)[:64]


@pytest.mark.guarantee("B69")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cls.__name__)
def test_a_length_that_is_only_claimed_takes_no_memory(row: Any) -> None:
    tracemalloc.start()
    try:
        for body in claims_in(row):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            assert decoded(row, body) is None
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < MOST_BYTES, body
    finally:
        tracemalloc.stop()
