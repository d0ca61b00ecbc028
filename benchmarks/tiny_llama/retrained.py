"""The truth for `methods`: query losses after really fine-tuning on random halves, and on single facts' absence.

    UPWEIGHT_DATA=… python benchmarks/tiny_llama/retrained.py [subsets] [seeds]

Writes results/retrained.json run by run, and goes on where it stopped. 18 processor seconds a run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from llama import query_losses, tuned

ROWS, SUBSETS, SEEDS = 1000, 40, 2
RESULTS = Path(__file__).parent / "results"


def subset(number: int) -> np.ndarray:
    """Half of the rows, in order."""
    return np.sort(np.random.default_rng(1000 + number).permutation(ROWS)[: ROWS // 2])


def main(subsets: int = SUBSETS, seeds: int = SEEDS) -> None:
    """Fine-tune on every subset with every seed."""
    torch.set_num_threads(1)
    path = RESULTS / "retrained.json"
    RESULTS.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"losses": {}, "seconds": {}}
    for seed in range(seeds):
        for number in range(subsets):
            name = f"{number}/{seed}"
            if name in found["losses"]:
                continue
            start = time.process_time()
            losses = query_losses(tuned(subset(number), 100 * number + seed))
            found["losses"][name] = [round(float(x), 6) for x in losses]
            found["seconds"][name] = round(time.process_time() - start, 1)
            path.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
