"""The only automatic choices. Each is a function of what is known, and what it chose shows in repr() and check().

curvature   Hessian for linear predictors and for losses given as one function; GaussNewton for torch modules,
            because they are rarely at a minimum and it is positive there. EKFAC, which stands for it and is ready after
            two passes, for more than 100,000 parameters, and for more than 1,000 outputs an example, as language models
            have, where its expectation is over one random vector an example; unless an iterative solver is named.
solver      of the ways that can be taken, the direct one that costs least (`costs`): Cholesky for p ≤ 4,000, and for
            linear predictors Dual when rows are fewer than parameters. CG to a relative residual of 1e-6 where that is
            expected to take less: of a network's Gauss–Newton matrix that would take more than 2e10 flops, and of
            linear predictors that a penalty holds, where a factorisation takes more than a tenth of a second. Such a CG
            gives way to the factorisation when it has spent a fifth of its cost and is not going to end first, or
            does not converge. Linear predictors have the TwoLevel preconditioner, Approximate where their rows are
            sparse; a CG that is given without a preconditioner gets it too. For many systems, of queries or rows, a
            Cholesky factor of up to 12,000 parameters is taken when it costs less than they would; where rows are
            sparse SparseCholesky, with a core of up to 12,000 columns, which is counted first.
            Factored for curvatures that know their eigenvalues: KFAC, EKFAC, Arnoldi, Nystroem, Identity.
damping     0 for linear predictors, for Hessian() and for Identity(). For GaussNewton, EmpiricalFisher and what stands
            for them (KFAC, EKFAC, Dense) in other models, and for Arnoldi and Nystroem in all: 0 if θ̂ is at a minimum
            and an L2 penalty covers every parameter, for then nothing is missing; else C's mean eigenvalue tr(C)/p,
            estimated with 16 random vectors where the eigenvalues are not known. Training that stopped has not moved
            along the flat directions that 1/(C + 0) would blow up (ADR 3; `minibatch.SGD.damping` says what a known
            number of steps amounts to, and `damping_path` how much the choice matters).
precision   of a torch module: float64 up to 50,000 parameters or when its weights are float64, else float32, to which
            bfloat16 and float16 weights are raised.
batch       as many examples as keep their saved activations under 1 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upweight.data.examples import Examples
from upweight.data.trees import leaves, like, take, tree_map
from upweight.errors import InvalidInput, NotPositiveDefinite, UnsupportedModel
from upweight.influence.costs import (
    DIRECT_UP_TO,
    SPECTRAL,
    Cost,
    cost,
    costs,
    dual_bytes,
    entries_of,
    held,
    preconditioner,
    product_seconds,
)
from upweight.model import calculus, penalties
from upweight.model.objective import L2, Objective
from upweight.model.sweep import Sweep
from upweight.operators import (
    EKFAC,
    Arnoldi,
    Curvature,
    DenseOperator,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Identity,
    Nystroem,
    Operator,
    Spectral,
)
from upweight.operators.cotangents import MOST, Signs, count, outputs
from upweight.runs.machine import in_bytes
from upweight.solvers import CG, Factored, Solver

__all__ = [
    "Cost",
    "completed",
    "cost",
    "costs",
    "curvature",
    "damping",
    "dampings",
    "dual_bytes",
    "entries_of",
    "example_bytes",
    "in_its_place",
    "mean_eigenvalue",
    "patience",
    "precision",
    "refuse_larger",
    "solver",
]

_ITERATED_UP_TO = 100_000
_AT_ONCE = 2e10  # flops of a factorisation that nobody waits for
_NO_WAIT = 0.1  # seconds of one, of a linear predictor: its factor serves the next question too
_CLOSE = 1.2  # times what an iteration is expected to take
_FEWEST = 8  # products before an iteration is asked how far it has come
_TRIAL = 0.2  # of a factorisation's cost, after which an iteration is asked how far it has come
AT_MINIMUM = 0.3  # rows' worth of gradient that may be left, as in check()'s verdict
TRACE_VECTORS = 16
_DOUBLE_UP_TO = 50_000


def curvature(sweep: Sweep, probe: Any, solver: Solver | None = None) -> Curvature:
    """The curvature for an objective when none is named, with a few of its examples and the solver that was given.

    >>> import upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = torch.arange(6.0)[:, None], torch.arange(6.0)[:, None] ** 2
    >>> line = uw.explain(Ridge().fit(X, y), X, y)
    >>> network = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    >>> bent = uw.explain(network, X, y, loss=torch.nn.functional.mse_loss, damping=0.1)
    >>> [curvature(influence.sweep, influence.examples.batch([0])) for influence in (line, bent)]
    [Hessian(), GaussNewton()]
    """
    objective = sweep.objective
    closed = objective.linear is not None and not _is_head(objective)
    if closed or objective.outputs is None:
        return Hessian()
    if objective.linear is not None or not isinstance(solver, Factored | None):
        return GaussNewton()
    many = count(objective, probe) > MOST  # outputs, such as words of a vocabulary at every place
    if not many and objective.size <= _ITERATED_UP_TO:
        return GaussNewton()
    chosen = EKFAC(samples=1 if many else None)
    return chosen if _has_cotangents(chosen, sweep, probe) else GaussNewton()


def _has_cotangents(spec: EKFAC, sweep: Sweep, probe: Any) -> bool:
    """Whether the cotangents are known whose mean square is the loss's second derivative."""
    few = tree_map(lambda leaf: leaf[:2], probe)
    try:
        objective = spec.cut(sweep).objective
        f = outputs(objective, few)
        Signs(1, 0).of(objective, calculus.ready(objective, few), range(len(f)), f)
    except UnsupportedModel:
        return False
    return True


