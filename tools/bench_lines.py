"""Our end of ``bench_peers.py``: another message system, asked for its figures line by line.

Owns: the peer's process, from ``start`` to ``close``.
"""

from __future__ import annotations

import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from ..errors import WorkerError
from .bench_figures import Row

__all__ = ["Peer", "named"]

_SCRIPT = Path(__file__).with_name("bench_peers.py")
_ANSWER_S = 120.0
_END_S = 20.0


class Peer:
    """One system in a process of its own. ``why_not`` is empty while it can be asked; its answers are numbers."""

    def __init__(self, python: str, system: str) -> None:
        """Start it in the environment of the interpreter ``python``. Raises ``WorkerError`` if that is none."""
        self.name = system
        self.why_not = ""
        try:
            # -P: the script lies beside modules whose names others use too
            self._process = subprocess.Popen(  # noqa: S603 (the interpreter the user names)
                [python, "-P", str(_SCRIPT), system],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise WorkerError(f"{python} cannot be run: {error.strerror}") from error
        word, _, rest = self._read().partition(" ")
        if word == "ready":
            self.name = rest
        else:
            self.why_not = "not installed" if word == "missing" else "does not start"

    def ask(self, *words: object) -> tuple[float, ...] | None:
        """What it answers to one line; None if it could not, now or before."""
        return self._parsed(self.say(*words))

    def say(self, *words: object) -> str:
        """The answer to one line, as it is."""
        if self.why_not:
            return ""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(" ".join(map(str, words)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return "failed: it has ended"
        return self._read()

    def further(self) -> tuple[float, ...] | None:
        """A second answer to the same line."""
        return self._parsed(self._read())

    def _parsed(self, line: str) -> tuple[float, ...] | None:
        if self.why_not:
            return None
        try:
            return tuple(map(float, line.split()))
        except ValueError:
            self.why_not = line or "it has ended"
            return None

    def _read(self) -> str:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], _ANSWER_S)
        return self._process.stdout.readline().strip() if readable else f"failed: silent for {_ANSWER_S:g} s"

    def close(self) -> None:
        """End it, by force if it does not by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def named(rows: Sequence[Row], peers: Mapping[str, Peer]) -> list[Row]:
    """The rows with each peer's version."""
    names = {system: peer.name for system, peer in peers.items() if not peer.why_not}
    return [attrs.evolve(row, system=names.get(row.system, row.system)) for row in rows]
