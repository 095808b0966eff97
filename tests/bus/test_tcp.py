"""Links to another host, between two processes here: only over an encrypted connection, and only for named keys."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from bus_actors import Asker, Number
from bus_strangers import Speaker

from chipbus.bus import CurveKeys, Node, NodeConfig, TcpInbox, TcpPeer
from chipbus.bus.envelope import Kind, split
from chipbus.bus.lifecycle import Hello
from chipbus.bus.registry import decode, schema_table
from chipbus.errors import ConfigError, DeadlineExceeded, PeerGone
from support import eventually

FAR = Path(__file__).parent / "programs" / "far.py"
HOST = "127.0.0.1"
MINE, OTHERS, SERVERS, UNKNOWN = (CurveKeys.make() for _ in range(4))


def free_port() -> int:
    """One of two neighbouring ports that nobody listens on."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((HOST, 0))
            port: int = first.getsockname()[1]
            try:
                second.bind((HOST, port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Far:
    """The server on "another host": its process, with a run directory of its own."""

    def __init__(self, run_dir: str, ahead_s: float) -> None:
        self.address = f"{HOST}:{free_port()}"
        self.process = subprocess.Popen(
            [sys.executable, str(FAR), run_dir, self.address, str(ahead_s)],
            env={**os.environ, "PYTHONPATH": str(FAR.parents[2])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        peers = {"asker": MINE.public.decode(), "other": OTHERS.public.decode()}
        keys = {"public": SERVERS.public.decode(), "secret": SERVERS.secret.decode(), "peers": peers}
        self.say(json.dumps(keys))
        assert self.line() == "up"

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def counters(self) -> dict[str, int]:
        self.say("counters")
        found: dict[str, int] = json.loads(self.line())
        return found

    def end(self) -> str:
        """Stop it; what it logged."""
        _, logged = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, logged
        return logged

    def endpoint(self, *, control: bool) -> str:
        host, _, port = self.address.rpartition(":")
        return f"tcp://{host}:{int(port) + (not control)}"


@pytest.fixture
def far() -> Iterator[Callable[..., Far]]:
    made: list[Far] = []
    with tempfile.TemporaryDirectory(prefix="far-") as run_dir:

        def make(ahead_s: float = 0.0) -> Far:
            made.append(Far(run_dir, ahead_s))
            return made[-1]

        yield make
        for one in made:
            if one.process.returncode is None:
                one.end()


def linked(nodes: Any, server: Far, asker: Asker, keys: CurveKeys = MINE, public: bytes = SERVERS.public) -> Any:
    """An asker in this process that connects to the server."""
    return nodes.start("asker", asker, ("server", 1, TcpPeer(address=server.address, public=public, keys=keys)))


@pytest.mark.guarantee("B72")
@pytest.mark.parametrize("ahead_s", [0.0, 3600.0, -3600.0])
def test_a_link_to_another_host_works_and_deadlines_are_each_hosts_own(
    nodes: Any, far: Callable[..., Far], ahead_s: float
) -> None:
    server, asker = far(ahead_s), Asker()
    asking = linked(nodes, server, asker)

    asking.do(lambda: asker.ask("server", Number(1)))
    eventually(lambda: asker.heard == [2], "the answer")
    asking.do(lambda: asker.ask("server", Number(3, bytes(300_000))))
    eventually(lambda: asker.heard == [2, 4], "the answer to a long one")

    assert server.counters() == {}
    server.process.kill()
    server.process.communicate()
    asking.do(lambda: asker.ask("server", Number(5), timeout_s=60))
    eventually(lambda: len(asker.heard) == 3, "the broken connection is noticed, long before the deadline")
    assert asker.errors[-1] is PeerGone


class Guest(Speaker):
    """Bare sockets that speak to the server as they like."""

    def __init__(self, server: Far, keys: CurveKeys | None, public: bytes, name: str = "asker") -> None:
        super().__init__(name, "server")
        self.context = zmq.Context()
        self.sockets = [self.context.socket(zmq.DEALER) for _ in range(2)]
        for one, control in zip(self.sockets, (False, True), strict=True):
            one.rcvtimeo = 10_000
            if keys is not None:
                one.curve_serverkey = public
                one.curve_publickey, one.curve_secretkey = keys.public, keys.secret
            one.connect(server.endpoint(control=control))

    def hello(self) -> None:
        hello = Hello(
            name=self.name, incarnation=1, pid=os.getpid(), to="server", to_incarnation=1, schema=schema_table()
        )
        for one in self.sockets:
            one.send(self.record(Kind.HELLO, hello))

    def first_answer(self) -> tuple[int, Any]:
        envelope, body = next(split(self.sockets[0].recv()))
        return envelope.kind, decode(envelope.type_id, bytes(body))

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.mark.guarantee("B73")
@pytest.mark.parametrize(
    ("keys", "public", "counter"),
    [
        (None, b"", "refused_handshakes"),
        (UNKNOWN, SERVERS.public, "refused_keys"),
        (MINE, UNKNOWN.public, "refused_handshakes"),
    ],
    ids=["without encryption", "unknown key", "another server's key"],
)
def test_who_does_not_encrypt_or_has_the_wrong_key_never_gets_in_and_is_counted(
    nodes: Any, far: Callable[..., Far], keys: CurveKeys | None, public: bytes, counter: str
) -> None:
    server, asker = far(), Asker()
    asking = linked(nodes, server, asker)
    guest = Guest(server, keys, public)

    guest.hello()

    eventually(lambda: server.counters().get(counter, 0) >= 2, f"both sockets are counted, not {server.counters()}")
    assert set(server.counters()) == {counter}
    for one in guest.sockets:
        assert one.poll(0) == 0
    asking.do(lambda: asker.ask("server", Number(1)))
    eventually(lambda: asker.heard == [2], "the answer to one that may")
    guest.close()
    logged = server.end()
    assert f"counter={counter} total=1" in logged
    assert "Traceback" not in logged


@pytest.mark.guarantee("B74")
def test_a_key_is_good_for_the_name_of_its_node_only(far: Callable[..., Far]) -> None:
    server = far()
    guest = Guest(server, OTHERS, SERVERS.public, name="asker")

    guest.hello()

    kind, failure = guest.first_answer()
    assert (kind, failure.text) == (Kind.REFUSE, "server refused the link: it says asker with the key of other")
    guest.close()
    assert 'sender="holder of the key of other"' in server.end()


@pytest.mark.guarantee("B75")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: inbox(address="0.0.0.0:7700"), "every interface's or nobody's; name the one to use"),
        (lambda: inbox(address="[::]:7700"), "every interface's or nobody's; name the one to use"),
        (lambda: inbox(address="[::ffff:0.0.0.0]:7700"), "every interface's or nobody's; name the one to use"),
        (lambda: inbox(address="*:7700"), "it must be the address of one interface and a port"),
        (lambda: inbox(address="7700"), "it must be the address of one interface and a port"),
        (lambda: inbox(address="example.org:7700"), "it must be the address of one interface and a port"),
        (lambda: inbox(address="10.0.0.7:65535"), "the port must be from 1 to 65534"),
        (lambda: inbox(keys=None), "tcp without keys"),
        (lambda: inbox(peers={}), "a tcp inbox without peers"),
        (lambda: inbox(peers={"asker": b"short"}), "the public key of asker is no CURVE key"),
        (lambda: inbox(peers={"a": MINE.public, "b": MINE.public}), "two tcp peers have one key"),
        (lambda: inbox(peers={"A/b": MINE.public}), "node name"),
        (lambda: CurveKeys(b"x" * 40, b""), "the secret key is no CURVE key"),
        (lambda: TcpPeer(address="10.0.0.7:1", public=b"", keys=MINE), "the public key is no CURVE key"),
        (lambda: TcpPeer(address="10.0.0.7:1", public=MINE.public, keys=None), "tcp without keys"),  # type: ignore[arg-type]
    ],
)
def test_tcp_that_is_open_to_everybody_or_without_keys_is_a_config_error(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def inbox(**fields: Any) -> TcpInbox:
    return TcpInbox(**{"address": "10.0.0.7:7700", "keys": SERVERS, "peers": {"asker": MINE.public}, **fields})


def test_an_address_that_is_not_ours_is_a_config_error(run_dir: Path) -> None:
    node = Node(NodeConfig(name="a", incarnation=1, run_dir=run_dir, tcp=inbox(address="192.0.2.1:7700")), Asker())

    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1:7700: "):
        node.run()
    assert list(run_dir.iterdir()) == []


@pytest.mark.guarantee("B76")
def test_no_key_is_in_a_repr_a_log_or_an_error(nodes: Any, far: Callable[..., Far]) -> None:
    server, asker = far(), Asker()
    asking = linked(nodes, server, asker)
    asking.do(lambda: asker.ask("server", Number(1)))
    eventually(lambda: asker.heard == [2], "the answer")
    for keys in (UNKNOWN, OTHERS):
        guest = Guest(server, keys, SERVERS.public)
        guest.hello()
        eventually(lambda: server.counters() != {}, "counted")
        guest.close()

    shown = [server.end(), repr(inbox()), repr(MINE), str(MINE)]
    shown += [repr(TcpPeer(address=server.address, public=SERVERS.public, keys=MINE))]
    shown += [repr(NodeConfig(name="a", incarnation=1, run_dir=nodes.run_dir, tcp=inbox()))]
    wrong = MINE.secret[:-1]
    with pytest.raises(ConfigError) as refused:
        CurveKeys(MINE.public, wrong)
    shown.append(repr(refused.value))
    for text in shown:
        for keys in (MINE, OTHERS, SERVERS, UNKNOWN):
            for key in (keys.public, keys.secret, wrong):
                assert key.decode()[:10] not in text
    assert "TcpInbox(address='10.0.0.7:7700', peers=['asker'])" in shown[1]


def test_a_connection_that_is_not_let_in_fails_at_its_deadline_only(nodes: Any, far: Callable[..., Far]) -> None:
    """libzmq does not tell a client whose key is refused from one whose peer is not up yet."""
    server, asker = far(), Asker()
    asking = linked(nodes, server, asker, keys=UNKNOWN)

    asking.do(lambda: asker.ask("server", Number(1), timeout_s=0.3))

    eventually(lambda: asker.errors == [DeadlineExceeded], "the deadline")
    assert server.counters().keys() == {"refused_keys"}
