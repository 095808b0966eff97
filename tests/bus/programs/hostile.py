"""A process of the same user that knows the protocol and does not keep to it: ``RUN_DIR NODE ATTACK``.

Prints, as JSON, the reason of each refusal it was answered with, and ends when its parent closes its standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import zmq
from bus_actors import Number
from bus_strangers import Stranger

from chipbus.bus.envelope import Kind
from chipbus.bus.registry import decode

FLOOD = 1500


def junk(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node)
    for number in range(500):
        stranger.data.send(os.urandom(number))
        stranger.control.send(os.urandom(number))
    return [stranger]


def several_parts(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node)
    for _ in range(100):
        stranger.data.send_multipart([stranger.record(Kind.TELL, Number(666), correlation=1)] * 3)
    return [stranger]


def forged_pid(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node)
    stranger.hello(pid=os.getppid())
    return [stranger]


def name_of_a_living_peer(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node, name="friend")
    stranger.hello()
    return [stranger]


def younger_life_of_a_living_peer(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node, name="friend")
    stranger.hello(incarnation=7)
    return [stranger]


def other_half_of_a_peers_hello(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node, name="slow")
    stranger.hello(only=stranger.control)
    stranger.data.send(b"said on the other socket, so that the test knows when it was heard")
    return [stranger]


def name_that_is_not_expected(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node, name="nobody")
    stranger.hello()
    return [stranger]


def other_senders(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node)
    stranger.hello()
    stranger.first_answer(stranger.data)
    for correlation in range(1, 11):
        stranger.data.send(stranger.record(Kind.TELL, Number(666), correlation=correlation, source=12345))
        stranger.data.send(stranger.record(Kind.TELL, Number(666), correlation=correlation, incarnation=2))
    return [stranger]


def half_open_hellos(run_dir: Path, node: str) -> list[Stranger]:
    stranger = Stranger(run_dir, node)
    for number in range(FLOOD):
        stranger.hello(only=stranger.data, name=f"half.{number}")
    return [stranger]


ATTACKS: dict[str, Callable[[Path, str], list[Stranger]]] = {
    attack.__name__: attack
    for attack in (
        junk, several_parts, forged_pid, name_of_a_living_peer, younger_life_of_a_living_peer,
        other_half_of_a_peers_hello, name_that_is_not_expected, other_senders, half_open_hellos,
    )
}  # fmt: skip


def reasons(stranger: Stranger) -> list[str]:
    """What it is refused with, on either socket, until nothing more comes for a moment."""
    poller = zmq.Poller()
    for socket in (stranger.data, stranger.control):
        poller.register(socket, zmq.POLLIN)
    heard = []
    while len(heard) < FLOOD and (ready := poller.poll(300)):
        for socket, _ in ready:
            envelope, body = stranger.first_answer(socket)
            if envelope.kind == Kind.REFUSE:
                heard.append(decode(envelope.type_id, body).text)
    return heard


def main() -> None:
    _, run_dir, node, attack = sys.argv
    strangers = ATTACKS[attack](Path(run_dir), node)
    print(json.dumps([text for stranger in strangers for text in reasons(stranger)]), flush=True)
    sys.stdin.read()
    for stranger in strangers:
        stranger.close()


if __name__ == "__main__":
    main()
