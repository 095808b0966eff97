"""Read a recorded run, and run its chip commands again: pure functions over a directory of ledgers.

Owns: nothing but the fresh chip it is replaying on. A record is never written to.

    run.json            what ran, on which checkpoint
    chip.0.0.1.ledger   chip 0.0's first life: its commands, in order, and what came back
    replica.0.1.ledger  batch decisions; every ledger also holds the message headers its actor sent and received
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import msgspec

from ..actors.manifest import RECORD_FORMAT, RunManifest
from ..bus import Entry, Progress, read_ledger
from ..errors import ConfigError, LedgerCorrupt
from ..kernels.chips import Chip, open_chip
from ..kernels.diagnosis import DumpLevel, dump_arguments
from ..kernels.dispatch import Arg, Completion, Dispatch
from ..kernels.program import Direction, Program, TensorSpec
from ..kernels.qwen3.model import ModelSpec

__all__ = [
    "Difference",
    "Dump",
    "LedgerFile",
    "Outcome",
    "Record",
    "decode_field",
    "merged_entries",
    "open_record",
    "replay_dispatches",
]

COMMANDS = ("register", "unregister", "alloc", "free", "copy_to", "dispatch")
"""Kinds of entry that a chip worker's ledger holds for its chip's verbs, in the order they ran."""

_LEDGER = re.compile(r"(?P<name>.+)\.(?P<incarnation>[1-9][0-9]*)\.ledger")
_CHIP = re.compile(r"chip(\.\d+)+")

T = TypeVar("T")
OnProgress = Callable[[Progress], None]


@attrs.frozen(kw_only=True)
class LedgerFile:
    """One ledger of a record: what one life of one actor wrote. Its checksums hold up to its last entry."""

    path: Path
    name: str  # "chip.0.0"
    incarnation: int
    meta: Mapping[str, Any]
    kinds: Mapping[str, int]  # entries by kind
    is_torn: bool  # the process was killed, or still writes: there is no end marker

    @property
    def title(self) -> str:
        """``chip.0.0`` for a first life, ``chip.0.0 (incarnation 2)`` for a later one."""
        return self.name if self.incarnation == 1 else f"{self.name} (incarnation {self.incarnation})"


@attrs.frozen(kw_only=True)
class Record:
    """A recorded run whose manifest and ledgers have been read once and found whole."""

    directory: Path
    manifest: RunManifest
    ledgers: tuple[LedgerFile, ...]  # by name, then incarnation

    @property
    def kinds(self) -> Mapping[str, int]:
        """Entries by kind, over all ledgers."""
        return sum((Counter(ledger.kinds) for ledger in self.ledgers), Counter())

    def chip_ledgers(self, chip: str | None = None) -> tuple[LedgerFile, ...]:
        """Those of every chip that was given a command, or of every life of one; ``ConfigError`` if there is none."""
        chips = tuple(
            ledger for ledger in self.ledgers if _CHIP.fullmatch(ledger.name) and any(map(ledger.kinds.get, COMMANDS))
        )
        if not chips:
            raise ConfigError(f"record {self.directory} holds no command of a chip; there is nothing to run again")
        chosen = tuple(ledger for ledger in chips if chip in (None, ledger.name))
        if not chosen:
            names = ", ".join(dict.fromkeys(ledger.name for ledger in chips))
            raise ConfigError(f"record {self.directory} holds no chip {chip!r}; it holds {names}")
        return chosen


@attrs.frozen(kw_only=True)
class Difference:
    """The first output whose digest is not the recorded one."""

    chip: str
    incarnation: int
    dispatch_id: int
    step_id: int
    program: str
    parameter: str
    recorded: str  # hex
    replayed: str  # hex

    def __str__(self) -> str:
        return (
            f"{self.chip} incarnation {self.incarnation}, dispatch {self.dispatch_id} of step {self.step_id}, program"
            f" {self.program}: parameter {self.parameter} has digest {self.replayed}, recorded was {self.recorded}"
        )


@attrs.frozen(kw_only=True)
class Dump:
    """What to write down while dispatches run again: one directory each, below one per life of a chip."""

    directory: Path
    level: DumpLevel
    dispatch_id: int | None = None  # of the only one to write down


@attrs.frozen(kw_only=True)
class Outcome:
    """What running dispatches again showed."""

    dispatches: int  # compared, the differing one included
    chips: int  # lives of chips begun
    torn: tuple[str, ...] = ()  # ledgers that end without an end marker, replayed as far as they go
    difference: Difference | None = None  # None: every digest was equal


def open_record(directory: Path, on_progress: OnProgress | None = None) -> Record:
    """Read a record's manifest and every ledger once, to the end.

    Raises ``ConfigError`` if the directory is no record or one of another format, ``LedgerCorrupt`` naming file and
    byte where something breaks off. A ledger without end marker (killed process, running engine) is no error.
    """
    manifest = _read_manifest(directory)
    paths = [(match["name"], int(match["incarnation"]), path) for path in directory.iterdir()
             if (match := _LEDGER.fullmatch(path.name))]  # fmt: skip
    if not paths:
        raise ConfigError(f"record {directory} holds no ledger; the run ended before any process wrote one")
    ledgers = []
    for position, (name, incarnation, path) in enumerate(sorted(paths)):
        ledgers.append(_scan(name, incarnation, path))
        if on_progress is not None:
            on_progress(Progress(phase="checking", done=position + 1, total=len(paths), unit="ledgers"))
    return Record(directory=directory, manifest=manifest, ledgers=tuple(ledgers))


def merged_entries(record: Record) -> Iterator[tuple[LedgerFile, Entry]]:
    """Every entry of every ledger by time; entries of one ledger keep their order whatever the clock did."""

    def entries(position: int) -> Iterator[tuple[int, int, LedgerFile, Entry]]:
        latest_ns = 0
        for entry in read_ledger(record.ledgers[position].path):
            latest_ns = max(latest_ns, entry.time_ns)
            yield latest_ns, position, record.ledgers[position], entry

    streams = [entries(position) for position in range(len(record.ledgers))]
    for _, _, ledger, entry in heapq.merge(*streams, key=lambda item: item[:2]):
        yield ledger, entry


def replay_dispatches(
    record: Record,
    *,
    chip: str | None = None,
    model: Path | None = None,
    dump: Dump | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Run recorded chip commands again, each life of a chip on a fresh chip of its own, up to the first difference.

    chip:  only this one, by name
    model: where the checkpoint lies now; None takes the recorded directory
    dump:  write down what dispatches were given and gave back

    A record of ``null`` chips runs on null chips, any other on ``cpu`` chips with the recorded number of threads.
    Raises ``ConfigError`` if the checkpoint is missing or not the recorded one, before any command runs;
    ``KernelError`` if a command that succeeded then fails now.
    """
    ledgers = record.chip_ledgers(chip)
    devices = {ledger.path: _device(ledger) for ledger in ledgers}
    if record.manifest.model_dir and any(not device.startswith("null:") for device, _ in devices.values()):
        _check_model(record, model)
    total = sum(count for ledger in ledgers for kind, count in ledger.kinds.items() if kind in COMMANDS)
    done = dispatches = 0
    for position, ledger in enumerate(ledgers):
        device, threads = devices[ledger.path]
        opened = open_chip(device, threads)
        try:
            lifetime = _Lifetime(ledger, opened, model, dump, on_progress)
            for entry in read_ledger(ledger.path):
                if entry.kind not in COMMANDS:
                    continue
                difference = lifetime.run(entry)
                done += 1
                dispatches += entry.kind == "dispatch"
                if on_progress is not None:
                    on_progress(Progress(phase="replaying", done=done, total=total, unit="commands"))
                if difference is not None:
                    return Outcome(dispatches=dispatches, chips=position + 1, difference=difference)
        finally:
            opened.close()
    torn = tuple(ledger.title for ledger in ledgers if ledger.is_torn)
    return Outcome(dispatches=dispatches, chips=len(ledgers), torn=torn)


