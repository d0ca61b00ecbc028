"""How a user's X and y become examples of an estimator's objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from torch import Tensor

from upweight.adapters.estimators.built import Again, Built
from upweight.adapters.estimators.inputs import AsGiven, Features, Inputs
from upweight.data.arrays import as_array, as_tensor, refuse_sparse_targets, with_lines
from upweight.data.examples import Examples
from upweight.data.ids import names_of
from upweight.data.stored import Stored, stored
from upweight.data.tables import columns_of
from upweight.errors import InvalidInput
from upweight.model.encoders import whole_examples


class SklearnEncoder:
    """Queries go through the Pipeline's transformers, and labels through the estimator's classes."""

    def __init__(self, transformers: Any, estimator: Any, built: Built | None = None, mark: object = None) -> None:
        self.transformers = transformers
        self.estimator = estimator
        self.built = built
        self.mark = object() if mark is None else mark  # what Examples carry that were encoded in this way

    @property
    def refit(self) -> Again | None:
        """How the estimator is fitted again."""
        return None if self.built is None else self.built.again

    @property
    def feature_names(self) -> list[str] | None:
        """What the transformers call their output, or the DataFrame of fit() its columns."""
        if self.transformers is not None:
            try:
                return [str(name) for name in self.transformers.get_feature_names_out()]
            except (AttributeError, ValueError, TypeError):  # a transformer that gives no names
                return None
        names = getattr(self.estimator, "feature_names_in_", None)
        return None if names is None else [str(name) for name in names]

    def unselected(self) -> SklearnEncoder:
        """The same with all columns of X."""
        assert self.built is not None
        return SklearnEncoder(self.transformers, self.estimator, replace(self.built, inputs=AsGiven()))

    def movable(self, rows: NDArray[np.int64]) -> Inputs:  # noqa: ARG002
        """Between the objective's inputs and the columns that the estimator sees."""
        assert self.built is not None
        self.built.inputs.check_movable()
        return self.built.inputs

    def edited(self, rows: NDArray[np.int64], X: Any, y: Any) -> SklearnEncoder:
        """The same with other rows for fit() to run on."""
        assert self.built is not None
        again = self.built.again
        if again is None:
            return self
        columns, labels = again.fit.X, np.asarray(again.fit.y)
        if X is not None:
            new_rows = self.built.inputs(self.rows(X)) if again.encoded else self.rows(X)
            columns = with_lines(columns, rows, new_rows, "X_new")
        if y is not None:
            new = np.asarray(y)
            labels = labels.astype(np.result_type(labels, new), copy=True)
            labels[rows] = new.reshape(labels[rows].shape)
        built = replace(self.built, again=replace(again, fit=replace(again.fit, X=columns, y=labels)))
        return SklearnEncoder(self.transformers, self.estimator, built, self.mark)

    def reweighted(self, share: float) -> SklearnEncoder:
        """The same with a fit() that knows what its rows' weights sum to now."""
        assert self.built is not None
        again = self.built.again
        if again is None or share == 1:
            return self
        built = replace(self.built, again=replace(again, before=again.before * share))
        return SklearnEncoder(self.transformers, self.estimator, built, self.mark)

    def check_new(self, X: Any) -> None:
        """Kernel features hold training rows only."""
        assert self.built is not None
        if not isinstance(self.built.inputs, Features):
            return
        if isinstance(X, Examples) and X.encoded_by is self.mark:
            message = (
                "These Examples are kernel features already, and a new training row needs its inputs. Pass arrays."
            )
            raise InvalidInput(message)
        self.built.inputs.check_new(self.rows(X.x if isinstance(X, Examples) else X))

    def columns(self, X: Any, y: Any, ids: Any = None) -> tuple[Any, Any, Any]:
        """X, y and ids as arrays where X is a table, with the columns that the model was fitted on."""
        first = self.estimator if self.transformers is None else self.transformers
        names = getattr(first, "feature_names_in_", None)
        frames = self.transformers is not None and names is not None
        return columns_of(stored(X), y, ids, features=names, frames=frames)

    def rows(self, X: Any) -> Any:
        """X as the final estimator sees it: a 2-d array, a CSR matrix, or rows that stay in their file."""
        if self.transformers is not None:
            X = self._transformed_blocks(X) if isinstance(X, Stored) else self._transformed(X)
        names = getattr(self.estimator, "feature_names_in_", None)
        if self.transformers is None and names is not None and hasattr(X, "columns") and list(X.columns) != list(names):
            raise InvalidInput(_other_columns(list(X.columns), list(names)))
        array = as_array(X, "X")
        if array.ndim != 2:
            message = (
                f"X has shape {tuple(array.shape)}; it needs two axes, (rows, features). Write X.reshape(1, -1) for "
                "a single row."
            )
            raise InvalidInput(message)
        expected = getattr(self.estimator, "n_features_in_", None)  # an SVC of a function does not know it
        if expected is not None and array.shape[1] != expected:
            message = (
                f"X has {array.shape[1]} features, and the model was fitted on {expected}. Pass the same columns as "
                "in fit()."
            )
            raise InvalidInput(message)
        return array

    def examples(self, X: Any, y: Any = None) -> Examples:
        """Queries or new rows as examples."""
        whole = whole_examples(X, y)
        if whole is not None and whole.encoded_by is self.mark:
            return whole
        if whole is not None:
            refuse_encoded(whole)
            X, y = whole.x, whole.y
        if X is None:
            message = f"{type(self.estimator).__name__} takes arrays, not a Dataset. Pass (Xq, yq) as arrays."
            raise InvalidInput(message)
        X, y, _ = self.columns(X, y)
        refuse_sparse_targets(y)
        weights = None if whole is None else whole.sample_weight
        assert self.built is not None
        inputs = self.built.inputs(self.rows(X))
        made = Examples(inputs, None if y is None else self.built.targets(y), sample_weight=weights)
        made.names = names_of(X, y, None, len(made)) if whole is None else whole.names
        made.encoded_by = self.mark
        return made

    def targets(self, y: Any) -> Tensor:
        """Labels as the loss expects them."""
        refuse_sparse_targets(y)
        assert self.built is not None
        return as_tensor(self.built.targets(y))

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """The factor in wᵢ of each encoded target."""
        assert self.built is not None
        return self.built.class_weights(y.numpy())

    def _transformed(self, X: Any) -> Any:
        try:
            return self.transformers.transform(X)
        except Exception as error:
            message = f"The pipeline's transformers refused X: {error}. Pass rows like those that fit() was given."
            raise InvalidInput(message) from error

    def _transformed_blocks(self, X: Stored) -> Any:
        """The same, block by block whenever rows are read; sparse rows are kept, for they fit in memory."""

        def of_block(block: Any) -> Any:
            rows = self._transformed(block)
            return rows.tocsr() if scipy.sparse.issparse(rows) else np.asarray(rows)

        blocks = X.mapped(of_block)
        if not scipy.sparse.issparse(of_block(X.source.read(0, 1))):
            return blocks
        return scipy.sparse.vstack([blocks[at : at + blocks.block_rows] for at in range(0, len(X), blocks.block_rows)])


