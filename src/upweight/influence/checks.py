"""Whether the theory's assumptions hold for a fitted model: the numbers behind `Influence.check`."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.data import markup
from upweight.data.trees import tree_map
from upweight.errors import SolverError, TheoryWarning, UpweightError
from upweight.influence import defaults
from upweight.influence.minimum import Distance, look, of_few_rows
from upweight.influence.system import System
from upweight.model import calculus, layers, penalties, per_row
from upweight.model.objective import Route
from upweight.operators import Arnoldi, EmpiricalFisher, GaussNewton, Hessian, Identity, Nystroem
from upweight.operators.implicit import Implicit
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian
from upweight.runs import threads
from upweight.solvers.cg import Iteration
from upweight.solvers.lanczos import smallest_eigenvalue, suggest_damping

_NEARLY = 0.3  # of a row's effect
_ROWS, _QUERIES, _WIDE = 8, 64, 100_000  # rows that are asked by default, queries at most, and where they are few
_LANCZOS, _FEWEST = 100, 20  # products for the smallest eigenvalue where nothing else costs any
_COMPARED = 1  # directions of either kind, along which C is compared with the Hessian
_HELD = 0.1  # of a query's form: what damping may hold back without a word
_SHOWN = 8  # names in a line of the report


@dataclass(frozen=True)
class Report:
    """What `check()` found. `ok` is True when the first-order theory applies as it stands.

    Args:
        n: training rows.
        p: differentiated parameters.
        gradient_norm: ‖∇R(θ̂)‖; 0 at a minimum.
        rows_from_minimum: by how many rows' worth of gradient θ̂ misses the minimum, ‖∇R‖ over the root mean square of
            wᵢ‖∇Lᵢ‖/n in the norm of (C + λI)⁻¹, which no feature's units can hide from; Euclidean if unsolved. Below 1
            the miss is smaller than the effect that is being estimated.
        value_drift: by how much the probed values would change if training went on to the minimum, as a fraction of
            them (`influence.minimum`); NaN if unsolved. Below 0.05 they are right, however many rows away it is.
        sum_of_influences: largest |Σᵢ wᵢ I(zᵢ, query)|/n = |xᵀ∇R| over what was solved for, penalty folded; 0 at a
            minimum. The drift is the same of every query, by the system of ∇R.
        drift: largest predicted change of a probed query's loss if training went on to the minimum (appendix B); NaN
            if unsolved.
        min_curvature: smallest eigenvalue of C, of an iteration an upper bound that its products met; must exceed
            −damping.
        residual: largest relative residual of the probed linear systems: an iteration solves for the sum of the queries
            with random signs, a direct solver for each; NaN if unsolved.
        damping: the λ that acts.
        suggested_damping: a damping that makes C + λI positive, if the present one does not; else None.
        beside_hessian: Σ vᵀCv / Σ vᵀHv with the exact Hessian H, along random v and along gradients of probed queries:
            1 if C leaves nothing out, below 1 if it misses curvature, above 1 if it has too much (a
            Hessian far from a minimum may be smaller than any positive curvature). None where it is not compared: C is
            the Hessian, or stands for none.
        flat: which columns the data do not tell apart, if any: answers are then those of minimum norm.
        held_back: by how much damping alone makes the probed values smaller: the largest λ‖x‖²/xᵀ(C + λI)x with
            (C + λI)x = ∇f_q, between 0 and 1; NaN if unsolved.
        summed: whether an iteration solved for the sum of the queries with random signs. Then held_back is of that
            sum, as a mean of the queries in which those with large values count most, and not the largest.
        bound_only: whether min_curvature is an upper bound only.
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
    value_drift: float
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
    beside_hessian: tuple[float, float] | None = None
    held_back: float = float("nan")
    summed: bool = False
    bound_only: bool = False
    flat: str = ""
    problem: str = ""
    costs: str = ""
    rules: dict[str, str] = field(default_factory=dict)
    written_out: dict[str, int] = field(default_factory=dict)

    @property
    def at_minimum(self) -> bool:
        """Whether θ̂ is nearer to a minimum than one row's effect, or values would stay what they are on the way."""
        return Distance(self.rows_from_minimum, self.value_drift).kept

    @property
    def ok(self) -> bool:
        """Whether θ̂ is at a minimum, C + λI is positive and the systems were solved."""
        return self.at_minimum and self.min_curvature + self.damping > 0 and not self.problem

    @property
    def verdict(self) -> str:
        """One line: whether the theory applies, and what stands against it."""
        against = []
        if self.problem:
            against.append(f"the systems were not solved ({self.problem.split('. ')[0]})")
        if not self.at_minimum:
            against.append(f"θ̂ is not at a minimum, {self._away}, so values are effects on the present θ̂")
        if self.min_curvature + self.damping <= 0 or (np.isnan(self.min_curvature) and not self.problem):
            against.append(f"C + λI is not positive ({self.min_curvature:.3g} + {self.damping:.3g})")
        known = []
        if self.at_minimum and self.held_back > _HELD:
            known.append(
                f"damping={self.damping:.3g} alone makes values {self._held} smaller than refits: name a smaller one"
            )
        if self.at_minimum and self.rows_from_minimum >= 1:
            known.append(f"θ̂ is not quite at a minimum, {self._away}")
        start = "not ok: " + "; ".join(against) if against else "ok"
        return f"{start}; but {'; '.join(known)}" if known else start

    @property
    def _held(self) -> str:
        return f"{'about' if self.summed else 'up to'} {self.held_back:.0%}"

    @property
    def _away(self) -> str:
        return str(Distance(self.rows_from_minimum, self.value_drift))

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return asdict(self) | {"at_minimum": self.at_minimum, "ok": self.ok, "verdict": self.verdict}

    def __str__(self) -> str:
        return "\n".join(f"{name:<21}{said}" for name, said in self._said)

    def _repr_html_(self) -> str:
        *lines, verdict = self._said
        return markup.facts("Whether the theory's assumptions hold", [verdict, *lines])

    @property
    def _said(self) -> list[tuple[str, str]]:
        """What was found: the name of each line, empty where it goes on, and its words."""
        at = "at a minimum" if self.rows_from_minimum < _NEARLY else "nearly at a minimum"
        if not self.at_minimum:
            at = "NOT at a minimum: train further, or read values as effects on the present θ̂ (appendix B)"
        positive = self.min_curvature + self.damping > 0
        alone = f"one by one instead of in a batch moves a loss by {self.batch_drift:.1g}"
        said = [
            ("rows", str(self.n)),
            ("parameters", f"{self.p} ({self.coverage:.1%} of the model)"),
            ("gradient", f"‖∇R‖ = {self.gradient_norm:.3g}, {self._away}: {at}"),
            (
                "drift",
                f"{self.drift:.3g} in a query's loss if training went on; |Σᵢ Iᵢ| = {self.sum_of_influences:.3g}",
            ),
            (
                "curvature",
                f"{self.curvature} + {self.damping:.3g}·I, smallest eigenvalue of C "
                f"{'at most ' if self.bound_only else ''}{self.min_curvature:.3g}: "
                f"{'positive' if positive else 'NOT positive'}",
            ),
            ("solver", f"{self.solver}, residual {self.residual:.2g}"),
            ("cost of a query", self.costs),
            ("autograd", f"{self.autograd}; {alone}"),
        ]
        said += [("" if number else "layers", line) for number, line in enumerate(_grouped(self.rules))]
        return [*said, *self._against, ("verdict", self.verdict)]

    @property
    def _against(self) -> list[tuple[str, str]]:
        """What is said only where there is something to say."""
        said = []
        if self.held_back > 0:
            said.append(("damping", f"holds back {self._held} of a probed query's value"))
        if self.flat:
            said.append(("flat", f"{self.flat}: answers are those of minimum norm"))
        if self.beside_hessian is not None:
            random, queries = self.beside_hessian
            beside = f"vᵀCv is {random:.3g} of vᵀHv along random vectors, {queries:.3g} along queries"
            said.append(("beside the Hessian", beside))
        if self.written_out:
            places = _some([f"{name} ({count})" for name, count in self.written_out.items()])
            said.append(("written out", f"{places}: at many positions a matrix costs fewer flops than its factors"))
        if self.suggested_damping is not None:
            other = "curvature=GaussNewton(), or train further"
            said.append(("suggestion", f"damping={self.suggested_damping:g} makes C + λI positive; or {other}"))
        if self.problem:
            said.append(("problem", self.problem))
        return said

    def __repr__(self) -> str:
        return f"Report\n{self}"


