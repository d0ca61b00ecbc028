"""Curvature, solver and damping, bound to an objective and its data: each is prepared once, when first needed."""

from __future__ import annotations

import warnings

from jaxtyping import Float
from torch import Tensor

from upweight import calculus, defaults, scoring
from upweight.errors import InvalidInput, NotPositiveDefinite, TheoryWarning
from upweight.operators import Curvature, Dense, Hessian, Operator
from upweight.operators.linear import LinearHessian
from upweight.solvers import Prepared, Solution, Solver
from upweight.solvers.base import checked_damping
from upweight.sweep import Sweep
from upweight.transforms import undisturbed


class Bound:
    """(C + λI)⁻¹ of one objective on one data set; what was not named is chosen by `defaults`.

    Args:
        sweep: the objective and the rows it averages over.
        curvature: a specification, or None.
        solver: a specification, or None.
        damping: λ, or None.

    Raises:
        InvalidInput: if a setting is not what it should be.
    """

    def __init__(
        self,
        sweep: Sweep,
        curvature: Curvature | None,
        solver: Solver | None,
        damping: float | None,
    ) -> None:
        self.sweep = sweep
        self.curvature = curvature or defaults.curvature(sweep.objective)
        self.solver = defaults.completed(solver, sweep.objective, sweep.examples, self.curvature)
        self.chosen_damping = None if damping is None else checked_damping(damping)
        self._solver_given = solver is not None
        self._operator: Operator | None = None
        self._prepared: Prepared | None = None
        self._prepared_for_many: Prepared | None = None
        self._risk_gradient: Tensor | None = None

    @property
    def operator(self) -> Operator:
        """The curvature, bound to the objective and the data."""
        if self._operator is None:
            with undisturbed():
                self._operator = self.curvature.bind(self.sweep)
        return self._operator

    @property
    def damping(self) -> float:
        """The λ that acts."""
        if self.chosen_damping is None:
            known = (self.sweep.objective, self.curvature, self.operator)
            self.chosen_damping = defaults.damping(
                *known, lambda: scoring.rows_from_minimum(self.sweep, self.risk_gradient)
            )
        return self.chosen_damping

    @property
    def prepared(self) -> Prepared:
        """The solver, ready for right-hand sides."""
        if self._prepared is None:
            with undisturbed():
                self._prepared = self.solver.prepare(self.operator, self.damping)
            self._look_at_the_minimum()
        return self._prepared

    @property
    def exact_curvature(self) -> Curvature:
        """The curvature without the way it is stored."""
        return self.curvature.of if isinstance(self.curvature, Dense) else self.curvature

    @property
    def risk_gradient(self) -> Float[Tensor, " p"]:
        """∇R(θ̂).  Cost: one sweep, once."""
        if self._risk_gradient is None:
            objective = self.sweep.objective
            if isinstance(self.operator, LinearHessian):
                mean = self.operator.gradient()
            else:
                pulled = self.sweep.fold(lambda batch, w: calculus.pull(objective, batch, w[None]), label="gradient")
                mean = pulled[0] / self.sweep.n
            self._risk_gradient = mean + calculus.penalty_gradient(objective)
        return self._risk_gradient

    def for_many(self, systems: int) -> tuple[Solver, Prepared]:
        """The solver, or a direct one that costs less for so many systems, if the choice was left to `defaults`."""
        known = (self.sweep.objective, self.sweep.examples, self.curvature)
        solver = self.solver if self._solver_given else defaults.solver(*known, systems=systems)
        if solver == self.solver:
            return solver, self.prepared
        if self._prepared_for_many is None:
            try:
                self._prepared_for_many = solver.prepare(self.operator, self.damping)
            except NotPositiveDefinite:  # an iteration may still solve what a factorisation must refuse
                return self.solver, self.prepared
        return solver, self._prepared_for_many

    def solve(self, V: Float[Tensor, "k p"]) -> Solution:
        """(C + λI)⁻¹ v for every row v, refused if the solver did not keep its promise."""
        with undisturbed():
            return scoring.solved(self.prepared, V, repr(self.solver))

    def _look_at_the_minimum(self) -> None:
        """A TheoryWarning when a network's Hessian is used further from a minimum than one row's effect."""
        objective = self.sweep.objective
        if not isinstance(self.exact_curvature, Hessian) or objective.linear is not None:
            return  # the scikit-learn adapter has looked already
        missed = scoring.rows_from_minimum(self.sweep, self.risk_gradient)
        if missed < 1:
            return
        message = (
            f"{objective.name} is not at a minimum: ‖∇R‖ = {float(self.risk_gradient.norm()):.3g}, as much as "
            f"{missed:.3g} rows. Train further, check that the penalty is the one it was trained with, or use "
            "curvature=GaussNewton(); see influence.check()."
        )
        warnings.warn(message, TheoryWarning, stacklevel=4)


def check_specification(value: object, method: str, name: str, example: str) -> None:
    """Refuse what is not an object with this method.

    Raises:
        InvalidInput: if it is a name or a class, or lacks the method.
    """
    if value is not None and (isinstance(value, type | str) or not hasattr(value, method)):
        message = f"{name}={value!r} is not a {name} specification. Pass an object such as {name}=uw.{example}."
        raise InvalidInput(message)
