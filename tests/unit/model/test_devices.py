"""A device is waited for once a chunk, and what it computes is what the processor does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.errors import InvalidInput
from upweight.model.chunks import CHUNK

NETS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 3)),
    "cnn": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
}
WAYS = {
    "EKFAC": {"curvature": uw.operators.EKFAC()},
    "CG": {"curvature": uw.operators.GaussNewton(), "solver": uw.solvers.CG(rtol=1e-9)},
    "Cholesky": {"curvature": uw.operators.GaussNewton(), "solver": uw.solvers.Cholesky()},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest value


def data(n=CHUNK + 200):
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(n, 1, 6, 6, generator=draw)
    return X, (X[:, 0, 0, 0] > 0).long() + (X[:, 0, 1, 1] > 0).long()


class Seen(torch.Tensor):
    """A tensor that counts how often the host would wait for it."""

    waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        waiting = {torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__}
        Seen.waits += function in waiting
        if function is torch.Tensor.cpu:  # from there on it is one like others
            return super().__torch_function__(function, types, args, kwargs or {}).as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def small_batches():
    """Ridge regression on three chunks, in batches of 100."""
    X = np.random.default_rng(0).normal(size=(2 * CHUNK + 300, 3))
    theta = torch.zeros(3, dtype=torch.float64)
    objective = uw.Objective(lambda params, example: (example[0] @ params - example[1]) ** 2, theta)
    return uw.Influence(objective, (X, X[:, 0]), batch_size=100, progress=False).sweep, X


def test_the_host_waits_once_a_chunk(small_batches):
    sweep, X = small_batches
    calls = []

    def both(batch, weights):
        calls.append(len(weights))
        rows = batch[0].as_subclass(Seen)
        return rows, rows.T @ weights

    Seen.waits = 0
    total = sweep.fold(lambda batch, weights: both(batch, weights)[1])
    assert (Seen.waits, len(calls)) == (3, 25)
    np.testing.assert_allclose(total.numpy(), X.sum(0), rtol=1e-12, atol=1e-9)
    Seen.waits = 0
    assert np.array_equal(sweep.emit(lambda batch, weights: both(batch, weights)[0]), X)
    assert Seen.waits == 3
    Seen.waits = 0
    rows, total = sweep.emit_with_sum(both)
    assert Seen.waits == 6
    assert np.array_equal(rows, X)
    np.testing.assert_allclose(total.numpy(), X.sum(0), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("row", [7, 1023, CHUNK + 150])
def test_a_row_that_is_not_finite_is_named_whatever_its_batch(small_batches, row):
    sweep, X = small_batches

    def broken(batch, weights):
        return torch.where(batch[0][:, :1] == X[row, 0], torch.nan, batch[0])

    with pytest.raises(InvalidInput, match=f"row {row} gives NaN"):
        sweep.emit(broken)
    rows = np.array([row - 1, row, row + 1])
    with pytest.raises(ValueError, match=f"row {row} gives NaN"):
        sweep.emit(broken, rows=rows)


def asked(device, net, way, dtype, **settings):
    """Scores, what leads among them, and self-influence, of a module and data that were moved there."""
    torch.manual_seed(0)
    module, (X, y) = NETS[net]().to(device, dtype), data()
    X, y, loss = X.to(device, dtype), y.to(device), nn.functional.cross_entropy
    influence = uw.explain(module, X, y, loss=loss, damping=0.05, progress=False, **WAYS[way], **settings)
    on = X[:3], y[:3]
    found = influence.on_loss(*on).values, influence.of_self(range(50)).values, influence.leading(*on, k=5).total
    assert next(module.parameters()).device.type == device
    return [np.asarray(one) for one in found]


def close(ours, theirs, dtype):
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(one - other).max() <= TOLERANCE[dtype] * np.abs(other).max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", NETS)
def test_a_device_answers_as_the_processor_does(net, way, dtype):
    close(asked("cuda", net, way, dtype), asked("cpu", net, way, dtype), dtype)


@pytest.mark.parametrize("net", NETS)
def test_the_processor_answers_alike_in_other_batches(net):
    """The same comparison, where there is no other device."""
    settings = net, "EKFAC", torch.float64
    close(asked("cpu", *settings, batch_size=77), asked("cpu", *settings), torch.float64)


@pytest.mark.gpu
def test_a_sweep_on_a_gpu_waits_once_a_chunk():
    """By CUDA's own debug mode, which counts what synchronises."""
    X, y = (one.cuda() for one in data(2 * CHUNK))
    module = NETS["mlp"]().cuda()
    influence = uw.explain(module, X, y, loss=nn.functional.cross_entropy, batch_size=64, damping=0.05, progress=False)
    V = torch.randn(2, influence.objective.size, dtype=torch.float32, device="cuda")

    def dots(batch, weights):
        return uw.calculus.gradients(influence.objective, batch) @ V.T

    influence.sweep.emit(dots)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            influence.sweep.emit(dots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batches = 2 * CHUNK // 64
    assert len(seen) < batches
