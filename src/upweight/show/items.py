"""A run folder is made: scores, and of rows and queries labels, predictions, losses and what they look like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import records
from upweight.data.examples import Examples
from upweight.errors import InvalidInput, checked_count
from upweight.influence import kept, tokens
from upweight.influence.face import Influence
from upweight.model import per_row
from upweight.runs import ranks
from upweight.runs.identity import digest
from upweight.runs.progress import bar
from upweight.runs.stopping import stop_here
from upweight.runs.store import SUFFIX, Store
from upweight.show import folds, token_cards
from upweight.show.parts import PARTS, arrays_of
from upweight.show.run import COLUMNS, ITEMS, NOTHING, PICTURE, QUERIES, TEXT, TOKENS, Card, Run
from upweight.show.taking_apart import taken_apart
from upweight.training.predictions import classes, predict, query_labels, training_labels

FOLDS = "folds"
_WIDEST = 64  # columns that are told without being asked for
_PIXELS = 96  # of a picture's side
Cards = Callable[[int], Card]


def write_run(
    influence: Influence,
    folder: str | os.PathLike[str],
    Xq: Any,
    yq: Any = None,
    *,
    card: Cards | None = None,
    query_card: Cards | None = None,
    self_influence: bool = True,
    tokenizer: Any = None,
    parts: int = 0,
    out_of_fold: Any = None,
) -> Run:
    """The scores of some queries (`Influence.on_loss`), with what queries and rows are, in a folder.

    The same call goes on where it was interrupted. Cost: on_loss, two forward passes, and of_self; with `parts` the
    queries' systems and equation 5 of the rows that lead, or `by_token` for each of them; trainings, if folds are
    asked for.

    Args:
        influence: whose scores they are.
        folder: an empty or a new one, or that of the same call.
        Xq: the queries' inputs.
        yq: the queries' targets.
        card: from the number of a training row to what it looks like: a text, a dict of columns, a picture as uint8
            (H, W) or (H, W, 3), a list of texts (tokens), or None. Left out, rows of numbers are told by their columns,
            token sequences by their tokens, others not at all. Cards that are there are kept while its code and what it
            closes over are the same; a change of globals that it reads is not seen: delete the items-… files.
        query_card: the same of the queries.
        self_influence: whether the rows' removals are measured on their own losses too.
        tokenizer: how tokens are shown where no card is given: as for `by_token`; None shows numbers.
        parts: of how many rows that help, and as many that harm a query, it is kept which parts matter: tokens by
            `by_token`; words, columns and pixels by equation 5, as the predicted change of the query's loss if that
            part of the row were as in the mean of the rows (a word: left out). At most 64 MB in all; 0 keeps none.
        out_of_fold: for the training rows what models say that were trained without them: (n,) labels, or (n, K)
            probabilities in the order of the classes, as `cross_val_predict(…, method="predict_proba")` gives; a number
            of folds, and the model is trained so often; None keeps none. Reviews suggest these labels.

    Raises:
        StoreMismatch: if the folder holds other work.
        StorageFailed: if its disk has no room, or another process writes there.
        InvalidInput: if a card, or what was said out of fold, is something else, or parts are none.
        UnsupportedModel: if parts are asked for, and the model has neither tokens nor equation 5.

    >>> import tempfile
    >>> import upweight as uw
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]], ["no", "no", "yes", "yes"]
    >>> influence = uw.explain(LogisticRegression().fit(X, y), X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = uw.write_run(influence, folder, [[1.4]], ["yes"])
    ...     run.rows.labels.tolist(), run.queries.predictions.tolist(), run.scores.values.shape
    (['no', 'no', 'yes', 'yes'], ['no'], (1, 4))
    """
    queries, decode = influence.queries((Xq, yq)), tokens.decoder(tokenizer)
    count = checked_count(parts, "parts", least=0, hint="4 keeps those of 4 rows of either kind, and 0 keeps none")
    said = folds.asked(influence, out_of_fold)
    for cards in (card, query_card):
        if cards is not None:  # before hours of work
            _bytes(cards(0), 0)
    influence.on_loss(queries, store=folder)
    made = _Made(influence, decode, card, query_card, self_influence, None, (_told(tokenizer), count))
    _keep_items(made, Path(folder), queries, said)
    return Run.open(folder)


@dataclass(frozen=True)
class _Made:
    """What items are made of.

    Args:
        influence: whose rows they are.
        decode: how a token is shown.
        card, query_card: what rows and queries look like; None for what is told without being asked.
        forms: whether self-influence is kept.
        out_of_fold: labels by other models.
        told: of the tokenizer, and how many rows are taken apart.
    """

    influence: Influence
    decode: Callable[[int], str]
    card: Cards | None
    query_card: Cards | None
    forms: bool
    out_of_fold: NDArray[Any] | None
    told: tuple[str, int]

    def shown(self, examples: Examples, card: Cards | None, place: int, number: int) -> Card:
        """What an example looks like."""
        return _default(self.influence, examples, place, self.decode) if card is None else card(number)


def _told(tokenizer: Any) -> str:
    """What tokens are shown by: nothing, a function's digest, or a tokenizer's kind, name and number of tokens."""
    if tokenizer is None:
        return "numbers"
    if not hasattr(tokenizer, "decode"):
        return f"function {digest(tokenizer)}"
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else ""
    return f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')} {size}"


def _keep_items(made: _Made, folder: Path, queries: Examples, said: NDArray[Any] | folds.Folds | None) -> None:
    """Keep what the training rows and the queries are, beside their scores; files that are there are left.

    Raises:
        InvalidInput: if a card is no text, dict or picture, or there is no telling parts.
    """
    influence, system = made.influence, made.influence.system
    n, total = system.n, -(-system.n // ITEMS)
    with kept.opened(system, queries, system.objective.name, folder) as store, bar(total, "items", None) as done:
        assert store is not None  # a folder is named
        made = replace(made, out_of_fold=_trained(influence, store, said) if isinstance(said, folds.Folds) else said)
        _keep(made, store, QUERIES, queries, np.arange(len(queries)), None)
        labels = training_labels(influence)
        for number, start in enumerate(range(0, n, ITEMS)):
            rows = np.arange(start, min(start + ITEMS, n))
            _keep(made, store, f"items-{number:06d}", system.examples, rows, labels)
            stop_here(f"items {number + 1} of {total}")
            done(1)
        _keep_parts(made, store, folder, queries)


def _trained(influence: Influence, store: Store, asked: folds.Folds) -> NDArray[Any]:
    """(n,) what models say that were trained without a fold each; kept, so that they are trained once."""

    def there() -> dict[str, NDArray[Any]] | None:
        arrays, told = store.kept(FOLDS) if store.has(FOLDS) else ({}, {})
        return arrays if told == asked.told else None

    found = ranks.by_first("labels out of fold", there)
    codes = asked.codes(influence) if found is None else found["codes"].astype(np.int64)
    if found is None and ranks.first():
        store.keep(FOLDS, {"codes": codes}, asked.told)
    return np.asarray(classes(influence))[codes]


def _keep_parts(made: _Made, store: Store, folder: Path, queries: Examples) -> None:
    """Keep which parts of the rows that lead matter, unless that is there; nothing, where nobody asks for it."""
    tokenizer, count = made.told
    if not count:
        if ranks.first():
            (folder / f"{PARTS}{SUFFIX}").unlink(missing_ok=True)  # of an earlier call
        return
    cards = "by default" if made.card is None else digest(made.card)  # a picture says that numbers are pixels
    told = {"parts": count, "tokenizer": tokenizer, "cards": cards}
    if ranks.first_finds(PARTS, lambda: store.has(PARTS) and store.kept(PARTS)[1] == told):
        return
    examples = made.influence.system.examples

    def shown(row: int) -> Card:
        return made.shown(examples, made.card, row, row)

    found = taken_apart(made.influence, Run.open(folder), queries, count, shown, made.decode)
    if ranks.first():
        store.keep(PARTS, arrays_of(found), told)


def _keep(
    made: _Made, store: Store, name: str, examples: Examples, rows: NDArray[np.int64], labels: NDArray[Any] | None
) -> None:
    """One file of items, unless it is there with the same cards."""
    influence, training = made.influence, name != QUERIES
    card, forms = (made.card, made.forms) if training else (made.query_card, False)
    told: dict[str, Any] = {"cards": "by default" if card is None else digest(card), "self_influence": forms}
    if card is None and made.told[0] != "numbers":
        told["tokenizer"] = made.told[0]
    held_out = made.out_of_fold if training else None
    if held_out is not None:
        told["out_of_fold"] = digest(held_out)
    if ranks.first_finds(name, lambda: store.has(name) and store.kept(name)[1] == told):
        return
    some = examples.subset(rows)
    sweep = influence.sweep.over(influence.objective, some)
    labels = query_labels(influence, some) if labels is None else labels[rows]
    labels = _targets(some) if labels is None else labels
    arrays = {"losses": per_row.measures(sweep)}
    predicted, margins = _predicted(influence, some, labels)
    said = None if held_out is None else held_out[rows]
    for kind, values in (("labels", labels), ("predictions", predicted), ("out_of_fold", said)):
        if values is not None:
            arrays[kind] = _plain(values)
    if margins is not None:
        arrays["margins"] = margins
    if forms:
        arrays["self_influence"] = influence.of_self(rows).values
    cards = [made.shown(some, card, place, int(row)) for place, row in enumerate(rows)]
    if ranks.first():
        store.keep(name, {**arrays, **_packed(cards, rows)}, told)


def _predicted(
    influence: Influence, examples: Examples, labels: NDArray[Any] | None
) -> tuple[NDArray[Any] | None, NDArray[np.float64] | None]:
    """The model's labels, or its output where that is one number; and margins of the own labels, where there are."""
    objective = influence.objective
    if (objective.linear is None and objective.outputs is None) or examples.x is None:
        return None, None
    found = predict(influence, examples)
    if found.labels is None:
        return (found.outputs[:, 0] if found.outputs.ndim == 2 and found.outputs.shape[1] == 1 else None), None
    paired = found.paired and len(found.names or ()) > 2  # no output per class
    return found.labels, None if paired or labels is None else found.margins(labels)


def _targets(examples: Examples) -> NDArray[np.float64] | None:
    """Targets that are no classes, where each is one number."""
    y = examples.targets()
    return y.double().reshape(-1).cpu().numpy() if isinstance(y, Tensor) and y.numel() == len(examples) else None


def _default(influence: Influence, examples: Examples, place: int, decode: Callable[[int], str]) -> Card:
    """What a row of few numbers, a picture, or a token sequence looks like; None of anything else."""
    x = examples.x
    if x is None:
        return _tokens(examples.batch([place]), decode)
    if not isinstance(x, Tensor | np.ndarray) or x.dtype in {np.dtype(object)}:
        return None
    one = np.asarray(x[place], dtype=np.float64)
    if one.ndim == 1 and len(one) <= _WIDEST:
        names = influence.encoder.feature_names or [str(column) for column in range(len(one))]
        return dict(zip(names, one.tolist(), strict=False))
    if one.ndim == 3 and one.shape[0] in {1, 3}:
        span = float(one.max() - one.min()) or 1.0
        grey = ((one - one.min()) * (255 / span)).astype(np.uint8).transpose(1, 2, 0)
        return grey[..., 0] if grey.shape[2] == 1 else grey
    return None


def _tokens(batch: Any, decode: Callable[[int], str]) -> Card:
    """The tokens of a batch of one as pieces of text, padding left out; None where there are none."""
    x = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(x, dict) or records.TOKENS not in x or x[records.TOKENS].ndim != 2:
        return None
    numbers, mask = x[records.TOKENS][0].tolist(), x.get(records.MASK)
    counted = [1] * len(numbers) if mask is None or mask.shape != x[records.TOKENS].shape else mask[0].tolist()
    return token_cards.readable([decode(number) for number, counts in zip(numbers, counted, strict=True) if counts])


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers as they are; anything else as the bytes of a JSON text."""
    if values.dtype.kind in "iuf":
        return values
    return np.frombuffer(
        json.dumps([value if isinstance(value, str) else str(value) for value in values.tolist()]).encode(), np.uint8
    )


def _packed(cards: Sequence[Card], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Cards as bytes one behind the other, where each ends, its kind, and the shape of pictures."""
    parts, kinds, shapes = [], [], np.zeros((len(cards), 3), dtype=np.int64)
    for place, card in enumerate(cards):
        kind, part = _bytes(card, int(rows[place]))
        if kind == PICTURE:
            picture = _small(np.asarray(card))
            shapes[place, : picture.ndim], part = picture.shape, picture.tobytes()
        kinds.append(kind)
        parts.append(part)
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    blob = np.frombuffer(b"".join(parts), dtype=np.uint8)
    return {"cards": blob, "card_ends": ends, "card_kinds": np.array(kinds, dtype=np.uint8), "card_shapes": shapes}


def _bytes(card: Any, row: int) -> tuple[int, bytes]:
    """The kind of a card and, but for a picture, its bytes.

    Raises:
        InvalidInput: if it is none.
    """
    if card is None:
        return NOTHING, b""
    if isinstance(card, str):
        return TEXT, card.encode("utf-8", "surrogatepass")
    if isinstance(card, dict):
        return COLUMNS, json.dumps({str(name): value for name, value in card.items()}, default=str).encode()
    if isinstance(card, list) and all(isinstance(token, str) for token in card):
        return TOKENS, json.dumps(card).encode()
    if isinstance(card, np.ndarray) and card.dtype == np.uint8 and (card.ndim == 2 or card.shape[2:] == (3,)):
        return PICTURE, b""
    shape = f" of {card.dtype}, {card.shape}" if isinstance(card, np.ndarray) else ""
    message = (
        f"card({row}) is a {type(card).__name__}{shape}. Return a text, a dict of columns, a picture as uint8 (H, W) "
        "or (H, W, 3), a list of texts, or None."
    )
    raise InvalidInput(message)


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of few pixels: every k-th of them."""
    step = max(1, -(-max(picture.shape[:2]) // _PIXELS))
    return np.ascontiguousarray(picture[::step, ::step])
