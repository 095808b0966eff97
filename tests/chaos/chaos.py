"""Kill, stop and stall every kind of process under load; check after every fault that nobody noticed.

    make chaos SEED=7                      # 500 faults on null chips, minutes
    make chaos SEED=7 FAULTS=5000          # a night
    make chaos SEED=7 CHIP=cpu             # real numerics

The schedule of faults follows from the seed; when exactly each one strikes does not. Ends with 1 at the first
violation, and names seed and fault. ``seeds.py`` has the same on a virtual clock, where a seed repeats the run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import attrs
import psutil
from leaks import Holdings, holdings, strays
from load import Case, Load, make_cases

from chipbus import Engine
from support import comes_true

CALLERS = 6
CASES = 24
PAUSE_S = (0.05, 0.4)  # a process that is stopped for so long is slow, not stuck
RECOVERY_S = 30.0  # more than any recovery takes on a busy machine
WEIGHTS = {"tokenizer": 4, "router": 4, "replica": 5, "chip": 6, "warden": 2, "supervisor": 0.5, "host": 0.25}
HOWS = {"kill": 5, "pause": 3, "stall": 1}

HOST = """
import sys
from chipbus import Engine, SamplingParams
engine = Engine("demo", chip=sys.argv[1], data_parallel_size=2)
stream = engine.stream([1, 2], SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True))
next(stream)
print(*[record.pid for record in engine.tree()], flush=True)
for _ in stream:
    pass
