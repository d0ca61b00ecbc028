"""Curvature of low rank: its leading eigenvectors, found by Lanczos or by a random sketch, and a constant elsewhere.

    Ĉ = U diag(θ) Uᵀ + μ I        U (p, r) orthonormal

μ is what the penalty alone gives every direction (its smallest strength, 0 without an L2 penalty), so (Ĉ + λI)⁻¹
divides by μ + λ wherever U does not reach: that must be positive. The sketch is of C − μI: of the data's part alone
where the penalty is the same for every parameter, and then the penalty is exact; else of everything that exceeds μ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput, NotPositiveDefinite, checked_count
from upweight.model import penalties
from upweight.model.sweep import Sweep
from upweight.operators.base import Curvature, Operator
from upweight.operators.implicit import GaussNewton, Hessian
from upweight.operators.krylov import lanczos
from upweight.runs import ranks

_ALPHA = 4.0
_MORE = 20
_LARGEST_SHIFT = (1e5, 1e-4)  # in units of rounding, and of the largest curvature


@dataclass(frozen=True)
class Nystroem:
    """Randomised Nyström approximation: Ĉ = (AΩ)(ΩᵀAΩ)⁻¹(AΩ)ᵀ + μI, with A = C − μI and Ω (p, rank) random orthonormal.

    0 ⪯ Ĉ ⪯ C, exact when `rank` reaches that of A, and near whenever the eigenvalues fall fast. A small shift νI is
    added to A and taken off the eigenvalues again, so that rounding cannot make ΩᵀAΩ indefinite.

    Cost: one sweep with `rank` vectors, once; 16·rank·p bytes while it is made, 8 after; 4·rank·p flops per vector.

    Args:
        rank: directions that are kept; at most p.
        of: the curvature to approximate, positive semi-definite.
        seed: of the sketch, and of the probes that measure its error.
        probes: random vectors that measure the error, when it is asked for.

    Raises:
        InvalidInput: if rank or probes is not a positive whole number, or `of` no curvature.

    References: Frangella, Tropp and Udell (2023), algorithm 2.1.
    """

    rank: int
    of: Curvature = field(default_factory=GaussNewton)
    seed: int = 0
    probes: int = 8

    def __post_init__(self) -> None:
        _check(self)

    def bind(self, sweep: Sweep) -> LowRank:
        """The operator of this objective on these examples.

        Raises:
            NotPositiveDefinite: if the sketch shows negative curvature.
        """
        exact = self.of.bind(sweep)
        floor = _floor(sweep)
        p, rank = exact.size, min(self.rank, exact.size)
        draw = torch.Generator().manual_seed(self.seed)
        start = exact.project(torch.randn(rank, p, generator=draw, dtype=torch.float64))
        columns, triangle = torch.linalg.qr(start.T)
        directions = triangle.diagonal().abs()
        omega = columns.T[directions > 1e-10 * directions.max()].contiguous()  # without gauge directions
        image = exact.project(exact.apply(omega)) - floor * omega
        values, basis = _nystroem(omega, image, torch.finfo(sweep.objective.reference.dtype).eps, self)
        return LowRank(exact, basis, values, floor, self.seed, self.probes)


@dataclass(frozen=True)
class Arnoldi:
    """The eigenvectors of largest |eigenvalue|, by Lanczos with full reorthogonalisation: Ĉ = U diag(θ) Uᵀ + μI.

    Arnoldi's iteration on a symmetric matrix is Lanczos's. Every kept pair is an eigenpair of C up to its residual
    ‖Cu − θu‖ (`LowRank.ritz_residuals`). Negative eigenvalues are kept as they are.

    Cost: one sweep with one vector per step, once; 8·steps·p bytes while it is made; 4·rank·p flops per vector.

    Args:
        rank: eigenvectors that are kept; at most p.
        of: the curvature.
        steps: Lanczos steps; None means 2·rank + 20, at most p.
        seed: of the first vector, and of the probes that measure the error.
        probes: random vectors that measure the error, when it is asked for.

    Raises:
        InvalidInput: if a count is not a positive whole number, steps are fewer than rank, or `of` is no curvature.

    References: Schioppa et al. (2022), "Scaling up influence functions"; Parlett (1998), chapter 13.
    """

    rank: int
    of: Curvature = field(default_factory=Hessian)
    steps: int | None = None
    seed: int = 0
    probes: int = 8

    def __post_init__(self) -> None:
        _check(self)
        if self.steps is not None and checked_count(self.steps, "steps", hint="None chooses") < self.rank:
            message = f"Arnoldi(rank={self.rank}, steps={self.steps}): {self.steps} steps find no more directions."
            raise InvalidInput(message + f" Pass steps ≥ {self.rank}, or None.")

    def bind(self, sweep: Sweep) -> LowRank:
        """The operator of this objective on these examples."""
        exact = self.of.bind(sweep)
        floor = _floor(sweep)
        p, rank = exact.size, min(self.rank, exact.size)
        count = min(p, self.steps or 2 * rank + _MORE)
        state, keep = _kept(sweep, f"basis-{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}")
        basis, T, beta = lanczos(exact, count, seed=self.seed, state=state, keep=keep)
        values, inside = torch.linalg.eigh(T)
        kept = (values - floor).abs().sort(descending=True, stable=True).indices[:rank]
        found = inside[:, kept].T @ basis
        residuals = beta * inside[-1, kept].abs()
        return LowRank(exact, found, values[kept] - floor, floor, self.seed, self.probes, residuals)


@dataclass(frozen=True)
class Error:
    """How far a low rank is from the curvature that it stands for, E = C − Ĉ, by random probes.

    Args:
        bound: 4·√(2/π)·max ‖Eω‖ ≥ ‖E‖₂, the largest |eigenvalue| of E, with probability ≥ `confidence`
            (Halko, Martinsson and Tropp, 2011, lemma 4.1).
        frobenius: √mean ‖Eω‖², whose square is an unbiased estimate of ‖E‖²_F.
        trace: mean ωᵀEω, an unbiased estimate of the trace of E; for Nyström, where E ⪰ 0, of its nuclear norm.
        confidence: 1 − 4^(−probes).
    """

    bound: float
    frobenius: float
    trace: float
    confidence: float


class LowRank:
    """U diag(θ) Uᵀ + μI.

    Args:
        exact: the curvature that it stands for.
        basis: Uᵀ, orthonormal rows.
        values: θ.
        complement: μ, the eigenvalue of everything that U does not reach.
        seed: of the probes of the error.
        probes: how many.
        ritz_residuals: ‖Cu − (θ + μ)u‖ of every direction, where it is known (Arnoldi): C has an eigenvalue so near.

    >>> import upweight as uw
    >>> X = torch.diag(torch.tensor([3.0, 2.0, 0.1, 0.1]))
    >>> settings = {"loss": torch.nn.functional.mse_loss, "penalty": 0.01, "damping": 0.0}
    >>> influence = uw.explain(torch.nn.Linear(4, 1, bias=False), X, X[:, :1], curvature=Nystroem(rank=2), **settings)
    >>> influence.operator.exact.matrix().diagonal().numpy().round(2)
    array([4.51, 2.01, 0.02, 0.02])
    >>> influence.operator.eigenvalues.numpy().round(2)  # near the two largest; the penalty for the others
    array([0.01, 0.01, 2.  , 4.5 ])
    """

    def __init__(
        self,
        exact: Operator,
        basis: Float[Tensor, "r p"],
        values: Float[Tensor, " r"],
        complement: float,
        seed: int,
        probes: int,
        ritz_residuals: Float[Tensor, " r"] | None = None,
    ) -> None:
        self.exact, self.basis, self.values, self.complement = exact, basis, values, complement
        self.ritz_residuals = ritz_residuals
        self._seed, self._probes = seed, probes

    def __repr__(self) -> str:
        return f"LowRank(rank={len(self.basis)}, p={self.size}, complement={self.complement:.3g}{self.note})"

    @property
    def size(self) -> int:
        """p."""
        return self.exact.size

    @property
    def eigenvalues(self) -> Float[Tensor, " p"]:
        """θ + μ, and μ for every other direction, ascending."""
        rest = torch.full((self.size - len(self.values),), self.complement, dtype=torch.float64)
        return torch.cat([self.values + self.complement, rest]).sort().values

    @cached_property
    def error(self) -> Error:
        """How far it is from the curvature.  Cost: one sweep with `probes` vectors, once."""
        draw = torch.Generator().manual_seed(self._seed + 1)
        omega = self.project(torch.randn(self._probes, self.size, generator=draw, dtype=torch.float64))
        missed = self.project(self.exact.apply(omega) - self.apply(omega))
        norms = missed.norm(dim=1)
        return Error(
            bound=_ALPHA * math.sqrt(2 / math.pi) * float(norms.max()),
            frobenius=float(norms.square().mean().sqrt()),
            trace=float((omega * missed).sum(1).mean()),
            confidence=1 - _ALPHA**-self._probes,
        )

    @property
    def note(self) -> str:
        """What a certificate says behind its name."""
        return f" with ‖C − Ĉ‖₂ ≤ {self.error.bound:.2g}"

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """Ĉ v for every row v."""
        return ((V @ self.basis.T) * self.values) @ self.basis + self.complement * V

    def map(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(Ĉ) v for every row v, with f applied to every eigenvalue for itself."""
        numbers = function(torch.cat([self.values, self.values.new_zeros(1)]) + self.complement)
        inside = V @ self.basis.T
        if len(self.basis) == self.size:  # nothing is left, so f(μ) may be infinite
            return (inside * numbers[:-1]) @ self.basis
        return (inside * (numbers[:-1] - numbers[-1])) @ self.basis + numbers[-1] * V

    def matrix(self) -> Float[Tensor, "p p"]:
        """Ĉ as a dense matrix."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return self.exact.project(V)


def _kept(sweep: Sweep, name: str) -> tuple[Mapping[str, Tensor] | None, Callable[[Mapping[str, Tensor]], None] | None]:
    """What a store has of a basis, and what keeps it there; None and None where none is held by this process alone."""
    store = sweep.store
    if store is None or not store.held or ranks.several():
        return None, None

    def keep(state: Mapping[str, Tensor]) -> None:
        store.keep(name, {part: values.numpy() for part, values in state.items()})

    if not store.has(name):
        return None, keep
    return {part: torch.from_numpy(values.copy()) for part, values in store.kept(name)[0].items()}, keep


def _check(spec: Nystroem | Arnoldi) -> None:
    name = type(spec).__name__
    checked_count(spec.rank, f"{name}(rank)", hint="100 is a start")
    checked_count(spec.probes, f"{name}(probes)", hint="8 is the default")
    if isinstance(spec.of, type) or not hasattr(spec.of, "bind"):
        message = f"{name}(of={spec.of!r}) is no curvature. Pass an object, such as {name}(100, of=GaussNewton())."
        raise InvalidInput(message)


def _floor(sweep: Sweep) -> float:
    """μ: the curvature that an L2 penalty gives every direction at least."""
    return max(float(penalties.diagonal(sweep.objective).min()), 0.0)


def _nystroem(omega: Tensor, image: Tensor, eps: float, spec: Nystroem) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (rows) of the approximation, with the smallest shift that keeps it positive."""
    size = float(image.norm()) or 1.0
    shift = eps * size
    while shift <= min(_LARGEST_SHIFT[0] * eps, _LARGEST_SHIFT[1]) * size:
        moved = image + shift * omega
        core = omega @ moved.T
        factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if not int(failed):
            B = torch.linalg.solve_triangular(factor, moved, upper=False)  # (r, p), BᵀB = the approximation
            _, singular, Vt = torch.linalg.svd(B, full_matrices=False)
            return (singular.square() - shift).clamp(min=0), Vt
        shift *= 10
    core = omega @ image.T
    lowest = float(torch.linalg.eigvalsh((core + core.T) / 2)[0])
    message = (
        f"{spec} met curvature {lowest:.3g} below the penalty's own (largest {size:.3g}), and Nyström's approximation "
        "needs none below it. θ̂ is probably not a minimum. Use of=GaussNewton(), which is positive, or "
        f"Arnoldi({spec.rank}, of={spec.of!r})."
    )
    raise NotPositiveDefinite(message)
