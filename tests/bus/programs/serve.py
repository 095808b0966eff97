"""A server node in a process of its own: ``serve.py RUN_DIR INCARNATION [RECORD_DIR]``. Ends at a polite stop."""

from __future__ import annotations

import sys
from pathlib import Path

from bus_actors import Server

from chipbus.bus import Node, NodeConfig

run_dir, incarnation, *record = sys.argv[1:]
config = NodeConfig(
    name="server", incarnation=int(incarnation), run_dir=Path(run_dir), record=Path(record[0]) if record else None
)
Node(config, Server()).run()
