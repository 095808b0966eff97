"""Message systems of others, measured in a process and an environment of their own: ``python bench_peers.py SYSTEM``.

Such an environment: ``python3 -m venv PEERS && PEERS/bin/pip install xoscar uvloop ray``.

Owns: one system, with one receiving process of it. Imports nothing of ours, so that any interpreter can run it. Every
system has its default settings. Prints ``ready NAME`` or ``missing REASON``, then answers each line of stdin with a
line of numbers, until stdin ends:

    ask BYTES COUNT               nanoseconds of each round trip
    many BYTES COUNT IN_FLIGHT    seconds for COUNT round trips
    notes BYTES COUNT             seconds until COUNT one-way messages have been received
    array BYTES COUNT             nanoseconds of each array, until the receiver has read every page of it
    crash                         the receiver's pid; then, after it was killed, nanoseconds on CLOCK_MONOTONIC when a
                                  pending ask failed, and when the receiver's next life answered
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

_PAGE_BYTES = 4096
_RETRY_S = 0.002
_GIVE_UP_S = 60.0

Answer = list[int] | list[float]


def touched(array: Any) -> int:
    """Read a byte of each page."""
    return int(array[::_PAGE_BYTES].sum())


# multiprocessing


def _mp_receiver(inbox: Any, outbox: Any) -> None:
    notes = 0
    while (item := inbox.get()) is not None:
        kind, body = item
        if kind == "note":
            notes += 1
        elif kind == "fence":
            outbox.put(notes)
            notes = 0
        elif kind == "array":
            outbox.put(touched(body))
        else:
            outbox.put(body)


class Queues:
    """A pair of queues to a forked process, both of the same kind."""

    def __init__(self, kind: str) -> None:
        context = multiprocessing.get_context("fork")
        self.name = f"mp.{kind}"
        self._there, self._back = getattr(context, kind)(), getattr(context, kind)()
        self._process = context.Process(target=_mp_receiver, args=(self._there, self._back), daemon=True)
        self._process.start()

    def ask(self, payload_bytes: int, count: int) -> list[int]:
        return self._round_trips(("echo", bytes(payload_bytes)), count)

    def notes(self, payload_bytes: int, count: int) -> list[float]:
        note = ("note", bytes(payload_bytes))
        began_s = time.perf_counter()
        for _ in range(count):
            self._there.put(note)
        self._there.put(("fence", None))
        assert self._back.get() == count
        return [time.perf_counter() - began_s]

    def array(self, nbytes: int, count: int) -> list[int]:
        array = importlib.import_module("numpy").ones(nbytes, "uint8")
        return self._round_trips(("array", array), count)

    def _round_trips(self, item: tuple[str, Any], count: int) -> list[int]:
        took_ns = []
        for _ in range(count):
            began_ns = time.perf_counter_ns()
            self._there.put(item)
            self._back.get()
            took_ns.append(time.perf_counter_ns() - began_ns)
        return took_ns

    def close(self) -> None:
        self._there.put(None)
        self._process.join(10)


# xoscar


class Receiver:
    """What the receiving actor does; a class of each system is made of it."""

    def __init__(self) -> None:
        self._notes = 0

    def echo(self, payload: bytes) -> bytes:
        return payload

    def note(self, payload: bytes) -> None:
        self._notes += 1

    def fence(self) -> int:
        notes, self._notes = self._notes, 0
        return notes

    def pid(self) -> int:
        return os.getpid()

    def stay(self) -> None:
        time.sleep(_GIVE_UP_S)


try:
    _xoscar: Any = importlib.import_module("xoscar") if sys.argv[1:] == ["xoscar"] else None
except ImportError:
    _xoscar = None
if _xoscar is not None:  # also in the pool's process, which imports this file again with the same arguments

    class XoscarReceiver(Receiver, _xoscar.Actor):  # type: ignore[misc]
        """At module level, where the pool's process can find it."""


