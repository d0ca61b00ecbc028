"""The whole story on the digits that ship with scikit-learn: fit, explain a mistake, remove, retrain, compare."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.adapters import explain
from upweight.cli.study import Study
from upweight.errors import InvalidInput, checked_count, require
from upweight.evaluation.leave_one_out import Agreement, Outcomes, agreement, leave_one_out
from upweight.influence.checks import Report
from upweight.influence.scores import Scores, TopK
from upweight.show import items
from upweight.show.evidence import evidence, keep_evidence
from upweight.show.report import Page, line_table, picture, picture_row, scatter

_TRAIN = 1400
_L2 = 0.01


@dataclass(frozen=True)
class Demo:
    """What the demo found; `text()` is what it prints, `to_dict()` its JSON."""

    query: int
    label: int
    predicted_label: int
    probability: float
    scores: Scores
    removing: Scores
    outcomes: Outcomes
    first_order: Agreement
    newton: Agreement
    check: Report
    labels: NDArray[np.int64]
    images: NDArray[np.float64]
    query_image: NDArray[np.float64]
    seconds: float

    @property
    def loss(self) -> float:
        """The loss of the query, in nats."""
        assert self.scores.query_values is not None
        return float(self.scores.query_values[0])

    def comparison(self) -> list[tuple[int, float, float, float]]:
        """(row, first order, Newton step, actual) for every row that was really removed; columns of scores are rows."""
        rows = self.outcomes.rows
        columns = zip(rows, self.scores.values[0, rows], self.removing.values[0], self.outcomes.actual[0], strict=True)
        return [(int(row), float(first), float(newton), float(actual)) for row, first, newton, actual in columns]

    def text(self, k: int = 5) -> str:
        """A page of plain text."""
        lines = [
            f"Digit {self.query} of the test set is {_a(self.label)}; the model says {self.predicted_label} "
            f"(probability of {self.label}: {self.probability:.1%}).",
            f"Its loss is {self.loss:.4f}. Which of the {self.scores.n} training digits are behind that?",
            "",
            f"  {'most helpful: without it the loss rises':<42}{'most harmful: without it the loss falls'}",
        ]
        up, down = self.scores.helpful(k), self.scores.harmful(k)
        lines += [f"  {self._cell(up, place):<42}{self._cell(down, place)}" for place in range(k)]
        lines += [
            "",
            f"Really removing the {len(self.outcomes.rows)} most influential rows, one at a time, and training again:",
            "",
            f"  {'row':>5} {'digit':>6} {'predicted':>11} {'Newton step':>12} {'actual':>11}",
        ]
        for row, first, newton, actual in self.comparison()[:8]:
            lines.append(f"  {row:>5} {self.labels[row]:>6} {first:>+11.6f} {newton:>+12.6f} {actual:>+11.6f}")
        lines += [
            f"  {'…':>5}",
            "",
            f"  first order   {self.first_order}",
            f"  Newton step   {self.newton}",
            f"  control (nothing removed): loss moved by {float(self.outcomes.control[0]):+.1e}",
            "",
            f"Certificate: {self.scores.certificate}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        up, down = self.scores.helpful(5), self.scores.harmful(5)
        return {
            "query": self.query,
            "label": self.label,
            "predicted_label": self.predicted_label,
            "helpful": [{"row": int(r), "value": float(v)} for r, v in zip(up.rows[0], up.values[0], strict=True)],
            "harmful": [{"row": int(r), "value": float(v)} for r, v in zip(down.rows[0], down.values[0], strict=True)],
            "retrained_rows": len(self.outcomes.rows),
            "first_order": vars(self.first_order),
            "newton": vars(self.newton),
            "control": float(self.outcomes.control[0]),
            "check": self.check.to_dict(),
            "seconds": self.seconds,
        }

    def _cell(self, top: Any, place: int) -> str:
        row, value = int(top.rows[0, place]), float(top.values[0, place])
        return f"row {row:>4}, {_a(self.labels[row])}: {value:+.5f}"


def run(rows: int = 40) -> Demo:
    """Fit, explain the first misclassified test digit, and retrain without each of its `rows` most influential rows.

    Raises:
        InvalidInput: if rows is not between 2 and the number of training rows.
    """
    if checked_count(rows, "rows", least=2) > _TRAIN:
        message = (
            f"rows={rows}. The demo retrains without that many of {_TRAIN} rows, one at a time; ask for 2 to {_TRAIN}."
        )
        raise InvalidInput(message)
    start = time.perf_counter()
    bunch, model = _fitted()
    X, y = bunch.data / 16, bunch.target
    train, test = slice(0, _TRAIN), slice(_TRAIN, None)
    wrong = int(np.flatnonzero(model.predict(X[test]) != y[test])[0])
    on = (X[test][wrong : wrong + 1], y[test][wrong : wrong + 1])

    influence = explain(model, X[train], y[train])
    scores = influence.on_loss(*on)
    chosen = np.argsort(-np.abs(scores.values[0]), kind="stable")[:rows]
    removing = influence.of_removing(chosen.tolist(), on=on)
    outcomes = leave_one_out(influence, on, chosen)
    return Demo(
        query=wrong,
        label=int(on[1][0]),
        predicted_label=int(model.predict(on[0])[0]),
        probability=float(model.predict_proba(on[0])[0, on[1][0]]),
        scores=scores,
        removing=removing,
        outcomes=outcomes,
        first_order=agreement(scores, outcomes),
        newton=agreement(removing, outcomes),
        check=influence.check(on),
        labels=y[train],
        images=bunch.images[train] / 16,
        query_image=bunch.images[test][wrong] / 16,
        seconds=time.perf_counter() - start,
    )


def _fitted() -> tuple[Any, Any]:
    """The digits, and a model of the first of them."""
    bunch = require("sklearn.datasets", "demo").load_digits()
    logistic = require("sklearn.linear_model", "demo").LogisticRegression
    model = logistic(C=1 / (_L2 * _TRAIN), tol=1e-8, max_iter=2000)
    return bunch, model.fit(bunch.data[:_TRAIN] / 16, bunch.target[:_TRAIN])


def write_run(study: Study, folder: Path, rows: int = 40) -> Path:
    """A run of a study in `folder`, with the rows that move any of its queries most really left out; its path.

    A run that is there already is gone on with.
    """
    influence, on = study.influence, study.queries
    count = min(checked_count(rows, "rows"), influence.n)
    found = items.write_run(influence, folder, *on, card=study.card, query_card=study.query_card, parts=4)
    if evidence(found).removals is None:
        strongest = np.argsort(-np.abs(found.scores.values).max(0), kind="stable")[:count]
        keep_evidence(found, leave_one_out(influence, on, strongest), influence.damping_path(*on))
    return folder


def write_html(demo: Demo, folder: Path) -> Path:
    """The demo as one self-contained HTML file in `folder`; returns its path."""
    page = Page("Which training digits are behind this mistake?")
    page.text(
        f"The model was fitted to {demo.scores.n} digits. Test digit {demo.query} is {_a(demo.label)}, and the model "
        f"says {demo.predicted_label}. Its loss is {demo.loss:.4f} nats."
    )
    asked = f"is {demo.label}, called {demo.predicted_label}"
    page.add(picture_row([(picture(demo.query_image), f"test digit {demo.query}", asked)]))
    page.heading("Most helpful training digits")
    page.text("Without one of these the loss of the test digit rises by the number below it.")
    page.add(_pictures(demo, demo.scores.helpful(8)))
    page.heading("Most harmful training digits")
    page.text("Without one of these the loss of the test digit falls by the number below it.")
    page.add(_pictures(demo, demo.scores.harmful(8)))
    _comparison(page, demo)
    page.heading("How far to trust this")
    page.preformatted(str(demo.check))
    return page.write(folder / "index.html")


def _pictures(demo: Demo, top: TopK) -> str:
    return picture_row(
        [
            (picture(demo.images[row]), f"row {row}, {_a(int(demo.labels[row]))}", f"{value:+.5f}")
            for row, value in zip(top.rows[0], top.values[0], strict=True)
        ]
    )


def _comparison(page: Page, demo: Demo) -> None:
    page.heading("Predicted against actual")
    page.text(
        f"Each of the {len(demo.outcomes.rows)} most influential digits was really removed and the model trained "
        "again. On the line, the prediction is exact. The Newton step corrects for leverage: a row that determines its "
        "own fit leaves a larger gap than its gradient says."
    )
    page.add(scatter([(demo.scores, "first order"), (demo.removing, "Newton step")], demo.outcomes))
    page.add(
        line_table(
            ["", "Pearson r", "rank r", "slope"],
            [
                [name, f"{found.pearson:.5f}", f"{found.spearman:.5f}", f"{found.slope:.4f}"]
                for name, found in (("first order (equation 2)", demo.first_order), ("Newton step", demo.newton))
            ],
        )
    )
    lines = [
        [str(row), str(demo.labels[row]), *(f"{value:+.6f}" for value in values)] for row, *values in demo.comparison()
    ]
    page.add(line_table(["row", "digit", "predicted", "Newton step", "actual"], lines))


def _a(digit: int) -> str:
    """The digit with its article: a 7, an 8."""
    return f"an {digit}" if digit == 8 else f"a {digit}"
