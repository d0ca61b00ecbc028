"""Influence: which training data made the model say that, and what would it say without them?

With C the curvature, λ the damping, n training rows of weights wᵢ, and f the measure of a query (its loss by default):

    S_q = (C + λI)⁻¹ ∇f(query)                       one linear system per query, shared by all rows
    values[q, i] = (wᵢ/n) S_q · ∇L(zᵢ)               change of f(query) if row i is removed (to first order)

With `penalty_per_example` the row's gradient is ∇L(zᵢ) + (n/Σw)∇r, for the row takes its share of r along.
Reference: Koh & Liang (2017), equations 1 to 5.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.data.examples import Examples
from upweight.influence import (
    diagnostics,
    edits,
    groups as groups_of_rows,
    indexing,
    parameters,
    perturbation,
    removal,
    self_scores,
    streaming,
    tokens,
)
from upweight.influence.checks import Report, examine
from upweight.influence.damping_path import DampingPath, path_of
from upweight.influence.index import Index
from upweight.influence.leading import Leading
from upweight.influence.plan import Plan, plan_of
from upweight.influence.scores import Scores, SelfScores
from upweight.influence.system import System
from upweight.influence.tokens import TokenScores
from upweight.model.encoders import Encoder
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.operators import Curvature, Operator
from upweight.solvers import Prepared, Solver
from upweight.solvers.cg import Iteration

Rows = Any  # one row number, several, a mask of n booleans, or None for all
Queries = Any  # inputs, or Examples, or a Dataset
On = tuple[Any, ...] | list[Any] | Mapping[str, Any] | Examples
Groups = Iterable[Rows] | Mapping[Any, Rows]


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
        memory_budget: bytes, or words such as "2 GB", that may be taken beside data and model. It caps batches and what
            is kept between products, and a solver that needs more is not chosen; None leaves each part its own limit.
        encoder: how queries become examples; set by the adapters.
        ids: n different names of the rows, as for Examples; None takes those that the data bring along.

    Raises:
        InvalidInput: if a setting or the data cannot be used, or a solver needs more than the budget; NotDeterministic
            or UnsupportedModel if the loss cannot be.

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
        memory_budget: float | int | str | None = None,
        encoder: Encoder | None = None,
        ids: Any = None,
    ) -> None:
        self.settings = {"curvature": curvature, "solver": solver, "damping": damping}
        self.settings |= {"batch_size": batch_size, "progress": progress, "memory_budget": memory_budget}
        self.system = System.of(objective, examples, encoder=encoder, ids=ids, **self.settings)

    def __repr__(self) -> str:
        known = self.system.known_damping
        damping = "chosen when first needed" if known is None else f"{known:.4g}"
        return (
            f"Influence({self.objective.name}: n={self.n}, p={self.objective.size}, curvature={self.curvature}, "
            f"solver={self.solver}, damping={damping}, penalty={self.objective.penalty}, "
            f"penalty_per_example={self.objective.folded}, autograd={self.objective.autograd})"
        )

    def _repr_html_(self) -> str:
        """What is explained and how, for notebooks; nothing is computed for it."""
        known = self.system.known_damping
        folded = "goes with its row" if self.objective.folded else "stays when a row goes"
        pairs = [
            ("model", self.objective.name),
            ("rows", f"{self.n:,}"),
            ("parameters", f"{self.objective.size:,} ({self.objective.coverage:.1%} of the model)"),
            ("curvature", self.curvature),
            ("solver", self.solver),
            ("damping", "chosen when first needed" if known is None else f"{known:.4g}"),
            ("penalty", f"{self.objective.penalty}; {folded}"),
            ("autograd", self.objective.autograd),
        ]
        return markup.facts("Influence of training rows", pairs, note="Ask: on_loss(Xq, yq), of_self(), check().")

    # ---- what is prepared once ---------------------------------------------------------------------------------------

    @property
    def objective(self) -> Objective:
        """What was minimised, at θ̂."""
        return self.system.objective

    @property
    def examples(self) -> Examples:
        """The training rows."""
        return self.system.examples

    @property
    def sweep(self) -> Sweep:
        """The loop over the training rows."""
        return self.system.sweep

    @property
    def encoder(self) -> Encoder:
        """How queries and new labels become examples."""
        return self.system.encoder

    @property
    def n(self) -> int:
        """The number of training rows."""
        return self.system.n

    @property
    def feature_names(self) -> list[str] | None:
        """The names of `of_perturbing`'s columns, as a Pipeline or a DataFrame gave them; None if there are none."""
        return self.encoder.feature_names

    @property
    def curvature(self) -> Curvature:
        """The specification of C."""
        return self.system.curvature

    @property
    def solver(self) -> Solver:
        """The specification of how systems are solved."""
        return self.system.solver

    @property
    def operator(self) -> Operator:
        """The curvature, bound to the objective and the data."""
        return self.system.operator

    @property
    def damping(self) -> float:
        """The λ that acts."""
        return self.system.damping

    @property
    def prepared(self) -> Prepared:
        """The solver, ready for right-hand sides."""
        found = self.system.prepared
        return found.patiently() if isinstance(found, Iteration) and found.patience is not None else found

    @property
    def risk_gradient(self) -> Float[Tensor, " p"]:
        """∇R(θ̂), which is 0 at a minimum.  Cost: one sweep, once."""
        return self.system.risk_gradient

    @property
    def penalty_share(self) -> Float[Tensor, " p"]:
        """What a row's gradient carries of the penalty's: (n/Σw)∇r if removing a row removes its share, else 0."""
        return self.system.penalty_share

    # ---- effects on the parameters -----------------------------------------------------------------------------------

    def on_params(self, rows: Rows = None) -> Float[NDArray[np.float64], "k p"]:
        """Equation 1: I_up,params(z) = dθ̂/dε = −(C + λI)⁻¹ ∇L(z) for each row, when its weight grows by ε.

        Removing row i moves θ̂ by about −(wᵢ/n) times its line. Parameters are in the order of `objective.blocks`.

        Raises:
            RowOutOfRange: if a row does not exist.
        """
        return parameters.of_weighting(self.system, rows)

    def on_params_of_replacing(self, rows: Rows, X_new: Any, y_new: Any = None) -> Float[NDArray[np.float64], "k p"]:
        """Equation 3: dθ̂/dε = −(C + λI)⁻¹ (∇L(z_new) − ∇L(z)), when weight ε moves from each row to its new example."""
        return parameters.of_replacing(self.system, rows, X_new, y_new)

    def on_params_of_perturbing(self, rows: Rows, deltas: Any) -> Float[NDArray[np.float64], "k p"]:
        """Equation 4: dθ̂/dε ≈ −(C + λI)⁻¹ [∇ₓ∇L(z)] δ, when weight ε moves from each row to x + δ.

        Args:
            rows: k training rows.
            deltas: (k, *x) one small change of the input per row.

        Raises:
            InvalidInput: if deltas do not have the shape of the rows' inputs.
            UnsupportedModel: if the objective's inputs are not the user's, as for kernels.
        """
        return parameters.of_perturbing(self.system, rows, deltas)

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
        return removal.on_loss(self.system, Xq, yq, store)

    def on_loss_in_blocks(self, Xq: Queries, yq: Any = None, *, size: int = 256, store: Any = None) -> Iterator[Scores]:
        """Equation 2 (`on_loss`) for more queries than their scores fit in memory: Scores of `size` of them at a time.

        `upweight.extremes(blocks, k)` keeps the top rows of each, and `leading` needs no blocks; a store keeps
        everything. Memory: 8·size·(n + 4p) bytes for a block; twice that in a loop, which holds one while the next is
        made.

        Args:
            Xq: the queries' inputs.
            yq: the queries' targets.
            size: queries in a block.
            store: a folder that gets one folder `queries-…` per block, each resumed as for on_loss.

        Raises:
            InvalidInput: if size is not a positive whole number, or the queries do not fit the model.
        """
        return removal.on_loss_in_blocks(self.system, Xq, yq, size, store)

    def leading(
        self,
        Xq: Queries,
        yq: Any = None,
        *,
        k: int = 10,
        groups: Groups | None = None,
        measure: Callable[[Any, Any], Tensor] | None = None,
        store: Any = None,
    ) -> Leading:
        """The k rows that help and harm each query most, sums and a histogram over all rows, without queries × rows.

        `helpful(k)`, `harmful(k)` and `top(k)` say what those of `on_loss` say, bit for bit for up to 1,024 queries, or
        2²⁴/p (more are solved in blocks of so many); `by_group` and `by_class` are sums over rows, as of `of_groups`.

        Cost: one linear system per query, then one sweep for each block of queries. Memory: at most 130,000 + 100·k
        bytes for each query of a block, whatever the number of rows, and 5 for each row in a class or group. A store
        takes about as much on the disk.

        Args:
            Xq: the queries' inputs (or Examples, or a Dataset).
            yq: the queries' targets.
            k: rows to keep on either side.
            groups: groups of rows to add up, as for of_groups; `frame.groupby("source").indices` is such a dict.
            measure: any scalar of a query in place of its loss, as for on_measure.
            store: a folder where what is known of the rows that have passed by is kept every few seconds, so that the
                same call goes on there; that of `on_loss(Xq, yq, store=…)`, whose finished scores are read. Of more
                queries than one block one folder `queries-…` for each. None keeps nothing.

        Raises:
            InvalidInput: if k is larger than the number of rows, or the queries do not fit the model.
            UnsupportedModel: if the solver is stochastic, for whose values a standard error is needed.
            SolverError: if a system cannot be solved as promised.
        """
        return streaming.leading(self.system, Xq, yq, measure, k, groups, store)

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
        return removal.on_measure(self.system, measure, Xq, yq, store)

    def by_token(self, row: Rows, *, on: On, tokenizer: Any = None) -> TokenScores:
        """The value of `on_loss` for one query and one training row, by the tokens of both.

        values[s, t] = (wᵢ/n) g_sᵀ (C + λI)⁻¹ g_t with g the gradient of the loss at one token of the query or the row;
        they add up to the value of `on_loss` (with what the row carries of the penalty, told apart in `penalty`).

        Cost: as many systems as the shorter of the two texts has tokens, and a backward pass for each token.

        Args:
            row: a training row.
            on: one query: (Xq, yq), a list with one dict, Examples.
            tokenizer: how tokens are shown: one with `decode`, or a function from a number to a text; None shows
                numbers.

        Raises:
            InvalidInput: if `on` holds several queries; RowOutOfRange if the row does not exist.
            UnsupportedModel: if the loss has one prediction a row.
        """
        return tokens.by_token(self.system, row, self.system.queries(on), tokens.decoder(tokenizer))

    def index(self, folder: str | os.PathLike[str], *, error: float = 0.14, bits: int = 4) -> Index:
        """Training gradients in few bits, kept in a folder that answers new queries without model or data.

        `index.coordinates(influence, Xq, yq)` reads queries with the model, `index.on_loss(…, damping=…)` and
        `index.extremes(…)` answer from the folder. Needs a network and Kronecker factors (`EKFAC()`); an interrupted
        call goes on when it is made again. Under torchrun the processes share the rows, and the bytes stay the same.

        Cost: the factors, then one sweep. On disk: bits/8 bytes and a sixteenth for each coordinate that is kept of a
        row; memory does not grow with the rows.

        Args:
            folder: a new or empty folder, or that of the same call.
            error: ‖values of the index − values‖ / ‖values‖ that is allowed, where 0.14 is a correlation of about 0.99;
                measured on pairs of rows held out.
            bits: 4 or 8 for each coordinate.

        Raises:
            InvalidInput: if there are fewer than 4 training rows.
            UnsupportedModel: if the curvature has no Kronecker factors; NotPositiveDefinite as for on_loss.
            StoreMismatch: if the folder holds other work.
        """
        return indexing.index(self.system, folder, error, bits)

    def index_shard(
        self, folder: str | os.PathLike[str], shard: int, of: int, *, error: float = 0.14, bits: int = 4
    ) -> range:
        """The rows of part `shard` (from 0) of `of` of an index, now in the folder: for jobs that cannot talk.

        All parts lie in one folder. When they are there, `index(folder)` of the same error and bits makes them one
        index, without a sweep; the bytes are those of one call.

        Cost: each that begins before eigenvectors are in the folder makes the factors; its share of the sweep.

        Args:
            folder: that all parts share.
            shard: which part.
            of: how many parts there are.
            error: as for index.
            bits: as for index.

        Raises:
            InvalidInput: if there is no such part.
            StorageFailed: if another process is at this part, or at the whole.
            UnsupportedModel, NotPositiveDefinite, StoreMismatch: as for index.
        """
        return indexing.shard(self.system, folder, (shard, of), error, bits)

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
        return path_of(self.system, Xq, yq, dampings)

    def of_self(self, rows: Rows = None) -> SelfScores:
        """Each row's removal, measured on its own loss: (wᵢ/n) ∇L(zᵢ)ᵀ (C + λI)⁻¹ ∇L(zᵢ).

        Cost: p² flops per row with a factorised solver, no n × p numbers; otherwise one linear system per row. When
        `solver` was left to `defaults` and many rows are asked for, a factorisation that costs less is used for them;
        the certificate names it, and its residual is measured on 32 of the rows.

        Args:
            rows: the training rows; None means all.
        """
        return self_scores.of_self(self.system, rows)

    def of_replacing(self, rows: Rows, X_new: Any, y_new: Any = None, *, on: On, store: Any = None) -> Scores:
        """Equation 3: the change of each query's loss if training row i becomes the new example, at its weight.

        values[q, i] = (wᵢ/n) · I_pert,loss, with I_pert,loss = −∇L(z_q)ᵀ (C + λI)⁻¹ (∇L(z_new) − ∇L(zᵢ)).

        Args:
            rows: r training rows.
            X_new: r new inputs, one for each of them.
            y_new: r new targets.
            on: (Xq, yq), the queries.
            store: the folder of `on_loss(*on, store=…)`, by way of whose solutions and state the systems are solved.
        """
        return edits.of_replacing(self.system, rows, X_new, y_new, on, store)

    def of_relabeling(self, rows: Rows, y_new: Any, *, on: On, store: Any = None) -> Scores:
        """The change of each query's loss if training row i had the label y_new[i] instead; equation 3 with the same x.

        Args:
            rows: r training rows.
            y_new: r new labels.
            on: (Xq, yq), the queries.
            store: as for of_replacing.

        Raises:
            InvalidInput: if the number of labels is wrong, or examples have no label.
        """
        return edits.of_relabeling(self.system, rows, y_new, on, store)

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
        return perturbation.of_perturbing(self.system, rows, on)

    def of_adding(self, X_new: Any, y_new: Any = None, *, on: On, store: Any = None) -> Scores:
        """The change of each query's loss if a new example joined the training set with weight 1 (ε = +1/n).

        values[q, j] = −(1/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇L(z_new); a negative value means that the example would help. With
        class weights, or Examples that have weights of their own, ε is the example's weight over n.

        Args:
            X_new: new inputs.
            y_new: new targets.
            on: (Xq, yq), the queries.
            store: as for of_replacing.
        """
        return edits.of_adding(self.system, X_new, y_new, on, store)

    def of_groups(self, groups: Groups, *, on: On, store: Any = None) -> Scores:
        """The change of each query's loss if a whole group of rows is removed, to first order: the sum over members.

        Args:
            groups: lists of training rows, or a dict of them; column g of the result is group g in that order, and the
                keys of a dict are the names of the columns.
            on: (Xq, yq), the queries.
            store: as for of_replacing.
        """
        return groups_of_rows.of_groups(self.system, groups, on, store)

    def of_removing(self, groups: Groups, *, on: On) -> Scores:
        """The change of each query's loss if rows are removed, by the removal's own Newton step (leverage corrected).

        θ moves by (C + λI − (1/n) Σ_group wᵢ∇²Lᵢ)⁻¹ (1/n) Σ_group wᵢ∇Lᵢ and the query's loss is evaluated there, so for
        squared loss and fixed penalty this IS leave-one-out. `error` estimates what a further Newton step would add.
        Needs a linear predictor, and C the Hessian.

        Cost: K linear systems per removed row and one sweep for 64 groups together; for a group of more than 1,000/K
        rows a few products with the curvature without it instead, whatever its size.

        Args:
            groups: training rows, or lists of rows removed together, or a dict of them; one column for each.
            on: (Xq, yq), the queries.

        Raises:
            UnsupportedModel: if the model has no linear predictor, the curvature is not its Hessian, or the solver is
                stochastic.
            NotPositiveDefinite: if what is left does not determine the fit, whichever removal is made; where only some
                of them leave too little, theirs are NaN, with a TheoryWarning.
            Undefined: the same for removals of all rows of a class.
        """
        return groups_of_rows.of_removing(self.system, groups, on)

    def check(self, on: On | None = None) -> Report:
        """Whether the theory's assumptions hold here: gradient, curvature, residuals, coverage, drift.

        Never raises for what it finds; a solve that fails is part of the report.

        Args:
            on: (Xq, yq) queries to measure the drift on; None uses a few training rows.
        """
        return examine(self.system, on)

    def plan(self, Xq: Queries, yq: Any = None) -> Plan:
        """What `on_loss` of these queries will cost: time, passes, flops, memory, disk, and what to lower.

        The steps are really taken on a few rows and extrapolated; the number of products of an iteration is a forecast.

        Cost: a few seconds; the queries are read, and go through a frozen body.

        Args:
            Xq: the queries' inputs.
            yq: the queries' targets.
        """
        return plan_of(self.system, Xq, yq)

    def summary_frame(self) -> Any:
        """Leverage, Cook's distance, DFFITS, DFBETAS and residuals of every row of a GLM, a pandas DataFrame with one
        line per training row; columns, formulas, cost and errors as in `upweight.diagnostics.summary_frame`.
        """
        return diagnostics.summary_frame(self)

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def queries(self, on: Any) -> Examples:
        """The queries of a question: (Xq, yq), Examples, or (Dataset,), as examples that have targets.

        Raises:
            InvalidInput: if `on` is something else.
        """
        return self.system.queries(on)

    def class_weights(self, examples: Examples) -> NDArray[np.float64]:
        """The part of wᵢ that belongs to the label of each example."""
        return self.system.class_weights(examples)
