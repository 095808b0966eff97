"""A record as a person or a program reads it: one row per entry, decoded, and filtered by request or kind.

Owns: nothing; it walks a record in order of time.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from ..bus import Entry
from ..errors import ConfigError
from ..kernels.dispatch import Arg, Completion, Dispatch, Usage
from ..kernels.program import Direction, Param, Program, TensorSpec
from .replay import LedgerFile, Record, decode_field, merged_entries

__all__ = ["ProgramUse", "Row", "programs", "rows", "summary", "summary_lines"]

_SHORT = 8  # hex digits of an id that a person compares by eye


@attrs.frozen(kw_only=True)
class Row:
    """One entry: when and where it was written, what it says in words, and the same as data for ``--json``."""

    time_ns: int  # the writer's clock; comparable between the processes of one host
    actor: str
    incarnation: int
    seq: int  # of the entry in its ledger
    kind: str
    text: str
    facts: Mapping[str, Any]

    def as_object(self) -> dict[str, Any]:
        """Everything but the words."""
        place = {"time_ns": self.time_ns, "actor": self.actor, "incarnation": self.incarnation, "seq": self.seq}
        return {**place, "kind": self.kind, **self.facts}


@attrs.frozen(kw_only=True)
class ProgramUse:
    """All launches of one program on all chips: how long they took, and what their graphs took of the chip."""

    program: str
    launches: int
    device_ns: int
    usage: Usage

    def __str__(self) -> str:
        count = f"{self.launches:,} launch{'es' * (self.launches > 1)} of"
        return f"{self.program}: {count} {self.device_ns / self.launches / 1e6:,.3f} ms{_rates(self.usage)}"


def programs(record: Record) -> list[ProgramUse]:
    """Of every program that was launched, in the order of their first launches."""
    names: dict[bytes, str] = {}
    uses: dict[str, ProgramUse] = {}
    for ledger, entry in merged_entries(record):
        if entry.kind == "register":
            program = decode_field(ledger, entry, "program", Program)
            names[program.digest] = program.name
        elif entry.kind == "dispatch":
            digest = decode_field(ledger, entry, "dispatch", Dispatch).program
            name = names.get(digest, digest.hex()[:_SHORT])
            done = decode_field(ledger, entry, "completion", Completion)
            so_far = uses.get(name, ProgramUse(program=name, launches=0, device_ns=0, usage=Usage()))
            uses[name] = attrs.evolve(
                so_far,
                launches=so_far.launches + 1,
                device_ns=so_far.device_ns + done.device_ns,
                usage=so_far.usage + done.usage,
            )
    return list(uses.values())


def _rates(usage: Usage) -> str:
    """What a usage comes to per second of its kernels, and how busy each core was; empty if nothing was counted."""
    if not usage.run_ns:
        return ""
    seconds = usage.run_ns / 1e9
    read = f", {usage.bytes_read / seconds / 1e9:,.1f} GB/s read" if usage.bytes_read else ""
    busy = " ".join(f"{100 * share:.0f}" for share in usage.busy_shares)
    return f"; in kernels {usage.tasks / seconds:,.0f} tasks/s{read}, cores {busy} % busy"


def summary(record: Record) -> dict[str, Any]:
    """The run in a nutshell: manifest, each ledger's size and state, and what each program took."""
    manifest = attrs.asdict(record.manifest)
    ledgers = [
        {"actor": ledger.name, "incarnation": ledger.incarnation, "torn": ledger.is_torn, "entries": dict(ledger.kinds)}
        for ledger in record.ledgers
    ]
    used = [attrs.asdict(use) for use in programs(record)]
    return {"directory": str(record.directory), **manifest, "ledgers": ledgers, "programs": used}


def summary_lines(record: Record) -> list[str]:
    """``summary`` for people."""
    manifest = record.manifest
    created = datetime.fromtimestamp(manifest.created_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    settings = ", ".join(f"{name}={value}" for name, value in manifest.config.items() if value is not None)
    model = f"{manifest.model_dir}, fingerprint {manifest.fingerprint[:16]}" if manifest.model_dir else "none"
    lines = [
        f"record    {record.directory}, format {manifest.format}",
        f"made      {created} by chipbus {manifest.chipbus_version} on {manifest.machine}",
        f"model     {model}",
        f"settings  {settings}",
    ]
    for ledger in record.ledgers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ledger.kinds.items())) or "nothing"
        lines.append(f"ledger    {ledger.title}: {kinds}{'; no end marker' if ledger.is_torn else ''}")
    return lines + [f"program   {use}" for use in programs(record)]


def rows(record: Record, *, request: str | None = None, kind: str | None = None) -> Iterator[Row]:
    """Entries by time. Raises ``ConfigError`` with the nearest match if the record has no such request or kind.

    request: a request id such as "req-1", or a trace id; keeps its messages, the batches it is in and their dispatches
    kind:    keeps entries of one kind
    """
    if kind is not None and kind not in record.kinds:
        raise ConfigError(f"record {record.directory} has no entry of kind {kind!r}; {_nearest(kind, record.kinds)}")
    wanted = _Request.find(record, request) if request is not None else None
    return _rows(record, wanted, kind)


def _rows(record: Record, wanted: _Request | None, kind: str | None) -> Iterator[Row]:
    programs: dict[bytes, Program] = {}
    for ledger, entry in merged_entries(record):
        if entry.kind == "register":
            program = decode_field(ledger, entry, "program", Program)
            programs[program.digest] = program
        is_wanted = wanted is None or wanted.concerns(ledger, entry)
        if is_wanted and kind in (None, entry.kind):
            text, facts = _described(ledger, entry, programs)
            yield Row(
                time_ns=entry.time_ns, actor=ledger.name, incarnation=ledger.incarnation, seq=entry.seq,
                kind=entry.kind, text=text, facts=facts,
            )  # fmt: skip


