"""Influence: which training data made the model say that, and what would it say without them?

With C the curvature, λ the damping, n training rows of weights wᵢ, and f the measure of a query (its loss by default):

    S_q = (C + λI)⁻¹ ∇f(query)                       one linear system per query, shared by all rows
    values[q, i] = (wᵢ/n) S_q · ∇L(zᵢ)               change of f(query) if row i is removed (to first order)

With `penalty_per_example` the row's gradient is ∇L(zᵢ) + (n/Σw)∇r, for the row takes its share of r along.
Reference: Koh & Liang (2017), equations 1 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight import calculus, defaults, removal
from upweight.checks import Report, examine
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.examples import Examples, as_array
from upweight.objective import Objective
from upweight.operators import Curvature, Operator
from upweight.scores import Certificate, Scores, SelfScores
from upweight.solvers import Prepared, Solution, Solver
from upweight.solvers.base import checked_damping
from upweight.store import Store
from upweight.sweep import Sweep
from upweight.trees import batch_length

Rows = Any
Queries = Any
_PROBE = 3
_SELF_BLOCK = 256


@runtime_checkable
class Encoder(Protocol):
    """How queries and new labels become examples: what the adapters know about an estimator's inputs."""

    def examples(self, X: Any, y: Any = None) -> Examples:
        """X and y as the training examples were made."""
        ...

    def targets(self, y: Any) -> Tensor:
        """Labels as the training targets were made."""
        ...

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """The factor in wᵢ that depends on an encoded target; ones if there is none."""
        ...


