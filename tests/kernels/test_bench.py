"""The line server: ready, then one number per line, and a reason where there is none; what the machine would allow."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import attrs

from chipbus.kernels.bench import KernelBench, line_server


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


def test_the_roofline_is_the_slower_of_reading_the_weights_and_multiplying_them(
    checkpoint: Callable[[str], Path],
) -> None:
    bench = KernelBench(checkpoint("tied"), 1)
    try:
        measured = bench.roofline()
    finally:
        bench.close()
    linears = 2 * 64 * (4 * 32 * 2 + 2 * 32 * 2 + 3 * 128)
    assert (measured.weight_bytes, measured.layer_flop) == ((linears + 515 * 64) * 2, 2 * linears)
    assert measured.head_flop == 2 * 515 * 64
    assert measured.read_bytes_per_s > 1e8
    assert measured.flop_per_s > 1e9
    by_hand = attrs.evolve(measured, read_bytes_per_s=1e6, flop_per_s=1e9)
    read_s = by_hand.weight_bytes / 1e6
    assert by_hand.seconds("decode", 1) == read_s
    assert by_hand.seconds("prefill", 10_000) == (10_000 * by_hand.layer_flop + by_hand.head_flop) / 1e9
    assert by_hand.seconds("decode", 10_000) == 10_000 * (by_hand.layer_flop + by_hand.head_flop) / 1e9
    assert by_hand.fraction("decode", 1, 2 * read_s) == 0.5
