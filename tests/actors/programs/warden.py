"""A real warden, or a child executed by one, whose children run the actors below instead of chipbus's own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from chipbus.actors import processes
from chipbus.actors.messages.tree import GroupLost, ReplicaStatistics, ReplicaStatisticsRequest, StartError
from chipbus.actors.warden import serve
from chipbus.bus import Actor, Call, Progress, Ready, handles
from chipbus.errors import CheckpointError

PROGRAMS = Path(__file__).parent


class Silent(Actor):
    """Never gets as far as the bus."""

    def __init__(self, config: dict[str, Any]) -> None:
        if "ready_file" in config:
            Path(config["ready_file"]).write_text(f"{os.getpid()} {os.nice(0)} {Path('/proc/self/comm').read_text()}")
        if config.get("leaves_a_grandchild"):
            grandchild = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            Path(config["ready_file"]).write_text(str(grandchild.pid))
        while True:
            signal.pause()


class Brief(Actor):
    """Ends as soon as it is made."""

    def __init__(self, config: dict[str, Any]) -> None:
        os._exit(config["code"])


class Refusing(Actor):
    """Cannot start, and says why."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("untyped"):
            raise ZeroDivisionError("x" * 10_000)
        raise CheckpointError("no config.json in /models/none")


class Listing(Actor):
    """Writes down what it inherited."""

    def __init__(self, config: dict[str, Any]) -> None:
        fds = sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        Path(config["ready_file"]).write_text(f"{fds}|{os.getsid(0) == os.getpid()}|{processes.count_threads()}")
        os._exit(0)


class Multiplying(Actor):
    """Computes with two threads in a child forked after ``import torch``."""

    def __init__(self, config: dict[str, Any]) -> None:
        torch = sys.modules["torch"]  # imported by the warden, or this fails
        torch.set_num_threads(2)
        product = torch.sigmoid(torch.ones(512, 512) @ torch.ones(512, 512))
        os._exit(0 if float(product.sum()) == 512 * 512 else 3)


class Worker(Actor):
    """Says hello, is ready, writes a diary of its peers; misbehaves as its configuration asks."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.asked = 0
        if config.get("ignores_sigterm"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def note(self, *words: object) -> None:
        if "diary" in self.config:
            with Path(self.config["diary"]).open("a") as diary:
                diary.write(" ".join(map(str, (self.ctx.name, self.ctx.incarnation, *words))) + "\n")

    def on_start(self) -> None:
        self.note("start", os.getpid())
        if "weights_fd" in self.config:
            fd = self.config["weights_fd"]
            found = os.pread(fd, 100, 0).decode()
            self.note("weights", os.fstat(fd).st_ino, f"left by {found}")
            os.pwrite(fd, f"{found}{self.ctx.name} {self.ctx.incarnation}, ".encode(), 0)
        if self.ctx.incarnation in self.config.get("die_in", ()):
            os._exit(9)
        if "refuse" in self.config:
            raise CheckpointError(self.config["refuse"])
        if "say_failure" in self.config:
            self.ctx.tell("supervisor", StartError("ConfigError", self.config["say_failure"]))
        elif not self.config.get("never_ready"):
            self.ctx.tell("supervisor", Progress("weights", 1, 2, "bytes"))
            self.ctx.tell("supervisor", Ready(0.25, "here"))
        if self.config.get("gil") and self.ctx.incarnation == 1:
            self.ctx.after(0.05, lambda: ctypes.PyDLL(None).sleep(60) and None)

    def progress(self) -> int:
        """Moves only if it is slow: once for every other question."""
        self.asked += 1
        return self.asked // 2 if self.config.get("busy") == "slow" else 0

    def is_busy(self) -> bool:
        return "busy" in self.config and self.ctx.incarnation == 1

    def on_stop(self) -> None:
        self.note("stop")
        if self.config.get("holds_stop"):
            self.ctx.hold_stop()

    def on_peer_up(self, name: str) -> None:
        self.note("up", name, self.ctx.peers()[name])

    def on_peer_down(self, name: str, reason: str) -> None:
        self.note("down", name, reason)

    @handles(GroupLost)
    def _lost(self, message: GroupLost, _: object) -> None:
        self.note("lost", message.child)

    @handles(ReplicaStatisticsRequest)
    def _statistics(self, _: ReplicaStatisticsRequest, call: Call) -> None:
        if self.config.get("mute"):
            return
        call.reply(
            ReplicaStatistics(
                replica=int(self.ctx.name.split(".")[1]), pages_total=8, pages_free=8, running=0, waiting=0, steps=0,
                tokens_generated=0, prompt_tokens=0, step_ns=0, device_ns=0,
            )
        )  # fmt: skip


ACTORS = (Worker, Silent, Brief, Refusing, Listing, Multiplying)
ENTRIES = {cls.__name__.lower(): f"__main__:{cls.__name__}" for cls in ACTORS}
ENTRIES["replica"] = ENTRIES["worker"]
PRELOADS = {
    "light": ("chipbus.bus",),
    "nice": ("chipbus.bus",),
    "slow": ("takes_long",),
    "torch": ("torch",),
    "threaded": ("starts_a_thread",),
    "broken": ("is_broken",),
}

if __name__ == "__main__":
    sys.path.insert(0, str(PROGRAMS))
    serve(ENTRIES, PRELOADS)
