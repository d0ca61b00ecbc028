"""Numbers that know their sign, units, n and certificate.

`values[q, i]` is the predicted change of query q's measure (its loss, in nats for log losses) under the named
counterfactual: L(query) after it, minus L(query) now. When a row is removed, a positive value means that the row HELPS
the query, for the query's loss would rise without it. The paper's raw derivative (equation 2) is `derivative`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

from upweight.data.ids import Ids, as_json, as_told, packed as packed_ids, same_names, unpacked as unpacked_ids
from upweight.errors import InvalidInput, Undefined, first_line, require
from upweight.influence.certificate import Certificate, packed, unpacked
from upweight.influence.top import (
    HARMFUL,
    HELPFUL,
    SHOWN,
    TopK,
    frame_of,
    html_table,
    index_of,
    text_table,
    top_columns,
)
from upweight.runs.files import read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Scores:
    """Predicted changes of each query's measure, one column per row, group or new example.

    Args:
        values: (q, r) predicted change of the query's measure under the counterfactual.
        counterfactual: what happens, in words, such as "row removed".
        rows: (r,) the training rows (or the numbers of groups or new examples) that the columns stand for.
        n: number of training rows.
        certificate: how far the numbers can be trusted.
        scale: (r,) with values = scale · derivative; None where no derivative is defined.
        measure: what is measured on the query, in words.
        query_values: (q,) the measure now, before the counterfactual.
        standard_error: (q, r) of a stochastic solver, or None. Of an ensemble: the spread of its members over √m, which
            says how far the mean over other models would lie, not how far the estimate is from a retraining.
        error: (q, r) estimate of what `values` still miss, or None.
        ids: (r,) names of the rows, groups or new examples: of a DataFrame's index, of `ids=`, or the keys of a dict of
            groups; None where they have none.
        query_ids: (q,) names of the queries, None where they have none.
        axes: what queries and columns are called in tables, such as the names of the two indexes.
    """

    values: Float[NDArray[np.float64], "q r"]
    counterfactual: str
    rows: Int[NDArray[np.int64], " r"]
    n: int
    certificate: Certificate
    scale: Float[NDArray[np.float64], " r"] | None = None
    measure: str = "loss"
    query_values: Float[NDArray[np.float64], " q"] | None = None
    standard_error: Float[NDArray[np.float64], "q r"] | None = field(default=None, repr=False)
    error: Float[NDArray[np.float64], "q r"] | None = field(default=None, repr=False)
    ids: Shaped[NDArray[Any], " r"] | None = field(default=None, repr=False)
    query_ids: Shaped[NDArray[Any], " q"] | None = field(default=None, repr=False)
    axes: tuple[Any, Any] = ("query", "row")

    @property
    def derivative(self) -> Float[NDArray[np.float64], "q r"]:
        """The paper's raw derivative with respect to the weight ε of the counterfactual (equations 2 and 3).

        Removal: I_up,loss(z, z_query) = −∇L(z_query)ᵀ (C + λI)⁻¹ ∇L(z), so that values = −(w/n) · derivative.

        Raises:
            Undefined: if the counterfactual is not infinitesimal, or a row has weight 0.
        """
        if self.scale is None:
            message = (
                f"'{self.counterfactual}' is a finite change, or no change of one weight, so it has no derivative. Use "
                ".values, or influence.on_loss for the derivative of equation 2."
            )
            raise Undefined(message)
        if not self.scale.all():
            row = int(self.rows[np.flatnonzero(self.scale == 0)[0]])
            unweighted = (
                f"Row {row} has sample weight 0: removing it changes nothing (values = 0) and its derivative is not "
                "kept. Use of_adding for its derivative."
            )
            raise Undefined(unweighted)
        return self.values / self.scale

    def helpful(self, k: int = 10) -> TopK:
        """The k columns with the largest values, largest first; on removal, the rows that help the query most."""
        return self._top(np.negative, k)

    def harmful(self, k: int = 10) -> TopK:
        """The k columns with the smallest values, smallest first; on removal, the rows that harm the query most."""
        return self._top(np.positive, k)

    def top(self, k: int = 10, data: Any = None) -> pd.DataFrame:
        """A DataFrame of the k strongest rows of every query, the largest |value| first, and what they are.

        Its index are the rows' names, or numbers where they have none; its columns the query, the row's number beside a
        name, the value, and those of `data`.

        Args:
            k: rows for each query.
            data: what the rows were made from, a line for each of the n training rows (for groups or added examples,
                for each of these): a DataFrame of pandas or polars, a Series, array or list. Where both have names,
                lines are looked up by name, whatever their order.

        Raises:
            InvalidInput: if k is larger than the number of rows, or data do not describe the rows.
        """
        apart = self.counterfactual.startswith(("group", "example"))
        strongest = self._top(lambda values: -np.abs(values), k)
        return frame_of(strongest, self.axes[1], data, len(self.rows) if apart else self.n)

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame of values: one line per query, one column per row, by their names where they have some."""
        pandas = require("pandas", "pandas")
        index = index_of(self.query_ids, range(len(self.values)), self.axes[0])
        return pandas.DataFrame(self.values, index=index, columns=index_of(self.ids, self.rows, self.axes[1]))

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """The scores of several blocks of queries, one below the other.

        Raises:
            InvalidInput: if there are none, or their columns are not the same rows.
        """
        if not parts or any(
            not np.array_equal(part.rows, parts[0].rows) or not same_names(part.ids, parts[0].ids) for part in parts
        ):
            message = (
                f"{len(parts)} blocks of scores do not stand for the same rows. Join those of one question, one block "
                "or more."
            )
            raise InvalidInput(message)
        first = parts[0]

        def stacked(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if any(array is None for array in arrays) else np.concatenate(arrays)

        return replace(
            first,
            **{name: stacked(name) for name in ("values", "query_values", "standard_error", "error", "query_ids")},
            certificate=Certificate.joined([part.certificate for part in parts]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically."""
        write_tensors(path, *self.parts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Scores that were written by `save`; a name that is no text, number, date or tuple comes back as its text.

        Raises:
            InvalidInput: if the file holds something else, or is damaged.
        """
        arrays, card = read_tensors(path)
        try:
            return cls.of_parts(arrays, card)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            message = (
                f"{path} is a safetensors file without upweight scores in it, or a damaged one "
                f"({type(error).__name__}: {first_line(error)}). Scores are written by scores.save(path)."
            )
            raise InvalidInput(message) from error

    def parts(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The arrays, and what is told of them, of which a file of scores is made."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        card, parts = packed(self.certificate, "certificate")
        told = {
            "counterfactual": self.counterfactual,
            "measure": self.measure,
            "n": self.n,
            "certificate": card,
            "axes": [as_json(name) for name in self.axes],
        }
        names = {name: letters(getattr(self, name)) for name in _NAMES if getattr(self, name) is not None}
        return arrays | parts | names, told

    @classmethod
    def of_parts(cls, arrays: dict[str, NDArray[Any]], card: dict[str, Any]) -> Scores:
        """The scores of such parts; ValueError, KeyError, TypeError or AttributeError if they are others."""
        certificate = unpacked(card["certificate"], arrays, "certificate")
        told = {name: card[name] for name in ("counterfactual", "measure", "n")}
        if "axes" in card:  # older files have none, and no names
            told["axes"] = tuple(as_told(name) for name in card["axes"])
        names = {name: names_in(arrays.pop(name)) for name in _NAMES if name in arrays}
        return cls(certificate=certificate, **told, **arrays, **names)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        queries, columns = self.values.shape
        return (
            f"Scores({queries} queries × {columns} columns: change of the query's {self.measure}, "
            f"{self.counterfactual}; {self.certificate})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{text_table(self._sides(), len(self.values))}"

    def _repr_html_(self) -> str:
        """A small table for notebooks: for each of the first queries, the rows that help and harm most."""
        what = f"Change of the query's {self.measure}, {self.counterfactual}"
        return html_table(what, self._sides(), len(self.values), str(self.certificate))

    def _sides(self) -> dict[str, TopK]:
        """The first rows of the first queries, of either kind."""
        shown = slice(SHOWN)
        names = None if self.query_ids is None else self.query_ids[shown]
        few = replace(self, values=self.values[shown], query_ids=names)
        k = min(SHOWN, self.values.shape[1])
        return {HELPFUL: few.helpful(k), HARMFUL: few.harmful(k)}

    def _top(self, key: Callable[[NDArray[np.float64]], NDArray[np.float64]], k: int) -> TopK:
        """The k columns with the smallest keys, for a few queries at a time, whose keys are all that is copied."""
        few = (self.values[start : start + _LINES] for start in range(0, len(self.values), _LINES))
        order = np.concatenate([top_columns(key(np.ascontiguousarray(values)), k) for values in few])
        values = np.take_along_axis(self.values, order, 1)
        return TopK(self.rows[order], values, None if self.ids is None else self.ids[order], self.query_ids)


@dataclass(frozen=True)
class Extremes:
    """The rows that help and harm every query most, kept from scores that were never held all at once.

    Args:
        helpful: the k largest values of every query, (q, k).
        harmful: the k smallest, (q, k).
        query_values: (q,) the measure of every query now.
        certificate: of all queries.
    """

    helpful: TopK
    harmful: TopK
    query_values: Float[NDArray[np.float64], " q"] | None
    certificate: Certificate

    def __repr__(self) -> str:
        queries, k = self.helpful.rows.shape
        return f"Extremes({queries} queries × {k} rows of either kind; {self.certificate})"

    def __str__(self) -> str:
        return f"{self!r}\n{text_table(self._sides(), len(self.helpful.rows))}"

    def _repr_html_(self) -> str:
        queries, k = self.helpful.rows.shape
        return html_table(f"The {k} rows of either kind", self._sides(), queries, str(self.certificate))

    def _sides(self) -> dict[str, TopK]:
        return {HELPFUL: self.helpful, HARMFUL: self.harmful}


def extremes(blocks: Iterable[Scores], k: int = 10) -> Extremes:
    """The k most helpful and the k most harmful rows of every query, from blocks of scores that are dropped at once.

    Args:
        blocks: scores of some queries each, such as `influence.on_loss_in_blocks(…)`.
        k: rows to keep on either side.

    Raises:
        InvalidInput: if there are no blocks, or k is larger than the number of rows.
    """
    helpful, harmful, values, certificates = [], [], [], []
    for block in blocks:
        helpful.append(block.helpful(k))
        harmful.append(block.harmful(k))
        values.append(block.query_values)
        certificates.append(block.certificate)
        del block  # before the next one is made
    if not certificates:
        message = "There are no blocks of scores to reduce. Pass influence.on_loss_in_blocks(Xq, yq)."
        raise InvalidInput(message)
    known = None if values[0] is None else np.concatenate(values)
    return Extremes(TopK.joined(helpful), TopK.joined(harmful), known, Certificate.joined(certificates))


@dataclass(frozen=True)
class SelfScores:
    """Each row's removal (or what else `counterfactual` names), measured on its own loss: `values` (n,).

    They are ≥ 0 when the penalty is not folded and C + λI is positive.

    Large values belong to rows that the model could not predict from the others: mislabelled, rare or atypical. `ids`
    (n,) are the names of the rows, None where they have none, and `axis` what these are called in tables.
    """

    values: Float[NDArray[np.float64], " n"]
    rows: Int[NDArray[np.int64], " n"]
    n: int
    certificate: Certificate
    scale: Float[NDArray[np.float64], " n"] | None
    standard_error: Float[NDArray[np.float64], " n"] | None = field(default=None, repr=False)
    counterfactual: str = "row removed"
    ids: Shaped[NDArray[Any], " n"] | None = field(default=None, repr=False)
    axis: Any = "row"

    @property
    def derivative(self) -> Float[NDArray[np.float64], " n"]:
        """I_up,loss(z, z), with values = −(w/n) · derivative.

        Raises:
            Undefined: if a row has weight 0.
        """
        return Scores(
            self.values[None], self.counterfactual, self.rows, self.n, self.certificate, self.scale
        ).derivative[0]

    @overload
    def top(self, k: int = 10) -> TopK: ...

    @overload
    def top(self, k: int = 10, *, data: Any) -> pd.DataFrame: ...

    def top(self, k: int = 10, *, data: Any = None) -> TopK | pd.DataFrame:
        """The k rows with the largest values, largest first; `rows` and `values` are (k,).

        With `data` the same rows as a DataFrame, their values beside what data hold of them: see `Scores.top`.

        Args:
            k: how many rows.
            data: what the rows were made from, a line for each of the n training rows.

        Raises:
            InvalidInput: if k is larger than the number of rows, or data do not describe the rows.
        """
        order = top_columns(-self.values[None], k)[0]
        found = TopK(self.rows[order], self.values[order], None if self.ids is None else self.ids[order])
        return found if data is None else frame_of(found, self.axis, data, self.n)

    def __repr__(self) -> str:
        what = f"change of a row's own loss, {self.counterfactual}"
        return f"SelfScores({len(self.values)} rows: {what}; {self.certificate})"

    def __str__(self) -> str:
        return f"{self!r}\n{text_table(self._sides(), 0)}"

    def _repr_html_(self) -> str:
        what = f"Change of a row's own loss, {self.counterfactual}"
        return html_table(what, self._sides(), 0, str(self.certificate))

    def _sides(self) -> dict[str, TopK]:
        return {"largest (value)": self.top(min(SHOWN, len(self.values)))}


def naming(columns: Ids | None, queries: Ids | None) -> dict[str, Any]:
    """The fields of Scores that hold names.

    Args:
        columns: of the rows, groups or new examples; None where they have none.
        queries: of the queries.
    """
    line = "query" if queries is None or queries.name is None else queries.name
    return {
        "ids": None if columns is None else columns.values,
        "query_ids": None if queries is None else queries.values,
        "axes": (line, called(columns)),
    }


def called(rows: Ids | None) -> Any:
    """What rows are called in tables: "row" where they are numbers, "id" where their names are called nothing else."""
    return "row" if rows is None else "id" if rows.name is None else rows.name


def letters(names: NDArray[Any]) -> NDArray[np.uint8]:
    """Names as the bytes of a text, for which the head of a safetensors file may be too short."""
    return np.frombuffer(json.dumps(packed_ids(names)).encode(), dtype=np.uint8)


def names_in(written: NDArray[np.uint8]) -> NDArray[Any]:
    """The names that `letters` wrote."""
    return unpacked_ids(json.loads(written.tobytes()))


_LINES = 8  # of queries, whose values are looked through at once, in one piece of memory
_NAMES = ("ids", "query_ids")
_ARRAYS = ("values", "rows", "scale", "query_values", "standard_error", "error")
