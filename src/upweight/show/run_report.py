"""A run folder as one HTML page, for people who will never install anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data import markup
from upweight.data.ids import text_of
from upweight.errors import InvalidInput, checked_count
from upweight.influence.scores import Scores
from upweight.influence.top import top_columns
from upweight.runs.machine import in_bytes
from upweight.show import svg
from upweight.show.cards import looks
from upweight.show.evidence import Evidence, evidence
from upweight.show.health import health
from upweight.show.report import Page, charts, line_table
from upweight.show.run import Card, Items, Run

LIMIT = 5_000_000  # bytes of a page
_SIDE, _WORDY = 6, 3  # rows of either kind beside a query: pictures, and what takes more room
_QUEUE = 24  # rows that look suspicious
_BINS = 48
_LEFT = 20_000  # bytes of the style and the last lines


def write_report(
    run: Run | str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    queries: int = 12,
    limit: int = LIMIT,
) -> Path:
    """One self-contained HTML page about a run: what was run, whether to trust it, and the rows behind some queries.

    The page holds pictures, texts and charts, loads nothing and runs nothing, so that it can be sent to anybody. It is
    made from the folder alone, without the model and without torch. What `keep_evidence` kept is told too.

    Args:
        run: a run folder that `write_run` or `on_loss(store=)` finished.
        file: where to write.
        queries: how many are shown: those that are wrong, worst first, then those that the model is least sure of.
        limit: bytes of the page; queries that would go beyond it are left out, and the page says how many.

    Raises:
        InvalidInput: if the run is not finished, or nothing fits into the limit.
        PathNotFound, Damaged: as for `Run.open`.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    told = _Told.of(opened, checked_count(queries, "queries"))
    page = Page(f"{told.measure_of}: what is behind {told.many_queries}")
    _summary(page, told)
    _how_to_read(page, told)
    _distributions(page, told)
    queue = _queue(told)
    trust = _trust(told, evidence(opened))
    below = len((queue + trust).encode()) + _LEFT
    if page.size + below > limit:
        message = (
            f"limit={in_bytes(limit)}, and a page of this run without any query takes {in_bytes(page.size + below)}. "
            f"Pass limit={2 * (page.size + below):d}, or more."
        )
        raise InvalidInput(message)
    _queries(page, told, limit - below)
    page.add(queue)
    page.add(trust)
    page.text(
        f"Made by upweight from {opened.path.name}/ alone. This page holds everything it shows (at most "
        f"{in_bytes(limit)}), loads nothing and runs nothing.",
        "soft",
    )
    return page.write(Path(file))


@dataclass(frozen=True)
class _Told:
    """What is read of a run: everything but the values, and the values of the queries that are shown.

    Args:
        run: the folder.
        outline: its scores without values.
        shown: the numbers of the queries, in order.
        why: why each is shown.
        values: (shown, n) theirs.
        counts, edges: the histogram of all values of all queries.
    """

    run: Run
    outline: Scores
    shown: list[int]
    why: list[str]
    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]

    @classmethod
    def of(cls, run: Run, queries: int) -> _Told:
        outline = run.outline
        shown, why = _chosen(run.queries, outline, queries)
        low, high, parts = 0.0, 0.0, []
        for block in run.blocks():
            known = block[np.isfinite(block)]
            low, high = min(low, float(known.min(initial=0))), max(high, float(known.max(initial=0)))
            parts.append(block[shown])
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([-0.5, 0.5])
        counts = np.zeros(len(edges) - 1, dtype=np.int64)
        for block in run.blocks():
            counts += np.histogram(block[np.isfinite(block)], edges)[0]
        return cls(run, outline, shown, why, np.concatenate(parts, 1), counts, edges)

    @property
    def n(self) -> int:
        return len(self.outline.rows)

    @property
    def q(self) -> int:
        return len(self.outline.certificate.residual)

    @property
    def measure_of(self) -> str:
        return str(self.run.manifest["fingerprint"].get("objective", "A model"))

    @property
    def many_queries(self) -> str:
        return f"{self.q:,} predictions" if self.q != 1 else "one prediction"

    @property
    def rows(self) -> Items | None:
        return self.run.rows

    def row(self, number: int) -> str:
        return f"row {number}" if self.outline.ids is None else text_of(self.outline.ids[number])

    def query(self, number: int) -> str:
        names = self.outline.query_ids
        return f"query {number}" if names is None else f"query {text_of(names[number])}"


