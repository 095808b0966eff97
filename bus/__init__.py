"""HOW messages move: actors, envelopes, codec, links, inboxes, deadlines, shared memory, the ledger, clocks."""

from __future__ import annotations

from .actor import Actor, Context, handles
from .clock import Clock, SystemClock, VirtualClock
from .conversation import Ask, Call
from .curve import CurveKeys, TcpInbox, TcpPeer
from .envelope import Lane
from .histogram import UNOBSERVED, Histogram, Series
from .ledger import Entry, LedgerReader, LedgerWriter, read_ledger
from .lifecycle import (
    Failure,
    NodeReport,
    NodeReportRequest,
    PeerDown,
    PeerUp,
    Ping,
    Pong,
    Progress,
    Ready,
    Stop,
    error_of,
    failure_of,
)
from .link_faults import LinkFaults
from .local import LocalSystem
from .logs import get_logger
from .node import Node, NodeConfig
from .registry import decode, encode, message, register, schema_hash
from .segments import Arena, TensorRef
from .timers import Timer
from .tokens import TOKEN_BYTES, TokenIds, count_tokens, pack_tokens, unpack_tokens

__all__ = [
    "TOKEN_BYTES",
    "UNOBSERVED",
    "Actor",
    "Arena",
    "Ask",
    "Call",
    "Clock",
    "Context",
    "CurveKeys",
    "Entry",
    "Failure",
    "Histogram",
    "Lane",
    "LedgerReader",
    "LedgerWriter",
    "LinkFaults",
    "LocalSystem",
    "Node",
    "NodeConfig",
    "NodeReport",
    "NodeReportRequest",
    "PeerDown",
    "PeerUp",
    "Ping",
    "Pong",
    "Progress",
    "Ready",
    "Series",
    "Stop",
    "SystemClock",
    "TcpInbox",
    "TcpPeer",
    "TensorRef",
    "Timer",
    "TokenIds",
    "VirtualClock",
    "count_tokens",
    "decode",
    "encode",
    "error_of",
    "failure_of",
    "get_logger",
    "handles",
    "message",
    "pack_tokens",
    "read_ledger",
    "register",
    "schema_hash",
    "unpack_tokens",
]
