"""The statistician's set for one linear predictor: leverage, Cook's distance, DFFITS, DFBETAS, residuals, errors.

With n∇R = Σ wⱼφ′ⱼ x̃ⱼ + n∇r, φ the loss as a function of η = θ·x̃, x̃ = (x, 1), and M = nC = Σ wⱼφ″ⱼ x̃ⱼx̃ⱼᵀ + n∇²r
(n rows, weights wⱼ, penalty r), every column follows from

    hᵢ = wᵢφ″ᵢ x̃ᵢᵀ M⁻¹ x̃ᵢ               leverage; edf = Σ hᵢ, which is p without a penalty
    Δᵢ = θ̂(without row i) − θ̂           exact for squared loss and a quadratic penalty, else one Newton step
       = −M⁻¹ x̃ᵢ aᵢ/(1 − hᵢ)            aᵢ = √(wᵢφ″ᵢ)·(Pearson residual), which is −wᵢφ′ᵢ for squared, logistic, poisson

If removing a row removes its share s = wᵢ/Σw of the penalty, M loses s·n∇²r and the gradient s·n∇r, exactly.

    Pearson residual    √w (y − μ)/√V(μ) = −√w φ′/√E, where E = (dμ/dη)²/V(μ) is the expected φ″
    covariance of θ̂     s² M⁻¹ (the penalty included), with E in place of φ″ for GLMs: statsmodels' default

Weights are precisions (statsmodels' WLS and GLM var_weights): a row counts once whatever its weight, and not at all
with weight 0. Squared loss follows statsmodels' OLSInfluence, everything else its GLMInfluence.
References: Cook (1977); Belsley, Kuh and Welsch (1980); Pregibon (1981); Williams (1987); Jaeckel (1972).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import TheoryWarning, UnsupportedModel, require
from upweight.influence.deletion import (
    BLOCK,
    Family,
    Removals,
    Vector,
    all_removals,
    expected_curvature,
    forms,
    inverse_diagonal,
    refuse_estimates,
    solve,
)
from upweight.influence.system import Explained, System
from upweight.influence.top import index_of
from upweight.model import linear, penalties, per_row
from upweight.operators import Dense, GaussNewton, Hessian

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["ij_standard_errors", "leverage", "parameter_names", "summary_frame"]

_NO_FREEDOM = 1e-6


@dataclass(frozen=True)
class Rows:
    """What is known about every training row before anything is solved: weights wᵢ, φ′, φ″, E, Pearson residuals."""

    weights: Vector
    slopes: Vector
    curvatures: Vector
    pearson: Vector


# ---- what is public ----------------------------------------------------------------------------------------------


def summary_frame(influence: Explained) -> DataFrame:
    """One line of diagnostics for every training row of a linear or generalised linear model, penalised or not.

    Columns, with e = y − η, s² = Σwe²/(n − edf), M = nC, and (i) for "fitted without row i":

        leverage               hᵢ = wᵢφ″ᵢ x̃ᵢᵀM⁻¹x̃ᵢ, the penalty included; they sum to edf, the effective parameters
        cooks_distance         rᵢ² hᵢ/((1 − hᵢ)·edf), rᵢ the internally studentised residual
        dffits                 (ηᵢ − ηᵢ(i))/(s(i)·√(x̃ᵀM⁻¹x̃)), no unit; for GLMs s in place of s(i)
        studentized_residual   squared loss: √w e/(s(i)√(1 − h)), external; GLMs: Pearson residual/(s√(1 − h)), internal
        dfbetas_<name>         (θ̂ − θ̂(i))/(s(i)·√diag M⁻¹), one column per feature, then dfbetas_intercept
        loo_residual           y − ŷ(i) in units of y, exact: e/(1 − h) if the penalty stays; NaN unless loss is squared

    s(i)² is the residual variance of the refit, RSS(i)/(n − 1 − edf(i)), in closed form for ridge too. GLM columns are
    one-step approximations with s² = Pearson's X²/(n − edf) for gamma and Tweedie, 1 for binomial and Poisson. n counts
    rows of positive weight. A row of leverage 1 (it alone determines a parameter) or with φ″ < 0 is NaN elsewhere and
    a TheoryWarning names it; what needs s or s(i) is NaN when no degree of freedom is left. Of columns that repeat or
    add up to others everything but the DFBETAS is determined; those are NaN and named. Names are those of
    `parameter_names`; the index are the rows' names, or numbers where they have none. For lasso and elastic net "exact"
    means: on the same active set.

    Cost: one linear system per row (some ten if rows take their share of a penalty along) and one sweep; the result
    holds n·(p + 5) numbers, and nothing of size n × n exists.

    Raises:
        UnsupportedModel: if there is more than one output, no linear predictor, a loss that is no GLM's, a damping, or
            a curvature or solver that is not exact.
        NotConverged: if a linear system was not solved as promised.
    """
    system = influence.system
    pandas = require("pandas", "pandas")
    _check(system)
    family = _family(system)
    rows = _rows(system, family)
    removals = all_removals(system, family)
    h = rows.weights * rows.curvatures * removals.form
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        columns = _least_squares if family.least_squares else _one_step
        table = columns(system, rows, h, removals, family)
    blank = _undefined(removals.determined, rows.curvatures < 0, system.examples.ids)
    for name, values in table.items():
        if name != "leverage":
            values[blank] = np.nan
    _name_undetermined(system, "DFBETAS")
    names = [f"dfbetas_{name}" for name in parameter_names(influence)]
    flat = [column for name in table for column in (names if name == "dfbetas" else [name])]
    called = system.examples.names
    index = None if called is None else index_of(called.values, None, called.name)
    return pandas.DataFrame(np.column_stack(list(table.values())), columns=flat, index=index)


def leverage(influence: Explained) -> Vector:
    """hᵢ = wᵢφ″ᵢ x̃ᵢᵀ(nC)⁻¹x̃ᵢ of every training row: how much its fitted value follows its own target.

    C includes the penalty; Σ hᵢ is the effective number of parameters (p without a penalty), and 0 ≤ hᵢ ≤ 1 for convex
    losses. Any loss of one linear predictor will do.

    Cost: one linear system per row and one sweep; n numbers.

    Raises:
        UnsupportedModel: if there is more than one output, no linear predictor, a damping, or a curvature or solver
            that is not exact.
        NotConverged: if a linear system was not solved as promised.
    """
    system = influence.system
    _check(system)
    rows = _rows(system, Family())
    return rows.weights * rows.curvatures * forms(system)


def ij_standard_errors(influence: Explained) -> Float[NDArray[np.float64], " p"]:
    """Infinitesimal-jackknife standard errors of θ̂: √diag Σᵢ (wᵢ/n)² ψᵢψᵢᵀ, in the order of `objective.blocks`.

    ψᵢ = −(C + λI)⁻¹gᵢ is `on_params(i)`, so this is the sandwich M⁻¹(Σ wᵢ²gᵢgᵢᵀ)M⁻¹: HC0, without centring and without
    a correction for degrees of freedom. It holds when the model is wrong, and for every model and loss. Coefficients
    that the data do not determine have none: NaN, with a TheoryWarning.

    Cost: one linear system per row and one sweep.

    Raises:
        UnsupportedModel: if the solver gives estimates only.
        NotConverged: if a linear system was not solved as promised.

    References: Jaeckel (1972); White (1980); Efron (1982), chapter 6.
    """
    refuse_estimates(influence.system)
    system = influence.system.for_many(influence.system.n)
    share = system.penalty_share
    total = torch.zeros(system.objective.size, dtype=torch.float64)
    for start in range(0, system.n, BLOCK):
        block = np.arange(start, min(start + BLOCK, system.n))
        w = torch.from_numpy(system.examples.weights[block])[:, None]
        psi = solve(system, per_row.gradients(system.sweep, block) + share)
        total += ((w * psi) ** 2).sum(0)
    errors = (total.sqrt() / system.n).numpy()
    if system.flat is not None:
        errors[system.flat.touched] = np.nan
        _name_undetermined(system, "Standard errors")
    return errors


def parameter_names(influence: Explained) -> list[str]:
    """Names of the parameters of one linear predictor: the features of X that have one, then `intercept`.

    The features are named by the DataFrame of fit() or by the Pipeline's transformers; without names, or if a name
    occurs twice, they are x0, x1, … by their column in X. Kernel features are no columns: kernel0, kernel1, …
    """
    system = influence.system
    structure = system.objective.linear
    d = system.objective.size if structure is None else structure.n_features
    tail = ["intercept"] if structure is not None and structure.intercept else []
    inputs = getattr(getattr(system.encoder, "built", None), "inputs", None)
    if hasattr(inputs, "transform"):
        return [*(f"kernel{j}" for j in range(d)), *tail]
    active = [int(j) for j in getattr(inputs, "active", range(d))]  # an l1 penalty has taken the others out
    known = system.encoder.feature_names or []
    named = [*(str(known[j]) for j in active), *tail] if len(known) == getattr(inputs, "width", d) else []
    if len(named) != d + len(tail) or len(set(named)) != len(named):
        return [*(f"x{j}" for j in active), *tail]
    return named


# ---- the columns -------------------------------------------------------------------------------------------------


def _least_squares(system: System, rows: Rows, leverage: Vector, removals: Removals, _family: Family) -> dict[str, Any]:
    """The columns of statsmodels' OLSInfluence, exact with a quadratic penalty; M = c(XᵀWX + …) with c = φ″."""
    w, unit = rows.weights, float(rows.curvatures[0])
    whitened = rows.pearson / np.sqrt(unit)  # √w e
    count, edf = int((w > 0).sum()), float(leverage.sum())
    squares = float(whitened @ whitened)
    residual = -rows.slopes / unit - removals.eta_change
    left_squares = squares + removals.squares_change / unit - w * residual**2
    left_df = count - 1 - _edf_without(system, edf, w * unit * removals.penalty_form)
    left_df = np.where(left_df > _NO_FREEDOM, left_df, np.nan)
    floor = 1e-20 * max(squares, np.finfo(float).tiny)
    sigma = np.sqrt(np.where(left_squares > floor, left_squares, np.nan) / left_df)
    variance = _variance(whitened, count - edf)
    return {
        "leverage": leverage,
        "cooks_distance": whitened**2 / variance * leverage / (1 - leverage) ** 2 / edf,
        "dffits": _ratio(-removals.eta_change, sigma * np.sqrt(unit * removals.form)),
        "studentized_residual": whitened / (sigma * np.sqrt(1 - leverage)),
        "dfbetas": -removals.theta_change / (sigma[:, None] * np.sqrt(unit * inverse_diagonal(system))),
        "loo_residual": residual,
    }


