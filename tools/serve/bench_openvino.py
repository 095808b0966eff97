"""OpenVINO GenAI's continuous batching in a process and an environment of its own.

    python bench_openvino.py EXPORTED_MODEL THREADS CONCURRENCY

Imports nothing of ours, so that any interpreter can run it. Prints ``ready NAME`` or ``missing REASON``, then for each
line of stdin, a JSON array of [prompt token ids, tokens to generate], serves all of them, CONCURRENCY at once, and
answers with the seconds it took and the tokens it generated.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> int:
    """Serve stdin until it ends."""
    try:
        np, ov, genai = map(importlib.import_module, ("numpy", "openvino", "openvino_genai"))
    except ImportError as error:
        print(f"missing {error}", flush=True)
        return 1
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = int(sys.argv[3])
    scheduler.max_num_batched_tokens = 4096
    scheduler.dynamic_split_fuse = True
    scheduler.cache_size = 4
    settings = {"INFERENCE_NUM_THREADS": int(sys.argv[2]), "ENABLE_CPU_PINNING": False}
    pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", settings)

    def serve(work: list[tuple[list[int], int]]) -> tuple[float, int]:
        handles: list[Any] = []
        began_s = time.perf_counter()
        for number, (prompt, tokens) in enumerate(work):
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = tokens
            config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
            handles.append(pipe.add_request(number, ov.Tensor(np.array([prompt], np.int64)), config))
        while pipe.has_non_finished_requests():
            pipe.step()
        seconds = time.perf_counter() - began_s
        return seconds, sum(len(handle.read_all()[0].generated_ids) for handle in handles)

    print(f"ready OpenVINO GenAI {version('openvino-genai')}", flush=True)
    for line in sys.stdin:
        print(*serve(json.loads(line)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
