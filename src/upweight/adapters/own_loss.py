"""Modules that take inputs by name and return more than a tensor, as transformers do: what is read off their output.

A model that computes its own loss is asked for it, and the loss is known again by its values: on a few rows it must be
one of

    cross-entropy of the labels one place ahead, a mean over tokens    causal language models
    cross-entropy of the labels in place, a mean over tokens           masked and sequence-to-sequence models, tagging
    cross-entropy, squares, or logistic losses of one label a row      classification and regression of sequences

so that outputs and loss stand apart, as the Gauss–Newton matrix needs them, and tokens that are not counted (−100)
become weights of rows.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from upweight.adapters.criteria import Criterion, Reduction
from upweight.data.records import LABELS, TOKENS, UNCOUNTED, Columns, Records, Rows, rows_of, unloaded
from upweight.data.trees import tree_map
from upweight.errors import InvalidInput, first_line
from upweight.model import calculus
from upweight.model.modules import Called, called, forward, refuse_training_mode

_PROBED = 4
_ROWS = 32  # among which a short and a long one are looked for
_TOLERANCE = 1e-4  # of a loss in float32 against the same from its outputs
_HALF = 3e-2  # of one in bfloat16 or float16
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Kind:
    """One of the losses that models compute themselves.

    Args:
        criterion: of read(logits) and labels.
        read: from logits to what the criterion takes.
        shifted: whether labels are those one place ahead.
        name: in words.
    """

    criterion: nn.Module
    read: Callable[[Tensor], Tensor]
    shifted: bool
    name: str

    def value(self, logits: Tensor, labels: Tensor) -> float:
        """The criterion, NaN where shapes do not fit."""
        try:
            z = self.read(logits.double())
            y = labels[:, 1:] if self.shifted else labels
            squares = isinstance(self.criterion, nn.MSELoss | nn.BCEWithLogitsLoss)
            if squares and z.shape != y.shape:
                return float("nan")
            return float(self.criterion(z, y.double() if squares else y.long()))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return float("nan")


def _ahead(logits: Tensor) -> Tensor:
    return logits[:, :-1].transpose(1, 2)


def _in_place(logits: Tensor) -> Tensor:
    return logits.transpose(1, 2)


def _alone(logits: Tensor) -> Tensor:
    return logits


def _one(logits: Tensor) -> Tensor:
    return logits.reshape(len(logits))


KINDS = (
    Kind(nn.CrossEntropyLoss(), _ahead, True, "cross-entropy of the next token"),
    Kind(nn.CrossEntropyLoss(), _in_place, False, "cross-entropy of every token"),
    Kind(nn.CrossEntropyLoss(), _alone, False, "cross-entropy of one label"),
    Kind(nn.MSELoss(), _one, False, "squared error"),
    Kind(nn.MSELoss(), _alone, False, "squared error of several numbers"),
    Kind(nn.BCEWithLogitsLoss(), _alone, False, "logistic loss of several labels"),
)


@dataclass(frozen=True)
class Prepared:
    """A module and its data in the form (x, y) → criterion(model(x), y).

    Args:
        model: with a tensor as output.
        rows: the examples.
        loss: of output and target.
    """

    model: nn.Module
    rows: Records
    loss: Criterion


def prepared(model: nn.Module, X: Any, y: Any, loss: Criterion | None, collate_fn: Any = None) -> Prepared | None:
    """A module of named inputs, with its rows and the loss that it computes or was given; None for other data.

    Raises:
        InvalidInput: if rows have no labels, or the model computes another loss than those that are known.
        UnsupportedModel: if dropout or batch statistics are active.
    """
    rows, collate = _rows(X, y, loss, collate_fn)
    if rows is None:
        return None
    refuse_training_mode(model)
    records = Records(
        rows,
        takes=taken(model),
        collate=collate,
        labelled=any(kind.__name__.endswith(_CAUSAL) for kind in type(model).__mro__),
        with_labels=bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)),
        pad=_pad(model),
    )
    _refuse_padding_that_shows(model, records)
    kind = _kind(model, records) if loss is None else _kind_of_tokens(model, records, loss)
    if kind is None:
        assert loss is not None  # or there is a kind
        return Prepared(model, records, loss)
    records.shifted = kind.shifted
    criterion = kind.criterion if loss is None else loss
    return Prepared(called(model, lambda output: kind.read(_logits(output))), records, criterion)


def taken(model: nn.Module) -> list[str] | None:
    """The names of a module's inputs, without its labels; None where it takes whatever is given."""
    base: Any = getattr(model, "get_base_model", None)  # of peft, whose own forward passes everything on
    module: Any = base() if callable(base) else model
    names = [
        name
        for name, one in inspect.signature(module.forward).parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and name not in LABELS
    ]
    return names or None


