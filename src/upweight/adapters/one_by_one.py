"""What a module and its criterion give for a batch must be what they give one by one, and its mean or sum."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.adapters.criteria import Criterion, Reduction
from upweight.data.examples import Examples
from upweight.data.records import TOKENS, Records
from upweight.data.trees import batch_length, leaves, take, tree_map
from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel, first_line
from upweight.model import calculus
from upweight.model.agreement import tolerance
from upweight.model.modules import forward, plainly
from upweight.model.objective import Objective

_PREDICTED = 1e-3  # of the largest output: other kernels round otherwise
_COMPARED, _FEWEST = 8, 3  # rows on which it is tried whether a criterion compares them
_SHORTEST_OF = 32  # rows, among which a short and a long one are looked for
_PADDED, _PADDED_HALF = 1e-4, 3e-2  # of a loss: what paddings may change of it, in full precision and less


def refuse_batch_effects(
    model: torch.nn.Module, criterion: Criterion, objective: Objective, probe: Any, reduction: Reduction
) -> None:
    """What the module and its criterion give for a batch must be what they give one by one, and its mean or sum.

    Raises:
        UnsupportedModel: if the output for an example depends on the others in its batch.
        InvalidInput: if the criterion weighs examples unequally in a way that is not known.
    """
    reference = objective.reference
    outputs, output_loss = calculus.structure(objective)
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
            rows = [outputs(objective.params, take(cast, b)) for b in range(size)]
            singles = torch.stack([output_loss(row, take(cast, b)) for b, row in enumerate(rows)])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = (
                f"The loss failed on an example ({first_line(error)}); the probed ones have the targets "
                f"{cast[1].flatten()[:12].tolist()}. Usual reason: a label that the model has no output for. Pass "
                "labels 0 … K−1 to a model of K outputs."
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
    _compare_outputs(model, together, one_by_one, tolerance(objective, probe))
    _name_other_predictions(model, state, cast[0], together)
    shapes = (tuple(together.shape), [tuple(leaf.shape) for leaf in leaves(cast[1])])
    how = comparison(criterion, together, cast[1])
    _compare_losses(reduction, singles, reduction.counted(cast[1]), batch, shapes, how)
    _name_a_sum(reduction, singles, batch, objective)


def refuse_padding_that_counts(objective: Objective, examples: Examples, rows: Records) -> None:
    """What a row costs must not depend on how many paddings stand behind its end.

    Raises:
        InvalidInput: if it does, as where a criterion takes a softmax over the places of a row.
    """
    lengths = [len(x[TOKENS]) if TOKENS in x else 0 for x, _ in map(rows.parts, range(min(len(rows), _SHORTEST_OF)))]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    if lengths[short] == lengths[long]:
        return
    alone, beside = (float(calculus.losses(objective, examples.batch(some))[0]) for some in ([short], [short, long]))
    rounding = _PADDED if objective.reference.dtype.itemsize > 2 else _PADDED_HALF
    if abs(beside - alone) <= rounding * (1 + abs(alone)):
        return
    message = (
        f"Row {short} of {lengths[short]} tokens costs {alone:.6g} alone and {beside:.6g} beside row {long} of "
        f"{lengths[long]}, padded to its length: what stands behind its end counts. Usual reason: a softmax or a mean "
        "over the places of a row, as in answers that are a span. Pass rows of one length, padded as they were in "
        "training, with their attention_mask: tokenizer(texts, padding='max_length')."
    )
    raise InvalidInput(message)


def _compare_outputs(model: torch.nn.Module, together: Tensor, one_by_one: Tensor, rounding: float) -> None:
    gap = float((together - one_by_one).abs().max()) if together.shape == one_by_one.shape else float("inf")
    if gap > rounding * (1 + float(one_by_one.abs().max())):
        message = (
            f"{type(model).__name__} gives other outputs for a batch {tuple(together.shape)} than for its examples one "
            f"by one {tuple(one_by_one.shape)}: the largest difference is {gap:.3g}. Something in it mixes the "
            "examples of a batch (batch statistics, a mean over axis 0), so no example has a loss of its own. Call "
            "model.eval(), which ends batch statistics, or take the mean over axes of one example."
        )
        raise UnsupportedModel(message)


def _name_other_predictions(model: torch.nn.Module, state: dict[str, Tensor], x: Any, trained: Tensor) -> None:
    """A TheoryWarning about a model that predicts otherwise where nothing is differentiated, as it is asked later."""
    attention = torch.nn.TransformerEncoder | torch.nn.TransformerEncoderLayer | torch.nn.MultiheadAttention
    if not any(isinstance(module, attention) for module in model.modules()):
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            predicted = plainly(model, state, x)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return  # the way without gradients does not take what the other takes
    off = (predicted - trained).abs().reshape(-1) if predicted.shape == trained.shape else torch.tensor([torch.inf])
    if not bool((off > _PREDICTED * (1 + float(trained.abs().max()))).any()):
        return
    message = (
        f"{type(model).__name__} gives other outputs under torch.no_grad() in eval mode than where it is "
        f"differentiated; the largest difference is {float(off.max()):.3g}. Usual reason: there "
        "torch.nn.TransformerEncoder sets the outputs of padded positions to 0, and the model reads them, such as in a "
        "mean over positions. Values are of the outputs that were trained. Predict after "
        "torch.backends.mha.set_fastpath_enabled(False), which gives the same, or read no padded positions."
    )
    warnings.warn(message, TheoryWarning, stacklevel=5)


def compares(model: torch.nn.Module, reduction: Reduction, probe: Any) -> str:
    """How the criterion compares the rows of a batch, as the module itself takes them; "" if it does not, or fails."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
            x = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, probe[0])
            return comparison(reduction.criterion, forward(model, state, x), probe[1])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, StopIteration):
        return ""  # what is wrong is told where the loss is tried


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
    """A TheoryWarning about a function that sums over a batch, beside whose sum a penalty would weigh otherwise.

    `penalty_per_example=False` is what it says to pass, so whoever passes that has been told.
    """
    mean, total, value = float(singles.mean()), float(singles.sum()), float(batch)
    summing = abs(value - total) < abs(value - mean) and not reduction.total
    if not summing or objective.penalty is None or not objective.penalty_per_example:
        return
    message = (
        f"{reduction.name} gives the sum over a batch. As a plain function it is taken for the loss of one example, "
        "and the penalty stands beside the mean: R(θ) = (1/n) Σ L + penalty. If training minimised the sum + penalty, "
        "pass penalty=penalty/n and penalty_per_example=False, or a torch.nn criterion with reduction='sum'."
    )
    warnings.warn(message, TheoryWarning, stacklevel=5)