def _is_head(objective: Objective) -> bool:
    """Whether it is the head of a larger module: whatever structure was found, training may have stopped early."""
    return objective.coverage < 1


def refuse_larger(solver: Solver, objective: Objective, examples: Examples, curvature: Curvature, budget: int) -> None:
    """Raises for a solver whose matrix or vectors exceed a budget of bytes, whatever the batch size.

    Raises:
        InvalidInput: if it is larger; names what would fit.
    """
    needed = cost(solver, objective, examples, curvature).memory
    if needed <= budget:
        return
    listed = [one for one in costs(objective, examples, curvature, budget=budget) if one.memory <= budget]
    fitting = " or ".join(f"solver={type(one.solver).__name__}() ({in_bytes(one.memory)})" for one in listed)
    message = (
        f"{type(solver).__name__} of {objective.size:,} parameters and {len(examples):,} rows needs {in_bytes(needed)} "
        f"beside data and model, whatever the batch size, and memory_budget is {in_bytes(budget)}. "
        f"Use {fitting + ', or ' if fitting else ''}memory_budget={in_bytes(1.1 * needed)!r}."
    )
    raise InvalidInput(message)


def solver(
    objective: Objective,
    examples: Examples,
    curvature: Curvature,
    *,
    systems: int = 1,
    budget: int | None = None,
) -> Solver:
    """The solver for an objective when none is named; for many systems a factorisation only if it costs less.

    What takes more bytes than the budget is not chosen.
    """
    if isinstance(curvature, SPECTRAL):
        return Factored()
    listed = costs(objective, examples, curvature, systems=systems, budget=budget)
    *direct, iterative = [
        one for one in listed if one.possible and (one.memory <= (budget or math.inf) or one is listed[-1])
    ]
    if not direct:
        return iterative.solver
    if objective.linear is not None and isinstance(curvature, Hessian | GaussNewton):
        best = min(direct, key=lambda one: one.seconds)
        certain = objective.size <= DIRECT_UP_TO and not held(objective)  # where it finds what no row sees
        quick = best.seconds <= max(_NO_WAIT, _CLOSE * iterative.seconds)
        return best.solver if certain or quick else iterative.solver
    best = min(direct, key=lambda one: one.flops)
    always = objective.size <= DIRECT_UP_TO
    if isinstance(curvature, GaussNewton | EmpiricalFisher):  # an iteration cannot fail
        always = best.flops <= _AT_ONCE
    return best.solver if always or best.flops < iterative.flops else iterative.solver


