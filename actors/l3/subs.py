"""Sub workers: host callables run beside the chips, on threads of their own.

Owns: the threads, started when first needed. A callable that hangs keeps its thread; another one takes its place.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

__all__ = ["SubPool", "ThreadSubs"]

Call = Callable[[], object]
OnDone = Callable[[BaseException | None], None]


class SubPool(Protocol):
    """Runs host callables. All methods are called on the bus thread, and so is ``on_done``."""

    @property
    def has_room(self) -> bool:
        """Whether a sub worker is free."""
        ...

    def submit(self, call: Call, on_done: OnDone) -> Callable[[], None]:
        """Run ``call`` on a free sub worker. The result gives it up: ``on_done`` is never called then."""
        ...

    def close(self) -> None:
        """Let every thread end as soon as it is idle. One that hangs cannot keep the interpreter alive."""
        ...

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Those that have not ended, to be joined after ``close``."""
        ...


class _Job:
    def __init__(self, call: Call, on_done: OnDone) -> None:
        self.call = call
        self.on_done = on_done
        self.is_over = False


class ThreadSubs:
    """``count`` daemon threads."""

    def __init__(self, count: int, post: Callable[[Callable[[], None]], None], inside: threading.local) -> None:
        """``inside.callback`` is true on a sub worker's thread while a callable runs."""
        self._free = count
        self._post = post
        self._inside = inside
        self._idle = 0  # threads that wait for a job
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    @property
    def has_room(self) -> bool:
        """See ``SubPool.has_room``."""
        return self._free > 0

    def submit(self, call: Call, on_done: OnDone) -> Callable[[], None]:
        """See ``SubPool.submit``."""
        job = _Job(call, on_done)
        self._free -= 1
        if self._idle:
            self._idle -= 1
        else:
            thread = threading.Thread(target=self._run, name="chipbus-sub", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._jobs.put(job)
        return lambda: self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        if not job.is_over:  # its thread is lost; the next job gets a new one
            job.is_over = True
            self._free += 1

    def _ended(self, job: _Job, error: BaseException | None) -> None:
        self._idle += 1
        if not job.is_over:
            job.is_over = True
            self._free += 1
            job.on_done(error)

    def _run(self) -> None:
        self._inside.callback = True
        while (job := self._jobs.get()) is not None:
            error: BaseException | None = None
            try:
                job.call()
            except BaseException as raised:  # noqa: BLE001 (a host callable may raise anything; its run must hear of it)
                error = raised
            self._post(lambda job=job, error=error: self._ended(job, error))  # type: ignore[misc]
            del job, error  # an idle thread must not keep a run's arrays alive

    def close(self) -> None:
        """See ``SubPool.close``."""
        for _ in self._threads:
            self._jobs.put(None)

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """See ``SubPool.threads``."""
        return tuple(thread for thread in self._threads if thread.is_alive())
