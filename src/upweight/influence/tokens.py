"""Which tokens of a training row push which tokens of a query: the value of `on_loss`, taken apart.

A loss that is a sum over places, L = Σ_t ℓ_t, has the gradient Σ_t g_t, with g_t = Jᵀ u_t and u_t the slope of the loss
in the output at place t alone. `on_loss` is bilinear in the two gradients, so

    values[s, t] = (wᵢ/n) g_sᵀ (C + λI)⁻¹ g_t        place s of the query, place t of row i

add up to its value for that query and row. What a row carries of the penalty belongs to no token, and is told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.data.examples import Examples
from upweight.data.records import MASK, TOKENS, UNCOUNTED
from upweight.data.trees import leaves
from upweight.errors import InvalidInput, UnsupportedModel, require
from upweight.influence import scoring
from upweight.influence.certificate import Certificate
from upweight.influence.system import System
from upweight.influence.top import index_of
from upweight.model import calculus, layers
from upweight.model.layers import pieces

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS = 2**26  # of gradients, or of slopes, that are held at once


@dataclass(frozen=True)
class Token:
    """One token of a text.

    Args:
        text: as it is shown.
        place: which prediction it is the target of; None where nothing predicts it, or it is not counted.
    """

    text: str
    place: int | None


@dataclass(frozen=True)
class TokenScores:
    """What the tokens of one training row do to the tokens of one query, if the row is removed.

    Args:
        values: (s, t) the change of the query's loss at its token s that the row's token t accounts for, in the unit of
            `on_loss`; only tokens that are counted have a line or a column.
        penalty: (s,) what the row's share of the penalty accounts for; 0 where a row has none.
        query: the query's text; those with a place stand for the lines of `values`, in order.
        row: the row's text, likewise for the columns.
        row_name: the row's number, or its name.
        certificate: how far the numbers can be trusted.
    """

    values: Float[NDArray[np.float64], "s t"]
    penalty: Float[NDArray[np.float64], " s"]
    query: tuple[Token, ...]
    row: tuple[Token, ...]
    row_name: Any
    certificate: Certificate

    @property
    def total(self) -> float:
        """The value of `on_loss` for this query and row."""
        return float(self.values.sum() + self.penalty.sum())

    @property
    def of_query(self) -> Float[NDArray[np.float64], " s"]:
        """What the whole row does to each token of the query."""
        return self.values.sum(1) + self.penalty

    @property
    def of_row(self) -> Float[NDArray[np.float64], " t"]:
        """What each token of the row does to the whole query, the penalty aside."""
        return self.values.sum(0)

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame of values: one line per token of the query, one column per token of the row."""
        require("pandas", "pandas")
        lines, columns = (np.array([token.text for token in _placed(side)]) for side in (self.query, self.row))
        return _frame(self.values, lines, columns)

    def __repr__(self) -> str:
        return (
            f"TokenScores({len(self.values)} tokens of the query × {self.values.shape[1]} of row {self.row_name}: "
            f"{self.total:+.3g} together; {self.certificate})"
        )

    def __str__(self) -> str:
        sides = (("query", self.query, self.of_query), (f"row {self.row_name}", self.row, self.of_row))
        return "\n".join([repr(self), *(f"{name:<8} {_strongest(text, values)}" for name, text, values in sides)])

    def _repr_html_(self) -> str:
        """Both texts, each token coloured by its sum: blue where it helps the query, red where it harms."""
        query = _coloured(self.query, self.of_query)
        row = _coloured(self.row, self.of_row)
        words = (
            "If this row were removed, the loss of the query would rise by what blue, underlined tokens show when they "
            f"are pointed at, and fall by what red ones, with dots below, do. {self.certificate}"
        )
        return markup.frame(
            f'<p><b>query</b><br><span class="uw-tokens">{query}</span></p>',
            f"<p><b>row {markup.text(self.row_name)}</b> ({self.total:+.3g})<br>"
            f'<span class="uw-tokens">{row}</span></p>',
            markup.remark(words),
        )


