"""The append-only record: what is written is read, what was changed is found, what is missing is said."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import LedgerWriter, read_ledger
from chipbus.bus.ledger import MAGIC, _chain
from chipbus.errors import ConfigError, LedgerCorrupt

MODEST = settings(deadline=None, print_blob=True, max_examples=60)


def write(directory: Path, entries: int = 5, *, close: bool = True) -> Path:
    writer = LedgerWriter(directory, "chip.0", 3, {"seed": 7})
    for number in range(entries):
        writer.append("dispatch", {"number": number, "data": bytes([number]) * 20, "shape": (2, 3)})
    if close:
        writer.close()
    else:
        writer.flush()
        os.close(writer._fd)
    return writer.path


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "directory")

    ledger = read_ledger(path)
    entries = list(ledger)

    assert path.name == "chip.0.3.ledger"
    assert ledger.meta == {"name": "chip.0", "incarnation": 3, "seed": 7}
    assert [entry.fields["number"] for entry in entries] == list(range(5))
    assert entries[2].fields == {"number": 2, "data": b"\2" * 20, "shape": [2, 3]}
    assert [entry.seq for entry in entries] == [1, 2, 3, 4, 5]
    assert all(entry.kind == "dispatch" and entry.time_ns > 0 for entry in entries)
    assert not ledger.torn
    assert list(ledger) == entries


@pytest.mark.guarantee("L3")
@MODEST
@given(data=st.data())
def test_a_changed_byte_anywhere_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("ledger"))
    offsets = [entry.offset for entry in read_ledger(path)]
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)

    seen = []
    with pytest.raises(LedgerCorrupt, match=f"{path}, byte (\\d+)") as failure:
        seen.extend(entry.offset for entry in read_ledger(path))

    named = int(str(failure.value).split("byte ")[1].split(":")[0])
    assert named <= place
    assert not [offset for offset in offsets if named < offset <= place]
    assert seen == [offset for offset in offsets if offset < named]


@pytest.mark.guarantee("L7")
def test_a_lost_a_moved_and_a_foreign_entry_are_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    second, third, fourth = [entry.offset for entry in read_ledger(path)][1:4]
    broken = {
        "lost": content[:second] + content[third:],
        "moved": content[:second] + content[third:fourth] + content[second:third] + content[fourth:],
        "twice": content[:third] + content[second:],
    }
    for bytes_ in broken.values():
        path.write_bytes(bytes_)
        with pytest.raises(LedgerCorrupt):
            list(read_ledger(path))


@pytest.mark.guarantee("L2")
@MODEST
@given(data=st.data())
def test_a_file_that_just_stops_is_torn_not_corrupt(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("ledger"))
    content = path.read_bytes()
    offsets = [entry.offset for entry in read_ledger(path)]
    size = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:size])

    ledger = read_ledger(path)
    entries = list(ledger)

    assert ledger.torn
    ends = [*offsets[1:], len(content)]
    whole = [offset for offset, end in zip(offsets, ends, strict=True) if end <= size]
    assert [entry.offset for entry in entries][: len(whole)] == whole


def test_a_ledger_without_an_end_marker_is_torn(tmp_path: Path) -> None:
    ledger = read_ledger(write(tmp_path, close=False))

    assert len(list(ledger)) == 5
    assert ledger.torn


@pytest.mark.parametrize("content", [b"not a ledger at all", MAGIC[:-1] + b"\x02" + bytes(50)])
def test_what_is_no_ledger_of_this_version_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.1.ledger"
    path.write_bytes(content)

    with pytest.raises(LedgerCorrupt, match=r"byte 0: .* is not the beginning of a version 1 ledger"):
        read_ledger(path)


@pytest.mark.parametrize(
    ("payload", "what"), [(b"\xc1", "is no record"), (b"\x94\x07\x00\xa1x\x80", "entry 7 where 1")]
)
def test_an_entry_with_a_good_checksum_and_wrong_content_is_refused(tmp_path: Path, payload: bytes, what: str) -> None:
    path = write(tmp_path, entries=0, close=False)
    chain = path.read_bytes()[len(MAGIC) + 8 :][:16]
    check = zlib.crc32(struct.pack("<I16s", len(payload), chain))
    with path.open("ab") as file:
        file.write(struct.pack("<II16s", len(payload), check, _chain(chain, payload)) + payload)

    with pytest.raises(LedgerCorrupt, match=what):
        list(read_ledger(path))


def test_bytes_after_the_end_marker_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x")

    with pytest.raises(LedgerCorrupt, match=f"byte {size}: bytes after the end marker"):
        list(read_ledger(path))


@pytest.mark.guarantee("L4")
def test_a_ledger_is_never_written_over(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()

    with pytest.raises(ConfigError, match="exists"):
        LedgerWriter(tmp_path, "chip.0", 3, {})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot record"):
        LedgerWriter(tmp_path / "file" / "below", "chip.0", 3, {})

    assert path.read_bytes() == content


def test_kinds_of_the_ledger_itself_cannot_be_appended(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, "chip.0", 1, {})
    with pytest.raises(ValueError, match=r"ledger\.end"):
        writer.append("ledger.end", {})
    writer.close()


@pytest.mark.guarantee("L5")
def test_a_disk_that_refuses_a_write_ends_the_record_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LedgerWriter(tmp_path, "chip.0", 1, {})
    writer.append("dispatch", {"number": 1})
    writer.flush()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("chipbus.bus.ledger.os.write", full)
        writer.append("dispatch", {"number": 2})
        writer.flush()
    writer.append("dispatch", {"number": 3})
    writer.flush()
    writer.close()
    writer.close()

    ledger = read_ledger(writer.path)
    assert [entry.fields["number"] for entry in ledger] == [1]
    assert ledger.torn


def test_much_in_one_turn_is_written_early(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, "chip.0", 1, {})
    writer.append("dispatch", {"data": bytes(300_000)})

    assert writer.path.stat().st_size > 300_000
    writer.append("dispatch", {"number": 1})
    writer.close()
    assert len(list(read_ledger(writer.path))) == 2
