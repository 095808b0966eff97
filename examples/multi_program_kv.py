"""Prefill and decode are two programs on one worker, and share a KV cache that never leaves the chip.

The tokens are checked against computing the whole text again for each of them.
"""

from importlib.resources import files

import numpy as np

from chipbus.actors.l3 import L3Worker
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.qwen3.step import Limits, ModelPrograms

PROMPT = [102, 58, 311, 17, 240, 9, 77]
TOKENS = 12
PAGES = np.array([[0, 1, 2, 3]], np.int32)  # of the text that grows; the check uses the other four
CHECK_PAGES = PAGES + 4


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


limits = Limits(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=64, page_size=16, num_pages=8)
model = ModelPrograms.build(ModelSpec.from_directory(files("chipbus") / "demo", "float32"), limits)

with L3Worker([model.prefill, model.decode, model.final_norm, model.lm_head], devices=["cpu:0"]) as worker:
    spec, *buffers = model.tensors
    weights = worker.alloc_weights(spec.source, spec.dtype, spec.fingerprint)
    k_cache, v_cache, hidden, normed, chosen, logits = (worker.alloc_tensor(b.shape, b.dtype) for b in buffers)
    state = (weights, k_cache, v_cache, hidden)

    def head(orch) -> None:
        """From the last hidden state to logits; what waits for what follows from the tensors."""
        orch.submit_next_level(model.final_norm, weights, hidden, normed, ints(0), worker=0)
        orch.submit_next_level(model.lm_head, weights, normed, logits, ints(0), worker=0)

    def prefill(orch, tokens, pages) -> None:
        orch.submit_next_level(
            model.prefill, *state, ints(*tokens), ints(0), ints(len(tokens)), pages, ints(0), worker=0
        )
        head(orch)

    def decode(orch, token, position) -> None:
        orch.submit_next_level(model.decode, *state, ints(token), ints(position), PAGES, ints(0), chosen, worker=0)
        head(orch)

    def choose() -> int:
        return int(worker.copy_from(logits)[0].argmax())

    worker.run(prefill, PROMPT, PAGES)
    text = [*PROMPT, choose()]
    while len(text) < len(PROMPT) + TOKENS:
        worker.run(decode, text[-1], len(text) - 1)  # one token; the rest of the text is in the cache
        text.append(choose())

    for end in range(len(PROMPT), len(text)):
        worker.run(prefill, text[:end], CHECK_PAGES)
        if choose() != text[end]:
            raise SystemExit(f"token {end} is {text[end]}; computed again it is {choose()}")
    print(f"tokens: {text[len(PROMPT) :]}, equal to a full recomputation of each")
