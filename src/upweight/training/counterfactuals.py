"""What if, for real: the same model on edited data, and the model that training on them gives.

    edited(influence, rows, …)      the data change, θ̂ stays: where a prediction about an edit starts
    retrained(influence, …)         θ̂ becomes what training finds: what really happens

Each returns an Influence, so every question can be asked again there, and `predict` says what the model does now.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.influence.face import Influence, Rows
from upweight.training.found import Found
from upweight.training.retrainers import BoundRefit, bound, reweighted, shared
from upweight.training.trials import placed, seeded


def edited(influence: Influence, rows: Rows, X_new: Any = None, y_new: Any = None) -> Influence:
    """The influence of the same model on data in which these rows have other inputs, other labels, or both.

    θ̂ does not move, so it is no longer at a minimum; `retrained(edited(…))` is the model that fits the edited data. A
    row keeps its sample weight; with class weights a new label brings the weight of its own class, and the weights of
    the classes stay those of the fit; with `penalty_per_example` the penalty follows the sum of the weights. `predict`
    works as before. Transformers of a Pipeline stay as they were fitted.

    Cost: a copy of the inputs if they change; nothing is computed.

    Args:
        influence: of the model and the data before.
        rows: r training rows.
        X_new: r new inputs, as the model takes them; None keeps them.
        y_new: r new labels; None keeps them.

    Raises:
        InvalidInput: if nothing changes, a row is named twice, or the new examples do not fit the old.
        RowOutOfRange: if a row does not exist.
        UnsupportedModel: if the features of a kernel do not hold the new inputs.

    >>> from sklearn.linear_model import Ridge
    >>> from upweight import explain
    >>> X, y = [[0.0], [1.0], [2.0]], [0.0, 2.0, 2.0]
    >>> changed = edited(explain(Ridge(alpha=1.0).fit(X, y), X, y), [1], y_new=[1.0])
    >>> predict_at_3 = retrained(changed).objective.params["coef"]
    >>> round(float(predict_at_3), 4), round(float(Ridge(alpha=1.0).fit(X, [0.0, 1.0, 2.0]).coef_[0]), 4)
    (0.6667, 0.6667)
    """
    rows = influence.examples.rows(rows)
    if X_new is None and y_new is None:
        message = "Neither X_new nor y_new was given, so nothing would change. Pass new inputs, new labels, or both."
        raise InvalidInput(message)
    if len(np.unique(rows)) < len(rows):
        message = "A row is named twice, so it would become two things at once. Name each row once."
        raise InvalidInput(message)
    if X_new is not None:
        influence.encoder.check_new(X_new)
    examples = _edited(influence, rows, X_new, y_new)
    share = float(examples.weights.sum() / influence.examples.weights.sum())
    encoder = influence.encoder.edited(rows, X_new, y_new).reweighted(share)
    return Influence(shared(influence.objective, share), examples, encoder=encoder, **influence.settings)


def retrained(
    influence: Influence,
    *,
    without: Rows = None,
    weights: Float[NDArray[np.float64], " n"] | None = None,
    retrain: Any = None,
    seed: int = 0,
) -> Influence:
    """The influence of the model that training finds on these data, really trained.

    Rows that were left out keep their numbers and have weight 0. With `penalty_per_example` the penalty shrinks with
    the weight that is left.

    Cost: one training.

    Args:
        influence: of the model before, or of `edited` data.
        without: rows to leave out; None leaves out none.
        weights: (n,) factors of every row's weight, for anything else than leaving rows out; None means ones.
        retrain: as for leave_one_out: None takes Newton's method for linear predictors, L-BFGS for other objectives,
            and the estimator's own fit() where that ends elsewhere.
        seed: for a retrainer that needs one.

    Raises:
        InvalidInput: if the weights are not n numbers ≥ 0, or the retrainer's parameters do not fit, or it is a
            function of weights, which knows nothing of edited rows.
        NotConverged: if training does not reach a minimum.
        UnsupportedModel: if fit() may choose other columns (a lasso), so that θ changes its meaning.
    """
    factors = factors_of(influence, without, weights)
    return changed(influence, factors, found(influence, factors, retrain, seed))


def factors_of(influence: Influence, without: Rows, weights: Any = None) -> Float[NDArray[np.float64], " n"]:
    """(n,) factors of every row's weight, with 0 for the rows that are left out.

    Raises:
        InvalidInput: if they are not n numbers ≥ 0, or nothing is left.
    """
    factors = np.ones(influence.n) if weights is None else np.array(weights, dtype=np.float64)
    if factors.shape != (influence.n,) or not np.isfinite(factors).all() or factors.min() < 0 or not factors.any():
        message = (
            f"weights has shape {factors.shape}, and there are {influence.n} rows. Pass one finite factor ≥ 0 for "
        )
        raise InvalidInput(message + "each of them, not all zero.")
    if without is not None:
        factors[influence.examples.rows(without)] = 0
    if not (factors * influence.examples.weights).any():
        message = "No row would be left to train on. Leave out fewer rows."
        raise InvalidInput(message)
    return factors


def found(influence: Influence, factors: Float[NDArray[np.float64], " n"], retrain: Any, seed: int) -> Found:
    """What training finds with these factors.

    Raises:
        InvalidInput: if the retrainer's parameters do not fit, or it knows nothing of edited rows.
        UnsupportedModel: if fit() may choose other columns.
    """
    train = bound(retrain, influence)
    if influence.examples.changed and train is retrain:
        message = (
            f"retrain={getattr(retrain, '__name__', retrain)!r} is given weights only, so it would train on the rows "
            "as they were before `edited`. Train on the edited rows yourself and explain() that model, or pass an "
            "object with bind(influence): Newton(), LBFGS(), Refit()."
        )
        raise InvalidInput(message)
    if isinstance(train, BoundRefit) and train.refit.whole is not None:
        message = (
            f"fit() of {influence.objective.name} may choose other columns, and then θ means something else. Use "
            "leave_one_out(influence, (Xq, yq), rows), which measures the queries after each fit."
        )
        raise UnsupportedModel(message)
    with seeded(seed):
        params, penalty = (
            train.with_penalty(factors, seed) if isinstance(train, BoundRefit) else (train(factors, seed), None)
        )
    before = influence.objective
    after = placed(before, params, by_user=train is retrain)
    beside = {name: tensor for name, tensor in after.fixed.items() if tensor is not before.fixed[name]}
    return Found(after.theta, beside, penalty)


def changed(influence: Influence, factors: Float[NDArray[np.float64], " n"], what: Found) -> Influence:
    """The influence at what training with these factors found."""
    after = reweighted(influence.sweep, factors)
    objective = after.objective.at(what.theta).beside(what.beside)
    if what.penalty is not None:
        objective = replace(objective, penalty=what.penalty)
    encoder = influence.encoder.reweighted(float(after.examples.weights.sum() / influence.examples.weights.sum()))
    return Influence(objective, after.examples, encoder=encoder, **influence.settings)


def _edited(influence: Influence, rows: NDArray[np.int64], X_new: Any, y_new: Any) -> Examples:
    """The training examples with other ones in these places."""
    examples, encoder = influence.examples, influence.encoder
    targets = None if y_new is None else encoder.targets(y_new)
    weights = examples.weights[rows]
    if targets is not None:
        weights = examples.sample_weight[rows] * encoder.class_weights(targets)
    if X_new is None:
        assert targets is not None  # one of the two was given
        relabelled = examples.relabelled(rows, targets)
        return examples.edited(rows, None if examples.dataset is None else relabelled, relabelled.y, weights)
    if examples.dataset is None:
        new = encoder.examples(X_new)
        _check_count(rows, len(new))
        return examples.edited(rows, new.x, None if targets is None else np.asarray(targets), weights)
    if targets is None:
        message = "The training rows are a Dataset, whose items are whole examples. Pass y_new beside X_new."
        raise InvalidInput(message)
    new = encoder.examples(X_new, y_new)
    _check_count(rows, len(new))
    return examples.edited(rows, new, None, weights)


def _check_count(rows: NDArray[np.int64], count: int) -> None:
    if count != len(rows):
        message = f"{len(rows)} rows are to become {count} new examples. Pass one new example for each row."
        raise InvalidInput(message)
