"""torch modules: criterion(model(x[None]), y[None]) as the loss of one example, and the checks that make that true."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.adapters import frozen, low_rank, own_loss
from upweight.adapters.criteria import Criterion, Reduction, is_criterion
from upweight.adapters.one_by_one import (
    compares,
    refuse_batch_effects,
    refuse_padding_that_counts,
    refused_comparison,
)
from upweight.adapters.reading import Reading, readings, working
from upweight.data.arrays import as_array, as_tensor
from upweight.data.examples import Examples
from upweight.data.records import Records
from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel
from upweight.influence import defaults
from upweight.influence.face import Influence
from upweight.model.encoders import Movable, whole_examples
from upweight.model.modules import Called
from upweight.model.objective import Objective
from upweight.runs.machine import budget_of

_SPREAD_ROWS = 8
_PROBED_ROWS = 16  # of named parts, whose labels are many a row
_LABEL_ROWS = 64  # at most so many more rows, one for each distinct label: class weights show only across labels


def explain(
    model: torch.nn.Module,
    X: Any,
    y: Any = None,
    *,
    loss: Criterion | None = None,
    penalty: float | Callable[[Any], Tensor] | None = None,
    parameters: Iterable[str] | Callable[[str], bool] | None = None,
    sample_weight: Any = None,
    ids: Any = None,
    collate_fn: Any = None,
    reduction: str | None = None,
    penalty_per_example: bool | None = None,
    **settings: Any,
) -> Influence:
    """The Influence of a torch module on its training data.

    Up to 50,000 parameters are evaluated in float64, where the module allows it, so that residuals mean something;
    larger networks in float32, or in float64 if that is what their weights are; float16 and bfloat16 weights never in
    their own precision unless the module insists. The module itself is not touched; `repr` says which precision acts,
    and `Objective.from_module(..., dtype=…)` decides otherwise.

    Raises:
        InvalidInput: if the criterion is no mean (or sum) of single-example losses, or refuses the data.
        UnsupportedModel: if nothing can be differentiated, or the loss is random or depends on the batch.
    """
    if parameters is not None and not callable(parameters) and not isinstance(parameters, str):
        parameters = list(parameters)  # it is gone through more than once
    _refuse_without_forward(model)
    parameters = low_rank.trained(model, parameters)
    adapters = low_rank.in_words(model, parameters)
    model, loss, examples, rows = _apart(model, X, y, loss, sample_weight=sample_weight, ids=ids, collate_fn=collate_fn)
    probe = examples.batch(_probe_rows(examples, _LABEL_ROWS if rows is None else _PROBED_ROWS))
    model, loss = own_loss.read_apart(model, loss, probe)
    path = None if isinstance(model, Called) else frozen.split(model, parameters)
    parts = None if path is None else frozen.headed(model, path, probe[0])
    if parts is not None:
        asked = {"loss": loss, "penalty": penalty, "penalty_per_example": penalty_per_example, "reduction": reduction}
        features = frozen.features_of(parts[0], examples, settings)
        if features is not None:
            return _explain_head(*parts, examples, features, asked, settings)

    def build(reading: Reading, reduction: Reduction) -> Objective:
        return Objective.from_module(
            model,
            reading.criterion(reduction, reduction.name),
            penalty=reduction.penalty(penalty, len(examples)),
            penalty_per_example=reduction.penalty_per_example(penalty_per_example),
            parameters=parameters,
            dtype=reading.dtype,
        )

    weighing = Reduction.of(loss).taken(reduction)
    try:
        reading, objective = working(
            lambda reading: build(reading, weighing), readings(probe, defaults.precision(model)), probe
        )
    except InvalidInput as error:  # perhaps of one row alone, which a loss of several rows has no value for
        how = compares(model, weighing, probe)
        raise (refused_comparison(weighing.name, how) if how else error) from error.__cause__
    if examples.x is not None:
        examples = _read(examples, reading, reading.labels(examples.y))
    seen = examples if examples.x is not None else probe
    if weighing.counts_alike(_targets(reading, seen)):
        objective = build(reading, weighing.plain())
        scale = 1.0
    else:
        examples = copy(examples)
        counted = weighing.counted(_targets(reading, examples))
        scale = weighing.scale(counted)
        examples.weights = examples.sample_weight * counted * scale
        _name_ignored(weighing, counted)
    refuse_batch_effects(
        model, reading.criterion(weighing.criterion), objective, reading.batch(probe), weighing.of_a_batch()
    )
    if rows is not None:
        refuse_padding_that_counts(objective, examples, rows)
    objective = replace(objective, name=f"{objective.name}{adapters}{_precision_in_words(model, reading, objective)}")
    encoder = ModuleEncoder(reading, weighing, scale, rows, model.read if isinstance(model, Called) else None)
    return Influence(objective, examples, encoder=encoder, **settings)


def _apart(
    model: torch.nn.Module, X: Any, y: Any, loss: Criterion | None, *, sample_weight: Any, ids: Any, collate_fn: Any
) -> tuple[torch.nn.Module, Criterion, Examples, Records | None]:
    """The module, its criterion, the examples (x, y), and the rows that they were, where these have named parts.

    Raises:
        InvalidInput: if there is no criterion, or the examples are no pairs.
    """
    whole = whole_examples(X, y, sample_weight, ids)
    named = None if whole else own_loss.prepared(model, X, y, loss, collate_fn)
    if named is not None:
        model, loss, X, y = named.model, named.loss, named.rows, None
    if loss is None:
        message = (
            f"{type(model).__name__} is a torch module, which does not know its loss. Pass the criterion: "
            "explain(model, X, y, loss=torch.nn.functional.cross_entropy)."
        )
        raise InvalidInput(message)
    examples = whole or Examples(X, y, sample_weight=sample_weight, ids=ids)
    first = examples.batch([0])
    if not isinstance(first, tuple | list) or len(first) != 2:
        message = (
            "A module is explained on (x, y) examples. Pass X and y, or a Dataset of (x, y); for other shapes write "
            "Objective(loss, params)."
        )
        raise InvalidInput(message)
    return model, loss, examples, None if named is None else named.rows


def _refuse_without_forward(model: torch.nn.Module) -> None:
    """Raises for a module that cannot be called, such as a LightningModule with a training_step only.

    Raises:
        UnsupportedModel: with the name of a module inside that can.
    """
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    if "forward" in vars(model) or (owner is not torch.nn.Module and owner.__name__ != "LightningModule"):
        return
    inside = next((name for name, child in model.named_children() if not is_criterion(child)), None)
    which = "" if inside is None else f", which is probably explain(model.{inside}, X, y, loss=…)"
    message = (
        f"{type(model).__name__} has no forward(x) of its own, so it cannot be called on a batch. Explain the network "
        f"that its training step calls{which}; or write forward()."
    )
    raise UnsupportedModel(message)


def _read(examples: Examples, reading: Reading, labels: Any) -> Examples:
    """The same rows with inputs and labels as they are read."""
    made = Examples(reading.inputs(examples.x), labels, sample_weight=examples.sample_weight)
    made.names = examples.names
    return made


def _targets(reading: Reading, seen: Any) -> Tensor:
    """The targets of Examples, or of a batch, as they are read."""
    y = seen.targets() if isinstance(seen, Examples) else seen[1]
    return reading.labels(y)


def _name_ignored(reduction: Reduction, counted: NDArray[np.float64]) -> None:
    """A TheoryWarning about training rows that the criterion does not count at all."""
    rows = np.flatnonzero(counted == 0)
    if not len(rows):
        return
    listed = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    message = (
        f"{reduction.name} does not count row(s) {listed} (label {reduction.ignore_index}, or a class of weight 0): "
        "they have weight 0 and no influence. Leave them out, and no value of the others changes."
    )
    warnings.warn(message, TheoryWarning, stacklevel=4)


def _explain_head(
    extractor: frozen.Extractor,
    head: frozen.Headed,
    examples: Examples,
    features: Tensor,
    asked: dict[str, Any],
    settings: dict[str, Any],
) -> Influence:
    """The Influence of a head on the features that a frozen network computes for it."""
    batch_size, progress = settings.get("batch_size"), settings.get("progress")
    y = examples.targets()
    assert y is not None  # the examples are (x, y) pairs
    seen = Examples(features, y, sample_weight=examples.sample_weight)
    seen.names = examples.names
    inner = explain(head, seen, parameters=lambda _: True, **asked, **settings)
    count = sum(parameter.numel() for parameter in extractor.model.parameters())
    name = inner.objective.name.replace(type(head).__name__, type(extractor.model).__name__)
    objective = replace(
        frozen.closed_form(inner.objective, head, features, as_tensor(inner.examples.y)),
        coverage=inner.objective.size / count,
        settled={name: tensor for name, tensor in extractor.state.items() if not name.startswith(f"{extractor.path}.")},
        name=f"{name}, '{head.path}' on its features",
    )
    inner.examples.encoded_by = extractor
    walking = (batch_size, progress, budget_of(settings.get("memory_budget")))
    encoder = frozen.FrozenEncoder(inner.encoder, extractor, examples, {}, *walking)
    return Influence(objective, inner.examples, encoder=encoder, **settings)


@dataclass(frozen=True)
class ModuleEncoder:
    """Queries and new labels, read as the training data were.

    Args:
        reading: how numbers are read.
        reduction: how the criterion weighs examples.
        scale: n/Σc, from what an example counts in the criterion to its weight.
        rows: the training rows, where they are of named parts.
        read: from what the module returns to the outputs, where that is no tensor.
    """

    reading: Reading
    reduction: Reduction
    scale: float = 1.0
    rows: Records | None = None
    read: Callable[[Any], Tensor] | None = None

    @property
    def refit(self) -> None:
        """None: how the module was trained is not known."""
        return None

    @property
    def feature_names(self) -> None:
        """None: a module's inputs have no names."""
        return None

    def unselected(self) -> ModuleEncoder:
        """Itself."""
        return self

    def movable(self, rows: NDArray[np.int64]) -> Movable:  # noqa: ARG002
        """The derivatives as they are."""
        return Movable()

    def reweighted(self, share: float) -> ModuleEncoder:  # noqa: ARG002
        """Itself."""
        return self

    def check_new(self, X: Any) -> None:
        """Nothing to say."""

    def edited(self, rows: NDArray[np.int64], X: Any, y: Any) -> ModuleEncoder:  # noqa: ARG002
        """Itself."""
        return self

    def examples(self, X: Any, y: Any = None) -> Examples:
        """X and y as examples.

        Raises:
            InvalidInput: if the criterion counts nothing of one of them, so that it has no loss.
        """
        other = None if self.rows is None or isinstance(X, Examples) else self.rows.read_like(X, y)
        whole = whole_examples(X, y) or (Examples(X, y) if other is None else Examples(other))
        items = whole.x is None
        labels = whole.y
        if items and X is not whole and self.reduction.summed is not None:
            labels = whole.targets()
        labels = self.reading.labels(labels)
        if labels is not None and X is not whole:
            none = np.flatnonzero(self.reduction.counted(as_tensor(labels)) == 0)
            if len(none):
                message = (
                    f"Row {none[0]} has no label that {self.reduction.name} counts (ignore_index="
                    f"{self.reduction.ignore_index}), so its loss is not defined: torch gives NaN. Leave it out."
                )
                raise InvalidInput(message)
        if items:
            return whole
        return _read(whole, self.reading, labels)

    def targets(self, y: Any) -> Tensor:
        """y as a tensor."""
        return as_tensor(self.reading.labels(as_array(y, "y_new")))

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """What each target counts in the criterion's mean, in units of a row."""
        return self.reduction.counted(y) * self.scale


