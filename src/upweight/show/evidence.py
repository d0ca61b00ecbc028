"""What trainings and other dampings said of a run's scores, kept in its folder beside them.

    evidence-removals.safetensors      predicted and actual changes when single rows were left out
    evidence-subsets.safetensors       the same of whole subsets
    evidence-dampings.safetensors      how the values change from one damping to the next

`keep_evidence` writes them, `evidence` reads them, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import Damaged, InvalidInput, first_line
from upweight.runs.files import write_tensors
from upweight.runs.store import NAME, SUFFIX, WORK, read_part, work_of
from upweight.show.run import Run

if TYPE_CHECKING:
    from upweight.evaluation.leave_one_out import Outcomes
    from upweight.evaluation.subsets import SubsetOutcomes
    from upweight.influence.damping_path import DampingPath

Matrix = NDArray[np.float64]
REMOVALS, SUBSETS, DAMPINGS = "evidence-removals", "evidence-subsets", "evidence-dampings"


@dataclass(frozen=True)
class Removals:
    """Rows that were really left out, one at a time.

    Args:
        rows: (r,) their numbers.
        predicted: (q, r) the run's values.
        actual: (q, r) what happened, less the control.
        control: (q,) what training again does with all rows.
        standard_error: (q, r) of `actual`, from several seeds; None of one.
    """

    rows: NDArray[np.int64]
    predicted: Matrix
    actual: Matrix
    control: Matrix
    standard_error: Matrix | None = None


@dataclass(frozen=True)
class SubsetSums:
    """Subsets that were really trained on.

    Args:
        predicted: (q, s) sums of the run's values over the rows that were left out.
        actual: (q, s) the measure after training on the subset, mean over seeds.
    """

    predicted: Matrix
    actual: Matrix


@dataclass(frozen=True)
class Dampings:
    """How the values depend on damping.

    Args:
        dampings: (m,) ascending.
        residual: (m,) the largest of any query.
        size: (m,) root mean square of the values.
        correlation_with_next: (m,) of the values with those at the next damping; NaN for the last.
    """

    dampings: Matrix
    residual: Matrix
    size: Matrix
    correlation_with_next: Matrix


@dataclass(frozen=True)
class Evidence:
    """What is known of a run beside its certificate; None where nothing was kept.

    >>> import tempfile, upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.arange(20.0)[:, None], np.arange(20.0) ** 1.5
    >>> influence = uw.explain(Ridge().fit(X, y), X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = uw.write_run(influence, folder, [[20.0]], [90.0])
    ...     kept = uw.evidence(uw.keep_evidence(run, uw.leave_one_out(influence, ([[20.0]], [90.0]), [0, 10])))
    >>> kept.removals.predicted.round(2), kept.removals.actual.round(2), kept.subsets
    (array([[-16.87,  -4.65]]), array([[-19.55,  -4.84]]), None)
    """

    removals: Removals | None
    subsets: SubsetSums | None
    dampings: Dampings | None


def evidence(run: Run) -> Evidence:
    """What was kept of a run.

    Raises:
        Damaged: if a file is.

    >>> import tempfile, upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = [[0.0], [1.0], [2.0]], [0.0, 2.0, 2.0]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     evidence(uw.write_run(uw.explain(Ridge().fit(X, y), X, y), folder, [[3.0]], [3.0]))
    Evidence(removals=None, subsets=None, dampings=None)
    """
    return Evidence(_read(run, REMOVALS, Removals), _read(run, SUBSETS, SubsetSums), _read(run, DAMPINGS, Dampings))


def keep_evidence(run: Run, *found: Outcomes | SubsetOutcomes | DampingPath) -> Run:
    """The same run, with what trainings or other dampings said of its scores kept in its folder; the explorer shows it.

    A second one of a kind takes the place of the first.

    Args:
        run: a finished one.
        found: what `leave_one_out`, `subset_retraining` and `damping_path` gave, for the run's queries.

    Raises:
        InvalidInput: if they are of other queries, rows or measures, or are something else.

    >>> import tempfile
    >>> import upweight as uw
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]], ["no", "no", "yes", "yes"]
    >>> influence = uw.explain(LogisticRegression().fit(X, y), X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = uw.write_run(influence, folder, [[1.4]], ["yes"])
    ...     outcomes = uw.leave_one_out(influence, ([[1.4]], ["yes"]), [0, 2])
    ...     uw.evidence(uw.keep_evidence(run, outcomes)).removals.rows.tolist()
    [0, 2]
    """
    from upweight.evaluation.leave_one_out import Outcomes
    from upweight.evaluation.subsets import SubsetOutcomes
    from upweight.influence.damping_path import DampingPath

    for one in found:
        if isinstance(one, Outcomes):
            _refuse_others(run, one.measure, one.query_values, int(one.rows.max(initial=0)) + 1)
            arrays = {"rows": one.rows, "predicted": _columns(run, one.rows), "actual": one.actual}
            arrays |= {"control": one.control}
            _keep(run, REMOVALS, arrays, one.standard_error)
        elif isinstance(one, SubsetOutcomes):
            _refuse_others(run, one.measure, one.query_values, one.subsets.shape[1])
            _keep(run, SUBSETS, {"predicted": _without(run, one.subsets), "actual": one.values.mean(2)})
        elif isinstance(one, DampingPath):
            first = one.every[0]
            _refuse_others(run, first.measure, first.query_values, first.values.shape[1])
            arrays = {"dampings": one.dampings, "residual": one.residuals.max(1)}
            sizes = [np.sqrt(np.nanmean(scores.values**2)) for scores in one.every]
            _keep(
                run, DAMPINGS, {**arrays, "size": np.array(sizes), "correlation_with_next": one.correlation_with_next}
            )
        else:
            message = (
                f"A {type(one).__name__} is no evidence of a run's scores. Pass what uw.leave_one_out, "
                "uw.subset_retraining or influence.damping_path gave."
            )
            raise InvalidInput(message)
    return run


def _refuse_others(run: Run, measure: str, now: Matrix | None, rows: int) -> None:
    """Raises for what was measured on other queries, or of other rows.

    Raises:
        InvalidInput: then.
    """
    outline = run.outline
    before = outline.query_values
    n = len(outline.rows)
    if measure != outline.measure or rows > n:
        message = (
            f"The run holds the {outline.measure} of its queries and {n:,} rows; this is of {measure} and "
            f"{rows:,}. Pass what was asked of the same influence, for the same queries."
        )
        raise InvalidInput(message)
    if before is not None and now is not None and not (before.shape == now.shape and np.allclose(before, now, 1e-6)):
        message = (
            f"The run's queries have a {measure} of {before[:3]}, these {now[:3]}: they are others, or the model is. "
            "Pass the queries that write_run was given, and ask the same influence."
        )
        raise InvalidInput(message)


def _columns(run: Run, rows: NDArray[np.int64]) -> Matrix:
    """(q, r) the run's values of some rows."""
    found = np.empty((len(run.outline.certificate.residual), len(rows)))
    start = 0
    for block in run.blocks():
        inside = np.flatnonzero((rows >= start) & (rows < start + block.shape[1]))
        found[:, inside] = block[:, rows[inside] - start]
        start += block.shape[1]
    return found


def _without(run: Run, kept: NDArray[np.bool_]) -> Matrix:
    """(q, s) sums of the run's values over the rows that subsets leave out."""
    total, start = np.zeros((len(run.outline.certificate.residual), len(kept))), 0
    for block in run.blocks():
        total += block @ (~kept[:, start : start + block.shape[1]]).T.astype(np.float64)
        start += block.shape[1]
    return total


def _keep(run: Run, name: str, arrays: dict[str, Any], standard_error: Matrix | None = None) -> None:
    more = {} if standard_error is None else {"standard_error": standard_error}
    card = {WORK: work_of(run.manifest), NAME: name}
    write_tensors(run.path / f"{name}{SUFFIX}", {**arrays, **more}, card)


def _read(run: Run, name: str, kind: type[Any]) -> Any:
    """What was kept under a name; None if nothing was.

    Raises:
        Damaged: if it is something else.
    """
    file = run.path / f"{name}{SUFFIX}"
    if not file.is_file():
        return None
    arrays, _ = read_part(file, work_of(run.manifest))
    try:
        return kind(**arrays)
    except TypeError as error:
        message = f"{file} holds no evidence ({first_line(error)}). Delete it, and keep it again: uw.keep_evidence."
        raise Damaged(message) from error