def comparison(criterion: Criterion, outputs: Tensor, targets: Tensor) -> str:
    """How a criterion compares the rows of a batch, as ranking, contrastive and Cox losses do, in words; "" if not.

    A mean or sum of losses of single rows, however weighted, gives a row twice what it gives it once, or double that;
    and it does not give every row alone the same number while rows together cost something else.
    """
    size = min(len(outputs), _COMPARED)
    with torch.no_grad():
        try:
            together = float(criterion(outputs, targets))
            alone = torch.stack([criterion(outputs[b : b + 1], targets[b : b + 1]) for b in range(size)]).double()
            twice = torch.stack([criterion(outputs[[b, b]], targets[[b, b]]) for b in range(size)]).double()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            return ""  # what else is wrong is said elsewhere
    if not np.isfinite(together) or size < _FEWEST:
        return ""
    if not bool(torch.isfinite(alone).any()):
        return f"a row alone costs {float(alone[0])}, and all together {together:.6g}"
    if not bool(torch.isfinite(alone).all()):
        return ""  # some rows have no loss: a label that is ignored, or log(0)
    near = 1e-6 * (float(alone.abs().max()) + abs(together))
    for once, double in zip(alone.tolist(), twice.tolist(), strict=True):
        if not (abs(double - once) <= near or abs(double - 2 * once) <= near):
            return f"a row alone costs {once:.6g}, and the same row twice {double:.6g}"
    same = float(alone.max() - alone.min()) <= near and float(outputs.double().std(0).max()) > near
    if same and min(abs(together - float(alone[0]) * k) for k in (1, len(outputs))) > near * len(outputs):
        return f"every row alone costs {float(alone[0]):.6g}, and all together {together:.6g}"
    return ""


def refused_comparison(name: str, how: str) -> InvalidInput:
    """The error for a criterion that compares rows."""
    message = (
        f"{name} compares the rows of a batch ({how}), as ranking, contrastive and Cox losses do, so no row has a loss "
        "of its own and removing one changes the loss of others. Make an example of what is compared: a Dataset of "
        "(pair or tuple of rows, target), with a loss of one such example, like softplus(−(f(x) − f(x′))); or take a "
        "likelihood of single rows, for survival times exp(f)·time − event·f."
    )
    return InvalidInput(message)
