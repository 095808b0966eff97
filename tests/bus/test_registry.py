"""Message types and their strict codec."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import attrs
import msgspec
import pytest
from bus_actors import Deep, Number, Sheet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chipbus.bus import Lane, decode, encode, message, pack_tokens, register, schema_hash
from chipbus.bus.lifecycle import Failure, Hello, error_of, failure_of
from chipbus.bus.registry import compare_schemas, lookup, registered, schema_table, type_of
from chipbus.bus.schema import describe
from chipbus.errors import BadFrame, ChipbusError, ContextTooLong, PeerGone

MODEST = settings(deadline=None, print_blob=True, max_examples=150)
I64 = st.integers(-(2**63), 2**64 - 1)
SHEETS = st.builds(
    Sheet,
    text=st.text(max_size=20),
    data=st.binary(max_size=20),
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=8).map(pack_tokens),
    flag=st.booleans(),
    maybe=st.none() | I64,
    choice=I64 | st.text(max_size=5),
    parts=st.lists(
        st.builds(Deep, numbers=st.lists(I64, max_size=4).map(tuple), rate=st.floats(allow_nan=False)), max_size=3
    ).map(tuple),
    lane=st.sampled_from(Lane),
)


@MODEST
@given(SHEETS)
def test_a_message_survives_the_wire(sheet: Sheet) -> None:
    assert decode(type_of(sheet).type_id, encode(sheet)) == sheet


@pytest.mark.guarantee("B2")
@MODEST
@given(
    type_id=st.sampled_from([row.type_id for row in registered()]) | st.integers(0, 2**16 - 1),
    body=st.binary(max_size=200),
)
@example(type_id=0x7B07, body=b"\x91" * 5000)
def test_random_bytes_give_a_message_or_a_bad_frame(type_id: int, body: bytes) -> None:
    try:
        value = decode(type_id, body)
    except BadFrame:
        return
    assert type_of(value).type_id == type_id


@MODEST
@given(sheet=SHEETS, data=st.data())
def test_flipped_bits_give_a_message_or_a_bad_frame(sheet: Sheet, data: st.DataObject) -> None:
    body = bytearray(encode(sheet))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        value = decode(0x7B07, bytes(body))
    except BadFrame:
        return
    assert isinstance(value, Sheet)


@pytest.mark.parametrize(
    "body",
    [
        encode(Number(1)) + b"\x00",
        encode(Number(1))[:-1],
        msgspec.msgpack.encode({"value": "one"}),
        msgspec.msgpack.encode({"value": 1.5}),
        msgspec.msgpack.encode({"value": True}),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({"value": 1, "padding": "text"}),
    ],
    ids=["left over", "truncated", "text", "float", "bool", "missing", "array", "text for bytes"],
)
def test_a_wrong_body_is_a_bad_frame(body: bytes) -> None:
    with pytest.raises(BadFrame, match="Number cannot be decoded"):
        decode(0x7B01, body)


def test_bounds_of_a_field_are_checked() -> None:
    fields = {"name": "x" * 65, "incarnation": 1, "pid": 1, "to": "y", "to_incarnation": 1, "schema": b""}

    with pytest.raises(BadFrame, match="length <= 64"):
        decode(type_of(Hello(**{**fields, "name": "x"})).type_id, msgspec.msgpack.encode(fields))


def test_an_unknown_type_id_is_a_bad_frame() -> None:
    with pytest.raises(BadFrame, match="0x7bff"):
        decode(0x7BFF, b"")


@pytest.mark.parametrize("value", [Number(2**70), Number(object()), Number("\ud800")])  # type: ignore[arg-type]
def test_a_value_without_a_wire_form_is_refused_where_it_is_sent(value: Number) -> None:
    with pytest.raises(BadFrame, match="Number cannot be encoded"):
        encode(value)


@pytest.mark.guarantee("B3")
def test_ids_and_classes_are_registered_once() -> None:
    @attrs.frozen
    class Fresh:
        pass

    with pytest.raises(ValueError, match="0x7b01 is taken by Number"):
        register(0x7B01, Fresh, lane=Lane.WORK)
    with pytest.raises(ValueError, match="Number is registered already"):
        register(0x7BFE, Number, lane=Lane.WORK)
    with pytest.raises(ValueError, match="outside"):
        register(0x10000, Fresh, lane=Lane.WORK)
    with pytest.raises(BadFrame):
        lookup(0x7BFE)


@pytest.mark.parametrize("cls", [int, attrs.define(type("Mutable", (), {})), type("Plain", (), {})])
def test_only_frozen_attrs_classes_are_messages(cls: type) -> None:
    with pytest.raises(TypeError, match="frozen attrs"):
        message(0x7BFD, lane=Lane.WORK)(cls)


def test_a_class_that_is_no_message_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match="Deep is no registered message"):
        type_of(Deep((), 0.0))


@attrs.frozen
class _Inner:
    x: int


@attrs.frozen
class _Outer:
    inner: _Inner
    again: _Outer | None = None


def _variant(**changes: Any) -> type:
    return attrs.make_class(
        "Shape", {"a": attrs.field(type=changes.get("a", int)), **changes.get("more", {})}, frozen=True
    )


def test_a_description_changes_with_names_and_types_alone() -> None:
    plain = describe(_variant())

    assert describe(_variant()) == plain
    assert describe(_variant(a=str)) != plain
    assert describe(_variant(more={"b": attrs.field(type=int)})) != plain
    assert describe(_Outer) == "_Outer(inner:_Inner,again:Union[_Outer,NoneType]);_Inner(x:int)"


def test_schema_tables_are_compared_message_by_message() -> None:
    table = schema_table()
    place = 10 * [row.type_id for row in registered()].index(0x7B01)
    other = table[: place + 2] + bytes(8) + table[place + 10 :]
    unknown_to_us = table + (0x7BFC).to_bytes(2, "little") + bytes(8)

    assert compare_schemas(table) == ""
    assert compare_schemas(unknown_to_us) == ""
    assert compare_schemas(b"") == ""
    assert compare_schemas(other) == "Number (0x7b01) has other fields there"
    assert "no multiple" in compare_schemas(table[:-1])


def test_the_schema_hash_is_the_same_in_every_process() -> None:
    code = "from chipbus.bus import schema_hash; print(schema_hash().hex())"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}

    assert len(runs) == 1
    assert len(schema_hash()) == 16


@pytest.mark.guarantee("B4")
def test_an_error_crosses_as_its_class_name_and_text() -> None:
    class Private(PeerGone):
        pass

    assert failure_of(ContextTooLong("too long")) == Failure("ContextTooLong", "too long")
    assert failure_of(Private("mine")) == Failure("PeerGone", "mine")
    back = error_of(Failure("ContextTooLong", "too long"))
    assert type(back) is ContextTooLong
    assert str(back) == "too long"
    assert type(error_of(Failure("OSError", "x"))) is ChipbusError
