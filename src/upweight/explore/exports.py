"""Reviews for other programs: tables, cleanlab's columns, Label Studio's tasks, and a patch; all made in memory."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from upweight.errors import InvalidInput, require
from upweight.explore import cells
from upweight.explore.entries import DROP, RELABEL, Verdict
from upweight.explore.labels import Labels
from upweight.show.png import address
from upweight.show.run import Card
from upweight.show.token_cards import joined

CSV, JSONL, PARQUET = "csv", "jsonl", "parquet"
CLEANLAB, LABEL_STUDIO, LABEL_STUDIO_SETUP, PATCH = "cleanlab", "label-studio", "label-studio-setup", "patch"
Cards = Callable[[Sequence[int]], Mapping[int, Card]]
Verdicts = Mapping[int, Verdict]


@dataclass(frozen=True)
class Exported:
    """A file, made in memory.

    Args:
        name: what it is called unless somebody says otherwise.
        media: its media type.
        content: all of it.
        notes: what whoever reads it should know, in sentences.
    """

    name: str
    media: str
    content: bytes
    notes: tuple[str, ...] = ()


def exported(
    kind: str, labels: Labels, verdicts: Verdicts, *, queue: Sequence[int] = (), cards: Cards | None = None
) -> Exported:
    """The reviews as a file of some kind.

    Args:
        kind: one of KINDS.
        labels: of the run.
        verdicts: what stands.
        queue: the rows of Label Studio's tasks; those that are decided are left out.
        cards: from numbers of rows to what they look like, for Label Studio's tasks.

    Raises:
        InvalidInput: if there is no such kind.
        MissingExtra: if pyarrow is not installed, for Parquet.
    """
    if kind not in KINDS:
        message = f"{kind!r} is no kind of export; there are {', '.join(KINDS)}. Name one of them."
        raise InvalidInput(message)
    if kind == LABEL_STUDIO:
        left = [row for row in queue if row not in verdicts or not verdicts[row].decided]
        return _tasks(labels, left, {} if cards is None else cards(left))
    if kind == LABEL_STUDIO_SETUP:
        return _setup(labels, {} if cards is None else cards(list(queue)[:1]))
    columns = {CLEANLAB: _cleanlab, PATCH: _patch}.get(kind, _reviewed)(labels, verdicts)
    if kind == PARQUET:
        return Exported("reviews.parquet", "application/vnd.apache.parquet", _parquet(columns))
    if kind == JSONL:
        lines = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
        text = "".join(json.dumps(_finite(line), ensure_ascii=False) + "\n" for line in lines)
        return Exported("reviews.jsonl", "application/x-ndjson", text.encode())
    text, guarded = cells.written(columns)
    name = {CSV: "reviews.csv", CLEANLAB: "label-issues.csv", PATCH: "patch.csv"}[kind]
    return Exported(name, "text/csv; charset=utf-8", text.encode(), _guarded(guarded))


# ---- tables ----------------------------------------------------------------------------------------------------------


def _reviewed(labels: Labels, verdicts: Verdicts) -> dict[str, list[Any]]:
    """A line for every row about which something stands."""
    standing = [(one, one.entry) for _, one in sorted(verdicts.items()) if one.entry is not None]
    columns: dict[str, list[Any]] = {"row": [one.row for one, _ in standing]}
    if labels.ids is not None:
        columns["id"] = [labels.name(one.row) for one, _ in standing]
    columns |= {
        "label": [labels.given(one.row) for one, _ in standing],
        "predicted": [labels.predicted(one.row) for one, _ in standing],
        "action": [one.action for one, _ in standing],
        "new": [one.label if one.action == RELABEL else None for one, _ in standing],
        "who": [entry.who for _, entry in standing],
        "at": [entry.at for _, entry in standing],
        "why": [entry.why for _, entry in standing],
        "entry": [entry.number for _, entry in standing],
    }
    scores = {name.replace("-", "_"): values for name, values in labels.scores.items()}
    return (
        columns
        | {name: [float(values[one.row]) for one, _ in standing] for name, values in scores.items()}
        | {"run": [labels.work] * len(standing)}
    )


def _patch(labels: Labels, verdicts: Verdicts) -> dict[str, list[Any]]:
    """What changed: a line for every row whose label becomes another, or that is dropped."""
    wrong = [one for _, one in sorted(verdicts.items()) if one.wrong]
    columns: dict[str, list[Any]] = {"row": [one.row for one in wrong]}
    if labels.ids is not None:
        columns["id"] = [labels.name(one.row) for one in wrong]
    return columns | {
        "old": [labels.given(one.row) for one in wrong],
        "new": [one.label for one in wrong],
        "action": [one.action for one in wrong],
    }


def _cleanlab(labels: Labels, verdicts: Verdicts) -> dict[str, list[Any]]:
    """What cleanlab's `find_label_issues` returns, with classes as 0 … K − 1 in their sorted order, as it has them.

    `is_label_issue` is what people found, so rows that nobody looked at are none; `label_quality` is exp(−loss), for a
    log loss the probability that the model gives the label, which is cleanlab's self-confidence. `predicted_label` is
    what was said out of fold, or else by the model.
    """
    known = np.unique(labels.codes)  # a class that no row has is none of cleanlab's
    given, said = (np.searchsorted(known, codes) for codes in (labels.codes, labels.suggestions))
    issue = np.zeros(labels.n, dtype=bool)
    issue[[row for row, one in verdicts.items() if one.wrong]] = True
    return {
        "is_label_issue": issue.tolist(),
        "label_quality": [None if math.isnan(loss) else math.exp(-max(loss, 0.0)) for loss in _losses(labels).tolist()],
        "given_label": given.tolist(),
        "predicted_label": np.where(np.isin(labels.suggestions, known), said, given).tolist(),
    }


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    texts = {"label", "predicted", "new", "id", "action", "who", "at", "why", "run"}
    plain = {
        name: arrow.array(values, type=None if any(v is not None for v in values) else arrow.string())
        if name in texts
        else arrow.array(values, type=arrow.int64() if name in {"row", "entry"} else arrow.float64())
        for name, values in columns.items()
    }
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(plain), buffer)
    return buffer.getvalue()


def _losses(labels: Labels) -> np.ndarray:
    """(n,) NaN where a row has none."""
    return labels.scores.get("loss", np.full(labels.n, np.nan))


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }


def _guarded(count: int) -> tuple[str, ...]:
    if not count:
        return ()
    return (
        f"{count} cells began like a formula and got an apostrophe in front, so that no spreadsheet runs them; "
        "`upweight reviews RUN --add` takes it off again.",
    )


# ---- Label Studio ----------------------------------------------------------------------------------------------------


def _tasks(labels: Labels, rows: Sequence[int], cards: Mapping[int, Card]) -> Exported:
    """Label Studio's tasks: what a row looks like, and the suggested label as a prediction with a score."""
    tasks, losses = [], _losses(labels)
    for row in rows:
        kind, value = _shown(cards.get(row), row)
        said, _ = labels.suggested(row)
        task: dict[str, Any] = {
            "data": {kind: value, "row": row, "given": labels.given(row), "run": labels.work},
        }
        if labels.ids is not None:
            task["data"]["id"] = labels.name(row)
        if said is not None:
            choice = {"from_name": "label", "to_name": "item", "type": "choices", "value": {"choices": [str(said)]}}
            score = {} if math.isnan(losses[row]) else {"score": 1 - math.exp(-max(float(losses[row]), 0.0))}
            task["predictions"] = [{"model_version": "upweight", **score, "result": [choice]}]
        tasks.append(task)
    note = (
        f"{len(tasks)} tasks of rows that are not decided yet. Set the project up with the export "
        f"`{LABEL_STUDIO_SETUP}`; the score of a prediction is 1 − exp(−loss), so sort by it to see the doubtful first."
    )
    return Exported("tasks.json", "application/json", json.dumps(tasks, ensure_ascii=False).encode(), (note,))


