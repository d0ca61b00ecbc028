"""Answers about queries × rows that are never held: the rows that lead, what all of them add up to, how they spread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from upweight.data.ids import as_json, as_told
from upweight.errors import InvalidInput, first_line, require
from upweight.influence.certificate import Certificate, packed, unpacked
from upweight.influence.running import Histogram, aligned
from upweight.influence.scores import Scores, letters, names_in
from upweight.influence.top import HARMFUL, HELPFUL, TopK, frame_of, html_table, text_table
from upweight.runs.files import read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Leading:
    """What `Scores` would say of every query, without its values: made by `influence.leading`.

    Args:
        largest: the k largest values of every query, largest first; `helpful` gives them.
        smallest: the k smallest, smallest first; `harmful` gives them.
        total: (q,) the sum of a query's values over all n rows.
        squares: (q,) the sum of their squares.
        counts: (q, b) how many values lie in each bin; see `histogram`.
        edges: (b + 1,) of the bins.
        counterfactual, n, certificate, measure, query_values, axes: as of Scores.
        by_group: (q, g) sums over the groups that were asked for, as of `influence.of_groups`; None if none were.
        by_class: (q, K) sums over the rows of each class; None where targets are no class numbers.
    """

    largest: TopK
    smallest: TopK
    total: Float[NDArray[np.float64], " q"]
    squares: Float[NDArray[np.float64], " q"]
    counts: Int[NDArray[np.int64], "q b"] = field(repr=False)
    edges: Float[NDArray[np.float64], " e"] = field(repr=False)
    counterfactual: str
    n: int
    certificate: Certificate
    measure: str = "loss"
    query_values: Float[NDArray[np.float64], " q"] | None = None
    by_group: Scores | None = field(default=None, repr=False)
    by_class: Scores | None = field(default=None, repr=False)
    axes: tuple[Any, Any] = ("query", "row")

    @property
    def k(self) -> int:
        """Rows that were kept on either side."""
        return self.largest.rows.shape[1]

    @property
    def mean(self) -> Float[NDArray[np.float64], " q"]:
        """(q,) the mean of a query's values over all n rows."""
        return self.total / self.n

    @property
    def histogram(self) -> Histogram:
        """Counts (q, b) of every query's values, and the edges (b + 1,) of their bins, the same for all queries.

        Edges are ±2ᵉ(1 + j/4): an upper edge is at most 25 % above the lower one, so that any quantile is known that
        well. Values between ±2⁻⁶⁴ are in one bin around 0. A query without values counts nothing.
        """
        return self.counts, self.edges

    def helpful(self, k: int = 10) -> TopK:
        """The k rows with the largest values, largest first, as `Scores.helpful`; k at most what was kept."""
        return _first(self.largest, self._checked(k))

    def harmful(self, k: int = 10) -> TopK:
        """The k rows with the smallest values, smallest first, as `Scores.harmful`; k at most what was kept."""
        return _first(self.smallest, self._checked(k))

    def top(self, k: int = 10, data: Any = None) -> pd.DataFrame:
        """A DataFrame of the k strongest rows of every query, the largest |value| first, as `Scores.top`.

        Args:
            k: rows for each query, at most what was kept on either side.
            data: what the rows were made from, a line for each of the n training rows.

        Raises:
            InvalidInput: if k is larger than what was kept, or data do not describe the rows.
        """
        return frame_of(_strongest(self.largest, self.smallest, self._checked(k)), self.axes[1], data, self.n)

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame of the rows that were kept, a line for each query and row; `side` is helpful or harmful."""
        pandas = require("pandas", "pandas")
        sides = {"helpful": self.largest, "harmful": self.smallest}
        frames = [frame_of(top, self.axes[1], None, self.n).assign(side=side) for side, top in sides.items()]
        return pandas.concat(frames)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically."""
        card, parts = packed(self.certificate, "certificate")
        text: dict[str, Any] = {"leading": 1, "certificate": card, "axes": [as_json(name) for name in self.axes]}
        text |= {name: getattr(self, name) for name in _TOLD}
        arrays = parts | {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        named = {"query_ids": self.largest.query_ids}
        for side in _SIDES:
            top = getattr(self, side)
            arrays |= {f"{side}.rows": top.rows, f"{side}.values": top.values}
            named[f"{side}.ids"] = None if top.ids is None else top.ids.ravel()
        for sums in filter(lambda name: getattr(self, name) is not None, _SUMS):
            found = getattr(self, sums)
            arrays[f"{sums}.values"], named[f"{sums}.ids"] = found.values, found.ids
            text[sums] = as_json(found.axes[1])
        arrays |= {name: letters(names) for name, names in named.items() if names is not None}
        write_tensors(path, arrays, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Leading:
        """What was written by `save`; a name that is no text, number, date or tuple comes back as its text.

        Raises:
            InvalidInput: if the file holds something else.
        """
        arrays, text = read_tensors(path)
        try:
            return _loaded(text, arrays)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            message = (
                f"{path} is a safetensors file without leading rows in it, or a damaged one "
                f"({type(error).__name__}: {first_line(error)}). They are written by leading.save(path); scores are "
                "read by Scores.load(path)."
            )
            raise InvalidInput(message) from error

    def __repr__(self) -> str:
        queries, k = self.largest.rows.shape
        return (
            f"Leading({queries} queries × {k} of {self.n} rows on either side: change of the query's {self.measure}, "
            f"{self.counterfactual}; {self.certificate})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{text_table(self._sides(), len(self.total))}"

    def _repr_html_(self) -> str:
        """A small table for notebooks: for each of the first queries, the rows that help and harm most."""
        what = f"Change of the query's {self.measure}, {self.counterfactual}"
        return html_table(what, self._sides(), len(self.total), str(self.certificate))

    def _sides(self) -> dict[str, TopK]:
        return {HELPFUL: self.largest, HARMFUL: self.smallest}

    def _checked(self, k: int) -> int:
        if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= self.k:
            message = (
                f"k={k}, and {self.k} rows were kept on either side. Ask for 1 to {self.k}, or keep more: "
                f"influence.leading(Xq, yq, k={max(self.k + 1, k) if isinstance(k, int) else self.k + 1})."
            )
            raise InvalidInput(message)
        return int(k)


def joined(parts: Sequence[Leading]) -> Leading:
    """The answers of several blocks of queries of one question, one below the other."""
    first = parts[0]
    counts, edges = aligned([part.histogram for part in parts])

    def stacked(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    def summed(name: str) -> Scores | None:
        return None if getattr(first, name) is None else Scores.joined([getattr(part, name) for part in parts])

    return replace(
        first,
        **{name: stacked(name) for name in ("total", "squares", "query_values")},
        **{name: TopK.joined([getattr(part, name) for part in parts]) for name in _SIDES},
        **{name: summed(name) for name in _SUMS},
        counts=counts,
        edges=edges,
        certificate=Certificate.joined([part.certificate for part in parts]),
    )


def with_sums(leading: Leading, **sums: tuple[NDArray[np.float64], NDArray[Any] | None, Any]) -> Leading:
    """The same with `by_group` or `by_class`: (q, g) sums, the names of the groups, and what these are called."""

    def removed(values: NDArray[np.float64], ids: NDArray[Any] | None, name: Any) -> Scores:
        count = values.shape[1]
        return Scores(
            values,
            "group removed",
            np.arange(count),
            leading.n,
            leading.certificate,
            np.full(count, -1 / leading.n),
            leading.measure,
            leading.query_values,
            ids=ids,
            query_ids=leading.largest.query_ids,
            axes=(leading.axes[0], name),
        )

    return replace(leading, **{name: removed(*told) for name, told in sums.items()})


def _loaded(text: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Leading:
    told: dict[str, Any] = {name: text[name] for name in _TOLD} | {
        "axes": tuple(as_told(name) for name in text["axes"])
    }
    told["certificate"] = unpacked(text["certificate"], arrays, "certificate")
    names = {name: names_in(arrays.pop(name)) for name in list(arrays) if name.endswith("ids")}
    queries = names.get("query_ids")
    for side in _SIDES:
        rows, values = arrays.pop(f"{side}.rows"), arrays.pop(f"{side}.values")
        ids = names.get(f"{side}.ids")
        told[side] = TopK(rows, values, None if ids is None else ids.reshape(rows.shape), queries)
    sums = {
        name: (arrays.pop(f"{name}.values"), names.get(f"{name}.ids"), as_told(text[name]))
        for name in _SUMS
        if name in text
    }
    leading = Leading(**told, **arrays)  # type: ignore[arg-type]
    shape, q = leading.largest.rows.shape, len(leading.total)
    shapes = [(side.rows.shape, side.values.shape) for side in (leading.largest, leading.smallest)]
    lengths = [np.shape(leading.squares), np.shape(leading.counts)[:1], np.shape(leading.edges)]
    lengths.append(np.shape(leading.certificate.residual))
    if (
        shapes != [(shape, shape)] * 2
        or shape[:1] != (q,)
        or not min(shape)
        or lengths != [(q,), (q,), (leading.counts.shape[1] + 1,), (q,)]
        or (queries is not None and len(queries) != q)
    ):
        message = f"rows and values of {shapes} beside {lengths}"
        raise ValueError(message)
    return with_sums(leading, **sums)


def _first(top: TopK, k: int) -> TopK:
    return replace(top, rows=top.rows[:, :k], values=top.values[:, :k], ids=None if top.ids is None else top.ids[:, :k])


def _strongest(largest: TopK, smallest: TopK, k: int) -> TopK:
    """The k rows with the largest |value|, which are among the k of either side; ties go to the earlier row."""
    rows = np.concatenate([largest.rows, smallest.rows], 1)
    values = np.concatenate([largest.values, smallest.values], 1)
    places = []
    for line, strength in zip(rows, np.abs(values), strict=True):
        once = np.unique(line, return_index=True)[1]  # a row may be on either side
        places.append(once[np.argsort(-strength[once], kind="stable")][:k])
    at = np.stack(places)
    ids = None if largest.ids is None or smallest.ids is None else np.concatenate([largest.ids, smallest.ids], 1)
    found = (None if array is None else np.take_along_axis(array, at, 1) for array in (rows, values, ids))
    return TopK(*found, largest.query_ids)  # type: ignore[arg-type]


_SIDES, _SUMS = ("largest", "smallest"), ("by_group", "by_class")
_ARRAYS = ("total", "squares", "counts", "edges", "query_values")
_TOLD = ("counterfactual", "measure", "n")
