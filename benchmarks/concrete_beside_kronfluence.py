"""Claim: EKFAC and all scores take no longer than kronfluence's; and how both, and the exact solve, predict retraining.

UCI Concrete, an MLP 8-128-128-128-1 with relu, 927 training rows and 103 queries. In one process on one core, in turns:
kronfluence's EK-FAC factors and pairwise scores, and `explain(…, curvature=EKFAC()).on_loss(…)`, both at the same
damping. Then both scores, and those of the exact damped Gauss–Newton, against really training on random halves (LDS).

    pip install --no-deps kronfluence==1.0.1; pip install accelerate einops einconv opt-einsum xlrd
    UPWEIGHT_DATA=… python benchmarks/concrete_beside_kronfluence.py [--only-speed]
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report, seconds
from kronfluence_scores import ekfac_scores
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss

import upweight as uw
from upweight import minibatch

SHA256 = "1ecf19eb1c78cf20599f6ef90dd41af6ff99b496095bd9903483c1fec418f522"
ROWS, HIDDEN, L2, DAMPING, MORE = 927, 128, 1e-4, 1e-3, (1e-2, 1e-1)
EPOCHS, BATCH, LR = 150, 64, 1e-3
REPEATS, SUBSETS, SEEDS = 7, 100, 2


def concrete() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """UCI 165 (CC BY 4.0): 1,030 mixtures, 8 features, strength; shuffled, standardised by the training rows."""
    import xlrd

    file = Path(os.environ["UPWEIGHT_DATA"]) / "tabular" / "Concrete_Data.xls"
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        message = f"{file} is not the published file."
        raise SystemExit(message)
    sheet = xlrd.open_workbook(file_contents=content).sheet_by_index(0)
    table = np.array([sheet.row_values(row) for row in range(1, sheet.nrows)])
    table = table[np.random.default_rng(0).permutation(len(table))]
    table = (table - table[:ROWS].mean(0)) / table[:ROWS].std(0)
    X, y = torch.from_numpy(table[:, :-1]).float(), torch.from_numpy(table[:, -1:]).float()
    return X[:ROWS], y[:ROWS], X[ROWS:], y[ROWS:]


def network() -> torch.nn.Sequential:
    """The MLP, freshly initialised."""
    Linear, ReLU = torch.nn.Linear, torch.nn.ReLU
    return torch.nn.Sequential(
        Linear(8, HIDDEN), ReLU(), Linear(HIDDEN, HIDDEN), ReLU(), Linear(HIDDEN, HIDDEN), ReLU(), Linear(HIDDEN, 1)
    )


def training() -> uw.StackedTraining:
    """Adam on shuffled batches from a fresh start: for θ̂, and for every subset."""
    return uw.StackedTraining(minibatch.Adam(LR), minibatch.Shuffled(BATCH), EPOCHS, factory=network, together=20)


def trained(X: Tensor, y: Tensor) -> torch.nn.Sequential:
    """The network that `training` gives with all rows and seed 0."""
    first = uw.explain(network(), X, y, loss=mse_loss, penalty=L2)
    theta = training().bind(first)(np.ones(len(X)), 0)
    model = network()
    torch.nn.utils.vector_to_parameters(theta.float(), model.parameters())
    return model.eval()


def summed_loss(model: torch.nn.Module, batch: Any, sample: bool) -> Tensor:
    """Squared errors of a batch, of targets that are drawn from the model if a sample is asked for."""
    outputs = model(batch[0])
    target = batch[1] if not sample else torch.normal(outputs.detach(), 0.5**0.5)
    return mse_loss(outputs, target, reduction="sum")


def explained(model: torch.nn.Module, X: Tensor, y: Tensor, damping: float, **settings: Any) -> uw.Influence:
    """The influence of the network."""
    return uw.explain(model, X, y, loss=mse_loss, penalty=L2, damping=damping, **settings)


def speed(
    model: torch.nn.Module, X: Tensor, y: Tensor, Xq: Tensor, yq: Tensor
) -> tuple[dict[str, Any], NDArray[np.float64], uw.Scores]:
    """Both in turns: seconds and their ratio, and the scores of both."""
    twin = network()
    twin.load_state_dict(model.state_dict())
    theirs = ekfac_scores(twin, summed_loss, (X, y), (Xq, yq), batch=len(X), damping=DAMPING)

    def ours() -> uw.Scores:
        curvature = uw.operators.EKFAC(samples=1)
        return explained(model, X, y, DAMPING, curvature=curvature, solver=uw.solvers.Factored()).on_loss(Xq, yq)

    theirs(), ours()  # warm the caches of both
    times = [(seconds(theirs)[0], seconds(ours)[0]) for _ in range(REPEATS)]
    pairs, scores = theirs(), ours()
    kron, own = np.median(times, 0)
    ratios = [one / other for one, other in times]
    numbers = {
        "kronfluence_seconds": kron,
        "upweight_seconds": own,
        "kronfluence_over_upweight": float(np.median(ratios)),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "pearson_of_the_two": float(np.corrcoef(pairs.ravel(), scores.values.ravel())[0, 1]),
        "slope_of_the_two_over_n": float(np.polyfit(pairs.ravel() / len(X), scores.values.ravel(), 1)[0]),
    }
    return numbers, pairs, scores


def against_retraining(
    model: torch.nn.Module, X: Tensor, y: Tensor, Xq: Tensor, yq: Tensor, pairs: NDArray[np.float64], ekfac: uw.Scores
) -> dict[str, Any]:
    """LDS of both libraries' EKFAC, of the certified solve and of gradient products, with intervals and the ceiling."""
    store = os.environ.get("CONCRETE_STORE")
    subsets = uw.random_subsets(len(X), SUBSETS)
    retrain = explained(model, X, y, DAMPING, curvature=uw.operators.EKFAC())
    outcomes = uw.subset_retraining(retrain, (Xq, yq), subsets, training(), seeds=SEEDS, store=store)
    numbers: dict[str, Any] = {}

    def told(name: str, scores: uw.Scores) -> uw.LDS:
        found = uw.lds(scores, outcomes)
        print(name, found, flush=True)
        numbers.update({f"lds_{name}": found.value, f"lds_{name}_low": found.low, f"lds_{name}_high": found.high})
        return found

    numbers["lds_ceiling"] = told("ekfac", ekfac).ceiling
    told("kronfluence", replace(ekfac, values=pairs / len(X)))
    told("gradient_dot", explained(model, X, y, 0.0, curvature=uw.operators.Identity()).on_loss(Xq, yq))
    for damping in (DAMPING, *MORE):
        solver = uw.solvers.CG(rtol=1e-3, preconditioner=uw.solvers.Preconditioned(uw.operators.EKFAC()))
        exact = explained(model, X, y, damping, curvature=uw.operators.GaussNewton(), solver=solver)
        spent, certified = seconds(partial(exact.on_loss, Xq, yq))
        near = explained(model, X, y, damping, curvature=uw.operators.EKFAC(), solver=uw.solvers.Factored())
        cheap = near.on_loss(Xq, yq)
        one, other = told(f"certified_{damping:g}", certified), told(f"ekfac_exact_expectation_{damping:g}", cheap)
        gap = certified.certificate.preconditioner_gap
        numbers |= {
            f"certified_{damping:g}_seconds": spent,
            f"certified_{damping:g}_products": certified.certificate.sweeps,
            f"certified_{damping:g}_residual": certified.certificate.residual.max(),
            f"ekfac_{damping:g}_median_gap": None if gap is None else float(np.median(gap)),
            f"pearson_of_certified_and_ekfac_{damping:g}": float(
                np.corrcoef(certified.values.ravel(), cheap.values.ravel())[0, 1]
            ),
            f"queries_where_certified_is_better_{damping:g}": float((one.per_query > other.per_query).mean()),
        }
    return numbers


