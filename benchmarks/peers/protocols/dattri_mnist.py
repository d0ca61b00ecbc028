"""dattri's benchmark, `experiments/benchmark_result.py --dataset mnist --model lr --metric lds` of its repository.

The first 5,000 images of MNIST, logistic regression by dattri's own `train_mnist_lr` (SGD, 20 epochs), 100 models on
halves of the rows by its `retrain_lds`, its `calculate_lds_ground_truth` and `lds`; each method with every
regularization of its grid, and the best is shown, as there.
"""

from __future__ import annotations

import gzip
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import steps
import torch
from torch.nn.functional import cross_entropy

LIBRARY, TITLE = "dattri", "MNIST, logistic regression, LDS (dattri)"
DOCUMENTED = (
    "`experiments/benchmark_result.py --dataset mnist --model lr --metric lds` of its repository: 5,000 rows, its own "
    "training (SGD, 20 epochs), 100 models on halves of the rows, Spearman's correlation of summed scores with minus "
    "the loss, mean over the test images; the best of a grid of seven regularizations is reported. Its README reports "
    "0.767 for if-cg."
)
SMALLER = (
    "100 of its 500 test images; if-explicit and if-lissa left out; where a system is solved all rows in one batch, "
    "for it is solved anew for every batch of them; upweight by the five largest of the grid; rows and models as there"
)
ROWS, QUERIES, SUBSETS = 5000, 100, 100
GRID = (1.0, 1e-1, 1e-2, 5e-3, 1e-3, 1e-4, 1e-5)
OURS = GRID[:5]


def images(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images as its `create_mnist_dataset` gives them, normalised; and their labels."""
    folder = Path(os.environ["UPWEIGHT_DATA"]) / "mnist"
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(16 + 784 * count)[16:], np.uint8).reshape(count, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(8 + count)[8:], np.uint8)
    return torch.from_numpy((pixels / np.float32(255) - 0.1307) / 0.3081).float(), torch.from_numpy(labels).long()


def trained(folder: Path) -> None:
    """The model, the models on halves, and the truth, by dattri's own functions."""
    from dattri.benchmark.datasets.mnist import loss_mnist_lr, train_mnist_lr
    from dattri.metric import calculate_lds_ground_truth
    from dattri.model_util.retrain import retrain_lds
    from torch.utils.data import DataLoader, TensorDataset

    rows, queries = TensorDataset(*images("train", ROWS)), TensorDataset(*images("t10k", QUERIES))
    whole = train_mnist_lr(DataLoader(rows, batch_size=64, shuffle=True), seed=0)
    torch.save(whole.state_dict(), folder / "weights.pt")
    retrain_lds(train_mnist_lr, DataLoader(rows, batch_size=64), folder / "halves", num_subsets=SUBSETS, seed=0)
    asked = DataLoader(queries, batch_size=QUERIES)
    values, indices = calculate_lds_ground_truth(loss_mnist_lr, folder / "halves", asked)
    np.savez(folder / "truth.npz", values=values.numpy(), indices=indices.numpy())


def theirs(folder: Path) -> None:
    """dattri's scores by every regularization."""
    from dattri.algorithm.influence_function import IFAttributorArnoldi, IFAttributorCG
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.benchmark.datasets.mnist import create_lr_model
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    rows, queries = TensorDataset(*images("train", ROWS)), TensorDataset(*images("t10k", QUERIES))
    batches, asked = DataLoader(rows, batch_size=500), DataLoader(queries, batch_size=QUERIES)
    at_once, state = DataLoader(rows, batch_size=ROWS), torch.load(folder / "weights.pt")
    model = create_lr_model("mnist").eval()

    def of_batch(params: Any, data: Any) -> torch.Tensor:
        return cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])

    def of_one(params: Any, data: Any) -> torch.Tensor:
        return of_batch(params, (data[0][None], data[1][None]))

    def margin(params: Any, data: Any) -> torch.Tensor:
        logp = -of_one(params, data)
        return logp - torch.log(1 - torch.exp(logp))

    def probability(params: Any, data: Any) -> torch.Tensor:
        return torch.exp(-of_one(params, data))

    def inverse(Attributor: Any, **settings: Any) -> torch.Tensor:
        attributor = Attributor(AttributionTask(of_batch, model, state), **settings)
        attributor.cache(at_once)
        with torch.no_grad():
            return attributor.attribute(at_once, asked).T  # in batches it solves anew for every one of them

    def products(normalized: bool) -> torch.Tensor:
        task = AttributionTask(of_one, model, state)
        attributor = TracInAttributor(task, weight_list=torch.ones(1) * 1e-3, normalized_grad=normalized)
        with torch.no_grad():
            return attributor.attribute(batches, asked).T

    def trak(count: int) -> torch.Tensor:
        halves = [torch.load(folder / "halves" / str(k) / "model_weights_0.pt") for k in range(count)]
        task = AttributionTask(margin, model, halves)
        attributor = TRAKAttributor(task, probability, projector_kwargs={"proj_dim": 512, "device": "cpu"})
        attributor.cache(batches)
        with torch.no_grad():
            return attributor.attribute(asked).T

    for r in GRID:
        steps.scored(folder, f"dattri, if-cg|{r:g}", partial(inverse, IFAttributorCG, regularization=r, max_iter=10))
    for r in GRID:
        call = partial(inverse, IFAttributorArnoldi, regularization=r, max_iter=50)
        steps.scored(folder, f"dattri, if-arnoldi|{r:g}", call)
    steps.scored(folder, "dattri, Grad-Dot", partial(products, normalized=False))
    steps.scored(folder, "dattri, Grad-Cos", partial(products, normalized=True))
    steps.scored(folder, "dattri, TRAK-10", partial(trak, 10))


