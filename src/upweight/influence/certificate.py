"""How well a system was solved: what stands beside every score, and how it is written into a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.data import markup


@dataclass(frozen=True)
class Certificate:
    """How far the numbers can be trusted.

    Args:
        residual: (q,) relative residuals of the linear systems, ‖v − (C + λI) x‖ / ‖v‖, recomputed from the definition.
        converged: whether the solver kept its promise for every query.
        damping: the λ that acted.
        gradient_norm: ‖∇R(θ̂)‖; the theory asks for 0.
        min_curvature: smallest eigenvalue of C, exact for Cholesky, an upper bound for CG, NaN when unknown.
        coverage: fraction of the model's parameters that were differentiated.
        drift: (q,) change of the query's measure if training simply went on to the minimum, −∇f_qᵀ(C + λI)⁻¹∇R
            (paper, appendix B). It is not due to any row.
        curvature: the operator, in words.
        solver: the solver, in words.
        sweeps: products with C that the solution took.
        truncation: bound on the relative bias of a recursion that was stopped early (LiSSA), else 0.
        preconditioner_gap: (q,) how far the preconditioner alone was from the answer, ‖x₀ − x‖/‖x‖ in the norm of
            C + λI with x₀ = (Ĉ + λI)⁻¹v, as a fraction; None where no other curvature preconditioned.
        settled: (q,) what is estimated to be still to come to the values, relative to a query's; None where the solver
            did not follow them.
        settled_bound: (q,) what can still come to these values at most, proven: an upper bound on the norm of what is
            missing over that of the values, on the rows that were followed. None where they were not, and where C is
            not known to be positive semidefinite.
        error_bound: (q,) a proven bound on ‖S − (C + λI)⁻¹∇f‖: a row's value is off by at most |scale|·‖∇L(zᵢ)‖ times
            this. None likewise.
        members: the certificates of the models that were averaged, one each; empty for a single model. The numbers
            above are then the worst of them: largest residual, damping and gradient, smallest curvature and coverage;
            drift is their mean; bounds are the members' own.
    """

    residual: Float[NDArray[np.float64], " q"] = field(repr=False)
    converged: bool
    damping: float
    gradient_norm: float
    min_curvature: float
    coverage: float
    drift: Float[NDArray[np.float64], " q"] = field(repr=False)
    curvature: str = ""
    solver: str = ""
    sweeps: int = 0
    truncation: float = 0.0
    preconditioner_gap: Float[NDArray[np.float64], " q"] | None = field(default=None, repr=False)
    settled: Float[NDArray[np.float64], " q"] | None = field(default=None, repr=False)
    settled_bound: Float[NDArray[np.float64], " q"] | None = field(default=None, repr=False)
    error_bound: Float[NDArray[np.float64], " q"] | None = field(default=None, repr=False)
    members: tuple[Certificate, ...] = field(default=(), repr=False)

    @staticmethod
    def joined(parts: Sequence[Certificate]) -> Certificate:
        """One certificate for queries that were solved in several blocks."""
        return replace(
            parts[0],
            residual=np.concatenate([part.residual for part in parts]),
            drift=np.concatenate([part.drift for part in parts]),
            converged=all(part.converged for part in parts),
            truncation=max(part.truncation for part in parts),
            preconditioner_gap=_each(parts, "preconditioner_gap", np.concatenate),
            settled=_each(parts, "settled", np.concatenate),
            settled_bound=_each(parts, "settled_bound", np.concatenate),
            error_bound=_each(parts, "error_bound", np.concatenate),
            sweeps=sum(part.sweeps for part in parts),
            min_curvature=float(np.fmin.reduce([part.min_curvature for part in parts])),
            members=tuple(Certificate.joined(blocks) for blocks in zip(*(part.members for part in parts), strict=True)),
        )

    @staticmethod
    def averaged(members: Sequence[Certificate]) -> Certificate:
        """One certificate for the mean over several models, with theirs kept."""

        def distinct(texts: Iterable[str]) -> str:
            return " and ".join(dict.fromkeys(texts))

        return Certificate(
            residual=np.max([member.residual for member in members], 0),
            converged=all(member.converged for member in members),
            damping=max(member.damping for member in members),
            gradient_norm=max(member.gradient_norm for member in members),
            min_curvature=float(np.fmin.reduce([member.min_curvature for member in members])),
            coverage=min(member.coverage for member in members),
            drift=np.mean([member.drift for member in members], 0),
            curvature=f"mean of {len(members)} models: {distinct(member.curvature for member in members)}",
            solver=distinct(member.solver for member in members),
            sweeps=sum(member.sweeps for member in members),
            truncation=max(member.truncation for member in members),
            preconditioner_gap=_each(members, "preconditioner_gap", lambda gaps: np.max(gaps, 0)),
            settled=_each(members, "settled", lambda parts: np.max(parts, 0)),
            members=tuple(members),
        )

    @staticmethod
    def unsolved(queries: int, coverage: float, what: str) -> Certificate:
        """For numbers that need no linear system: no residual, no damping, and nothing said about a minimum."""
        nothing = np.full(queries, np.nan)
        return Certificate(np.zeros(queries), True, 0.0, float("nan"), float("nan"), coverage, nothing, what)

    def __str__(self) -> str:
        return "; ".join(said for _, said in self._said)

    def _repr_html_(self) -> str:
        members = [(f"model {number}", str(member)) for number, member in enumerate(self.members)]
        return markup.facts("How far the numbers can be trusted", [*self._said, *members])

    @property
    def _said(self) -> list[tuple[str, str]]:
        """What is certified, and how it is told."""
        share = f"{self.coverage:.0%}" if self.coverage >= 0.01 else f"{self.coverage:.2%}"
        if not self.solver:
            return [("numbers", self.curvature), ("system", "no linear system"), ("coverage", f"{share} of parameters")]
        said = [
            ("system", f"{self.curvature} + {self.damping:.3g}·I solved by {self.solver}"),
            (
                "residual",
                f"residual ≤ {float(np.max(self.residual)):.1e}" + ("" if self.converged else ", NOT converged"),
            ),
            ("gradient", f"‖∇R‖ = {self.gradient_norm:.1e}"),
            ("curvature", f"smallest curvature {self.min_curvature:.2e}"),
            ("coverage", f"{share} of parameters"),
        ]
        if self.preconditioner_gap is not None:
            gap = float(np.max(self.preconditioner_gap))
            said.insert(2, ("preconditioner", f"its preconditioner alone was off by up to {gap:.2g}"))
        if self.settled is not None:
            proven = "" if self.settled_bound is None else f"; proven: {float(np.max(self.settled_bound)):.1%}"
            told = f"values settled to {float(np.max(self.settled)):.1%} (estimated{proven})"
            said.insert(2, ("values", told))
        if self.truncation:
            said.append(("truncation", f"truncation bias ≤ {self.truncation:.1%}"))
        return said


def packed(certificate: Certificate, name: str) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """A certificate as text and arrays; its members' too, at any depth."""
    values = {one.name: getattr(certificate, one.name) for one in fields(certificate) if one.name != "members"}
    arrays = {f"{name}.{key}": value for key, value in values.items() if isinstance(value, np.ndarray)}
    card = {key: value for key, value in values.items() if not isinstance(value, np.ndarray)}
    card["members"] = []
    for number, member in enumerate(certificate.members):
        text, parts = packed(member, f"{name}.{number}")
        card["members"].append(text)
        arrays |= parts
    return card, arrays


def unpacked(card: dict[str, Any], arrays: dict[str, NDArray[Any]], name: str) -> Certificate:
    """The certificate that `packed` wrote; its arrays leave `arrays`."""
    inside = [unpacked(text, arrays, f"{name}.{number}") for number, text in enumerate(card.get("members", []))]
    known: dict[str, Any] = {**card, "members": tuple(inside)}
    for one in fields(Certificate):
        if f"{name}.{one.name}" in arrays:
            known[one.name] = arrays.pop(f"{name}.{one.name}")
    return Certificate(**known)


def _each(parts: Sequence[Certificate], name: str, join: Any) -> NDArray[np.float64] | None:
    """What all parts have under a name, joined; None if one has none."""
    found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
    return join(found) if len(found) == len(parts) else None
