"""The Gauss–Newton matrix of a layered model whose activations and output gradients are kept between products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model import calculus, layers, penalties
from upweight.model.chunks import CHUNK
from upweight.model.layers import pieces
from upweight.model.layers.pieces import Piece
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.runs import ranks

_FAR = 16  # times what a plan tells


@dataclass(frozen=True)
class Kept:
    """What a product needs of a batch: J as pieces, with one cotangent per output, wᵢ ∂²ℓ/∂f² and wᵢ ∂ℓ/∂f."""

    pieces: list[Piece]
    middle: Float[Tensor, "b K K"]
    slopes: Float[Tensor, "b K"]

    def to(self, precision: torch.dtype) -> Kept:
        """The same in another precision."""
        changed = pieces.mapped(self.pieces, lambda x: x.to(precision))
        return Kept(changed, self.middle.to(precision), self.slopes.to(precision))

    def of(self, places: NDArray[np.int64], share: Float[Tensor, " r"]) -> Kept:
        """What is kept of some of the rows, each of which counts so many times."""
        index, share = torch.from_numpy(places), share.to(self.middle)
        middle, slopes = self.middle[index] * share[:, None, None], self.slopes[index] * share[:, None]
        return Kept(pieces.taken(self.pieces, index), middle, slopes)


@dataclass(frozen=True)
class LayeredGaussNewton:
    """C = (1/n) Σᵢ wᵢ Jᵢᵀ (∂²ℓ/∂f²) Jᵢ + ∇²r through kept activations: a product is two small matrix products a layer.

    The model runs once, forward and backward for each of its K outputs; after that no product touches it. With
    activations a (t positions, i wide) and output gradients d (o wide), J v is Σ_layers d·(V a), and Jᵀu its transpose.

    Cost of a product: 4·n·t·i·o flops for every layer and vector, against at least twice as many, with autograd's
    overhead, for backward passes. Memory: n·t·(i + K·o) numbers for every layer, in the precision of the weights.

    Args:
        sweep: the objective and its rows.
        precision: of the arithmetic of a product; sums over batches are float64 always.
    """

    sweep: Sweep
    precision: torch.dtype = torch.float64

    @property
    def size(self) -> int:
        """p."""
        return self.sweep.objective.size

    @cached_property
    def coarse(self) -> LayeredGaussNewton | None:
        """The same operator with float32 products, for an iteration that corrects itself; None if it is float32."""
        if self.precision == torch.float32:
            return None
        twin = replace(self, precision=torch.float32)
        twin.__dict__["kept"] = self.kept  # a frozen dataclass's cache
        return twin

    @cached_property
    def kept(self) -> dict[int, list[Kept]]:
        """What products need, by chunk and batch.  Cost: one sweep of a forward and K backward passes."""
        objective = self.sweep.objective
        outputs = calculus.outputs(objective, self.sweep.examples.batch([0])).shape[1]
        vectors = 1 + objective.route.plan.bytes * outputs // self.sweep.example_bytes
        return self.sweep.keep(
            lambda batch, weights: kept(objective, batch, weights), vectors=vectors, label="activations"
        )

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        total = self.sweep.fold_kept(self.kept, lambda batch: self._product(batch, V), label="curvature product")
        return total / self.sweep.n + penalties.hvp(self.sweep.objective, V)

    def forms(self, V: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """vᵀCv for every row v.  Cost: half a product."""

        def bent(batch: Kept) -> Tensor:
            batch = batch.to(self.precision)
            along = pieces.along(batch.pieces, V.to(self.precision), self._sizes)
            return ((along[:, :, None] @ batch.middle)[:, :, 0] * along).sum((1, 2))

        total = self.sweep.fold_kept(self.kept, bent, label="curvature along vectors")
        return total / self.sweep.n + (V * penalties.hvp(self.sweep.objective, V)).sum(1)

    def gradient(self) -> Float[Tensor, " p"]:
        """(1/n) Σᵢ wᵢ∇Lᵢ, from what is kept: no pass over the rows."""

        def pulled(batch: Kept) -> Tensor:
            return pieces.onto(batch.pieces, batch.slopes[None], self._sizes)[0]

        return self.sweep.fold_kept(self.kept, pulled, label="gradient") / self.sweep.n

    @property
    def ready(self) -> bool:
        """Whether the rows were visited, so that nothing that is asked of them costs another pass."""
        return "kept" in self.__dict__

    def of(self, rows: NDArray[np.int64], weights: NDArray[np.float64]) -> LayeredGaussNewton:
        """The same matrix of some rows, in order, with other weights; what is kept of them serves again."""
        examples = self.sweep.examples.subset(rows)
        before, examples.weights = examples.weights, weights
        few = replace(self, sweep=self.sweep.over(self.sweep.objective, examples))
        if self.ready and not ranks.several() and len(rows) <= CHUNK and bool(before.all()):
            few.__dict__["kept"] = {0: list(self._of_kept(rows, weights / before))}  # a frozen dataclass's cache
        return few

    def _of_kept(self, rows: NDArray[np.int64], share: NDArray[np.float64]) -> Iterator[Kept]:
        """What is kept of these rows, batch by batch."""
        for number, batches in self.kept.items():
            start = number * CHUNK
            for batch in batches:
                stop = start + len(batch.middle)
                inside = (rows >= start) & (rows < stop)
                if inside.any():
                    yield batch.of(rows[inside] - start, torch.from_numpy(share[inside]))
                start = stop

    def apply_rows(self, V: Float[Tensor, "k p"], rows: NDArray[np.int64]) -> Float[Tensor, "k p"]:
        """(1/b) Σ_{i in rows} wᵢ cᵢ v + ∇²r v."""
        examples = self.sweep.examples
        batch = kept(self.sweep.objective, examples.batch(rows), torch.from_numpy(examples.weights[rows]))
        return self._product(batch, V).double() / len(rows) + penalties.hvp(self.sweep.objective, V)

    def largest_row_curvature(self) -> float | None:
        """None: no closed form bounds a row's curvature."""
        return None

    def matrix(self) -> Float[Tensor, "p p"]:
        """C as a dense matrix.  Cost: 2·n·K·p² flops; 8p² bytes."""
        total = self.sweep.fold_kept(self.kept, self._outer, label="curvature matrix")
        full = total / self.sweep.n + penalties.hvp(self.sweep.objective, torch.eye(self.size, dtype=torch.float64))
        return (full + full.T) / 2

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return self.sweep.objective.project(V)

    @property
    def _sizes(self) -> dict[str, int]:
        return self.sweep.objective.route.plan.sizes

    def _product(self, batch: Kept, V: Tensor) -> Tensor:
        batch = batch.to(self.precision)
        V = V.to(self.precision)
        along = pieces.along(batch.pieces, V, self._sizes)  # (k, b, K)
        return pieces.onto(batch.pieces, (along[:, :, None] @ batch.middle)[:, :, 0], self._sizes)

    def _outer(self, batch: Kept) -> Tensor:
        double = batch.to(torch.float64)
        J = pieces.rows(double.pieces, self._sizes)  # (b, K, p)
        return J.flatten(0, 1).T @ (double.middle @ J).flatten(0, 1)