def read_apart(model: nn.Module, loss: Criterion, probe: Any) -> tuple[nn.Module, Criterion]:
    """A module whose output is a dict, a tuple or the like, and its criterion, with a tensor between them.

    What the criterion does not use of the output is left out; of several parts that it uses, all are put into one
    tensor, and apart again before the criterion sees them.

    Raises:
        InvalidInput: if the criterion takes neither the output nor its `logits`.
    """
    if isinstance(model, Called):  # a tensor was read off it already
        return model, loss
    few = tree_map(lambda leaf: leaf[:_PROBED], probe)
    try:
        refuse_training_mode(model)  # a module that is run in it may change
        output = _output(model, few[0])
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return model, loss  # what is wrong with it is told where its loss is tried
    if isinstance(output, Tensor) or output is None:
        return model, loss
    parts, spec = tree_flatten(output)
    places = [k for k, part in enumerate(parts) if isinstance(part, Tensor) and part.is_floating_point()]
    moved = {str(k): parts[k].detach().requires_grad_() for k in places}
    whole = tree_unflatten([moved.get(str(k), part) for k, part in enumerate(parts)], spec)
    try:
        with torch.enable_grad():
            read_by = calculus.depends(loss(whole, few[1]), moved, moved)
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        if isinstance(_part(output, "logits"), Tensor) and _takes_a_tensor(loss, _logits(output), few[1]):
            return called(model, _logits), loss
        message = (
            f"{type(model).__name__} returns a {type(output).__name__}, and the criterion does not take it "
            f"({first_line(error)}). Pass a criterion of the whole output: loss=lambda output, y: "
            "cross_entropy(output['name of a part'], y)."
        )
        raise InvalidInput(message) from error
    used = [k for k in places if read_by[str(k)]]
    if not used:
        return model, loss  # a loss that nothing can move is refused where it is tried
    shapes = [tuple(parts[k].shape[1:]) for k in used]
    alike = len(set(shapes)) == 1  # and of another length in another row

    def read(output: Any) -> Tensor:
        found = tree_flatten(output)[0]
        if len(used) == 1:
            return found[used[0]]
        if alike:
            return torch.stack([found[k] for k in used], 1)
        return torch.cat([found[k].reshape(len(found[k]), -1) for k in used], 1)

    @functools.wraps(loss)
    def criterion(z: Tensor, y: Tensor) -> Tensor:
        pieces = [z] if len(used) == 1 else z.unbind(1) if alike else _apart(z, shapes)
        return loss(tree_unflatten([dict(zip(used, pieces, strict=True)).get(k) for k in range(len(parts))], spec), y)

    return called(model, read), criterion


def _takes_a_tensor(loss: Criterion, logits: Tensor, y: Any) -> bool:
    """Whether a criterion is one of logits, even where it has something against these, and none of what holds them."""
    try:
        loss(logits, y)
    except (AttributeError, TypeError, KeyError):
        return False
    except (RuntimeError, ValueError, IndexError) as error:
        return "indices" not in str(error)  # output["logits"] of a tensor
    return True


