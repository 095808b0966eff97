"""A server node that listens for other hosts: ``far.py RUN_DIR ADDRESS AHEAD_S``; its keys come as JSON on a line.

Its clock is ``ahead_s`` seconds ahead of this machine's, as another host's would be. For each further line it prints
its counters, and it ends with its input.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import attrs
from bus_actors import Server

from chipbus.actors.logs import configure_logging
from chipbus.bus import CurveKeys, Node, NodeConfig, SystemClock, TcpInbox


@attrs.frozen
class OtherClock(SystemClock):
    """Another host's."""

    ahead_ns: int

    def now_ns(self) -> int:
        """As that host counts it."""
        return super().now_ns() + self.ahead_ns


class Far(Server):
    """Reads its input on a thread of its own."""

    def on_start(self) -> None:
        """The inbox is bound."""
        print("up", flush=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for _ in sys.stdin:
            self.ctx.call_soon_threadsafe(lambda: print(json.dumps(self.ctx.counters()), flush=True))
        self.ctx.call_soon_threadsafe(self.ctx.stop)


configure_logging("debug", "far")
_, run_dir, address, ahead_s = sys.argv
given = json.loads(sys.stdin.readline())
tcp = TcpInbox(
    address=address,
    keys=CurveKeys(given["public"].encode(), given["secret"].encode()),
    peers={name: key.encode() for name, key in given["peers"].items()},
)
print(repr(tcp), file=sys.stderr)
config = NodeConfig(name="server", incarnation=1, run_dir=Path(run_dir), tcp=tcp)
Node(config, Far(), OtherClock(int(float(ahead_s) * 1e9))).run()
