"""Kronecker curvatures of models that use their parameters differently on rows of other lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.operators import EKFAC, KFAC, GaussNewton

WORDS = 7


class Placed(nn.Module):
    """A language model whose table of positions is cut to the length of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(WORDS, 4), nn.Linear(4, 5), nn.Linear(5, WORDS)
        self.places = nn.Parameter(torch.randn(1, 16, 4))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        h = (self.table(input_ids) + self.places[:, :length]) * attention_mask[..., None]
        return self.out(torch.tanh(self.inner(h.cumsum(1)))).transpose(1, 2)


def texts():
    draw = torch.Generator().manual_seed(1)
    found = [torch.randint(0, WORDS, (length,), generator=draw) for length in (3, 7, 5, 9, 4, 12, 2, 8)]
    return [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text.flip(0)} for text in found]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tables_of_positions_may_be_cut_to_the_length_of_a_batch(batch_size):
    """EKFAC's trace is that of the Gauss–Newton matrix, whatever lengths stand in a batch."""
    torch.manual_seed(0)
    settings = {"loss": nn.CrossEntropyLoss(), "damping": 0.1, "batch_size": batch_size, "progress": False}
    model = Placed().double()
    exact = uw.explain(model, texts(), curvature=GaussNewton(), **settings).operator.matrix()
    influence = uw.explain(model, texts(), curvature=EKFAC(), **settings)
    C = influence.operator.matrix()
    assert sum(basis.at.numel() for basis in influence.operator.bases) == influence.objective.size
    for basis in influence.operator.bases:
        places = basis.at.flatten()
        assert float(C.diag()[places].sum()) == pytest.approx(float(exact.diag()[places].sum()), rel=1e-9), basis.name
    rough = uw.explain(model, texts(), curvature=KFAC(), **settings).operator.matrix()
    assert float(torch.linalg.eigvalsh(rough).min()) > -1e-9


class Branching(nn.Module):
    """Two layers, of which short inputs take one, the other, or both in another order."""

    def __init__(self, short: str) -> None:
        super().__init__()
        self.short = short
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chain = [self.first, self.second]
        if x.shape[1] < 4:
            chain = {"other order": chain[::-1], "one of them": chain[:1]}[self.short]
        for layer in chain:
            x = torch.tanh(layer(x))
        return self.out(x.mean(1))


@pytest.mark.parametrize("short", ["other order", "one of them"])
def test_an_index_reads_queries_that_take_another_way(tmp_path, short):
    draw = torch.Generator().manual_seed(1)
    X, y = torch.randn(40, 6, 4, generator=draw, dtype=torch.float64), torch.arange(40) % 2
    queries = torch.randn(3, 3, 4, generator=draw, dtype=torch.float64), torch.tensor([0, 1, 1])
    torch.manual_seed(0)
    model = Branching(short).double()
    influence = uw.explain(model, X, y, loss=cross_entropy, curvature=EKFAC(), damping=0.1, progress=False)
    index = influence.index(tmp_path / "index", error=0.001, bits=8)
    exact = influence.on_loss(*queries).values
    found = index.on_loss(index.coordinates(influence, *queries)).values
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
