"""Operators that are applied by sweeping over the data: Hessian, GaussNewton, EmpiricalFisher, Identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.model import calculus, layers, penalties
from upweight.model.chunks import CHUNK
from upweight.model.layers import pieces
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.operators.cut import cut, refuse_kinks
from upweight.operators.head import before_head
from upweight.operators.layered import LayeredGaussNewton, fits
from upweight.operators.linear import LinearHessian

Product = Callable[[Objective, Any, Tensor, Tensor], Tensor]
_MATRIX_ENTRIES = 2**25  # numbers held by one block of vectors or of gradients while a matrix is assembled
_CACHE = 2**25  # bytes of a chunk's examples, about what a processor keeps near


@dataclass(frozen=True)
class Implicit:
    """C = (1/n) Σᵢ wᵢ cᵢ + ∇²r, applied by one sweep over the data for any number of vectors.

    `product(objective, batch, V, weights)` is the weighted sum of cᵢ V over a batch; `assemble(objective, batch,
    weights)` the same sum as a matrix, or None where only products are known; it holds `assembly_bytes` per example.
    `whole` is the sweep with a frozen head on the model's side, for preconditioners; None where `sweep` has it there.
    """

    sweep: Sweep
    product: Product
    assemble: Callable[[Objective, Any, Tensor], Tensor] | None
    assembly_bytes: int = 0
    whole: Sweep | None = None

    @property
    def size(self) -> int:
        """p."""
        return self.sweep.objective.size

    @property
    def exact(self) -> bool:
        """Whether C is the Hessian itself, so that R is flat where C is 0."""
        return self.product is calculus.hvp

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v.  Cost: one sweep."""
        return self._sum(V, None) / self.sweep.n + penalties.hvp(self.sweep.objective, V)

    def apply_rows(self, V: Float[Tensor, "k p"], rows: NDArray[np.int64]) -> Float[Tensor, "k p"]:
        """(1/b) Σ_{i in rows} wᵢ cᵢ v + ∇²r v."""
        weights = torch.from_numpy(self.sweep.examples.weights[rows])
        total = self.product(self.sweep.objective, self.sweep.examples.batch(rows), V, weights)
        return total.double().cpu() / len(rows) + penalties.hvp(self.sweep.objective, V)

    def largest_row_curvature(self) -> float | None:
        """None: no closed form bounds a row's curvature."""
        return None

    def matrix(self) -> Float[Tensor, "p p"]:
        """C as a dense matrix.  Cost: p products' worth of arithmetic in as few sweeps as memory allows; 8p² bytes."""
        p = self.size
        eye = torch.eye(p, dtype=torch.float64)
        penalty = penalties.hvp(self.sweep.objective, eye)
        if self.assemble is not None:
            assemble = self.assemble
            vectors = 1 + self.assembly_bytes // self.sweep.example_bytes
            total = self.sweep.fold(
                lambda batch, w: assemble(self.sweep.objective, batch, w), vectors=vectors, label="curvature matrix"
            )
        else:
            step = max(1, min(256, _MATRIX_ENTRIES // p))
            total = torch.cat([self._sum(eye[start : start + step], "curvature matrix") for start in range(0, p, step)])
        full = total / self.sweep.n + penalty
        return (full + full.T) / 2

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return self.sweep.objective.project(V)

    def _sum(self, V: Tensor, label: str | None) -> Tensor:
        objective, product = self._in_turn(), self.product
        return self.sweep.fold(
            lambda batch, weights: product(objective, batch, V, weights),
            vectors=len(V) if objective.route.cotangents == "batched" else 1,
            label=label or "curvature product",
        )

    def _in_turn(self) -> Objective:
        """The objective; on a processor with vectors one after the other, where a single one fills its cache.

        Batched vectors are for what a thousand rows do in no time. Beyond that they only leave fewer rows for a batch.
        """
        sweep, route = self.sweep, self.sweep.objective.route
        small = sweep.example_bytes * min(sweep.n, CHUNK) < _CACHE
        if small or route.cotangents == "loop" or sweep.objective.reference.device.type != "cpu":
            return sweep.objective
        return replace(sweep.objective, route=replace(route, cotangents="loop"))


@dataclass(frozen=True)
class Hessian:
    """The Hessian of the risk: C = (1/n) Σᵢ wᵢ ∇²L(zᵢ, θ̂) + ∇²r(θ̂).

    Exact, and what the paper's equations ask for. It may have negative eigenvalues when θ̂ is not a minimum.
    Cost of a product: one sweep of two backward passes.  References: paper, equation 1; Pearlmutter (1994).
    """

    def bind(self, sweep: Sweep) -> Implicit | LinearHessian:
        """The operator of this objective on these examples; closed forms for a linear predictor.

        Raises:
            UnsupportedModel: if the objective knows its outputs, and its loss bends at kinks only.
        """
        if sweep.objective.linear is not None:
            return LinearHessian(sweep)
        refuse_kinks(sweep)
        return Implicit(sweep, calculus.hvp, None)


@dataclass(frozen=True)
class GaussNewton:
    """The generalised Gauss–Newton matrix: C = (1/n) Σᵢ wᵢ Jᵢᵀ (∂²ℓ/∂f²) Jᵢ + ∇²r, with f the model's output.

    f is the output before a last LogSoftmax, Softmax, Sigmoid or the like, if the rest is convex in it (see `cut`), so
    that `nll_loss` of log-probabilities, `BCELoss` of probabilities and their fused forms have the same C. Positive
    semi-definite when ℓ is convex in f (cross-entropy, squared error), so it suits networks that are not at a minimum.
    Equal to the Hessian for linear predictors, and wherever the residuals vanish.
    Cost of a product: two matrix products a layer when the activations and output gradients of all rows fit into
    `keep` bytes (`LayeredGaussNewton`), else one sweep of three backward passes.

    Args:
        keep: bytes that may be kept between products; 0 keeps nothing.

    Raises:
        InvalidInput: if keep is negative.

    Reference: Schraudolph (2002); Martens (2020).
    """

    keep: int = field(default=2**31, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 0:
            message = f"keep={self.keep!r}. It is a number of bytes ≥ 0, such as 2**31; 0 keeps nothing."
            raise InvalidInput(message)

    def bind(self, sweep: Sweep) -> Implicit | LinearHessian | LayeredGaussNewton:
        """The operator of this objective on these examples.

        Raises:
            UnsupportedModel: if the objective does not know its outputs, or its loss has no curvature in them.
        """
        if sweep.objective.linear is not None:
            return LinearHessian(sweep)
        sweep = cut(sweep)
        first = sweep.examples.batch([0])
        outputs = calculus.outputs(sweep.objective, first)
        n_outputs, middle = outputs.shape[1], outputs.element_size() * outputs.shape[1] ** 2 * sweep.n
        few = not calculus.through_parameters(sweep.objective, n_outputs)
        keep = sweep.at_most(self.keep)
        if few and middle <= keep and fits(sweep, first, n_outputs, keep - middle):
            return LayeredGaussNewton(sweep)
        whole = sweep
        if not few:
            sweep = replace(sweep, objective=before_head(sweep.objective, calculus.ready(sweep.objective, first)))
            n_outputs = calculus.outputs(sweep.objective, first).shape[1]
        matrices = 16 * n_outputs * sweep.objective.size
        columns = 0 if few else calculus.AT_ONCE * sweep.example_bytes
        return Implicit(sweep, calculus.ggnvp, calculus.gauss_newton, matrices + columns, whole)


def once(sweep: Sweep, vectors: int) -> Implicit | LayeredGaussNewton:
    """The Gauss–Newton matrix of an objective with layers, cut already, for one product with so many vectors.

    What a product needs is kept where its K backward passes cost less than the two for each vector without.
    """
    n_outputs = calculus.outputs(sweep.objective, sweep.examples.batch([0])).shape[1]
    return LayeredGaussNewton(sweep) if n_outputs <= vectors else Implicit(sweep, calculus.ggnvp, None)


@dataclass(frozen=True)
class EmpiricalFisher:
    """The empirical Fisher matrix: C = (1/n) Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ + ∇²r.

    Not a Gauss–Newton matrix: it uses the observed targets, and vanishes where the model fits them. Offered because
    it is
    cheap and widely used.  Reference: Kunstner, Hennig and Balles (2019).
    """

    def bind(self, sweep: Sweep) -> Implicit:
        """The operator of this objective on these examples."""
        return Implicit(sweep, fisher_product, _assemble_fisher, assembly_bytes=16 * sweep.objective.size)


@dataclass(frozen=True)
class Identity:
    """C = I: no curvature. Scores become gradient products, as in TracIn with one checkpoint (paper, figure 1)."""

    def bind(self, sweep: Sweep) -> IdentityOperator:
        """The operator of this objective on these examples."""
        return IdentityOperator(sweep)


@dataclass(frozen=True)
class IdentityOperator:
    """The identity on R^p; the penalty is not included."""

    sweep: Sweep = field(repr=False)

    @property
    def size(self) -> int:
        """p."""
        return self.sweep.objective.size

    @property
    def eigenvalues(self) -> Float[Tensor, " p"]:
        """p ones."""
        return torch.ones(self.size, dtype=torch.float64)

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V."""
        return V.clone()

    def apply_rows(self, V: Float[Tensor, "k p"], rows: NDArray[np.int64]) -> Float[Tensor, "k p"]:  # noqa: ARG002
        """V, whatever the rows."""
        return V.clone()

    def largest_row_curvature(self) -> float:
        """1."""
        return 1.0

    def map(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(1) v."""
        return function(self.eigenvalues) * V

    def matrix(self) -> Float[Tensor, "p p"]:
        """The identity matrix."""
        return torch.eye(self.size, dtype=torch.float64)

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V: the identity has no flat direction to leave out."""
        return V


def fisher_product(objective: Objective, batch: Any, V: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ ∇Lᵢ ∇Lᵢᵀ v over a batch, for every row v."""
    found = objective.route.plan
    if objective.linear is not None or found is None or not found.structured:
        products = calculus.dots(objective, batch, V).double()
        return calculus.pull(objective, batch, (products * weights[:, None].to(products)).T)
    captured = layers.capture(objective, found, batch)
    along = pieces.along(captured, V.to(objective.reference), found.sizes)  # (k, b, 1)
    return pieces.onto(captured, along * weights.to(along)[None, :, None], found.sizes)


def _assemble_fisher(objective: Objective, batch: Any, weights: Tensor) -> Tensor:
    G = layers.gradients(objective, batch).double()
    return G.T @ (G * weights[:, None].to(G))
