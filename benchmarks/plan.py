"""Claim: `plan` says memory within 30 % and processor time within a factor of two, before anything is done.

Five studies: logistic regression on dense data, the same on sparse text, a small convolutional network, a head on
frozen features, and a small transformer with EKFAC. The plan and the truth are found in processes of their own, each
after a first question to a tiny model, which loads what is loaded once. Memory is what is resident at most above what
was with data and model; seconds are those of the processor, for the machine may be shared.

    UPWEIGHT_DATA=… python benchmarks/plan.py [STUDY …]        # → results/plan.json; some minutes on one core
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import torch
from common import report
from torch import Tensor, nn

import upweight as uw
from upweight.runs.meter import Meter

Asked = tuple[uw.Influence, tuple[Any, Any]]


def linear() -> Asked:
    """Logistic regression on 200,000 × 100 numbers, 100 queries."""
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    X = draw.normal(size=(200_000, 100))
    y = (X @ draw.normal(size=100) / 5 + draw.logistic(size=len(X)) > 0).astype(int)
    model = LogisticRegression(tol=1e-8, solver="newton-cholesky").fit(X, y)
    Xq = draw.normal(size=(100, 100))
    return uw.explain(model, X, y), (Xq, (Xq.sum(1) > 0).astype(int))


def text() -> Asked:
    """Logistic regression on 4,137 e-mails as 44,618 counts of words, 200 queries."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    mail = uw.datasets.enron1()
    order = np.random.default_rng(0).permutation(len(mail.texts))
    texts, spam, words = [mail.texts[i] for i in order], mail.labels[order], CountVectorizer()
    X = words.fit_transform(texts[:-1035]).astype(float)
    model = LogisticRegression(C=1 / (1e-4 * X.shape[0]), tol=1e-8, max_iter=5000).fit(X, spam[:-1035])
    return uw.explain(model, X, spam[:-1035]), (words.transform(texts[-200:]).astype(float), spam[-200:])


def digits(n: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures of digits, 28 × 28."""
    data = uw.datasets.mnist()
    chosen = slice(start, start + n)
    return torch.from_numpy(data.images[chosen].reshape(-1, 1, 28, 28) / 255).float(), torch.from_numpy(
        data.labels[chosen]
    ).long()


def trained(model: nn.Module, X: Tensor, y: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for start in range(0, len(X), 100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[start : start + 100]), y[start : start + 100]).backward()
            optimizer.step()
    return model.eval()


def network() -> Asked:
    """A convolutional network of 2,330 parameters on 3,000 digits: Gauss–Newton and CG, 10 queries."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.AvgPool2d(2), nn.Conv2d(1, 6, 5, stride=2), nn.Tanh(), nn.Conv2d(6, 16, 3), nn.Tanh(), nn.Flatten()),
        nn.Linear(144, 10),
    )
    X, y = digits(3000)
    model = trained(model, X, y, 5)
    influence = uw.explain(model, X, y, loss=nn.functional.cross_entropy, solver=uw.solvers.CG())
    return influence, digits(10, 3000)


def head() -> Asked:
    """The last layer of a network, 1,290 parameters on features of 20,000 digits, 100 queries."""
    torch.manual_seed(0)
    body = (nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 144, 128), nn.ReLU())
    X, y = digits(20_000)
    model = trained(nn.Sequential(*body, nn.Linear(128, 10)), X, y, 1)
    asked = {"loss": nn.functional.cross_entropy, "penalty": 1e-4, "parameters": lambda name: name.startswith("5.")}
    return uw.explain(model, X, y, **asked), digits(100, 20_000)


class Words(nn.Module):
    """A transformer of one layer that tells the next of 64 words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 128), nn.Linear(128, 64)
        self.layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(words)).mean(1))


def transformer() -> Asked:
    """EKFAC of a transformer of 149,184 parameters on 2,000 texts of 16 words, 10 queries."""
    torch.manual_seed(0)
    X = torch.randint(0, 64, (2010, 16))
    model, y = Words(), X[:, 3]
    trained(model, X[:2000], y[:2000], 1)
    asked = {"loss": nn.functional.cross_entropy, "curvature": uw.operators.EKFAC(samples=1)}
    return uw.explain(model, X[:2000], y[:2000], **asked), (X[2000:], y[2000:])


STUDIES = {study.__name__: study for study in (linear, text, network, head, transformer)}


def loaded() -> None:
    """A first question, which imports what is imported late."""
    X = torch.randn(8, 3)
    for curvature in (uw.operators.GaussNewton(), uw.operators.EKFAC()):
        asked = {"loss": nn.functional.mse_loss, "damping": 1.0, "curvature": curvature}
        uw.explain(nn.Linear(3, 1), X, X[:, :1], **asked).on_loss(X[:2], X[:2, :1])


def planned(name: str) -> dict[str, Any]:
    loaded()
    influence, on = STUDIES[name]()
    plan, taken = Meter().lap(lambda: influence.plan(*on))
    print(plan, file=sys.stderr)
    kept = ("memory", "processor_seconds", "seconds_between", "passes", "flops", "products", "forecast", "rehearsed")
    told = {key: value for key, value in plan.to_dict().items() if key in kept}
    return told | {"planning_processor_seconds": taken.processor_seconds, "steps": plan.to_dict()["steps"]}


def measured(name: str) -> dict[str, Any]:
    loaded()
    influence, on = STUDIES[name]()
    scores, taken = Meter().lap(lambda: influence.on_loss(*on))
    return {
        "memory": taken.peak,
        "processor_seconds": taken.processor_seconds,
        "products": scores.certificate.sweeps,
        "solver": type(influence.solver).__name__,
    }


def alone(kind: str, name: str) -> dict[str, Any]:
    """In a process of its own."""
    out = subprocess.run([sys.executable, __file__, kind, name], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] in (["planned"], ["measured"]):
        warnings.simplefilter("ignore")
        print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
        return
    numbers = {}
    for name in sys.argv[1:] or STUDIES:
        plan, truth = alone("planned", name), alone("measured", name)
        numbers[name] = {
            "what": STUDIES[name].__doc__,
            "memory_planned_over_true": plan["memory"] / truth["memory"],
            "processor_time_planned_over_true": plan["processor_seconds"] / truth["processor_seconds"],
            "planned": plan,
            "true": truth,
        }
        print(name, {key: value for key, value in numbers[name].items() if "over" in key}, file=sys.stderr)
    if not sys.argv[1:]:
        report(__file__, {"threads": torch.get_num_threads()}, numbers)


if __name__ == "__main__":
    main()
