"""Numbers that know their sign, units, n and certificate.

`values[q, i]` is the predicted change of query q's measure (its loss, in nats for log losses) under the named
counterfactual: L(query) after it, minus L(query) now. When a row is removed, a positive value means that the row HELPS
the query, for the query's loss would rise without it. The paper's raw derivative (equation 2) is `derivative`.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from upweight.errors import InvalidInput, Undefined, first_line, require
from upweight.influence.certificate import Certificate, packed, unpacked
from upweight.runs.store import read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas as pd


class TopK(NamedTuple):
    """The k rows that help or harm most, strongest first: `rows` and `values`, each (q, k)."""

    rows: Int[NDArray[np.int64], "q k"]
    values: Float[NDArray[np.float64], "q k"]


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
            message = (
                f"Row {row} has sample weight 0: removing it changes nothing (values = 0) and its derivative is not "
                "kept. Use of_adding for its derivative."
            )
            raise Undefined(message)
        return self.values / self.scale

    def helpful(self, k: int = 10) -> TopK:
        """The k columns with the largest values, largest first; on removal, the rows that help the query most."""
        return self._top(-self.values, k)

    def harmful(self, k: int = 10) -> TopK:
        """The k columns with the smallest values, smallest first; on removal, the rows that harm the query most."""
        return self._top(self.values, k)

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame of values: one line per query, one column per row."""
        pandas = require("pandas", "pandas")
        index = pandas.RangeIndex(len(self.values), name="query")
        return pandas.DataFrame(self.values, index=index, columns=pandas.Index(self.rows, name="row"))

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """The scores of several blocks of queries, one below the other.

        Raises:
            InvalidInput: if there are none, or their columns are not the same rows.
        """
        if not parts or any(not np.array_equal(part.rows, parts[0].rows) for part in parts):
            message = f"{len(parts)} blocks of scores do not stand for the same rows. Join those of one question only."
            raise InvalidInput(message)
        first = parts[0]

        def stacked(name: str) -> Any:
            return None if getattr(first, name) is None else np.concatenate([getattr(part, name) for part in parts])

        return replace(
            first,
            **{name: stacked(name) for name in ("values", "query_values", "standard_error", "error")},
            certificate=Certificate.joined([part.certificate for part in parts]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        card, parts = packed(self.certificate, "certificate")
        text = {
            "counterfactual": self.counterfactual,
            "measure": self.measure,
            "n": self.n,
            "certificate": card,
        }
        write_tensors(path, arrays | parts, {"upweight": json.dumps(text)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Scores that were written by `save`.

        Raises:
            InvalidInput: if the file holds something else.
        """
        arrays, metadata = read_tensors(path)
        try:
            text = json.loads(metadata["upweight"])
            card = unpacked(text["certificate"], arrays, "certificate")
            named = {name: text[name] for name in ("counterfactual", "measure", "n")}
            return cls(certificate=card, **named, **arrays)  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = (
                f"{path} is a safetensors file without upweight scores in it, or a damaged one "
                f"({type(error).__name__}: {first_line(error)}). Scores are written by scores.save(path)."
            )
            raise InvalidInput(message) from error

    def __repr__(self) -> str:
        queries, columns = self.values.shape
        return (
            f"Scores({queries} queries × {columns} columns: change of the query's {self.measure}, "
            f"{self.counterfactual}; {self.certificate})"
        )

    def _repr_html_(self, queries: int = 5, k: int = 3) -> str:
        """A small table for notebooks: for each of the first queries, the rows that help and harm most."""
        up, down = self.helpful(min(k, self.values.shape[1])), self.harmful(min(k, self.values.shape[1]))

        def cell(top: TopK, query: int) -> str:
            return ", ".join(
                f"{row}&nbsp;({value:+.3g})" for row, value in zip(top.rows[query], top.values[query], strict=True)
            )

        lines = [
            f"<tr><td>{q}</td><td>{cell(up, q)}</td><td>{cell(down, q)}</td></tr>"
            for q in range(min(queries, len(self.values)))
        ]
        more = f"<p>… and {len(self.values) - queries} more queries</p>" if len(self.values) > queries else ""
        caption = html.escape(f"Change of the query's {self.measure}, {self.counterfactual}")
        head = "<tr><th>query</th><th>most helpful (value rises)</th><th>most harmful (value falls)</th></tr>"
        certificate = f"<p><small>{html.escape(str(self.certificate))}</small></p>"
        return f"<table><caption>{caption}</caption>{head}{''.join(lines)}</table>{more}{certificate}"

    def _top(self, keys: NDArray[np.float64], k: int) -> TopK:
        order = top_columns(keys, k)
        return TopK(self.rows[order], np.take_along_axis(self.values, order, 1))


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
    if not certificates:
        message = "There are no blocks of scores to reduce. Pass influence.on_loss_in_blocks(Xq, yq)."
        raise InvalidInput(message)

    def joined(tops: list[TopK]) -> TopK:
        return TopK(np.concatenate([top.rows for top in tops]), np.concatenate([top.values for top in tops]))

    known = None if values[0] is None else np.concatenate(values)
    return Extremes(joined(helpful), joined(harmful), known, Certificate.joined(certificates))


@dataclass(frozen=True)
class SelfScores:
    """Each row's removal (or what else `counterfactual` names), measured on its own loss: `values` (n,).

    They are ≥ 0 when the penalty is not folded and C + λI is positive.

    Large values belong to rows that the model could not predict from the others: mislabelled, rare or atypical.
    """

    values: Float[NDArray[np.float64], " n"]
    rows: Int[NDArray[np.int64], " n"]
    n: int
    certificate: Certificate
    scale: Float[NDArray[np.float64], " n"] | None
    standard_error: Float[NDArray[np.float64], " n"] | None = field(default=None, repr=False)
    counterfactual: str = "row removed"

    @property
    def derivative(self) -> Float[NDArray[np.float64], " n"]:
        """I_up,loss(z, z), with values = −(w/n) · derivative.

        Raises:
            Undefined: if a row has weight 0.
        """
        return Scores(
            self.values[None], self.counterfactual, self.rows, self.n, self.certificate, self.scale
        ).derivative[0]

    def top(self, k: int = 10) -> TopK:
        """The k rows with the largest values, largest first; `rows` and `values` are (k,)."""
        order = top_columns(-self.values[None], k)[0]
        return TopK(self.rows[order], self.values[order])

    def __repr__(self) -> str:
        what = f"change of a row's own loss, {self.counterfactual}"
        return f"SelfScores({len(self.values)} rows: {what}; {self.certificate})"


_ARRAYS = ("values", "rows", "scale", "query_values", "standard_error", "error")


def top_columns(keys: Float[NDArray[np.float64], "q r"], k: int) -> Int[NDArray[np.int64], "q k"]:
    """The columns of the k smallest keys of every line, smallest first, NaN last; ties go to the lower column.

    Raises:
        InvalidInput: if k is not between 1 and the number of columns.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= keys.shape[1]:
        message = f"k={k}, and there are {keys.shape[1]} columns to choose from. Ask for 1 to {keys.shape[1]}."
        raise InvalidInput(message)
    return np.stack([_smallest(line, k) for line in keys])


def _smallest(line: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    if np.isnan(line).any():
        return np.argsort(line, kind="stable")[:k]  # which puts NaN last
    threshold = np.partition(line, k - 1)[k - 1]
    candidates: NDArray[Any] = np.flatnonzero(line <= threshold)
    return candidates[np.argsort(line[candidates], kind="stable")][:k]
