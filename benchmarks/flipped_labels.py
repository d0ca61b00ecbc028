"""Question: do rows with wrong labels stand out by their influence on themselves, and more than by their loss?

A small ResNet (77,562 parameters, GroupNorm) is trained on the first 10,000 rows of Fashion-MNIST, of which 1,000 got
another label at random. Rows are then inspected in the order of a score, and what counts is the share of the wrong
labels among the first 10 % and 20 % of the rows. Scores: self-influence with EKFAC, self-influence without curvature
(TracIn over five checkpoints, and the gradient norm at the last), training loss, and chance.

Two runs: a short one with weight decay, which learns hardly any wrong label (5 %); and a long one without, which learns
them by heart (90 %). Found among the first 10 % and 20 %:

                                       short            long
    training loss                      87 %  98 %       54 %  71 %
    self-influence, EKFAC              65 %  93 %       56 %  73 %
    gradient norm                      59 %  91 %       54 %  72 %
    TracIn over five checkpoints       53 %  87 %       71 %  98 %

So the loss is enough for a network that has not learnt the wrong labels, and of one that has only its past tells.

    UPWEIGHT_DATA=… python benchmarks/flipped_labels.py [short] [long]    # writes results/flipped_labels.json

Training keeps a checkpoint per epoch in $FLIPPED_LABELS (default: a folder under the system's temporary one), and the
scores that are finished; an interrupted benchmark goes on there. All settings of a run were fixed before its first
score was seen: the last checkpoint, every default of the library, one sampled output gradient per row for EKFAC.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import report, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import upweight as uw

N, FLIPPED, BATCH, PEAK, MOMENTUM = 10_000, 1_000, 128, 0.1, 0.9
FOLDER = Path(os.environ.get("FLIPPED_LABELS", Path(tempfile.gettempdir()) / "upweight-flipped-labels"))


@dataclass(frozen=True)
class Run:
    """One training: how long, and how much it is held back from learning wrong labels by heart."""

    name: str
    epochs: int
    weight_decay: float

    def learning_rate(self, epoch: float) -> float:
        """Up to the peak in a fifth of the training, then down to 0, both in straight lines."""
        rise = self.epochs / 5
        return PEAK * (epoch / rise if epoch < rise else (self.epochs - epoch) / (self.epochs - rise))


RUNS = (Run("short", 20, 5e-4), Run("long", 50, 0.0))


class Block(nn.Module):
    """Two convolutions with a short cut around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        nn.Module.__init__(self)
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, outside)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, outside, h/stride, w/stride)."""
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inner)) + self.short(x))


def resnet() -> nn.Module:
    """Three stages of 16, 32 and 64 channels."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.GroupNorm(8, 16), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*stem, Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), *head)


def data() -> tuple[Tensor, Tensor, np.ndarray, Tensor, Tensor]:
    """Inputs, labels with flips, which rows are flipped, test inputs and labels."""
    clothes = uw.datasets.fashion_mnist()
    X, test = (
        (torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255 - 0.286) / 0.353
        for images in (clothes.images[:N], clothes.test_images)
    )
    y = clothes.labels[:N].astype(np.int64)
    draw = np.random.default_rng(0)
    wrong = draw.choice(N, FLIPPED, replace=False)
    y[wrong] = (y[wrong] + draw.integers(1, 10, FLIPPED)) % 10
    flipped = np.zeros(N, dtype=bool)
    flipped[wrong] = True
    return X, torch.from_numpy(y), flipped, test, torch.from_numpy(clothes.test_labels.astype(np.int64))


