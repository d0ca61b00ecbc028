"""Reviews from other programs: our own exports, edited by somebody; reviews and patches of `upweight repair`; and what
Label Studio exports. Everything is checked against the run first, and nothing is written unless all of it fits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.errors import InvalidInput, PathNotFound, first_line, require
from upweight.explore import cells
from upweight.explore.entries import DROP, KEEP, RELABEL, SKIP
from upweight.explore.labels import Label, Labels
from upweight.explore.reviews import LONGEST_WHO, LONGEST_WHY, Reviews

LARGEST = 500 * 2**20  # bytes of a file
_ACTIONS = (KEEP, RELABEL, DROP, SKIP)


@dataclass(frozen=True)
class Proposed:
    """A decision that a file holds.

    Args:
        place: where in the file, in words.
        row: the training row.
        action: keep, relabel, drop or skip.
        new: the label with relabel.
        who: said it, "" where the file does not say.
        why: a remark.
    """

    place: str
    row: int
    action: str
    new: Label | None = None
    who: str = ""
    why: str = ""


@dataclass(frozen=True)
class Added:
    """What became of the decisions of a file.

    Args:
        added: entries that were written.
        known: decisions that stood already.
        conflicts: rows about which something else stands, and which were left as they are.
        undecided: rows about which the file says two things, or nothing.
    """

    added: int
    known: int
    conflicts: tuple[int, ...]
    undecided: tuple[int, ...]

    def __str__(self) -> str:
        lines = [f"{self.added} decisions added, {self.known} stood already."]
        if self.conflicts:
            lines.append(
                f"{len(self.conflicts)} rows were decided otherwise here and stay so: {_some(self.conflicts)}."
            )
        if self.undecided:
            lines.append(
                f"About {len(self.undecided)} rows the file says nothing, or two things: {_some(self.undecided)}."
            )
        return " ".join(lines)


def read(file: Path, labels: Labels) -> tuple[list[Proposed], tuple[int, ...]]:
    """The decisions of a file, and the rows about which it says nothing or two things.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if it cannot be read, or a line does not belong to this run.
    """
    if not file.is_file():
        message = f"There is no file {file}. Write one with: upweight export RUN --as csv --out {file.stem}.csv."
        raise PathNotFound(message)
    if file.stat().st_size > LARGEST:
        message = f"{file} has {file.stat().st_size:,} bytes, and at most {LARGEST:,} are read. Cut it into parts."
        raise InvalidInput(message)
    try:
        lines, undecided = _lines(file, labels)
        found = [_proposed(labels, place, line) for place, line in lines]
    except InvalidInput:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        message = (
            f"{file} cannot be read as reviews ({first_line(error)}). Pass what `upweight export` or `upweight repair` "
            "wrote (.csv, .jsonl, .parquet), or what Label Studio exports as JSON (.json)."
        )
        raise InvalidInput(message) from error
    decided = [one for one in found if one is not None]
    twice = {one.row for one in decided} if len({one.row for one in decided}) < len(decided) else set()
    for row in sorted(twice):
        places = [one.place for one in decided if one.row == row]
        if len(places) > 1:
            message = f"Row {row} comes twice, at {places[0]} and {places[1]}. Keep one of them."
            raise InvalidInput(message)
    return decided, undecided


def add(reviews: Reviews, proposals: list[Proposed], undecided: tuple[int, ...], who: str) -> Added:
    """The decisions as entries of the log, but for those about rows on which something else stands.

    Raises:
        Outdated, StorageFailed: as `Reviews.decide`.
    """
    added, known, conflicts = 0, 0, []
    for one in proposals:
        now = reviews.verdict(one.row)
        label = {RELABEL: one.new, DROP: None}.get(one.action, reviews.labels.given(one.row))
        if now.action is None:
            told = {"new": one.new, "who": one.who or who, "why": one.why, "seen": now.seen}
            reviews.decide(one.row, one.action, **told)
            added += 1
        elif (now.action, now.label) == (one.action, label):
            known += 1
        else:
            conflicts.append(one.row)
    return Added(added, known, tuple(conflicts), undecided)


# ---- files -----------------------------------------------------------------------------------------------------------

_Line = Mapping[str, Any]


def _lines(file: Path, labels: Labels) -> tuple[list[tuple[str, _Line]], tuple[int, ...]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        table = require("pyarrow.parquet", "parquet").read_table(io.BytesIO(file.read_bytes()))
        return [(f"{file}, row {number}", line) for number, line in enumerate(table.to_pylist())], ()
    text = file.read_text(encoding="utf-8-sig")
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(f"{file}, line {number}", dict(json.loads(line))) for number, line in lines], ()
    if suffix == ".json":
        return _label_studio(file, json.loads(text), labels)
    names, lines = cells.read(text)
    if "row" not in names or not {"action", "correction", "new"} & set(names):
        reason = f"it has the columns {', '.join(names)}, and row beside action, correction or new are wanted"
        raise ValueError(reason)
    return [(f"{file}, line {number}", line) for number, line in lines], ()


def _proposed(labels: Labels, place: str, line: _Line) -> Proposed | None:
    """The decision of a line; None where there is none.

    Raises:
        InvalidInput: if it does not belong to this run.
    """
    row = _row(labels, place, line)
    action, new = str(line.get("action") or "").strip(), line.get("new", line.get("correction"))
    new = None if new is None or new == "" else labels.called(str(new), f"{place}: ")
    if "action" not in line:
        action = "" if new is None else KEEP if new == labels.given(row) else RELABEL
        if "old" in line and "label" not in line and new is None:  # a patch, as `upweight repair` writes it
            action = DROP
    if not action:
        return None
    if action not in _ACTIONS:
        message = f"{place}: action '{action}' is none of {', '.join(_ACTIONS)}. Write one of them, or nothing."
        raise InvalidInput(message)
    if action == RELABEL and (new is None or new == labels.given(row)):
        message = f"{place}: relabel of row {row} without another label than {labels.given(row)!r}. Fill in `new`."
        raise InvalidInput(message)
    if action != RELABEL and new is not None and new != labels.given(row):
        message = (
            f"{place}: action '{action}' beside another label, {new!r}, of row {row}. Write relabel for the action, or "
            "leave `new` empty."
        )
        raise InvalidInput(message)
    who, why = (str(line.get(name) or "") for name in ("who", "why"))
    return Proposed(place, row, action, new if action == RELABEL else None, who[:LONGEST_WHO], why[:LONGEST_WHY])


def _row(labels: Labels, place: str, line: _Line) -> int:
    """The row of a line, if its run, name and label are those of this run.

    Raises:
        InvalidInput: if they are not.
    """
    text = str(line["row"]).strip()
    row = int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else -1
    if not 0 <= row < labels.n:
        message = (
            f"{place}: row {text[:40]!r} does not exist; there are 0 to {labels.n - 1}. Was it made for another run?"
        )
        raise InvalidInput(message + " Import it there.")
    work, label, name = line.get("run"), line.get("label", line.get("old")), line.get("id")
    if work not in (None, "", labels.work):
        message = (
            f"{place} belongs to run {str(work)[:40]}, and this is run {labels.work}. Import it there, or take the "
        )
        raise InvalidInput(message + "column `run` out if the rows are the same.")
    if label is not None and labels.called(str(label), f"{place}: ") != labels.given(row):
        message = (
            f"{place}: row {row} has the label {labels.given(row)!r} in this run and {str(label)[:80]!r} in the file. "
            "Was it made for other data? Import it into the run of these."
        )
        raise InvalidInput(message)
    if labels.ids is not None and name not in (None, "") and str(name) != str(labels.name(row)):
        message = (
            f"{place}: row {row} is called {labels.name(row)!r} in this run and {str(name)[:80]!r} in the file. Was "
        )
        raise InvalidInput(message + "it made for other data? Import it into the run of these.")
    return row


# ---- Label Studio ----------------------------------------------------------------------------------------------------


def _label_studio(file: Path, tasks: Any, labels: Labels) -> tuple[list[tuple[str, _Line]], tuple[int, ...]]:
    """Tasks with annotations, as Label Studio exports them in JSON or JSON-MIN; disagreeing ones decide nothing."""
    found, undecided = [], []
    for number, task in enumerate(tasks):
        place, data = f"{file}, task {task.get('id', number)}", task.get("data", task)
        line = {"row": data["row"], "run": data.get("run"), "label": data.get("given"), "why": "Label Studio"}
        said = set(_annotated(task) if "data" in task else _chosen(task))
        row = _row(labels, place, line)
        if len(said) != 1:
            undecided.append(row)
            continue
        ((verdict, label),) = said
        if verdict:
            line |= {"action": verdict}
        else:
            line |= {
                "action": KEEP if labels.called(label, f"{place}: ") == labels.given(row) else RELABEL,
                "new": label,
            }
        found.append((place, line))
    return found, tuple(undecided)


def _annotated(task: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What each annotation of a task says: (a verdict, "") or ("", a label)."""
    for annotation in task.get("annotations") or []:
        for result in [] if annotation.get("was_cancelled") else annotation.get("result") or []:
            if result.get("type") == "choices":
                yield from _chosen({result.get("from_name"): result["value"]["choices"]})


def _chosen(task: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """The same of choices by the names of their controls."""
    for verdict in _listed(task.get("verdict")):
        yield str(verdict), ""
    for label in _listed(task.get("label")):
        yield "", str(label)


def _listed(value: Any) -> list[Any]:
    """One choice, or several as a list or a dict."""
    value = value.get("choices") if isinstance(value, dict) else value
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def _some(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
