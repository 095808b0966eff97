"""What a caller gets back: outputs of a request, and statistics of an engine. Frozen records, no behaviour."""

from __future__ import annotations

import attrs

from .messages.serving import LogprobRow

__all__ = ["CompletionOutput", "RequestOutput", "Statistics", "Timing"]


@attrs.frozen(kw_only=True)
class Timing:
    """Seconds. ``ttft_s`` and ``e2e_s`` are seen by the caller, the others by the replica core."""

    queued_s: float = 0.0
    """From arrival at the replica core to the first step that computed any of it."""
    prefill_s: float = 0.0
    """From then to the first token."""
    decode_s: float = 0.0
    """From the first token to the last."""
    ttft_s: float = 0.0
    """From the call to the first token reaching the caller."""
    e2e_s: float = 0.0
    """From the call to the end reaching the caller."""


@attrs.frozen(kw_only=True)
class CompletionOutput:
    """One completion of a prompt; in a stream, the part of it that is new."""

    index: int
    """0 <= index < n."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[LogprobRow, ...] | None = None
    """One row per token, only if asked for."""
    cumulative_logprob: float | None = None
    """Sum over all tokens so far, natural logarithm; only with logprobs."""
    finish_reason: str | None = None
    """None while it goes on; "stop" (end token, stop id, stop string) or "length" (max_tokens or context)."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for the model's own end-of-sequence."""


@attrs.frozen(kw_only=True)
class RequestOutput:
    """Everything about one prompt; in a stream, a delta (``outputs`` holds only what is new)."""

    request_id: str
    prompt: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int = 0
    """Prompt tokens taken from a prefix cache."""
    replica: int | None = None
    """Which replica served it; None until it ends."""
    dp_rank: int | None = None
    chosen_by: str | None = None
    """Who chose that replica: "pin" (the request itself), "session" (where its session is) or "load"."""
    attempt: int = 1
    """1, or more if a worker died while it ran and its tokens so far were replayed."""
    timing: Timing = Timing()


@attrs.frozen(kw_only=True)
class Statistics:
    """An engine at one moment, summed over its replicas."""

    replicas: int
    """Replica cores that answered."""
    pages_total: int
    pages_free: int
    """Equal to ``pages_total`` when no request is held."""
    running: int
    waiting: int
    requests: int
    """Requests ever submitted to this engine."""
    steps: int
    prompt_tokens: int
    """Prompt tokens computed."""
    tokens_generated: int
    step_ns: int
    """Wall time of all steps, nanoseconds."""
    device_ns: int
    """Chip time of all dispatches within them, nanoseconds."""
    restarts: int
    """Children that were restarted, all kinds."""
