"""What the model says: its outputs at θ̂, and labels in the user's own names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.data.trees import leaves, take
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.influence.face import Influence
from upweight.model import calculus

_CUTS = (0.0, 0.5)  # logits and margins change their class at 0, probabilities and least squares on 0 and 1 at ½


@dataclass(frozen=True)
class Predictions:
    """What the model says about some inputs.

    Args:
        outputs: (q, K) the model's outputs: logits, decision values or predicted numbers.
        labels: (q,) the class of each, by the user's own name; None where outputs are no classes.
        names: of the classes, in the order of the outputs; None where outputs are no classes.
        cut: of a single output, where its class changes: 0, or ½ for probabilities and least squares on 0 and 1.
        paired: whether the outputs are those of pairs of classes, one against one.
    """

    outputs: Float[NDArray[np.float64], "q K"]
    labels: Shaped[NDArray[Any], " q"] | None
    names: tuple[Any, ...] | None = field(default=None, repr=False)
    cut: float = field(default=0.0, repr=False)
    paired: bool = field(default=False, repr=False)

    def __repr__(self) -> str:
        count, outputs = self.outputs.shape
        return f"Predictions({count} inputs × {outputs} outputs)"

    def per_class(self) -> Float[NDArray[np.float64], "q C"]:
        """One output for each class, the largest of which decides.

        A single output stands for the second class, less its cut, beside 0 for the first.

        Raises:
            UnsupportedModel: if the outputs are no classes, or those of pairs of classes.
        """
        if self.names is None:
            message = "These outputs are no classes, so there is none per class. Pass the influence of a classifier."
            raise UnsupportedModel(message)
        if self.paired and len(self.names) > 2:
            message = (
                f"{self.outputs.shape[1]} outputs are those of pairs of {len(self.names)} classes, one against one, "
                "and give no output per class. Use LogisticRegression."
            )
            raise UnsupportedModel(message)
        if self.outputs.shape[1] > 1:
            return self.outputs
        second = self.outputs - self.cut
        return np.concatenate([np.zeros_like(second), second], 1)

    def margins(self, y: Any) -> Float[NDArray[np.float64], " q"]:
        """By how much each one's class y is ahead of the strongest other: > 0 where the label is y.

        Raises:
            InvalidInput: if y is not one known class for each.
            UnsupportedModel: if there is no output per class.
        """
        outputs, wanted = self.per_class(), np.asarray(y)
        places = {name: place for place, name in enumerate(self.names or ())}
        unknown = sorted({str(label) for label in wanted.tolist() if label not in places}) if wanted.ndim == 1 else []
        if wanted.shape != (len(outputs),) or unknown:
            message = (
                f"y has shape {wanted.shape}, and there are {len(outputs)} predictions"
                + (f"; {', '.join(unknown[:5])} is no class of the model" if unknown else "")
                + f". Pass one of the classes for each: {', '.join(map(str, list(places)[:10]))}."
            )
            raise InvalidInput(message)
        codes = np.array([places[label] for label in wanted.tolist()], dtype=np.int64)
        own = outputs[np.arange(len(codes)), codes]
        others = np.where(np.arange(outputs.shape[1]) == codes[:, None], -np.inf, outputs)
        return own - others.max(1)

    def accuracy(self, y: Any) -> float:
        """The share of labels that equal y.

        Raises:
            InvalidInput: if the outputs are no classes, or y has another length.
        """
        if self.labels is None:
            message = "These outputs are no classes, so they have no accuracy. Use the loss: Scores.query_values."
            raise InvalidInput(message)
        truth = np.asarray(y)
        if truth.shape != self.labels.shape:
            message = f"y has shape {truth.shape}, and there are {len(self.labels)} labels. Pass one label for each."
            raise InvalidInput(message)
        if self.names is not None and not set(truth.tolist()) & set(self.names):
            message = (
                f"None of the {len(truth)} labels in y, such as {truth.tolist()[0]!r}, is a class of the model: "
                f"{', '.join(map(repr, self.names[:10]))}. Pass labels as they stand in the training data."
            )
            raise InvalidInput(message)
        return float((self.labels == truth).mean())


def predict(influence: Influence, Xq: Any) -> Predictions:
    """The model's outputs and labels for inputs, at the parameters of this influence.

    Cost: one forward pass.

    Args:
        influence: of a model with outputs: an estimator, a module, or an Objective with `outputs`.
        Xq: the inputs, as the model takes them; or Examples, whose targets do not matter.

    Raises:
        InvalidInput: if the objective has one loss and no outputs, or the inputs do not fit.

    >>> from sklearn.linear_model import LogisticRegression
    >>> from upweight import explain
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]], ["no", "no", "yes", "yes"]
    >>> influence = explain(LogisticRegression().fit(X, y), X, y)
    >>> predict(influence, [[0.5], [2.5]]).labels.tolist()
    ['no', 'yes']
    """
    objective = influence.objective
    if objective.linear is None and objective.outputs is None:
        message = (
            f"{objective.name} is a loss without outputs, so there is nothing to predict with. Pass "
            "Objective(..., outputs=f, output_loss=l) with loss = l(f(params, example), example)."
        )
        raise InvalidInput(message)
    queries = influence.encoder.examples(Xq)
    if queries.x is not None and queries.y is None:
        queries = queries.carrying(queries.x, np.zeros(len(queries)))  # outputs look at x only
    sweep = influence.sweep.over(objective, queries)
    outputs = sweep.emit(lambda batch, _: calculus.outputs(objective, batch), label="predict")
    names = classes(influence)
    if names is None:
        return Predictions(outputs, None)
    rule = _Rule.of(influence, names)
    return Predictions(outputs, np.asarray(names)[rule(outputs)], tuple(names), rule.cut, rule.paired)


def classes(influence: Influence) -> list[Any] | None:
    """The user's names of the classes, in the order of the model's outputs; None where outputs are no classes.

    For a scikit-learn classifier its `classes_`. For a module the whole numbers 0 … K−1 if it has K > 1 outputs and
    every training target that weighs is one of them; the two targets if it has one output, they are 0 and 1, or −1 and
    1, and there is an output, 0 or ½, at which both cost the same: that is where the class changes.
    """
    estimator = getattr(influence.encoder, "estimator", None)
    if estimator is not None:
        names = getattr(estimator, "classes_", None)
        return None if names is None else np.asarray(names).tolist()
    y = _column(influence.examples.targets())
    if y is None or y.ndim != 1 or not bool((y == y.round()).all()):
        return None
    values = np.unique(y.cpu().numpy()[influence.examples.weights > 0])  # an ignored label is of no class
    K = _output_count(influence)
    if K > 1:
        return list(range(K)) if values[0] >= 0 and values[-1] < K else None
    pair = _pair(values)
    return None if pair is None or _cut(influence, pair) is None else pair


def decision(influence: Influence) -> Callable[[NDArray[np.float64]], NDArray[np.int64]] | None:
    """From (q, K) outputs to (q,) class numbers, the places in `classes`; None where outputs are no classes.

    The largest of several outputs, the vote of one-against-one outputs, or whether a single one is above the output at
    which both classes cost the same.
    """
    names = classes(influence)
    return None if names is None else _Rule.of(influence, names)


def training_labels(influence: Influence, rows: Any = None) -> Shaped[NDArray[Any], " n"] | None:
    """The labels of the training rows, by the user's own names; None where targets are no classes."""
    return _named(influence, influence.examples, influence.examples.rows(rows))


