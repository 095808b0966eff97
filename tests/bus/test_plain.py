"""Plain records are taken in one loop; whatever a frame is made of, nothing differs from taking each the long way."""

from __future__ import annotations

from typing import Any

import pytest
from bus_actors import Number, Server, Urgent
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus.clock import VirtualClock
from chipbus.bus.envelope import ASK, HEADER_BYTES, NO_TRACE, TELL, WORK, Kind, name_id, seal
from chipbus.bus.exchange import Exchange
from chipbus.bus.registry import encode, type_of

MODEST = settings(deadline=None, print_blob=True, max_examples=300)
NUMBER, URGENT = type_of(Number(0)).type_id, type_of(Urgent(0)).type_id
HERE, THERE = name_id("here"), name_id("there")

mostly_right = {
    "kind": st.sampled_from([TELL, ASK, TELL, ASK, *Kind]),
    "type_id": st.sampled_from([NUMBER] * 9 + [URGENT, 0x7BFA]),
    "lane": st.sampled_from([WORK] * 9 + [0, 2]),
    "deadline_ns": st.sampled_from([2**62] * 5 + [0]),
    "source": st.sampled_from([THERE] * 19 + [HERE]),
    "destination": st.sampled_from([HERE] * 19 + [THERE]),
    "incarnation": st.sampled_from([1] * 19 + [2]),
    "position": st.sampled_from([0, 0, 5, 2048, 2**23]),
    "body": st.sampled_from([encode(Number(7))] * 3 + [b"", encode(Number(1, bytes(2000)))]),
}
records = st.lists(
    st.tuples(st.fixed_dictionaries(mostly_right), st.sampled_from([1] * 9 + [0, -1])), min_size=1, max_size=12
)
strikes = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=2)


class Nowhere:
    """A driver and a port that lead nowhere; what is sent is kept."""

    def __init__(self) -> None:
        self.sent: list[tuple[bool, bytes]] = []

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None

    def put(self, control: bool, record: bytes, _: int) -> None:
        self.sent.append((control, record))


def exchange(port: Nowhere) -> Exchange:
    made = Exchange(Server(), port, name="here", incarnation=1, clock=VirtualClock(), seed=0)
    made.actor.ctx = made  # type: ignore[assignment]
    made.peers.up("there", 1, port)
    return made


def outcome(frames: list[bytes], *, is_plain: bool) -> list[Any]:
    """All that a receiver can be asked about after these frames, before and after it has handled them."""
    port = Nowhere()
    here = exchange(port)
    if not is_plain:
        here._receive_plain = lambda link, frame, offset: offset  # type: ignore[method-assign]
    link = here.peers.links["there"]
    seen: list[Any] = []
    for frame in frames:
        here.receive("there", frame, control=False)
        letters = [(*letter[1:6], bytes(letter[6]), letter[7] is None) for letter in here.mailbox.work]
        seen += [letters, len(here.mailbox), list(link.seen), sorted(link.calls), set(link.cancelled)]
    while here.serve():
        pass
    return [*seen, dict(here.counters), here.actor.seen, sorted(link.calls), port.sent]  # type: ignore[attr-defined]


@MODEST
@given(st.lists(st.tuples(records, strikes), min_size=1, max_size=3))
def test_a_frame_is_taken_as_if_each_record_went_the_long_way(drawn: list[Any]) -> None:
    frames, correlation = [], 0
    for described, hits in drawn:
        frame = bytearray()
        for fields, step in described:
            correlation = max(0, correlation + step)
            frame += seal(**fields, correlation=correlation, trace_id=NO_TRACE)
        for place, value in hits:
            frame[place % len(frame)] = value
        frames.append(bytes(frame))

    assert outcome(frames, is_plain=True) == outcome(frames, is_plain=False)


@pytest.mark.parametrize("offset", range(HEADER_BYTES))
def test_every_byte_of_a_header_is_looked_at_as_on_the_long_way(offset: int) -> None:
    first = seal(ASK, NUMBER, WORK, 1, 2**62, THERE, HERE, 1, NO_TRACE, 0, encode(Number(1)))
    second = seal(ASK, NUMBER, WORK, 2, 2**62, THERE, HERE, 1, NO_TRACE, 0, encode(Number(2)))
    for value in (0, 1, 3, 12, 255):
        struck = second[:offset] + bytes([value]) + second[offset + 1 :]
        frames = [first + struck + seal(TELL, NUMBER, WORK, 3, 0, THERE, HERE, 1, NO_TRACE, 0, encode(Number(3)))]
        assert outcome(frames, is_plain=True) == outcome(frames, is_plain=False)


def test_an_empty_frame_and_half_a_header_are_bad_frames() -> None:
    whole = seal(TELL, NUMBER, WORK, 1, 0, THERE, HERE, 1, NO_TRACE, 0, encode(Number(1)))
    for frame, heard in ((b"", []), (whole[:40], []), (whole + whole[:40], [1])):
        found = outcome([frame], is_plain=True)
        assert found[-4:-2] == [{"bad_frames": 1}, heard]