def _one_step(system: System, rows: Rows, leverage: Vector, removals: Removals, family: Family) -> dict[str, Any]:
    """The columns of statsmodels' GLMInfluence (observed φ″ in the leverage, expected φ″ in the covariance)."""
    count, edf = int((rows.weights > 0).sum()), float(leverage.sum())
    scale = _normalisation(system) if family.known_scale else _variance(rows.pearson, count - edf)
    studentized = rows.pearson / np.sqrt(scale * (1 - leverage))
    fisher = system if family.mean is None else _with_expected_curvature(system, family)
    form = removals.form if fisher is system else forms(fisher)
    return {
        "leverage": leverage,
        "cooks_distance": studentized**2 * leverage / (1 - leverage) / edf,
        "dffits": _ratio(-removals.eta_change, np.sqrt(scale * form)),
        "studentized_residual": studentized,
        "dfbetas": -removals.theta_change / np.sqrt(scale * inverse_diagonal(fisher)),
        "loo_residual": np.full(len(leverage), np.nan),
    }


def _normalisation(system: System) -> float:
    """The factor that scikit-learn put on all weights (n/Σs for Poisson), which is no dispersion; 1 for logistic loss.

    A logistic loss has class weights in the same place, and those are weights.
    """
    structure = system.objective.linear
    if structure is None or structure.loss.name == "logistic":
        return 1.0
    return float(system.examples.weights.sum() / system.examples.sample_weight.sum())


