"""The tensor map: last writers, and readers since, are those a byte-by-byte bookkeeper knows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.kernels.tensor_map import RangeMap, TensorMap

RANGES = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(deadline=None, print_blob=True)
@given(st.lists(st.tuples(RANGES, st.booleans()), max_size=40))
def test_the_tensor_map_agrees_with_a_byte_by_byte_one(actions: list[tuple[tuple[int, int], bool]]) -> None:
    found, plain = TensorMap(), dict[int, int]()
    for task, ((begin, end), writes) in enumerate(actions):
        expected = {plain[byte] for byte in range(begin, end) if byte in plain}
        assert set(found.producers(0, begin, end)) == expected
        assert set(found.producers(1, begin, end)) == set()
        if writes:
            found.produced(0, begin, end, task)
            plain.update(dict.fromkeys(range(begin, end), task))


@settings(deadline=None, print_blob=True)
@given(st.lists(st.tuples(RANGES, st.sampled_from(["put", "drop", "update"])), max_size=40), RANGES)
def test_a_range_map_agrees_with_a_byte_by_byte_one(
    actions: list[tuple[tuple[int, int], str]], query: tuple[int, int]
) -> None:
    found, plain = RangeMap[tuple[int, ...]](), dict[int, tuple[int, ...]]()
    for number, ((begin, end), action) in enumerate(actions):
        before = found.copy()
        kept = before.over(*query)
        if action == "put":
            found.put(begin, end, (number,))
            plain.update(dict.fromkeys(range(begin, end), (number,)))
        elif action == "drop":
            found.drop(begin, end)
            for byte in range(begin, end):
                plain.pop(byte, None)
        else:
            found.update(begin, end, lambda left, right, value, number=number: (*(value or ()), number))  # type: ignore[misc]
            plain.update({byte: (*plain.get(byte, ()), number) for byte in range(begin, end)})
        for byte in range(60):
            assert found.over(byte, byte + 1) == ([plain[byte]] if byte in plain else [])
        assert set(found.over(*query)) == {plain[byte] for byte in range(*query) if byte in plain}
        pieces = found.pieces(*query)
        assert [byte for begin, end, _ in pieces for byte in range(begin, end)] == list(range(*query))
        assert all(plain.get(byte) == value for begin, end, value in pieces for byte in range(begin, end))
        assert before.over(*query) == kept


@settings(deadline=None, print_blob=True)
@given(st.lists(st.tuples(RANGES, st.sampled_from("ab"), st.booleans()), max_size=40))
def test_readers_since_the_last_write_agree_with_a_byte_by_byte_one(
    actions: list[tuple[tuple[int, int], str, bool]],
) -> None:
    tensor_map, plain = TensorMap(track_readers=True), dict[tuple[str, int], set[int]]()
    for task, ((begin, end), space, writes) in enumerate(actions):
        found: dict[int, None] = {}
        tensor_map.find_readers(space, [(begin, end)], found)
        assert set(found) == set().union(*(plain.get((space, byte), set()) for byte in range(begin, end)))
        entries, restore = tensor_map.entries, tensor_map.save([space])
        tell = tensor_map.written if writes else tensor_map.read
        tell(space, [(begin, end)], -1)
        restore()
        assert tensor_map.entries == entries
        tell(space, [(begin, end)], task)
        for byte in range(begin, end):
            plain[space, byte] = set() if writes else plain.get((space, byte), set()) | {task}
    for space in "ab":
        tensor_map.forget(space)
    assert tensor_map.entries == 0