def by_token(system: System, row: Any, queries: Examples, decode: Callable[[int], str]) -> TokenScores:
    """The value of `on_loss` for one query and one training row, by their tokens: `Influence.by_token`.

    Raises:
        InvalidInput: if there are several queries, or the row or the query has no token that is counted.
        UnsupportedModel: if the loss has one prediction a row.
    """
    if len(queries) != 1:
        message = (
            f"on holds {len(queries)} queries, and tokens are told of one query and one row. Pass one: "
            "by_token(row, on=[question])."
        )
        raise InvalidInput(message)
    rows = system.examples.rows(row)
    if len(rows) != 1:
        message = f"{len(rows)} rows, and tokens are told of one row and one query. Pass one row: by_token(0, on=…)."
        raise InvalidInput(message)
    row = int(rows[0])
    asked = _Side.of(system, queries.batch([0]), "The query")
    taken = _Side.of(system, system.examples.batch([row]), f"Row {row}")
    share = np.zeros(len(asked.counted))
    if len(asked.counted) <= len(taken.counted):
        found = np.zeros((len(asked.counted), len(taken.counted)))
        for lines, G in asked.gradients():
            solution = system.solve(G)
            found[lines] = taken.products(solution.x)
            share[lines] = (solution.x @ system.penalty_share).numpy()
    else:
        found = np.zeros((len(taken.counted), len(asked.counted)))
        for lines, G in taken.gradients():
            solution = system.solve(G)
            found[lines] = asked.products(solution.x)
        found = found.T
        if system.objective.folded:
            share = asked.products(system.solve(system.penalty_share[None]).x)[0]
    weight = float(system.examples.weights[row]) / system.n
    return TokenScores(
        weight * found,
        weight * share,
        asked.text(decode),
        taken.text(decode),
        row if system.examples.names is None else system.examples.names.values[row],
        scoring.certificate(system, solution),  # of the last systems; there is at least one token on either side
    )


def decoder(tokenizer: Any) -> Callable[[int], str]:
    """How a token is shown: by a tokenizer's `convert_ids_to_tokens` or `decode`, a function, or as its number.

    Raises:
        InvalidInput: for anything else.
    """
    if tokenizer is None:
        return str
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return lambda token: str(tokenizer.convert_ids_to_tokens(token))
    if hasattr(tokenizer, "decode"):
        return lambda token: str(tokenizer.decode([token]))
    if callable(tokenizer):
        return lambda token: str(tokenizer(token))
    message = (
        f"tokenizer is a {type(tokenizer).__name__}. Pass a tokenizer with decode(), or a function from a token's "
        "number to its text: tokenizer=words.__getitem__."
    )
    raise InvalidInput(message)


# ---- places ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One example, taken apart by its places.

    Args:
        system: whose objective it is.
        batch: the example, as a batch of one.
        places: for every entry of the flattened output the place it predicts.
        slope: (1, K) of the loss in the output.
        counted: the places whose prediction the loss depends on.
    """

    system: System
    batch: Any
    places: Tensor
    slope: Tensor
    counted: NDArray[np.int64]

    @classmethod
    def of(cls, system: System, batch: Any, name: str) -> _Side:
        """The places of a batch of one.

        Raises:
            InvalidInput: if none is counted.
            UnsupportedModel: if the loss has one prediction a row.
        """
        slope = calculus.output_slopes(system.objective, batch)
        places = _places(system, batch, slope[0])
        counted = places[(slope[0] != 0).cpu()].unique().numpy()
        if not len(counted):
            message = (
                f"{name} has no token that the loss depends on: all its labels are left out (−100), or are predicted "
                "with certainty. So there is nothing to take apart. Pass another, such as one of on_loss(…).helpful(5)."
            )
            raise InvalidInput(message)
        return cls(system, batch, places, slope, counted)

    def gradients(self) -> Iterator[tuple[slice, Float[Tensor, "m p"]]]:
        """g_t of a few places at a time."""
        for lines, captured in self._captured(2 * self.system.objective.size):
            yield lines, pieces.rows(captured, self._sizes)[0].double().cpu()

    def products(self, S: Float[Tensor, "k p"]) -> NDArray[np.float64]:
        """s · g_t for every vector s and place t."""
        V = S.to(self.system.objective.reference)
        found = self._captured(16 * len(self.places))
        return torch.cat(
            [pieces.along(captured, V, self._sizes)[:, 0].double().cpu() for _, captured in found], 1
        ).numpy()

    def text(self, decode: Callable[[int], str]) -> tuple[Token, ...]:
        """Its tokens in reading order."""
        return _text(self.batch, self.counted, self.places, decode)

    def _captured(self, numbers: int) -> Iterator[tuple[slice, list[pieces.Piece]]]:
        """The pieces of u_t, the slope at one place each, for as many places as hold so many numbers each."""
        objective, size = self.system.objective, max(1, _NUMBERS // numbers)
        plan = objective.route.plan or layers.plan(objective, self.batch)
        for start in range(0, len(self.counted), size):
            some = torch.from_numpy(self.counted[start : start + size])
            at = (self.places[None] == some[:, None]).to(self.slope)
            u = self.slope[None] * at[:, None]
            yield slice(start, start + size), layers.capture(objective, plan, self.batch, lambda _, u=u: u)

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: block.numel() for name, block in self.system.objective.blocks.items()}


def _places(system: System, batch: Any, slope: Float[Tensor, " K"]) -> Tensor:
    """For every entry of the flattened output the place it predicts.

    Raises:
        UnsupportedModel: if the loss has one prediction a row.
    """
    objective = system.objective
    if objective.linear is None:
        calculus.structure(objective)
    output = calculus.shaped_outputs(objective, batch)[0]
    output = output[0] if len(output.shape) > 1 and len(output) == 1 else output  # a module's batch of one
    target = _target(batch)
    shape = tuple(target.shape)
    numbers = torch.arange(target.numel())
    ahead = [numbers.reshape(1, *shape).expand(output.shape)] if shape and tuple(output.shape[1:]) == shape else []
    behind = [numbers.reshape(*shape, 1).expand(output.shape)] if shape and tuple(output.shape[:-1]) == shape else []
    if ahead or behind:  # where the outputs of a place lie along the first axis, or along the last
        places = (ahead or behind)[0]
        if ahead and behind and not _apart(system, batch, places.reshape(-1), slope):
            places = behind[0]
    elif shape and target.numel() > 1 and tuple(output.shape) == shape:
        places = numbers.reshape(shape)
    else:
        message = (
            f"{objective.name} makes one prediction a row (output {tuple(output.shape)}, target {shape}), so its value "
            "has no tokens to be taken apart by. Use on_loss; tokens are for losses with a target at every place, as "
            "language models and taggers have."
        )
        raise UnsupportedModel(message)
    return places.reshape(-1)


def _apart(system: System, batch: Any, places: Tensor, slope: Float[Tensor, " K"]) -> bool:
    """Whether the slope of the loss at one place depends on the outputs of that place alone."""
    steepest = int(slope.abs().argmax())
    unit = torch.zeros_like(slope)[None, None]
    unit[..., steepest] = 1
    bent = calculus.output_products(system.objective, batch, unit)[0, 0]
    others = (places != places[steepest]).to(bent.device)
    return float(bent[others].abs().max()) <= 1e-6 * float(bent.abs().max())


def _target(batch: Any) -> Tensor:
    """The target of a batch of one; an empty one where there is none."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        return torch.zeros(())
    found = [leaf for leaf in leaves(batch[1]) if isinstance(leaf, Tensor)]
    return found[0][0] if len(found) == 1 else torch.zeros(())


