"""Corrected labels: really trained, compared with training again on the old ones, written as a patch to take back.

A review is a CSV file with a line per inspected row, by its number and name, and an empty column `correction`; a person
fills it in. A patch is a CSV file of row, old and new label. Both are checked against the study before anything
happens: the old label must be the one that the study has.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from tqdm import tqdm

import upweight as uw
from upweight.apps import notebook
from upweight.apps.names import names_in_json
from upweight.apps.repair import RANDOM, Repair
from upweight.errors import InvalidInput, PathNotFound, UnsupportedModel

_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a spreadsheet may take for one
Numbers = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Corrected:
    """What correcting labels really did.

    Training again may do much by itself, where training had stopped early. So it was done with nothing changed as well:
    that is the control, and what the corrections did is `effect`, the difference from it, not from `before`.

    Args:
        influence: of the model that was trained on the corrected labels.
        patch: row → (old label, new label).
        labels: (n,) all labels, corrected.
        before, control, after: accuracy on the training rows (by the labels of the time, without those left out), and
            accuracy and mean loss on the test rows, where there are some: as the model was, trained again with nothing
            changed, and trained on the corrected labels.
        unchanged: of the model that was trained again with nothing changed.
        dropped: rows that were left out.
    """

    influence: uw.Influence = field(repr=False)
    patch: Mapping[int, tuple[Any, Any]] = field(repr=False)
    labels: Shaped[NDArray[Any], " n"] = field(repr=False)
    before: Mapping[str, float]
    control: Mapping[str, float]
    after: Mapping[str, float]
    unchanged: uw.Influence = field(repr=False)
    dropped: Int[NDArray[np.int64], " d"]

    @property
    def effect(self) -> dict[str, float]:
        """What the corrections did: after, less the control."""
        return {name: self.after[name] - value for name, value in self.control.items()}

    def to_dict(self) -> dict[str, Any]:
        """The patch and the comparison, ready for JSON."""
        measured = {"before": self.before, "control": self.control, "after": self.after, "effect": self.effect}
        return {
            "corrected": len(self.patch),
            "dropped": self.dropped.tolist(),
            "patch": [{"row": row, "old": old, "new": new} for row, (old, new) in self.patch.items()],
            **names_in_json(self.influence.examples.ids, np.array(list(self.patch), dtype=np.int64)),
            **{name: dict(values) for name, values in measured.items()},
        }

    @property
    def _done(self) -> str:
        return f"{len(self.patch)} labels corrected" + (
            f", {len(self.dropped)} rows dropped" if len(self.dropped) else ""
        )

    def _repr_html_(self) -> str:
        lines = [
            [
                notebook.plain(name),
                *(notebook.plain(values[name], ".4f") for values in (self.before, self.control, self.after)),
                notebook.plain(self.effect[name], "+.4f"),
            ]
            for name in self.before
        ]
        table = notebook.table(self._done, ["", "before", "control", "corrected", "effect"], lines)
        said = "control: trained again with nothing changed; effect: the corrected model less the control"
        return notebook.shown(table, said=[said])

    def __str__(self) -> str:
        lines = [
            self._done,
            f"{'':<16} {'before':>10} {'control':>10} {'corrected':>10}",
        ]
        lines += [
            f"{name:<16} {value:>10.4f} {self.control[name]:>10.4f} {self.after[name]:>10.4f}"
            for name, value in self.before.items()
        ]
        lines.append("control: trained again with nothing changed; compare the corrected model with it")
        return "\n".join(lines)


def corrected(
    influence: uw.Influence,
    corrections: Mapping[int, Any],
    *,
    without: Sequence[int] = (),
    test: Any = None,
    retrain: Any = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Corrected:
    """The model trained on corrected labels, beside the one before and the one trained again with nothing changed.

    Cost: two trainings; the first, the control, ends at once where θ̂ is at a minimum.

    Args:
        influence: of the model before.
        corrections: row → right label, as somebody found it to be; those that have it already are left out of the
            patch. `Repair.suggestions` are questions to that somebody: among the rows inspected, right ones are told to
            change as well.
        without: rows to leave out, for their labels cannot be told.
        test: (Xt, yt) with trusted labels, or Examples; None compares training accuracy only.
        retrain: as for leave_one_out.
        store: a folder that keeps every training as soon as it is done, so that the same call goes on where it was
            stopped; None keeps nothing.
        progress: True or False forces the bar (stderr) on or off; None shows it on a terminal only.

    Raises:
        InvalidInput: if nothing would change, a label is unknown, or a row is both corrected and left out.
        RowOutOfRange: if a row does not exist.
        UnsupportedModel: if the model's targets are no classes.
        NotConverged: if training does not reach a minimum.
        StoreMismatch: if the folder holds other trainings.
    """
    labels, names = uw.training_labels(influence), uw.classes(influence)
    if labels is None or names is None:
        message = (
            f"The targets of {influence.objective.name} are no classes, so there is no label to correct. Pass the "
            "influence of a classifier; other targets are changed by uw.retrained(uw.edited(influence, rows, y_new=…))."
        )
        raise UnsupportedModel(message)
    dropped = np.unique(influence.examples.rows(list(without))) if len(without) else np.array([], dtype=np.int64)
    patch = _patch(influence, corrections, labels, names, dropped)
    changed = np.array(list(patch), dtype=np.int64)
    new = [label for _, label in patch.values()]
    edited = uw.edited(influence, changed, y_new=np.asarray(new)) if patch else influence
    told = {str(row): [str(label) for label in labels] for row, labels in patch.items()}
    more = {"without": dropped.tolist()} if len(dropped) else {}
    course = uw.Course(influence, store, {"work": "corrected", "patch": told, **more}, retrain)
    hidden, words = None if progress is None else not progress, "training again, without and with the corrections"
    with tqdm(total=2, desc=words, unit="training", disable=hidden, leave=False) as steps:
        control = course.retrained(influence, retrain=retrain)
        steps.update()
        after = course.retrained(edited, without=dropped if len(dropped) else None, retrain=retrain)
        steps.update()
    new_labels = labels.copy()
    if patch:
        new_labels[changed] = new
    kept = np.setdiff1d(np.arange(influence.n), dropped)
    return Corrected(
        after,
        patch,
        new_labels,
        _measured(influence, labels, test, kept),
        _measured(control, labels, test, kept),
        _measured(after, new_labels, test, kept),
        control,
        dropped,
    )


def _patch(
    influence: uw.Influence,
    corrections: Mapping[int, Any],
    labels: NDArray[Any],
    names: list[Any],
    dropped: NDArray[np.int64],
) -> dict[int, tuple[Any, Any]]:
    """Row → (old, new) for the labels that change, both as `classes` has them.

    Raises:
        InvalidInput: if there are none and no row is dropped, a label is unknown, or its row is dropped.
    """
    if not isinstance(corrections, Mapping):
        message = f"corrections is a {type(corrections).__name__}. Pass a dict of row → right label, such as {{3: "
        raise InvalidInput(message + f"{names[0]!r}}}.")
    rows = influence.examples.rows(list(corrections)) if corrections else np.array([], dtype=np.int64)
    patch = {}
    for row, new in zip(rows.tolist(), corrections.values(), strict=True):
        if new not in names:
            message = (
                f"Row {row} is to become {new!r}, which is no class: there are {', '.join(map(repr, names[:10]))}."
            )
            raise InvalidInput(message + " Write one of them.")
        if labels[row] != new:
            patch[row] = (names[names.index(labels[row])], names[names.index(new)])
    both = sorted(set(patch) & set(dropped.tolist()))
    if both:
        message = f"Row {both[0]} is to get another label and to be left out. Take it out of corrections or of without."
        raise InvalidInput(message)
    if not patch and not len(dropped):
        message = (
            f"None of the {len(corrections)} corrections changes a label. Fill in the column `correction` of a review, "
            "or pass a dict of row → right label."
        )
        raise InvalidInput(message)
    return patch


def write_review(
    found: Repair,
    file: str | Path,
    *,
    describe: Callable[[int], str] | None = None,
    numbers: Numbers | None = None,
    overwrite: bool = False,
) -> Path:
    """A CSV file with a line per row to inspect, for a person to fill in the column `correction`.

    Args:
        found: what `repair` returns.
        file: where; its folder is made.
        describe: turns a row into a few words.
        numbers: (n,) what each training row is called in the file, for rows that come from one; None takes 0 to n − 1.
        overwrite: whether a review that is there may be replaced.

    Raises:
        InvalidInput: if the file is there already and may not be replaced, or is a folder.
    """
    path = Path(file)
    check_free(path, overwrite=overwrite)
    ranks = {name: found.ranks(name) for name in found.scores if name != RANDOM}
    columns = ("row", "id", "description", "label", "suggested", "correction", "gain", *map(_ranked_by, ranks))
    lines = [
        [
            row if numbers is None else numbers[row],
            "" if found.ids is None else found.ids[row],
            "" if describe is None else describe(int(row)),
            found.labels[row],
            found.suggested[place],
            "",
            f"{found.gain[place]:.8g}",
            *(places[place] for places in ranks.values()),
        ]
        for place, row in enumerate(found.rows)
    ]
    return _write(path, columns, lines)


def read_review(influence: uw.Influence, file: str | Path, *, numbers: Numbers | None = None) -> dict[int, Any]:
    """The corrections of a review: row → right label. Lines without a correction are left alone.

    Args:
        influence: of the study that the review is of.
        file: the CSV file, with at least the columns row, label and correction; separated by commas or semicolons.
        numbers: as for `write_review`.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if a line does not belong to these training rows, names a row twice or an unknown class.
    """
    lines = _read(Path(file), ("row", "label", "correction"))
    filled = [(number, line) for number, line in lines if line["correction"].strip()]
    labels = [(number, line["row"], line["label"]) for number, line in lines]
    checked = _checked(influence, Path(file), labels, numbers)
    meant = _meant(influence)
    found: dict[int, Any] = {}
    for number, line in filled:
        known = meant(line["correction"])
        if not known:
            message = (
                f"{file}, line {number}: '{line['correction']}' is no class of this study; there are "
                f"{_some(influence)}. Write one of them, or leave the cell empty."
            )
            raise InvalidInput(message)
        found[checked[number]] = known[0]
    return found


def write_patch(
    patch: Mapping[int, tuple[Any, Any]],
    file: str | Path,
    *,
    numbers: Numbers | None = None,
    ids: Shaped[NDArray[Any], " n"] | None = None,
    overwrite: bool = False,
) -> Path:
    """A CSV file of row, old and new label: what is needed to take the corrections back.

    Args:
        patch: of `Corrected`.
        file: where; its folder is made.
        numbers: as for `write_review`.
        ids: (n,) names of the training rows for a column `id`, such as `influence.examples.ids`; None leaves it out.
        overwrite: whether a patch that is there may be replaced, after which its corrections cannot be taken back.

    Raises:
        InvalidInput: if the file is there already and may not be replaced, or is a folder.
    """
    check_free(Path(file), overwrite=overwrite)
    lines = [[row if numbers is None else numbers[row], old, new] for row, (old, new) in patch.items()]
    return _write(Path(file), ("row", "old", "new"), lines, None if ids is None else ids[list(patch)])


def read_patch(
    influence: uw.Influence, file: str | Path, *, numbers: Numbers | None = None, revert: bool = False
) -> dict[int, Any]:
    """A patch as corrections: row → new label, or with `revert` row → old label.

    Args:
        influence: of the study that the patch is for, or, to revert it, was applied to.
        file: what `write_patch` wrote.
        numbers: as for `write_review`.
        revert: whether to take it back.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if the study's labels are not those that the patch starts from.
    """
    start, end = ("new", "old") if revert else ("old", "new")
    lines = _read(Path(file), ("row", "old", "new"))
    labels = [(number, line["row"], line[start]) for number, line in lines]
    checked = _checked(influence, Path(file), labels, numbers, revert=revert)
    meant = _meant(influence)
    unknown = [line[end] for _, line in lines if not meant(line[end])]
    if unknown:
        message = f"{file} holds the label '{unknown[0]}', which is no class of this study: {_some(influence)}."
        raise InvalidInput(message + " Was the patch made for another study? Read it with that one.")
    return {checked[number]: meant(line[end])[0] for number, line in lines}


def write_labels(
    labels: Shaped[NDArray[Any], " n"],
    file: str | Path,
    *,
    ids: Shaped[NDArray[Any], " n"] | None = None,
    overwrite: bool = False,
) -> Path:
    """A CSV file of row and label for all rows.

    Args:
        labels: of `Corrected`.
        file: where; its folder is made.
        ids: (n,) names of the rows for a column `id`, such as `influence.examples.ids`; None leaves it out.
        overwrite: whether a file that is there may be replaced.

    Raises:
        InvalidInput: if the file is there already and may not be replaced, or is a folder.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write_labels(np.array(["cat", "dog"]), f"{folder}/labels.csv").read_text())
    row,label
    0,cat
    1,dog
    """
    check_free(Path(file), overwrite=overwrite)
    return _write(Path(file), ("row", "label"), [[row, label] for row, label in enumerate(labels.tolist())], ids)


def check_free(*files: Path, overwrite: bool) -> None:
    """Raises for files that must not be written, before the work that fills them is done.

    Raises:
        InvalidInput: if a file is there already and may not be replaced, is a folder, or its folder is a file.
    """
    for file in files:
        if file.is_dir():
            message = f"{file} is a folder. Name a file, such as {file / 'review.csv'}."
            raise InvalidInput(message)
        if any(above.exists() and not above.is_dir() for above in file.parents):
            message = f"{file} cannot be written: {file.parent} is no folder. Name another folder."
            raise InvalidInput(message)
        if file.exists() and not overwrite:
            message = f"{file} is there already, perhaps with corrections in it. Name another place, or overwrite it: "
            raise InvalidInput(message + "overwrite=True, or --overwrite.")


def _measured(
    influence: uw.Influence, labels: NDArray[Any], test: Any, kept: Int[NDArray[np.int64], " k"]
) -> dict[str, float]:
    told = {"train accuracy": uw.predict(influence, influence.examples.subset(kept)).accuracy(labels[kept])}
    if test is not None:
        queries = influence.queries(test)
        truth = uw.query_labels(influence, queries)
        told["test accuracy"] = uw.predict(influence, queries).accuracy(truth)
        batch = queries.batch(slice(None))
        told["test loss"] = float(uw.calculus.losses(influence.objective.reporting(), batch).double().mean())
    return told


def _ranked_by(score: str) -> str:
    """The name of the column that holds the rank by a score."""
    return f"rank_by_{score.replace('-', '_')}"


def _meant(influence: uw.Influence) -> Callable[[str], list[Any]]:
    """The class that a cell names, as a list of one; empty if none. Blanks at the ends count only where they must."""
    names = uw.classes(influence) or []
    exact = {str(name): [name] for name in names}
    bare: dict[str, list[Any]] = {}
    for name in names:
        bare.setdefault(str(name).strip(), []).append(name)

    def meant(text: str) -> list[Any]:
        near = bare.get(text.strip(), [])
        return exact.get(text, near if len(near) == 1 else [])

    return meant


def _some(influence: uw.Influence) -> str:
    """The first classes, for messages."""
    return ", ".join(repr(str(name)) for name in (uw.classes(influence) or [])[:10])


def _checked(
    influence: uw.Influence,
    file: Path,
    lines: list[tuple[int, str, str]],
    numbers: Numbers | None,
    *,
    revert: bool = False,
) -> dict[int, int]:
    """The training row of every line, if its label is the one that the study has.

    Raises:
        InvalidInput: if it is not, or a row does not exist or comes twice.
    """
    labels, meant = uw.training_labels(influence), _meant(influence)
    called = list(range(influence.n)) if numbers is None else numbers
    place = {str(called[row]): row for row in range(influence.n)}
    found: dict[int, int] = {}
    seen: set[int] = set()
    for number, row, label in lines:
        there = place.get(row.strip())
        if there is None or labels is None or there in seen:
            problem = "comes twice" if there is not None else f"does not exist: there are {called[0]} to {called[-1]}"
            message = f"{file}, line {number}: row {row!r} {problem}. Was the file made for another study, or edited? "
            raise InvalidInput(message + "Keep each row once, as it was written.")
        if meant(label) != [labels[there]]:
            why = "The study's labels changed since, or it is another study: make the file again."
            if revert:
                why = "A patch is taken back where the study has its new labels: name that study."
            message = (
                f"{file}, line {number}: row {row} has the label '{labels[there]}' in this study and '{label}' in "
                f"the file. {why}"
            )
            raise InvalidInput(message)
        found[number] = there
        seen.add(there)
    return found


def _read(file: Path, needed: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV file with their numbers.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if a column is missing, or a line has too few or too many cells.
    """
    if not file.is_file():
        settings = f"--inspect 10% --out {file}"
        if "correction" not in needed:
            settings = f"--corrections REVIEW --out {file.parent}"
        message = f"There is no file {file}. Write it with `upweight repair STUDY {settings}` first."
        raise PathNotFound(message)
    text = file.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=";" if first.count(";") > first.count(",") else ",")
    missing = [name for name in needed if name not in (reader.fieldnames or [])]
    if missing:
        message = f"{file} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}. "
        raise InvalidInput(message + "Keep the first line as it was written.")
    lines = [{name: _bare(cell) if isinstance(cell, str) else cell for name, cell in line.items()} for line in reader]
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            message = f"{file}, line {number} has another number of cells than the first. Save it as CSV again."
            raise InvalidInput(message)
    return list(enumerate(lines, start=2))


def _harmless(cell: Any) -> Any:
    """A cell as it is, but for a text that a spreadsheet would run as a formula: that gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip("'").startswith(_FORMULAS) else cell


def _bare(cell: str) -> str:
    """The text that `_harmless` was given."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULAS) else cell


def _write(file: Path, columns: tuple[str, ...], lines: list[list[Any]], ids: NDArray[Any] | None = None) -> Path:
    """The file, written to another name and then renamed; a column `id` behind the first where the lines have names."""
    if ids is not None:
        columns = (columns[0], "id", *columns[1:])
        lines = [[line[0], name, *line[1:]] for line, name in zip(lines, ids, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    there = file.with_name(f".{file.name}.unfinished")
    with there.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([_harmless(cell) for cell in line] for line in lines)
    return there.replace(file)
