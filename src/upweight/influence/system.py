"""What every question is a function of: the linear system (C + λI) x = v of one objective on its data.

Each part is prepared once, when first needed: the curvature, the damping, the factorisation, ∇R. What was not named is
chosen by `defaults`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.arrays import as_tensor
from upweight.data.examples import Examples
from upweight.errors import InvalidInput, NotConverged, NotPositiveDefinite, TheoryWarning
from upweight.influence import defaults
from upweight.influence.undetermined import Undetermined
from upweight.model import calculus, penalties, per_row, routes
from upweight.model.encoders import Encoder, PlainEncoder, training_examples
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.model.transforms import undisturbed
from upweight.operators import Curvature, Dense, Hessian, Kronecker, Operator
from upweight.operators.layered import LayeredGaussNewton
from upweight.operators.linear import LinearHessian
from upweight.runs import ranks, threads
from upweight.runs.machine import budget_of
from upweight.runs.store import Store
from upweight.solvers import Prepared, Solution, Solver
from upweight.solvers.base import LOOKED, checked_damping, residuals
from upweight.solvers.cg import Iteration
from upweight.solvers.flat import Flat
from upweight.solvers.lissa import Recursion
from upweight.solvers.pacing import Keep

T = TypeVar("T")
PROBE = 3  # examples that a route is tried on


@dataclass(frozen=True, eq=False)
class System:
    """(C + λI) x = v of one objective on one data set, and how queries become examples of it.

    Args:
        sweep: the objective, at θ̂, and the rows it averages over.
        encoder: how queries and new labels become examples.
        curvature: the specification of C.
        solver: the specification of how systems are solved.
        named_damping: λ if the user named it; None lets `defaults` choose.
        solver_is_named: whether the user named the solver; `for_many` may take another one if not.
    """

    sweep: Sweep
    encoder: Encoder
    curvature: Curvature
    solver: Solver
    named_damping: float | None = None
    solver_is_named: bool = False

    @classmethod
    def of(
        cls,
        objective: Objective,
        data: Any,
        *,
        curvature: Curvature | None = None,
        solver: Solver | None = None,
        damping: float | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        memory_budget: float | int | str | None = None,
        encoder: Encoder | None = None,
        ids: Any = None,
    ) -> System:
        """The system of an objective on training data, with `defaults` for what is None; arguments as for Influence.

        Cost: the losses of a few rows, to find the way autograd takes.

        Raises:
            InvalidInput: if a setting or the data cannot be used.
        """
        encoder = encoder or PlainEncoder()
        check_specification(curvature, "bind", "curvature", "operators.Hessian()")
        check_specification(solver, "prepare", "solver", "solvers.CG()")
        examples = training_examples(data, encoder, ids)
        probe = examples.batch(examples.spread(PROBE))
        objective = routes.probe(objective, probe)
        budget = budget_of(memory_budget)
        each = defaults.example_bytes(objective, probe)
        sweep = Sweep(objective, examples, batch_size, progress, each, budget=budget)
        chosen = curvature or defaults.curvature(sweep, probe, solver)
        completed = defaults.completed(solver, objective, examples, chosen, budget)
        if budget is not None:
            defaults.refuse_larger(completed, objective, examples, chosen, budget)
        known = None if damping is None else checked_damping(damping)
        return cls(sweep, encoder, chosen, completed, known, solver is not None)

    # ---- what it is made of ------------------------------------------------------------------------------------------

    @property
    def objective(self) -> Objective:
        """What was minimised, at θ̂."""
        return self.sweep.objective

    @property
    def examples(self) -> Examples:
        """The training rows."""
        return self.sweep.examples

    @property
    def n(self) -> int:
        """The number of training rows."""
        return len(self.examples)

    @property
    def exact_curvature(self) -> Curvature:
        """The curvature without the way it is stored."""
        return self.curvature.of if isinstance(self.curvature, Dense) else self.curvature

    # ---- what is prepared once ---------------------------------------------------------------------------------------

    @cached_property
    def operator(self) -> Operator:
        """The curvature, bound to the objective and the data, which are the same on all ranks."""
        return self._bound(self.sweep)

    def prepare_in(self, store: Store) -> None:
        """Make the curvature, if that is still to do, by way of a store: its sums go on from those that are kept."""
        if "operator" not in self.__dict__:
            self.__dict__["operator"] = self._bound(replace(self.sweep, store=store))

    @cached_property
    def damping(self) -> float:
        """The λ that acts."""
        if self.named_damping is not None:
            return self.named_damping
        known = (self.objective, self.curvature, self.operator)
        return defaults.damping(*known, lambda: per_row.rows_from_minimum(self.sweep, self.risk_gradient))

    @property
    def known_damping(self) -> float | None:
        """λ if it was named, or chosen already; None before. It chooses nothing."""
        return self.__dict__.get("damping", self.named_damping)

    @cached_property
    def begun_with(self) -> Solver:
        """The solver that was named or chosen, whatever has taken its place since: it tells a folder what is asked."""
        return self.solver

    @cached_property
    def prepared(self) -> Prepared:
        """The solver, ready for right-hand sides."""
        with undisturbed(), threads.shared():
            prepared = self.solver.prepare(self.operator, self.damping)
        if isinstance(prepared, Iteration) and not self.solver_is_named:
            prepared = replace(prepared, patience=defaults.patience(*self._known, self.sweep.budget))
        self._look_at_the_minimum()
        return prepared

    @cached_property
    def risk_gradient(self) -> Float[Tensor, " p"]:
        """∇R(θ̂), which is 0 at a minimum.  Cost: one sweep, once; none where a solver's operator visits the rows."""
        objective, known = self.objective, self.__dict__.get("operator")
        if objective.linear is not None and isinstance(self.operator, LinearHessian):
            mean = self.operator.gradient()
        elif isinstance(known, LayeredGaussNewton) and (known.ready or "prepared" in self.__dict__):
            mean = known.gradient()
        else:
            pulled = self.sweep.fold(lambda batch, w: calculus.pull(objective, batch, w[None]), label="gradient")
            mean = pulled[0] / self.n
        return mean + penalties.gradient(objective)

    @property
    def knows_risk_gradient(self) -> bool:
        """Whether ∇R was computed already."""
        return "risk_gradient" in self.__dict__

    def learn_risk_gradient(self, total: Float[Tensor, " p"]) -> None:
        """∇R from Σᵢ wᵢ∇Lᵢ, which a sweep over all rows has found on its way."""
        if not self.knows_risk_gradient:
            self.__dict__["risk_gradient"] = total / self.n + penalties.gradient(self.objective)

    @property
    def penalty_share(self) -> Float[Tensor, " p"]:
        """What a row's gradient carries of the penalty's: (n/Σw)∇r if removing a row removes its share, else 0."""
        return penalties.share(self.objective, float(self.examples.weights.sum()), self.n)

    @cached_property
    def _factorised(self) -> dict[str, System]:
        """The same with solvers that `for_many` took in place of the own one, prepared; by their names."""
        return {}

    # ---- solving -----------------------------------------------------------------------------------------------------

    def for_many(self, systems: int) -> System:
        """Itself, or the same with a direct solver that costs less for so many systems, if `defaults` may choose."""
        twin = self.planned_for(systems)
        if twin is self or twin in self._factorised.values():
            return twin
        twin.__dict__.update(operator=self.operator, damping=self.damping)
        if twin.solver == self.solver:  # which has taken an iteration's place
            twin.__dict__["prepared"] = self.prepared
        name = repr(twin.solver)
        try:
            twin.prepared  # noqa: B018  # pyright: ignore[reportUnusedExpression] made when it is asked for
        except NotPositiveDefinite:  # an iteration may still solve what a factorisation must refuse
            twin = self
        self._factorised[name] = twin
        return twin

    def planned_for(self, systems: int) -> System:
        """The same, with what is prepared already and no more."""
        solver = self.begun_with if self.solver_is_named else self._chosen_for(systems)
        if solver == self.begun_with:
            return self
        if repr(solver) in self._factorised:
            return self._factorised[repr(solver)]
        twin = replace(self, solver=solver, solver_is_named=True)
        known = ("operator", "damping", "risk_gradient")
        twin.__dict__.update({name: self.__dict__[name] for name in known if name in self.__dict__})
        return twin

    def _chosen_for(self, systems: int) -> Solver:
        if systems not in self._choices:
            self._choices[systems] = defaults.solver(*self._known, systems=systems, budget=self.sweep.budget)
        return self._choices[systems]

    @cached_property
    def _choices(self) -> dict[int, Solver]:
        """The solvers that `defaults` would take, by numbers of systems."""
        return {}

    @property
    def _known(self) -> tuple[Objective, Examples, Curvature]:
        return self.objective, self.examples, self.curvature

    def ask(self, question: Callable[[], T]) -> T:
        """question(); once more with a factorisation, where an iteration that was chosen does not converge.

        The one owner of that change: whatever solves with `prepared` does so inside of a question. An iteration that
        gave way because a factorisation would be quicker goes on to its end where the factorisation must refuse.

        Raises:
            NotConverged: if the user named the solver, or a factorisation would be too large.
        """
        try:
            return question()
        except NotConverged:
            other = defaults.in_its_place(self.solver, *self._known, self.sweep.budget)
            if self.solver_is_named or other is None:
                raise
        begun = self.__dict__.pop("prepared", None)
        self.__dict__.update(begun_with=self.solver, solver=other.solver)  # every certificate's from now on
        try:
            return question()
        except NotPositiveDefinite:
            if not isinstance(begun, Iteration) or begun.patience is None:
                raise
        self.__dict__.update(solver=self.begun_with, prepared=begun.patiently())
        return question()

    def solve(self, V: Float[Tensor, "k p"]) -> Solution:
        """(C + λI)⁻¹ v for every row v, refused if the solver did not keep its promise.

        Rows that ask for what the data do not determine are NaN, with a TheoryWarning.

        Raises:
            NotPositiveDefinite: if all of them do.
        """
        with undisturbed(), threads.shared():
            solution = self.ask(lambda: solved(self.prepared, V, repr(self.solver)))
        self.undetermined.announce(solution)
        return solution

    def solve_in(self, store: Store, V: Float[Tensor, "k p"]) -> Solution:
        """The same by way of a store: an iteration goes on from the state there, and keeps its own every half a minute.

        Raises:
            NotPositiveDefinite: as for `solve`.
        """
        return self.ask(lambda: self._solve_in(store, V))

    def _solve_in(self, store: Store, V: Float[Tensor, "k p"]) -> Solution:
        stochastic = isinstance(self.prepared, Recursion)
        if not stochastic and not isinstance(self.prepared, Iteration):
            return self.solve(V)
        write = store.keep_estimates if stochastic else store.keep_state
        with undisturbed(), threads.shared():
            reading = "reading the state of the solution"
            kept = ranks.by_first(reading, lambda: store.estimates if stochastic else store.state)
            state = None if kept is None else {name: as_tensor(x) for name, x in kept.items()}
            looked = {} if state is None else {name: state.pop(name) for name in LOOKED if name in state}
            if state is not None and looked:  # it had ended before its residual was small
                missed = residuals(self.operator, self.damping, state["x"], self.project(V))
                return Solution(state["x"], missed, True, sweeps=1, **looked)

            def keep(state: Mapping[str, Tensor]) -> None:
                if ranks.first():
                    write({name: x.numpy() for name, x in state.items()})

            solution = solved(self.prepared, V, repr(self.solver), state=state, keep=keep)
        self.undetermined.announce(solution)
        return solution

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Inside, a process solves without the others, as in a sweep: it holds all blocks of the curvature."""
        near = getattr(getattr(self.prepared, "inverse", None), "near", None)
        with ExitStack() as stack:
            for one in (self.operator, near):
                if isinstance(one, Kronecker):
                    stack.enter_context(one.here())
            yield

    @property
    def flat(self) -> Flat | None:
        """The directions that no training row sees, if the solver has met any."""
        return getattr(self.prepared, "flat", None)

    @property
    def undetermined(self) -> Undetermined:
        """What those directions leave open, with the names of its columns."""
        return self.undetermined_by(self.flat)

    def undetermined_by(self, flat: Flat | None) -> Undetermined:
        """The same of directions that another solver has met."""
        return Undetermined(flat, self.objective.linear, self.encoder.feature_names or [])

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the directions in which R is constant, by construction or because no row sees them."""
        V = self.operator.project(V)
        return V if self.flat is None else self.flat.project(V)

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def queries(self, on: Any) -> Examples:
        """The queries of a question: (Xq, yq), Examples, (Dataset,), or rows of named parts, with their targets.

        Raises:
            InvalidInput: if `on` is something else.
        """
        if isinstance(on, Examples):
            return self.encoded(on)
        if isinstance(on, tuple) and 1 <= len(on) <= 2:
            return self.encoded(*on)
        if isinstance(on, Mapping) or (isinstance(on, list) and on and isinstance(on[0], Mapping)):
            return self.encoded(on)  # rows of named parts
        kind = f"{len(on)} things" if isinstance(on, tuple) else f"a {type(on).__name__}"
        message = f"on is {kind}. Pass the pair on=(Xq, yq), or upweight.Examples."
        raise InvalidInput(message)

    def encoded(self, X: Any, y: Any = None) -> Examples:
        """X and y as examples whose loss is defined.

        Raises:
            InvalidInput: if they have no targets, and the training rows have.
        """
        queries = self.encoder.examples(X, y)
        if self.examples.y is not None and queries.y is None and queries.x is not None:
            message = (
                f"These {len(queries)} examples have no y, and the training rows have one, so their loss is not "
                "defined. Pass y too, as in on_loss(X, y) or on=(X, y)."
            )
            raise InvalidInput(message)
        return queries

    def class_weights(self, examples: Examples) -> NDArray[np.float64]:
        """The part of wᵢ that belongs to the label of each example."""
        return np.ones(len(examples)) if examples.y is None else self.encoder.class_weights(as_tensor(examples.y))

    def refuse_other_ranks(self) -> None:
        """Raises if another process of the same job has another model, other rows or settings.

        Raises:
            InvalidInput: on every rank, naming the first that differs from rank 0, and in what.
        """
        ranks.refuse_others(
            "comparing the work of all ranks",
            lambda: {
                "model": f"{self.objective.name}, θ̂ {ranks.digest(self.objective.theta.numpy())}",
                "training rows": f"{self.n:,}, {self.examples.fingerprint()}",
                "penalty": f"{self.objective.penalty}, with the rows: {self.objective.folded}",
                "settings": f"{self.curvature}, {self.solver}, damping {self.named_damping}, {self.sweep.batch_size}",
            },
        )

    # ---- inner steps -------------------------------------------------------------------------------------------------

    def _bound(self, sweep: Sweep) -> Operator:
        self.refuse_other_ranks()
        with undisturbed():
            return self.curvature.bind(sweep)

    def _look_at_the_minimum(self) -> None:
        """A TheoryWarning when a network's Hessian is used further from a minimum than one row's effect."""
        objective = self.objective
        if not isinstance(self.exact_curvature, Hessian) or objective.linear is not None:
            return  # the scikit-learn adapter has looked already
        missed = per_row.rows_from_minimum(self.sweep, self.risk_gradient)
        if missed < 1:
            return
        message = (
            f"{objective.name} is not at a minimum: ‖∇R‖ = {float(self.risk_gradient.norm()):.3g}, more than one row's "
            "effect. Train further, check that the penalty is the one it was trained with, or use "
            "curvature=GaussNewton(); see influence.check()."
        )
        warnings.warn(message, TheoryWarning, stacklevel=4)


