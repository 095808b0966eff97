"""What the host application asks of a supervisor: the children to keep alive, in one file they all read.

Owns: nothing. Imports no bus, so that the supervisor can read it before anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import msgspec

from ..errors import ConfigError

__all__ = [
    "HOST", "ONE_FOR_ALL", "ONE_FOR_ONE", "REST_FOR_ONE", "ROUTER", "STRATEGIES", "SUPERVISOR", "TOKENIZER", "Boot",
    "ChildSpec",
]  # fmt: skip

HOST = "host"
SUPERVISOR = "supervisor"
TOKENIZER = "tokenizer.0"
ROUTER = "router"
GUESTS = "guest.*"  # as in bus.inbox, which is not to be imported here

ONE_FOR_ONE = "one_for_one"
REST_FOR_ONE = "rest_for_one"
ONE_FOR_ALL = "one_for_all"
STRATEGIES = (ONE_FOR_ONE, REST_FOR_ONE, ONE_FOR_ALL)
"""Who is restarted with a member of a group that died: nobody, those after it in the boot file, or all others."""


@attrs.frozen(kw_only=True)
class ChildSpec:
    """One child the supervisor keeps alive.

    In group ``""`` each child stands alone. Any other group restarts its members by its strategy
    (``Boot.strategies``), in the order of the boot file, and is given up as a whole.
    """

    name: str  # of its node on the bus
    kind: str  # key of kinds.ENTRIES
    group: str = ""
    connect: tuple[str, ...] = ()  # the nodes whose inboxes it connects to, besides the supervisor's
    preload: str = "light"  # key of kinds.PRELOADS: the warden that forks it
    config: dict[str, Any] = attrs.field(factory=dict)  # handed to the actor; what JSON can carry
    keeps_weights: bool = False  # gets config["weights_fd"]: a memory file, the same in all its lives
    start_timeout_s: float = 300.0  # from the request to start it until its ``Ready``


@attrs.frozen(kw_only=True)
class Boot:
    """Everything the supervisor is told: written by the host application as JSON, read by all processes below it."""

    run_dir: str
    host_pid: int
    children: tuple[ChildSpec, ...]
    strategies: dict[str, str] = attrs.field(factory=dict)  # by group, of STRATEGIES; rest_for_one if it names none
    max_restarts: int = 5  # of one child within window_s; one more and its group is given up
    window_s: float = 30.0
    stall_timeout_s: float = 10.0  # without an answer, or busy without progress, until a process is replaced
    close_timeout_s: float = 10.0  # for a stop nobody gave a budget: after a failed start, or on SIGTERM
    record: str | None = None
    seed: int = 0
    log_level: str = "warning"

    def check(self) -> None:
        """Raise ``ConfigError`` if the children do not form a tree the supervisor can start."""
        names = [spec.name for spec in self.children]
        if not names:
            raise ConfigError("a boot file names at least one child")
        for name in names:
            if names.count(name) > 1 or name in (HOST, SUPERVISOR):
                raise ConfigError(f"the name {name!r} is taken; children need names of their own")
        for spec in self.children:
            for other in spec.connect:
                if other != HOST and other not in names:
                    raise ConfigError(f"{spec.name} connects to {other!r}, which is no child and not the host")
        groups = {spec.group for spec in self.children} - {""}
        for group, strategy in self.strategies.items():
            if group not in groups:
                raise ConfigError(f"a strategy is given for group {group!r}, which has no members")
            if strategy not in STRATEGIES:
                raise ConfigError(f"group {group} has strategy {strategy!r}; known: {', '.join(STRATEGIES)}")

    def write(self) -> Path:
        """Write the boot file into the run directory; its path. Raises ``OSError``."""
        self.check()
        path = Path(self.run_dir) / "boot.json"
        path.write_bytes(msgspec.json.encode(self))
        return path

    def expected_by(self, name: str) -> frozenset[str]:
        """The nodes that connect to the node of that name, the supervisor and the host included."""
        if name == SUPERVISOR:
            return frozenset({*(spec.name for spec in self.children), GUESTS})
        callers = {spec.name for spec in self.children if name in spec.connect}
        return frozenset({*callers, SUPERVISOR} if name == HOST else callers)

    @classmethod
    def read(cls, path: Path) -> Boot:
        """Read a boot file. Raises ``ConfigError`` if it is none."""
        try:
            boot = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{path} is no boot file: {error}") from error
        boot.check()
        return boot

    def strategy(self, group: str) -> str:
        """How the members of a group are restarted."""
        return self.strategies.get(group, REST_FOR_ONE) if group else ONE_FOR_ONE

    def spec(self, name: str) -> ChildSpec | None:
        """The child of that name."""
        return next((spec for spec in self.children if spec.name == name), None)
