"""The tanh network of figure 2 right: 2,616 parameters, its data, its training and its curvature.

What costs time is written for this network: a gradient over the 5,500 rows takes 0.6 s in float32 on one core, and
the exact Hessian is written out layer by layer, for the derivative with respect to a late layer passes the late
layers only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, unfold

from paper import digits
from upweight.operators import DenseOperator

PARAMETERS = 2_616
L2 = 0.001  # on weights, not on biases
LAYERS = ((1, 8, 3, 1), (8, 8, 3, 2), (8, 8, 3, 1), (8, 8, 3, 2), (8, 8, 3, 1), (8, 10, 1, 1))  # in, out, size, stride
BATCH = 500
CHUNK = 500
KEEP_EVERY = 1_100
STEPS = 150  # of L-BFGS in one metric
FLOOR = 1e-3  # smallest curvature in a metric
NEGLIGIBLE = 1e-6  # of a probability's square root: rows whose curvature is below rounding are left out


class Network(torch.nn.Module):
    """Six convolutions with tanh, the mean over places, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(inputs, outputs, size, stride) for inputs, outputs, size, stride in LAYERS
        )
        self.dense = torch.nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits for each (1, 28, 28) image."""
        return self.tail(0, x)

    def tail(self, layer: int, x: Tensor) -> Tensor:
        """The logits from the input of this layer."""
        for convolution in self.convolutions[layer:]:  # type: ignore[index]
            x = torch.tanh(convolution(x))
        return self.dense(x if layer > len(LAYERS) - 1 else x.mean((2, 3)))


@dataclass(frozen=True)
class Rows:
    """Images (n, 1, 28, 28) in 0 … 1 and labels."""

    X: Tensor
    y: Tensor

    @property
    def n(self) -> int:
        """How many."""
        return len(self.X)

    def to(self, dtype: torch.dtype) -> Rows:
        """The same in another precision."""
        return Rows(self.X.to(dtype), self.y)


def data(rows: int = 5_500) -> tuple[Rows, Rows]:
    """A tenth of the 55,000 training digits, drawn with seed 0, and the 10,000 test digits; float32."""
    split = digits.ten_classes()
    chosen = np.random.RandomState(0).permutation(len(split.X))[:rows]
    pairs = ((split.X[chosen], split.y[chosen]), (split.test_X, split.test_y))
    train, test = (Rows(torch.from_numpy(X).float().reshape(-1, 1, 28, 28), torch.from_numpy(y)) for X, y in pairs)
    return train, test


def untrained(seed: int = 0) -> Network:
    """Truncated normal weights of deviation 2/√fan-in, 1/√10 in the dense layer; biases 0."""
    network, generator = Network(), torch.Generator().manual_seed(seed)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            deviation = 10**-0.5 if name.startswith("dense") else 2 / float(np.prod(parameter.shape[1:])) ** 0.5
            torch.nn.init.trunc_normal_(parameter, 0, deviation, -2 * deviation, 2 * deviation, generator=generator)
    return network


@cache
def strengths() -> Tensor:
    """The penalty's strength of every parameter, (p,) float64."""
    named = Network().named_parameters()
    return torch.cat(
        [torch.full((p.numel(),), 0.0 if name.endswith("bias") else L2, dtype=torch.float64) for name, p in named]
    )


def flat(network: Network) -> Tensor:
    """θ as one float64 vector."""
    return torch.cat([p.detach().reshape(-1).double() for p in network.parameters()])


def at(theta: Tensor, dtype: torch.dtype = torch.float32) -> Network:
    """The network with these parameters."""
    network = Network().to(dtype)
    torch.nn.utils.vector_to_parameters(theta.to(dtype), network.parameters())
    return network


# ---- the objective and its derivatives -------------------------------------------------------------------------------


def risk(theta: Tensor, rows: Rows, without: int | None = None) -> tuple[float, Tensor]:
    """R and ∇R at θ, in the precision of the rows; `without` leaves out a row and its share of the penalty."""
    network, held = at(theta, rows.X.dtype), strengths()
    parameters = list(network.parameters())
    weights = torch.ones(rows.n, dtype=rows.X.dtype)
    share = 1.0
    if without is not None:
        weights[without], share = 0, 1 - 1 / rows.n
    value, gradient = 0.0, torch.zeros(PARAMETERS, dtype=torch.float64)
    for part in parts(rows.n):
        loss = cross_entropy(network(rows.X[part]), rows.y[part], reduction="none") @ weights[part]
        pieces = torch.autograd.grad(loss, parameters)
        gradient += torch.cat([piece.reshape(-1) for piece in pieces]).double()
        value += float(loss.detach())
    penalty = float((held * theta**2).sum()) / 2
    return value / rows.n + share * penalty, gradient / rows.n + share * held * theta


