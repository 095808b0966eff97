"""A replica core and its chip worker on a null chip, in one process on a virtual clock, with somebody who asks it."""

from __future__ import annotations

from pathlib import Path

from serving_actors import Asker, Supervisor

from chipbus.actors.chip import ChipActor
from chipbus.actors.replica import ReplicaActor
from chipbus.bus import LocalSystem
from chipbus.kernels.chips import Chip
from chipbus.kernels.null import Fault, NullChip, null_token

DEMO = Path(__file__).resolve().parents[1] / "chipbus" / "demo"
VOCAB = 1024  # of the demo model


class FaultyChip(ChipActor):
    """A chip worker on a null chip that goes wrong as told."""

    def __init__(self, *faults: Fault, is_uniform: bool = True) -> None:
        super().__init__({"device": "null:0", "threads": 1, "inline": True})
        self._faults = faults
        self._is_uniform = is_uniform

    def open_chip(self) -> Chip:
        chip = NullChip(self._faults)
        chip.is_uniform = self._is_uniform
        return chip


class Replica:
    """One replica group with somebody who asks it."""

    def __init__(self, seed: int, *faults: Fault, is_uniform: bool = True, **limits: int) -> None:
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, "page_size": 4, "num_pages": 40}
        self.system = LocalSystem(seed)
        self.asker = Asker("replica.0")
        self.core = ReplicaActor(
            {
                "replica": 0,
                "dp_rank": 0,
                "chip": "chip.0.0",
                "model_dir": str(DEMO),
                "dtype": "bfloat16",
                "limits": {**sizes, **limits},
                "prefill_chunk_tokens": 8,
                "max_waiting": 6,
                "max_request_restarts": 3,
                "load_timeout_s": 10.0,
                "step_timeout_s": 10.0,
            }
        )
        self.supervisor = Supervisor()
        self.system.spawn("supervisor", self.supervisor)
        self.system.spawn("router", self.asker, connect=("supervisor",))
        self.system.spawn("replica.0", self.core, connect=("router", "supervisor"))
        self.start_chip(*faults, is_uniform=is_uniform)
        self.system.run_until(lambda: "replica.0" in self.asker.ctx.peers())

    def start_chip(self, *faults: Fault, is_uniform: bool = True) -> None:
        self.chip = FaultyChip(*faults, is_uniform=is_uniform)
        self.system.spawn("chip.0.0", self.chip, connect=("replica.0", "supervisor"))

    def finish(self) -> None:
        """Run until every ask has ended; then nothing of any request is held."""
        self.system.run_until(lambda: all(answer.is_over for answer in self.asker.answers), limit_s=1000)
        self.system.run_until(lambda: not self.core._in_flight, limit_s=100)
        scheduler = self.core._scheduler
        scheduler.check_integrity()
        assert scheduler.pages_free == scheduler.pages_total
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
        assert not self.core._serving


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for position in range(len(prompt) - 1, len(prompt) - 1 + count):
        tokens.append(null_token(tokens[-1], position, VOCAB))
    return tokens[len(prompt) :]
