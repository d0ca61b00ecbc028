"""The paper's four uses as commands, and the question of contrast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.cli.console import Json, K, StudyName, StudyOrTable, command, line, load, one, show
from upweight.cli.jobs import noted
from upweight.cli.outputs import check_file, check_folder, check_picture

if TYPE_CHECKING:  # nothing here may import torch before a command runs
    from upweight.cli.labelled import Labelled
    from upweight.cli.study import Study


@command
def understand(study: StudyName, query: int = 0, k: K = 5, plot: Path | None = None, json: Json = False) -> int:
    """What the answer to one query rests on: rows that help and harm, their class and distance, how few carry it.

    Args:
        study: file.py:function that returns an upweight.Study.
        query: number of the query.
        k: how many rows of each kind.
        plot: file for a picture of influence against distance; its suffix says the format.
        json: print as JSON.
    """
    from upweight import apps
    from upweight.apps import pictures

    if plot is not None:
        check_picture(plot, "--plot")
    loaded = load(study)
    found = apps.understand(loaded.influence, one(loaded, query)[0], k=k, describe=loaded.describe)
    if plot is not None:
        pictures.save(pictures.influence_against_distance(found), plot)
    numbers = found.to_dict()["queries"][0] | {"query": query, "measure": found.scores.measure}
    show(numbers, str(found).replace("Query 0", f"Query {query}", 1), json)
    return 0


@command
def mismatch(
    study: StudyName,
    query: int | None = None,
    k: K = 10,
    groups: Path | None = None,
    plot: Path | None = None,
    json: Json = False,
) -> int:
    """Which training rows, features and sources are responsible for a model's errors.

    Args:
        study: file.py:function that returns an upweight.Study.
        query: number of the query; all queries that the model gets wrong if it is left out.
        k: how many rows of each kind.
        groups: file with one line per training row, the source it comes from.
        plot: file for a picture of the rows and of their features; its suffix says the format.
        json: print as JSON.
    """
    from upweight import apps
    from upweight.apps import pictures

    if plot is not None:
        check_picture(plot, "--plot")
    labels = None if groups is None else _lines(groups)
    loaded = load(study)
    found = apps.mismatch(loaded.influence, _wrong(loaded, query), groups=labels, k=k)
    if plot is not None:
        pictures.save(pictures.responsible(found), plot)
    show(found.to_dict(), str(found), json)
    return 0


@command
def contrast(
    study: StudyName,
    query: int | None = None,
    most: int | None = None,
    refits: int = 1,
    store: Path | None = None,
    json: Json = False,
) -> int:
    """The smallest sets of label changes, and of removals, that correct wrong predictions; really made and refitted.

    Args:
        study: file.py:function that returns an upweight.Study.
        query: number of the query; all queries that the model gets wrong if it is left out.
        most: rows in a set at most; half of the training rows if it is left out.
        refits: trainings per query and kind of change; those after the first try larger sets.
        store: folder that keeps every training as soon as it is done; the same command goes on where it was stopped.
        json: print as JSON.
    """
    from upweight import apps

    loaded = load(study)
    X, y = _pair(loaded)
    if query is not None:
        place = line(query, len(y))
        X, y = X[place : place + 1], y[place : place + 1]
    settings: dict[str, Any] = {"most": most, "refits": refits, "retrain": loaded.retrain}
    with noted(store, "contrast", study, {"query": query, "most": most, "refits": refits}):
        found = [
            change(loaded.influence, (X, y), **settings, store=None if store is None else store / name)
            for change, name in ((apps.contrast, "labels"), (apps.contrast_by_removal, "removals"))
        ]
    show({one.change: one.to_dict() for one in found}, "\n\n".join(map(str, found)), json)
    return 0


def _wrong(study: Study, query: int | None) -> Any:
    """One query, or all that the model gets wrong; all where outputs are no classes.

    Raises:
        InvalidInput: if all are right.
    """
    import numpy as np

    import upweight as uw
    from upweight.errors import InvalidInput

    if query is not None:
        return one(study, query)[0]
    examples = study.influence.encoder.examples(*study.queries)
    labels = uw.query_labels(study.influence, examples)
    if labels is None:
        return examples
    wrong = np.flatnonzero(uw.predict(study.influence, examples).labels != labels)
    if not len(wrong):
        message = (
            f"The model is right about all {len(labels)} queries of the study, so there is no error to explain. Name a "
            "query with --query, or give the study others."
        )
        raise InvalidInput(message)
    return examples.subset(wrong)


def _pair(study: Study) -> tuple[Any, Any]:
    """The queries as (Xq, yq).

    Raises:
        InvalidInput: if they are anything else.
    """
    from upweight.errors import InvalidInput

    if len(study.queries) != 2 or study.queries[1] is None:
        given = ", ".join(type(one).__name__ for one in study.queries)
        message = (
            f"The study's queries are ({given}), and `contrast` needs inputs and labels. Give the study the pair "
            "(Xq, yq) of arrays."
        )
        raise InvalidInput(message)
    return study.queries


def _lines(file: Path) -> list[str]:
    """The lines of a file.

    Raises:
        PathNotFound: if there is no such file.
    """
    from upweight.errors import PathNotFound

    if not file.is_file():
        message = f"There is no file at {file}. Write one line per training row into it: the source the row comes from."
        raise PathNotFound(message)
    return file.read_text(encoding="utf-8").splitlines()


@command
def repair(
    study: StudyOrTable,
    label: str | None = None,
    inspect: str = "10%",
    by: str | None = None,
    out: Path | None = None,
    corrections: Path | None = None,
    patch: Path | None = None,
    revert: Json = False,
    overwrite: Json = False,
    store: Path | None = None,
    json: Json = False,
) -> int:
    """Rank training labels for inspection, write a review to fill in, and make its corrections.

    First `upweight repair STUDY --inspect 10% --out review.csv`: the rows to look at with a suggestion each, in the
    order that finds most of some labels that are flipped on purpose. Fill in the column `correction`. Then
    `upweight repair STUDY --corrections review.csv --out FOLDER`: the model is trained again on the corrected labels,
    and once with nothing changed, and FOLDER gets labels.csv and patch.csv, which `--patch patch.csv` makes again and
    `--patch patch.csv --revert` takes back.

    A table needs no Python: `upweight repair data.csv --label income` says what each column was taken for, fits a model
    by cross-validation, and FOLDER gets a corrected copy of the file.

    Args:
        study: file.py:function that returns an upweight.Study, whose queries are the test rows; or a table: .csv, .tsv
            (both also .gz) or .parquet.
        label: the column of a table whose labels are repaired.
        inspect: how many rows to inspect: 10%, or 0.1, or a number of rows; 100% or 1.0 for all.
        by: the order of inspection: self-influence, loss, margin or mean-rank, for a table also out-of-fold-loss; the
            one that finds most planted flips if it is left out.
        out: the review to write, or the folder for corrected labels.
        corrections: a review that was filled in.
        patch: a patch that was written before.
        revert: take the patch back, where the study has its new labels.
        overwrite: replace a review, labels or a patch that are there.
        store: folder that keeps every training as soon as it is done; the same command goes on where it was stopped.
        json: print as JSON.
    """
    from upweight import apps
    from upweight.apps.corrections import check_free
    from upweight.errors import InvalidInput

    if corrections is not None and patch is not None:
        message = "Both --corrections and --patch were given. Make one of them at a time."
        raise InvalidInput(message)
    if revert and patch is None:
        message = "--revert takes a patch back, and none was given. Name it: --patch FOLDER/patch.csv --revert."
        raise InvalidInput(message)
    making = corrections is not None or patch is not None
    if out is not None:
        check_folder(out, "--out") if making else check_file(out, "--out")
        check_free(*(_written(study, out).values() if making else [out]), overwrite=overwrite)
    share = _share(inspect)
    rows = _labelled(study, label)
    told = {"label": label, "inspect": inspect, "by": by, "revert": revert or None}
    told |= {"out": out, "corrections": corrections, "patch": patch}
    if making:
        with noted(store, "repair", study, told):
            return _correct(study, rows, corrections, patch, revert=revert, out=out, store=store, json=json)
    with noted(store, "repair", study, told):
        found = apps.repair(rows.influence, inspect=share, by=by, scores=rows.scores, retrain=rows.retrain, store=store)
    written, (text, numbers) = None, rows.about
    if out is not None:
        names = {"describe": rows.describe, "numbers": rows.numbers}
        written = str(apps.write_review(found, out, **names, overwrite=overwrite))
    more = "" if written is None else f"\nReview written to {written}: fill in the column `correction`."
    numbered = found.to_dict() | {"review": written} | ({"table": numbers} if numbers else {})
    if rows.numbers is not None:
        numbered["rows"] = rows.numbers[found.rows].tolist()
    show(numbered, f"{text}{chr(10) * 2 if text else ''}{found.text(rows.numbers)}{more}", json)
    return 0


def _labelled(study: str, label: str | None) -> Labelled:
    """The rows of a study, or of a table.

    Raises:
        InvalidInput: if a study is given a label.
    """
    from upweight.cli import labelled, table
    from upweight.errors import InvalidInput

    if table.is_table(study):
        return labelled.of_table(table.read(Path(study), label))
    if label is not None:
        message = (
            f"--label {label} names a column of a table, and {study} is a study, which has its labels. Leave it out, "
            f"or name a file that ends in {', '.join(table.SUFFIXES)}."
        )
        raise InvalidInput(message)
    return labelled.of_study(load(study))


def _written(study: str, out: Path) -> dict[str, Path]:
    """The files that corrections are written to."""
    from upweight.cli.table import is_table

    return {"labels": out / (Path(study).name if is_table(study) else "labels.csv"), "patch": out / "patch.csv"}


def _correct(
    study: str,
    rows: Labelled,
    corrections: Path | None,
    patch: Path | None,
    *,
    revert: bool,
    out: Path | None,
    store: Path | None,
    json: bool,
) -> int:
    """Makes the corrections of a review or of a patch, and writes them; what is there was checked before."""
    from upweight import apps

    if corrections is not None:
        changes = apps.read_review(rows.influence, corrections, numbers=rows.numbers)
    else:
        assert patch is not None  # one of the two was given
        changes = apps.read_patch(rows.influence, patch, numbers=rows.numbers, revert=revert)
    made = apps.corrected(rows.influence, changes, test=rows.test, retrain=rows.retrain, store=store)
    files = {} if out is None else _written(study, out)
    if files:
        rows.write(made, files["labels"])
        ids = made.influence.examples.ids
        apps.write_patch(made.patch, files["patch"], numbers=rows.numbers, ids=ids, overwrite=True)
    told = "".join(f"\n{name} written to {file}" for name, file in files.items())
    show(made.to_dict() | {"files": {name: str(file) for name, file in files.items()}}, f"{made}{told}", json)
    return 0


def _share(inspect: str) -> float:
    """10%, 0.1 and 1.0 as a share, 50 as a number of rows.

    Raises:
        InvalidInput: if it is neither.
    """
    from upweight.errors import InvalidInput

    text = inspect.strip()
    if text.isdecimal():
        return int(text)
    try:
        number = float(text.removesuffix("%"))
    except ValueError as error:
        message = f"--inspect {inspect} is no number. Write a share such as 10% or 0.1, or a number of rows such as 50."
        raise InvalidInput(message) from error
    share = number / 100 if text.endswith("%") else number
    if not 0 < share <= 1:
        message = f"--inspect {inspect} is no share of the rows. Write 10% or 0.1, up to 100% for all rows, or a "
        raise InvalidInput(message + "whole number of rows such as 50.")
    return share


@command
def attack(
    study: StudyName,
    query: int = 0,
    rows: int = 1,
    level: float = 1 / 255,
    step: float = 0.02,
    iterations: int = 100,
    flip: int = 0,
    k: K = 5,
    seed: int = 0,
    store: Path | None = None,
    json: Json = False,
) -> int:
    """How far changes of training rows that nobody sees can move the answer to one query; a robustness audit.

    Says which rows could move it most (equation 5), changes the first of them by less than half a level, trains again
    after every step, and says what the retrained model answers. With --flip N label changes are tried instead.

    Args:
        study: file.py:function that returns an upweight.Study; its training inputs must be one dense array.
        query: number of the query.
        rows: how many of the most vulnerable rows are changed.
        level: the size of one level in the inputs' units: 1 for pixels 0 … 255, 1/255 for pixels 0 … 1.
        step: in levels.
        iterations: at most so many steps, each with a training.
        flip: change up to so many labels, instead of inputs.
        k: how many rows the table of vulnerable rows has.
        seed: of the random change that the result is compared with.
        store: folder that keeps every training as soon as it is done; the same command goes on where it was stopped.
        json: print as JSON.
    """
    from upweight import apps
    from upweight.errors import checked_count

    checked_count(rows, "--rows", hint="1 changes the most vulnerable row")
    checked_count(iterations, "--iterations", hint="each is a step with a training")
    checked_count(flip, "--flip", least=0, hint="0 changes inputs instead of labels")
    loaded = load(study)
    on = one(loaded, query)[0]
    told = {"query": query, "rows": rows, "level": level, "step": step, "iterations": iterations}
    told |= {"flip": flip, "k": k, "seed": seed}
    if flip:
        with noted(store, "attack", study, told):
            edits = apps.flip_labels(loaded.influence, on, flip, retrain=loaded.retrain, seed=seed, store=store)
        show({"query": query} | edits.to_dict(), f"Query {query}: {edits}", json)
        return 0
    ranked = apps.vulnerability(loaded.influence, on, level=level, k=k)
    with noted(store, "attack", study, told):
        made = apps.attack(
            loaded.influence,
            on,
            rows=ranked.top(rows),
            level=level,
            step=step,
            iterations=iterations,
            retrain=loaded.retrain,
            seed=seed,
            store=store,
        )
    numbers = {"query": query, "vulnerability": ranked.to_dict(), "attack": made.to_dict()}
    show(numbers, f"Query {query}\n{ranked}\n\n{made}", json)
    return 0
