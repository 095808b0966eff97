"""``bus-run bench bus``: what messages between two processes cost, beside bare sockets and other message systems.

Owns: the processes it measures. Each round measures every system once, so that a machine's moods meet all of them.
"""

from __future__ import annotations

import contextlib
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import click

from ..actors.logs import configure_logging
from ..actors.messages.serving import Submit
from ..actors.sampling import SamplingParams
from ..bus import decode, encode, pack_tokens
from ..bus.bench_bare import BarePair
from ..bus.bench_nodes import NodePair
from ..bus.registry import type_of
from .bench_burners import burning
from .bench_figures import OURS, Aim, Row, as_json, as_table, at_least, at_most, command_line, compared, today
from .bench_lines import Peer, named
from .benchmarks import answering, machine

__all__ = ["Scale", "bus", "messages"]

_BARE, _QUEUE, _SIMPLE, _XOSCAR, _RAY = "bare sockets", "mp.Queue", "mp.SimpleQueue", "xoscar", "Ray"
_PROGRAMS = {_QUEUE: "Queue", _SIMPLE: "SimpleQueue", _XOSCAR: "xoscar", _RAY: "ray"}
_FOREIGN = (_XOSCAR, _RAY)  # run by the interpreter of --peers
_SMALL, _LARGE, _ARRAY = 64, 4096, 16 * 2**20  # bytes
_PROMPT_TOKENS = 512

Samples = dict[tuple[str, str], list[float]]
"""(what, system) → one number per round."""


@attrs.frozen(kw_only=True)
class Scale:
    """How much of everything one round does. The defaults are what is quoted."""

    asks: int = 2000
    peer_asks: int = 1000  # of systems that take longer
    slices: int = 10  # of the asks of one round, in which the systems alternate
    many: int = 20_000
    peer_many: int = 3200
    in_flight: int = 64
    notes: int = 200_000
    peer_notes: int = 10_000
    arrays: int = 20
    codec: int = 2000
    warm_ups: int = 1  # rounds before those that count


def bus(rounds: int, *, peers: str, lives: bool, json_file: Path | None) -> None:
    """Print what messages cost and, with ``lives``, what processes do. ``peers``: an interpreter that has xoscar, Ray.

    ``json_file``: also write every value of every round there.
    """
    configure_logging("error", "bench")
    where = machine()
    click.echo(f"{where}; {today()}; {command_line()}; medians over {rounds} interleaved rounds")
    rows = messages(rounds, Scale(), peers)
    click.echo(as_table(rows))
    if lives:
        from .lives_bench import Lives, processes

        found = processes(rounds, Lives(), peers)
        click.echo("")
        click.echo(as_table(found))
        rows += found
    if json_file is not None:
        json_file.write_bytes(as_json(where, rounds, rows))


def messages(rounds: int, scale: Scale, peers: str | None) -> list[Row]:
    """Measure. ``peers``: as for ``bus``; None leaves the other systems out."""
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        run_dir = Path(name)
        stack.enter_context(answering("nodes", run_dir))
        ours = NodePair(run_dir)
        stack.callback(ours.close)
        stack.enter_context(answering("bare", run_dir))
        bare = BarePair(run_dir)
        stack.callback(bare.close)
        others: dict[str, Peer] = {}
        if peers is not None:
            for system, program in _PROGRAMS.items():
                others[system] = Peer(peers if system in _FOREIGN else sys.executable, program)
                stack.callback(others[system].close)
        for number in range(scale.warm_ups + rounds):
            found = dict(_round(ours, bare, others, scale))
            if number >= scale.warm_ups:
                for key, value in found.items():
                    samples.setdefault(key, []).append(value)
        why_not = {system: peer.why_not for system, peer in others.items()}
    return named(_rows(samples, why_not), others)


