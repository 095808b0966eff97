"""An envelope as the fields of a ledger entry. Pure."""

from __future__ import annotations

from typing import Any

from ..errors import BadFrame
from .envelope import Envelope, Kind, Lane
from .registry import lookup

__all__ = ["envelope_fields"]


def envelope_fields(envelope: Envelope) -> dict[str, Any]:
    """Everything a header says, by name; ``type`` is empty for kinds without a message and for unknown ids."""
    try:
        name = lookup(envelope.type_id).cls.__name__
    except BadFrame:
        name = ""
    return {
        "kind": Kind(envelope.kind).name,
        "type": name,
        "type_id": envelope.type_id,
        "correlation": envelope.correlation,
        "lane": Lane(envelope.lane).name,
        "deadline_ns": envelope.deadline_ns,
        "trace_id": envelope.trace_id.hex(),
        "position": envelope.position,
        "body_bytes": envelope.body_bytes,
    }