def query_labels(influence: Influence, on: Any) -> Shaped[NDArray[Any], " q"] | None:
    """The true labels of queries, (Xq, yq) or Examples, by the user's own names; None where targets are no classes."""
    queries = influence.queries(on)
    return _named(influence, queries, np.arange(len(queries)))


def _named(influence: Influence, examples: Examples, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    names, y = classes(influence), examples.targets()
    if names is None or y is None:
        return None
    targets = y.cpu().numpy()[rows]
    if getattr(influence.encoder, "estimator", None) is None:
        return targets.reshape(len(targets)).astype(np.int64)
    if targets.ndim == 2:  # least squares on ±1, one column per class or one for two classes
        codes = targets.argmax(1) if targets.shape[1] > 1 else (targets[:, 0] > 0).astype(np.int64)
    else:
        codes = targets.astype(np.int64) if targets.min(initial=0) >= 0 else (targets > 0).astype(np.int64)
    return np.asarray(names)[codes]


def training_inputs(influence: Influence) -> Any:
    """The training inputs as the model takes them: an array, a tensor or a CSR matrix of n rows.

    Of rows that lie in a file what reads them: slices of it, and np.asarray() of it, are arrays.

    For a frozen extractor with a head what goes into the network, edits included; for a Pipeline what its last step
    sees, for the rows before it are not kept.  Cost: nothing for arrays; a Dataset, and edited inputs, are stacked.
    """
    whole = getattr(influence.encoder, "original", influence.examples)
    changed = getattr(influence.encoder, "changed", {})
    if whole.x is not None and not changed:
        return whole.x
    batch = whole.batch(slice(None))
    x = batch[0] if isinstance(batch, tuple | list) else batch
    if changed:
        new = torch.stack(list(changed.values()))
        x = x.to(torch.promote_types(x.dtype, new.dtype), copy=True)
        x[list(changed)] = new.to(x)
    return x


def features(influence: Influence, X: Any = None) -> Float[NDArray[np.float64], "n d"]:
    """What the objective sees of training rows (None) or of new inputs, one flat line each.

    For a frozen extractor with a head the cached features; for an estimator the columns that its coefficients multiply
    (kernel features for an SVC); for any other module the inputs themselves.

    Args:
        influence: whose inputs they are.
        X: new inputs, as the model takes them; None means the training rows.

    Raises:
        InvalidInput: if an input is not one array of numbers.
    """
    examples = influence.examples if X is None else influence.encoder.examples(X)
    whole = examples.batch(slice(None))
    x = whole[0] if isinstance(whole, tuple | list) else whole
    if scipy.sparse.issparse(x):
        return np.asarray(x.toarray(), dtype=np.float64)
    if not isinstance(x, Tensor):
        message = f"An input is a {type(x).__name__} of {len(list(leaves(x)))} parts, which form no line of features."
        raise InvalidInput(
            message + " Name the parameters of the head, explain(..., parameters=['head.weight', …]), to use the "
            "features before it."
        )
    return x.reshape(len(x), -1).double().cpu().numpy()


@dataclass(frozen=True)
class _Rule:
    """From outputs to class numbers.

    Args:
        K: classes.
        cut: of a single output.
        paired: whether outputs are those of pairs of classes.
        broken: whether ties of their votes go by the sums of outputs, as with SVC(break_ties=True), not by the order.
    """

    K: int
    cut: float
    paired: bool
    broken: bool

    @classmethod
    def of(cls, influence: Influence, names: list[Any]) -> _Rule:
        estimator, structure = getattr(influence.encoder, "estimator", None), influence.objective.linear
        own = estimator is not None or _output_count(influence) > 1
        cut = 0.0 if own else _cut(influence, names)
        assert cut is not None  # there are no classes without it
        shape = getattr(estimator, "decision_function_shape", "ovo")
        broken = bool(getattr(estimator, "break_ties", False)) and shape == "ovr"
        return cls(len(names), cut, structure is not None and structure.loss.pairs, broken)

    def __call__(self, outputs: NDArray[np.float64]) -> NDArray[np.int64]:
        if outputs.shape[1] == 1:
            return (outputs[:, 0] > self.cut).astype(np.int64)
        if not self.paired:
            return outputs.argmax(1)
        votes, sums = np.zeros((2, len(outputs), self.K))
        for output, (i, j) in zip(outputs.T, itertools.combinations(range(self.K), 2), strict=True):
            wins = output > 0  # a positive output says the first of its pair
            votes[wins, i] += 1
            votes[~wins, j] += 1
            sums[:, i] += output
            sums[:, j] -= output
        return (votes + sums / (3 * (np.abs(sums) + 1)) if self.broken else votes).argmax(1)


def _column(y: Tensor | None) -> Tensor | None:
    """Targets of shape (n, 1), as the losses of single outputs ask for, as (n,)."""
    return y[:, 0] if y is not None and y.ndim == 2 and y.shape[1] == 1 else y


def _pair(values: NDArray[Any]) -> list[Any] | None:
    """The two classes that these targets are of: 0 and 1, or −1 and 1."""
    numbers = {int(value) for value in values}
    return next((pair for pair in ([0, 1], [-1, 1]) if numbers <= set(pair)), None)


def _cut(influence: Influence, pair: list[Any]) -> float | None:
    """The output, 0 or ½, at which both labels cost the same; None if there is none."""
    objective = influence.objective
    if objective.outputs is None or objective.output_loss is None:
        return None
    example = take(calculus.ready(objective, influence.examples.batch([0])), 0)
    output = objective.outputs(objective.params, example).detach()
    for cut in _CUTS:
        try:
            low, high = (
                float(objective.output_loss(torch.full_like(output, cut), (example[0], torch.full_like(example[1], y))))
                for y in pair
            )
        except (RuntimeError, ValueError, TypeError):
            return None
        if np.isclose(low, high, rtol=1e-4, atol=1e-9):
            return cut
    return None


def _output_count(influence: Influence) -> int:
    structure = influence.objective.linear
    if structure is not None:
        return structure.n_outputs
    if influence.objective.outputs is None:
        return 0
    return int(calculus.outputs(influence.objective, influence.examples.batch([0])).shape[1])
