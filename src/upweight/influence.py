"""Influence: which training data made the model say that, and what would it say without them?

With C the curvature, λ the damping, n training rows of weights wᵢ, and f the measure of a query (its loss by default):

    S_q = (C + λI)⁻¹ ∇f(query)                       one linear system per query, shared by all rows
    values[q, i] = (wᵢ/n) S_q · ∇L(zᵢ)               change of f(query) if row i is removed (to first order)

With `penalty_per_example` the row's gradient is ∇L(zᵢ) + (n/Σw)∇r, for the row takes its share of r along.
Reference: Koh & Liang (2017), equations 1 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight import calculus, defaults, identity, pairs, removal, routes, scoring, selfscores
from upweight.bound import Bound, check_specification
from upweight.checks import Report, examine
from upweight.damping import DampingPath, path_of
from upweight.encoders import Encoder, PlainEncoder, training_examples
from upweight.errors import InvalidInput, UnsupportedModel, checked_count
from upweight.examples import Examples, as_array, as_tensor, check_finite
from upweight.objective import Objective
from upweight.operators import Curvature, GaussNewton, Hessian, Operator
from upweight.scores import Certificate, Scores, SelfScores
from upweight.scoring import Products
from upweight.solvers import Prepared, Solution, Solver
from upweight.store import Store
from upweight.sweep import Sweep

Rows = Any  # one row number, several, a mask of n booleans, or None for all
Queries = Any  # inputs, or Examples, or a Dataset
On = tuple[Any, ...] | Examples
Groups = Iterable[Rows] | Mapping[Any, Rows]
_PROBE = 3
_BLOCK_NUMBERS = 2**24  # of the queries' gradients at once: 128 MB


class Influence:
    """Objective + Examples + Operator + Solver; answers the paper's equations 1, 2, 3 and 5.

    Nothing heavy happens until the first question; curvature and factorisation are then kept for the next ones.

    Args:
        objective: what was minimised, at θ̂.
        examples: the training data: Examples, an (X, y) pair, a Dataset, or X alone.
        curvature: a specification such as `operators.Hessian()`; None lets `defaults` choose.
        solver: a specification such as `solvers.CG(rtol=1e-6)`; None lets `defaults` choose.
        damping: λ of (C + λI); None lets `defaults` choose, which is exactly 0 for scikit-learn estimators.
        batch_size: examples per batch; None fits the memory. It changes results by rounding only.
        progress: True or False forces the progress bars (stderr) on or off; None shows them on a terminal only.
        encoder: how queries become examples; set by the adapters.

    Raises:
        InvalidInput: if a setting or the data cannot be used; NotDeterministic or UnsupportedModel if the loss cannot.

    >>> import torch
    >>> X = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    >>> y = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
    >>> def loss(theta, example):
    ...     return (theta @ example[0] - example[1]) ** 2
    >>> fit = Objective(loss, torch.tensor([1.2], dtype=torch.float64))
    >>> Influence(fit, (X, y)).on_loss(X[:1] + 1, y[:1] + 1).values.round(4)
    array([[ 0.   , -0.064,  0.064]])
    """

    def __init__(
        self,
        objective: Objective,
        examples: Any,
        *,
        curvature: Curvature | None = None,
        solver: Solver | None = None,
        damping: float | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        self.encoder: Encoder = encoder or PlainEncoder()
        self.settings = {"curvature": curvature, "solver": solver, "damping": damping}
        self.settings |= {"batch_size": batch_size, "progress": progress}
        check_specification(curvature, "bind", "curvature", "operators.Hessian()")
        check_specification(solver, "prepare", "solver", "solvers.CG()")
        self.examples = training_examples(examples, self.encoder)
        probe = self.examples.batch(self.examples.spread(_PROBE))
        self.objective = routes.probe(objective, probe)
        memory = defaults.example_bytes(self.objective, probe)
        self.sweep = Sweep(self.objective, self.examples, batch_size, progress, memory)
        self._bound = Bound(self.sweep, curvature, solver, damping)

    def __repr__(self) -> str:
        known = self._bound.chosen_damping
        damping = "chosen when first needed" if known is None else f"{known:.4g}"
        return (
            f"Influence({self.objective.name}: n={self.n}, p={self.objective.size}, curvature={self.curvature}, "
            f"solver={self.solver}, damping={damping}, penalty={self.objective.penalty}, "
            f"penalty_per_example={self.objective.folded}, autograd={self.objective.autograd})"
        )

    # ---- what is prepared once ---------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """The number of training rows."""
        return len(self.examples)

    @property
    def feature_names(self) -> list[str] | None:
        """The names of `of_perturbing`'s columns, as a Pipeline or a DataFrame gave them; None if there are none."""
        return self.encoder.feature_names

    @property
    def curvature(self) -> Curvature:
        """The specification of C."""
        return self._bound.curvature

    @property
    def solver(self) -> Solver:
        """The specification of how systems are solved."""
        return self._bound.solver

    @property
    def operator(self) -> Operator:
        """The curvature, bound to the objective and the data."""
        return self._bound.operator

    @property
    def damping(self) -> float:
        """The λ that acts."""
        return self._bound.damping

    @property
    def prepared(self) -> Prepared:
        """The solver, ready for right-hand sides."""
        return self._bound.prepared

    @property
    def risk_gradient(self) -> Float[Tensor, " p"]:
        """∇R(θ̂), which is 0 at a minimum.  Cost: one sweep, once."""
        return self._bound.risk_gradient

    @property
    def penalty_share(self) -> Float[Tensor, " p"]:
        """What a row's gradient carries of the penalty's: (n/Σw)∇r if removing a row removes its share, else 0."""
        return calculus.penalty_share(self.objective, float(self.examples.weights.sum()), self.n)

    # ---- effects on the parameters -----------------------------------------------------------------------------------

    def on_params(self, rows: Rows = None) -> Float[NDArray[np.float64], "k p"]:
        """Equation 1: I_up,params(z) = dθ̂/dε = −(C + λI)⁻¹ ∇L(z) for each row, when its weight grows by ε.

        Removing row i moves θ̂ by about −(wᵢ/n) times its line. Parameters are in the order of `objective.blocks`.

        Raises:
            RowOutOfRange: if a row does not exist.
        """
        G = scoring.gradients(self.sweep, self.examples.rows(rows))
        return -self._solve(G + self.penalty_share).x.numpy()

    def on_params_of_replacing(self, rows: Rows, X_new: Any, y_new: Any = None) -> Float[NDArray[np.float64], "k p"]:
        """Equation 3: dθ̂/dε = −(C + λI)⁻¹ (∇L(z_new) − ∇L(z)), when weight ε moves from each row to its new example."""
        rows = self.examples.rows(rows)
        new = self._new(rows, X_new, y_new)
        difference = scoring.gradients(self.sweep.over(self.objective, new)) - scoring.gradients(self.sweep, rows)
        return -self._solve(difference).x.numpy()

    def on_params_of_perturbing(self, rows: Rows, deltas: Any) -> Float[NDArray[np.float64], "k p"]:
        """Equation 4: dθ̂/dε ≈ −(C + λI)⁻¹ [∇ₓ∇L(z)] δ, when weight ε moves from each row to x + δ.

        Args:
            rows: k training rows.
            deltas: (k, *x) one small change of the input per row.

        Raises:
            InvalidInput: if deltas do not have the shape of the rows' inputs.
            UnsupportedModel: if the objective's inputs are not the user's, as for kernels.
        """
        rows = self.examples.rows(rows)
        movable = self.encoder.movable(rows)
        array = as_array(deltas, "deltas")
        moves = movable.narrowed(as_tensor(array.toarray() if hasattr(array, "toarray") else array).double())
        check_finite(moves, "deltas")
        batch = self.examples.batch(rows)
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if tuple(moves.shape) != tuple(x.shape):
            message = (
                f"deltas has shape {tuple(moves.shape)}, and the inputs of {len(rows)} rows have {tuple(x.shape)}."
            )
            raise InvalidInput(message + " Pass one change of the whole input for each row.")
        return -self._solve(calculus.mixed_products(self.objective, batch, moves).double().cpu()).x.numpy()

    # ---- effects on queries ------------------------------------------------------------------------------------------

    def on_loss(self, Xq: Queries, yq: Any = None, *, store: Any = None) -> Scores:
        """Equation 2: the change of each query's loss if a training row is removed, for every row.

        values[q, i] = (wᵢ/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇L(zᵢ) = −(wᵢ/n) · I_up,loss(zᵢ, z_q): predicted L(query) after
        retraining without row i, minus L(query) now. The query's loss has no penalty in it.

        Cost: one linear system per query, then one sweep; q × n numbers.

        Args:
            Xq: the queries' inputs (or Examples, or a Dataset).
            yq: the queries' targets.
            store: a folder that keeps finished chunks, so that the same call resumes there; None keeps nothing.

        Raises:
            InvalidInput: if the queries do not fit the model; SolverError if a system cannot be solved as promised.
        """
        return self._removal_scores(self.objective, self._with_targets(self.encoder.examples(Xq, yq)), store)

    def on_loss_in_blocks(self, Xq: Queries, yq: Any = None, *, size: int = 256, store: Any = None) -> Iterator[Scores]:
        """Equation 2 (`on_loss`) for more queries than their scores fit in memory: Scores of `size` of them at a time.

        `upweight.extremes(blocks, k)` keeps the top rows of each; a store keeps everything. Memory: size × (n + 4p).

        Args:
            Xq: the queries' inputs.
            yq: the queries' targets.
            size: queries in a block.
            store: a folder that gets one folder `queries-…` per block, each resumed as for on_loss.

        Raises:
            InvalidInput: if size is not a positive whole number, or the queries do not fit the model.
        """
        checked_count(size, "size", hint="256 queries at a time")
        queries = self._with_targets(self.encoder.examples(Xq, yq))
        return (
            self._removal_scores(
                self.objective, block, None if store is None else Path(store) / f"queries-{number * size:08d}"
            )
            for number, block in enumerate(queries.blocks(size))
        )

    def on_measure(
        self, measure: Callable[[Any, Any], Tensor], Xq: Queries, yq: Any = None, *, store: Any = None
    ) -> Scores:
        """Equation 2 for any scalar `measure(params, example)` of a query: a margin, log-odds, a probability.

        values[q, i] = (wᵢ/n) ∇f(z_q)ᵀ (C + λI)⁻¹ ∇L(zᵢ): predicted f(query) after retraining without row i, minus now.

        Args:
            measure: differentiable, of `objective.params` and one example, like a loss. The example is what the
                objective sees: for a frozen network with a head the head's input stands where x would.
            Xq: the queries' inputs.
            yq: the queries' targets; an example without one is x alone.
            store: as for on_loss.
        """
        queries = self.encoder.examples(Xq, yq)
        objective = routes.probe(self.objective.measuring(measure), queries.batch(queries.spread(_PROBE)))
        return self._removal_scores(objective, queries, store)

    def damping_path(self, Xq: Queries, yq: Any = None, *, dampings: Iterable[float] | None = None) -> DampingPath:
        """`on_loss` at many dampings, from one factorisation: how much do the values depend on λ?

        For curvatures that know their eigenvalues, and for Cholesky, the eigenvectors are computed once and only
        1/(x + λ) changes; CG keeps its preconditioner's eigenvectors and starts each λ from the solutions before it.

        Cost: m times q systems without their preparation; one sweep for as many dampings as fit in memory, of m·q
        vectors together; 8·m·q·n bytes.

        Args:
            Xq: the queries' inputs (or Examples, or a Dataset).
            yq: the queries' targets.
            dampings: the λ; None takes nine, from a thousandth of C's mean eigenvalue to ten times it.

        Raises:
            InvalidInput: if a damping is no finite number ≥ 0; SolverError if C + λI is not positive at one.
        """
        queries = self._with_targets(self.encoder.examples(Xq, yq))
        return path_of(self, queries, None if dampings is None else list(dampings))

    def of_self(self, rows: Rows = None) -> SelfScores:
        """Each row's removal, measured on its own loss: (wᵢ/n) ∇L(zᵢ)ᵀ (C + λI)⁻¹ ∇L(zᵢ).

        Cost: p² flops per row with a factorised solver, no n × p numbers; otherwise one linear system per row. When
        `solver` was left to `defaults` and many rows are asked for, a factorisation that costs less is used for them;
        the certificate names it, and its residual is measured on 32 of the rows.

        Args:
            rows: the training rows; None means all.
        """
        rows = self.examples.rows(rows)
        solver, prepared = self._bound.for_many(len(rows))
        scores = selfscores.self_scores(self, rows, prepared, lambda V: scoring.solved(prepared, V, repr(solver)))
        return replace(scores, certificate=replace(scores.certificate, solver=repr(solver)))

    def of_replacing(self, rows: Rows, X_new: Any, y_new: Any = None, *, on: On) -> Scores:
        """Equation 3: the change of each query's loss if training row i becomes the new example, at its weight.

        values[q, i] = (wᵢ/n) · I_pert,loss, with I_pert,loss = −∇L(z_q)ᵀ (C + λI)⁻¹ (∇L(z_new) − ∇L(zᵢ)).

        Args:
            rows: r training rows.
            X_new: r new inputs, one for each of them.
            y_new: r new targets.
            on: (Xq, yq), the queries.
        """
        rows = self.examples.rows(rows)
        return self._replacing(rows, self._new(rows, X_new, y_new), "row replaced", on)

    def of_relabeling(self, rows: Rows, y_new: Any, *, on: On) -> Scores:
        """The change of each query's loss if training row i had the label y_new[i] instead; equation 3 with the same x.

        Args:
            rows: r training rows.
            y_new: r new labels.
            on: (Xq, yq), the queries.

        Raises:
            InvalidInput: if the number of labels is wrong, or examples have no label.
        """
        rows = self.examples.rows(rows)
        return self._replacing(rows, self.examples.relabelled(rows, self.encoder.targets(y_new)), "row relabelled", on)

    def of_perturbing(self, rows: Rows, *, on: On) -> Float[NDArray[np.float64], "q r ..."]:
        """Equation 5: the gradient of each query's loss with respect to the input of each training row.

        out[q, i] = −(wᵢ/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇ₓ∇L(zᵢ), shape (q, r, *x); the paper's I_pert,loss times wᵢ/n, so that
        moving x by a small δ changes the query's loss by out · δ. For a Pipeline x is what the final estimator sees;
        `feature_names` names its columns.

        Args:
            rows: r training rows.
            on: (Xq, yq), the queries.

        Raises:
            UnsupportedModel: if the objective's inputs are not the user's, as for kernels.
        """
        rows = self.examples.rows(rows)
        movable = self.encoder.movable(rows)
        S = self._solve(self._query_gradients(self.objective, self.queries(on))).x

        def fields(batch: Any, w: Tensor) -> Tensor:
            gradient = calculus.input_gradients(self.objective, batch, S).double().cpu().movedim(0, 1)  # (b, q, *x)
            return gradient * w.reshape(-1, *[1] * (gradient.ndim - 1))

        moved = self.sweep.emit(fields, vectors=len(S), rows=rows, label="perturb")
        return movable.widened(np.moveaxis(-moved / self.n, 0, 1))

    def of_adding(self, X_new: Any, y_new: Any = None, *, on: On) -> Scores:
        """The change of each query's loss if a new example joined the training set with weight 1 (ε = +1/n).

        values[q, j] = −(1/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇L(z_new); a negative value means that the example would help. With
        class weights, or Examples that have weights of their own, ε is the example's weight over n.

        Args:
            X_new: new inputs.
            y_new: new targets.
            on: (Xq, yq), the queries.
        """
        self.encoder.check_new(X_new)
        new = self._with_targets(self.encoder.examples(X_new, y_new))
        queries = self.queries(on)
        solution = self._solve(self._query_gradients(self.objective, queries))
        scale = self.class_weights(new) * new.sample_weight / self.n
        G = scoring.gradients(self.sweep.over(self.objective, new)) + self.penalty_share
        changes = scoring.with_gradients(solution, G).scaled(-scale)
        return self._scores(solution, changes, scale, np.arange(len(new)), "example added", queries)

    def of_groups(self, groups: Groups, *, on: On) -> Scores:
        """The change of each query's loss if a whole group of rows is removed, to first order: the sum over members.

        Args:
            groups: lists of training rows, or a dict of them; column g of the result is group g in that order.
            on: (Xq, yq), the queries.
        """
        members = self.examples.groups(groups)
        union = np.unique(np.concatenate(members))
        queries = self.queries(on)
        solution = self._solve(self._query_gradients(self.objective, queries))
        single = scoring.with_rows(self, solution, self.penalty_share, rows=union)
        changes = single.scaled(self.examples.weights[union] / self.n).grouped(
            [np.searchsorted(union, group) for group in members]
        )
        scale = np.full(len(members), -1 / self.n)
        return self._scores(solution, changes, scale, np.arange(len(members)), "group removed", queries)

    def of_removing(self, groups: Groups, *, on: On) -> Scores:
        """The change of each query's loss if rows are removed, by the removal's own Newton step (leverage corrected).

        θ moves by (C + λI − (1/n) Σ_group wᵢ∇²Lᵢ)⁻¹ (1/n) Σ_group wᵢ∇Lᵢ and the query's loss is evaluated there, so for
        squared loss and fixed penalty this IS leave-one-out. `error` estimates what a further Newton step would add.
        Needs a linear predictor, and C the Hessian.

        Cost: K linear systems per removed row and one sweep for 64 groups together; for a group of more than 1,000/K
        rows a few products with the curvature without it instead, whatever its size.

        Args:
            groups: training rows, or lists of rows removed together; one column for each.
            on: (Xq, yq), the queries.

        Raises:
            UnsupportedModel: if the model has no linear predictor, the curvature is not its Hessian, or the solver is
                stochastic.
            NotPositiveDefinite: if what is left does not determine the fit.
        """
        if self.objective.linear is None or not isinstance(self._bound.exact_curvature, Hessian | GaussNewton):
            message = (
                f"of_removing updates the exact Hessian of a linear predictor, and this is {self.objective.name} with "
                f"{self.curvature}. Use on_loss or of_groups (first order), or leave_one_out to retrain."
            )
            raise UnsupportedModel(message)
        members = self.examples.groups(groups)
        queries = self.queries(on)
        solution = self._solve(self._query_gradients(self.objective, queries))
        if solution.replicas is not None:
            message = f"of_removing needs exact solutions, and {self.solver} gives estimates. Use Cholesky() or CG()."
            raise UnsupportedModel(message)
        system = removal.System(self.operator, self.damping, self.prepared, self._solve)
        step = removal.newton_steps(self.objective, self.sweep, system, members, self.risk_gradient)
        single = all(len(group) == 1 for group in members)
        reported = self.objective.reporting()
        changes = removal.changes(reported, queries, step.theta_change)
        further = removal.changes(reported, queries, step.theta_change + step.next_step)
        return Scores(
            changes,
            "row removed, Newton step" if single else "group removed, Newton step",
            np.array([group[0] for group in members]) if single else np.arange(len(members)),
            self.n,
            scoring.certificate(self, solution),
            measure=self.objective.measure,
            query_values=scoring.measures(self.sweep.over(self.objective, queries)),
            error=further - changes,
        )

    def check(self, on: On | None = None) -> Report:
        """Whether the theory's assumptions hold here: gradient, curvature, residuals, coverage, drift.

        Never raises for what it finds; a solve that fails is part of the report.

        Args:
            on: (Xq, yq) queries to measure the drift on; None uses a few training rows.
        """
        return examine(self, self.examples.batch(slice(0, 8)) if on is None else self.queries(on).batch(slice(0, 64)))

    def summary_frame(self) -> Any:
        """Leverage, Cook's distance, DFFITS, DFBETAS and residuals of every row of a GLM, a pandas DataFrame with one
        line per training row; columns, formulas, cost and errors as in `upweight.diagnostics.summary_frame`.
        """
        from upweight import diagnostics

        return diagnostics.summary_frame(self)

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def queries(self, on: Any) -> Examples:
        """The queries of a question: (Xq, yq), Examples, or (Dataset,), as examples that have targets.

        Raises:
            InvalidInput: if `on` is something else.
        """
        if isinstance(on, Examples):
            return self._with_targets(self.encoder.examples(on))
        if isinstance(on, tuple) and 1 <= len(on) <= 2:
            return self._with_targets(self.encoder.examples(*on))
        kind = f"{len(on)} things" if isinstance(on, tuple) else f"a {type(on).__name__}"
        message = f"on is {kind}. Pass the pair on=(Xq, yq), or upweight.Examples."
        raise InvalidInput(message)

    def _with_targets(self, queries: Examples) -> Examples:
        """The same examples.

        Raises:
            InvalidInput: if they have no targets, and the training rows have.
        """
        if self.examples.y is not None and queries.y is None and queries.x is not None:
            message = (
                f"These {len(queries)} examples have no y, and the training rows have one, so their loss is not "
                "defined. Pass the pair (X, y)."
            )
            raise InvalidInput(message)
        return queries

    def class_weights(self, examples: Examples) -> NDArray[np.float64]:
        """The part of wᵢ that belongs to the label of each example."""
        return np.ones(len(examples)) if examples.y is None else self.encoder.class_weights(as_tensor(examples.y))

    def _new(self, rows: NDArray[np.int64], X: Any, y: Any) -> Examples:
        self.encoder.check_new(X)
        new = self._with_targets(self.encoder.examples(X, y))
        if len(new) != len(rows):
            message = (
                f"{len(rows)} rows are to be replaced by {len(new)} new examples. Pass one new example for each row."
            )
            raise InvalidInput(message)
        return new

    # ---- inner steps -------------------------------------------------------------------------------------------------

    def _solve(self, V: Tensor) -> Solution:
        return self._bound.solve(V)

    def _query_gradients(self, objective: Objective, queries: Examples) -> Tensor:
        return scoring.gradients(self.sweep.over(objective, queries))

    def _removal_scores(self, objective: Objective, queries: Examples, store: Any) -> Scores:
        pairwise = pairs.comparing(objective, self.prepared) if store is None else None
        size = max(1, _BLOCK_NUMBERS // (self.objective.size if pairwise is None else self.n))
        if store is None and len(queries) > size:
            return Scores.joined([self._removal_scores(objective, block, None) for block in queries.blocks(size)])
        weights = self.examples.weights / self.n
        if pairwise is not None:
            changes, known = pairs.products(self, queries, pairwise, self._solve)
            return self._scores(known, changes.scaled(weights), -weights, np.arange(self.n), "row removed", queries)
        solution = self._solve(self._query_gradients(objective, queries))
        folder = None if store is None else Store(store, identity.fingerprint(self, queries, objective.name))
        if folder is not None:
            solution = identity.compared(self, folder, solution)
        changes = scoring.with_rows(self, solution, self.penalty_share, store=folder).scaled(weights)
        return self._scores(solution, changes, -weights, np.arange(self.n), "row removed", queries, objective)

    def _replacing(self, rows: NDArray[np.int64], new: Examples, counterfactual: str, on: On) -> Scores:
        queries = self.queries(on)
        solution = self._solve(self._query_gradients(self.objective, queries))
        difference = scoring.replacement(self, rows, new)
        changes = scoring.with_gradients(solution, difference / -self.n)
        return self._scores(solution, changes, self.examples.weights[rows] / self.n, rows, counterfactual, queries)

    def _scores(
        self,
        solution: Solution | Certificate,
        changes: Products,
        scale: NDArray[np.float64],
        columns: NDArray[np.int64],
        counterfactual: str,
        queries: Examples,
        measured: Objective | None = None,
    ) -> Scores:
        measured = measured or self.objective
        return Scores(
            changes.mean,
            counterfactual,
            columns,
            self.n,
            solution if isinstance(solution, Certificate) else scoring.certificate(self, solution),
            scale,
            self.objective.measure if measured is self.objective else measured.name,
            scoring.measures(self.sweep.over(measured, queries)),
            changes.standard_error(),
        )