def decode_field(ledger: LedgerFile, entry: Entry, name: str, kind: type[T]) -> T:
    """One field of an entry that holds an encoded attrs class; ``LedgerCorrupt`` if it holds something else."""
    try:
        return msgspec.msgpack.decode(entry.fields[name], type=kind)
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise LedgerCorrupt(
            f"{ledger.path}, byte {entry.offset}: entry {entry.seq} of kind {entry.kind} holds no {kind.__name__}"
            f" in its field {name!r}"
        ) from error


class _Lifetime:
    """One life of a chip, commands run again in order on a fresh one."""

    def __init__(
        self,
        ledger: LedgerFile,
        chip: Chip,
        model: Path | None,
        dump: Dump | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._ledger = ledger
        self._chip = chip
        self._model = model
        self._dump = dump
        self._on_progress = on_progress
        self._programs: dict[bytes, Program] = {}
        self._tensors: dict[int, TensorSpec] = {}

    def run(self, entry: Entry) -> Difference | None:
        """Run one command; for a dispatch, the first parameter whose digest differs."""
        match entry.kind:
            case "register":
                program = self._decode(entry, "program", Program)
                self._programs[program.digest] = program
                self._chip.register(program)
            case "unregister":
                self._chip.unregister(entry.fields["program"])
            case "alloc":
                tensor = self._decode(entry, "tensor", TensorSpec)
                if tensor.source and self._model is not None:
                    tensor = attrs.evolve(tensor, source=str(self._model.absolute()))
                self._chip.alloc(tensor, self._report)
                self._tensors[tensor.resident] = tensor
            case "free":
                self._chip.free(entry.fields["resident"])
                del self._tensors[entry.fields["resident"]]
            case "copy_to":
                self._chip.copy_to(entry.fields["resident"], self._decode(entry, "value", Arg))
            case "dispatch":
                return self._launch(entry)
        return None

    def _launch(self, entry: Entry) -> Difference | None:
        dispatch = self._decode(entry, "dispatch", Dispatch)
        recorded = self._decode(entry, "completion", Completion).digests
        program = self._programs.get(dispatch.program)
        if program is None:
            raise self._corrupt(entry, f"a program {dispatch.program.hex()[:12]} that no earlier entry registers")
        written = [param.name for param in program.params if param.direction is not Direction.IN]
        if len(recorded) != len(written):
            raise self._corrupt(entry, f"{len(recorded)} digests for the {len(written)} outputs of {program.name}")
        completion = self._chip.launch(dispatch, digest=True)
        if self._dump is not None and self._dump.dispatch_id in (None, dispatch.dispatch_id):
            self._write_down(self._dump, program, dispatch, completion)
        replayed = completion.digests
        for parameter, then, now in zip(written, recorded, replayed, strict=True):
            if then != now:
                return Difference(
                    chip=self._ledger.name,
                    incarnation=self._ledger.incarnation,
                    dispatch_id=dispatch.dispatch_id,
                    step_id=dispatch.step_id,
                    program=program.name,
                    parameter=parameter,
                    recorded=then.hex(),
                    replayed=now.hex(),
                )
        return None

    def _write_down(self, dump: Dump, program: Program, dispatch: Dispatch, completion: Completion) -> None:
        """Arguments and results, residents with what they hold after the dispatch; weights are not read."""
        life = f"{self._ledger.name}.{self._ledger.incarnation}"
        residents = {arg.resident for arg in dispatch.args if arg.resident and not self._tensors[arg.resident].source}
        dump_arguments(
            dump.directory / life / f"{dispatch.dispatch_id:06d}_{program.name}",
            program,
            dispatch.args,
            level=dump.level,
            outputs=completion.outputs,
            residents={} if dump.level == "shapes" else {i: self._chip.copy_from(i) for i in sorted(residents)},
        )

    def _report(self, done: float, total: float) -> None:
        if self._on_progress is not None:
            phase = f"weights of {self._ledger.title}"
            self._on_progress(Progress(phase=phase, done=done, total=total, unit="bytes"))

    def _decode(self, entry: Entry, name: str, kind: type[T]) -> T:
        return decode_field(self._ledger, entry, name, kind)

    def _corrupt(self, entry: Entry, what: str) -> LedgerCorrupt:
        return LedgerCorrupt(
            f"{self._ledger.path}, byte {entry.offset}: entry {entry.seq} of kind {entry.kind} names {what}"
        )


def _read_manifest(directory: Path) -> RunManifest:
    path = directory / "run.json"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{directory} is no record: its run.json cannot be read ({error.strerror});"
            " name a directory that --record made"
        ) from error
    try:
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("format")
        if version != RECORD_FORMAT:
            raise ConfigError(f"{path} has record format {version!r}; this version reads format {RECORD_FORMAT}")
        return msgspec.json.decode(raw, type=RunManifest)
    except msgspec.MsgspecError as error:
        raise LedgerCorrupt(f"{path} is no manifest of a run: {error}") from error