class Explained(Protocol):
    """Whatever holds a System: an `Influence`."""

    @property
    def system(self) -> System:
        """What its questions are functions of."""
        ...


def solved(
    prepared: Prepared,
    V: Float[Tensor, "k p"],
    solver: str,
    *,
    state: Mapping[str, Tensor] | None = None,
    keep: Keep | None = None,
) -> Solution:
    """The solutions of a prepared solver, if they are what it promised; `solver` names it in messages.

    Raises:
        NotConverged: if a residual that was promised is not reached.
    """
    if isinstance(prepared, Iteration | Recursion):
        solution = prepared.solve(V, state=state, keep=keep)
    else:
        solution = prepared.solve(V, state=state)
    if not solution.converged and solution.replicas is None:
        message = (
            f"{solver} left a relative residual of {float(solution.residual.max()):.2g}: C + λI is too badly "
            f"conditioned for float64 (smallest curvature {solution.min_curvature:.2g}). Try a larger damping, or "
            "drop or standardise features."
        )
        raise NotConverged(message, solution)
    if not solution.converged:
        warning = (
            f"{solver} has not settled (residual {float(solution.residual.max()):.2g}): its values may carry "
            "a bias that their standard errors do not contain. Raise depth, or use CG() for exact answers."
        )
        warnings.warn(warning, TheoryWarning, stacklevel=5)
    return solution


def check_specification(value: object, method: str, name: str, example: str) -> None:
    """Refuse what is not an object with this method.

    Raises:
        InvalidInput: if it is a name or a class, or lacks the method.
    """
    if value is not None and (isinstance(value, type | str) or not hasattr(value, method)):
        message = f"{name}={value!r} is not a {name} specification. Pass an object such as {name}=uw.{example}."
        raise InvalidInput(message)
