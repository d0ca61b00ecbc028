"""The workloads: rows, queries and weights as plain files, written once.

    data.npz      X, y, Xq, yq
    weights.npz   the trained parameters in float64, by their names in torch
    facts.json    n, q, p, λ, and how far the weights are from a minimum

R(θ) = mean of the rows' losses + (l2/2)‖θ‖² was minimised. Every library is asked for the effect of removing a row, the
penalty left as it is, by a curvature C of the loss alone: (C + λI)⁻¹ with one λ = l2 + damping.
"""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from networks import CHARACTERS, PIXELS, WORDS, build, loss_of
from numpy.typing import NDArray

Data = tuple[NDArray, NDArray, NDArray, NDArray]


@dataclass(frozen=True)
class Workload:
    """What is asked: a model and its data by name, the sizes, and λ."""

    name: str
    title: str
    rows: int
    queries: int
    l2: float
    damping: float
    data: Callable[[int, int], Data]
    steps: int = 0

    @property
    def λ(self) -> float:
        return self.l2 + self.damping


def folder() -> Path:
    return Path(os.environ["UPWEIGHT_DATA"])


def mnist(rows: int, queries: int, pixels: int = PIXELS, image: bool = False) -> Data:
    """The first images of the training and of the test set, in [0, 1], 14 × 14 by means of four pixels."""

    def images(file: str, count: int) -> NDArray:
        with gzip.open(folder() / "mnist" / file) as stream:
            found = np.frombuffer(stream.read(16 + 784 * count)[16:], np.uint8).reshape(count, 28, 28) / 255
        small = found if pixels == 28 else found.reshape(count, 14, 2, 14, 2).mean((2, 4))
        return small[:, None] if image else small.reshape(count, -1)

    def labels(file: str, count: int) -> NDArray:
        with gzip.open(folder() / "mnist" / file) as stream:
            return np.frombuffer(stream.read(8 + count)[8:], np.uint8).astype(np.int64)

    return (
        images("train-images-idx3-ubyte.gz", rows),
        labels("train-labels-idx1-ubyte.gz", rows),
        images("t10k-images-idx3-ubyte.gz", queries),
        labels("t10k-labels-idx1-ubyte.gz", queries),
    )


