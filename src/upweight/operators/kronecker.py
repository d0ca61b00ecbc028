"""Curvature as Kronecker products, one per layer: KFAC, and EKFAC with its eigenvalues corrected.

For one layer with inputs a (a 1 behind them for the bias) and output gradients d at t positions, an example's gradient
is G = Σ_t d aᵀ, and the block of the Gauss–Newton matrix is (1/n) Σᵢ wᵢ E[vec G vec Gᵀ], the expectation over output
gradients u whose second moment is ∂²ℓ/∂f². KFAC takes inputs and output gradients, and different positions, as
independent ("expand" in Eschenhagen et al.):

    C ≈ B ⊗ A        A = Σᵢ wᵢ Σ_t a aᵀ / Σᵢ wᵢ t        B = (1/n) Σᵢ wᵢ Σ_t E[d dᵀ]

EKFAC keeps the eigenvectors of A and B and measures the curvature along each pair of them, positions together:

    Λ = (1/n) Σᵢ wᵢ E[(Q_Bᵀ G Q_A)²]

so that its diagonal in that basis is the block's own. Positions that the loss does not reach, such as padding, are left
out of both sums over t. Parameters of different layers are taken as uncorrelated.
References: Martens and Grosse (2015); George et al. (2018); Grosse et al. (2023); Eschenhagen et al. (2023).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel, checked_count
from upweight.model import penalties
from upweight.model.layers.pieces import Direct, Piece, rows
from upweight.model.objective import L2, Objective
from upweight.model.sweep import Sweep
from upweight.operators.base import Curvature
from upweight.operators.blocks import layers_of
from upweight.operators.cotangents import Exact, Observed, Signs
from upweight.operators.cut import cut
from upweight.operators.factors import DENSE, WIDEST, Basis, Layer, Whole
from upweight.operators.implicit import EmpiricalFisher, GaussNewton
from upweight.operators.uses import Uses
from upweight.runs.machine import in_bytes

_MUCH = 0.1  # of the parameters: what may be left on a mere diagonal without a word
_BLOCK_NUMBERS = 2**24  # of the vectors that are rotated at once


@dataclass(frozen=True)
class _Factors:
    """What KFAC and EKFAC are told."""

    of: Curvature = field(default_factory=GaussNewton)
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.of, GaussNewton | EmpiricalFisher):
            message = (
                f"{name}(of={self.of!r}). Kronecker factors are known for means of outer products of gradients only: "
                "pass of=GaussNewton() or of=EmpiricalFisher()."
            )
            raise InvalidInput(message)
        if self.samples is None:
            return
        checked_count(self.samples, "samples", hint="None takes the expectation exactly")
        if isinstance(self.of, EmpiricalFisher):
            message = (
                f"{name}(of=EmpiricalFisher(), samples={self.samples}). The empirical Fisher uses the observed "
                "targets, so nothing is drawn. Leave samples out, or take of=GaussNewton()."
            )
            raise InvalidInput(message)

    def cut(self, sweep: Sweep) -> Sweep:
        """The same work with outputs in which the loss bends, if their second derivative is what is taken."""
        return sweep if isinstance(self.of, EmpiricalFisher) else cut(sweep)

    def source(self, stream: int = 0) -> Source:
        """Whose second moment in the outputs is taken; every stream draws others."""
        if isinstance(self.of, EmpiricalFisher):
            return Observed()
        return Exact() if self.samples is None else Signs(self.samples, self.seed, stream)


@dataclass(frozen=True)
class KFAC(_Factors):
    """Kronecker factors of the Gauss–Newton matrix, one pair per layer: C ≈ B ⊗ A on each, and ∇²r.

    With A = Σᵢ wᵢ Σ_t a aᵀ / Σᵢ wᵢ t of the inputs a, and B = (1/n) Σᵢ wᵢ Σ_t E[d dᵀ] of the output gradients d. Exact
    for one linear layer whose loss curves equally at every example (least squares). Convolutions have a pair per group;
    a table that is looked up has token frequencies for A; parameters without structure keep their own block up to 512,
    and its diagonal beyond. An L2 penalty is exact where it is the same for a whole layer, else its diagonal in the
    layer's eigenbasis is taken.

    Cost: one sweep of a forward pass and as many backward passes as `samples` (or outputs), and i³ + o³ per layer.
    References: Martens and Grosse (2015), equation 1; for positions Eschenhagen et al. (2023), "expand".

    Args:
        of: what is approximated: GaussNewton(), or EmpiricalFisher() for gradients at the observed targets.
        samples: random output gradients per example, unbiased; None takes the expectation exactly, by one output
            gradient for every output of the model (at most 1,000).
        seed: of the draws.

    Raises:
        InvalidInput: if `of` is another curvature, or samples no whole number ≥ 1.

    >>> import upweight as uw
    >>> model = torch.nn.Linear(2, 1).double()
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> inf = uw.explain(model, X, X[:, :1], loss=torch.nn.functional.mse_loss, curvature=KFAC())
    >>> exact = uw.explain(model, X, X[:, :1], loss=torch.nn.functional.mse_loss, curvature=GaussNewton())
    >>> inf.operator.matrix().allclose(exact.operator.matrix())
    True
    """

    def bind(self, sweep: Sweep) -> Kronecker:
        """The operator of this objective on these examples.

        Raises:
            UnsupportedModel: if the objective does not know its outputs, has too many for an exact expectation, or is
                not convex in them; or its penalty is not separable.
        """
        return _factored(self.cut(sweep), self.source())


@dataclass(frozen=True)
class EKFAC(_Factors):
    """KFAC's eigenvectors with the curvature measured along each: Λ = (1/n) Σᵢ wᵢ E[(Q_Bᵀ Gᵢ Q_A)²].

    The best diagonal in that basis: its error in Frobenius norm is never larger than KFAC's. Exact where KFAC is, and
    its diagonal in the eigenbasis is that of the layer's true block, positions included.

    Cost: KFAC's, and a second sweep like the first.
    References: George et al. (2018); Grosse et al. (2023), section 2.2.

    Args:
        of: what is approximated: GaussNewton(), or EmpiricalFisher() for gradients at the observed targets.
        samples: random output gradients per example and sweep, unbiased; None takes the expectation exactly, by one
            output gradient for every output of the model (at most 1,000).
        seed: of the draws; the two sweeps draw different ones.

    Raises:
        InvalidInput: if `of` is another curvature, or samples no whole number ≥ 1.

    >>> EKFAC(samples=1)
    EKFAC(of=GaussNewton(), samples=1, seed=0)
    """

    def bind(self, sweep: Sweep) -> Kronecker:
        """The operator of this objective on these examples.

        Raises:
            UnsupportedModel: if the objective does not know its outputs, has too many for an exact expectation, or is
                not convex in them; or its penalty is not separable.
        """
        return _corrected(_factored(self.cut(sweep), self.source()), self.source(stream=1))


class Kronecker:
    """A block-diagonal curvature whose blocks have eigenvectors Q_B ⊗ Q_A.

    Cost: f(C) v takes 4·p·(i + o) flops per vector, no sweep. Memory: 32·p bytes, and 8·(i² + o²) per layer.

    Args:
        sweep: the objective and the rows it averages over.
        uses: how the objective uses its parameters.
        layers: the blocks, in the order of `bases`.
        bases: their eigenvectors and eigenvalues.

    >>> import upweight as uw
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> model = torch.nn.Linear(2, 1).double()
    >>> operator = uw.explain(model, X, X[:, :1], loss=torch.nn.functional.mse_loss, curvature=KFAC()).operator
    >>> operator.size, len(operator.layers), operator.eigenvalues.numpy().round(2)
    (3, 1, array([0.04, 1.39, 5.23]))
    >>> V = torch.eye(3, dtype=torch.float64)
    >>> operator.map(torch.reciprocal, operator.apply(V)).allclose(V)  # C⁻¹Cv
    True
    """

    def __init__(self, sweep: Sweep, uses: Uses, blocks: Sequence[Layer], bases: Sequence[Basis]) -> None:
        self.sweep = sweep
        self.uses = uses
        self.layers = tuple(blocks)
        self.bases = tuple(bases)
        self._moved: dict[tuple[torch.dtype, torch.device], tuple[Basis, ...]] = {}
        self._parts: dict[tuple[Any, ...], tuple[Basis, Tensor, Tensor]] = {}

    @staticmethod
    def blocks_of(sweep: Sweep) -> tuple[Uses, list[Layer], Int[Tensor, " rest"]]:
        """How the objective uses its parameters, the blocks that these uses make, and the places that none reaches."""
        uses = Uses.of(sweep)
        sizes = {name: block.numel() for name, block in sweep.objective.blocks.items()}
        blocks, rest = layers_of(uses.first, sizes)
        return uses, blocks, rest

    @property
    def size(self) -> int:
        """p."""
        return self.sweep.objective.size

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " p"]:
        """The eigenvalues, ascending."""
        return torch.cat([basis.eigenvalues.flatten() for basis in self.bases]).sort().values

    @staticmethod
    def bytes_of(blocks: Sequence[Layer], size: int) -> int:
        """Memory while factors and eigenvectors are made: 32·p, and 32·g·(i² + o²) for every block (g, o, i)."""
        sides = (block.at.shape for block in blocks if not isinstance(block, Whole) or block.at.shape[2] <= DENSE)
        return 32 * (size + sum(g * sum(side**2 for side in (o, i) if side <= WIDEST) for g, o, i in sides))

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        return self.map(lambda eigenvalues: eigenvalues, V)

    def map(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(C) v for every row v, with f applied to the eigenvalues."""
        out = torch.zeros_like(V)
        for basis in self.bases:
            scale = function(basis.eigenvalues).to(V)
            step = max(1, _BLOCK_NUMBERS // basis.at.numel())
            for start in range(0, len(V), step):
                part = V[start : start + step]
                out[start : start + step, basis.at] = basis.back(basis.rotated(part[:, basis.at]) * scale)
        return out

    def matrix(self) -> Float[Tensor, "p p"]:
        """C as a dense float64 matrix."""
        full = self.apply(torch.eye(self.size, dtype=torch.float64))
        return (full + full.T) / 2

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return self.sweep.objective.project(V)

    def pieces(self, batch: Any) -> list[Piece]:
        """The gradients of the loss of every example of a batch, in the form that `weigh` reads.

        Raises:
            UnsupportedModel: if they are made in another way than those of the training rows.
        """
        return self.uses.pieces(self.sweep.objective, batch)

    def weigh(self, pieces: Sequence[Piece], function: Callable[[Tensor], Tensor]) -> Float[Tensor, " b"]:
        """gᵀ f(C) g for the gradient g of every example, summed over m cotangents where pieces have several.

        `pieces` are those of `layers.capture`. Cost: for layers with one position 2·(i² + o² + i·o) flops per example
        and b·(i + o) numbers, no matrices; with t positions 2·t·i·o more, and the matrices of a few examples.
        """
        reference = _reference(pieces)
        total: Tensor | None = None
        for layer, basis, moved in zip(self.layers, self.bases, self.like(reference), strict=False):
            part = layer.weighed(pieces, function(basis.eigenvalues).to(reference), moved).double().cpu()
            total = part if total is None else total + part
        assert total is not None  # every objective depends on θ
        return total

    def coordinates(self, batch: Any, chosen: Sequence[Tensor]) -> Float[Tensor, "b k"]:
        """The loss's gradient of every example along some eigenvectors, without writing the gradients out.

        Args:
            batch: b examples.
            chosen: for every basis the flat numbers in its (g, o, i) of the eigenvectors, in ascending order.
        """
        found = self.uses.found(self.sweep.objective, batch)
        pieces = self.uses.aligned(found)
        if pieces is None:  # gradients made in another way than those of the training rows
            return self._written(found, chosen)
        reference = _reference(pieces)
        parts = []
        for layer, basis, at in zip(self.layers, self.bases, chosen, strict=False):
            if len(at):
                smaller, places = self._chosen(basis, at, reference)
                parts.append(torch.cat([block[:, places] for block in layer.rotated(pieces, smaller)]))
        return torch.cat(parts, 1)

    def _written(self, pieces: Sequence[Piece], chosen: Sequence[Tensor]) -> Float[Tensor, "b k"]:
        """The coordinates of gradients that are written out."""
        sizes = {name: block.numel() for name, block in self.sweep.objective.blocks.items()}
        G = rows(pieces, sizes)[:, 0]
        parts = []
        for basis, at in zip(self.like(G), chosen, strict=False):
            if len(at):
                parts.append(basis.rotated(G[:, basis.at.to(G.device)]).flatten(1)[:, at.to(G.device)])
        return torch.cat(parts, 1)

    def _chosen(self, basis: Basis, at: Tensor, reference: Tensor) -> tuple[Basis, Tensor]:
        """The part of a basis that these eigenvectors need, kept for the next batch."""
        key = (basis.name, at.data_ptr(), reference.dtype, reference.device)
        if key not in self._parts:
            smaller, places = basis.only(at)
            self._parts[key] = (smaller.like(reference), places.to(reference.device), at)  # at stays, and so its place
        return self._parts[key][:2]

    def like(self, reference: Tensor) -> tuple[Basis, ...]:
        """The eigenvectors in the precision and on the device of the pieces, kept for the next batch."""
        key = (reference.dtype, reference.device)
        if key not in self._moved:
            self._moved[key] = tuple(basis.like(reference) for basis in self.bases)
        return self._moved[key]


# ---- inner steps -----------------------------------------------------------------------------------------------------


Read = tuple[str, Callable[..., list[Tensor]]]  # a layer's name, and what it reads from (pieces, weights)
Source = Exact | Signs | Observed


def _factored(sweep: Sweep, source: Source) -> Kronecker:
    """KFAC: the factors in one sweep, and their eigenvectors."""
    objective = sweep.objective
    uses, blocks, rest = Kronecker.blocks_of(sweep)
    _refuse_larger(blocks, objective.size, sweep.budget)
    read: list[Read] = [(layer.name, layer.sums) for layer in blocks]
    _warn_of_diagonals(blocks, objective.size)
    factors = _swept(sweep, uses, source, lambda _: read, "Kronecker factors")
    strengths = _penalty_diagonal(objective)
    bases = [layer.basis(sums, sweep.n, strengths) for layer, sums in zip(blocks, factors, strict=True)]
    if len(rest):  # parameters that the loss does not use
        at = rest[None, None]
        bases.append(Basis("unused", at, None, None, torch.zeros(at.shape, dtype=torch.float64), strengths[at]))
    return Kronecker(sweep, uses, blocks, bases)


def _refuse_larger(blocks: Sequence[Layer], size: int, budget: int | None) -> None:
    """Raises for factors that exceed a budget of bytes.

    Raises:
        InvalidInput: if they do.
    """
    needed = Kronecker.bytes_of(blocks, size)
    if budget is None or needed <= budget:
        return
    widest = max((*block.at.shape, block.name) for block in blocks)
    rank = budget // (32 * size)
    instead = f"curvature=operators.Nystroem({min(rank, 100)}), or " if rank else ""
    message = (
        f"The Kronecker factors of {size:,} parameters take {in_bytes(needed)} while they are made (widest: "
        f"{widest[-1]}), and memory_budget is {in_bytes(budget)}. "
        f"Use {instead}memory_budget={in_bytes(1.1 * needed)!r}."
    )
    raise InvalidInput(message)


def _warn_of_diagonals(blocks: Sequence[Layer], size: int) -> None:
    """A TheoryWarning where much of the model has no structure and is too large for a block of its own."""
    bare = [layer for layer in blocks if isinstance(layer, Whole) and layer.at.numel() > DENSE]
    count = sum(layer.at.numel() for layer in bare)
    if count > _MUCH * size:
        message = (
            f"{count:,} of {size:,} parameters ({', '.join(layer.name for layer in bare[:3])}"
            f"{' …' if len(bare) > 3 else ''}) act in no layer that has Kronecker factors, so only the diagonal of "
            "their curvature is kept (compiled functions, weights with unlike uses). Use GaussNewton() with CG(), or "
            "Nystroem(rank)."
        )
        warnings.warn(message, TheoryWarning, stacklevel=6)


def _corrected(operator: Kronecker, source: Source) -> Kronecker:
    """EKFAC: the same eigenvectors, with the curvature along each pair measured in a second sweep."""
    numbers = [number for number, layer in enumerate(operator.layers) if not isinstance(layer, Whole)]
    if not numbers:
        return operator

    def reading(pieces: Sequence[Piece]) -> list[Read]:
        bases = operator.like(_reference(pieces))
        return [(operator.layers[k].name, partial(operator.layers[k].squares, basis=bases[k])) for k in numbers]

    totals = _swept(operator.sweep, operator.uses, source, reading, "Kronecker eigenvalues")
    bases = list(operator.bases)
    for number, (total,) in zip(numbers, totals, strict=True):
        bases[number] = replace(bases[number], values=total / operator.sweep.n)
    return Kronecker(operator.sweep, operator.uses, operator.layers, bases)


def _swept(
    sweep: Sweep,
    uses: Uses,
    source: Source,
    reading: Callable[[Sequence[Piece]], list[Read]],
    label: str,
) -> list[list[Tensor]]:
    """For every layer the sums over all rows of what it reads from the pieces of a batch, in one sweep."""
    shapes: list[list[torch.Size]] = []

    def total(batch: Any, weights: Tensor, numbers: Sequence[int]) -> Tensor:
        pieces = uses.pieces(sweep.objective, batch, source.at(sweep.objective, batch, numbers))
        found = [(name, read(pieces, weights.to(_reference(pieces)))) for name, read in reading(pieces)]
        shapes[:] = [[part.shape for part in parts] for _, parts in found]
        flat = torch.cat([part.flatten() for _, parts in found for part in parts])
        if not bool(torch.isfinite(flat).all()):
            raise _not_finite(label, found)
        return flat

    probe = sweep.examples.batch([0])
    bytes_each = 8 * sweep.objective.size if uses.plan is None else uses.plan.bytes
    vectors = source.count(sweep.objective, probe) * max(1, math.ceil(2 * bytes_each / sweep.example_bytes))
    flat = sweep.fold(
        total, vectors=vectors, label=label, numbered=True, kept=f"{label.replace(' ', '-')}-{source.name}"
    )
    if not shapes:  # the whole sum was kept
        total(sweep.examples.batch([0]), torch.ones(1), [0])
    parts = iter(flat.split([shape.numel() for own in shapes for shape in own]))
    return [[next(parts).reshape(shape) for shape in own] for own in shapes]


def _not_finite(label: str, found: list[tuple[str, list[Tensor]]]) -> InvalidInput:
    bad = [(name, int((~torch.isfinite(part)).sum()), part.numel()) for name, parts in found for part in parts]
    name, count, size = next(entry for entry in bad if entry[1])
    message = (
        f"{label}: {count:,} of {size:,} numbers of layer '{name}' are NaN or infinite. Usual reasons: weights that "
        "diverged in training, or gradients that overflow the model's precision when they are squared. Look at that "
        "layer's weights and inputs, or evaluate in float64: Objective.from_module(..., dtype=torch.float64)."
    )
    return InvalidInput(message)


def _reference(pieces: Sequence[Piece]) -> Tensor:
    """A tensor in the precision and on the device of the pieces."""
    first = pieces[0]
    return first.values if isinstance(first, Direct) else first.slopes


def _penalty_diagonal(objective: Objective) -> Float[Tensor, " p"]:
    """The diagonal of ∇²r, which must be all of it.

    Raises:
        UnsupportedModel: if the penalty couples parameters.
    """
    if objective.penalty is None or isinstance(objective.penalty, L2):
        return penalties.diagonal(objective)
    draw = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (2, objective.size), generator=draw, dtype=torch.float64) - 1
    first, second = penalties.hvp(objective, signs)
    diagonal = first * signs[0]
    rtol = 1e-8 if objective.reference.dtype == torch.float64 else 1e-4
    if torch.allclose(diagonal * signs[1], second, rtol=rtol, atol=rtol * float(diagonal.abs().max())):
        return diagonal
    message = (
        f"The penalty of {objective.name} couples parameters: its second derivative is off a diagonal by "
        f"{float((diagonal * signs[1] - second).abs().max()):.3g}, and Kronecker blocks hold a penalty of every "
        "parameter by itself only. Use a float, L2(...), or GaussNewton() with an iterative solver."
    )
    raise UnsupportedModel(message)