sys.stdin.read()
"""


class Violation(Exception):
    """Something that must not happen happened."""


@attrs.frozen
class Fault:
    """One blow: what is done to which process."""

    how: str  # kill: SIGKILL. pause: SIGSTOP, and SIGCONT in time. stall: SIGSTOP for good
    name: str  # of a child, "supervisor", "warden.light", "warden.torch" or "host"

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


class Chaos:
    """One engine after another under load, struck ``faults`` times."""

    def __init__(self, seed: int, chip: str, replicas: int, stall_timeout_s: float) -> None:
        self.seed = seed
        self.chip = chip
        self.replicas = replicas
        self.stall_timeout_s = stall_timeout_s
        self.draw = random.Random(seed)
        self.recoveries: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.finished = self.tokens = self.retried = self.ended_with_engine = 0
        self.cases: list[Case] = []
        self.start()

    def start(self) -> None:
        """A new engine with callers."""
        self.engine = Engine(
            "demo",
            chip=self.chip,
            data_parallel_size=self.replicas,
            dtype="float32",
            threads=1,
            max_restarts=1_000_000,
            max_request_restarts=20,  # faults come faster than any real ones: several while one prompt is computed
            stall_timeout_s=self.stall_timeout_s,
            log_level="error",
        )
        self.run_dir = Path(self.engine.run_dir)
        self.cases = self.cases or make_cases(self.engine, self.seed, CASES)
        self.load = Load(self.engine, self.cases, CALLERS, self.draw.getrandbits(30))
        comes_true(lambda: self.load.finished > 0, RECOVERY_S)
        self.before = self.settled(None)

    # Faults.

    def draw_fault(self) -> Fault:
        """The next one of this seed's schedule."""
        [kind] = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
        number = self.draw.randrange(self.replicas)
        names = {
            "tokenizer": "tokenizer.0",
            "replica": f"replica.{number}",
            "chip": f"chip.{number}.0",
            "warden": self.draw.choice(["warden.light", "warden.torch"] if self.chip == "cpu" else ["warden.light"]),
        }
        [how] = self.draw.choices(list(HOWS), list(HOWS.values()))
        return Fault("kill" if kind == "host" else how, names.get(kind, kind))

    def strike(self, fault: Fault) -> None:
        """Do it, wait until everything is as before, and check that it is."""
        began_s = time.monotonic()
        if fault.kind == "host":
            self.kill_a_host()
        elif fault.kind == "supervisor":
            self.strike_supervisor(fault)
        else:
            self.strike_child(fault)
        self.recoveries[fault.how, fault.kind].append(time.monotonic() - began_s)
        self.check_load()

    def strike_child(self, fault: Fault) -> None:
        """A process below the supervisor."""
        pid, life = self.process(fault.name)
        if fault.how == "pause":
            self.pause(pid)
        else:
            os.kill(pid, signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
            if not comes_true(lambda: self.process(fault.name) not in ((pid, life), (0, 0)), RECOVERY_S):
                raise Violation(f"{fault.name} (pid {pid}) was not replaced within {RECOVERY_S:g} s: {self.picture()}")
        self.settled(self.before)
        if fault.how == "pause" and self.process(fault.name) != (pid, life):
            raise Violation(f"{fault.name} was only slow, and was replaced all the same")
        struck_s = time.monotonic()
        if not comes_true(lambda: min(self.load.last_token_s) > struck_s or bool(self.load.wrong), RECOVERY_S):
            late = [struck_s - last_s for last_s in self.load.last_token_s]
            raise Violation(f"a caller gets no token any more; the last ones came {late} s before recovery")

    def pause(self, pid: int) -> None:
        """Stop a process for a while: the time itself is the fault, and nothing ends it early."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.draw.uniform(*PAUSE_S))
        os.kill(pid, signal.SIGCONT)

    def strike_supervisor(self, fault: Fault) -> None:
        """Everything ends with it; callers hear so, nothing is left, and the host makes a new engine."""
        pid, _ = self.process("supervisor")
        if fault.how == "pause":
            self.pause(pid)
            self.settled(self.before)
            return
        os.kill(pid, signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
        if not comes_true(lambda: self.load.ended_with_engine == CALLERS or bool(self.load.wrong), RECOVERY_S):
            raise Violation(
                f"only {self.load.ended_with_engine} of {CALLERS} callers heard that the supervisor is gone"
            )
        self.end()
        self.start()

    def kill_a_host(self) -> None:
        """Another host application of the same machine."""
        command = [sys.executable, "-c", HOST, self.chip]
        host = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert host.stdout is not None
        assert host.stdin is not None
        pids = [int(word) for word in host.stdout.readline().split()]
        pids += [child.pid for child in psutil.Process(host.pid).children(recursive=True)]
        host.kill()
        host.wait(RECOVERY_S)
        host.stdout.close()
        host.stdin.close()
        if not comes_true(lambda: not any(map(psutil.pid_exists, pids)), RECOVERY_S):
            raise Violation(f"a killed host application left {[pid for pid in pids if psutil.pid_exists(pid)]}")

    # Checks.

    def process(self, name: str) -> tuple[int, int]:
        """Pid and number of the life of a child, or of a warden."""
        if name.startswith("warden."):
            supervisor, _ = self.process("supervisor")
            for child in psutil.Process(supervisor).children():
                try:
                    if child.name() == name:
                        return child.pid, 0
                except psutil.NoSuchProcess:
                    continue
            return 0, 0
        return next(((r.pid, r.incarnation) for r in self.engine.tree() if r.name == name), (0, 0))

    def settled(self, before: Holdings | None) -> Holdings:
        """Wait until every process is ready and everything is held as ``before``; what is held."""
        if not comes_true(lambda: all(record.state == "ready" for record in self.engine.tree()), RECOVERY_S):
            raise Violation(f"not every process is ready within {RECOVERY_S:g} s: {self.picture()}")
        now = holdings(self.engine, self.run_dir)
        if before is not None and not comes_true(lambda: holdings(self.engine, self.run_dir) == before, RECOVERY_S):
            now = holdings(self.engine, self.run_dir)
            wrong = {
                field.name: (getattr(before, field.name), getattr(now, field.name))
                for field in attrs.fields(Holdings)
                if getattr(before, field.name) != getattr(now, field.name)
            }
            raise Violation(f"before and after: {wrong}")
        return now

    def check_load(self) -> None:
        """No caller has got anything wrong, and nobody lives without an owner."""
        if self.load.wrong:
            raise Violation("; ".join(self.load.wrong))
        if not comes_true(lambda: not strays(), RECOVERY_S):
            raise Violation(f"processes without an owner: {', '.join(strays())}")

    def picture(self) -> str:
        return ", ".join(f"{r.name} {r.state} (life {r.incarnation}, {r.last_exit})" for r in self.engine.tree())

    def end(self) -> None:
        """Close the engine; nothing of it may be left."""
        self.load.stop(RECOVERY_S)
        self.check_load()
        report = self.engine.close()
        if report.left:
            raise Violation(f"close() left {report.left}")
        if not comes_true(
            lambda: not self.run_dir.exists() and not psutil.Process().children(recursive=True), RECOVERY_S
        ):
            raise Violation(f"after close(): {psutil.Process().children(recursive=True)}, {self.run_dir}")
        for field in ("finished", "tokens", "retried", "ended_with_engine"):
            setattr(self, field, getattr(self, field) + getattr(self.load, field))


def main() -> int:
    """Run; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--chip", choices=("null", "cpu"), default="null")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--stall-timeout", type=float, default=1.0, help="seconds, of the engine")
    options = parser.parse_args()
    began_s = time.monotonic()
    chaos = Chaos(options.seed, options.chip, options.replicas, options.stall_timeout)
    for number in range(1, options.faults + 1):
        fault = chaos.draw_fault()
        try:
            chaos.strike(fault)
        except Violation as violation:
            print(f"\nseed {options.seed}, fault {number}, {fault.how} {fault.name}: {violation}", file=sys.stderr)
            chaos.engine.close()
            return 1
        if number % 25 == 0 or number == options.faults:
            print(f"{number} of {options.faults} faults, {time.monotonic() - began_s:.0f} s", flush=True)
    try:
        chaos.end()
    except Violation as violation:
        print(f"\nseed {options.seed}, after the last fault: {violation}", file=sys.stderr)
        return 1
    print(f"\n{'fault':<20}{'times':>6}{'median':>10}{'longest':>10}   until all is ready and every stream goes on")
    for (how, kind), took_s in sorted(chaos.recoveries.items()):
        print(f"{how + ' ' + kind:<20}{len(took_s):>6}{statistics.median(took_s):>9.2f}s{max(took_s):>9.2f}s")
    print(
        f"\n{chaos.finished} requests with {chaos.tokens} tokens ended as undisturbed, {chaos.retried} of them in more"
        f" than one attempt; {chaos.ended_with_engine} ended with EngineDead because the supervisor was struck."
        "\n0 lost, 0 wrong, 0 zombies, 0 orphans, 0 leaked segments, sockets or descriptors."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