def _variance(residuals: Vector, df: float) -> float:
    """Σ residual²/df, NaN when no degree of freedom is left."""
    return float(residuals @ residuals) / df if df > _NO_FREEDOM else float("nan")


def _ratio(change: Vector, size: Vector) -> Vector:
    """change/size, and 0 for a row x̃ = 0, which moves nothing."""
    return np.where(size == 0, 0.0, change / size)


def _edf_without(system: System, edf: float, own: Vector) -> Vector:
    """tr H of the refit without each row: p − (1 − s)·tr((M − sD − …)⁻¹D) with D = n∇²r.

    Args:
        system: of a squared loss.
        edf: tr H of the fit itself, so that p − edf = tr M⁻¹D.
        own: wᵢφ″ᵢ uᵀDu/(1 − hᵢ), what removing the row adds to the trace.
    """
    p = system.objective.size
    if not system.objective.folded:
        return edf - own
    rank = p if system.flat is None else p - system.flat.plain.shape[1]
    w = system.examples.weights
    eye = torch.eye(p, dtype=torch.float64)
    product = solve(system.for_many(p), system.project(penalties.hvp(system.objective, eye)))  # rows of D M⁻¹
    eigenvalues = torch.linalg.eigvals(product).real.numpy()
    shares, place = np.unique(w / w.sum(), return_inverse=True)
    traces = np.array([np.sum(eigenvalues / (1 - share * eigenvalues)) for share in shares])
    return rank - (1 - shares[place]) * (traces[place] + own)


def _pearson(w: Vector, slopes: Vector, expected: Vector) -> Vector:
    """−√w φ′/√E: its limit 0 where both have underflowed, and NaN, not ∞, where E alone has."""
    size = np.sqrt(np.where(expected > 0, expected, np.nan))
    return np.where(slopes == 0, 0.0, -np.sqrt(w) * slopes / size)