@threads.shared()
def examine(system: System, on: Any = None) -> Report:
    """The report on a system, with the drift measured on a few queries: `Influence.check`.

    Cost: about that of the scores of three queries.
    """
    asked = system.examples.subset(np.arange(min(system.n, _ROWS))) if on is None else system.queries(on)
    objective = system.objective
    asked = asked.subset(np.arange(min(len(asked), _QUERIES if objective.size <= _WIDE else _ROWS)))
    V = per_row.gradients(system.sweep.over(objective, asked))
    problem, summed, residual, drift, total, suggested = "", False, float("nan"), float("nan"), float("nan"), None
    lowest, damping, held, flat, missed, sweeps = float("nan"), float("nan"), float("nan"), "", None, _LANCZOS
    try:
        damping = system.damping
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)  # the report says it with more numbers
            seen = look(system, asked, V)
            flat = system.undetermined.why
        missed, solution, summed = seen.missed, seen.solution, len(seen.sides) == 1 < len(V)
        residual, lowest, sweeps = float(solution.residual.max()), solution.min_curvature, solution.sweeps
        if bool(seen.drift.isnan().any()):
            problem = f"{int(seen.drift.isnan().sum())} of {len(V)} queries ask for what the rows do not determine"
        solved = ~solution.x.isnan().any(1)
        x, own = solution.x[solved], seen.sides[solved]
        if len(x):
            drift, total = float(seen.drift.nan_to_num(0).max()), float((x @ system.risk_gradient).abs().max())
            held = float((damping * x.square().sum(1) / (x * own).sum(1).clamp(min=1e-300)).clamp(0, 1).max())
        if not solution.converged:
            problem = f"{system.solver} did not converge: residual {residual:.2g}"
    except SolverError as error:
        problem = str(error)
    bound = bool(np.isfinite(lowest)) and bool(flat or (not problem and _known(system)))
    if not bound:
        lowest = _lowest(system, bool(flat), max(_FEWEST, sweeps))
    gradient = system.risk_gradient
    acting = damping if np.isfinite(damping) else 0.0  # none could be chosen
    if lowest + acting <= 0 and not flat:
        suggested, lowest = suggest_damping(system.operator, acting)
    missed = missed or Distance(per_row.rows_from_minimum(system.sweep, gradient))
    return Report(
        n=system.n,
        p=objective.size,
        gradient_norm=float(gradient.norm()),
        rows_from_minimum=missed.rows,
        value_drift=missed.values,
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
        beside_hessian=_beside_the_hessian(system, V),
        held_back=held,
        summed=summed,
        bound_only=bound and isinstance(system.prepared, Iteration),
        flat=flat,
        problem=problem,
        costs="; ".join(map(str, defaults.costs(objective, system.examples, system.curvature))),
        rules=layers.rules(objective),
        written_out=layers.written_out(objective, tree_map(lambda leaf: leaf[:1], asked.batch(slice(0, _QUERIES)))),
    )