def _probe_rows(examples: Examples, count: int) -> NDArray[np.int64]:
    """Rows spread over the data, and the first row of every label; `count` of them where labels are not known.

    Of rows with several labels the first with the lowest and the highest of all, where one is rarely ignored.
    """
    if examples.y is None or examples.y.ndim != 1:
        return np.union1d(examples.spread(count), _outermost(examples.y))
    _, first = np.unique(np.asarray(examples.y), return_index=True)
    return np.union1d(examples.spread(_SPREAD_ROWS), first[:_LABEL_ROWS])


def _outermost(labels: Any) -> NDArray[np.int64]:
    """The first rows with the lowest and the highest of whole numbers in memory, several a row."""
    if not isinstance(labels, Tensor | np.ndarray) or "int" not in str(labels.dtype):
        return np.zeros(0, dtype=np.int64)
    flat = np.asarray(labels).reshape(-1)
    if not len(flat):
        return np.zeros(0, dtype=np.int64)
    return np.array([flat.argmin(), flat.argmax()]) // (len(flat) // len(labels))


def _precision_in_words(model: torch.nn.Module, reading: Reading, objective: Objective) -> str:
    """What is worth saying about the precision of the arithmetic, or nothing."""
    acts = str(objective.reference.dtype).rpartition(".")[2]
    wanted = str(defaults.precision(model)).rpartition(".")[2]
    if reading.dtype is None and acts != wanted:
        return f" in {acts}, for the module refuses {wanted}"
    own = {str(parameter.dtype).rpartition(".")[2] for parameter in model.parameters()}
    low = sorted(own & {"float16", "bfloat16"})
    return f" in {acts}, from {' and '.join(low)} weights" if low else "" if acts == "float64" else f" in {acts}"
