"""What was reviewed in the explorer, as commands: how far it is, files of it, corrected data, and the proof."""

from __future__ import annotations

import getpass
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.cli.console import As, Json, RunFolder, StudyName, Switch, command, load, show
from upweight.cli.outputs import check_file

if TYPE_CHECKING:  # nothing here may import torch before a command runs
    from upweight.cli.study import Study
    from upweight.explore.labels import Labels
    from upweight.explore.reviews import Reviews
    from upweight.show.run import Run


@command
def reviews(
    run: RunFolder,
    add: Path | None = None,
    who: str | None = None,
    by: str = "self-influence",
    budget: int = 100,
    controls: float = 0.2,
    seed: int = 0,
    json: Json = False,
) -> int:
    """How far the review of a run's labels is, and what it says; with --add also decisions from a file.

    Files are what `upweight export` wrote, maybe edited (.csv, .jsonl, .parquet), reviews and patches of `upweight
    repair`, and what Label Studio exports as JSON. What stands already about a row stays.

    Args:
        run: the run folder.
        add: a file of decisions, which become entries of the log.
        who: said so, where the file does not; your name on this machine if it is left out.
        by: the order of the queue: self-influence, loss, margin or random.
        budget: how many rows are to be looked at.
        controls: the share of them that is drawn at random.
        seed: of the draws.
        json: print as JSON.
    """
    from upweight.explore import imports, queue

    labels, log = _opened(run)
    added = None
    if add is not None:
        proposals, undecided = imports.read(add, labels)
        added = imports.add(log, proposals, undecided, getpass.getuser() if who is None else who)
    verdicts = log.verdicts()
    found = queue.progress(queue.planned(queue.Queue(by, budget, controls, seed), labels), verdicts, labels)
    counts = {
        action: sum(one.action == action for one in verdicts.values()) for action in ("keep", "relabel", "drop", "skip")
    }
    told = ", ".join(f"{count} {action}" for action, count in counts.items())
    lines = [*([] if added is None else [str(added)]), f"{len(log.entries())} entries. What stands: {told}."]
    numbers = {"entries": len(log.entries()), **counts, "progress": found.to_dict()}
    show(numbers | ({} if added is None else {"added": vars(added)}), "\n".join([*lines, *found.says()]), json)
    return 0


@command
def export(
    run: RunFolder,
    kind: As = "csv",
    out: Path | None = None,
    by: str = "self-influence",
    budget: int = 100,
    controls: float = 0.2,
    seed: int = 0,
    overwrite: Switch = False,
    json: Json = False,
) -> int:
    """Reviews as a file: csv, jsonl, parquet, cleanlab, label-studio, label-studio-setup or patch.

    `cleanlab` has the columns of its find_label_issues, for CleanLearning.fit(label_issues=…). `label-studio` are tasks
    of the rows in the queue that are not decided yet, with the suggested labels; `label-studio-setup` is the interface
    for them; `upweight reviews RUN --add` reads back what Label Studio exports. `patch` is what changed: row, old, new.

    Args:
        run: the run folder.
        kind: of the file.
        out: the file; its usual name in this folder if it is left out.
        by: the order of the queue, for label-studio: self-influence, loss, margin or random.
        budget: how many rows are in the queue.
        controls: the share of them that is drawn at random.
        seed: of the draws.
        overwrite: replace a file that is there.
        json: print as JSON.
    """
    from upweight.explore import exports, queue
    from upweight.runs.files import write_file

    labels, log = _opened(run)
    rows: list[int] = []
    if kind in {exports.LABEL_STUDIO, exports.LABEL_STUDIO_SETUP}:
        rows = queue.planned(queue.Queue(by, budget, controls, seed), labels).rows.tolist()
    made = exports.exported(kind, labels, log.verdicts(), queue=rows, cards=_cards(_run(run)))
    file = Path(made.name) if out is None else out
    check_file(file, "--out", "reviews.csv", overwrite=overwrite)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, made.content)
    text = "\n".join([f"{kind} written to {file}: {len(made.content):,} bytes", *made.notes])
    show({"out": str(file), "as": kind, "bytes": len(made.content), "notes": list(made.notes)}, text, json)
    return 0