class Xoscar:
    """An actor in the one sub-pool process of an actor pool, asked from the main pool on uvloop."""

    def __init__(self) -> None:
        self.name = f"xoscar {version('xoscar')}"
        self._loop = importlib.import_module("uvloop").new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._run(self._start())

    def _run(self, work: Awaitable[Any]) -> Any:
        return self._loop.run_until_complete(work)

    async def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._pool = await _xoscar.create_actor_pool(address, n_process=1)
        self._actor = await _xoscar.create_actor(
            XoscarReceiver, address=address, uid="receiver", allocate_strategy=_xoscar.allocate_strategy.ProcessIndex(1)
        )

    def ask(self, payload_bytes: int, count: int) -> list[int]:
        return self._round_trips(self._actor.echo, bytes(payload_bytes), count)

    def many(self, payload_bytes: int, count: int, in_flight: int) -> list[float]:
        async def one(payload: bytes) -> None:
            for _ in range(count // in_flight):
                await self._actor.echo(payload)

        async def all_of_them() -> float:
            began_s = time.perf_counter()
            await asyncio.gather(*(one(bytes(payload_bytes)) for _ in range(in_flight)))
            return (time.perf_counter() - began_s) * count / (count // in_flight * in_flight)

        return [self._run(all_of_them())]

    def notes(self, payload_bytes: int, count: int) -> list[float]:
        async def all_of_them() -> float:
            payload = bytes(payload_bytes)
            began_s = time.perf_counter()
            for _ in range(count):
                await self._actor.note.tell(payload)
            assert await self._actor.fence() == count
            return time.perf_counter() - began_s

        return [self._run(all_of_them())]

    def _round_trips(self, method: Any, argument: Any, count: int) -> list[int]:
        async def all_of_them() -> list[int]:
            took_ns = []
            for _ in range(count):
                began_ns = time.perf_counter_ns()
                await method(argument)
                took_ns.append(time.perf_counter_ns() - began_ns)
            return took_ns

        took_ns: list[int] = self._run(all_of_them())
        return took_ns

    def crash(self, tell_pid: Callable[[int], None]) -> list[int]:
        async def outlive() -> list[int]:
            pid = await self._actor.pid()
            pending = asyncio.ensure_future(self._actor.stay())
            await asyncio.sleep(0.1)  # until it has arrived
            tell_pid(pid)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(pending, _GIVE_UP_S)
            failed_ns, give_up_s = time.monotonic_ns(), time.monotonic() + _GIVE_UP_S
            while time.monotonic() < give_up_s:
                with contextlib.suppress(Exception):
                    if await asyncio.wait_for(self._actor.pid(), 1.0) != pid:
                        return [failed_ns, time.monotonic_ns()]
                await asyncio.sleep(_RETRY_S)
            raise TimeoutError("the actor did not come back")

        answer: list[int] = self._run(outlive())
        return answer

    def close(self) -> None:
        self._run(self._pool.stop())


# Ray


class Ray:
    """An actor on a local Ray of two processors."""

    def __init__(self) -> None:
        ray = self._ray = importlib.import_module("ray")
        self.name = f"Ray {version('ray')}"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._actor = ray.remote(Receiver).options(max_restarts=-1).remote()
        ray.get(self._actor.pid.remote())

    def ask(self, payload_bytes: int, count: int) -> list[int]:
        payload, took_ns = bytes(payload_bytes), []
        for _ in range(count):
            began_ns = time.perf_counter_ns()
            self._ray.get(self._actor.echo.remote(payload))
            took_ns.append(time.perf_counter_ns() - began_ns)
        return took_ns

    def many(self, payload_bytes: int, count: int, in_flight: int) -> list[float]:
        payload = bytes(payload_bytes)
        waiting: deque[Any] = deque()
        began_s = time.perf_counter()
        for _ in range(count):
            if len(waiting) == in_flight:
                self._ray.get(waiting.popleft())
            waiting.append(self._actor.echo.remote(payload))
        self._ray.get(list(waiting))
        return [time.perf_counter() - began_s]

    def notes(self, payload_bytes: int, count: int) -> list[float]:
        payload = bytes(payload_bytes)
        began_s = time.perf_counter()
        for _ in range(count):
            self._actor.note.remote(payload)
        assert self._ray.get(self._actor.fence.remote()) == count
        return [time.perf_counter() - began_s]

    def crash(self, tell_pid: Callable[[int], None]) -> list[int]:
        pid = self._ray.get(self._actor.pid.remote())
        pending = self._actor.stay.remote()
        time.sleep(0.1)  # until it has arrived
        tell_pid(pid)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(pending, timeout=_GIVE_UP_S)
        failed_ns, give_up_s = time.monotonic_ns(), time.monotonic() + _GIVE_UP_S
        while time.monotonic() < give_up_s:
            with contextlib.suppress(self._ray.exceptions.RayError):
                if self._ray.get(self._actor.pid.remote(), timeout=_GIVE_UP_S) != pid:
                    return [failed_ns, time.monotonic_ns()]
            time.sleep(_RETRY_S)
        raise TimeoutError("the actor did not come back")

    def close(self) -> None:
        self._ray.shutdown()


def _made(system: str) -> Any:
    if system == "xoscar":
        return Xoscar()
    return Ray() if system == "ray" else Queues(system)


def main() -> None:
    """Serve the protocol above for one system: "Queue", "SimpleQueue", "xoscar" or "ray"."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a system prints is no answer

    def say(*words: object) -> None:
        print(*words, file=out, flush=True)

    try:
        running = _made(sys.argv[1])
    except ImportError as error:
        say("missing", error)
        return
    say("ready", running.name)
    for line in sys.stdin:
        what, *numbers = line.split()
        arguments = [say] if what == "crash" else [int(number) for number in numbers]
        try:
            say(*getattr(running, what)(*arguments))
        except Exception as error:  # noqa: BLE001 (whatever a system raises is its answer)
            say("failed", type(error).__name__, str(error).replace("\n", " ")[:200])
    running.close()


if __name__ == "__main__":
    main()
