"""The 64-byte header, and frames of several records."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus.envelope import HEADER, NO_TRACE, Kind, Lane, envelope_of, name_id, seal, split
from chipbus.errors import BadFrame

MODEST = settings(deadline=None, print_blob=True, max_examples=150)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def record(body: bytes = b"", kind: Kind = Kind.TELL, lane: int = Lane.WORK) -> bytes:
    return seal(kind, 7, lane, 1, 2, name_id("a"), name_id("b"), 3, NO_TRACE, 4, body)


@pytest.mark.guarantee("B1")
def test_an_envelope_is_64_bytes() -> None:
    assert HEADER.size == 64
    assert len(record(b"abc")) == 67


@MODEST
@given(
    kind=st.sampled_from(Kind),
    type_id=st.integers(0, 2**16 - 1),
    lane=st.sampled_from(Lane),
    numbers=st.tuples(U64, U64, U32, U32, U32),
    trace_id=st.binary(min_size=16, max_size=16),
    position=U64,
    body=st.binary(max_size=99),
)
def test_every_field_survives(
    kind: Kind, type_id: int, lane: Lane, numbers: tuple[int, ...], trace_id: bytes, position: int, body: bytes
) -> None:
    correlation, deadline_ns, source, destination, incarnation = numbers
    sealed = seal(
        kind, type_id, lane, correlation, deadline_ns, source, destination, incarnation, trace_id, position, body
    )

    ((envelope, found),) = split(sealed)

    assert (envelope.kind, envelope.type_id, envelope.lane) == (kind, type_id, lane)
    assert (envelope.correlation, envelope.deadline_ns, envelope.incarnation) == (correlation, deadline_ns, incarnation)
    assert (envelope.source, envelope.destination) == (source, destination)
    assert (envelope.trace_id, envelope.position, bytes(found)) == (trace_id, position, body)
    assert envelope_of(sealed) == envelope


def test_a_frame_is_records_end_to_end() -> None:
    bodies = [b"", b"one", b"two" * 100]

    frame = b"".join(map(record, bodies))

    assert [bytes(body) for _, body in split(frame)] == bodies


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (b"", "0 left-over bytes at byte 0"),
        (record(b"x")[:-1], "a body of 1 bytes"),
        (record(b"x") + b"y", "1 left-over bytes at byte 65"),
        (record(b"x") + record()[:63], "63 left-over bytes"),
        (b"\x02" + record()[1:], "envelope version 2"),
        (record()[:1] + b"\x63" + record()[2:], "unknown envelope kind 99"),
        (record()[:4] + b"\x05" + record()[5:], "flags 0x5"),
        (record()[:6] + b"\x01" + record()[7:], "1 further frames"),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(frame: bytes, what: str) -> None:
    with pytest.raises(BadFrame, match=what):
        list(split(frame))


def test_records_before_a_bad_one_are_read() -> None:
    frames = split(record(b"good") + b"bad")

    assert bytes(next(frames)[1]) == b"good"
    with pytest.raises(BadFrame):
        next(frames)


@MODEST
@given(st.binary(max_size=300))
def test_random_bytes_are_records_or_bad_frames(frame: bytes) -> None:
    try:
        records = list(split(frame))
    except BadFrame:
        return
    assert sum(HEADER.size + len(body) for _, body in records) == len(frame)