def _with_expected_curvature(system: System, family: Family) -> System:
    """The same fit with E in place of φ″: Fisher's information in place of the Hessian."""
    objective = system.objective
    structure = objective.linear
    mean = family.mean
    assert structure is not None
    assert mean is not None
    loss = structure.loss
    fisher_loss = replace(loss, curvature=lambda eta, _y: loss.curvature(eta, mean(eta)))
    shadow = replace(objective, linear=replace(structure, loss=fisher_loss))
    return replace(system, sweep=system.sweep.over(shadow, system.examples), named_damping=0.0)


def _rows(system: System, family: Family) -> Rows:
    objective = system.objective

    def derivatives(batch: Any, _w: Tensor) -> Tensor:
        slope = linear.slopes(objective, batch)[:, 0]
        curvature = linear.curvatures(objective, batch)[:, 0, 0]
        return torch.stack([slope, curvature, expected_curvature(objective, family, batch)], 1)

    slopes, curvatures, expected = system.sweep.emit(derivatives, vectors=2, label="residuals").T.copy()
    w = system.examples.weights
    return Rows(w, slopes, curvatures, _pearson(w, slopes, expected))


# ---- what can be asked -------------------------------------------------------------------------------------------


def _check(system: System) -> None:
    """Raises when there is not exactly one linear predictor with its exact curvature.

    Raises:
        UnsupportedModel: with what to do instead.
    """
    objective, structure = system.objective, system.objective.linear
    curvature = system.curvature.of if isinstance(system.curvature, Dense) else system.curvature
    if structure is None:
        why = (
            f"{objective.name} has no linear predictor. Use of_self() for its self-influence, leave_one_out to retrain"
        )
    elif structure.n_outputs != 1 or objective.size != structure.n_features + structure.intercept:
        why = (
            f"{objective.name} has {structure.n_outputs} outputs and {objective.size} parameters. Fit one model per "
            "output (one class against the rest), or use of_self() and of_removing()"
        )
    elif not isinstance(curvature, Hessian | GaussNewton):
        why = f"{system.curvature} is not its Hessian. Leave curvature=None"
    elif system.damping != 0:
        why = (
            f"damping={system.damping:g} is no part of the fit. Leave damping=None; columns that repeat or add up to "
            "others need none"
        )
    else:
        refuse_estimates(system)
        return
    message = f"These diagnostics are those of one linear predictor and its exact curvature. {why}."
    raise UnsupportedModel(message)


def _family(system: System) -> Family:
    """What is known about the loss.

    Raises:
        UnsupportedModel: if it is not the likelihood of a generalised linear model.
    """
    structure = system.objective.linear
    assert structure is not None
    name = structure.loss.name
    if name in {"squared", "tweedie(0, identity)"}:
        return Family(least_squares=True)
    if name in {"logistic", "poisson", "tweedie(1)"}:
        return Family(known_scale=True)
    if name == "gamma" or name.startswith("tweedie("):
        identity = name.endswith("identity)")
        return Family(mean=torch.clone if identity else torch.exp, known_scale=name.startswith("tweedie(1,"))
    message = (
        f"The loss {name} of {system.objective.name} is no likelihood of a generalised linear model, so residuals "
        "have no variance to be divided by. leverage(), ij_standard_errors() and of_removing() exist for every loss."
    )
    raise UnsupportedModel(message)


def _name_undetermined(system: System, what: str) -> None:
    """A TheoryWarning that names the coefficients that the data do not determine, whose lines are NaN."""
    left_open = system.undetermined
    if left_open.flat is None:
        return
    message = (
        f"{what} of {', '.join(left_open.columns)} are NaN: {left_open.why}, so the data determine predictions "
        "but not these coefficients. Drop a column, or fit with a penalty."
    )
    warnings.warn(message, TheoryWarning, stacklevel=4)


def _undefined(
    determined: NDArray[np.bool_], concave: NDArray[np.bool_], ids: NDArray[Any] | None
) -> NDArray[np.bool_]:
    """The rows whose columns do not exist, with a warning that names them."""
    reasons = (
        (determined, "leverage 1: each determines a parameter alone, so there is no fit without it", "add a penalty"),
        (concave, "φ″ < 0, where the loss is not convex and a residual has no weight", "use of_removing()"),
    )
    for mask, why, advice in reasons:
        which = np.flatnonzero(mask)
        if which.size:
            called = which if ids is None else ids[which]
            message = (
                f"{which.size} rows (first: {called[:5].tolist()}) have {why}; their columns are NaN. "
                f"Leave them out, or {advice}."
            )
            warnings.warn(message, TheoryWarning, stacklevel=4)
    return determined | concave
