"""The log of a child: one line per event, and never a reason to stop."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOG = """
import structlog
from chipbus.actors.logs import configure_logging
configure_logging("info", "router")
log = structlog.get_logger()
log.debug("not.shown")
log.info("child.exited", child="chip.0.0", is_forked=True, reason="no room")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it.failed")
for _ in range({count}):
    log.info("again", text="x" * 5000)
print("done")
"""


def test_an_event_is_one_line_with_its_facts_and_a_failure_brings_its_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOG.format(count=0)], capture_output=True, text=True, timeout=30, check=True
    )

    first, second, *trace = done.stderr.splitlines()
    assert first.split(" ", 1)[1] == (
        'level=info process=router event=child.exited child=chip.0.0 is_forked=true reason="no room"'
    )
    assert second.split(" ", 1)[1] == "level=error process=router event=it.failed"
    assert trace[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.guarantee("S16")
def test_a_log_that_nobody_reads_neither_blocks_nor_fails() -> None:
    for is_gone in (False, True):
        read_fd, write_fd = os.pipe()
        if is_gone:
            os.close(read_fd)
        command = [sys.executable, "-P", "-c", LOG.format(count=100)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write_fd, text=True, timeout=30, check=True)
        os.close(write_fd)
        if not is_gone:
            os.close(read_fd)

        assert done.stdout == "done\n"
