"""Commands about run folders: one is made with what its rows are, and an interrupted one goes on."""

from __future__ import annotations

import shlex
from pathlib import Path

from upweight.cli.console import Folder, Json, OptionOfStudy, StudyName, app, command, load, show
from upweight.cli.jobs import noted, words
from upweight.cli.outputs import check_folder, named_part


@command
def run(study: StudyName, store: Path, parts: int | None = None, folds: int | None = None, json: Json = False) -> int:
    """Score every training row on every query of the study into a folder, with what rows and queries are.

    The folder holds labels, predictions, losses, self-influence and cards (columns, pictures, or the study's own
    words) beside the scores. `Run.open` reads it without the model.

    Args:
        study: file.py:function that returns an upweight.Study.
        store: the folder; the same command goes on where it was stopped.
        parts: of how many rows that help, and as many that harm a query, it is kept which words, tokens, columns or
            pixels matter, for the explorer to show; such as 4.
        folds: train so many models, each without a fold of the rows, whose labels reviews suggest; such as 5.
        json: print a summary as JSON.
    """
    check_folder(store, "--store")
    from upweight.cli.study import cards
    from upweight.runs import ranks
    from upweight.show.items import write_run

    ranks.join()
    loaded = load(study)
    card, query_card = cards(loaded)
    asked = {"card": card, "query_card": query_card, "parts": parts or 0, "out_of_fold": folds}
    with noted(store, "run", study, {"store": store, "parts": parts, "folds": folds}):
        made = write_run(loaded.influence, store, *loaded.queries, **asked)
    if ranks.first():
        queries, rows = made.scores.values.shape
        show(
            {"store": str(store), "queries": queries, "rows": rows},
            f"{made.scores}\nKept in {store.resolve()}, with what {rows:,} rows and {queries:,} queries are",
            json,
        )
    return 0


@command
def index(
    study: StudyName,
    store: Path,
    error: float = 0.14,
    bits: int = 4,
    shard: str | None = None,
    json: Json = False,
) -> int:
    """Keep the training gradients of the study in few bits, in a folder that answers new queries without model or data.

    `Index.open` reads it. Started by torchrun, its processes share the rows. Needs a network, and Kronecker factors as
    its curvature.

    Args:
        study: file.py:function that returns an upweight.Study.
        store: the folder; the same command goes on where it was stopped.
        error: of the values by the index, relative to their size, that is allowed.
        bits: 4 or 8 for each number.
        shard: i/n makes part i (from 0) of n of the rows only, for jobs that do not know of each other; all parts lie
            in one folder, and the command without --shard makes them one index when they have ended, without a sweep.
        json: print a summary as JSON.
    """
    check_folder(store, "--store")
    part = None if shard is None else named_part(shard)
    from upweight.runs import ranks

    ranks.join()
    influence = load(study).influence
    if part is not None:
        i, n = part
        rows = influence.index_shard(store, i, n, error=error, bits=bits)
        if ranks.first():
            found = f"rows {rows[0]:,} to {rows[-1]:,} are" if rows else "no rows are left for it, and nothing is"
            again = shlex.join(
                ["upweight", "index", study, "--store", str(store), "--error", f"{error}", "--bits", f"{bits}"]
            )
            show(
                {"store": str(store), "shard": i, "shards": n, "first_row": rows.start, "rows": len(rows)},
                f"Part {i} of {n}: {found} in {store.resolve()}. When all {n} have ended: {again}",
                json,
            )
        return 0
    with noted(store, "index", study, {"error": error, "bits": bits, "store": store}):
        made = influence.index(store, error=error, bits=bits)
    if ranks.first():
        show(
            {"store": str(store), "rows": made.n, "coordinates": made.k, "bytes": made.bytes},
            f"{made!r}\nKept in {store.resolve()}: `upweight.Index.open` answers from it",
            json,
        )
    return 0


@command
def resume(
    folder: Folder,
    study: OptionOfStudy,
    out: Path | None = None,
    corrections: Path | None = None,
    patch: Path | None = None,
    overwrite: Json = False,
    json: Json = False,
) -> int:
    """Go on with the command that a folder was made by, with the settings that it was given.

    Every command with --store leaves a job.toml in its folder. Settings are taken from there; the study, whose code is
    run, and every file that is read or written are named by you, since a folder may be somebody else's. It is refused
    if the study's file is not what it was.

    Args:
        folder: what the command had as --store.
        study: what the command had as its study, or as its table.
        out: what the command had as --out, or another place.
        corrections: what `repair` had as --corrections.
        patch: what `repair` had as --patch.
        overwrite: as for `repair`.
        json: print as JSON.
    """
    places = {"out": out, "corrections": corrections, "patch": patch}
    given = {name: path for name, path in places.items() if path is not None}
    more = [f"--{name}" for name, wanted in (("overwrite", overwrite), ("json", json)) if wanted]
    typed = [*words(folder, study, given), *more]
    return app.cli(prog="upweight", args=typed)
