"""kronfluence's counterfactual evaluation, `examples/uci/tutorial.ipynb` of its repository.

UCI Concrete, its split and its MLP 8-128-128-128-1, trained by SGD; the rows with the largest scores for one query are
left out, the model is trained again from another start, and the query's loss is looked at: it is to rise.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import steps
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

LIBRARY, TITLE = "kronfluence", "Concrete, the rows that help most left out (kronfluence)"
DOCUMENTED = (
    "`examples/uci/tutorial.ipynb` of its repository: 927 rows, an MLP 8-128-128-128-1 trained by SGD (40 epochs, "
    "batches of 32, step 0.03, weight decay 1e-5); of one query's scores the largest 5, 10, …, 30 rows are left out, "
    "the model is trained again, and the query's squared error is looked at; random rows beside them."
)
SMALLER = "nothing; 8 queries instead of one, 3 trainings each, with the same seeds for every method"
COUNTS, QUERIES, SEEDS = (5, 10, 15, 20, 25, 30), 8, 3
EPOCHS, BATCH, STEP, DECAY = 40, 32, 0.03, 1e-5


def data(folder: Path) -> None:
    """Its split, standardised by the rows; read where xlrd is."""
    import xlrd

    file = Path(os.environ["UPWEIGHT_DATA"]) / "tabular" / "Concrete_Data.xls"
    sheet = xlrd.open_workbook(file).sheet_by_index(0)
    table = np.array([sheet.row_values(row) for row in range(1, sheet.nrows)], np.float32)
    order = np.random.RandomState(0).choice(np.arange(len(table)), len(table), replace=False)
    count = int(np.round(len(table) * 0.9))
    rows = table[order[:count]]
    table = (table[order] - rows.mean(0)) / rows.std(0)
    np.savez(
        folder / "data.npz",
        X=table[:count, :-1],
        y=table[:count, -1:],
        Xq=table[count : count + QUERIES, :-1],
        yq=table[count : count + QUERIES, -1:],
    )


def tensors(folder: Path) -> tuple[Tensor, ...]:
    with np.load(folder / "data.npz") as file:
        return tuple(torch.from_numpy(file[key]) for key in ("X", "y", "Xq", "yq"))


def network() -> nn.Sequential:
    """Its `construct_regression_mlp`."""
    return nn.Sequential(
        *(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)),
    )


def trained(X: Tensor, y: Tensor, kept: list[np.ndarray], seeds: list[int]) -> list[Tensor]:
    """Its training for each set of rows and seed: weights and biases, of all models side by side.

    Every model has a start and an order of its own, as SGD one by one would give it.
    """
    starts, orders = [], []
    for rows, seed in zip(kept, seeds, strict=True):
        torch.manual_seed(seed)
        starts.append([one.detach().clone() for one in network().parameters()])
        whole = len(rows) // BATCH * BATCH
        epochs = [torch.from_numpy(rows)[torch.randperm(len(rows))[:whole]].view(-1, BATCH) for _ in range(EPOCHS)]
        orders.append(torch.cat(epochs))
    theta = [torch.stack(parts).requires_grad_() for parts in zip(*starts, strict=True)]
    optimizer = torch.optim.SGD(theta, lr=STEP, weight_decay=DECAY)
    for rows in torch.stack(orders, 1):  # (models, batch)
        optimizer.zero_grad()
        ((predicted(theta, X[rows]) - y[rows]) ** 2).mean((1, 2)).sum().backward()
        optimizer.step()
    return [one.detach() for one in theta]


def predicted(theta: list[Tensor], X: Tensor) -> Tensor:
    """What each model says of its rows, (models, rows, 1)."""
    for k in range(0, len(theta), 2):
        X = torch.baddbmm(theta[k + 1][:, None], X, theta[k].transpose(1, 2))
        X = X.relu() if k + 2 < len(theta) else X
    return X


def theirs(folder: Path) -> None:
    """The model, and kronfluence's scores by the two strategies of its tutorial."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Regression(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs, targets = model(batch[0]), batch[1]
            if sample:
                targets = torch.normal(outputs.detach(), std=0.5**0.5)
            return mse_loss(outputs, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    X, y, Xq, yq = tensors(folder)
    model = network()
    for place, values in zip(model.parameters(), trained(X, y, [np.arange(len(X))], [1004]), strict=True):
        place.data = values[0]
    torch.save(model.state_dict(), folder / "weights.pt")
    task = Regression()
    analyzer = Analyzer(
        "concrete", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder / "analyses")
    )

    def pairs(strategy: str) -> Tensor:
        torch.manual_seed(0)
        analyzer.fit_all_factors(
            strategy,
            TensorDataset(X, y),
            factor_args=FactorArguments(strategy=strategy),
            per_device_batch_size=len(X),
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            f"{strategy} pairs",
            strategy,
            TensorDataset(Xq, yq),
            TensorDataset(X, y),
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=len(X),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores(f"{strategy} pairs")["all_modules"]

    steps.scored(folder, "kronfluence, ekfac, its defaults", partial(pairs, "ekfac"), again=True)
    steps.scored(folder, "kronfluence, identity", partial(pairs, "identity"), again=True)


def ours(folder: Path) -> None:
    """The same model: what is taken when nothing is said, and EKFAC in its place."""
    import upweight as uw

    model = network()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    X, y, Xq, yq = tensors(folder)

    def values(**settings: Any) -> Any:
        return uw.explain(model.eval(), X, y, loss=mse_loss, penalty=DECAY, **settings).on_loss(Xq, yq).values

    steps.scored(folder, "upweight, its defaults", values, again=True)
    steps.scored(folder, "upweight, EKFAC", partial(values, curvature=uw.operators.EKFAC()), again=True)


def measured(folder: Path) -> None:
    """The mean of the queries' squared errors without the rows, less that with all rows and the same seeds."""
    X, y, Xq, yq = tensors(folder)
    every = np.arange(len(X))

    def errors(left_out: list[np.ndarray]) -> np.ndarray:
        """(sets, seeds, queries): squared errors."""
        sets = [np.setdiff1d(every, rows) for rows in left_out for _ in range(SEEDS)]
        theta = trained(X, y, sets, list(range(SEEDS)) * len(left_out))
        squares = (predicted(theta, Xq.expand(len(sets), -1, -1)) - yq) ** 2
        return squares.view(len(left_out), SEEDS, QUERIES).numpy()

    def shown(rises: np.ndarray) -> str:
        """Of (queries, seeds): the mean, and its standard error over queries."""
        return f"{rises.mean():.3f} ± {rises.mean(1).std(ddof=1) / QUERIES**0.5:.3f}"

    base = errors([every[:0]])[0]
    rows: list[list[Any]] = []
    for facts, scores in steps.every(folder):
        if scores is None:
            rows.append([facts["name"], facts["error"], *[None] * len(COUNTS)])
            continue
        order, cells = np.argsort(-scores, 1), []
        for k in COUNTS:
            found = errors([order[q, :k] for q in range(QUERIES)])
            cells.append(shown(np.stack([found[q, :, q] - base[:, q] for q in range(QUERIES)])))
        rows.append([facts["name"], *cells, facts["processor_seconds"]])
    chance = np.random.default_rng(0).permutation(every)
    cells = [shown((found - base).T) for found in errors([chance[:k] for k in COUNTS])]
    rows.append(["random rows", *cells, None])
    columns = ["library, method", *(f"{k} rows" for k in COUNTS), "processor s"]
    steps.told(folder, columns, rows)
    told = f"The mean squared error with all rows is {base.mean():.3g}"
    note = f"{told}; the cells are what is added to it, ± its standard error over queries."
    (folder / "note.txt").write_text(note)


STEPS = (("", "data"), ("kronfluence", "theirs"), ("upweight", "ours"), ("upweight", "measured"))

if __name__ == "__main__":
    steps.main(data=data, theirs=theirs, ours=ours, measured=measured)
