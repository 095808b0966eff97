"""Waiting by descriptors never misses what a socket took in while it was used."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import zmq

from chipbus.bus.poll import Poll

SOON_MS = 10_000


@pytest.fixture
def pair(tmp_path: object) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.bind(f"ipc://{tmp_path}/s")
    dealer.connect(f"ipc://{tmp_path}/s")
    yield router, dealer
    context.destroy(linger=0)


def test_a_socket_with_more_than_was_read_is_ready_again(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    router, dealer = pair
    poll = Poll()
    poll.add_socket(router)
    for number in range(20):
        dealer.send(b"%d" % number)

    heard = []
    while len(heard) < 20:
        sockets, descriptors = poll.wait(SOON_MS)
        assert descriptors == []
        for socket in sockets:
            heard += socket.recv_multipart(zmq.NOBLOCK)[1:]

    assert heard == [b"%d" % number for number in range(20)]


def test_what_a_use_took_in_is_found_if_the_use_was_noted(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    router, dealer = pair
    poll = Poll()
    poll.add_socket(router)
    poll.wait(0)
    for number in range(50):
        dealer.send(b"%d" % number)
        assert router.poll(SOON_MS)  # takes in the news, as any use may: the descriptor is silent now
        poll.used.add(router)

        assert poll.wait(SOON_MS) == ([router], [])

        router.recv_multipart(zmq.NOBLOCK)


def test_descriptors_and_sockets_are_told_apart_and_forgotten(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    router, dealer = pair
    poll = Poll()
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    poll.add_socket(router)
    poll.add_descriptor(fd)
    dealer.send(b"x")
    assert router.poll(SOON_MS)
    poll.used.add(router)

    assert poll.wait(SOON_MS) == ([router], [fd])

    poll.remove_socket(router)
    poll.remove_descriptor(fd)
    os.close(fd)
    assert poll.wait(0) == ([], [])