def parts(n: int) -> list[slice]:
    """The rows in chunks."""
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def gauss_newton(theta: Tensor, rows: Rows) -> Tensor:
    """(1/n) Σ Jᵢᵀ (diag p − ppᵀ) Jᵢ with the penalty's Hessian, (p, p) float64."""
    network = at(theta, rows.X.dtype)
    total = torch.zeros(PARAMETERS, PARAMETERS, dtype=rows.X.dtype)
    for part in parts(rows.n):
        for roots in square_roots(network, rows.X[part]):
            total.addmm_(roots.T, roots)
    return total.double() / rows.n + torch.diag(strengths())


def square_roots(network: Network, X: Tensor) -> Iterator[Tensor]:
    """Ten blocks of lines whose outer products add up to Σ Jᵢᵀ (diag p − ppᵀ) Jᵢ; lines of nearly 0 are left out.

    The square root of diag p − ppᵀ is D = diag √p − p √pᵀ; its columns are pulled back to every convolution's output,
    where a row's derivative is slopes × windows of the input.
    """
    inputs, outputs, x = [], [], X
    for convolution in network.convolutions:
        inputs.append(x.detach())
        outputs.append(convolution(x))
        x = torch.tanh(outputs[-1])
    mean = x.mean((2, 3))
    logits = network.dense(mean)
    p = logits.softmax(1).detach()
    roots = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # (b, 10, 10): one column per pull
    for k in range(10):
        column = roots[:, :, k]
        kept = column.norm(dim=1) > NEGLIGIBLE
        slopes = torch.autograd.grad(logits, outputs, column, retain_graph=k < 9)
        pieces = []
        for (_, _, size, stride), before, slope in zip(LAYERS, inputs, slopes, strict=True):
            windows = unfold(before[kept], size, stride=stride)  # (b, in · size², places)
            slope = slope[kept].flatten(2)
            pieces += [(slope @ windows.transpose(1, 2)).flatten(1), slope.sum(2)]
        pieces += [(column[kept, :, None] * mean[kept, None, :].detach()).flatten(1), column[kept]]
        yield torch.cat(pieces, 1)


def hessian(theta: Tensor, rows: Rows) -> Tensor:
    """The Hessian of R with the penalty's, (p, p) float64, layer by layer.

    The rows of an early layer hold the derivatives with respect to it and to all later ones; the rest is symmetry.
    """
    network = at(theta, rows.X.dtype)
    total = torch.zeros(PARAMETERS, PARAMETERS, dtype=torch.float64)
    start = 0
    for layer, module in enumerate([*network.convolutions, network.dense]):
        stop = start + sum(parameter.numel() for parameter in module.parameters())
        for part in parts(rows.n):
            total[start:stop, start:] += _lines(network, layer, stop - start, Rows(rows.X[part], rows.y[part]))
        total[stop:, start:stop] = total[start:stop, stop:].T
        start = stop
    return (total + total.T) / 2 / rows.n + torch.diag(strengths())


def _lines(network: Network, layer: int, size: int, rows: Rows) -> Tensor:
    """The first `size` lines of the Hessian of the summed loss with respect to this layer and the later ones."""
    modules = [*network.convolutions, network.dense]
    with torch.no_grad():
        x = rows.X
        for convolution in network.convolutions[:layer]:
            x = torch.tanh(convolution(x))
        if layer == len(LAYERS):
            x = x.mean((2, 3))
    parameters = [parameter for module in modules[layer:] for parameter in module.parameters()]
    loss = cross_entropy(network.tail(layer, x), rows.y, reduction="sum")
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    own = torch.cat([piece.reshape(-1) for piece in first])[:size]
    lines = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in own]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in line]) for line in lines]).double()


