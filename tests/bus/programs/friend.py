"""A well-behaved peer in a process of its own: ``friend.py RUN_DIR``. Per line of its input it asks for a number."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from bus_actors import Asker, Number

from chipbus.bus import Actor, Node, NodeConfig
from chipbus.errors import ChipbusError


class Friend(Asker):
    """Prints "up", then an answer or an error for each line."""

    def on_peer_up(self, name: str) -> None:
        """Lines are read on a thread of their own and asked on the bus's."""
        print("up", flush=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            number = int(line)
            self.ctx.call_soon_threadsafe(lambda number=number: self._put(number))
        self.ctx.call_soon_threadsafe(self.ctx.stop)

    def _put(self, number: int) -> None:
        def say(answer: Number | ChipbusError) -> None:
            print(answer.value if isinstance(answer, Number) else repr(answer), flush=True)

        self.ctx.ask("server", Number(number), timeout_s=20, on_reply=say, on_error=say)


actor: Actor = Friend()
node = Node(NodeConfig(name="friend", incarnation=1, run_dir=Path(sys.argv[1])), actor)
node.connect("server", 1)
node.run()
