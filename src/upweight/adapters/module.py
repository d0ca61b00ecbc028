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

from upweight.adapters import frozen
from upweight.adapters.criteria import Criterion, Reduction, comparison, is_criterion, refused_comparison
from upweight.data.arrays import as_array, as_tensor
from upweight.data.examples import Examples
from upweight.data.trees import batch_length, leaves, take, tree_map
from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel, UpweightError, first_line
from upweight.influence import defaults
from upweight.influence.face import Influence
from upweight.model import calculus, routes
from upweight.model.encoders import Movable, whole_examples
from upweight.model.modules import forward
from upweight.model.objective import Objective

_SPREAD_ROWS = 8
_LABEL_ROWS = 64  # at most so many more rows, one for each distinct label: class weights show only across labels


def explain(
    model: torch.nn.Module,
    X: Any,
    y: Any = None,
    *,
    loss: Criterion,
    penalty: float | Callable[[Any], Tensor] | None = None,
    parameters: Iterable[str] | Callable[[str], bool] | None = None,
    sample_weight: Any = None,
    ids: Any = None,
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
    whole = whole_examples(X, y, sample_weight, ids)
    examples = whole or Examples(X, y, sample_weight=sample_weight, ids=ids)
    probe = examples.batch(_probe_rows(examples))
    if not isinstance(probe, tuple | list) or len(probe) != 2:
        message = (
            "A module is explained on (x, y) examples. Pass X and y, or a Dataset of (x, y); for other shapes write "
            "Objective(loss, params)."
        )
        raise InvalidInput(message)

    path = frozen.split(model, parameters)
    parts = None if path is None else frozen.headed(model, path, probe[0])
    if parts is not None:
        asked = {"loss": loss, "penalty": penalty, "penalty_per_example": penalty_per_example}
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

    reduction = Reduction.of(loss)
    readings = _readings(probe, defaults.precision(model))
    try:
        reading, objective = _working(lambda reading: build(reading, reduction), readings, probe)
    except InvalidInput as error:  # perhaps of one row alone, which a loss of several rows has no value for
        how = _comparison(model, reduction, probe)
        raise (refused_comparison(reduction.name, how) if how else error) from error.__cause__
    if examples.x is not None:
        examples = _read(examples, reading, reading.labels(examples.y))
    seen = examples if examples.x is not None else probe
    if reduction.counts_alike(_targets(reading, seen)):
        objective = build(reading, reduction.plain())
        scale = 1.0
    else:
        examples = copy(examples)
        counted = reduction.counted(_targets(reading, examples))
        scale = reduction.scale(counted)
        examples.weights = examples.sample_weight * counted * scale
        _name_ignored(reduction, counted)
    _refuse_batch_effects(model, reading.criterion(reduction.criterion), objective, reading.batch(probe), reduction)
    objective = replace(objective, name=f"{objective.name}{_precision_in_words(model, reading, objective)}")
    encoder = ModuleEncoder(reading, reduction, scale)
    return Influence(objective, examples, encoder=encoder, **settings)


def _refuse_without_forward(model: torch.nn.Module) -> None:
    """Raises for a module that cannot be called, such as a LightningModule with a training_step only.

    Raises:
        UnsupportedModel: with the name of a module inside that can.
    """
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    if owner is not torch.nn.Module and owner.__name__ != "LightningModule":
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
        "they have weight 0 and no influence."
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
    encoder = frozen.FrozenEncoder(inner.encoder, extractor, examples, batch_size=batch_size, progress=progress)
    return Influence(objective, inner.examples, encoder=encoder, **settings)


@dataclass(frozen=True)
class Reading:
    """How stored numbers are read: whole numbers in floats and in integers mean the same, but modules are particular.

    Args:
        dtype: precision of weights and inputs; None keeps the module's own.
        x_floats: integer inputs are turned into floats.
        y_kind: "kept", "class" (int64 class numbers) or "float".
    """

    dtype: torch.dtype | None
    x_floats: bool
    y_kind: str

    def criterion(self, loss: Criterion, name: str = "criterion") -> Criterion:
        """`loss` on targets of this reading; also reads those that a Dataset returns."""

        def read(output: Tensor, target: Tensor) -> Tensor:
            target = self._target(target)
            return loss(output, target.to(output.dtype) if target.is_floating_point() else target)

        read.__name__ = name
        return read

    def batch(self, batch: Any) -> tuple[Any, Tensor]:
        """(x, y) as this reading has them."""
        return tree_map(self._input, batch[0]), self._target(batch[1])

    def inputs(self, X: Any) -> Any:
        """Stored inputs as this reading has them."""
        return self._input(as_tensor(X)) if self.x_floats else X

    def labels(self, y: Any) -> Any:
        """Stored targets as this reading has them.

        Raises:
            InvalidInput: if class numbers are wanted and a target is not a whole number.
        """
        if y is None or self.y_kind == "kept":
            return y
        target = as_tensor(y)
        if self.y_kind == "class" and target.is_floating_point() and not bool((target == target.round()).all()):
            wrong = float(target[target != target.round()].flatten()[0])
            message = (
                f"y holds {wrong:g}, which is no class number, and the criterion wants whole class numbers 0 … K−1. "
                "Encode the labels, or use a regression loss."
            )
            raise InvalidInput(message)
        return self._target(target)

    def _input(self, x: Any) -> Any:
        floats = not self.x_floats or not isinstance(x, Tensor) or x.is_floating_point()
        return x if floats else x.to(torch.float64)

    def _target(self, y: Tensor) -> Tensor:
        if self.y_kind == "class":
            return y.long()
        return y.to(torch.float64) if self.y_kind == "float" and not y.is_floating_point() else y


@dataclass(frozen=True)
class ModuleEncoder:
    """Queries and new labels, read as the training data were.

    Args:
        reading: how numbers are read.
        reduction: how the criterion weighs examples.
        scale: n/Σc, from what an example counts in the criterion to its weight.
    """

    reading: Reading
    reduction: Reduction
    scale: float = 1.0

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
        whole = whole_examples(X, y) or Examples(X, y)
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


def _probe_rows(examples: Examples) -> NDArray[np.int64]:
    """Rows spread over the data, and the first row of every label."""
    if examples.y is None or examples.y.ndim != 1:
        return examples.spread(_LABEL_ROWS)
    _, first = np.unique(np.asarray(examples.y), return_index=True)
    return np.union1d(examples.spread(_SPREAD_ROWS), first[:_LABEL_ROWS])


def _precision_in_words(model: torch.nn.Module, reading: Reading, objective: Objective) -> str:
    """What is worth saying about the precision of the arithmetic, or nothing."""
    acts = str(objective.reference.dtype).rpartition(".")[2]
    wanted = str(defaults.precision(model)).rpartition(".")[2]
    if reading.dtype is None and acts != wanted:
        return f" in {acts}, for the module refuses {wanted}"
    own = {str(parameter.dtype).rpartition(".")[2] for parameter in model.parameters()}
    low = sorted(own & {"float16", "bfloat16"})
    return f" in {acts}, from {' and '.join(low)} weights" if low else "" if acts == "float64" else f" in {acts}"


def _working(
    build: Callable[[Reading], Objective], readings: Iterable[Reading], probe: Any
) -> tuple[Reading, Objective]:
    """The first reading under which the loss of an example can be computed and differentiated.

    Raises:
        InvalidInput: if there is none; the text is that of the plainest reading.
    """
    failures: list[UpweightError] = []
    few = tree_map(lambda leaf: leaf[:2], probe)
    for reading in readings:
        objective = build(reading)
        try:
            with torch.random.fork_rng(devices=[]):
                routes.probe(objective, reading.batch(few))
        except UpweightError as error:
            if not isinstance(error.__cause__, RuntimeError | TypeError | ValueError | IndexError):
                raise
            failures.append(error)
            continue
        return reading, objective
    raise next((error for error in failures if isinstance(error, UnsupportedModel)), failures[0])


def _readings(probe: Any, precision: torch.dtype) -> Iterable[Reading]:
    y = probe[1]
    if y.is_floating_point():
        kinds = ["kept", "class"] if bool((y == y.round()).all()) else ["kept"]
    else:
        kinds = ["float", "class"]  # a criterion that takes them as floats is a regression; class numbers it refuses
    integers = all(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in leaves(probe[0]))
    for dtype in (precision, None):
        for x_floats in (False, True) if integers else (False,):
            for kind in kinds:
                yield Reading(dtype, x_floats, kind)


def _refuse_batch_effects(
    model: torch.nn.Module, criterion: Criterion, objective: Objective, probe: Any, reduction: Reduction
) -> None:
    """What the module and its criterion give for a batch must be what they give one by one, and its mean or sum.

    Raises:
        UnsupportedModel: if the output for an example depends on the others in its batch.
        InvalidInput: if the criterion weighs examples unequally in a way that is not known.
    """
    reference = objective.reference
    cast = calculus.ready(objective, probe)
    size = batch_length(cast)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {  # copies, for a module may write into its buffers
        name: t.detach().to(reference.dtype if t.is_floating_point() else t.dtype, copy=True)
        for name, t in state.items()
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broadcasting criterion warns; its value then differs, which is what we seek
        try:
            singles = torch.stack([objective.loss(objective.params, take(cast, b)) for b in range(size)])
            rows = [objective.outputs(objective.params, take(cast, b)) for b in range(size)]  # type: ignore[misc]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = (
                f"The loss failed on an example ({first_line(error)}); the probed ones have the targets "
                f"{cast[1].flatten()[:12].tolist()}. Usual reason: a label that the model has no output for."
            )
            raise InvalidInput(message) from error
        if not bool(torch.isfinite(singles).all()):
            row = int(torch.nonzero(~torch.isfinite(singles))[0])
            message = (
                f"The loss of an example alone is {float(singles[row])} (target {cast[1][row].tolist()}): an ignored "
                "label (ignore_index) inside a function, or log(0). Pass the criterion itself, such as "
                "torch.nn.CrossEntropyLoss(), whose ignored labels become weights of 0; or leave such rows out."
            )
            raise InvalidInput(message)
        if rows[0].ndim == 0:
            message = (
                f"{type(model).__name__} returns a single number without a batch axis for a batch of one; it probably "
                "ends in .squeeze(). Use .squeeze(-1), which leaves the batch axis."
            )
            raise InvalidInput(message)
        one_by_one = torch.cat(rows)
        try:
            together = forward(model, state, cast[0])
            batch = criterion(together, cast[1])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = (
                f"The model and criterion accept one example but not a batch of {size} ({first_line(error)}). Pass a "
                "model of batches and loss(output, target) that takes a batch."
            )
            raise InvalidInput(message) from error
    _compare_outputs(model, together, one_by_one)
    shapes = (tuple(together.shape), [tuple(leaf.shape) for leaf in leaves(cast[1])])
    how = comparison(criterion, together, cast[1])
    _compare_losses(reduction, singles, reduction.counted(cast[1]), batch, shapes, how)
    _name_a_sum(reduction, singles, batch, objective)


def _compare_outputs(model: torch.nn.Module, together: Tensor, one_by_one: Tensor) -> None:
    gap = float((together - one_by_one).abs().max()) if together.shape == one_by_one.shape else float("inf")
    tolerance = 1e-8 if together.dtype == torch.float64 else 1e-3
    if gap > tolerance * (1 + float(one_by_one.abs().max())):
        message = (
            f"{type(model).__name__} gives other outputs for a batch {tuple(together.shape)} than for its examples one "
            f"by one {tuple(one_by_one.shape)}: the largest difference is {gap:.3g}. Something in it mixes the "
            "examples of a batch (batch statistics, a mean over axis 0), so no example has a loss of its own."
        )
        raise UnsupportedModel(message)


def _comparison(model: torch.nn.Module, reduction: Reduction, probe: Any) -> str:
    """How the criterion compares the rows of a batch, as the module itself takes them; "" if it does not, or fails."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
            x = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, probe[0])
            return comparison(reduction.criterion, forward(model, state, x), probe[1])
    except (RuntimeError, ValueError, TypeError, IndexError, StopIteration):
        return ""


def _compare_losses(
    reduction: Reduction,
    singles: Tensor,
    counted: NDArray[np.float64],
    batch: Tensor,
    shapes: tuple[Any, Any],
    compares: str,
) -> None:
    if batch.shape != ():
        message = (
            f"The criterion returns a tensor of shape {tuple(batch.shape)} for a batch; it must return one number. "
            "Use reduction='mean'."
        )
        raise InvalidInput(message)
    share = torch.from_numpy(counted / counted.sum()).to(singles)
    mean, total, value = float((singles * share).sum()), float(singles.sum()), float(batch)
    size = float(singles.abs().max()) + 1e-12
    is_mean, is_sum = abs(value - mean) <= 1e-5 * size, abs(value - total) <= 1e-5 * size * len(singles)
    if reduction.total and is_mean and not is_sum:
        message = (
            f"{reduction.name} says reduction='sum' and gives the mean over a batch, {value:.6g} of {len(singles)} "
            "examples, so that what a penalty stands beside is not known. Pass it with reduction='mean', or sum."
        )
        raise InvalidInput(message)
    if not is_mean and not is_sum and compares:
        raise refused_comparison(reduction.name, compares)
    if not is_mean and not is_sum:
        message = (
            f"{reduction.name} gives {value:.6g} for {len(singles)} examples whose single values have the mean "
            f"{mean:.6g} and the sum {total:.6g}. It weighs examples unequally in a way that is not known, or "
            f"broadcasts outputs {shapes[0]} against targets {shapes[1]}. Class weights, "
            "ignored labels and means over tokens are read off torch.nn.CrossEntropyLoss and NLLLoss, or a "
            "functools.partial of their functions: pass one of them in place of a function of your own; make output "
            "and target shapes equal for the others."
        )
        raise InvalidInput(message)


def _name_a_sum(reduction: Reduction, singles: Tensor, batch: Tensor, objective: Objective) -> None:
    """A TheoryWarning about a function that sums over a batch, beside whose sum a penalty would weigh otherwise."""
    mean, total, value = float(singles.mean()), float(singles.sum()), float(batch)
    summing = abs(value - total) < abs(value - mean) and not reduction.total
    if not summing or objective.penalty is None:
        return
    message = (
        f"{reduction.name} gives the sum over a batch. As a plain function it is taken for the loss of one example, "
        "and the penalty stands beside the mean: R(θ) = (1/n) Σ L + penalty. If training minimised the sum + penalty, "
        "pass penalty=penalty/n and penalty_per_example=False, or a torch.nn criterion with reduction='sum'."
    )
    warnings.warn(message, TheoryWarning, stacklevel=5)