@command
def apply(
    run: RunFolder,
    to: Path,
    label: str,
    out: Path,
    ids: str | None = None,
    overwrite: Switch = False,
    json: Json = False,
) -> int:
    """Write a corrected copy of the table that a run's rows came from; the table itself is never edited.

    Labels become those that were found right, rows that were dropped leave, and everything else stays: types,
    categories and metadata of Parquet, and every byte of the other records of CSV.

    Args:
        run: the run folder.
        to: the table: .csv, .tsv (both also .gz) or .parquet. Its rows are the run's, in their order.
        label: the column of the labels.
        out: the copy.
        ids: the column of the rows' names, where the table has other rows than the run, or in another order.
        overwrite: replace a copy that is there.
        json: print as JSON.
    """
    from upweight.explore import corrected

    check_file(out, "--out", f"corrected-{to.name}", overwrite=overwrite)
    labels, log = _opened(run)
    made = corrected.apply(to, label, labels, log.verdicts(), out, ids)
    show(made.to_dict(), str(made), json)
    return 0


@command
def prove(study: StudyName, run: Path, store: Path | None = None, json: Json = False) -> int:
    """Train on the corrected labels, and say what that did to the run's queries; the Proof page shows it.

    The model is trained twice: with nothing changed, and with the corrections. The queries' labels must be trusted.

    Args:
        study: file.py:function that returns the upweight.Study which the run was made of.
        run: the run folder, whose reviews are taken.
        store: folder that keeps every training as soon as it is done; the same command goes on where it was stopped.
        json: print as JSON.
    """
    from upweight.explore import proof

    labels, log = _opened(run)
    last = len(log.entries())
    changes = {row: one for row, one in log.verdicts().items() if one.wrong}
    _refuse_nothing(run, len(changes))
    loaded = load(study)
    found = _proved(loaded, run, labels, changes, last, store)
    file = proof.write(found, run)
    show(found.to_dict() | {"file": str(file)}, f"{found}\nWritten to {file}; the Proof page shows it.", json)
    return 0


def _proved(study: Study, folder: Path, labels: Labels, changes: dict[int, Any], last: int, store: Path | None) -> Any:
    """The proof of some changes.

    Raises:
        StoreMismatch: if the run is another study's.
    """
    from datetime import UTC, datetime

    import upweight as uw
    from upweight.explore import proof
    from upweight.explore.entries import RELABEL
    from upweight.influence import kept

    influence = study.influence
    queries = influence.queries(study.queries)
    kept.folder(influence.system, queries, influence.objective.name, folder)  # refuses another study's run
    names = {str(name): name for name in uw.classes(influence) or []}
    relabelled = {row: names[str(one.label)] for row, one in changes.items() if one.action == RELABEL}
    dropped = [row for row, one in changes.items() if one.action != RELABEL]
    made = uw.apps.corrected(influence, relabelled, without=dropped, retrain=study.retrain, store=store)

    truth = uw.query_labels(influence, queries)
    assert truth is not None  # the model has classes, and a loss of every query

    def answers(model: uw.Influence) -> proof.Answers:
        told = uw.predict(model, queries).labels
        losses = uw.calculus.losses(model.objective.reporting(), queries.batch(slice(None)))
        assert told is not None  # the model has classes
        return proof.Answers(told, losses.double().cpu().numpy())

    return proof.proof(
        truth,
        *map(answers, (influence, made.unchanged, made.influence)),
        work=labels.work,
        entry=last,
        at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        relabelled=len(relabelled),
        dropped=len(dropped),
    )


def _refuse_nothing(run: Path, changes: int) -> None:
    """Raises where nothing was found wrong.

    Raises:
        InvalidInput: if so.
    """
    from upweight.errors import InvalidInput

    if not changes:
        message = (
            f"Nothing in the reviews of {run} changes a label, so there is nothing to prove. Review some rows first: "
        )
        raise InvalidInput(message + f"upweight explore {shlex.quote(str(run))}.")


def _run(folder: Path) -> Run:
    from upweight.show.run import Run

    return Run.open(folder)


def _opened(folder: Path) -> tuple[Labels, Reviews]:
    """The labels of a run, and the log of its reviews."""
    from upweight.explore.labels import labels_of
    from upweight.explore.reviews import Reviews

    labels = labels_of(_run(folder))
    return labels, Reviews(folder, labels)


def _cards(run: Run) -> Any:
    """From rows to what they look like."""

    def cards(rows: list[int]) -> dict[int, Any]:
        found = run.rows
        return {} if found is None else {row: found.cards[row] for row in rows}

    return cards
