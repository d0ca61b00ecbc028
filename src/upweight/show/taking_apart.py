"""Rows that lead are taken apart for a run folder: by their tokens, or by equation 5 (`parts` says what is kept)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from upweight.data.examples import Examples
from upweight.data.records import TOKENS as NAME_OF_TOKENS
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.influence.face import Influence
from upweight.influence.tokens import Token
from upweight.runs.progress import bar
from upweight.show import parts, token_cards
from upweight.show.cards import Card
from upweight.show.run import Run

_NUMBERS = 2**24  # of equation 5 at once: 128 MB
_ROWS = 1024  # whose mean is what parts are compared with


def taken_apart(
    influence: Influence,
    run: Run,
    queries: Examples,
    k: int,
    card: Callable[[int], Card],
    tokenizer: Any,
) -> dict[tuple[int, int], parts.Packed]:
    """The parts of the k rows that help and of the k that harm each query most, as far as there is room for them.

    Cost: of tokens `by_token` for each query and row; otherwise the queries' systems once more, and equation 5.

    Args:
        influence: whose scores they are.
        run: with the scores.
        queries: of the run.
        k: rows of either kind.
        card: what a row looks like; a picture of as many pixels as a row has numbers says that these are pixels.
        tokenizer: as for `by_token`.

    Raises:
        InvalidInput: if equation 5 moves other columns than the rows' own.
        UnsupportedModel: if the model has neither tokens nor equation 5.
    """
    rows = leading(run, k)
    first = influence.examples.batch([0])
    x = first[0] if isinstance(first, tuple | list) else first
    if isinstance(x, Mapping) and NAME_OF_TOKENS in x:
        return _by_token(influence, queries, rows, tokenizer)
    return _by_perturbing(influence, queries, rows, card)


def leading(run: Run, k: int) -> list[NDArray[np.int64]]:
    """For every query the k rows that help and the k that harm it most, those that do either."""
    best: NDArray[np.float64] | None = None
    numbers, start = np.zeros((0, 0), dtype=np.int64), 0
    for block in run.blocks():
        own = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        values = block if best is None else np.concatenate([best, block], 1)
        numbers = own if best is None else np.concatenate([numbers, own], 1)
        start += block.shape[1]
        known = np.nan_to_num(values)
        ends = [np.argsort(sign * known, axis=1, kind="stable") for sign in (1.0, -1.0)]  # the first of equal ones
        few = ends[0] if known.shape[1] <= 2 * k else np.concatenate([one[:, :k] for one in ends], 1)
        best, numbers = np.take_along_axis(values, few, 1), np.take_along_axis(numbers, few, 1)
    if best is None:
        return []
    return [line[np.nan_to_num(values) != 0] for line, values in zip(numbers, best, strict=True)]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _by_token(
    influence: Influence, queries: Examples, rows: list[NDArray[np.int64]], tokenizer: Any
) -> dict[tuple[int, int], parts.Packed]:
    found, size = {}, 0
    with bar(len(rows), "tokens", None) as done:
        for query, own in enumerate(rows):
            for row in own.tolist():
                scores = influence.by_token(row, on=queries.subset(np.array([query])), tokenizer=tokenizer)
                both = _told(scores.row, scores.of_row), _told(scores.query, scores.of_query)
                found[query, row] = parts.of_tokens(*both)
                size += len(found[query, row].content)
            if size > parts.MOST:
                return found
            done(1)
    return found


def _told(tokens: tuple[Token, ...], values: NDArray[np.float64]) -> tuple[list[str], NDArray[np.float64]]:
    """The pieces of a text, and the value of each; NaN where it is not counted."""
    each = [np.nan if token.place is None else values[token.place] for token in tokens]
    return token_cards.readable([token.text for token in tokens]), np.array(each, dtype=np.float64)


# ---- equation 5 ------------------------------------------------------------------------------------------------------


def _by_perturbing(
    influence: Influence, queries: Examples, rows: list[NDArray[np.int64]], card: Callable[[int], Card]
) -> dict[tuple[int, int], parts.Packed]:
    sample = np.unique(np.linspace(0, influence.n - 1, min(influence.n, _ROWS)).astype(np.int64))
    some = _inputs(influence, sample)
    sparse = scipy.sparse.issparse(some)
    shape, width = some.shape[1:], math.prod(some.shape[1:])
    mean = np.zeros(width) if sparse else some.reshape(len(sample), -1).mean(0)
    names = influence.encoder.feature_names or [str(j) for j in range(width)]
    most = max(1, max((len(one) for one in rows), default=1))
    block = max(1, int(math.sqrt(_NUMBERS / (most * max(1, width)))))
    found, size = {}, 0
    with bar(len(rows), "equation 5", None) as done:
        for start in range(0, len(rows), block):
            asked = list(range(start, min(start + block, len(rows))))
            union = np.unique(np.concatenate([rows[query] for query in asked]))
            if not len(union):
                continue
            g = influence.of_perturbing(union, on=queries.subset(np.array(asked)))
            if math.prod(g.shape[2:]) != width:
                message = (
                    f"Equation 5 moves {math.prod(g.shape[2:])} columns, and the rows at hand have {width}, as for a "
                    "lasso, whose objective holds some of them. Leave parts out."
                )
                raise InvalidInput(message)
            x = _inputs(influence, union)
            x = x.toarray() if sparse else x.reshape(len(union), -1)
            for query in asked:
                for row in rows[query].tolist():
                    at = int(np.searchsorted(union, row))
                    values = (mean - x[at]) * g[query - start, at].reshape(-1)
                    found[query, row] = _packed(values, shape, names, sparse, card(row))
                    size += len(found[query, row].content)
            if size > parts.MOST:
                return found
            done(len(asked))
    return found


def _packed(
    values: NDArray[np.float64], shape: tuple[int, ...], names: list[str], sparse: bool, card: Card
) -> parts.Packed:
    """Values as pixels where the row is a picture, as words or columns otherwise."""
    if len(shape) == 3:
        channels = 0 if shape[0] in {1, 3} else 2
        return parts.of_pixels(values.reshape(shape).sum(channels))
    if len(shape) == 2:
        return parts.of_pixels(values.reshape(shape))
    if isinstance(card, np.ndarray):
        height, width = card.shape[:2]
        if len(values) % (height * width) == 0:
            return parts.of_pixels(values.reshape(height, width, -1).sum(2))
    return parts.of_columns(parts.WORDS if sparse and isinstance(card, str) else parts.COLUMNS, names, values)


def _inputs(influence: Influence, rows: NDArray[np.int64]) -> Any:
    """The inputs of these training rows as equation 5 moves them: sparse rows, or an array."""
    whole = getattr(influence.encoder, "original", None) or influence.examples
    if whole.x is not None:
        x = whole.x[rows]
    else:
        batch = whole.batch(rows)
        x = batch[0] if isinstance(batch, tuple | list) else batch
    if scipy.sparse.issparse(x):
        return x
    if not hasattr(x, "shape"):
        message = (
            f"Rows are made of {', '.join(map(str, x))}, which no small step moves, so equation 5 has no derivative by "
            "them. Leave parts out."
        )
        raise UnsupportedModel(message)
    return x.detach().double().cpu().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