def _other_columns(given: list[Any], fitted: list[Any]) -> str:
    """What is wrong with the columns of a DataFrame: too few, too many, or in another order."""
    differences = [
        f"{word} {', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for word, names in (
            ("lacks", [name for name in fitted if name not in given]),
            ("adds", [name for name in given if name not in fitted]),
        )
        if names
    ]
    if differences:
        return (
            f"X has {len(given)} columns and the model was fitted on {len(fitted)}: X {' and '.join(differences)}. "
            "Was the target, or an index, left in it? Pass X[list(model.feature_names_in_)]."
        )
    place = next((i for i, (a, b) in enumerate(zip(given, fitted, strict=False)) if a != b), len(fitted))
    shown = slice(place, place + 8)
    return (
        f"X has the columns {given[shown]}{f' from column {place} on' if place else ''}, and the model was fitted on "
        f"{fitted[shown]}. Pass the same columns in the same order: X[list(model.feature_names_in_)]."
    )


def refuse_encoded(examples: Examples) -> None:
    """Raises for examples of another influence: encoding twice would scale inputs and number labels twice.

    Raises:
        InvalidInput: if they were encoded.
    """
    if examples.encoded_by is not None:
        message = "These Examples were prepared by another model's influence. Pass the original (X, y) instead."
        raise InvalidInput(message)
