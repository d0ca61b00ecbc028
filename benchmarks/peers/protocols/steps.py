"""What the protocols share: the scores of a method on the disk, with the processor's seconds that they took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Step = Callable[[Path], None]


def scored(folder: Path, name: str, scores: Callable[[], Any], *, again: bool = False) -> None:
    """Scores (q, n) of a method under its name, or the error that stopped it; `again` times a second call."""
    place = folder / "scores"
    place.mkdir(exist_ok=True)
    number = len(list(place.glob("*.json")))
    start = time.process_time()
    try:
        if again:  # what is loaded and compiled at the first call is no work of the method
            scores()
            start = time.process_time()
        values = np.asarray(scores(), np.float64)
    except Exception as error:  # whatever stops a library is its row
        facts = {"name": name, "error": f"{type(error).__name__}: {error}"}
    else:
        facts = {"name": name, "processor_seconds": time.process_time() - start}
        np.save(place / f"{number:03}.npy", values)
    (place / f"{number:03}.json").write_text(json.dumps(facts, ensure_ascii=False))


def every(folder: Path) -> list[tuple[dict[str, Any], NDArray[np.float64] | None]]:
    """What is known of each method, and its scores; None where an error stopped it."""
    found = []
    for file in sorted((folder / "scores").glob("*.json")):
        kept = file.with_suffix(".npy")
        found.append((json.loads(file.read_text()), np.load(kept) if kept.exists() else None))
    return found


def told(folder: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """The table of a protocol, for the driver."""
    (folder / "table.json").write_text(json.dumps({"columns": columns, "rows": rows}, ensure_ascii=False))


def main(**steps: Step) -> None:
    """`python PROTOCOL.py STEP FOLDER`."""
    name, folder = sys.argv[1:]
    steps[name](Path(folder))