def _apart(z: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    return [piece.reshape(len(z), *shape) for piece, shape in zip(z.split(sizes, 1), shapes, strict=True)]


def _rows(X: Any, y: Any, loss: Criterion | None, collate_fn: Any) -> tuple[Rows | Columns | None, Any]:
    data, own = unloaded(X)
    collate = own if collate_fn is None else collate_fn
    rows = rows_of(data, y)
    if isinstance(rows, Columns):
        return rows, None  # a batch of all rows, which is collated
    if collate is not None:
        return (Rows(data) if rows is None else rows), collate
    if isinstance(rows, Rows) and loss is not None and y is None and isinstance(rows[0], tuple | list):
        return None, None  # pairs of a dict and a target, for a criterion of both: they are examples already
    return rows, None


def _kind(model: nn.Module, records: Records) -> Kind:
    """Which loss a model computes.

    Raises:
        InvalidInput: if rows have no labels, the model returns no loss, or it is none of KINDS.
    """
    name = type(model).__name__
    first = range(min(len(records), _ROWS))
    numbers = [row for row in first if records.counted(row)][:_PROBED]
    if not numbers:
        message = (
            f"None of the first {len(first)} rows has a label that is counted: all are {UNCOUNTED}, as where a "
            "truncation cut the answer off and left the prompt, or pad and end of text are one token. Leave such rows "
            "out, for they taught nothing: [row for row in rows if any(label != -100 for label in row['labels'][1:])]."
        )
        raise InvalidInput(message)
    items = [records.parts(row) for row in numbers]
    without = next((row for row, item in zip(numbers, items, strict=True) if item[1] is None), None)
    if without is not None:
        message = (
            f"Row {without} has no labels, so {name} has no loss to be "
            "asked for. Pass rows with the column 'labels', or the criterion: loss=torch.nn.functional.cross_entropy."
        )
        raise InvalidInput(message)
    batch = records.stacked(items)
    refused: Exception | None = None
    try:
        output = _output(model, {**batch[0], LABELS[0]: batch[1]})
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        output, refused = None, error
    loss, logits = _part(output, "loss"), _part(output, "logits")
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor):
        why = "" if refused is None else f" ({type(refused).__name__}: {first_line(refused)})"
        message = (
            f"{name} returns no loss and logits for {', '.join((*batch[0], LABELS[0]))}{why}. Pass the criterion of "
            "its output and the labels, loss=lambda output, y: cross_entropy(output, y)."
        )
        raise InvalidInput(message) from refused
    alone = [_asked(model, {**_one_of(batch[0], b), LABELS[0]: batch[1][b : b + 1]}) for b in range(len(items))]
    asked = [(float(loss), logits, batch[1])] + [
        (value, found, batch[1][b : b + 1]) for b, (value, found) in enumerate(alone)
    ]
    gaps = [max(_gap(kind.value(found, labels), value) for value, found, labels in asked) for kind in KINDS]
    nearest, next_to_it = np.argsort(gaps, kind="stable")[:2]
    if gaps[nearest] <= _tolerance(logits) and gaps[next_to_it] > 3 * gaps[nearest]:
        return KINDS[nearest]
    told = ", ".join(f"{kind.name} {kind.value(logits, batch[1]):.4g}" for kind in KINDS)
    message = (
        f"{name} computes a loss of {float(loss):.4g} on {len(items)} rows, which is none that is known ({told}). "
        "Usual reasons: an added loss, class weights, or label smoothing. Pass torch's criterion of classes, "
        "loss=torch.nn.CrossEntropyLoss(label_smoothing=…), which finds the labels of tokens where the model does; or "
        "a criterion of its output and the labels, loss=lambda output, y: mse_loss(output.logits, y)."
    )
    raise InvalidInput(message)


def _kind_of_tokens(model: nn.Module, records: Records, loss: Criterion) -> Kind | None:
    """Where torch's criterion of classes finds the label of every token: where the model's own loss has it.

    None where the criterion is another, or rows have one label each, or no place in the logits for each.
    """
    if Reduction.of(loss).summed is None:
        return None
    row = records[0]
    if not isinstance(row, tuple) or row[1].ndim != 1 or row[1].is_floating_point():
        return None
    try:
        logits = _part(_output(model, records.stacked([row])[0]), "logits")
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return None  # what is wrong is told where the loss is tried
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] != len(row[1]):
        return None
    try:
        return _kind(model, records)
    except InvalidInput:  # its own loss has more in it, or there is none
        return KINDS[0] if records.labelled else KINDS[1]


