"""Faults a null chip has on purpose: which, when, and schedules of them drawn by seed.

Owns nothing; values only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs

from ..errors import ConfigError

__all__ = ["FAULT_KINDS", "Fault"]

FAULT_KINDS = ("fail", "die", "hang", "stop", "slow", "corrupt", "refuse_alloc")
"""What can go wrong on a null chip."""


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong at the ``dispatch``-th launch of a chip, counted from 1. Checked when made: ``ConfigError``.

    fail: ``CoreException``, nothing written. die: the process ends with exit code 13. hang: the launch does not return
    until the chip is closed. stop: the process stops itself (SIGSTOP) and goes on when somebody continues it. slow: it
    takes ``factor`` times its modelled time. corrupt: the first byte of a tile it writes is inverted. refuse_alloc: the
    ``dispatch``-th allocation, not launch, is refused as if memory were short.

    ``task``: the task of a tile program's graph it happens at (the last one, if there are fewer); None: the launch as
    a whole. What does not end the launch is told in ``Completion.fault``.
    """

    kind: str
    dispatch: int = 1
    task: int | None = None
    factor: float = 1.0

    def __attrs_post_init__(self) -> None:
        if self.kind not in FAULT_KINDS or self.dispatch < 1:
            raise ConfigError(
                f"fault {self.kind!r} at dispatch {self.dispatch}: expected {', '.join(FAULT_KINDS[:-1])} or"
                f" {FAULT_KINDS[-1]} at 1 or later"
            )
        if self.task is not None and (self.task < 0 or self.kind == "refuse_alloc"):
            raise ConfigError(f"fault {self.kind!r} at task {self.task}: tasks of a launch are counted from 0")
        if not self.factor > 0:
            raise ConfigError(f"fault {self.kind!r} with factor {self.factor}: expected a number above 0")

    @classmethod
    def schedule(
        cls, seed: int, *, launches: int, count: int, kinds: Sequence[str] = ("fail", "slow", "corrupt"), tasks: int = 0
    ) -> tuple[Fault, ...]:
        """``count`` faults at different ones of the first ``launches`` launches; equal seeds give equal faults.

        With ``tasks`` above 0, each is at one of the first so many tasks. Slow ones are 2 to 10 times slower.
        """
        if not 0 <= count <= launches:
            raise ConfigError(f"{count} faults in {launches} launches: each launch has one at most")
        chance = random.Random(seed)  # noqa: S311 (not for secrets: it must repeat)
        faults = []
        for dispatch in sorted(chance.sample(range(1, launches + 1), count)):
            kind = chance.choice(list(kinds))
            task = chance.randrange(tasks) if tasks and kind != "refuse_alloc" else None
            faults.append(cls(kind=kind, dispatch=dispatch, task=task, factor=round(chance.uniform(2, 10), 2)))
        return tuple(faults)
