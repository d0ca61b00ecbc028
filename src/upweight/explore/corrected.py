"""The corrected data set: a copy of the file that the rows came from, in its own schema, with what reviews changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.data import rewritten
from upweight.errors import InvalidInput, PathNotFound
from upweight.explore.entries import RELABEL, Verdict
from upweight.explore.labels import Label, Labels


@dataclass(frozen=True)
class Corrections:
    """What a copy of a file differs in.

    Args:
        out: the copy.
        relabelled: rows with another label.
        dropped: rows that are not in it.
        rows: of the file.
    """

    out: Path
    relabelled: int
    dropped: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "out": str(self.out)}

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.rows - self.dropped:,} of {self.rows:,} rows, {self.relabelled} with another label, "
            f"{self.dropped} dropped"
        )


def apply(
    file: Path, column: str, labels: Labels, verdicts: Mapping[int, Verdict], out: Path, names: str | None = None
) -> Corrections:
    """Write a copy of a file with the labels that people found right, and without the rows that they dropped.

    Args:
        file: CSV, TSV (both also .gz) or Parquet; it is only read.
        column: of the labels.
        labels: of the run that was reviewed.
        verdicts: what stands about its rows.
        out: the copy.
        names: the column of the rows' names, where the file has other rows, or in another order, than the run; None
            takes the column that holds the names of all rows of the run, where they have some, else the order.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if the file's labels are not those that were reviewed.
    """
    if not file.is_file():
        message = f"There is no file {file}. Name the table that the run's rows came from."
        raise PathNotFound(message)
    cells = rewritten.labels_in(file, column)
    places = _places(file, cells, labels, names)
    known = _known(labels, cells)
    for row, place in places.items():
        if known.get(_key(cells[place])) != labels.given(row):
            message = (
                f"Row {row} of the run has the label {labels.given(row)!r}, and {file} has {cells[place]!r} there, in "
                f"its data row {place}. Was the file changed, or sorted? Name the file of this run, or with --ids the "
                "column that names its rows."
            )
            raise InvalidInput(message)
    written: dict[Label | None, Any] = {
        label: cells[places[row]] for row, label in ((row, labels.given(row)) for row in places)
    }
    wrong = {row: one for row, one in verdicts.items() if one.wrong}
    whole = not any("." in str(cell) for cell in cells)  # a class without a row yet is written as the others are
    changed = {
        places[row]: written.get(one.label, _written(one.label, whole))
        for row, one in wrong.items()
        if one.action == RELABEL
    }
    dropped = {places[row] for row, one in wrong.items() if one.action != RELABEL}
    rewritten.rewrite(file, column, changed, dropped, out)
    return Corrections(out, len(changed), len(dropped), len(cells))


def _written(label: Label | None, whole: bool) -> Label | None:
    """A label that stands nowhere in the file, as a whole number where all others are."""
    return int(label) if whole and isinstance(label, float) and label.is_integer() else label


def _places(file: Path, cells: list[Any], labels: Labels, names: str | None) -> dict[int, int]:
    """Where each row of the run stands in the file.

    Raises:
        InvalidInput: if that cannot be told.
    """
    if names is not None:
        return _by_name(file, labels, names)
    if labels.ids is not None:
        named = {str(labels.name(row)).strip() for row in range(labels.n)}
        for column in rewritten.columns_in(file):
            found = [str(cell).strip() for cell in rewritten.labels_in(file, column)]
            if len(set(found)) == len(found) and named <= set(found):  # the rows' names, whatever their order
                return _by_name(file, labels, column)
    if len(cells) == labels.n:
        return {row: row for row in range(labels.n)}
    known = _known(labels, cells)
    labelled = [place for place, cell in enumerate(cells) if _key(cell) in known]
    if len(labelled) == labels.n:
        return dict(enumerate(labelled))
    message = (
        f"{file} has {len(cells):,} rows, {len(labelled):,} of them with a label of the run, and the run has "
        f"{labels.n:,}. Name the file that its rows came from, or with --ids the column that names them."
    )
    raise InvalidInput(message)


def _by_name(file: Path, labels: Labels, column: str) -> dict[int, int]:
    if labels.ids is None:
        message = (
            f"--ids {column} names rows, and the rows of the run have no names. Leave it out, or make the run with "
        )
        raise InvalidInput(message + "names: uw.explain(…, ids=…).")
    places: dict[str, int] = {}
    for place, name in enumerate(rewritten.labels_in(file, column)):
        if places.setdefault(str(name).strip(), place) != place:
            message = f"{file} has two rows that '{column}' calls {name!r}. Name a column that names every row once."
            raise InvalidInput(message)
    missing = [str(labels.name(row)) for row in range(labels.n) if str(labels.name(row)).strip() not in places]
    if missing:
        message = (
            f"{file} has no row that '{column}' calls {missing[0]!r}, nor {len(missing) - 1} others of the run. Name "
        )
        raise InvalidInput(message + "the column of its rows' names, or the file that they came from.")
    return {row: places[str(labels.name(row)).strip()] for row in range(labels.n)}


def _known(labels: Labels, cells: list[Any]) -> dict[str, Label]:
    """The class of every cell that names one, by what it is in words."""
    found = {}
    for text in {_key(cell) for cell in cells}:
        try:
            found[text] = labels.called(text)
        except InvalidInput:
            continue
    return found


def _key(cell: Any) -> str:
    return "" if cell is None else str(cell)
