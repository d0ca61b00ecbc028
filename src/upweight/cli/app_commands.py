"""The paper's four uses as commands, and the question of contrast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.cli.console import Json, K, StudyName, command, line, load, one, show
from upweight.cli.outputs import check_picture

if TYPE_CHECKING:  # nothing here may import torch before a command runs
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
    study: StudyName, query: int | None = None, most: int | None = None, refits: int = 1, json: Json = False
) -> int:
    """The smallest sets of label changes, and of removals, that correct wrong predictions; really made and refitted.

    Args:
        study: file.py:function that returns an upweight.Study.
        query: number of the query; all queries that the model gets wrong if it is left out.
        most: rows in a set at most; half of the training rows if it is left out.
        refits: trainings per query and kind of change; those after the first try larger sets.
        json: print as JSON.
    """
    from upweight import apps

    loaded = load(study)
    X, y = _pair(loaded)
    if query is not None:
        place = line(query, len(y))
        X, y = X[place : place + 1], y[place : place + 1]
    settings: dict[str, Any] = {"most": most, "refits": refits, "retrain": loaded.retrain}
    found = [change(loaded.influence, (X, y), **settings) for change in (apps.contrast, apps.contrast_by_removal)]
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
        message = f"The study's queries are {len(study.queries)} things. Give it the pair (Xq, yq) of arrays."
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
    study: StudyName,
    inspect: str = "10%",
    out: Path | None = None,
    corrections: Path | None = None,
    patch: Path | None = None,
    revert: Json = False,
    overwrite: Json = False,
    json: Json = False,
) -> int:
    """Rank training labels for inspection, write a review to fill in, and make its corrections.

    First `upweight repair STUDY --inspect 10% --out review.csv`: the rows of largest self-influence with a suggestion
    each. Fill in the column `correction`. Then `upweight repair STUDY --corrections review.csv --out FOLDER`: the model
    is trained again on the corrected labels, and once with nothing changed, and FOLDER gets labels.csv and patch.csv,
    which `--patch patch.csv` makes again and `--patch patch.csv --revert` takes back.

    Args:
        study: module:function that returns an upweight.Study; its queries are the test rows.
        inspect: how many rows to inspect: 10%, or 0.1, or a number of rows; 100% or 1.0 for all.
        out: the review to write, or the folder for corrected labels.
        corrections: a review that was filled in.
        patch: a patch that was written before.
        revert: take the patch back, where the study has its new labels.
        overwrite: replace a review, labels or a patch that are there.
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
    files = {} if out is None else {"labels": out / "labels.csv", "patch": out / "patch.csv"}
    if out is not None:
        check_free(*(files.values() if making else [out]), overwrite=overwrite)
    loaded = load(study)
    if not making:
        found = apps.repair(loaded.influence, inspect=_share(inspect))
        written = None
        if out is not None:
            written = str(apps.write_review(found, out, describe=loaded.describe, overwrite=overwrite))
        more = "" if written is None else f"\nReview written to {written}: fill in the column `correction`."
        show(found.to_dict() | {"review": written}, f"{found}{more}", json)
        return 0
    if corrections is not None:
        changes = apps.read_review(loaded.influence, corrections)
    else:
        assert patch is not None  # one of the two was given
        changes = apps.read_patch(loaded.influence, patch, revert=revert)
    made = apps.corrected(loaded.influence, changes, test=loaded.queries, retrain=loaded.retrain)
    if out is not None:
        apps.write_labels(made.labels, files["labels"], overwrite=overwrite)
        apps.write_patch(made.patch, files["patch"], overwrite=overwrite)
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
        json: print as JSON.
    """
    from upweight import apps
    from upweight.errors import checked_count

    checked_count(rows, "--rows", hint="1 changes the most vulnerable row")
    checked_count(iterations, "--iterations", hint="each is a step with a training")
    checked_count(flip, "--flip", least=0, hint="0 changes inputs instead of labels")
    loaded = load(study)
    on = one(loaded, query)[0]
    if flip:
        edits = apps.flip_labels(loaded.influence, on, flip, retrain=loaded.retrain, seed=seed)
        show({"query": query} | edits.to_dict(), f"Query {query}: {edits}", json)
        return 0
    ranked = apps.vulnerability(loaded.influence, on, level=level, k=k)
    made = apps.attack(
        loaded.influence,
        on,
        rows=ranked.top(rows),
        level=level,
        step=step,
        iterations=iterations,
        retrain=loaded.retrain,
        seed=seed,
    )
    numbers = {"query": query, "vulnerability": ranked.to_dict(), "attack": made.to_dict()}
    show(numbers, f"Query {query}\n{ranked}\n\n{made}", json)
    return 0
