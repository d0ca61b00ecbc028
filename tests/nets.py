"""Small networks written out by hand, and their Kronecker factors and Gauss–Newton matrices by loops and autograd.

Nothing here imports upweight. One forward pass takes offsets on the outputs of its layers, so that autograd gives
output gradients, and every layer's inputs at every position are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import conv2d, cross_entropy, pad


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Net:
    """A network as a function of (θ blocks, offsets, x), and for each layer its inputs at every position."""

    module: nn.Module
    X: Tensor
    y: Tensor
    weights: Tensor
    forward: Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]
    layers: dict[str, tuple[int, ...]]  # the shape of a layer's output: (channels, positions…)
    inputs: Callable[[dict[str, Tensor], str, Tensor], list[list[Tensor]]]  # (groups, positions) of vectors
    groups: dict[str, int]

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def places(self, layer: str, group: int) -> Tensor:
        """(o, i) places in flat θ of a group of a layer, the bias in the last column."""
        starts, total = {}, 0
        for name, p in self.params.items():
            starts[name], total = total, total + p.numel()
        weight = self.params[f"{layer}.weight"]
        o = len(weight) // self.groups[layer]
        places = (starts[f"{layer}.weight"] + torch.arange(weight.numel())).reshape(len(weight), -1)
        if f"{layer}.bias" in starts:
            places = torch.cat([places, (starts[f"{layer}.bias"] + torch.arange(len(weight)))[:, None]], 1)
        return places[group * o : (group + 1) * o]

    def offsets(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.layers.items()}

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return hessian(lambda f: cross_entropy(f[None], y[None]), f)

    def gauss_newton(self) -> Tensor:
        """Without a penalty."""
        params = self.params
        sizes = [p.numel() for p in params.values()]

        def out(theta: Tensor, x: Tensor) -> Tensor:
            blocks = {
                name: piece.reshape(p.shape)
                for (name, p), piece in zip(params.items(), theta.split(sizes), strict=True)
            }
            return self.forward(blocks, self.offsets(), x)

        theta = torch.cat([p.reshape(-1) for p in params.values()])
        total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
        for x, y, w in zip(self.X, self.y, self.weights, strict=True):
            J = jacobian(lambda t, x=x: out(t, x), theta)
            total += w * J.T @ self.curvature(out(theta, x), y) @ J
        return total / len(self.X)

    def factors(self, layer: str, group: int) -> tuple[Tensor, Tensor]:
        """A and B of a group of a layer, by loops over examples and positions."""
        A, B, mass = 0.0, 0.0, 0.0
        for x, y, w in zip(self.X, self.y, self.weights, strict=True):

            def out(s: Tensor, x: Tensor = x) -> Tensor:
                return self.forward(self.params, {**self.offsets(), layer: s}, x)

            start = self.offsets()[layer]
            J = jacobian(out, start)
            J = J.reshape(len(J), len(start), -1)  # (K, channels, positions)
            H = self.curvature(out(start), y)
            o = len(start) // self.groups[layer]
            D = J[:, group * o : (group + 1) * o]
            for t, a in enumerate(self.inputs(self.params, layer, x)[group]):
                if f"{layer}.bias" in self.params:
                    a = torch.cat([a, a.new_ones(1)])
                A, B, mass = A + w * torch.outer(a, a), B + w * D[:, :, t].T @ H @ D[:, :, t], mass + w
        return A / mass, B / len(self.X)


def mlp() -> Net:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def hidden(p, s, x):
        return torch.tanh(p["0.weight"] @ x + p["0.bias"] + s)

    def forward(p, s, x):
        return p["2.weight"] @ hidden(p, s["0"], x) + p["2.bias"] + s["2"]

    def inputs(p, layer, x):
        return [[x if layer == "0" else hidden(p, 0, x)]]

    return net(module, draw(40, 3), forward, {"0": (4,), "2": (3,)}, inputs, {"0": 1, "2": 1})


def cnn(groups: int) -> Net:
    module = nn.Sequential(
        nn.Conv2d(2, 4, (2, 3), padding=(1, 0), groups=groups),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    ).double()

    def hidden(p, s, x):
        return torch.tanh(conv2d(x[None], p["0.weight"], p["0.bias"], padding=(1, 0), groups=groups)[0] + s).mean(
            (1, 2)
        )

    def forward(p, s, x):
        return p["4.weight"] @ hidden(p, s["0"], x) + s["4"]

    def inputs(p, layer, x):
        if layer == "4":
            return [[hidden(p, 0, x)]]
        around, each = pad(x, (0, 0, 1, 1)), 2 // groups
        return [
            [around[g * each : (g + 1) * each, r : r + 2, c : c + 3].reshape(-1) for r in range(4) for c in range(2)]
            for g in range(groups)
        ]

    layers = {"0": (4, 4, 2), "4": (3,)}
    return net(module, draw(30, 2, 3, 4), forward, layers, inputs, {"0": groups, "4": 1})


def sequence() -> Net:
    """A linear layer that is used at five positions."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()

    def forward(p, s, x):
        inner = torch.tanh(x @ p["0.weight"].T + p["0.bias"] + s["0"].T).reshape(-1)
        return p["3.weight"] @ inner + p["3.bias"] + s["3"]

    def inputs(p, layer, x):
        return [list(x)] if layer == "0" else [[torch.tanh(x @ p["0.weight"].T + p["0.bias"]).reshape(-1)]]

    return net(module, draw(40, 5, 3), forward, {"0": (4, 5), "3": (3,)}, inputs, {"0": 1, "3": 1})


def net(module, X, forward, layers, inputs, groups) -> Net:
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=number + 1) / 2)
    y = torch.arange(len(X)) % 3
    weights = torch.rand(len(X), generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    return Net(module, X, y, weights, forward, layers, inputs, groups)


NETS = {"mlp": mlp, "cnn": lambda: cnn(1), "grouped cnn": lambda: cnn(2), "sequence": sequence}


@cache
def known(name: str) -> tuple[Net, Tensor]:
    one = NETS[name]()
    return one, one.gauss_newton()


def z_scores(estimates: list[Tensor], truth: Tensor) -> Tensor:
    stacked = torch.stack(estimates)
    error = stacked.std(0) / len(stacked) ** 0.5
    sure = error <= 1e-12 * truth.abs().max()
    assert float((stacked.mean(0) - truth)[sure].abs().max() if sure.any() else 0) <= 1e-10 * float(truth.abs().max())
    return ((stacked.mean(0) - truth) / error)[~sure]