class PlainEncoder:
    """Inputs and targets are used as they are."""

    def examples(self, X: Any, y: Any = None) -> Examples:
        """X and y as examples."""
        return X if isinstance(X, Examples) else Examples(X, y)

    def targets(self, y: Any) -> Tensor:
        """y as a tensor."""
        return torch.as_tensor(np.array(as_array(y, "y_new")) if not isinstance(y, Tensor) else y)

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """Ones."""
        return np.ones(len(y))


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

    >>> X = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    >>> y = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
    >>> def loss(theta, example):
    ...     return (theta @ example[0] - example[1]) ** 2
    >>> fit = Objective(loss, torch.tensor([1.2], dtype=torch.float64))
    >>> Influence(fit, (X, y)).on_loss(X[:1] + 1, y[:1] + 1).values.round(4)
    array([[-0.    ,  0.064 , -0.064 ]])
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
        if not isinstance(examples, Examples):
            examples = Examples(*examples) if isinstance(examples, tuple) else Examples(examples)
        _check_specification(curvature, "bind", "curvature", "operators.Hessian()")
        _check_specification(solver, "prepare", "solver", "solvers.CG()")
        probe = examples.batch(np.arange(min(_PROBE, len(examples))))
        self.objective = calculus.probe(objective, probe)
        self.examples = examples
        self.sweep = Sweep(
            self.objective, examples, batch_size, progress, defaults.example_bytes(self.objective, probe)
        )
        self.curvature = curvature or defaults.curvature(objective)
        self.solver = solver or defaults.solver(objective)
        self.encoder: Encoder = encoder or PlainEncoder()
        self._damping = None if damping is None else checked_damping(damping)
        self._operator: Operator | None = None
        self._prepared: Prepared | None = None
        self._risk_gradient: Tensor | None = None

    def __repr__(self) -> str:
        damping = "chosen when first needed" if self._damping is None else f"{self._damping:.4g}"
        return (
            f"Influence({self.objective.name}: n={self.n}, p={self.objective.size}, curvature={self.curvature}, "
            f"solver={self.solver}, damping={damping}, "
            f"penalty={self.objective.penalty}, penalty_per_example={self.objective.folded}, "
            f"autograd={self.objective.route})"
        )

    # ---- what is prepared once ------------------------------------------------------------

    @property
    def n(self) -> int:
        """The number of training rows."""
        return len(self.examples)

    @property
    def operator(self) -> Operator:
        """The curvature, bound to the objective and the data."""
        if self._operator is None:
            self._operator = self.curvature.bind(self.sweep)
        return self._operator

    @property
    def damping(self) -> float:
        """The λ that acts."""
        if self._damping is None:
            self._damping = defaults.damping(self.objective, self.curvature, self.operator)
        return self._damping

    @property
    def prepared(self) -> Prepared:
        """The solver, ready for right-hand sides."""
        if self._prepared is None:
            self._prepared = self.solver.prepare(self.operator, self.damping)
        return self._prepared

    @property
    def risk_gradient(self) -> Float[Tensor, " p"]:
        """∇R(θ̂), which is 0 at a minimum.  Cost: one sweep, once."""
        if self._risk_gradient is None:
            total = self.sweep.fold(lambda batch, w: calculus.pull(self.objective, batch, w[None]), label="gradient")[0]
            self._risk_gradient = total / self.n + calculus.penalty_gradient(self.objective)
        return self._risk_gradient

    # ---- effects on the parameters ----------------------------------------------------------------------
    def on_params(self, rows: Rows = None) -> Float[NDArray[np.float64], "k p"]:
        """Equation 1: I_up,params(z) = dθ̂/dε = −(C + λI)⁻¹ ∇L(z) for each row, when its weight grows by ε.

        Removing row i moves θ̂ by about −(wᵢ/n) times its line. Parameters are in the order of `objective.blocks`.

        Raises:
            RowOutOfRange: if a row does not exist.
        """
        rows = self.examples.rows(rows)
        G = self._row_gradients(self.examples, rows)
        return -self._solve(G).x.numpy()

    def on_params_of_replacing(self, rows: Rows, X_new: Any, y_new: Any = None) -> Float[NDArray[np.float64], "k p"]:
        """Equation 3: dθ̂/dε = −(C + λI)⁻¹ (∇L(z_new) − ∇L(z)), when weight ε moves from each row to its new example."""
        rows = self.examples.rows(rows)
        _, difference, weights = self._replacement(rows, self._new(rows, X_new, y_new).batch(slice(None)))
        return -self._solve(difference / torch.from_numpy(np.where(weights == 0, 1, weights))[:, None]).x.numpy()

    def on_params_of_perturbing(self, rows: Rows, deltas: Any) -> Float[NDArray[np.float64], "k p"]:
        """Equation 4: dθ̂/dε ≈ −(C + λI)⁻¹ [∇ₓ∇L(z)] δ, when weight ε moves from each row to x + δ.

        Args:
            rows: k training rows.
            deltas: (k, *x) one small change of the input per row.

        Raises:
            InvalidInput: if deltas do not have the shape of the rows' inputs.
        """
        rows = self.examples.rows(rows)
        moves = torch.as_tensor(np.asarray(deltas, dtype=np.float64))
        eye = torch.eye(self.objective.size, dtype=torch.float64)
        lines = []
        for row, move in zip(rows, moves, strict=False):
            mixed = calculus.input_gradients(self.objective, self.examples.batch([int(row)]), eye)[:, 0].double().cpu()
            if len(moves) != len(rows) or move.shape != mixed.shape[1:]:
                message = (
                    f"deltas has shape {tuple(moves.shape)}; {len(rows)} rows of inputs of shape "
                    f"{tuple(mixed.shape[1:])} need {(len(rows), *mixed.shape[1:])}."
                )
                raise InvalidInput(message)
            lines.append(mixed.flatten(1) @ move.flatten())
        return -self._solve(torch.stack(lines)).x.numpy()

    # ---- effects on queries ----------------------------------------------------------------------

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
        queries = self._queries(Xq, yq)
        return self._removal_scores(self.objective, queries, "loss", store)

    def on_measure(
        self, measure: Callable[[Any, Any], Tensor], Xq: Queries, yq: Any = None, *, store: Any = None
    ) -> Scores:
        """As on_loss, for any scalar `measure(params, example)` of a query: a margin, log-odds, a probability.

        Args:
            measure: differentiable, of `objective.params` and one example, like a loss.
            Xq: the queries' inputs.
            yq: the queries' targets; an example without one is x alone.
            store: as for on_loss.
        """
        queries = self._queries(Xq, yq)
        objective = calculus.probe(
            self.objective.measuring(measure), queries.batch(np.arange(min(_PROBE, len(queries))))
        )
        return self._removal_scores(objective, queries, objective.name, store)

    def of_self(self, rows: Rows = None) -> SelfScores:
        """Each row's removal, measured on its own loss: (wᵢ/n) ∇L(zᵢ)ᵀ (C + λI)⁻¹ ∇L(zᵢ).

        Cost: one linear system per row; cheap for direct solvers, one block of CG per 256 rows otherwise.

        Args:
            rows: the training rows; None means all.
        """
        rows = self.examples.rows(rows)
        shared = self._shared_penalty()
        values, residual, converged, sweeps, bottom = np.empty(len(rows)), [], True, 0, np.inf
        for start in range(0, len(rows), _SELF_BLOCK):
            block = rows[start : start + _SELF_BLOCK]
            G = torch.from_numpy(
                self.sweep.emit(
                    lambda batch, _: calculus.gradients(self.objective, batch),
                    vectors=self._wide(),
                    rows=block,
                    label="self",
                )
            )
            solution = self._solve(G + shared)
            values[start : start + len(block)] = (G * solution.x).sum(1).numpy()
            residual.append(solution.residual)
            converged, sweeps = converged and solution.converged, sweeps + solution.sweeps
            bottom = min(bottom, solution.min_curvature)
        scale = -self.examples.weights[rows] / self.n
        whole = Solution(torch.empty(0), torch.cat(residual), converged, sweeps, bottom, truncation=solution.truncation)
        return SelfScores(-scale * values, rows, self.n, self._certificate(whole, np.full(len(rows), np.nan)), scale)

    def of_replacing(self, rows: Rows, X_new: Any, y_new: Any = None, *, on: tuple[Any, ...]) -> Scores:
        """Equation 3: the change of each query's loss if training row i becomes the new example, at its weight.

        values[q, i] = (wᵢ/n) · I_pert,loss, with I_pert,loss = −∇L(z_q)ᵀ (C + λI)⁻¹ (∇L(z_new) − ∇L(zᵢ)).

        Args:
            rows: r training rows.
            X_new: r new inputs, one for each of them.
            y_new: r new targets.
            on: (Xq, yq), the queries.
        """
        rows = self.examples.rows(rows)
        return self._replacing(rows, self._new(rows, X_new, y_new).batch(slice(None)), "row replaced", on)

    def of_relabeling(self, rows: Rows, y_new: Any, *, on: tuple[Any, ...]) -> Scores:
        """The change of each query's loss if training row i had the label y_new[i] instead; equation 3 with the same x.

        Args:
            rows: r training rows.
            y_new: r new labels.
            on: (Xq, yq), the queries.

        Raises:
            InvalidInput: if the number of labels is wrong, or examples have no label.
        """
        rows = self.examples.rows(rows)
        batch = self.examples.batch(rows)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            message = (
                "These examples are not (x, y) pairs, so there is no label to change. Use of_replacing with whole "
                "new examples."
            )
            raise InvalidInput(message)
        targets = self.encoder.targets(y_new)
        if targets.shape != batch[1].shape:
            message = (
                f"y_new has shape {tuple(targets.shape)}, and the labels of {len(rows)} rows have "
                f"{tuple(batch[1].shape)}. Pass one new label per row."
            )
            raise InvalidInput(message)
        return self._replacing(rows, (batch[0], targets.to(batch[1].dtype)), "row relabelled", on)

    def of_perturbing(self, rows: Rows, *, on: tuple[Any, ...]) -> Float[NDArray[np.float64], "q r ..."]:
        """Equation 5: the gradient of each query's loss with respect to the input of each training row.

        out[q, i] = −(wᵢ/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇ₓ∇L(zᵢ), shape (q, r, *x); the paper's I_pert,loss times wᵢ/n, so that
        moving x by a small δ changes the query's loss by out · δ. For a Pipeline x is what the final estimator sees.

        Args:
            rows: r training rows.
            on: (Xq, yq), the queries.
        """
        rows = self.examples.rows(rows)
        S = self._solve(self._gradients(self.objective, self._queries(*on))).x
        out = self.sweep.emit(
            lambda batch, w: (
                calculus.input_gradients(self.objective, batch, S).double().cpu().movedim(0, 1)
                * w.reshape(-1, *[1] * (_input_axes(batch) + 1))
            ),
            vectors=len(S),
            rows=rows,
            label="perturb",
        )
        return np.moveaxis(-out / self.n, 0, 1)

    def of_adding(self, X_new: Any, y_new: Any = None, *, on: tuple[Any, ...]) -> Scores:
        """The change of each query's loss if a new example joined the training set with weight 1 (ε = +1/n).

        values[q, j] = −(1/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇L(z_new); a negative value means that the example would help.

        Args:
            X_new: new inputs.
            y_new: new targets.
            on: (Xq, yq), the queries.
        """
        new = self._queries(X_new, y_new)
        queries = self._queries(*on)
        solution = self._solve(self._gradients(self.objective, queries))
        weights = self._class_weights(new.batch(slice(None)))
        G = self._row_gradients(new, np.arange(len(new)))
        return self._scores(
            solution,
            G.numpy() @ solution.x.numpy().T,
            weights / self.n,
            np.arange(len(new)),
            "example added",
            queries,
            G=G,
        )

    def of_groups(self, groups: Sequence[Rows] | Mapping[Any, Rows], *, on: tuple[Any, ...]) -> Scores:
        """The change of each query's loss if a whole group of rows is removed, to first order: the sum over members.

        Args:
            groups: lists of training rows, or a dict of them; column g of the result is group g in that order.
            on: (Xq, yq), the queries.
        """
        members = self._groups(groups)
        union = np.unique(np.concatenate(members))
        queries = self._queries(*on)
        single = self._removal_scores(self.objective, queries, "loss", None, union)

        def summed(values: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
            return (
                None
                if values is None
                else np.stack([values[:, np.searchsorted(union, group)].sum(1) for group in members], 1)
            )

        values = summed(single.values)
        assert values is not None
        n_groups = len(members)
        return Scores(
            values,
            "group removed",
            np.arange(n_groups),
            self.n,
            single.certificate,
            np.full(n_groups, -1 / self.n),
            "loss",
            single.query_values,
        )

    def of_removing(self, groups: Sequence[Rows], *, on: tuple[Any, ...]) -> Scores:
        """The change of each query's loss if rows are removed, by the removal's own Newton step (leverage corrected).

        θ moves by (C + λI − (1/n) Σ_group wᵢ∇²Lᵢ)⁻¹ (1/n) Σ_group wᵢ∇Lᵢ and the query's loss is evaluated there, so for
        squared loss and fixed penalty this IS leave-one-out. `error` estimates what a further Newton step would add.
        Needs a linear predictor, and C the Hessian.

        Cost: K linear systems per removed row and one sweep for all groups together.

        Args:
            groups: training rows, or lists of rows removed together; one column for each.
            on: (Xq, yq), the queries.

        Raises:
            UnsupportedModel: if the model has no linear predictor, or the curvature is not its Hessian.
        """
        if self.objective.linear is None or type(self.curvature).__name__ not in {"Hessian", "GaussNewton", "Dense"}:
            message = (
                f"of_removing updates the exact Hessian of a linear predictor, and this is {self.objective.name} "
                f"with {self.curvature}. "
                "Use on_loss or of_groups (first order), or leave_one_out to retrain."
            )
            raise UnsupportedModel(message)
        members = self._groups(groups)
        queries = self._queries(*on)
        gradients = self._gradients(self.objective, queries)
        solution = self._solve(gradients)
        step = removal.newton_steps(self.objective, self.sweep, self._solve, members, self.risk_gradient)
        values = removal.changes(self.objective, queries, step.theta_change)
        error = -(solution.x @ step.remaining_gradient.T).numpy()
        columns = (
            np.array([group[0] for group in members])
            if all(len(group) == 1 for group in members)
            else np.arange(len(members))
        )
        certificate = self._certificate(solution, -(solution.x @ self.risk_gradient).numpy())
        now = self._query_values(self.objective, queries)
        return Scores(values, "row removed, Newton step", columns, self.n, certificate, None, "loss", now, error=error)

    def check(self, on: tuple[Any, ...] | None = None) -> Report:
        """Whether the theory's assumptions hold here: gradient, curvature, residuals, coverage, drift.

        Never raises for what it finds; a solve that fails is part of the report.

        Args:
            on: (Xq, yq) queries to measure the drift on; None uses a few training rows.
        """
        queries = (
            self.examples.batch(np.arange(min(8, self.n))) if on is None else self._queries(*on).batch(slice(0, 64))
        )
        return examine(self, queries)

    # ---- inner steps ----------------------------------------------------------------------
    def _queries(self, X: Any, y: Any = None) -> Examples:
        return self.encoder.examples(X, y)

    def _new(self, rows: NDArray[np.int64], X: Any, y: Any) -> Examples:
        new = self._queries(X, y)
        if len(new) != len(rows):
            message = (
                f"{len(rows)} rows are to be replaced by {len(new)} new examples. Pass one new example for each row."
            )
            raise InvalidInput(message)
        return new

    def _groups(self, groups: Any) -> list[NDArray[np.int64]]:
        listed = (
            list(groups.values())
            if isinstance(groups, Mapping)
            else list(groups)
            if isinstance(groups, Iterable)
            else [groups]
        )
        if not listed:
            message = "groups is empty. Pass a list of rows, or a list of lists of rows."
            raise InvalidInput(message)
        members = [self.examples.rows(group) for group in listed]
        for number, group in enumerate(members):
            if len(np.unique(group)) < len(group):
                message = (
                    f"Group {number} names a row twice; a row can be removed only once. Use np.unique on the group."
                )
                raise InvalidInput(message)
        return members

    def _solve(self, V: Tensor) -> Solution:
        return self.prepared.solve(V)

    def _wide(self) -> int:
        """How many vectors' memory a row of p gradients is worth."""
        return 1 + 16 * self.objective.size // self.sweep.example_bytes

    def _shared_penalty(self) -> Tensor:
        """(n/Σw) ∇r when a row takes its share of the penalty along, else 0: what is added to ∇L(zᵢ)."""
        if not self.objective.folded:
            return torch.zeros(self.objective.size, dtype=torch.float64)
        return calculus.penalty_gradient(self.objective) * (self.n / self.examples.weights.sum())

    def _gradients(self, objective: Objective, queries: Examples) -> Tensor:
        """(q, p) gradients of the measure, without penalty."""
        sweep = Sweep(objective, queries, self.sweep.batch_size, self.sweep.progress, self.sweep.example_bytes)
        return torch.from_numpy(
            sweep.emit(
                lambda batch, _: calculus.gradients(objective, batch), vectors=self._wide(), label="query gradients"
            )
        )

    def _row_gradients(self, examples: Examples, rows: NDArray[np.int64]) -> Tensor:
        """(k, p) gradients of training rows or new examples, with the penalty's share."""
        sweep = Sweep(self.objective, examples, self.sweep.batch_size, self.sweep.progress, self.sweep.example_bytes)
        G = sweep.emit(
            lambda batch, _: calculus.gradients(self.objective, batch),
            vectors=self._wide(),
            rows=rows,
            label="row gradients",
        )
        return torch.from_numpy(G) + self._shared_penalty()

    def _query_values(self, objective: Objective, queries: Examples) -> NDArray[np.float64]:
        sweep = Sweep(objective, queries, self.sweep.batch_size, self.sweep.progress, self.sweep.example_bytes)
        return sweep.emit(lambda batch, _: calculus.losses(objective, batch), label="query measures")

    def _products(self, S: Tensor, rows: NDArray[np.int64] | None, store: Store | None = None) -> NDArray[np.float64]:
        """(r, k): the gradients of rows, with the penalty's share, times every vector of S."""
        constant = S @ self._shared_penalty()
        return self.sweep.emit(
            lambda batch, _: calculus.dots(self.objective, batch, S).double().cpu() + constant,
            vectors=len(S),
            rows=rows,
            store=store,
            label="scores",
        )

    def _removal_scores(
        self, objective: Objective, queries: Examples, measure: str, store: Any, rows: NDArray[np.int64] | None = None
    ) -> Scores:
        solution = self._solve(self._gradients(objective, queries))
        kept = (
            None
            if store is None
            else Store(store, self.fingerprint() | {"queries": queries.fingerprint(), "measure": measure})
        )
        products = self._products(solution.x, rows, kept)
        columns = self.examples.rows(rows)
        return self._scores(
            solution,
            products,
            -self.examples.weights[columns] / self.n,
            columns,
            "row removed",
            queries,
            objective,
            rows=rows,
        )

    def _scores(
        self,
        solution: Solution,
        products: NDArray[np.float64],
        scale: NDArray[np.float64],
        columns: NDArray[np.int64],
        counterfactual: str,
        queries: Examples,
        objective: Objective | None = None,
        *,
        rows: NDArray[np.int64] | None = None,
        G: Tensor | None = None,
    ) -> Scores:
        """Scores from (r, q) products S·gradient; derivative = −products and values = scale · derivative."""
        measured = objective or self.objective
        values = products.T * -scale
        error = None
        if solution.replicas is not None and len(solution.replicas) > 1:
            replicas = solution.replicas  # (m, q, p)
            flat = replicas.flatten(0, 1)
            every = flat @ G.T if G is not None else torch.from_numpy(self._products(flat, rows)).T  # (m q, r)
            spread = every.reshape(len(replicas), -1, len(columns)).std(0).numpy() / np.sqrt(len(replicas))
            error = spread * np.abs(scale)
        drift = -(solution.x @ self.risk_gradient).numpy()
        return Scores(
            values,
            counterfactual,
            columns,
            self.n,
            self._certificate(solution, drift),
            scale,
            "loss" if objective in (None, self.objective) else measured.name,
            self._query_values(measured, queries),
            error,
        )

    def _certificate(self, solution: Solution, drift: NDArray[np.float64]) -> Certificate:
        return Certificate(
            residual=solution.residual.numpy(),
            converged=solution.converged,
            damping=self.damping,
            gradient_norm=float(self.risk_gradient.norm()),
            min_curvature=solution.min_curvature,
            coverage=self.objective.coverage,
            drift=drift,
            curvature=repr(self.curvature),
            solver=repr(self.solver),
            sweeps=solution.sweeps,
            truncation=solution.truncation,
        )

    def _replacing(self, rows: NDArray[np.int64], new: Any, counterfactual: str, on: tuple[Any, ...]) -> Scores:
        queries = self._queries(*on)
        solution = self._solve(self._gradients(self.objective, queries))
        scale, difference, weights = self._replacement(rows, new)
        nonzero = np.where(weights == 0, 1, weights)
        per_weight = difference / torch.from_numpy(nonzero)[:, None]
        return self._scores(
            solution,
            (per_weight @ solution.x.T).numpy(),
            np.where(weights == 0, 1 / self.n, scale),
            rows,
            counterfactual,
            queries,
            G=per_weight,
        )

    def _replacement(
        self, rows: NDArray[np.int64], new: Any
    ) -> tuple[NDArray[np.float64], Tensor, NDArray[np.float64]]:
        """wᵢ/n, the change w_new ∇L(z_new) − wᵢ ∇L(zᵢ) of n·∇R, and wᵢ; a new label brings its own class weight."""
        old = self.examples.batch(rows)
        weights = self.examples.weights[rows]
        was, becomes = self._class_weights(old), self._class_weights(new)
        new_weights = weights * np.divide(becomes, was, out=np.ones_like(was), where=was != 0)
        gradient = calculus.gradients
        difference = gradient(self.objective, new).double().cpu() * torch.from_numpy(new_weights)[:, None]
        difference = difference - gradient(self.objective, old).double().cpu() * torch.from_numpy(weights)[:, None]
        if self.objective.folded:
            difference = difference + torch.from_numpy(new_weights - weights)[:, None] * self._shared_penalty()
        return weights / self.n, difference, weights

    def _class_weights(self, batch: Any) -> NDArray[np.float64]:
        if not isinstance(batch, tuple | list) or not isinstance(batch[-1], Tensor):
            return np.ones(batch_length(batch))
        return self.encoder.class_weights(batch[-1])

    def fingerprint(self) -> dict[str, Any]:
        """What these numbers depend on: θ̂, a probe of the data, n, curvature, solver, damping, versions."""
        import hashlib

        import upweight

        theta = hashlib.sha256(self.objective.theta.numpy().tobytes()).hexdigest()[:16]
        return {
            "theta": theta,
            "data": self.examples.fingerprint(),
            "n": self.n,
            "objective": self.objective.name,
            "penalty": f"{self.objective.penalty!r}, folded {self.objective.folded}",
            "curvature": repr(self.curvature),
            "solver": repr(self.solver),
            "damping": self.damping,
            "versions": f"upweight {upweight.__version__}, torch {torch.__version__}",
        }


def _check_specification(value: Any, method: str, name: str, example: str) -> None:
    if value is not None and (isinstance(value, type | str) or not hasattr(value, method)):
        message = f"{name}={value!r} is not a {name} specification. Pass an object such as {name}=uw.{example}."
        raise InvalidInput(message)


def _input_axes(batch: Any) -> int:
    x = batch[0] if isinstance(batch, tuple | list) else batch
    return len(x.shape) - 1