def _one_of(x: Any, b: int) -> Any:
    """Example b of a batch, as a batch of one."""
    return tree_map(lambda leaf: leaf[b : b + 1], x)


def _pad(model: nn.Module) -> int:
    """The token that a model takes for padding; 0 if it names none."""
    named = getattr(getattr(model, "config", None), "pad_token_id", None)
    return named if isinstance(named, int) else 0


def _refuse_padding_that_shows(model: nn.Module, records: Records) -> None:
    """What a model gives for a row must not depend on how many other tokens stand behind its end.

    Raises:
        InvalidInput: if it does, as where a model reads its answer off the last token and knows no padding.
    """
    numbers = range(min(len(records), _ROWS))
    xs = [records.parts(row)[0] for row in numbers]
    lengths = [len(x[TOKENS]) if TOKENS in x and x[TOKENS].ndim else 0 for x in xs]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    if records.with_labels or lengths[short] == lengths[long]:
        return
    try:
        alone = _tensors(_output(model, records.stacked([xs[short]])))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return  # what is wrong is told where its loss is tried
    try:
        together = _tensors(_output(model, records.stacked([xs[short], xs[long]])))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        message = (
            f"{type(model).__name__} takes row {short} alone, and not beside the longer row {long} ({first_line(error)}"
            "). Set model.config.pad_token_id to the tokenizer's pad_token_id, or pass rows of one length."
        )
        raise InvalidInput(message) from error
    for name, own in alone.items():
        beside = together[name][:1]
        beside = beside[tuple(slice(0, size) for size in own.shape)] if beside.ndim == own.ndim else beside
        gap = float((beside - own).abs().max()) if beside.shape == own.shape else 0.0
        if gap > _tolerance(own) * (1 + float(own.abs().max())):
            message = (
                f"{type(model).__name__} gives other {name} for row {short} alone than beside the longer row {long}, "
                f"padded with {records.pad}: they differ by up to {gap:.2g}. Usual reason: its answer is read off the "
                "last token, and it does not know which are padding. Set model.config.pad_token_id to the tokenizer's "
                "pad_token_id, or pass rows of one length."
            )
            raise InvalidInput(message)


def _tensors(output: Any) -> dict[str, Tensor]:
    """What a model gives for a batch, by name; logits alone where it names them."""
    if isinstance(output, Tensor):
        return {"outputs": output}
    logits = _part(output, "logits")
    return {"logits": logits} if isinstance(logits, Tensor) else {}


def _tolerance(output: Tensor) -> float:
    return _TOLERANCE if output.dtype.itemsize > 2 else _HALF


def _gap(ours: float, theirs: float) -> float:
    """How far two losses are apart, relative to 1 + one; 0 where neither has a value, ∞ where one has none."""
    if math.isnan(ours) or math.isnan(theirs):
        return 0.0 if math.isnan(ours) and math.isnan(theirs) else math.inf
    return abs(ours - theirs) / (abs(theirs) + 1)


def _asked(model: nn.Module, x: Any) -> tuple[float, Tensor]:
    output = _output(model, x)
    return float(_part(output, "loss")), _part(output, "logits")


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output.logits


def _output(model: nn.Module, x: Any) -> Any:
    """What a module returns for a batch, as it is."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a module may write into them
    state = {**dict(model.named_parameters()), **buffers}
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    x = tree_map(lambda leaf: _dense(leaf, dtype), x)
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return forward(model, state, x)


def _dense(leaf: Any, dtype: torch.dtype) -> Tensor:
    """A leaf of a batch as the module takes it."""
    dense = torch.from_numpy(leaf.toarray()) if scipy.sparse.issparse(leaf) else leaf
    return dense.to(dtype) if dense.is_floating_point() else dense
