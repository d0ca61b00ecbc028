"""Claim: EKFAC of a small ResNet and all scores of 100 queries take half of kronfluence's time, or less.

MNIST, three residual blocks, no batch normalisation (kronfluence has no factors for it), trained for 300 steps. In one
process on one thread, in turns: kronfluence's factors, eigenvectors and pairwise scores in its documented calls, and
`explain(…, curvature=EKFAC(samples=1)).on_loss(…)`, both at the same damping, in float32, in seconds of the processor.

    pip install --no-deps kronfluence==1.0.1; pip install accelerate einops einconv opt-einsum
    UPWEIGHT_DATA=… python benchmarks/resnet_beside_kronfluence.py [rows]      # 10,000 if it is not said
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import report
from kronfluence_scores import ekfac_scores
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import upweight as uw

QUERIES, DAMPING, BATCH, STEPS, LR, TURNS = 100, 1e-3, 250, 300, 2e-3, 2


class Block(nn.Module):
    """x + two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        Block(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        Block(32),
        Block(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def rows(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = uw.datasets.mnist()
    X, Xq = (torch.from_numpy(x.reshape(-1, 1, 28, 28) / 255).float() for x in (data.images, data.test_images))
    y, yq = (torch.from_numpy(np.asarray(labels)).long() for labels in (data.labels, data.test_labels))
    return X[:n], y[:n], Xq[:QUERIES], yq[:QUERIES]


def trained(X: Tensor, y: Tensor) -> nn.Module:
    model = network()
    steps, draw = torch.optim.Adam(model.parameters(), LR), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = torch.randint(len(X), (64,), generator=draw)
        steps.zero_grad()
        cross_entropy(model(X[batch]), y[batch]).backward()
        steps.step()
    return model.eval()


def summed_loss(model: nn.Module, batch: Any, sample: bool) -> Tensor:
    """Cross-entropy of a batch, of labels that are drawn from the model if a sample is asked for."""
    logits = model(batch[0])
    labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0] if sample else batch[1]
    return cross_entropy(logits, labels, reduction="sum")


def busy(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = function()
    return time.process_time() - start, value


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    X, y, Xq, yq = rows(n)
    model, twin = trained(X, y), network()
    twin.load_state_dict(model.state_dict())
    twin.eval()
    theirs = ekfac_scores(twin, summed_loss, (X, y), (Xq, yq), batch=BATCH, damping=DAMPING)
    objective = uw.Objective.from_module(model, cross_entropy, dtype=torch.float32)

    def ours() -> NDArray[np.float64]:
        settings = {"curvature": uw.operators.EKFAC(samples=1), "damping": DAMPING, "progress": False}
        return uw.Influence(objective, (X, y), **settings).on_loss(Xq, yq).values

    taken = []
    for _ in range(TURNS):
        their_seconds, pairs = busy(theirs)
        our_seconds, values = busy(ours)
        taken.append((their_seconds, our_seconds))
        print(their_seconds, our_seconds, file=sys.stderr, flush=True)
    ratios = [one / other for one, other in taken]
    with torch.no_grad():
        right = float((model(Xq).argmax(1) == yq).double().mean())
    numbers = {
        "kronfluence_seconds": min(one for one, _ in taken),
        "upweight_seconds": min(other for _, other in taken),
        "kronfluence_over_upweight": float(np.median(ratios)),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "pearson_of_the_two": float(np.corrcoef(pairs.ravel(), values.ravel())[0, 1]),
        "queries_that_are_right": right,
    }
    settings = {
        "n": n,
        "queries": QUERIES,
        "p": objective.size,
        "damping": DAMPING,
        "batch": BATCH,
        "turns": TURNS,
        "threads": 1,
        "precision": "float32",
        "theirs": "fit_all_factors('ekfac') and compute_pairwise_scores, kronfluence 1.0.1",
    }
    report(__file__, settings, numbers)


if __name__ == "__main__":
    main()