def enron1(rows: int, queries: int) -> Data:
    """Messages in a random order as tf-idf of the most frequent words, fitted on the rows; spam is 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, spam = [], []
    with tarfile.open(folder() / "enron1" / "enron1.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            if member.name.endswith(".txt") and ("/ham/" in member.name or "/spam/" in member.name):
                texts.append(archive.extractfile(member).read().decode("latin-1"))  # type: ignore[union-attr]
                spam.append("/spam/" in member.name)
    order = np.random.default_rng(0).permutation(len(texts))[: rows + queries]
    texts, y = [texts[i] for i in order], np.array(spam, float)[order][:, None]
    words = TfidfVectorizer(max_features=WORDS)
    X, Xq = words.fit_transform(texts[:rows]).toarray(), words.transform(texts[rows:]).toarray()
    return X, y[:rows], Xq, y[rows:]


def concrete(rows: int, queries: int) -> Data:
    """UCI Concrete, shuffled, standardised by the rows."""
    import xlrd

    sheet = xlrd.open_workbook(folder() / "tabular" / "Concrete_Data.xls").sheet_by_index(0)
    table = np.array([sheet.row_values(row) for row in range(1, sheet.nrows)])
    table = table[np.random.default_rng(0).permutation(len(table))]
    table = (table - table[:rows].mean(0)) / table[:rows].std(0)
    some = slice(rows, rows + queries)
    return table[:rows, :-1], table[:rows, -1:], table[some, :-1], table[some, -1:]


def shakespeare(rows: int, queries: int, tokens: int = 24) -> Data:
    """Pieces of tinyshakespeare, 24 characters each, as numbers; rare signs are 0."""
    with gzip.open(folder() / "text" / "tinyshakespeare.txt.gz", "rt") as stream:
        text = stream.read().lower()
    signs = sorted(set(text), key=lambda one: (-text.count(one), one))[: CHARACTERS - 1]
    number = {sign: k + 1 for k, sign in enumerate(signs)}
    ids = np.array([number.get(sign, 0) for sign in text[: (rows + queries) * tokens]]).reshape(-1, tokens)
    return ids[:rows], ids[:rows], ids[rows:], ids[rows:]


WORKLOADS = {
    one.name: one
    for one in (
        Workload("least-squares", "least squares (Concrete)", 900, 20, 0.0, 0.0, concrete),
        Workload("softmax", "softmax regression (MNIST, 14 × 14)", 1000, 20, 0.01, 0.0, mnist),
        Workload(
            "softmax-784", "softmax regression (MNIST, 28 × 28)", 2000, 20, 0.01, 0.0, lambda n, q: mnist(n, q, 28)
        ),
        Workload("text", "logistic regression of sparse text (Enron1)", 3000, 20, 1e-3, 0.0, enron1),
        Workload("mlp-concrete", "MLP (Concrete)", 900, 20, 1e-3, 0.02, concrete, 400),
        Workload("mlp-mnist", "MLP (MNIST)", 1000, 20, 1e-3, 0.02, mnist, 400),
        Workload("cnn-mnist", "small CNN (MNIST)", 1000, 20, 1e-3, 0.02, lambda n, q: mnist(n, q, image=True), 400),
        Workload("llama", "tiny Llama (characters)", 100, 8, 1e-3, 1.5, shakespeare, 400),
    )
}


def tensors(data: Data) -> tuple[torch.Tensor, ...]:
    """X, y, Xq, yq in float64, or as numbers of classes and tokens."""
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in data)


def trained(workload: Workload, X: torch.Tensor, y: torch.Tensor) -> tuple[torch.nn.Module, float]:
    """The model in float64 at a minimum, or after `steps` of L-BFGS after Adam; and ‖∇R‖ there."""
    torch.manual_seed(0)
    model, criterion = build(workload.name).double(), loss_of(workload.name)
    parameters = list(model.parameters())

    def risk() -> torch.Tensor:
        return criterion(model(X), y) + workload.l2 / 2 * sum((one**2).sum() for one in parameters)

    if workload.steps:
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(workload.steps):
            optimizer.zero_grad()
            risk().backward()
            optimizer.step()
    finish = torch.optim.LBFGS(
        parameters,
        max_iter=300 if workload.steps else 5000,
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
        history_size=100,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        finish.zero_grad()
        value = risk()
        value.backward()
        return value

    finish.step(closure)
    finish.zero_grad()
    risk().backward()
    return model.eval(), float(torch.cat([one.grad.flatten() for one in parameters]).norm())


def write(workload: Workload, target: Path) -> dict[str, float]:
    """The three files of a workload, and the facts; nothing where they exist."""
    facts = target / "facts.json"
    if not facts.exists():
        target.mkdir(parents=True, exist_ok=True)
        data = workload.data(workload.rows, workload.queries)
        np.savez(target / "data.npz", X=data[0], y=data[1], Xq=data[2], yq=data[3])
        X, y, _, _ = tensors(data)
        model, gradient = trained(workload, X, y)
        np.savez(target / "weights.npz", **{key: one.numpy() for key, one in model.state_dict().items()})
        parameters = sum(one.numel() for one in model.parameters())
        found = {"n": len(X), "q": workload.queries, "p": parameters, "λ": workload.λ, "l2": workload.l2}
        facts.write_text(json.dumps(found | {"gradient_norm": gradient, "kind": kind(workload.name)}))
    return json.loads(facts.read_text())


def kind(name: str) -> str:
    """What the targets are: numbers, two classes, classes, or tokens."""
    kinds = {"least-squares": "numbers", "mlp-concrete": "numbers", "text": "two classes", "llama": "tokens"}
    return kinds.get(name, "classes")