@attrs.define
class _Request:
    """Recognises the entries of one request, fed with all entries in order of time."""

    trace_id: str
    _steps: dict[str, set[int]] = attrs.field(factory=dict)  # by replica: the steps it is in, of the current life

    @classmethod
    def find(cls, record: Record, name: str) -> _Request:
        """By request id, or by a trace id of any request in a batch."""
        known: dict[str, str] = {}
        for _, entry in merged_entries(record):
            for row in entry.fields["rows"] if entry.kind == "batch" else ():
                known[row["request_id"]] = row["trace_id"]
        if name in known:
            return cls(known[name])
        if name in known.values():
            return cls(name)
        raise ConfigError(f"record {record.directory} has no request {name!r} in a batch; {_nearest(name, known)}")

    def concerns(self, ledger: LedgerFile, entry: Entry) -> bool:
        """Whether the entry belongs to the request. A dispatch does if its step's batch has a row of it."""
        if entry.kind == "batch":
            has_row = any(row["trace_id"] == self.trace_id for row in entry.fields["rows"])
            steps = self._steps.setdefault(ledger.name, set())
            (steps.add if has_row else steps.discard)(entry.fields["step_id"])
            return has_row
        if entry.kind == "dispatch":
            replica = f"replica.{ledger.name.split('.')[1]}"
            return entry.fields["step_id"] in self._steps.get(replica, ())
        return bool(entry.fields.get("trace_id") == self.trace_id)


def _described(ledger: LedgerFile, entry: Entry, programs: Mapping[bytes, Program]) -> tuple[str, dict[str, Any]]:
    """An entry in words and as data."""
    match entry.kind:
        case "message":
            return _message(entry.fields)
        case "batch":
            return _batch(entry.fields)
        case "register":
            program = decode_field(ledger, entry, "program", Program)
            facts = {
                "program": program.name,
                "digest": program.digest.hex(),
                "parameters": [p.name for p in program.params],
            }
            return f"{program.name} {program.digest.hex()[:_SHORT]}, {len(program.params)} parameters", facts
        case "alloc":
            tensor = decode_field(ledger, entry, "tensor", TensorSpec)
            what = f"weights of {tensor.source}" if tensor.source else f"{tensor.dtype}{list(tensor.shape)}"
            return f"resident {tensor.resident}: {what}", attrs.asdict(tensor)
        case "copy_to":
            value = decode_field(ledger, entry, "value", Arg)
            resident, shape = entry.fields["resident"], list(value.shape)
            return f"resident {resident}: {value.dtype}{shape}", {
                "resident": resident,
                "dtype": value.dtype,
                "shape": shape,
            }
        case "dispatch":
            return _dispatch(ledger, entry, programs)
        case _:
            facts = {name: value.hex() if isinstance(value, bytes) else value for name, value in entry.fields.items()}
            return " ".join(f"{name}={value}" for name, value in facts.items()), facts


def _message(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    arrow = "→" if fields["direction"] == "out" else "←"
    trace_id = "" if set(fields["trace_id"]) == {"0"} else f"  trace {fields['trace_id'][:_SHORT]}"
    what = f"{fields['kind'].lower()} {fields['type']}".rstrip()
    text = f"{arrow} {fields['peer']:<12} {what:<28} #{fields['correlation']}, {fields['body_bytes']} B{trace_id}"
    return text, {name: value for name, value in fields.items() if name != "kind"} | {"message_kind": fields["kind"]}


def _batch(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    parts = [
        f"{row['request_id']} {row['kind']} {row['start']}..{row['start'] + row['length'] - 1}"
        for row in fields["rows"]
    ]
    text = f"step {fields['step_id']}: {', '.join(parts)}; running {fields['running']}, waiting {fields['waiting']}"
    return text, dict(fields)


def _dispatch(ledger: LedgerFile, entry: Entry, programs: Mapping[bytes, Program]) -> tuple[str, dict[str, Any]]:
    dispatch = decode_field(ledger, entry, "dispatch", Dispatch)
    completion = decode_field(ledger, entry, "completion", Completion)
    program = programs.get(dispatch.program)
    name = program.name if program else dispatch.program.hex()[:_SHORT]
    params = program.params if program and len(program.params) == len(dispatch.args) else ()
    written = [param.name for param in params if param.direction is not Direction.IN]
    digests = [digest.hex() for digest in completion.digests]
    given = [_argument(param, arg) for param, arg in zip(params, dispatch.args, strict=False)]
    facts = {
        "dispatch_id": dispatch.dispatch_id,
        "step_id": dispatch.step_id,
        "program": name,
        "device_ns": completion.device_ns,
        "usage": attrs.asdict(completion.usage),
        "arguments": given,
        "digests": dict(zip(written, digests, strict=False)) if written else digests,
    }
    shown = " ".join(
        f"{argument['parameter']}=#{argument['resident']}" if "resident" in argument
        else f"{argument['parameter']}{argument['shape']}" for argument in given
    )  # fmt: skip
    text = f"#{dispatch.dispatch_id} of step {dispatch.step_id}: {name}, {completion.device_ns / 1e6:.3f} ms  {shown}"
    return text, facts


def _argument(param: Param, arg: Arg) -> dict[str, Any]:
    if arg.resident:
        return {"parameter": param.name, "resident": arg.resident}
    return {"parameter": param.name, "dtype": arg.dtype, "shape": list(arg.shape), "bytes": len(arg.data)}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    shown = ", ".join(list(known)[:8]) + (", …" if len(known) > 8 else "")
    return f"did you mean {near[0]!r}?" if near else f"it has {shown or 'none'}"
