"""What reviews need to know of the training rows: given and predicted labels, and how suspicious each row is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput, RowOutOfRange
from upweight.runs.store import work_of
from upweight.show.run import Run, joined

Label = str | int | float
MOST_CLASSES = 5_000
OUT_OF_FOLD, THE_MODEL = "out of fold", "the model"  # whose suggestions are


@dataclass(frozen=True)
class Labels:
    """The labels of a run's training rows, as numbers of classes, with the scores that rank them.

    Args:
        work: what the run is, in a few letters; reviews belong to it.
        classes: every label that a training row or a query has, or the model gave one.
        codes: (n,) the class of each row.
        said: (n,) the class that the model gives it, −1 where it gives none.
        scores: (n,) numbers by "self-influence", "loss", "margin"; larger is more suspicious.
        ids: (n,) names, None where rows have none.
        held_out: (n,) the class that models gave it which were trained without it, −1 where none did.
    """

    work: str
    classes: tuple[Label, ...]
    codes: NDArray[np.int32] = field(repr=False)
    said: NDArray[np.int32] = field(repr=False)
    scores: dict[str, NDArray[np.float64]] = field(repr=False)
    ids: NDArray[Any] | None = field(default=None, repr=False)
    held_out: NDArray[np.int32] | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.codes)

    def given(self, row: int) -> Label:
        """The label that a row has in the data.

        Raises:
            RowOutOfRange: if there is no such row.
        """
        if not 0 <= row < self.n:
            message = f"Row {row} does not exist: the run has {self.n:,} rows. Name one of 0 to {self.n - 1}."
            raise RowOutOfRange(message)
        return self.classes[self.codes[row]]

    def predicted(self, row: int) -> Label | None:
        """The label that the model gives a row."""
        return self._class(self.said[row])

    def suggested(self, row: int) -> tuple[Label | None, str]:
        """The label that is suggested for a row, and whose it is: OUT_OF_FOLD where it is known, or else THE_MODEL."""
        if self.held_out is not None and self.held_out[row] >= 0:
            return self._class(self.held_out[row]), OUT_OF_FOLD
        return self.predicted(row), THE_MODEL

    @property
    def suggestions(self) -> NDArray[np.int32]:
        """(n,) the classes that are suggested: those out of fold where known, else the model's own; −1 for none."""
        return self.said if self.held_out is None else np.where(self.held_out >= 0, self.held_out, self.said)

    def meant(self, label: Any) -> Label:
        """The class that a label is.

        Raises:
            InvalidInput: if it is none.
        """
        if not isinstance(label, bool):
            for known in self.classes:
                if known == label and isinstance(known, str) == isinstance(label, str):
                    return known
        message = f"{label!r} is no class of this run: there are {self.some()}. Write one of them."
        raise InvalidInput(message)

    def called(self, text: str, where: str = "") -> Label:
        """The class that a text names, as a file has it there; blanks at the ends count only where they must.

        Raises:
            InvalidInput: if it is none, or could be two.
        """
        exact = [known for known in self.classes if str(known) == text]
        near = exact or [known for known in self.classes if str(known).strip() == text.strip()] or self._number(text)
        if len(near) != 1:
            message = (
                f"{where}'{text[:80]}' names {len(near) or 'no'} classes of this run, not one: there are {self.some()}."
            )
            raise InvalidInput(message + " Write one of them as it stands here.")
        return near[0]

    def some(self) -> str:
        """The first classes, for messages."""
        more = f" and {len(self.classes) - 10} more" if len(self.classes) > 10 else ""
        return ", ".join(map(repr, self.classes[:10])) + more

    def name(self, row: int) -> str | int | None:
        """What a row is called, None where rows have no names."""
        if self.ids is None:
            return None
        plain = self.ids[row].item() if isinstance(self.ids[row], np.generic) else self.ids[row]
        return plain if isinstance(plain, str | int) else str(plain)

    def _class(self, code: int) -> Label | None:
        return None if code < 0 else self.classes[code]

    def _number(self, text: str) -> list[Label]:
        """Numeric classes that a number equals which is written otherwise, like 1.0 for 1."""
        try:
            number = float(text)
        except ValueError:
            return []
        return [known for known in self.classes if not isinstance(known, str) and float(known) == number]


def labels_of(run: Run) -> Labels:
    """The labels of a run's training rows.

    Raises:
        InvalidInput: if the run holds no labels of classes.
    """
    parts = [replace(part, cards=[]) for part in run.items()]  # pictures of a million rows need not be held
    rows = joined(parts) if parts else None
    if rows is None or rows.labels is None:
        found = "its scores only" if rows is None else "no labels of its rows"
        message = (
            f"{run.path} holds {found}, and a review is of labels. Make a run that has them: uw.write_run(influence, "
        )
        raise InvalidInput(message + "folder, Xq, yq).")
    parts = [rows.labels, _like(rows.labels, rows.predictions), _like(rows.labels, rows.out_of_fold)]
    asked = _of_queries(run, rows.labels)
    values = np.unique(np.concatenate([part for part in [*parts, asked] if part is not None]))
    if not _are_classes(values):
        message = (
            f"The rows of {run.path} have {len(values):,} different labels such as {values[0]}, which are measurements "
            "and no classes, so none can be reviewed as wrong. Make a run of a classifier, or look at the rows by "
            "their self-influence: Run.rows."
        )
        raise InvalidInput(message)
    none = np.full(len(rows), -1, dtype=np.int32)
    codes = [none if part is None else np.searchsorted(values, part).astype(np.int32) for part in parts]
    scores = {"self-influence": rows.self_influence, "loss": rows.losses}
    scores["margin"] = None if rows.margins is None else -rows.margins
    known = {name: np.asarray(one, dtype=np.float64) for name, one in scores.items() if one is not None}
    ids = run.outline.ids if run.finished else None
    classes = tuple(values.tolist())
    own, said, held_out = codes
    outside = None if rows.out_of_fold is None else held_out
    return Labels(work_of(run.manifest), classes, own, said, known, ids, outside)


def _like(given: NDArray[Any], found: NDArray[Any] | None) -> NDArray[Any] | None:
    """What a model says, where that are labels like the given ones."""
    return found if found is not None and (found.dtype.kind in "US") == (given.dtype.kind in "US") else None


def _of_queries(run: Run, given: NDArray[Any]) -> NDArray[Any] | None:
    """The labels of the queries, where they are of the rows' kind: a row may have the label of a query alone."""
    found = None if run.queries is None else run.queries.labels
    return _like(given, found)


def _are_classes(values: NDArray[Any]) -> bool:
    whole = values.dtype.kind in "USiu" or bool(np.all(values == np.round(values)))
    return whole and len(values) <= MOST_CLASSES
