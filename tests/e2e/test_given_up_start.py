"""A start that is cancelled ends soon, however far it is, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import psutil
import pytest

from chipbus import AsyncEngine
from support import eventually, our_processes, run_directories


def supervisors() -> set[int]:
    """Those that run their own program already: this process waits for that, so none may be stopped before."""
    found = set()
    for pid in our_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "chipbus.actors.supervise" in psutil.Process(pid).cmdline():
                found.add(pid)
    return found


@pytest.mark.slow
@pytest.mark.guarantee("H24")
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_cancelled_start_ends_long_before_its_timeout(is_stopped: bool) -> None:
    """Also if the supervisor answers nothing any more: it is stopped here, so the start could not end by itself."""
    before, directories = our_processes(), run_directories()

    async def start_and_cancel() -> None:
        engine = AsyncEngine("demo", chip="null", start_timeout_s=600, close_timeout_s=1)
        start = asyncio.ensure_future(engine.__aenter__())
        if is_stopped:
            await asyncio.to_thread(eventually, lambda: supervisors() > set(), "there is a supervisor")
            for pid in supervisors():
                os.kill(pid, signal.SIGSTOP)
        else:
            await asyncio.to_thread(eventually, lambda: run_directories() > directories, "it has begun")
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(start, 40)

    asyncio.run(start_and_cancel())

    eventually(lambda: our_processes() <= before, "every process is gone")
    eventually(lambda: run_directories() <= directories, "every run directory is gone")