def kept(objective: Objective, batch: Any, weights: Float[Tensor, " b"]) -> Kept:
    """What products need of a batch.  Cost: a forward pass, and a backward pass for each of the K outputs."""
    bent: list[Tensor] = []

    def units(f: Float[Tensor, "b ..."]) -> Float[Tensor, "K b K"]:
        bent[:] = calculus.output_derivatives(objective, batch, f)
        b, K = bent[0].shape
        return torch.eye(K, dtype=f.dtype, device=f.device)[:, None].expand(K, b, K)

    found = layers.capture(objective, objective.route.plan, batch, units)
    slopes, middle = bent
    moved = pieces.mapped(found, lambda x: x.cpu().contiguous())
    w = weights.to(middle)
    return Kept(moved, (middle * w[:, None, None]).cpu(), (slopes * w[:, None]).cpu())


def fits(sweep: Sweep, batch: Any, outputs: int, most: int) -> bool:
    """Whether a model has layers to go through, and their pieces of all rows fit into so many bytes.

    What the plan tells is enough where they are far smaller; else an example is measured.
    """
    found = sweep.objective.route.plan
    if found is None or not found.structured:
        return False
    if _FAR * found.bytes * outputs * sweep.n <= most:
        return True
    needed = kept_bytes(sweep.objective, batch, sweep.n)
    return needed is not None and needed <= most


def kept_bytes(objective: Objective, batch: Any, n: int) -> int | None:
    """Memory that n rows would take; None where the model has no layers to go through."""
    found = objective.route.plan
    if found is None or not found.structured:
        return None
    one = kept(objective, batch, torch.ones(len(calculus.losses(objective, batch)), dtype=torch.float64))
    total = one.middle.numel() * one.middle.element_size()
    for piece in one.pieces:
        for value in vars(piece).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                total += value.numel() * value.element_size()
    return total * n // len(one.middle)
