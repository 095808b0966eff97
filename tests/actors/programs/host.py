"""A host application that is going to be killed. Prints its run directory and every pid of its tree once it is ready.

Arguments: "gil" makes chips hold their interpreter's lock; "early" prints before anything is ready; "leak" gives a copy
of the tether to a process that outlives this one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from supervised import Host, tree_of_four, worker

from chipbus.actors.messages.tree import TreeReady


def main() -> None:
    chips = [worker(f"chip.0.{index}", "replica.0", group="replica.0", gil="gil" in sys.argv) for index in (1, 2, 3, 4)]
    host = Host(*tree_of_four(), *chips)
    if "early" not in sys.argv:
        host.hear(TreeReady)
    if "leak" in sys.argv:
        subprocess.Popen(["sleep", "60"], pass_fds=(host.handle.tether.write_fd,))
    print(host.directory.path, flush=True)
    while True:
        signal.pause()


main()