def in_its_place(
    solver: Solver, objective: Objective, examples: Examples, curvature: Curvature, budget: int | None = None
) -> Cost | None:
    """The factorisation that can take the place of an iteration, if there is one: it is not too large.

    That of a linear predictor may have up to 12,000 parameters, for without it there may be no answer.

    >>> import upweight as uw
    >>> from upweight.solvers import Cholesky
    >>> X, criterion = torch.eye(3), torch.nn.functional.mse_loss
    >>> network = uw.explain(torch.nn.Linear(3, 3), X, X, loss=criterion, penalty=0.1)
    >>> in_its_place(CG(), network.objective, network.examples, Hessian()).solver
    Cholesky()
    >>> in_its_place(Cholesky(), network.objective, network.examples, Hessian()) is None
    True
    """
    if not isinstance(solver, CG) or isinstance(curvature, SPECTRAL):
        return None
    listed = costs(objective, examples, curvature, systems=2, budget=budget)[:-1]
    able = [one for one in listed if one.possible and one.memory <= (budget or math.inf)]
    return min(able, key=lambda one: one.seconds, default=None)


def patience(
    objective: Objective, examples: Examples, curvature: Curvature, budget: int | None = None
) -> Callable[[int], int] | None:
    """From a number of right-hand sides to the products that cost a fifth of what a factorisation does.

    None where there is none that could take the iteration's place, or nothing is known of its cost.

    >>> import numpy as np, upweight as uw
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = np.random.default_rng(0).normal(size=(2_000, 300)), np.arange(2_000) % 2
    >>> influence = uw.explain(LogisticRegression().fit(X, y), X, y)
    >>> products = patience(influence.objective, influence.examples, Hessian())
    >>> products(1) >= products(20)
    True
    """
    if objective.linear is None or not isinstance(curvature, Hessian | GaussNewton):
        return None
    other = in_its_place(CG(), objective, examples, curvature, budget)
    if other is None:
        return None
    structure, spent = objective.linear, _TRIAL * other.seconds
    return lambda systems: max(_FEWEST, int(spent / product_seconds(structure, examples, systems)))


def completed(
    given: Solver | None, objective: Objective, examples: Examples, curvature: Curvature, budget: int | None = None
) -> Solver:
    """The solver that was given, with what it leaves open; or the one for this objective when none is named."""
    if given is None:
        return solver(objective, examples, curvature, budget=budget)
    open_cg = isinstance(given, CG) and given.preconditioner is None
    if open_cg and objective.linear is not None and isinstance(curvature, Hessian | GaussNewton):
        return replace(given, preconditioner=preconditioner(objective.linear, examples))  # type: ignore[type-var]
    return given


def damping(objective: Objective, spec: Curvature, operator: Operator, missed: Callable[[], float]) -> float:
    """λ when none is given.  Cost: nothing, or one sweep with 16 vectors.

    Args:
        objective: with its penalty.
        spec: the curvature.
        operator: the same, bound.
        missed: how many rows' worth of gradient θ̂ is from a minimum, if it comes to that.

    Raises:
        NotPositiveDefinite: if C has no positive mean eigenvalue to take.

    >>> import upweight as uw
    >>> X, y, criterion = torch.eye(3), torch.eye(3), torch.nn.functional.mse_loss
    >>> free = uw.explain(torch.nn.Linear(3, 3), X, y, loss=criterion, curvature=GaussNewton())
    >>> found = damping(free.objective, free.curvature, free.operator, lambda: 0.0)
    >>> round(found, 2), round(free.operator.matrix().diagonal().mean().item(), 2)  # by random vectors; by p of them
    (0.29, 0.33)
    """
    stands_for: Any = spec
    while hasattr(stands_for, "of"):  # KFAC(of=…), Nystroem(…, of=…), Dense(EKFAC())
        stands_for = stands_for.of
    low_rank = isinstance(spec, Arnoldi | Nystroem)
    closed = objective.linear is not None and not _is_head(objective)
    linear = closed or isinstance(spec, Identity)
    if not low_rank and (linear or not isinstance(stands_for, GaussNewton | EmpiricalFisher)):
        return 0.0
    covered = isinstance(objective.penalty, L2) and float(penalties.diagonal(objective).min()) > 0
    if covered and (closed or missed() < AT_MINIMUM):
        return 0.0
    return _positive_mean(operator)


