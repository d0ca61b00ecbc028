"""The second sweep of EKFAC takes what the first has captured for it, and finds the same without."""

from __future__ import annotations

import pytest
import torch

import upweight as uw
from upweight.operators import EKFAC, EmpiricalFisher, ahead, kronecker, uses
from upweight.operators.ahead import Ahead
from upweight.operators.cotangents import Signs

X = torch.randn(60, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))


def operator(curvature, **settings):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(48, 3)
    model = torch.nn.Sequential(*layers).double()
    return uw.explain(model, X, Y, loss=torch.nn.functional.cross_entropy, curvature=curvature, **settings).operator


def passes(monkeypatch, curvature, **settings):
    """The eigenvalues, and how often so many rows went through the model for the two sweeps."""
    seen, plain = [], uses.layers.captured

    def counted(objective, plan, batch, cotangents):
        seen.append(len(batch[1]))
        return plain(objective, plan, batch, cotangents)

    with monkeypatch.context() as patch:
        patch.setattr(uses.layers, "captured", counted)
        found = operator(curvature, **settings)
    return found.eigenvalues, seen[1:]  # the first is of a few rows


@pytest.mark.parametrize(
    "curvature", [EKFAC(samples=1), EKFAC(samples=3), EKFAC(), EKFAC(of=EmpiricalFisher())], ids=repr
)
def test_what_is_kept_changes_nothing_but_the_number_of_passes(monkeypatch, curvature):
    kept, once = passes(monkeypatch, curvature, batch_size=20)
    monkeypatch.setattr(kronecker, "ROOM", 0)
    plain, twice = passes(monkeypatch, curvature, batch_size=20)
    assert once == [20] * 3
    assert twice == [20] * 6
    torch.testing.assert_close(kept, plain, rtol=1e-12, atol=1e-15)


def test_of_many_rows_the_first_are_kept(monkeypatch):
    plain, _ = passes(monkeypatch, EKFAC(samples=1), batch_size=20)
    monkeypatch.setattr(ahead.Ahead, "make_room", lambda self, *_: setattr(self, "rows", 45))
    some, seen = passes(monkeypatch, EKFAC(samples=1), batch_size=20)
    assert seen == [20] * 4  # the last twenty of 60 come once more
    torch.testing.assert_close(some, plain, rtol=1e-12, atol=1e-15)


def test_room_is_counted_in_bytes_and_shared_with_the_factors(monkeypatch):
    rooms = []
    monkeypatch.setattr(Ahead, "make_room", lambda self, first, each, room: rooms.append((each, room)))
    sweep = operator(EKFAC(samples=2)).sweep
    operator(EKFAC(samples=2), memory_budget="40MB")
    blocks = kronecker.Kronecker.blocks_of(sweep)[1]
    taken = kronecker.needed(blocks, sweep, 1)
    assert rooms == [(2, kronecker.ROOM - taken), (2, 30_000_000 - taken)]


def test_the_rows_that_there_is_room_for():
    found = uses.Uses.of(operator(EKFAC(samples=1)).sweep)
    convolution, linear = 8 * (36 + 16 * 3), 8 * (48 + 3)  # inputs and slopes of a row; pixels, not what sees them
    one = Ahead(Signs(1, 0, 1))
    one.make_room(found.first, 1, 10 * (convolution + linear) + 5)
    assert one.rows == 10
    one.make_room(found.first, 1, -1)
    assert one.rows == 0
    source = Signs(1, 0)
    assert one.sources(source, range(5)) == [source]
    one.rows = 5
    assert one.sources(source, range(5)) == [source, one.source]
    assert one.sources(source, range(1, 6)) == [source]