def main() -> None:
    """Run, print, and write results/concrete_beside_kronfluence.json."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", uw.errors.TheoryWarning)
    warnings.simplefilter("ignore", FutureWarning)
    X, y, Xq, yq = concrete()
    model = trained(X, y)
    with torch.no_grad():
        fit = {"train_mse": float(mse_loss(model(X), y)), "test_mse": float(mse_loss(model(Xq), yq))}
    numbers, pairs, ekfac = speed(model, X, y, Xq, yq)
    numbers |= fit
    print(numbers)
    if "--only-speed" in sys.argv:
        return
    numbers |= against_retraining(model, X, y, Xq, yq, pairs, ekfac)
    settings = {
        "n": ROWS,
        "queries": len(Xq),
        "p": sum(parameter.numel() for parameter in model.parameters()),
        "damping": DAMPING,
        "l2": L2,
        "training": repr(training()),
        "ours": "explain(…, curvature=EKFAC(samples=1), solver=Factored()).on_loss, float64",
        "theirs": "fit_all_factors('ekfac') and compute_pairwise_scores, kronfluence 1.0.1, float32, whole batches",
        "threads": 1,
        "repeats": REPEATS,
        "subsets": SUBSETS,
        "fraction": 0.5,
        "seeds": SEEDS,
    }
    report(__file__, settings, numbers)


if __name__ == "__main__":
    main()