def near_hessian(theta: Tensor, rows: Rows, hard: int) -> Tensor:
    """Gauss–Newton of all rows, and the rest of the Hessian by the rows of largest residual, which make most of it."""
    with torch.no_grad():
        sure = at(theta)(rows.X).softmax(1)[torch.arange(rows.n), rows.y]
    few = sure.argsort()[:hard]
    few = Rows(rows.X[few], rows.y[few])
    rest = hessian(theta, few) - gauss_newton(theta, few)
    return gauss_newton(theta, rows) + rest * few.n / rows.n


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adam:
    """Adam on batches of 500, the first pass in file order; the rate falls to a tenth and a hundredth at two steps."""

    steps: int
    rate: float
    falls: tuple[int, ...]

    def train(self, theta: Tensor, rows: Rows, file: Path, seed: int = 0, state: Any = None) -> tuple[Tensor, Any]:
        """θ after the steps, and Adam's state; `file` keeps them, so that an interrupted run goes on."""
        network, generator, first = at(theta), np.random.RandomState(seed), 0
        optimizer = torch.optim.Adam(network.parameters(), lr=self.rate)
        if state is not None:
            optimizer.load_state_dict(state)
        held, order = strengths().float(), np.arange(rows.n)
        if file.exists():
            kept = torch.load(file, weights_only=True)
            network, first = at(kept["theta"]), kept["step"]
            optimizer = torch.optim.Adam(network.parameters(), lr=self.rate)
            optimizer.load_state_dict(kept["adam"])
        batches = rows.n // BATCH
        for _ in range((first - 1) // batches if first else 0):
            order = generator.permutation(rows.n)
        for step in range(first, self.steps):
            if step and step % batches == 0:
                order = generator.permutation(rows.n)
            for group in optimizer.param_groups:
                group["lr"] = self.rate * 0.1 ** sum(step >= fall for fall in self.falls)
            batch = torch.from_numpy(order[step % batches * BATCH :][:BATCH])
            loss = cross_entropy(network(rows.X[batch]), rows.y[batch])
            penalty = held @ torch.nn.utils.parameters_to_vector(network.parameters()) ** 2 / 2
            optimizer.zero_grad()
            (loss + penalty).backward()
            optimizer.step()
            if (step + 1) % KEEP_EVERY == 0:
                torch.save({"theta": flat(network), "step": step + 1, "adam": optimizer.state_dict()}, file)
                now = float((loss + penalty).detach())
                print(f"Adam: step {step + 1} of {self.steps}, R of the batch {now:.4f}", flush=True)
        return flat(network), optimizer.state_dict()


@dataclass
class Fit:
    """L-BFGS on all rows from here on, in rounds; `file` keeps it every few gradients, so an interrupted run goes on.

    Args:
        theta: the lowest R so far.
        norm: ‖∇R‖ there.
        rounds: how many are done.
        gradients: how many were taken.
    """

    theta: Tensor
    file: Path
    norm: float = np.inf
    rounds: int = 0
    gradients: int = 0
    _lowest: float = np.inf

    @classmethod
    def resumed(cls, theta: Tensor, file: Path) -> Fit:
        """What the file kept, else a start at θ."""
        return cls(file=file, **torch.load(file, weights_only=True)) if file.exists() else cls(theta, file)

    def refine(self, rows: Rows, rounds: int, hard: int, goal: float) -> None:
        """Rounds, each in the metric of the curvature where it starts, until ‖∇R‖ ≤ goal."""
        while self.rounds < rounds and self.norm > goal:
            metric = self.file.with_name("metric.pt")
            if not metric.exists():
                torch.save(near_hessian(self.theta, rows, hard), metric)
            found = descend(
                partial(self._risk, rows),
                self.theta,
                Metric(DenseOperator(torch.load(metric, weights_only=True))),
                goal,
                STEPS,
            )
            self.theta, self.norm, self.rounds = found.theta, found.norm, self.rounds + 1
            self._keep()
            metric.unlink()
            print(f"round {self.rounds}: R {found.value:.6f}, ‖∇R‖ {self.norm:.2e} {time.strftime('%X')}", flush=True)

    def _risk(self, rows: Rows, theta: Tensor) -> tuple[float, Tensor]:
        value, gradient = risk(theta, rows)
        self.gradients += 1
        if value < self._lowest:
            self.theta, self.norm, self._lowest = theta, float(gradient.norm()), value
        if self.gradients % 10 == 0:
            self._keep()
        return value, gradient

    def _keep(self) -> None:
        told = {"theta": self.theta, "norm": self.norm, "rounds": self.rounds, "gradients": self.gradients}
        torch.save(told, self.file)


@dataclass(frozen=True)
class Metric:
    """Minimisation runs in u with θ = θ₀ + |M|^(−½) u, where the curvature is close to ±1.

    Eigenvalues of M count by their size, and at least FLOOR.
    """

    matrix: DenseOperator

    def scaled(self, vector: Tensor, power: float = -0.5) -> Tensor:
        """|M|^power v."""
        return self.matrix.map(lambda x: x.abs().clamp(min=FLOOR) ** power, vector[None])[0]


@dataclass(frozen=True)
class Found:
    """Where a minimisation ended."""

    theta: Tensor
    value: float
    gradient: Tensor
    calls: int

    @property
    def norm(self) -> float:
        """‖∇‖."""
        return float(self.gradient.norm())


def descend(
    function: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, metric: Metric, goal: float, steps: int
) -> Found:
    """L-BFGS in the metric, until ‖∇‖ ≤ goal or after so many steps: the lowest value found."""
    found, calls = Found(start, np.inf, torch.full_like(start, np.inf), 0), 0

    def whitened(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal calls, found
        theta = start + metric.scaled(torch.from_numpy(u))
        value, gradient = function(theta)
        calls += 1
        arrived = float(gradient.norm()) <= goal
        if value < found.value or arrived:
            found = Found(theta, value, gradient, calls)
        if arrived:
            raise StopIteration
        return value, metric.scaled(gradient).numpy()

    options = {"maxiter": steps, "maxfun": 2 * steps, "ftol": 0.0, "gtol": 0.0, "maxcor": 50}
    with suppress(StopIteration):
        scipy.optimize.minimize(whitened, np.zeros(len(start)), jac=True, method="L-BFGS-B", options=options)
    return replace(found, calls=calls)