def dampings(operator: Operator) -> NDArray[np.float64]:
    """The λ of a damping path when none are named: nine, from a thousandth of C's mean eigenvalue to ten times it.

    Raises:
        NotPositiveDefinite: if C has no positive mean eigenvalue to take.
    """
    return _positive_mean(operator) * np.geomspace(1e-3, 10, 9)


def _positive_mean(operator: Operator) -> float:
    """tr(C)/p; a made-up floor in its place would divide by rounding."""
    mean = mean_eigenvalue(operator)
    if mean > 0:
        return mean
    message = (
        f"C's mean eigenvalue is {mean:.3g}, so there is no curvature of the data to choose a damping by: the loss is "
        "flat, or bends down, where the model is. Usual reasons: a loss that is not convex in the model's output, or "
        "rows that are all fitted exactly. Name the damping: "
        + ("damping=influence.check().suggested_damping is large enough." if mean < 0 else "damping=0.1.")
    )
    raise NotPositiveDefinite(message)


def mean_eigenvalue(operator: Operator) -> float:
    """tr(C)/p, exact where the eigenvalues are known, else by 16 random vectors.  Cost: nothing, or one sweep."""
    if isinstance(operator, Spectral) and not isinstance(operator, DenseOperator):
        return float(operator.eigenvalues.mean())
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (TRACE_VECTORS, operator.size), generator=generator, dtype=torch.float64) - 1
    return float((signs * operator.apply(signs)).sum()) / (TRACE_VECTORS * operator.size)


def precision(model: torch.nn.Module) -> torch.dtype:
    """The precision a module's arithmetic runs in: float64 for few parameters or float64 weights, else float32."""
    parameters = list(model.parameters())
    few = sum(parameter.numel() for parameter in parameters) <= _DOUBLE_UP_TO
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if few or double else torch.float32


def example_bytes(objective: Objective, batch: Any) -> int:
    """Memory that one example needs per vector of a product, measured on the first example of `batch`."""
    if objective.linear is not None:
        K, d = objective.linear.n_outputs, objective.linear.n_features
        return 8 * max(4 * K + K * K, d // 8)
    example = take(like(batch, objective.reference), 0)
    if any(scipy.sparse.issparse(leaf) for leaf in leaves(batch)):
        return 8 * max(1024, objective.size)
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    blocks = {name: block.detach().clone().requires_grad_() for name, block in objective.blocks.items()}
    own = {tensor.data_ptr() for tensor in (*blocks.values(), *objective.fixed.values())}
    params = blocks if isinstance(objective.params, dict) else next(iter(blocks.values()))
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            objective.loss(params, example)
    except RuntimeError:  # torch.func, with which a loss may differentiate inside, is incompatible with hooks
        with _Results() as results:
            objective.loss(params, example)
        seen = {x.data_ptr(): x.numel() * x.element_size() for x in results.found}
    activations = sum(size for pointer, size in seen.items() if pointer not in own)
    largest = max(block.numel() * block.element_size() for block in blocks.values())
    # a batched backward pass holds a few copies of the activations; a convolution may hold an example's weights too
    return math.ceil(4 * activations + largest / 8 + 1024)


class _Results(TorchDispatchMode):
    """Keeps what every operation gives, so that no two of them have the same place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out
