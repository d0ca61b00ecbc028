"""Products by convolution are those by BLAS, whatever the numbers of rows and columns; others are left to BLAS."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import upweight as uw
from upweight.model import products
from upweight.model.layers import written


@pytest.fixture
def convolving(monkeypatch):
    """As on a processor where that is faster; how often it was done."""
    done, plain = [], functional.conv2d
    for module in (products, written):
        monkeypatch.setattr(module, "convolves_faster", lambda: True)
    monkeypatch.setattr(products, "_FLOPS", 0)
    monkeypatch.setattr(products.functional, "conv2d", lambda *given: done.append(given) or plain(*given))
    return done


@pytest.mark.parametrize("shape", [(128, 17), (133, 16), (3, 50, 33), (9, 1, 16, 48)])
@pytest.mark.parametrize("columns", [1, 10, 35])
def test_a_convolution_is_the_product(convolving, shape, columns):
    draw = torch.Generator().manual_seed(0)
    M, Q = torch.randn(*shape, generator=draw), torch.randn(shape[-1], columns, generator=draw)
    exact = (M.double() @ Q.double()).float()
    torch.testing.assert_close(products.product(M, Q), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.product(M, Q.T.contiguous().T), exact, rtol=1e-5, atol=1e-5)
    assert len(convolving) == 2


@pytest.mark.parametrize(("rows", "dtype"), [(127, torch.float32), (256, torch.float64)])
def test_few_rows_and_float64_are_left_to_blas(convolving, rows, dtype):
    M, Q = torch.randn(rows, 16, dtype=dtype), torch.randn(16, 3, dtype=dtype)
    assert torch.equal(products.product(M, Q), M @ Q)
    assert not convolving


def test_scores_and_factors_are_the_same(convolving, monkeypatch):
    """A convolutional network's rows for many queries, and its EKFAC, beside the same by BLAS."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 3)
    model = torch.nn.Sequential(*layers)
    X, y = torch.randn(300, 3, 6, 6), torch.randint(0, 3, (300,))

    objective = uw.Objective.from_module(model, functional.cross_entropy, dtype=torch.float32)

    def values():
        curvature = uw.operators.EKFAC(samples=1)
        found = uw.Influence(objective, (X, y), curvature=curvature, damping=0.1, progress=False)
        return torch.from_numpy(found.on_loss(X[:20], y[:20]).values)

    found = values()
    assert len(_pictures(convolving)) > 3
    for module in (products, written):
        monkeypatch.setattr(module, "convolves_faster", lambda: False)
    convolving.clear()
    plain = values()
    assert convolving  # by the model itself
    assert not _pictures(convolving)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def _pictures(done):
    return [given for given in done if given[0].shape[-2:] == products._PICTURE]


def test_it_is_asked_of_the_processor_once():
    assert products.convolves_faster() is products.convolves_faster()
    assert isinstance(products.convolves_faster(), bool)
