"""Claim: the derivative through a recorded fine-tuning predicts retraining as no curvature at its end does.

The tiny Llama of `llama`, fine-tuned on its 1,000 sequences and recorded, several times with other seeds. Every run
gives EKFAC scores of its last parameters and the derivative through its own steps, of 20 queries; both are judged
against really fine-tuning on halves (`retrained.py 30 3`). From which step on, and how much of EKFAC is added, is
chosen for each query by the others. The first three runs go back further than a third of the way, which tells whether
that helps.

    UPWEIGHT_DATA=… python benchmarks/tiny_llama/through.py WORK [runs] [checks]

WORK keeps the scores of each run and how far its way back is, so that it goes on where it stopped. About 7 processor
minutes a run.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import recorded, rows, sequences
from methods import EKFAC, truth
from numpy.typing import NDArray
from retrained import RESULTS, subset

import upweight as uw
from upweight.evaluation.lds import left_out_sums, spearman
from upweight.training.going import Going
from upweight.training.locality import Moved

SINCE = (170, 150, 130, 110, 90, 75, 63)  # the steps from which it is differentiated; the last is a third of the way
FURTHER = (50, 40, 30)  # of the first runs
FIRST = 3  # so many of them
SEEDS = 3  # of the trainings of a half: those of `retrained.py 30 3`
DAMPING = 0.1  # of EKFAC, as a share of its mean eigenvalue: the best of `methods`


def since(seed: int) -> tuple[int, ...]:
    """The steps from which a run is differentiated."""
    return SINCE + FURTHER if seed < FIRST else SINCE


def measured(seed: int, folder: Path) -> None:
    """Fine-tune once and score all rows for all queries in both ways, unless it was done."""
    file, bent = folder / f"{seed}.npz", folder / f"{seed}.ekfac.npz"
    if file.exists() and bent.exists():
        return
    start = time.process_time()
    recording = recorded(seed)
    trained = time.process_time()
    queries = rows("query")
    if not bent.exists():
        values = ekfac(recording.model, queries)
        np.savez(bent, values=values, seconds=time.process_time() - trained)
    if file.exists():
        return
    steps = since(seed)
    through = uw.through(recording, since=steps[-1])
    asked = through.influence.queries((queries, None))
    going = folder / f"{seed}.going.npz"
    if going.exists():
        kept = dict(np.load(going))
        told = {name[5:]: kept.pop(name) for name in list(kept) if name.startswith("told_")}
        state = Going.of(kept)
    else:
        told = {"through": np.zeros((0, len(queries), through.influence.n)), "growth": np.zeros(0)}
        told["seconds"], told["peak"] = np.array([trained - start, 0.0]), np.zeros(())
        state = through.way.at_the_end(through.influence.objective, asked)
    begun = time.process_time() - float(told["seconds"][1])
    for at in through.way.back(state, steps[-1]):
        if at.step in steps:
            told["through"] = np.concatenate([told["through"], at.values[None]])
            told["growth"] = np.append(told["growth"], at.growth)
            told["seconds"][1] = time.process_time() - begun
            told["peak"] = np.maximum(told["peak"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            written(going, at.arrays() | {f"told_{name}": one for name, one in told.items()})
            print(seed, at.step, told["seconds"], flush=True)
    written(file, told)
    going.unlink()


def written(file: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """A file of arrays, whole or not at all."""
    part = file.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, **arrays)
    part.replace(file)


def checked(seed: int, folder: Path) -> None:
    """The library's own check of a run: all weights moved at random, trained again from a third of the way on."""
    file = folder / f"{seed}.check.json"
    if file.exists():
        return
    through = uw.through(recorded(seed), since=SINCE[-1])
    asked = through.influence.queries((rows("query"), None))
    kept = np.load(folder / f"{seed}.npz")
    moved = Moved(through.way, SINCE[-1])
    values, growth = (kept[name][SINCE.index(moved.since)] for name in ("through", "growth"))
    found = moved.compared(through.influence.objective, asked, values, float(growth), draws=1)
    file.write_text(json.dumps({"text": str(found), "holds": found.holds}))


def ekfac(model: torch.nn.Module, queries: list[Any]) -> NDArray[np.float64]:
    """EKFAC scores at the damping that did best in `methods`."""
    train = rows("train")
    first = uw.explain(model, train, curvature=EKFAC(samples=1), damping=1e-3)
    damping = DAMPING * float(first.operator.eigenvalues.mean())
    at = uw.explain(model, train, curvature=EKFAC(samples=1), damping=damping)
    at.system.__dict__["operator"] = first.operator
    return at.on_loss(queries).values


def outcomes() -> uw.SubsetOutcomes:
    """What fine-tuning on halves, with three seeds each, did to the queries."""
    numbers, _, each = truth(SEEDS)
    masks = np.zeros((len(numbers), 1000), bool)
    for line, number in enumerate(numbers):
        masks[line, subset(int(number))] = True
    return uw.SubsetOutcomes(each.transpose(2, 1, 0), masks, tuple(range(SEEDS)))


def scores(values: NDArray[np.float64], what: str) -> uw.Scores:
    """Values as scores of all rows."""
    return uw.Scores(
        values, what, np.arange(values.shape[1]), values.shape[1], uw.Certificate.unsolved(len(values), 1.0, what)
    )


def chosen(snapshots: NDArray[np.float64], actual: uw.SubsetOutcomes) -> tuple[NDArray[np.float64], list[int]]:
    """For each query the values from the step on that suits the others best, and how often each step was taken."""
    per_step = np.stack([uw.lds(scores(v, "row removed"), actual, resamples=1).per_query for v in snapshots])
    best = (per_step.sum(1, keepdims=True) - per_step).argmax(0)
    return snapshots[best, np.arange(len(best))], np.bincount(best, minlength=len(snapshots)).tolist()