def _scan(name: str, incarnation: int, path: Path) -> LedgerFile:
    reader = read_ledger(path)
    kinds = Counter(entry.kind for entry in reader)
    return LedgerFile(path=path, name=name, incarnation=incarnation, meta=reader.meta, kinds=kinds, is_torn=reader.torn)


def _device(ledger: LedgerFile) -> tuple[str, int]:
    """Which chip to open for a ledger, and with how many threads: its kind is the recorded one or cpu."""
    for entry in read_ledger(ledger.path):
        if entry.kind == "chip":
            device, threads = str(entry.fields["device"]), int(entry.fields["threads"])
            kind, _, index = device.partition(":")
            return (device if kind == "null" else f"cpu:{index}"), threads
    raise LedgerCorrupt(f"{ledger.path} does not say which chip it records; it breaks off before its first command")


def _check_model(record: Record, model: Path | None) -> None:
    directory = model or Path(record.manifest.model_dir)
    found = ModelSpec.from_directory(directory, str(record.manifest.config.get("dtype"))).fingerprint
    if found != record.manifest.fingerprint:
        raise ConfigError(
            f"the model in {directory} has fingerprint {found[:16]}, the recorded one had"
            f" {record.manifest.fingerprint[:16]}; name the recorded model with --model DIR"
        )
