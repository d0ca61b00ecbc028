"""Whether the theory's assumptions hold for a fitted model: the numbers behind `Influence.check`."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from upweight.data.trees import batch_length, take, tree_map
from upweight.errors import SolverError, TheoryWarning
from upweight.influence import defaults, per_row, scoring
from upweight.influence.system import System
from upweight.model import calculus, layers
from upweight.solvers import Cholesky
from upweight.solvers.lanczos import smallest_eigenvalue, suggest_damping

_NEARLY = 0.3
_CURVED_ROWS = 8


@dataclass(frozen=True)
class Report:
    """What `check()` found. `ok` is True when the first-order theory applies as it stands.

    Args:
        n: training rows.
        p: differentiated parameters.
        gradient_norm: ‖∇R(θ̂)‖; 0 at a minimum.
        rows_from_minimum: by how many rows' worth of gradient θ̂ misses the minimum, ‖∇R‖ over the root mean square of
            wᵢ‖∇Lᵢ‖/n; the larger of two norms, Euclidean and that of (C + λI)⁻¹, which no feature's units can hide
            from. Below 1 the miss is smaller than the effect that is being estimated.
        sum_of_influences: largest |Σᵢ wᵢ I(zᵢ, query)|/n over the probed queries, penalty folded; 0 at a minimum. It
            equals the drift.
        drift: largest predicted change of a probed query's loss if training went on to the minimum (appendix B); NaN
            if unsolved.
        min_curvature: smallest eigenvalue of C; must exceed −damping.
        residual: largest relative residual of the probed linear systems; NaN if unsolved.
        damping: the λ that acts.
        suggested_damping: a damping that makes C + λI positive, if the present one does not; else None.
        coverage: fraction of the model's parameters that are differentiated.
        batch_drift: largest change of an example's loss when it is computed alone instead of in a batch.
        curvature: in words.
        solver: in words.
        autograd: the route that the probe chose, with the reason if it is not the fastest.
        problem: the solver's message if the probed systems could not be solved, else "".
        costs: what each solver would cost for one query, in flops and bytes, by the model that `defaults` chooses with.
        rules: for every parameter, how its gradients are computed: by which layer, or by autograd; see `layers`.
        written_out: weights whose gradients are matrices for a moment when several queries ask, and at how many
            positions they act; the others stay activations times output gradients.
    """

    n: int
    p: int
    gradient_norm: float
    rows_from_minimum: float
    sum_of_influences: float
    drift: float
    min_curvature: float
    residual: float
    damping: float
    suggested_damping: float | None
    coverage: float
    batch_drift: float
    curvature: str
    solver: str
    autograd: str
    problem: str = ""
    costs: str = ""
    rules: dict[str, str] = field(default_factory=dict)
    written_out: dict[str, int] = field(default_factory=dict)

    @property
    def at_minimum(self) -> bool:
        """Whether θ̂ is nearer to a minimum than one row's effect."""
        return self.rows_from_minimum < 1

    @property
    def ok(self) -> bool:
        """Whether θ̂ is at a minimum, C + λI is positive and the systems were solved."""
        return self.at_minimum and self.min_curvature + self.damping > 0 and not self.problem

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return asdict(self) | {"at_minimum": self.at_minimum, "ok": self.ok}

    def __str__(self) -> str:
        if self.rows_from_minimum < _NEARLY:
            verdict = "at a minimum"
        elif self.at_minimum:
            verdict = "nearly at a minimum"
        else:
            verdict = "NOT at a minimum: train further, or read values as effects on the present θ̂ (appendix B)"
        positive = self.min_curvature + self.damping > 0
        lines = [
            f"rows                 {self.n}",
            f"parameters           {self.p} ({self.coverage:.1%} of the model)",
            f"gradient             ‖∇R‖ = {self.gradient_norm:.3g}, as much as {self.rows_from_minimum:.3g} rows: "
            f"{verdict}",
            f"drift                {self.drift:.3g} in a query's loss if training went on; |Σᵢ Iᵢ| = "
            f"{self.sum_of_influences:.3g}",
            f"curvature            {self.curvature} + {self.damping:.3g}·I, smallest eigenvalue of C "
            f"{self.min_curvature:.3g}: {'positive' if positive else 'NOT positive'}",
            f"solver               {self.solver}, residual {self.residual:.2g}",
            f"cost of a query      {self.costs}",
            f"autograd             {self.autograd}; one by one instead of in a batch moves a loss by "
            f"{self.batch_drift:.1g}",
        ]
        lines += [f"{'' if number else 'layers':<21}{line}" for number, line in enumerate(_grouped(self.rules))]
        if self.written_out:
            places = ", ".join(f"{name} ({count})" for name, count in self.written_out.items())
            lines.append(f"{'written out':<21}{places}: at many positions a matrix costs fewer flops than its factors")
        if self.suggested_damping is not None:
            lines.append(
                f"suggestion           damping={self.suggested_damping:g} makes C + λI positive; or "
                "curvature=GaussNewton(), or train further"
            )
        if self.problem:
            lines.append(f"problem              {self.problem}")
        return "\n".join([*lines, f"verdict              {'ok' if self.ok else 'see above'}"])

    def __repr__(self) -> str:
        return f"Report\n{self}"


