"""Claim: the derivative through a recorded fine-tuning predicts retraining as no curvature at its end does.

The tiny Llama of `llama`, fine-tuned on its 1,000 sequences and recorded, several times with other seeds. Every run
gives EKFAC scores of its last parameters and the derivative through its own steps, of 20 queries; both are judged
against really fine-tuning on halves (`retrained`). From which step on, and how much of EKFAC is added, is chosen for
each query by the others.

    UPWEIGHT_DATA=… python benchmarks/tiny_llama/through.py WORK [runs]

WORK keeps the scores of each run (npz), so that it goes on where it stopped. About 9 processor minutes a run.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from llama import recorded, rows
from methods import EKFAC

import upweight as uw

SINCE = (170, 150, 130, 110, 90, 75, 63)  # the steps from which it is differentiated; the last is a third of the way
DAMPING = 0.1  # of EKFAC, as a share of its mean eigenvalue: the best of `methods`


def measured(seed: int, file: Path) -> None:
    """Fine-tune once and score all rows for all queries in both ways."""
    start = time.process_time()
    recording = recorded(seed)
    trained = time.process_time()
    queries = rows("query")
    through = uw.through(recording, since=SINCE[-1])
    asked = through.influence.queries((queries, None))
    found, growth = [], []
    end = through.at_the_end(through.influence.objective, asked)
    for state in through.backwards(end):
        if state.step in SINCE:
            found.append(state.values.copy())
            growth.append(state.growth)
        if state.step % 10 == 0:
            print(seed, state.step, round(time.process_time() - trained), flush=True)
    went = time.process_time()
    model, train = recording.model, rows("train")
    first = uw.explain(model, train, curvature=EKFAC(samples=1), damping=1e-3)
    at = uw.explain(
        model, train, curvature=EKFAC(samples=1), damping=DAMPING * float(first.operator.eigenvalues.mean())
    )
    at.system.__dict__["operator"] = first.operator
    ekfac = at.on_loss(queries).values
    seconds = {"training": trained - start, "through": went - trained, "EKFAC": time.process_time() - went}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.savez(file, through=np.stack(found), growth=growth, EKFAC=ekfac, seconds=list(seconds.values()), peak=peak)


def main(work: str, runs: int = 3) -> None:
    """Every run that is missing, then what they say."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(work)
    folder.mkdir(exist_ok=True, parents=True)
    for seed in range(runs):
        if not (folder / f"{seed}.npz").exists():
            measured(seed, folder / f"{seed}.npz")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
