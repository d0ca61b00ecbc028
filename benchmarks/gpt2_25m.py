"""How much memory and time EKFAC and an index of a language model of 25 million parameters take, on one core.

GPT-2 with random weights: 12 layers, width 384, a vocabulary of 8,192 and tied embeddings; 200 random sequences of 64
tokens. `explain` with the defaults, `on_loss` of 5 queries, and `index`; processor seconds of each part, the peak of
memory after it, and how the index's values correlate with the scores. Random weights make no sense of the values; time
and memory do not depend on them.

    python benchmarks/gpt2_25m.py              # one thread
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import report
from transformers import GPT2Config, GPT2LMHeadModel

import upweight as uw

ROWS, QUERIES, LENGTH = 200, 5, 64
SIZE = {"n_layer": 12, "n_embd": 384, "n_head": 6, "vocab_size": 8192, "n_positions": LENGTH}


def processor_seconds(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What one call takes, with the peak of memory until then, and what it returns."""
    start, begun = time.process_time(), time.perf_counter()
    value = function()
    took = {
        "processor_seconds": time.process_time() - start,
        "seconds": time.perf_counter() - begun,
        "peak_memory_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(f"{getattr(function, '__name__', function)}: {took}", flush=True)
    return took, value


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZE, bos_token_id=None, eos_token_id=None)).eval()
    draw = np.random.default_rng(0)
    sequences = [{"input_ids": tokens} for tokens in draw.integers(0, 8192, (ROWS + QUERIES, LENGTH)).tolist()]
    rows, queries = sequences[:ROWS], sequences[ROWS:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with tempfile.TemporaryDirectory() as folder:
        explaining, influence = processor_seconds(lambda: uw.explain(model, rows))
        preparing, _ = processor_seconds(lambda: influence.operator)
        asking, scores = processor_seconds(lambda: influence.on_loss(queries))
        indexing, index = processor_seconds(lambda: influence.index(folder))
        reading, found = processor_seconds(lambda: index.on_loss(index.coordinates(influence, queries)))
        size, error = index.bytes, index.error
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(found.values, scores.values, strict=True)]
    numbers = {
        "parameters": influence.objective.size,
        "memory_before_gigabytes": before,
        "explain": explaining,
        "factors": preparing,
        "five_queries": asking,
        "index": indexing,
        "five_queries_of_the_index": reading,
        "index_bytes": size,
        "index_bytes_over_float32_gradients": size / (4 * ROWS * influence.objective.size),
        "index_error_promised": error,
        "correlation_of_index_and_scores": correlations,
        "largest_residual": float(np.max(scores.certificate.residual)),
    }
    report(__file__, {"rows": ROWS, "length": LENGTH, **SIZE, "curvature": repr(influence.curvature)}, numbers)


if __name__ == "__main__":
    main()
