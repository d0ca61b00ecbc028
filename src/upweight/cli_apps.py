"""The paper's four uses as commands, and the question of contrast."""

from __future__ import annotations

from pathlib import Path

from upweight.console import Json, K, StudyName, app, load, one, show


@app.command
def understand(study: StudyName, query: int = 0, k: K = 5, plot: Path | None = None, json: Json = False) -> int:
    """What the answer to one query rests on: rows that help and harm, their class and distance, how few carry it.

    Args:
        study: module:function that returns an upweight.Study.
        query: number of the query.
        k: how many rows of each kind.
        plot: file for a picture of influence against distance; its suffix says the format.
        json: print as JSON.
    """
    from upweight import apps
    from upweight.apps import pictures

    loaded = load(study)
    found = apps.understand(loaded.influence, one(loaded, query)[0], k=k, describe=loaded.describe)
    if plot is not None:
        pictures.save(pictures.influence_against_distance(found), plot)
    numbers = found.to_dict()["queries"][0] | {"query": query, "measure": found.scores.measure}
    show(numbers, str(found).replace("Query 0", f"Query {query}", 1), json)
    return 0
