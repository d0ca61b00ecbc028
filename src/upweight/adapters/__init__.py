"""From a fitted model to its Influence: one call, and an adapter for each kind of model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from upweight.adapters import module
from upweight.adapters.criteria import is_criterion
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.influence.face import Influence
from upweight.operators import Curvature
from upweight.runs import threads
from upweight.solvers import Solver


@threads.shared()
def explain(
    model: Any,
    X: Any,
    y: Any = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    penalty: float | Callable[[Any], Tensor] | None = None,
    parameters: Iterable[str] | Callable[[str], bool] | None = None,
    sample_weight: Any = None,
    ids: Any = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    reduction: str | None = None,
    penalty_per_example: bool | None = None,
    curvature: Curvature | None = None,
    solver: Solver | None = None,
    damping: float | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    memory_budget: float | int | str | None = None,
) -> Influence:
    """The Influence of a fitted model on the data that trained it: which rows made it say that?

    Args:
        model: a fitted scikit-learn estimator or Pipeline, whose loss, penalty, intercept and class weights are read
            off it; or a torch module, in the mode it should be explained in.
        X: the training inputs; row i of everything that is returned is row i here. An array, a tensor, a sparse matrix
            or a DataFrame; a map-style Dataset of (x, y), with y omitted; for a model of named inputs also a dict of
            columns, a list of dicts, a Hugging Face Dataset, or the DataLoader that it was trained with. Rows that lie
            in a file stay there: a memmap, a zarr array, or a table of pyarrow or Hugging Face whose columns are
            features (docs/recipes/large-data.md).
        y: the training targets; omitted where X holds them, under `labels` or `label`. The name of a column where X is
            a table.
        loss: for a module, the criterion(output, target) that training minimised, for example
            torch.nn.functional.cross_entropy; class weights, ignored labels and token means of CrossEntropyLoss and
            NLLLoss become weights of the rows, wᵢ = n cᵢ/Σc with cᵢ what row i counts in the mean. For an estimator
            whose loss has kinks, the smooth one that stands for it: losses.smooth_hinge(t), 0.001 by default. None for
            a transformers model asks the model itself, whose tokens then count as in its own mean.
        penalty: for a module, what was added to the criterion of all rows: a float λ means (λ/2)‖θ‖² (weight_decay), a
            function of params anything else. Beside reduction="sum" it is the penalty of the sum.
        parameters: for a module, the names (or a test on names) to differentiate; None takes all with requires_grad.
        sample_weight: the weights that were given to fit().
        ids: n different names of the rows, shown beside values in every table and file, or the column of a table that
            holds them; None takes the index of a DataFrame or Series, or a Dataset's column `id` or attribute `ids`,
            where that names every row once.
        collate_fn: from a list of rows to a batch, for rows that are no numbers yet, as in a DataLoader. Without it
            rows of unequal length are padded at their end, with a mask, and their labels with −100.
        reduction: for a cross-entropy of several labels a row, what training took the mean of: "tokens", all counted
            labels alike, or "rows", the mean of the rows' own means, so that every row has weight 1. None is "tokens",
            the criterion's own mean over a batch; docs/math.md, "What was minimised", says which a Trainer takes.
        penalty_per_example: whether removing a row removes its share of the penalty; None means the estimator's own
            meaning of leaving a row out (sample_weight=0; for SGD a smaller sum, so True), and that of deleting it from
            the script for modules: True beside a mean, False beside a sum.
        curvature: an operator specification; None lets `defaults` choose.
        solver: a solver specification; None lets `defaults` choose.
        damping: λ of (C + λI) x = v; None means 0 for scikit-learn, and the rule in `defaults` for modules.
        batch_size: examples per batch; None fits the memory.
        progress: True or False forces progress bars on or off; None shows them on a terminal only.
        memory_budget: bytes, or words such as "2 GB", that may be taken beside data and model; None leaves each part
            its own limit. See `Influence.plan` for what will be taken.

    Raises:
        UnsupportedModel: if the theory has no answer for the model.
        InvalidInput: if data and model do not fit together.

    >>> from sklearn.linear_model import Ridge
    >>> X, y = [[0.0], [1.0], [2.0]], [0.0, 2.0, 2.0]
    >>> influence = explain(Ridge(alpha=1.0).fit(X, y), X, y)
    >>> influence.on_loss([[3.0]], [3.0]).values.round(3)
    array([[0.148, 0.148, 0.   ]])
    """
    settings: dict[str, Any] = {
        "sample_weight": sample_weight,
        "ids": ids,
        "penalty_per_example": penalty_per_example,
        "curvature": curvature,
        "solver": solver,
        "damping": damping,
        "batch_size": batch_size,
        "progress": progress,
        "memory_budget": memory_budget,
    }
    if isinstance(model, torch.nn.Module):
        asked = {"loss": loss, "penalty": penalty, "parameters": parameters, "collate_fn": collate_fn}
        asked["reduction"] = reduction
        return module.explain(model, X, y, **asked, **settings)
    _refuse_wrapper(model)
    if "sklearn" in sys.modules and (hasattr(model, "get_params") or hasattr(model, "fit")):
        from upweight.adapters import sklearn

        others = {"penalty": penalty, "parameters": parameters, "collate_fn": collate_fn, "reduction": reduction}
        given = [name for name, value in others.items() if value is not None]
        if given:
            message = (
                f"{', '.join(given)} was given for {type(model).__name__}, whose own is read off the estimator. "
                "Omit it, or write Influence(Objective(…), (X, y))."
            )
            raise InvalidInput(message)
        return sklearn.explain(model, X, y, loss=loss, **settings)
    if isinstance(model, type):
        message = f"{model.__name__} is a class, and not a model of it. Pass the object that was trained."
        raise UnsupportedModel(message)
    message = (
        f"{type(model).__name__} is neither a scikit-learn estimator nor a torch module. "
        "For any other model only the loss is needed: upweight.Influence(upweight.Objective(loss, params, "
        "penalty=…), (X, y))."
    )
    raise UnsupportedModel(message)


def _refuse_wrapper(model: Any) -> None:
    """Raises for an object that holds a torch module and is none, as skorch's nets and training loops do.

    Raises:
        UnsupportedModel: with the name of the module inside.
    """
    held = {
        name: value
        for name, value in getattr(model, "__dict__", {}).items()
        if isinstance(value, torch.nn.Module) and not name.startswith("_") and not is_criterion(value)
    }
    if not held:
        return
    name = "module_" if "module_" in held else next(iter(held))
    logs = type(getattr(model, "criterion_", None)) is torch.nn.NLLLoss
    skorch = (
        " skorch gives NLLLoss the logarithm of what the module returns: loss=lambda p, y: nll_loss(p.log(), y), with "
        "torch.nn.functional.nll_loss."
        if logs
        else ""
    )
    message = (
        f"{type(model).__name__} holds a torch module and is none itself. Explain the module that was trained, with "
        f"the loss that training minimised: explain(model.{name}, X, y, loss=…).{skorch}"
    )
    raise UnsupportedModel(message)
