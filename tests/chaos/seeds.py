"""The scenarios of ``chaos.py`` on a virtual clock: a seed draws engine, requests and faults, and repeats them exactly.

``python tests/chaos/seeds.py 17 --tell`` runs one seed and tells every fault; ``--count 10000`` runs many and stops at
the first that fails.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback

import attrs
from local_engine import VOCAB, LocalEngine, expected_tokens

from chipbus import Handling, SamplingParams
from chipbus.bus import LinkFaults
from chipbus.errors import ChipbusError

__all__ = ["run"]

LIMIT_S = 600.0  # virtual; recoveries take seconds
EVENTS = 400  # at most, between two faults


def _link_faults(draw: random.Random) -> LinkFaults | None:
    """Every fourth seed loses nothing on links, the others repeat, delay or lose records."""
    kind = draw.randrange(4)
    if kind == 0:
        return None
    rate = draw.choice([0.002, 0.01, 0.05])
    return LinkFaults(
        duplicate=rate,
        delay=rate if kind > 1 else 0.0,
        drop=rate / 4 if kind > 2 else 0.0,
        longest_delay_s=draw.choice([0.001, 0.1, 2.0]),
        spares=_spared,
    )


def _spared(sender: str, receiver: str, control: bool) -> bool:
    """What the host and the supervisor say to each other is not lost: nobody could tell the host its engine's state."""
    return {sender, receiver} == {"host", "supervisor"}


def run(seed: int, *, is_told: bool = False) -> dict[str, int]:
    """One scenario; its counts. Raises ``AssertionError`` or ``DeadlineExceeded`` if anything is lost or wrong."""
    draw = random.Random(seed)
    tell = print if is_told else (lambda *_: None)
    faults = _link_faults(draw)
    replicas = draw.randint(1, 3)
    tell(f"{replicas} replicas, {attrs.evolve(faults, spares=None) if faults else 'links without faults'}")
    engine = LocalEngine(seed, replicas=replicas, faults=faults)
    wanted = []
    beginning = [draw.randrange(20, VOCAB) for _ in range(12)]  # three pages, of half of the prompts
    for _ in range(draw.randint(2, 6)):
        prompt = [*draw.choice([[], beginning]), *(draw.randrange(20, VOCAB) for _ in range(draw.randint(1, 20)))]
        count = draw.randint(1, 15)
        params = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.5, seed=draw.getrandbits(30))
        handling = draw.choice([Handling(), Handling(session="s"), Handling(replica=draw.randrange(replicas))])
        wanted.append((engine.submit(prompt, params, handling), expected_tokens(prompt, count), handling))
    strikes = draw.randint(1, 6)
    for _ in range(strikes):
        _let_happen(engine, draw.randrange(EVENTS))
        name = draw.choice(engine.names)
        if not engine.is_alive(name):
            continue
        how = draw.choice(["kill", "kill", "freeze", "stall"])
        tell(f"{engine.system.clock.now_ns() / 1e9:.6f} s: {how} {name} (life {engine.system.incarnation(name)})")
        if how == "kill":
            engine.nursery.kill(name)
        else:
            engine.system.freeze(name, draw.uniform(0.001, 2.0) if how == "freeze" else 1e8)
    engine.system.run_until(lambda: all(state.is_over for state, _, _ in wanted), LIMIT_S)
    for state, tokens, handling in wanted:
        output = state.whole()
        assert list(output.outputs[0].token_ids) == tokens, f"{state.request_id}: {output.outputs[0].token_ids}"
        assert output.outputs[0].finish_reason == "length"
        assert handling.replica in (None, output.replica), f"{state.request_id}: served by {output.replica}"
    engine.system.run_until(engine.is_idle, LIMIT_S)
    failures = {name: n for name, actor in engine.actors.items() if (n := actor.ctx.counters().get("handler_failures"))}
    assert not failures, f"handlers failed: {failures}"
    report = engine.close()
    assert report.left == ()
    assert engine.deaths == []
    return {"requests": len(wanted), "strikes": strikes, **engine.system.counters}


def _let_happen(engine: LocalEngine, events: int) -> None:
    """Some more events, if there are so many without time going by."""
    left = events

    def done() -> bool:
        nonlocal left
        left -= 1
        return left < 0 or all(state.is_over for state in engine.states)

    engine.system.run_until(done, LIMIT_S)


def main() -> int:
    """Run seeds; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--tell", action="store_true", help="what happens, with virtual times")
    options = parser.parse_args()
    logging.getLogger("chipbus").setLevel(logging.INFO if options.tell else logging.CRITICAL)
    began_s = time.monotonic()
    for seed in range(options.seed, options.seed + options.count):
        try:
            counts = run(seed, is_told=options.tell)
        except (AssertionError, ChipbusError):
            traceback.print_exc()
            print(f"seed {seed} fails; python tests/chaos/seeds.py {seed} --tell repeats it", file=sys.stderr)
            return 1
        if options.tell:
            print(counts)
    if not options.tell:
        print(f"{options.count} seeds in {time.monotonic() - began_s:.1f} s: nothing lost, wrong or left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
