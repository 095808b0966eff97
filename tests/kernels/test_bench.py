"""The line server: ready, then one number per line, and a reason where there is none."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

from chipbus.kernels.bench import line_server


def test_lines_are_answered_with_seconds_or_a_reason(checkpoint: Callable[[str], Path]) -> None:
    lines = ["decode 1\n", "decode 3\n", "prefill 70\n", "prefill 5000\n", "decode x\n", "dance\n", "decode 65\n"]
    out = io.StringIO()
    line_server(checkpoint("tied"), 1, lines=iter(lines), out=out)
    answers = out.getvalue().splitlines()
    assert answers[0] == "ready"
    assert all(0 < float(answer) < 60 for answer in answers[1:4])
    assert all(math.isnan(float(answer.split()[0])) for answer in answers[4:])
    assert "the prompt must be 1 to 1024 tokens" in answers[4]
    assert "expected 'decode BATCH' or 'prefill TOKENS'" in answers[5]
    assert "expected 'decode BATCH' or 'prefill TOKENS'" in answers[6]
    assert "the batch must be 1 to 64" in answers[7]
