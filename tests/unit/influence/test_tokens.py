"""Values taken apart by tokens: against gradients of single tokens' losses by plain autograd, and against on_loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from tolerances import EXACT
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.operators import EKFAC, GaussNewton

WORDS = 9


class Speaker(nn.Module):
    """Each token's place, and the tokens before it, give the next."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(WORDS, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.table(x))[0]).transpose(1, 2)


def talk(n: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (n, length + 1), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    torch.manual_seed(0)
    return Speaker().double().eval()


def explained(speaker, curvature, **settings):
    rows = talk(12, 6, 1)
    y = rows[:, 1:].clone()
    y[3, :2] = -100  # a question that nobody has to predict
    criterion = nn.CrossEntropyLoss()
    return uw.explain(
        speaker, rows[:, :-1], y, loss=criterion, curvature=curvature, damping=0.05, progress=False, **settings
    )


def token_gradient(model, x, y, place, share):
    """The gradient of one token's loss times its share in the row's mean, by autograd."""
    loss = cross_entropy(model(x[None])[0, :, place][None], y[place][None]) * share
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([piece.reshape(-1) for piece in found])


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("curvature", [GaussNewton(), EKFAC()], ids=["GaussNewton", "EKFAC"])
@pytest.mark.parametrize("length", [4, 9], ids=["short query", "long query"])
def test_each_pair_of_tokens_is_a_product_of_their_gradients(speaker, curvature, row, length):
    influence = explained(speaker, curvature)
    asked = talk(1, length, 7)
    xq, yq = asked[:, :-1], asked[:, 1:]
    found = influence.by_token(row, on=(xq, yq))
    example = influence.examples.batch([row])
    counted = [place for place in range(6) if example[1][0, place] >= 0]
    G = torch.stack(
        [token_gradient(speaker, example[0][0], example[1][0], place, 1 / len(counted)) for place in counted]
    )
    Gq = torch.stack([token_gradient(speaker, xq[0], yq[0], place, 1 / length) for place in range(length)])
    C = influence.operator.matrix() + influence.damping * torch.eye(G.shape[1], dtype=torch.float64)
    expected = Gq @ torch.linalg.solve(C, G.T) * influence.examples.weights[row] / influence.n
    assert np.abs(found.values - expected.numpy()).max() <= 1e-9 * float(expected.abs().max())
    assert found.total == pytest.approx(influence.on_loss(xq, yq).values[0, row], rel=1e-9)
    assert [token.place for token in found.query] == list(range(length))
    assert len([token for token in found.row if token.place is not None]) == len(counted)


def test_what_a_row_carries_of_the_penalty_is_told_apart(speaker):
    influence = explained(speaker, GaussNewton(), penalty=0.1, penalty_per_example=True)
    for length in (3, 9):  # systems for the tokens of the query, and of the row
        asked = talk(1, length, 8)
        found = influence.by_token(1, on=(asked[:, :-1], asked[:, 1:]))
        assert np.abs(found.penalty).max() > 0
        whole = influence.on_loss(asked[:, :-1], asked[:, 1:]).values[0, 1]
        assert found.total == pytest.approx(whole, rel=1e-9)
        assert found.of_query.sum() == pytest.approx(whole, rel=1e-9)
        assert found.of_row.sum() + found.penalty.sum() == pytest.approx(whole, rel=1e-9)


def test_spans_of_a_query_add_up_to_the_whole(speaker):
    influence = explained(speaker, EKFAC())
    asked = talk(1, 6, 9)
    x, y = asked[:, :-1], asked[:, 1:]
    spans = [torch.where(torch.arange(6)[None] < 2, y, -100), torch.where(torch.arange(6)[None] >= 2, y, -100)]
    parts = [influence.on_loss(x, span).values * share for span, share in zip(spans, (2 / 6, 4 / 6), strict=True)]
    whole = influence.on_loss(x, y).values
    assert np.abs(sum(parts) - whole).max() <= EXACT * np.abs(whole).max() * 100
    tokens = influence.by_token(2, on=(x, y))
    assert tokens.of_query[:2].sum() == pytest.approx(parts[0][0, 2], rel=1e-9)


def test_it_is_shown_with_its_words(speaker):
    influence = explained(speaker, EKFAC())
    asked = talk(1, 4, 9)
    words = [f"w{k}<" for k in range(WORDS)]
    found = influence.by_token(3, on=(asked[:, :-1], asked[:, 1:]), tokenizer=words.__getitem__)
    assert [token.text for token in found.query] == [words[k] for k in asked[0, 1:]]
    page = found._repr_html_()
    assert "&lt;" in page
    assert "w0<" not in page
    assert f"{found.total:+.3g}" in page
    assert str(found).count("\n") == 2
    frame = found.to_pandas()
    assert frame.shape == found.values.shape
    strongest = np.argmax(np.abs(found.of_query))
    assert str(found).splitlines()[1].split("'")[1] == found.query[strongest].text
    assert influence.by_token(0, on=(asked[:, :-1], asked[:, 1:])).row[0].text == str(int(influence.examples.y[0, 0]))


def test_losses_of_one_prediction_and_several_queries_are_refused(speaker):
    influence = explained(speaker, EKFAC())
    asked = talk(2, 4, 9)
    with pytest.raises(InvalidInput, match="2 queries"):
        influence.by_token(0, on=(asked[:, :-1], asked[:, 1:]))
    with pytest.raises(InvalidInput, match="2 rows"):
        influence.by_token([0, 1], on=(asked[:1, :-1], asked[:1, 1:]))
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = uw.explain(nn.Linear(3, 2).double(), X, torch.arange(8) % 2, loss=cross_entropy, damping=0.1)
    with pytest.raises(UnsupportedModel, match="one prediction a row"):
        plain.by_token(0, on=(X[:1], torch.tensor([1])))


@pytest.mark.parametrize("behind", [True, False], ids=["classes last", "classes first"])
def test_as_many_places_as_words_are_told_from_words(behind):
    """An output of 5 × 5 does not say which axis is the places'; the loss does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, 3), nn.GRU(3, 5, batch_first=True)).double()

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[0] if behind else self.inner(x)[0].transpose(1, 2)

    X, y = talk(12, 4, 1), talk(12, 4, 2) % 5
    loss = (lambda z, t: cross_entropy(z.transpose(1, 2), t)) if behind else cross_entropy
    influence = uw.explain(Last(), X, y, loss=loss, damping=0.05, progress=False)
    found = influence.by_token(3, on=(X[:1], y[:1]))

    def gradients(row):
        losses = cross_entropy(model(X[row][None])[0][0], y[row], reduction="none") / 5
        each = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
        return torch.stack([torch.cat([piece.reshape(-1) for piece in one]) for one in each])

    C = influence.operator.matrix() + influence.damping * torch.eye(influence.objective.size, dtype=torch.float64)
    expected = gradients(0) @ torch.linalg.solve(C, gradients(3).T) / 12
    assert np.abs(found.values - expected.numpy()).max() <= 1e-7 * float(expected.abs().max())