def _setup(labels: Labels, cards: Mapping[int, Card]) -> Exported:
    """The labelling interface that the tasks are for."""
    kind = _shown(next(iter(cards.values()), None), 0)[0]
    tag = {"image": "Image", "text": "Text", "columns": "Table"}[kind]
    choices = "\n".join(f"    <Choice value={quoteattr(str(name))}/>" for name in labels.classes)
    text = (
        f'<View>\n  <{tag} name="item" value="${kind}"/>\n  <Choices name="label" toName="item" choice="single">\n'
        f'{choices}\n  </Choices>\n  <Choices name="verdict" toName="item" choice="single">\n'
        f'    <Choice value="{DROP}"/>\n    <Choice value="skip"/>\n  </Choices>\n</View>\n'
    )
    return Exported("labelling-interface.xml", "application/xml", text.encode())


def _shown(card: Card, row: int) -> tuple[str, Any]:
    """A card as the data of a task: its kind and value."""
    if isinstance(card, np.ndarray):
        return "image", address(card)
    if isinstance(card, Mapping):
        return "columns", {str(name): str(value) for name, value in card.items()}
    if isinstance(card, list):
        return "text", joined(card)
    return "text", f"row {row}" if card is None else card


KINDS = (CSV, JSONL, PARQUET, CLEANLAB, LABEL_STUDIO, LABEL_STUDIO_SETUP, PATCH)