def _beside_the_hessian(system: System, V: Tensor) -> tuple[float, float] | None:
    """Σ vᵀCv / Σ vᵀHv along random vectors and along some of V.  Cost: 2 Hessian products with up to 512 rows."""
    stands_for = _stands_for(system)
    if isinstance(stands_for, Hessian | Identity) and not isinstance(system.curvature, Arnoldi | Nystroem):
        return None
    if system.objective.linear is not None and not isinstance(system.curvature, Arnoldi | Nystroem | EmpiricalFisher):
        return None
    draw = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (_COMPARED, system.objective.size), generator=draw, dtype=torch.float64) - 1
    both = torch.cat([signs, V[torch.arange(_COMPARED) % len(V)]])
    try:
        exact = of_few_rows(_hessian(system)).apply(both)
        ours = system.operator
        ours = of_few_rows(ours) if isinstance(ours, Implicit | LayeredGaussNewton | LinearHessian) else ours
        curved = ours.forms(both) if isinstance(ours, LayeredGaussNewton) else (both * ours.apply(both)).sum(1)
    except UpweightError:
        return None
    curved, truly = (along.reshape(2, -1).sum(1) for along in (curved, (both * exact).sum(1)))
    quotients = (curved / truly).tolist()
    return (quotients[0], quotients[1]) if np.isfinite(quotients).all() else None


def _stands_for(system: System) -> Any:
    """The curvature that others approximate."""
    found: Any = system.curvature
    while hasattr(found, "of"):
        found = found.of
    return found


def _hessian(system: System) -> Implicit | LinearHessian:
    """The Hessian; what curvature with outputs there is was bound to a criterion that bends, so that it is not asked.

    Raises:
        UnsupportedModel: if the criterion bends at its kinks only.
    """
    if isinstance(_stands_for(system), GaussNewton) and system.objective.linear is None:
        return Implicit(system.sweep, calculus.hvp, None)
    return Hessian().bind(system.sweep)


def _grouped(rules: dict[str, str]) -> list[str]:
    """One line per rule with the parameters that it covers."""
    names: dict[str, list[str]] = {}
    for name, rule in rules.items():
        names.setdefault(rule, []).append(name)
    return [f"{rule}: {_some(covered)}" for rule, covered in names.items()]


def _some(names: list[str]) -> str:
    """A list of names in a report: all of a small network's, the first and the number of a large one's."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _batch_drift(system: System) -> float:
    if system.objective.linear is not None:
        return 0.0
    batch = system.examples.batch(np.arange(min(8, system.n)))
    together = calculus.losses(system.objective, batch)
    alone = calculus.losses(replace(system.objective, route=Route("loop", "loop")), batch)
    return float((together - alone).abs().max())


def _known(system: System) -> bool:
    """Whether the solver tells C's smallest eigenvalue, or that C + λI is positive is a matter of its form."""
    if not isinstance(system.prepared, Iteration):
        return True
    objective = system.objective
    if objective.linear is not None and isinstance(system.exact_curvature, Hessian | GaussNewton):
        return objective.linear.loss.convex
    held = system.damping > 0 or float(penalties.diagonal(objective).min()) > 0
    return held and isinstance(system.exact_curvature, GaussNewton | EmpiricalFisher)


def _lowest(system: System, flat: bool, steps: int) -> float:
    """The smallest eigenvalue of C, beside the flat directions if the solver has met any."""
    known = system.flat if flat else None  # asked otherwise, the solver might refuse once more
    operator = system.operator if known is None else known.beside(system.operator)
    return smallest_eigenvalue(operator, steps=min(_LANCZOS, steps))[0]
