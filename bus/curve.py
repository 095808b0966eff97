"""Links to another host: tcp, encrypted by CURVE, and only for keys that are named. Pure data, and the key desk.

libzmq asks about every key that connects, over a socket inside the process (ZAP, RFC 27). The node's own loop answers,
because it is there anyway: pyzmq's authenticator would be a second thread that wants the GIL, and whom a key belongs to
would be known in two places. While a handler runs no key is answered; libzmq waits 2 s, and the peer tries again.

On tcp no kernel tells a pid. A peer is who its key says: the desk answers with the node's name, libzmq attaches it to
each frame, and a HELLO under another name is refused. No key is ever part of a text.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import zmq
from zmq.utils import z85

from ..errors import ConfigError
from .addresses import check_name
from .wire import NOBLOCK

if TYPE_CHECKING:
    from .node import Sockets

__all__ = ["CurveKeys", "KeyDesk", "TcpInbox", "TcpPeer", "secure_client", "secure_server"]

KEY_BYTES = 40  # in Z85, as zmq.curve_keypair and every tool of ZeroMQ write them
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2000, 6000  # a cable tells nobody that it was pulled
DESK = "inproc://zeromq.zap.01"
DOMAIN = "chipbus"


def _check_key(what: str, value: object) -> None:
    try:
        is_key = isinstance(value, bytes) and len(value) == KEY_BYTES and len(z85.decode(value)) == 32
    except (KeyError, ValueError):
        is_key = False
    if not is_key:
        raise ConfigError(
            f"{what} is no CURVE key: it must be {KEY_BYTES} bytes of Z85, as zmq.curve_keypair makes them"
        )


def _key(_: Any, field: attrs.Attribute[Any], value: object) -> None:
    _check_key(f"the {field.name} key", value)


def _address(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    _endpoint(str(value), 0)


def _endpoint(address: str, offset: int) -> str:
    """``tcp://`` endpoint of "10.0.0.7:7700" or "[fd00::7]:7700", ``offset`` ports on. Raises ``ConfigError``."""
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        number = int(port)
    except ValueError:
        text = "it must be the address of one interface and a port, such as 10.0.0.7:7700 or [fd00::7]:7700"
        raise ConfigError(f"tcp address {address!r}: {text}") from None
    mapped = getattr(ip, "ipv4_mapped", None)
    if (mapped or ip).is_unspecified or ip.is_multicast:
        raise ConfigError(f"tcp address {address!r} is every interface's or nobody's; name the one to use")
    if not 0 < number < 2**16 - 1:
        raise ConfigError(f"tcp address {address!r}: the port must be from 1 to 65534, for the next one is used, too")
    return f"tcp://{host}:{number + offset}"


def _keys(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, CurveKeys):
        raise ConfigError("tcp without keys: a node that listens or connects there needs a CurveKeys of its own")


def _peers(_: Any, __: attrs.Attribute[Any], value: Mapping[str, bytes]) -> None:
    if not value:
        raise ConfigError("a tcp inbox without peers: name each node that may connect, with its public key")
    for name, key in value.items():
        check_name(name)
        _check_key(f"the public key of {name}", key)
    if len(set(value.values())) < len(value):
        raise ConfigError("two tcp peers have one key: each node needs a key of its own, for it is known by it")


@attrs.frozen(repr=False)
class CurveKeys:
    """One node's pair, in Z85. Whoever knows ``secret`` is that node."""

    public: bytes = attrs.field(validator=_key)
    secret: bytes = attrs.field(validator=_key)

    @classmethod
    def make(cls) -> CurveKeys:
        """A fresh pair."""
        return cls(*zmq.curve_keypair())

    def __repr__(self) -> str:
        return "CurveKeys(…)"


@attrs.frozen(kw_only=True)
class TcpInbox:
    """Where a node listens for other hosts, and who may connect. Control uses the port, data the one after it."""

    address: str = attrs.field(validator=_address)
    keys: CurveKeys = attrs.field(validator=_keys, repr=False)
    peers: Mapping[str, bytes] = attrs.field(validator=_peers, repr=lambda peers: str(sorted(peers)))
    """Public key by node name."""

    def endpoint(self, control: bool) -> str:
        """Of one of its two sockets."""
        return _endpoint(self.address, 0 if control else 1)


@attrs.frozen(kw_only=True)
class TcpPeer:
    """A node on another host: where it listens, the key it must have, and the keys we show it."""

    address: str = attrs.field(validator=_address)
    public: bytes = attrs.field(validator=_key, repr=False)
    keys: CurveKeys = attrs.field(validator=_keys, repr=False)

    def endpoint(self, control: bool) -> str:
        """Of one of its two sockets."""
        return _endpoint(self.address, 0 if control else 1)


def secure_server(socket: zmq.Socket[bytes], inbox: TcpInbox) -> None:
    """Make a socket accept encrypted connections of known keys only; before it is bound."""
    socket.curve_server = True
    socket.curve_secretkey = inbox.keys.secret
    socket.zap_domain = DOMAIN.encode()
    _prepare_tcp(socket)


def secure_client(socket: zmq.Socket[bytes], peer: TcpPeer) -> None:
    """Make a socket talk to the holder of the peer's key only; before it is connected."""
    socket.curve_serverkey = peer.public
    socket.curve_publickey = peer.keys.public
    socket.curve_secretkey = peer.keys.secret
    _prepare_tcp(socket)


def _prepare_tcp(socket: zmq.Socket[bytes]) -> None:
    socket.ipv6 = True
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS


class KeyDesk:
    """Answers libzmq's questions about keys: the name of the node a key belongs to, or no. A reader of the node."""

    control = True
    is_open = True

    def __init__(self, sockets: Sockets, inbox: TcpInbox) -> None:
        self._exchange = sockets.exchange
        self._names = {z85.decode(key): name for name, key in inbox.peers.items()}
        self._socket = sockets.open(zmq.ROUTER)
        self._socket.bind(DESK)
        sockets.add_reader(self._socket, self)

    def read(self) -> None:
        """Answer all that have come."""
        while True:
            try:
                parts = self._socket.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            route, empty, version, number, _, address, _, mechanism, *credentials = parts
            name = self._names.get(credentials[0]) if mechanism == b"CURVE" and credentials else None
            if name is None:
                self._exchange.count("refused_keys", address=address.decode(errors="replace"), error="an unknown key")
            verdict = [b"200", b"OK", name.encode()] if name else [b"400", b"an unknown key", b""]
            self._socket.send_multipart([route, empty, version, number, *verdict, b""], NOBLOCK)
