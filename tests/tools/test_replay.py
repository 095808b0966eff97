"""What a record is, what is refused, and what running it again shows; on records made with real chips."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner
from recordings import Recording

from chipbus.bus import Progress, read_ledger
from chipbus.errors import ChipbusError, ConfigError, LedgerCorrupt
from chipbus.kernels.dispatch import Usage
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.tools import console
from chipbus.tools.record_view import programs, rows, summary
from chipbus.tools.replay import Outcome, merged_entries, open_record, replay_dispatches
from chipbus.tools.replay_commands import bus_replay

DEMO = ModelSpec.from_directory(str(files("chipbus").joinpath("demo")), "float32")
PROMPTS = {"req-1": [20, 21, 22, 23, 24], "req-2": [30, 31]}


def replayed(directory: Path, **options: object) -> Outcome:
    return replay_dispatches(open_record(directory), **options)  # type: ignore[arg-type]


def run(*arguments: str) -> int:
    return console.run("bus-replay", lambda: bus_replay, arguments)


@pytest.mark.guarantee("L10")
def test_a_record_replays_with_equal_digests_on_fresh_chips(recording: Recording) -> None:
    recording.run(PROMPTS)

    outcome = replayed(recording.directory)

    assert outcome == Outcome(dispatches=2 * 4 * 4, chips=1)


@pytest.mark.guarantee("L11")
def test_the_first_different_digest_is_named_and_ends_the_replay(
    recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def falsify(program: str, digests: tuple[bytes, ...]) -> tuple[bytes, ...]:
        seen.append(program)
        return (*digests[:-1], bytes(16)) if seen.count("lm_head") >= 3 and program == "lm_head" else digests

    recording.falsify = falsify
    recording.run(PROMPTS)

    difference = replayed(recording.directory).difference

    assert difference is not None
    assert (difference.chip, difference.incarnation) == ("chip.0.0", 1)
    assert (difference.dispatch_id, difference.step_id) == (11, 3)
    assert (difference.program, difference.parameter) == ("lm_head", "logits")
    assert difference.recorded == "00" * 16
    assert difference.replayed not in ("", difference.recorded)
    assert run("dispatch", str(recording.directory)) == 11
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in ("chip.0.0", "dispatch 11 of step 3", "lm_head", "logits", difference.recorded, difference.replayed):
        assert word in shown.err


@pytest.mark.guarantee("L12")
def test_a_changed_byte_anywhere_is_refused_before_anything_runs(recording: Recording) -> None:
    recording.run(PROMPTS)
    draw = random.Random(7)
    for ledger in sorted(recording.directory.glob("*.ledger")):
        whole = ledger.read_bytes()
        offsets = [entry.offset for entry in read_ledger(ledger)] + [len(whole)]
        for position in draw.sample(range(offsets[0], len(whole)), 25):
            ledger.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
            with pytest.raises(LedgerCorrupt) as refused:
                open_record(recording.directory)
            named = int(str(refused.value).split("byte ")[1].split(":")[0])
            broken = max(offset for offset in offsets if offset <= position)
            assert ledger.name in str(refused.value)
            assert named >= broken if broken == offsets[-2] else named == broken
        ledger.write_bytes(whole)
    assert replayed(recording.directory).difference is None


def test_a_corrupted_record_ends_the_command_with_code_2(
    recording: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.run(PROMPTS)
    ledger = recording.directory / "chip.0.0.1.ledger"
    content = bytearray(ledger.read_bytes())
    content[len(content) // 2] ^= 1
    ledger.write_bytes(content)

    for command in ("dispatch", "show"):
        assert run(command, str(recording.directory)) == 2
        shown = capsys.readouterr()
        assert "chip.0.0.1.ledger, byte " in shown.err
        assert "Traceback" not in shown.err


@pytest.mark.guarantee("L13")
def test_every_life_of_a_chip_is_replayed_on_a_chip_of_its_own(recording: Recording) -> None:
    recording.run(PROMPTS)
    attrs.evolve(recording, incarnation=2).run({"req-3": [40, 41, 42]})

    outcome = replayed(recording.directory)

    assert outcome == Outcome(dispatches=2 * 4 * 4 + 4 * 4, chips=2)
    assert replayed(recording.directory, chip="chip.0.0") == outcome


@pytest.mark.guarantee("L14")
def test_a_killed_process_leaves_a_record_that_replays_as_far_as_it_goes(recording: Recording) -> None:
    recording.run(PROMPTS, ends=False)
    ledger = recording.directory / "chip.0.0.1.ledger"
    offsets = [entry.offset for entry in read_ledger(ledger)]
    dispatches = [entry.offset for entry in read_ledger(ledger) if entry.kind == "dispatch"]

    assert replayed(recording.directory) == Outcome(dispatches=32, chips=1, torn=("chip.0.0",))
    whole = ledger.read_bytes()
    for cut, complete in ((dispatches[9] + 3, 9), (dispatches[9] + 60, 9), (dispatches[10], 10)):
        ledger.write_bytes(whole[:cut])
        assert replayed(recording.directory) == Outcome(dispatches=complete, chips=1, torn=("chip.0.0",))
    ledger.write_bytes(ledger.read_bytes()[: offsets[0]])
    with pytest.raises(ConfigError, match="holds no command of a chip"):
        replayed(recording.directory)


@pytest.mark.guarantee("L15")
def test_a_record_of_another_format_is_refused(recording: Recording) -> None:
    recording.run(PROMPTS)
    recording.write_manifest(format=1)

    with pytest.raises(ConfigError, match="has record format 1; this version reads format 2"):
        open_record(recording.directory)


@pytest.mark.guarantee("L16")
def test_another_checkpoint_is_refused_before_any_command_runs(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "run", spec=DEMO, claimed_device="cpu:0")
    recording.write_manifest(fingerprint="0" * 64)
    recording.run(PROMPTS)

    with pytest.raises(ConfigError, match=f"has fingerprint {DEMO.fingerprint[:16]}, the recorded one had 0000"):
        replayed(recording.directory)
    with pytest.raises(ConfigError, match="nowhere is no directory"):
        replayed(recording.directory, model=tmp_path / "nowhere")


@pytest.mark.slow
def test_a_record_of_a_cpu_chip_replays_with_equal_digests_also_on_a_moved_checkpoint(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "run", spec=DEMO, device="cpu:0")
    recording.write_manifest()
    recording.run(PROMPTS)
    moved = tmp_path / "moved"
    shutil.copytree(DEMO.path, moved)

    assert replayed(recording.directory) == Outcome(dispatches=32, chips=1)
    assert replayed(recording.directory, model=moved) == Outcome(dispatches=32, chips=1)


def no_directory(recording: Recording) -> None:
    recording.directory.rename(recording.directory.with_name("elsewhere"))


def no_manifest(recording: Recording) -> None:
    (recording.directory / "run.json").unlink()


def no_json(recording: Recording) -> None:
    (recording.directory / "run.json").write_text('{"format": 2, ')


def no_fields(recording: Recording) -> None:
    (recording.directory / "run.json").write_text('{"format": 2}')


def no_ledgers(recording: Recording) -> None:
    for ledger in recording.directory.glob("*.ledger"):
        ledger.unlink()


def no_chip(recording: Recording) -> None:
    (recording.directory / "chip.0.0.1.ledger").unlink()


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (no_directory, ConfigError, "is no record: its run.json cannot be read"),
        (no_manifest, ConfigError, "is no record: its run.json cannot be read"),
        (no_json, LedgerCorrupt, "run.json is no manifest of a run"),
        (no_fields, LedgerCorrupt, "run.json is no manifest of a run: .*chipbus_version"),
        (no_ledgers, ConfigError, "holds no ledger"),
        (no_chip, ConfigError, "holds no command of a chip"),
    ],
)
def test_what_is_no_record_is_refused_with_a_sentence(
    recording: Recording, damage: Callable[[Recording], None], kind: type[ChipbusError], words: str
) -> None:
    recording.run(PROMPTS)
    damage(recording)

    with pytest.raises(kind, match=words):
        replayed(recording.directory)

    assert run("dispatch", str(recording.directory)) == 2


def test_an_unknown_chip_is_named_with_those_there_are(recording: Recording) -> None:
    recording.run(PROMPTS)

    with pytest.raises(ConfigError, match=r"no chip 'chip\.0\.1'; it holds chip\.0\.0$"):
        replayed(recording.directory, chip="chip.0.1")


def test_progress_is_told_for_every_command(recording: Recording) -> None:
    recording.run(PROMPTS)
    told: list[Progress] = []

    record = open_record(recording.directory, told.append)
    replay_dispatches(record, on_progress=told.append)

    replaying = [progress for progress in told if progress.phase == "replaying"]
    assert [progress.done for progress in replaying] == list(range(1, len(replaying) + 1))
    assert {progress.total for progress in replaying} == {5 + 7 + 32 + 7}
    assert told[0] == Progress(phase="checking", done=1, total=2, unit="ledgers")


def test_entries_are_merged_by_time_and_keep_the_order_of_their_ledger(recording: Recording) -> None:
    recording.run(PROMPTS)

    merged = list(merged_entries(open_record(recording.directory)))

    times = [entry.time_ns for _, entry in merged]
    assert times == sorted(times)
    assert len(merged) == 2 + 8 + 1 + 5 + 7 + 32 + 7
    for name in ("chip.0.0", "replica.0"):
        seqs = [entry.seq for ledger, entry in merged if ledger.name == name]
        assert seqs == sorted(seqs)


def test_rows_of_one_request_are_its_messages_batches_and_dispatches(recording: Recording) -> None:
    recording.run(PROMPTS)
    record = open_record(recording.directory)

    of_request = list(rows(record, request="req-2"))

    assert [row.kind for row in of_request if row.actor == "replica.0"] == ["message", *["batch"] * 4]
    assert {row.facts["step_id"] for row in of_request if row.kind == "dispatch"} == {5, 6, 7, 8}
    assert len([row for row in of_request if row.kind == "dispatch"]) == 16
    assert of_request == list(rows(record, request=f"{2:032x}"))
    assert all("req-2" in row.text for row in of_request if row.kind == "batch")


def test_rows_of_one_kind_carry_decoded_facts(recording: Recording) -> None:
    recording.run(PROMPTS)
    record = open_record(recording.directory)

    first = next(iter(rows(record, kind="dispatch")))

    assert {row.kind for row in rows(record, kind="dispatch")} == {"dispatch"}
    assert first.facts["program"] == "prefill"
    assert first.facts["arguments"][4] == {"parameter": "tokens", "dtype": "int32", "shape": [5], "bytes": 20}
    assert first.facts["arguments"][1] == {"parameter": "k_cache", "resident": 2}
    assert list(first.facts["digests"]) == ["k_cache", "v_cache", "hidden"]
    assert summary(record)["ledgers"][0]["entries"]["dispatch"] == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request": "req-3"}, "no request 'req-3' in a batch; did you mean 'req-"),
        ({"kind": "mesage"}, "no entry of kind 'mesage'; did you mean 'message'"),
        ({"kind": "zzz"}, "no entry of kind 'zzz'; it has "),
    ],
)
def test_an_unknown_request_or_kind_names_the_nearest(
    recording: Recording, options: dict[str, str], words: str
) -> None:
    recording.run(PROMPTS)

    with pytest.raises(ConfigError, match=words):
        list(rows(open_record(recording.directory), **options))


def test_show_prints_the_summary_and_one_line_per_entry(recording: Recording) -> None:
    recording.run(PROMPTS)

    shown = CliRunner().invoke(bus_replay, ["show", str(recording.directory)], catch_exceptions=False)

    head, _, body = shown.stdout.partition("\n\n")
    assert "model     /models/nowhere, fingerprint ffff" in head
    assert "ledger    chip.0.0: 7 alloc, 1 chip, 32 dispatch, 7 free, 5 register" in head
    assert "\nprogram   prefill: 2 launches of " in head
    assert len(body.splitlines()) == 62
    for words in ("← router       ask Submit", "step 1: req-1 prefill 0..4; running 1", "#1 of step 1: prefill, "):
        assert words in body


def test_show_as_json_is_one_object_per_line(recording: Recording) -> None:
    recording.run(PROMPTS)

    shown = CliRunner().invoke(bus_replay, ["show", str(recording.directory), "--json"], catch_exceptions=False)

    head, *lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert head["format"] == 2
    assert len(lines) == 62
    assert {line["kind"] for line in lines} == {"message", "batch", "chip", "register", "alloc", "free", "dispatch"}


def test_a_record_tells_what_each_program_took(recording: Recording) -> None:
    recording.run(PROMPTS)
    record = open_record(recording.directory)

    uses = programs(record)

    assert [(use.program, use.launches) for use in uses] == [
        ("prefill", 2), ("final_norm", 8), ("lm_head", 8), ("sample", 8), ("decode", 6),
    ]  # fmt: skip
    took = [row.facts["device_ns"] for row in rows(record, kind="dispatch") if row.facts["program"] == "decode"]
    assert uses[-1].device_ns == sum(took)
    assert str(uses[-1]) == f"decode: 6 launches of {sum(took) / 6e6:.3f} ms"  # a null chip counts nothing
    counted = attrs.evolve(
        uses[-1], usage=Usage(tasks=600, run_ns=2_000_000, busy_ns=(1_500_000, 2_000_000), bytes_read=10**7)
    )
    assert str(counted).endswith(" ms; in kernels 300,000 tasks/s, 5.0 GB/s read, cores 75 100 % busy")
    assert summary(record)["programs"][-1]["launches"] == 6


def test_dispatch_says_what_it_compared(recording: Recording) -> None:
    recording.run(PROMPTS, ends=False)

    in_words = CliRunner().invoke(bus_replay, ["dispatch", str(recording.directory)], catch_exceptions=False)
    as_json = CliRunner().invoke(bus_replay, ["dispatch", str(recording.directory), "--json"], catch_exceptions=False)

    assert "32 dispatches on 1 chips: every digest is equal" in in_words.stdout
    assert "chip.0.0 has no end marker" in in_words.stdout
    facts = json.loads(as_json.stdout)
    assert (facts["is_equal"], facts["dispatches"], facts["difference"]) == (True, 32, None)