def _chosen(items: Items | None, outline: Scores, most: int) -> tuple[list[int], list[str]]:
    """The queries to show and why: the wrong ones by loss, then those with the smallest lead over another class."""
    losses = items.losses if items is not None else outline.query_values
    count = len(outline.certificate.residual)
    losses = np.zeros(count) if losses is None else np.nan_to_num(losses)
    wrong = _wrong(items)
    by_loss = np.argsort(-losses, kind="stable")
    if wrong is None:
        return by_loss[:most].tolist(), ["one of the largest losses"] * min(most, count)
    first = [int(query) for query in by_loss if wrong[query]]
    margins = None if items is None else items.margins
    order = by_loss if margins is None else np.argsort(np.nan_to_num(margins, nan=np.inf), kind="stable")
    unsure = [int(query) for query in order if not wrong[query]]
    wanted = max(most - min(len(unsure), most // 3), 0)
    first = first[:wanted]
    unsure = unsure[: most - len(first)]
    return [*first, *unsure], ["wrong"] * len(first) + ["right, but least sure"] * len(unsure)


def _wrong(items: Items | None) -> NDArray[np.bool_] | None:
    """Which predictions are not the label; None where there are no classes."""
    if items is None or items.labels is None or items.predictions is None:
        return None
    if items.labels.dtype.kind == "f" or items.predictions.dtype.kind == "f":
        return None
    return items.labels != items.predictions


# ---- sections --------------------------------------------------------------------------------------------------------


def _summary(page: Page, told: _Told) -> None:
    outline, work = told.outline, told.run.manifest["fingerprint"]
    good, sentence = health(outline.certificate, outline.query_values, outline.measure)
    page.text(sentence, "health" if good else "health care")
    events = [event["time"] for event in told.run.events if isinstance(event.get("time"), str)]
    lines = [
        ["model", told.measure_of],
        ["training rows", f"{told.n:,}"],
        ["queries", f"{told.q:,}"],
        ["question", f"change of the query's {outline.measure}, {outline.counterfactual}"],
        ["curvature", str(work.get("curvature", ""))],
        ["solver", str(work.get("solver", ""))],
        ["made", f"{events[0][:16].replace('T', ' ')} UTC with {work.get('versions', '')}" if events else ""],
    ]
    wrong = _wrong(told.run.queries)
    if wrong is not None:
        lines.insert(3, ["wrong", f"{int(wrong.sum()):,} of {len(wrong):,} queries ({wrong.mean():.1%})"])
    page.add(line_table(["", ""], lines, "What was run"))


def _how_to_read(page: Page, told: _Told) -> None:
    page.heading("How to read a value")
    page.text(
        f"A value belongs to one training row and one query. It predicts by how much the query's "
        f"{told.outline.measure} would change if the model were trained again without that row (in nats where the loss "
        "is a logarithm). Above 0 (+) it would rise: the row helps this prediction. Below 0 (−) it would fall: the row "
        "harms it. Values of different rows add up, nearly, as long as few rows are removed."
    )


def _distributions(page: Page, told: _Told) -> None:
    page.heading("Distributions")
    measure = told.outline.measure
    x = f"change of the query's {measure} without the row"
    every = "Values of all rows on all queries"
    drawn = [(every, svg.histogram(told.counts, told.edges, title=every, x=x, y="pairs", log=True))]
    for items, who in ((told.rows, "training rows"), (told.run.queries, "queries")):
        if items is not None:
            drawn.append(_spread(items.losses, f"Losses of {who}", "loss", who))
    if told.rows is not None and told.rows.self_influence is not None:
        what = "change of a row's own loss without it"
        drawn.append(_spread(told.rows.self_influence, "Self-influence", what, "training rows"))
    page.add(charts(drawn))


def _spread(values: NDArray[np.float64], title: str, x: str, y: str) -> tuple[str, str]:
    counts, edges = np.histogram(values[np.isfinite(values)], _BINS)
    return title, svg.histogram(counts, edges, title=title, x=x, y=y, log=True)


def _queries(page: Page, told: _Told, room: int) -> None:
    """Queries with the rows behind them, as many as there is room for."""
    page.heading("Predictions and the training rows behind them")
    shown = 0
    parts: list[str] = []
    for place in range(len(told.shown)):
        part = _query(told, place)
        if page.size + sum(map(len, parts)) + len(part.encode()) > room:
            break
        parts.append(part)
        shown += 1
    left = len(told.shown) - shown
    beyond = f" {left} more were chosen and left out, for the page would be too large." if left else ""
    page.text(
        f"{shown} of {told.q:,} queries: those that are wrong, worst first, and those that the model is least sure of. "
        f"Of every query the rows that help and that harm it most.{beyond}"
    )
    for part in parts:
        page.add(part)


def _query(told: _Told, place: int) -> str:
    number, values = told.shown[place], told.values[place : place + 1]
    items = told.run.queries
    card = items.cards[number] if items is not None else None
    name = told.query(number)
    facts = _facts(items, number)
    wordy = isinstance(card, str | dict)
    k = min(_WORDY if wordy else _SIDE, told.n)
    sides = []
    for word, keys in (("help", -values), ("harm", values)):
        rows = [row for row in top_columns(keys, k)[0].tolist() if (values[0, row] > 0) == (word == "help")]
        cells = [_row(told, row, float(values[0, row]), card) for row in rows if values[0, row] != 0]
        title = f"Rows that {word} most"
        body = f'<ul class="cards{" wordy" if wordy else ""}">{"".join(cells)}</ul>' if cells else "<p>none</p>"
        sides.append(f"<div><h3>{title}</h3>{body}</div>")
    own = f'<div class="card">{looks(card, name)}</div>' if card is not None else ""
    return (
        f'<section class="query"><h3>{markup.text(name)}: {markup.text(told.why[place])}</h3>'
        f'<p class="soft">{markup.text(facts)}</p>{own}<div class="sides">{"".join(sides)}</div></section>'
    )


def _row(told: _Told, row: int, value: float, beside: Card) -> str:
    items = told.rows
    name = told.row(row)
    kind = "help" if value > 0 else "harm"
    card = looks(items.cards[row], name, beside) if items is not None else ""
    facts = markup.text(_facts(items, row))
    return (
        f'<li class="card"><p><b>{markup.text(name, 60)}</b> <span class="value {kind}">{value:+.3g} {kind}s</span></p>'
        f'<p class="soft">{facts}</p>{card}</li>'
    )


def _facts(items: Items | None, number: int) -> str:
    """Label, prediction and loss of a row or query, as far as they are known."""
    if items is None:
        return ""
    parts = []
    if items.labels is not None:
        parts.append(f"label {_short(items.labels[number])}")
    if items.predictions is not None:
        parts.append(f"predicted {_short(items.predictions[number])}")
    return ", ".join([*parts, f"loss {items.losses[number]:.3g}"])


def _short(value: Any) -> str:
    told = f"{value:.4g}" if isinstance(value, float) else str(value)
    return told if len(told) <= 60 else told[:59] + "…"


def _queue(told: _Told) -> str:
    """The rows with the largest self-influence: the first to look at for wrong labels."""
    items = told.rows
    if items is None or items.self_influence is None:
        return ""
    order = np.argsort(-np.nan_to_num(items.self_influence, nan=-np.inf), kind="stable")[:_QUEUE]
    cells = []
    for row in order.tolist():
        name = told.row(row)
        value = f'<span class="value">{items.self_influence[row]:.3g}</span>'
        cells.append(
            f'<li class="card"><p><b>{markup.text(name, 60)}</b> {value}</p>'
            f'<p class="soft">{markup.text(_facts(items, row))}</p>{looks(items.cards[row], name)}</li>'
        )
    kinds = {type(card) for card in (items.cards[row] for row in order.tolist())}
    wordy = " wordy" if kinds & {str, dict} else ""
    return (
        "<h2>Rows to look at first</h2><p>Self-influence: how much a row's own loss would rise if the model had never "
        "seen it. The largest belong to rows that the others contradict: wrong labels, rare cases, broken inputs.</p>"
        f'<ul class="cards{wordy}">{"".join(cells)}</ul>'
    )


def _trust(told: _Told, known: Evidence) -> str:
    """What was checked by training again, and the certificate."""
    parts = ["<h2>How far to trust this</h2>"]
    drawn, measure = [], told.outline.measure
    if known.removals is not None:
        title = f"{len(known.removals.rows):,} rows really left out, one at a time"
        drawn.append(_compared(known.removals.predicted, known.removals.actual, title, measure))
    if known.subsets is not None:
        title = f"{known.subsets.actual.shape[1]:,} subsets really trained on"
        x, y = "predicted change, summed over rows", f"{measure} after training"
        drawn.append(
            (title, svg.scatter(known.subsets.predicted, known.subsets.actual, title=title, x_name=x, y_name=y))
        )
    if known.dampings is not None:
        title, path = "Values along other dampings", known.dampings
        lines = {"correlation with the next": (path.dampings, path.correlation_with_next)}
        drawn.append((title, svg.line(lines, title=title, x="damping λ", y="correlation", log_x=True)))
    if drawn:
        parts.append(charts(drawn))
    else:
        parts.append(
            "<p>Nothing was trained again for this run, so the certificate below is all that speaks for it. To check "
            "the values by deed: <code>uw.keep_evidence(run, uw.leave_one_out(influence, (Xq, yq), rows))</code>.</p>"
        )
    said = str(told.outline.certificate).split("; ")
    parts.append(f"<h3>Certificate</h3><ul>{''.join(f'<li>{markup.text(line, 500)}</li>' for line in said)}</ul>")
    parts.append(
        "<p>The certificate says how the numbers were computed: on which curvature, how exactly the linear system was "
        "solved (its residual, which should be far below 1), how far the model is from a minimum of its training loss "
        "(‖∇R‖, which should be near 0), and whether the curvature is positive, as the theory asks.</p>"
    )
    return "".join(parts)


def _compared(predicted: NDArray[np.float64], actual: NDArray[np.float64], title: str, measure: str) -> tuple[str, str]:
    """Predicted against actual changes, and below the chart how close they are."""
    both = np.isfinite(predicted) & np.isfinite(actual)
    x = f"predicted change of {measure}"
    chart = svg.scatter(predicted, actual, title=title, diagonal=True, x_name=x, y_name="actual change")
    if both.sum() < 3 or not predicted[both].std() or not actual[both].std():
        return title, chart
    close = np.corrcoef(predicted[both], actual[both])[0, 1]
    slope = np.polyfit(predicted[both], actual[both], 1)[0]
    words = f"Correlation {close:.3f}, slope {slope:.3f} (1 is the right size) over {int(both.sum()):,} pairs."
    return title, f"{chart}<p>{words}</p>"
