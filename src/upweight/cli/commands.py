"""The command line: `upweight demo | explore | check | plan | score | merge | index | run | resume | top | report |
validate | doctor`, and the uses of the answers: `understand | mismatch | contrast | repair | attack`; and of what was
reviewed in the explorer: `reviews | export | apply | prove`.

A model of your own is named by `file.py:function` or `module:function`, a function that returns an upweight.Study.
Results go to stdout; progress, and what the study prints while it is made, go to stderr. `--debug`, anywhere on the
line, shows the traceback of an error.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upweight.cli import app_commands, folders, review_commands  # noqa: F401 their commands join the application
from upweight.cli.console import (
    NAMES,
    Json,
    K,
    RunFolder,
    Stores,
    StudyName,
    Switch,
    app,
    command,
    line,
    load,
    one,
    show,
)
from upweight.cli.endings import ASSUMPTIONS_FAIL, CODES
from upweight.cli.jobs import noted
from upweight.cli.outputs import check_file, check_folder, checked_part

if TYPE_CHECKING:  # nothing here may import torch before a command runs
    from upweight.cli.study import Study
    from upweight.influence.leading import Leading
    from upweight.influence.scores import Scores


@command
def demo(
    out: Path = Path("upweight-demo"),
    rows: int = 40,
    explore: Switch = False,
    data: Literal["digits", "mnist", "enron1", "hospital"] = "digits",
    json: Json = False,
) -> int:
    """Explain a misclassified digit, retrain to check, and write an HTML report (scikit-learn's digits; no network).

    Args:
        out: folder for the report, or the run.
        rows: how many of the most influential rows are really removed.
        explore: make a run of all test digits instead, and open it in the explorer, as `upweight explore` does.
        data: what the explorer shows: those digits, pictures of MNIST, e-mails of Enron1, or stays in hospital
            (Diabetes-130). The last three are downloaded once, or read from the folder in UPWEIGHT_DATA.
        json: print numbers as JSON.

    Raises:
        InvalidInput: if other data than the digits are asked for without the explorer.
    """
    from upweight.cli import demo as story

    check_file(out / "index.html", "--out")
    if explore:
        _require_pages()
        from upweight.cli.studies import STUDIES

        return opened(story.write_run(STUDIES[data](), out / ("run" if data == "digits" else data), rows))
    if data != "digits":
        from upweight.errors import InvalidInput

        message = (
            f"--data {data}, and the report of the demo is of the digits alone. Add --explore: it makes a run of "
            f"{data}, and opens it."
        )
        raise InvalidInput(message)
    found = story.run(rows)
    page = story.write_html(found, out)
    show(
        found.to_dict() | {"report": str(page)},
        f"{found.text()}\n\nReport with pictures: {page.resolve()}  ({found.seconds:.1f} s)",
        json,
    )
    return 0


@command
def explore(
    run: RunFolder,
    compare: Path | None = None,
    port: int = 0,
    host: str = "127.0.0.1",
    beyond_this_machine: Switch = False,
) -> int:
    """Look at a run folder in the browser, on this machine only: why, with which rows, and how far to trust it.

    The link that is printed opens it, and nothing else does. Ctrl-C ends it.

    Args:
        run: a folder that uw.write_run made.
        compare: another run of the same rows and queries, to see beside it.
        port: where to listen; 0 takes any that is free.
        host: address of this machine to listen at.
        beyond_this_machine: let other machines reach it at --host, which must then be named; the link stays secret only
            as far as the network does.
    """
    return opened(run, compare, port=port, host=host, beyond=beyond_this_machine)


@command
def check(study: StudyName, json: Json = False) -> int:
    """Whether the theory's assumptions hold: gradient, curvature, residuals, coverage, drift.

    Args:
        study: file.py:function that returns an upweight.Study.
        json: print numbers as JSON.
    """
    loaded = load(study)
    report = loaded.influence.check(loaded.queries)
    show(report.to_dict(), str(report), json)
    return 0 if report.ok else ASSUMPTIONS_FAIL


@command
def plan(study: StudyName, json: Json = False) -> int:
    """What scoring the study's queries will cost: time, passes over the data, flops, memory, disk; what to lower.

    Args:
        study: file.py:function that returns an upweight.Study.
        json: print numbers as JSON.
    """
    loaded = load(study)
    found = loaded.influence.plan(*loaded.queries)
    show(found.to_dict(), str(found), json)
    return 0


@command
def doctor(json: Json = False) -> int:
    """What a bug report needs to know of this machine: versions, threads, memory; does it compute alike, and how fast.

    Args:
        json: print as JSON.
    """
    from upweight.cli import doctor as physician

    found = physician.examine()
    show(found.to_dict(), str(found), json)
    return 0 if found.ok else ASSUMPTIONS_FAIL


@command
def score(
    study: StudyName,
    out: Path | None = None,
    store: Path | None = None,
    top: int | None = None,
    shard: str | None = None,
    json: Json = False,
) -> int:
    """Score every training row on every query of the study, and save the scores, or what leads among them.

    Started by torchrun, its processes share the rows, and the first of them writes and prints.

    Args:
        study: file.py:function that returns an upweight.Study.
        out: file for the scores (safetensors), readable by Scores.load and `upweight top`.
        store: folder for finished chunks, so that an interrupted run resumes.
        top: keep so many rows on either side of each query, sums and a histogram instead of all scores, for more rows
            and queries than fit in memory; readable by Leading.load and `upweight top`.
        shard: i/n computes part i (from 0) of n into the store only, for jobs that do not know of each other; `merge`
            makes the scores of all parts.
        json: print a summary as JSON.
    """
    if out is not None:
        check_file(out, "--out")
    if store is not None:
        check_folder(store, "--store")
    part = checked_part(out, store, shard, top)
    from upweight.runs import ranks

    ranks.join()
    loaded = load(study)
    influence = loaded.influence
    if part is not None and store is not None:
        return _shard(loaded, store, part, json)
    assert out is not None  # `part` has asked for one
    with noted(store, "score", study, {"out": out, "top": top}):
        if top is None:
            scores = influence.on_loss(*loaded.queries, store=store)
        else:
            scores = influence.leading(*loaded.queries, k=top, store=store)
    return _written(scores, out, json) if ranks.first() else 0


@command
def merge(stores: Stores, out: Path, json: Json = False) -> int:
    """Make the scores of all shards that `upweight score --shard` has computed, and save them.

    Args:
        stores: their folders: one that they share, or one of each.
        out: file for the scores (safetensors), readable by Scores.load and `upweight top`.
        json: print a summary as JSON.
    """
    check_file(out, "--out")
    from upweight.influence import shards

    return _written(shards.merge(stores), out, json)


def _shard(study: Study, store: Path, part: tuple[int, int], json: bool) -> int:
    """A part of the scores into the store."""
    from upweight.influence import shards
    from upweight.runs import ranks

    rows = shards.compute(study.influence.system, study.queries, store, part)
    i, n = part
    if ranks.first():
        found = f"rows {rows[0]:,} to {rows[-1]:,} are" if rows else "no rows are left for it, and nothing is"
        done = f"upweight merge {shlex.quote(str(store))} --out FILE"
        show(
            {"store": str(store), "shard": i, "shards": n, "first_row": rows.start, "rows": len(rows)},
            f"Shard {i} of {n}: {found} in {store.resolve()}. When all {n} have ended: {done}",
            json,
        )
    return 0


def _written(scores: Scores | Leading, out: Path, json: bool) -> int:
    """The exit code, after scores are written to a file and told."""
    from upweight.influence.scores import Scores

    queries, rows = (scores.values if isinstance(scores, Scores) else scores.largest.rows).shape
    out.parent.mkdir(parents=True, exist_ok=True)
    scores.save(out)
    show(
        {"out": str(out), "queries": queries, "rows": rows, "certificate": _card(scores)},
        f"{scores}\nSaved to {out.resolve()}",
        json,
    )
    return 0


@command
def top(study: StudyName, query: int = 0, k: K = 10, json: Json = False) -> int:
    """The training rows that help and harm one query most.

    Args:
        study: file.py:function that returns an upweight.Study, or the path of a file that `upweight score` wrote.
        query: number of the query.
        k: how many rows of each kind.
        json: print as JSON.
    """
    from upweight.data.ids import in_json, text_of
    from upweight.influence.scores import Scores

    if _is_path(study):
        scores, describe = _saved(study), None
        place = line(query, len(scores.certificate.residual))
    else:
        loaded = load(study)
        scores, place = loaded.influence.on_loss(*one(loaded, query)), 0
        describe = loaded.describe
    k = min(k, len(scores.rows) if isinstance(scores, Scores) else scores.k)
    up, down = scores.helpful(k), scores.harmful(k)
    kinds = {
        kind: (most.rows[place], most.values[place], None if most.ids is None else most.ids[place])
        for kind, most in (("helpful", up), ("harmful", down))
    }
    lines = [f"Query {query}: change of its {scores.measure}, {scores.counterfactual}"]
    for kind, (rows, values, ids) in kinds.items():
        names = [""] * k if ids is None else [f"  {text_of(name)}" for name in ids]
        lines += ["", f"  most {kind}"]
        lines += [
            f"  row {row:>8} {value:>+14.6g}{name}  {describe(int(row)) if describe else ''}".rstrip()
            for row, value, name in zip(rows, values, names, strict=True)
        ]
    found = {
        kind: [
            {"row": int(row), "value": float(values[rank])} | ({} if ids is None else {"id": in_json(ids)[rank]})
            for rank, row in enumerate(rows)
        ]
        for kind, (rows, values, ids) in kinds.items()
    }
    show(
        {"query": query, "measure": scores.measure, "counterfactual": scores.counterfactual} | found,
        "\n".join([*lines, "", str(scores.certificate)]),
        json,
    )
    return 0


@command
def report(
    run: RunFolder, out: Path = Path("upweight-report.html"), queries: int = 12, limit: str = "5 MB", json: Json = False
) -> int:
    """Write a run folder as one HTML page with pictures and charts inside, for people who install nothing.

    Args:
        run: folder that `write_run` made, or on_loss(store=).
        out: file for the page.
        queries: how many predictions are shown: wrong ones, worst first, then those the model is least sure of.
        limit: size of the page; predictions that do not fit are left out, and the page says how many.
        json: print as JSON.
    """
    from upweight.runs.machine import budget_of, in_bytes
    from upweight.show.run_report import write_report

    check_file(out, "--out")
    page = write_report(run, out, queries=queries, limit=budget_of(limit, "--limit") or 0)
    size = page.stat().st_size
    show({"report": str(page), "bytes": size}, f"Report: {page.resolve()}  ({in_bytes(size)})", json)
    return 0


@command
def validate(study: StudyName, query: int = 0, rows: int = 20, store: Path | None = None, json: Json = False) -> int:
    """Retrain without each of a query's most influential rows, and compare with the prediction.

    Args:
        study: file.py:function that returns an upweight.Study.
        query: number of the query.
        rows: how many rows to remove, one at a time.
        store: folder that keeps every training as soon as it is done; the same command goes on where it was stopped.
        json: print as JSON.
    """
    import numpy as np

    from upweight.data.ids import in_json, text_of
    from upweight.errors import checked_count
    from upweight.evaluation.leave_one_out import agreement, leave_one_out

    checked_count(rows, "rows", least=2, hint="a slope needs two")
    loaded = load(study)
    on = one(loaded, query)
    scores = loaded.influence.on_loss(*on)
    chosen = np.argsort(-np.abs(scores.values[0]), kind="stable")[:rows]
    with noted(store, "validate", study, {"query": query, "rows": rows}):
        outcomes = leave_one_out(loaded.influence, on, chosen, loaded.retrain, store=store)
    found = agreement(scores, outcomes)
    pairs = [
        (int(row), float(scores.values[0, row]), float(outcomes.actual[0, place])) for place, row in enumerate(chosen)
    ]
    ids = None if scores.ids is None else scores.ids[chosen]
    names = [""] * len(chosen) if ids is None else [f"  {text_of(name)}" for name in ids]
    lines = [
        f"{'row':>8} {'predicted':>14} {'actual':>14}",
        *(
            f"{row:>8} {predicted:>+14.6g} {actual:>+14.6g}{name}"
            for (row, predicted, actual), name in zip(pairs, names, strict=True)
        ),
    ]
    control = float(outcomes.control[0])
    numbers = {
        "query": query,
        "agreement": vars(found),
        "control": control,
        "pairs": [dict(zip(("row", "predicted", "actual"), p, strict=True)) for p in pairs],
        **({} if ids is None else {"ids": in_json(ids)}),
    }
    show(numbers, "\n".join([*lines, "", str(found), f"control (nothing removed): {control:+.2e}"]), json)
    return 0


def opened(
    run: Path, compare: Path | None = None, *, port: int = 0, host: str = "127.0.0.1", beyond: bool = False
) -> int:
    """Serve the explorer of a run until Ctrl-C."""
    _require_pages()
    from upweight.explore import server
    from upweight.explore.comparing import together

    listening = server.bound(host, port, beyond=beyond)
    server.serve(
        together(run, compare),
        listening,
        lambda link: print(f"The explorer of {run}, until Ctrl-C:\n\n  {link}\n", flush=True),
    )
    return 0


def _require_pages() -> None:
    """Raises where the explorer cannot be served, before the work for it."""
    from upweight.errors import require

    for module in ("starlette", "uvicorn", "jinja2"):
        require(module, "explore")


def run(words: list[str]) -> int:
    """The exit code of the command that the words name."""
    if words and not words[0].startswith("-") and words[0] not in NAMES:
        words = words[:1]  # an unknown command is an error, also before --help
    codes = "\n".join(f"{code:>5}  {meaning}" for code, meaning in CODES.items())
    return app.cli(prog="upweight", description=f"{__doc__}\nExit codes:\n{codes}", args=words)


def _saved(path: str) -> Scores | Leading:
    """What `upweight score` wrote, with --top or without."""
    from upweight.errors import InvalidInput
    from upweight.influence.leading import Leading
    from upweight.influence.scores import Scores

    try:
        return Scores.load(path)
    except InvalidInput as refused:
        try:
            return Leading.load(path)
        except InvalidInput:
            raise refused from None


def _is_path(study: str) -> bool:
    """Whether it names a file of scores, by any suffix but .py, and not a function.

    Raises:
        PathNotFound: if it can be nothing but a path, and there is no such file.
    """
    from upweight.errors import PathNotFound

    if study.endswith(".py"):
        return False
    if Path(study).is_file():
        return True
    module, colon, function = study.rpartition(":")
    if colon and module and function.isidentifier():
        return False
    message = (
        f"There is no file at {study}, and it is not of the form file.py:function. Write the path that "
        "`upweight score` was given as --out, or a function that returns an upweight.Study."
    )
    raise PathNotFound(message)


def _card(scores: Scores | Leading) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in asdict(scores.certificate).items()
    }