def judged(made: uw.Scores, actual: uw.SubsetOutcomes) -> dict[str, Any]:
    """LDS with its interval, and its mean by source of the query."""
    found = uw.lds(made, actual)
    source = sequences()["query_source"]
    by_source = {str(one): round(float(found.per_query[source == one].mean()), 3) for one in np.unique(source)}
    return {"LDS": round(found.value, 3), "95 %": [round(found.low, 3), round(found.high, 3)], "by source": by_source}


def of_each(kinds: dict[str, list[uw.Scores]], actual: uw.SubsetOutcomes) -> dict[str, Any]:
    """The mean over the runs of their own LDS, by kind, and how far the second is above the first, with intervals."""
    sums = [[left_out_sums(one, actual) for one in of_kind] for of_kind in kinds.values()]
    draw = np.random.default_rng(0)
    queries, halves = actual.mean.shape

    def means(q: NDArray[np.int64], h: NDArray[np.int64]) -> NDArray[np.float64]:
        truth = actual.mean[np.ix_(q, h)]
        found = [[spearman(one[np.ix_(q, h)], truth).mean() for one in of_kind] for of_kind in sums]
        each = np.mean(found, 1)
        return np.append(each, each[1] - each[0])

    whole = means(np.arange(queries), np.arange(halves))
    again = np.stack(
        [means(draw.integers(queries, size=queries), draw.integers(halves, size=halves)) for _ in range(1000)]
    )
    low, high = np.quantile(again + whole - again.mean(0), [0.025, 0.975], 0)
    names = [*kinds, " above ".join(reversed(kinds))]
    return {
        name: {"LDS": round(float(w), 3), "95 %": [round(float(a), 3), round(float(b), 3)]}
        for name, w, a, b in zip(names, whole, low, high, strict=True)
    }


def told(folder: Path, runs: int) -> dict[str, Any]:
    """What the runs say, alone and together."""
    actual = outcomes()
    parts = [dict(np.load(folder / f"{seed}.npz")) for seed in range(runs)]
    bent = [dict(np.load(folder / f"{seed}.ekfac.npz"))["values"] for seed in range(runs)]
    methods: dict[str, Any] = {}
    own, curvature = [], []
    for seed, part in enumerate(parts):
        values, taken = chosen(part["through"], actual)
        own.append(scores(values, "row removed"))
        curvature.append(scores(bent[seed], "row removed"))
        methods[f"EKFAC, run {seed}"] = judged(curvature[-1], actual)
        methods[f"through, run {seed}"] = {
            **judged(own[-1], actual),
            "queries by step": dict(zip(since(seed), taken, strict=True)),
        }
        methods[f"through, run {seed}, by step"] = {
            step: round(uw.lds(scores(v, "row removed"), actual, resamples=1).value, 3)
            for step, v in zip(since(seed), part["through"], strict=True)
        }
        both = uw.blended({"EKFAC": curvature[-1], "through": own[-1]}, actual)
        methods[f"EKFAC and through, run {seed}"] = {**judged(both, actual), "how": str(both.certificate)}
    if runs > 1:
        methods[f"mean of the own figures of {runs} runs"] = of_each({"EKFAC": curvature, "through": own}, actual)
        mean = np.mean([part["through"][: len(SINCE)] for part in parts], 0)
        together, taken = chosen(mean, actual)
        methods[f"EKFAC, mean of {runs} runs"] = judged(scores(np.mean(bent, 0), "row removed"), actual)
        methods[f"through, mean of {runs} runs"] = {
            **judged(scores(together, "row removed"), actual),
            "queries by step": dict(zip(SINCE, taken, strict=True)),
        }
        first = np.mean([part["through"] for part in parts[:FIRST]], 0)
        methods[f"through, mean of the first {min(runs, FIRST)} runs, by step"] = {
            step: judged(scores(v, "row removed"), actual) for step, v in zip(since(0), first, strict=True)
        }
        both = uw.blended({"EKFAC": curvature, "through": scores(together, "row removed")}, actual)
        methods[f"EKFAC and through, mean of {runs} runs"] = {**judged(both, actual), "how": str(both.certificate)}
    whole = uw.lds(curvature[0], actual)
    return {
        "settings": {
            "runs": runs,
            "halves": actual.subsets.shape[0],
            "trainings of each half": SEEDS,
            "since": since(0),
        },
        "ceiling": round(whole.ceiling, 3),
        "processor seconds": {
            "training, then 20 queries back to the last step": [p["seconds"].tolist() for p in parts]
        },
        "peak memory in MB": [round(float(part["peak"])) for part in parts],
        "check": {
            seed: json.loads((folder / f"{seed}.check.json").read_text())
            for seed in range(runs)
            if (folder / f"{seed}.check.json").exists()
        },
        "growth of the adjoint": [part["growth"].round(1).tolist() for part in parts],
        "methods": methods,
    }


def main(work: str, runs: int = 5, checks: int = 0) -> None:
    """Every run that is missing, the check of so many of them, then what those that are there say."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(work)
    folder.mkdir(exist_ok=True, parents=True)
    for seed in range(runs):
        measured(seed, folder)
        if seed < checks:
            checked(seed, folder)
        text = json.dumps(told(folder, seed + 1), indent=1, ensure_ascii=False)
        (RESULTS / "through.json").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