# ---- text ------------------------------------------------------------------------------------------------------------


def _text(batch: Any, counted: NDArray[np.int64], places: Tensor, decode: Callable[[int], str]) -> tuple[Token, ...]:
    """The tokens of an example in reading order, and which of them are counted."""
    count = int(places.max()) + 1
    target = _target(batch).reshape(-1)
    line = {int(place): number for number, place in enumerate(counted)}
    x = batch[0] if isinstance(batch, tuple | list) else batch
    read = x[TOKENS][0].tolist() if isinstance(x, dict) and TOKENS in x and x[TOKENS].ndim == 2 else []
    kept = (
        x[MASK][0].tolist() if isinstance(x, dict) and MASK in x and len(read) == x[MASK].shape[1] else [1] * len(read)
    )
    ahead = len(read) - count  # 1 where a prediction is of the next token
    if ahead not in (0, 1) or target.is_floating_point():
        return tuple(Token(_label(target[place], decode), line.get(place)) for place in range(count))
    first = [Token(decode(read[0]), None)] if ahead and kept[0] else []
    rest = []
    for place in range(count):
        token = int(target[place])
        if token == UNCOUNTED and not kept[place + ahead]:
            continue
        rest.append(Token(decode(read[place + ahead] if token == UNCOUNTED else token), line.get(place)))
    return (*first, *rest)


def _label(value: Tensor, decode: Callable[[int], str]) -> str:
    if value.is_floating_point():
        return f"{float(value):.4g}"
    return decode(int(value)) if int(value) >= 0 else "·"  # not counted, and not known


def _placed(text: tuple[Token, ...]) -> list[Token]:
    return [token for token in text if token.place is not None]


def _strongest(text: tuple[Token, ...], values: NDArray[np.float64], k: int = 6) -> str:
    placed = _placed(text)
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return ", ".join(f"{placed[j].text!r} ({values[j]:+.3g})" for j in order) + (", …" if len(values) > k else "")


def _coloured(text: tuple[Token, ...], values: NDArray[np.float64]) -> str:
    """A text in which every counted token has a background: the stronger, the larger its value."""
    largest = float(np.abs(values).max()) or 1.0
    spans = []
    for token in text:
        shown = markup.text(token.text.replace("▁", " ").replace("Ġ", " ")) or "&nbsp;"
        if token.place is None:
            spans.append(f'<span class="uw-quiet">{shown}</span>')
            continue
        value = float(values[token.place])
        spans.append(markup.shaded(shown, value, largest))
    return "".join(spans)


def _frame(values: NDArray[np.float64], lines: NDArray[Any], columns: NDArray[Any]) -> pd.DataFrame:
    pandas = require("pandas", "pandas")
    return pandas.DataFrame(values, index=index_of(lines, None, "query"), columns=index_of(columns, None, "row"))