def examine(system: System, on: Any = None) -> Report:
    """The report on a system, with the drift measured on a few queries: `Influence.check`."""
    queries = system.examples.batch(slice(0, 8)) if on is None else system.queries(on).batch(slice(0, 64))
    objective = system.objective
    gradient = system.risk_gradient
    V = calculus.gradients(objective, queries).double().cpu()
    problem, residual, drift, total, suggested = "", float("nan"), float("nan"), float("nan"), None
    missed = per_row.rows_from_minimum(system.sweep, system.risk_gradient)
    lowest = float("nan")
    damping = float("nan")
    try:
        damping = system.damping
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)  # the report says it with more numbers
            solution = system.prepared.solve(V)
        residual = float(solution.residual.max())
        drift = float((solution.x @ gradient).abs().max())
        lowest = solution.min_curvature
        share = calculus.penalty_gradient(objective) * (system.n / float(system.examples.weights.sum()))
        every = scoring.with_rows(system, replace(solution, replicas=None), share)
        total = float(np.abs(every.mean @ system.examples.weights).max()) / system.n
        if solution.replicas is None:
            missed = max(missed, _rows_in_the_curvature(system))
        if not solution.converged:
            problem = f"{system.solver} did not converge: residual {residual:.2g}"
    except SolverError as error:
        problem = str(error)
    if problem or not np.isfinite(lowest) or not isinstance(system.solver, Cholesky):
        lowest = smallest_eigenvalue(system.operator)[0]
    if lowest + damping <= 0:
        suggested, lowest = suggest_damping(system.operator, damping)
    return Report(
        n=system.n,
        p=objective.size,
        gradient_norm=float(gradient.norm()),
        rows_from_minimum=missed,
        sum_of_influences=total,
        drift=drift,
        min_curvature=lowest,
        residual=residual,
        damping=damping,
        suggested_damping=suggested,
        coverage=objective.coverage,
        batch_drift=_batch_drift(system),
        curvature=repr(system.curvature),
        solver=repr(system.solver),
        autograd=objective.autograd,
        problem=problem,
        costs="; ".join(map(str, defaults.costs(objective, system.examples, system.curvature))),
        rules=layers.rules(objective),
        written_out=layers.written_out(objective, queries),
    )


def _grouped(rules: dict[str, str]) -> list[str]:
    """One line per rule with the parameters that it covers."""
    names: dict[str, list[str]] = {}
    for name, rule in rules.items():
        names.setdefault(rule, []).append(name)
    return [f"{rule}: {', '.join(covered)}" for rule, covered in names.items()]


def _rows_in_the_curvature(system: System) -> float:
    """‖∇R‖ in units of a row's effect, both in the norm √(vᵀ(C + λI)⁻¹v): what a Newton step would still change."""
    rows = system.examples.spread(_CURVED_ROWS)
    G = per_row.gradients(system.sweep, rows) * torch.from_numpy(system.examples.weights[rows] / system.n)[:, None]
    V = torch.cat([system.risk_gradient[None], G])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TheoryWarning)
        forms = (system.prepared.solve(V).x * V).sum(1).clamp(min=0)
    return float(forms[0].sqrt() / forms[1:].mean().sqrt().clamp(min=1e-300))


def _batch_drift(system: System) -> float:
    if system.objective.linear is not None:
        return 0.0
    batch = system.examples.batch(np.arange(min(8, system.n)))
    together = calculus.losses(system.objective, batch)
    singles = [tree_map(lambda leaf: leaf[None], take(batch, b)) for b in range(batch_length(batch))]
    alone = torch.cat([calculus.losses(system.objective, single) for single in singles])
    return float((together - alone).abs().max())