def train(run: Run, X: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """The weights after every epoch; an interrupted training goes on."""
    folder = FOLDER / run.name
    folder.mkdir(parents=True, exist_ok=True)
    model, states = resnet(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=MOMENTUM, weight_decay=run.weight_decay)
    for epoch in range(run.epochs):
        file = folder / f"epoch-{epoch + 1:02d}.pt"
        if file.exists():
            kept = torch.load(file, weights_only=True)
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            states.append(kept["model"])
            continue
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(BATCH)
        total = 0.0
        for step, rows in enumerate(order):
            optimizer.param_groups[0]["lr"] = run.learning_rate(epoch + step / len(order))
            loss = cross_entropy(model(X[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        print(f"{run.name}, epoch {epoch + 1}: mean loss {total / N:.4f}", flush=True)
    return states


def trained(states: list[dict[str, Tensor]]) -> nn.Module:
    """The model at the end of a run."""
    model = resnet()
    model.load_state_dict(states[-1])
    return model.eval()


def accuracy(model: nn.Module, X: Tensor, y: Tensor) -> float:
    """The share of rows whose label is the model's first choice."""
    with torch.no_grad():
        return float((torch.cat([model(block).argmax(1) for block in X.split(1000)]) == y).double().mean())


def suspicions(run: Run, states: list[dict[str, Tensor]], X: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """How each score is computed: SelfScores, or Scores whose first line says how much a row helps."""
    model = trained(states)
    objective = uw.Objective.from_module(
        model, cross_entropy, penalty=run.weight_decay
    )  # in float32, as it was trained
    curvature = uw.operators.EKFAC(samples=1)
    influence = uw.Influence(objective, (X, y), curvature=curvature, solver=uw.solvers.Factored())
    plain = uw.Influence(objective, (X, y), curvature=uw.operators.Identity(), damping=0.0)

    def tracin() -> object:
        epochs = [run.epochs * fifth // 5 for fifth in range(1, 6)]
        members = uw.checkpoints(resnet(), (states[epoch - 1] for epoch in epochs), X, y, loss=cross_entropy)
        return uw.TracIn(members, [run.learning_rate(epoch - 0.5) for epoch in epochs]).of_self()  # rates of mid-epoch

    return {
        "self_influence_ekfac": influence.of_self,
        "training_loss": lambda: uw.baselines.training_loss(plain, X[:1], y[:1]),
        "random": lambda: uw.baselines.random(plain, X[:1], y[:1]),
        "gradient_norm": lambda: uw.TracIn([plain], [1.0]).of_self(),
        "self_influence_tracin": tracin,
    }


def scored(run: Run, name: str, score: Callable[[], object], flipped: np.ndarray) -> dict[str, object]:
    """What inspection in the order of a score finds; kept beside the checkpoints."""
    kept = FOLDER / run.name / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    spent, scores = seconds(score)
    values = scores.values if isinstance(scores, uw.SelfScores) else -scores.values[0]  # type: ignore[attr-defined]
    curve = uw.mislabel_auc(values, flipped)
    print(f"{run.name}, {name}: {curve} ({spent:.0f} s)", flush=True)
    numbers = {
        "found_in_10_percent": curve.found_in(0.1),
        "found_in_20_percent": curve.found_in(0.2),
        "auc": curve.auc,
        "auc_interval": [curve.low, curve.high],
        "seconds": spent,
        "settings": repr(scores),
    }
    kept.write_text(json.dumps(numbers))
    return numbers


def inspected(run: Run, X: Tensor, y: Tensor, flipped: np.ndarray, test: Tensor, labels: Tensor) -> dict[str, object]:
    """One run, all scores."""
    states = train(run, X, y)
    model = trained(states)
    numbers: dict[str, object] = {
        "test_accuracy": accuracy(model, test, labels),
        "share_of_wrong_labels_learned": accuracy(model, X[flipped], y[flipped]),
    }
    return numbers | {name: scored(run, name, score, flipped) for name, score in suspicions(run, states, X, y).items()}


def main() -> None:
    """The runs that are named, or both."""
    known = data()
    chosen = [run for run in RUNS if run.name in sys.argv[1:] or not sys.argv[1:]]
    numbers = {run.name: inspected(run, *known) for run in chosen}
    settings = {"n": N, "flipped": FLIPPED, "batch": BATCH, "peak_rate": PEAK, "momentum": MOMENTUM}
    runs = {run.name: {"epochs": run.epochs, "weight_decay": run.weight_decay} for run in chosen}
    report(__file__, settings | {"runs": runs, "threads": torch.get_num_threads()}, numbers)


if __name__ == "__main__":
    main()