def _round(
    ours: NodePair, bare: BarePair, others: Mapping[str, Peer], scale: Scale
) -> Iterator[tuple[tuple[str, str], float]]:
    pairs: dict[str, NodePair | BarePair] = {OURS: ours, _BARE: bare}
    for what, nbytes in (("ask", _SMALL), ("large ask", _LARGE)):
        yield from _asks(what, nbytes, pairs, others, scale)
    for system, pair in pairs.items():
        yield ("many", system), scale.many / pair.many_s(scale.many, scale.in_flight, _SMALL)
        yield ("notes", system), scale.notes / pair.notes_s(scale.notes, _SMALL)
        yield ("array", system), statistics.median(pair.arrays(scale.arrays, _ARRAY)) / 1e6
    for system, peer in others.items():
        if system in _FOREIGN and (took := peer.ask("many", _SMALL, scale.peer_many, scale.in_flight)) is not None:
            yield ("many", system), scale.peer_many / took[0]
        if (took := peer.ask("notes", _SMALL, scale.peer_notes)) is not None:
            yield ("notes", system), scale.peer_notes / took[0]
        if system not in _FOREIGN and (took := peer.ask("array", _ARRAY, max(1, scale.arrays // 5))) is not None:
            yield ("array", system), statistics.median(took) / 1e6
    yield from _codecs(scale.codec)
    for nice in (5, 0):
        with burning(nice):
            yield from _asks(f"busy {nice}", _SMALL, pairs, {}, scale)


def _asks(
    what: str, nbytes: int, pairs: Mapping[str, NodePair | BarePair], others: Mapping[str, Peer], scale: Scale
) -> Iterator[tuple[tuple[str, str], float]]:
    """Median and 99th percentile of single asks, µs."""
    took_ns: dict[str, list[float]] = {}
    for _ in range(scale.slices):
        for system, pair in pairs.items():
            took_ns.setdefault(system, []).extend(pair.measure(scale.asks // scale.slices, nbytes))
        for system, peer in others.items():
            took = peer.ask("ask", nbytes, scale.peer_asks // scale.slices)
            if took is not None:
                took_ns.setdefault(system, []).extend(took)
    for system, values in took_ns.items():
        values.sort()
        yield (f"{what} p50", system), statistics.median(values) / 1e3
        yield (f"{what} p99", system), values[int(0.99 * (len(values) - 1))] / 1e3


def _codecs(count: int) -> Iterator[tuple[tuple[str, str], float]]:
    """Microseconds to encode and decode a request of 512 tokens, and to pickle and unpickle it."""
    ids = list(range(1000, 1000 + _PROMPT_TOKENS))
    params = SamplingParams(max_tokens=128, temperature=0.7, seed=1)
    request = Submit(request_id="req-1", prompt_token_ids=pack_tokens(ids), params=params)
    type_id = type_of(request).type_id
    as_list = attrs.evolve(request, prompt_token_ids=ids)  # type: ignore[arg-type]  # as a program without pack_tokens

    def pickled(value: object) -> object:
        return pickle.loads(pickle.dumps(value, protocol=5))  # noqa: S301 (our own bytes)

    works: dict[str, Callable[[], object]] = {
        OURS: lambda: decode(type_id, encode(request)),
        "pickle5, the same object": lambda: pickled(request),
        "pickle5, its ids as a list": lambda: pickled(as_list),
    }
    for system, work in works.items():
        began_s = time.perf_counter()
        for _ in range(count):
            work()
        yield ("codec", system), 1e6 * (time.perf_counter() - began_s) / count


# What it comes to.


def _rows(samples: Samples, why_not: Mapping[str, str]) -> list[Row]:
    def block(what: str, figure: str, unit: str, aim: Aim | None = None, **aims: Aim) -> list[Row]:
        """One figure of all systems. ``aims`` are for our ratio to another: ``bare``, ``xoscar``, ``ray``."""
        others: dict[str, Sequence[float] | str] = {}
        for (measured, system), values in samples.items():
            if measured == what and system != OURS and not why_not.get(system):
                others[system] = values
        if what.split()[0] in ("ask", "large", "many", "notes"):
            others.update({system: reason for system, reason in why_not.items() if reason and system in _FOREIGN})
        names = {"bare": _BARE, "xoscar": _XOSCAR, "ray": _RAY}
        return compared(
            figure, unit, samples[what, OURS], others, aim=aim, aims={names[key]: value for key, value in aims.items()}
        )  # fmt: skip

    def ratio(figure: str, of: str, to: str, to_system: str, aim: Aim, system: str = OURS) -> Row:
        """One figure of a system over another one, round by round."""
        values = tuple(a / b for a, b in zip(samples[of, system], samples[to, to_system], strict=True))
        return Row(figure=figure, system=system, unit="×", values=values, aim=aim)

    rows = [
        *block("ask p50", "ask of 64 B, p50", "µs", bare=at_most(1.6), xoscar=at_most(0.6), ray=at_most(0.13)),
        *block("ask p99", "ask of 64 B, p99", "µs", xoscar=at_most(0.5)),
        ratio("ask of 64 B, p99 ÷ bare p50", "ask p99", "ask p50", _BARE, at_most(2.2)),
        *block("large ask p50", "ask of 4 KiB, p50", "µs"),
        *block("large ask p99", "ask of 4 KiB, p99", "µs"),
        *block("many", "asks, 64 in flight", "/s", at_least(150_000), bare=at_least(1.0), xoscar=at_least(9)),
        *block("notes", "one-way, 64 B", "/s", at_least(1_000_000), bare=at_least(2.4), xoscar=at_least(50)),
        *_codec_rows(block("codec", "request of 512 tokens, encode + decode", "µs", at_most(4))),
        *block("array", "array of 16 MiB, every page read", "ms", at_most(0.2)),
    ]
    for nice, aim in ((5, at_most(2.0)), (0, None)):
        figure = f"ask p99, cores busy at nice +{nice}, ÷ idle p99"
        for system in (OURS, _BARE):
            row = ratio(figure, f"busy {nice} p99", "ask p99", system, at_most(2.0), system)
            rows.append(attrs.evolve(row, aim=aim if system == OURS else None))
        rows += block(f"busy {nice} p50", f"ask p50, cores busy at nice +{nice}", "µs")
        rows += block(f"busy {nice} p99", f"ask p99, cores busy at nice +{nice}", "µs")
    return rows


def _codec_rows(rows: list[Row]) -> list[Row]:
    """With the same aim for the ratio to each way of pickling."""
    return [attrs.evolve(row, aim=at_most(0.12)) if row.ratios else row for row in rows]