def ours(folder: Path) -> None:
    """The same model, rows and queries: the grid as damping, and what is taken when none is given."""
    import upweight as uw

    state = torch.load(folder / "weights.pt")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    model.load_state_dict({f"1.{name.rpartition('.')[2]}": value for name, value in state.items()})
    (X, y), (Xq, yq) = images("train", ROWS), images("t10k", QUERIES)

    def values(**settings: Any) -> Any:
        return uw.explain(model.eval(), X, y, loss=cross_entropy, **settings).on_loss(Xq, yq).values

    for damping in OURS:
        steps.scored(folder, f"upweight, a grid of damping|{damping:g}", partial(values, damping=damping))
    steps.scored(folder, "upweight, default damping", values)


def measured(folder: Path) -> None:
    """dattri's own metric, for every regularization and the best of them."""
    from dattri.metric import lds

    with np.load(folder / "truth.npz") as file:
        truth = torch.from_numpy(file["values"]), torch.from_numpy(file["indices"])
    found: dict[str, dict[str, Any]] = {}
    for facts, scores in steps.every(folder):
        name, _, setting = facts["name"].partition("|")
        if scores is None or not np.isfinite(scores).all():
            found.setdefault(name, {})[setting] = facts.get("error", "not finite")
            continue
        per_query = lds(torch.from_numpy(scores.T.copy()), truth)[0]
        found.setdefault(name, {})[setting] = float(per_query[~per_query.isnan()].mean())
        found[name]["spent"] = max(found[name].get("spent", 0.0), facts["processor_seconds"])
    grid = [f"{r:g}" for r in GRID]
    rows = [
        [
            name,
            max((value for key, value in of.items() if key != "spent" and isinstance(value, float)), default=None),
            *map(of.get, grid),
            of.get("spent"),
        ]
        for name, of in found.items()
    ]
    steps.told(folder, ["library, method", "LDS, the best", *grid, "processor s, the longest"], rows)


STEPS = (("dattri", "trained"), ("dattri", "theirs"), ("upweight", "ours"), ("dattri", "measured"))

if __name__ == "__main__":
    steps.main(trained=trained, theirs=theirs, ours=ours, measured=measured)
