"""The explorer's index of a run: derived from its files once, so that pages over a million rows take milliseconds.

    run/explorer/
    ├── index.json      written last: what it was made of, its classes, columns and numbers of both sides
    ├── items.sqlite    what rows and queries are (`tables`)
    ├── values.f64      the scores laid out again, (q, n): one line after the other, query by query
    ├── codes.i32       (2 + columns, n): class, predicted class, and levels of columns of every row; -1 for none
    ├── sums.f64        (q, Σ levels): sums of a query's values over the rows of a class or level
    └── marks.u32       crc32 of blocks of values and codes (`marks`)

It is made in a folder of another name and renamed when it is whole. It says which files it was made of, by their
sha256; when the run's are others, it is made again. Nothing in it is anybody's work: it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from upweight.data.ids import text_of
from upweight.errors import InvalidInput
from upweight.explore import columns as tabled, marks
from upweight.explore.tables import SIDES, insert, insert_parts, make_indexes, make_tables, plain
from upweight.runs.files import check_room, write_file
from upweight.runs.store import work_of
from upweight.show.parts import packed_in
from upweight.show.run import Items, Run

FORMAT = 6
FOLDER, FACTS, ITEMS_FILE = "explorer", "index.json", "items.sqlite"
VALUES, CODES, SUMS, MARKS = "values.f64", "codes.i32", "sums.f64", "marks.u32"
CLASSES = 1_000  # at most; more different labels are names or numbers, and no classes
_BUFFER = 2**26  # bytes of values that are written at once
_BINS = 60
_RANKED = 1_000  # rows between two of the values from which ranks are counted


def ensure(run: Run, *, progress: bool | None = None) -> Path:
    """The folder of the run's index, which is made if there is none, or one of other files.

    Raises:
        InvalidInput: if the run is not finished, or has no items.
        StorageFailed: if the disk has no room.
        Damaged: if a file of the run is.
    """
    folder = run.path / FOLDER
    made_of = sources(run)
    if not is_of(folder, made_of):
        make(run, folder, made_of, progress)
    return folder


def is_of(folder: Path, made_of: str) -> bool:
    """Whether a folder holds a whole index that was made of such files."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in facts["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    told = (facts.get("format"), facts.get("made_of"), facts["sizes"], facts.pop("mark", None))
    return told == (FORMAT, made_of, sizes, _mark(facts)) and facts["marks"] == _marks(folder, facts["marks"])


def _mark(facts: Mapping[str, Any]) -> int:
    """The crc32 of what an index tells, but for itself."""
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _marks(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Those of whole files, which are looked at when the index is opened; lines when they are read."""
    return {name: marks.of_file(folder / name) for name in names}


def sources(run: Run) -> str:
    """A hash of the run's manifest, and of names and sha256 of the files that an index is made of."""
    found = hashlib.sha256(work_of(run.manifest).encode())
    for pattern in ("chunk-*", "items-*", "queries", "scores", "solutions", "parts"):
        for file in sorted(run.path.glob(f"{pattern}.safetensors")):
            found.update(f"{file.name} {_digest_in(file)}\n".encode())
    return found.hexdigest()


def _digest_in(file: Path) -> str:
    """The sha256 that a file says of itself; that it is right is seen when an index is made of it."""
    with file.open("rb") as content:
        length = min(int.from_bytes(content.read(8), "little"), 2**24)
        head = content.read(length)
    try:
        return str(json.loads(json.loads(head)["__metadata__"]["upweight"])["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return hashlib.sha256(head).hexdigest()


# ---- making ----------------------------------------------------------------------------------------------------------


def make(run: Run, folder: Path, made_of: str, progress: bool | None) -> None:
    """Make the index, whole or not at all."""
    outline, queries = run.outline, run.queries
    if queries is None or not run.items_files():
        message = (
            f"{run.path} holds scores only: it does not say what rows and queries are. Make the run with "
            f"uw.write_run(influence, {str(run.path)!r}, Xq, yq), which goes on with what is there."
        )
        raise InvalidInput(message)
    q, n = len(queries), len(outline.rows)
    check_room(run.path, 8 * q * n + 2_000 * n)
    temporary = run.path / f".{FOLDER}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        total = 2 * len(run.items_files()) + len(list(run.path.glob("chunk-*")))
        with tqdm(
            total=total, desc="index for the explorer", unit="file", leave=False, disable=_hidden(progress)
        ) as steps:
            sketch = _sketch(run, queries, steps)
            facts = _keep_items(run, temporary, queries, sketch, steps)
            _keep_values(run, temporary, (q, n), sketch, steps)
        lines = [(VALUES, np.float64, q), (CODES, np.int32, len(sketch.levels))]
        each = [marks.of_lines(temporary / name, dtype, count, n) for name, dtype, count in lines]
        write_file(temporary / MARKS, np.concatenate(each).tobytes())
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        facts |= {"format": FORMAT, "made_of": made_of, "sizes": sizes, "q": q, "n": n}
        facts["marks"] = _marks(temporary, (ITEMS_FILE, SUMS, MARKS))
        facts = json.loads(json.dumps(facts))
        write_file(temporary / FACTS, json.dumps({**facts, "mark": _mark(facts)}).encode())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Sketch:
    """What is known of all items before they are written: their classes, and the columns that their cards share."""

    classes: list[Any] | None
    columns: list[tabled.Column]

    @property
    def levels(self) -> list[int]:
        """How many codes each line of codes has: those of classes twice, then those of columns."""
        classes = len(self.classes or ())
        return [classes, classes, *(len(column.levels) for column in self.columns if column.levels)]

    def classes_of(self, labels: NDArray[Any] | None, count: int) -> list[int]:
        """Numbers of the classes that labels are; -1 for none."""
        places = {name: place for place, name in enumerate(self.classes or ())}
        return [-1] * count if labels is None else [places.get(value, -1) for value in labels.tolist()]

    def codes(self, items: Items) -> NDArray[np.int32]:
        """(2 + columns, items) numbers of class, predicted class and levels; -1 where there is none."""
        lines = [self.classes_of(values, len(items)) for values in (items.labels, items.predictions)]
        lines += [[column.code(card) for card in items.cards] for column in self.columns if column.levels]
        return np.array(lines, dtype=np.int32).reshape(len(lines), len(items))


def _sketch(run: Run, queries: Items, steps: tqdm) -> Sketch:
    """One look through all items."""
    classes: set[Any] | None = set()
    seen = tabled.Seen()
    for items in chain([queries], _counted(run.items(), steps)):
        seen.add(items.cards, rows=items is not queries)
        if classes is not None:
            classes = _more(classes, items)
    named = None if not classes else sorted(classes, key=lambda name: (isinstance(name, str), name))
    return Sketch(named, seen.columns())


def _more(classes: set[Any], items: Items) -> set[Any] | None:
    """Classes and those of more items; None where labels are no classes."""
    for values in (items.labels, items.predictions, *([] if items.out_of_fold is None else [items.out_of_fold])):
        if values is None or values.dtype.kind == "f":
            return None
        classes |= set(values.tolist())
    return classes if len(classes) <= CLASSES else None


def _keep_items(run: Run, folder: Path, queries: Items, sketch: Sketch, steps: tqdm) -> dict[str, Any]:
    """The tables, and what is told of all items."""
    connection = sqlite3.connect(folder / ITEMS_FILE, isolation_level=None)
    numbers = {side: _Numbers() for side in SIDES}
    lines = [0, *range(2, len(sketch.levels))]  # a row's own class, and its columns
    counts = [[0] * sketch.levels[line] for line in lines]
    outline = run.outline
    try:
        connection.executescript("pragma journal_mode=off; pragma synchronous=off")
        make_tables(connection)
        connection.execute("begin")
        with (folder / CODES).open("wb") as file:
            start, n, folds = 0, len(outline.rows), False
            for side, items in chain([("queries", queries)], (("rows", one) for one in _counted(run.items(), steps))):
                first, ids = (0, outline.query_ids) if side == "queries" else (start, outline.ids)
                codes = sketch.codes(items)
                named = None if ids is None else [text_of(name) for name in ids[first : first + len(items)]]
                insert(connection, side, first, _values(items, codes, named, sketch), codes[2:], items.cards)
                numbers[side].add(items, codes)
                if side == "rows":
                    folds = folds or items.out_of_fold is not None
                    for line, count in zip(lines, counts, strict=True):
                        for code, found in zip(*np.unique(codes[line], return_counts=True), strict=True):
                            if code >= 0:
                                count[code] += int(found)
                    for line, values in enumerate(codes):
                        file.seek(4 * (line * n + start))
                        file.write(values.tobytes())
                    start += len(items)
        if start != n:
            message = (
                f"{run.path} says what {start:,} rows are, and has scores of {n:,}. Make the call again that made it: "
                "it fills the gap."
            )
            raise InvalidInput(message)
        parts = packed_in(run)
        insert_parts(connection, parts)
        connection.execute("commit")
        make_indexes(connection, len(sketch.levels) - 2)
    finally:
        connection.close()
    classes = None if sketch.classes is None else [str(name) for name in sketch.classes]
    return {
        "classes": classes,
        "columns": [column.told() for column in sketch.columns],
        "taken_apart": len({query for query, _ in parts}),
        "out_of_fold": folds,
        "counts": [count for line in counts for count in line],
        **{side: numbers[side].told() for side in SIDES},
    }


def _values(items: Items, codes: NDArray[np.int32], named: list[str] | None, sketch: Sketch) -> dict[str, list[Any]]:
    """The columns of the table of items."""
    count = len(items)
    coded = [[None if code < 0 else code for code in line] for line in codes[:2].tolist()]
    wrong = [None if None in pair else int(pair[0] != pair[1]) for pair in zip(*coded, strict=True)]
    return {
        "name": plain(named, count),
        "label": plain(None if items.labels is None else items.labels.tolist(), count),
        "prediction": plain(None if items.predictions is None else items.predictions.tolist(), count),
        "class": coded[0],
        "said": coded[1],
        "wrong": wrong,
        "loss": plain(items.losses.tolist(), count),
        "margin": plain(None if items.margins is None else items.margins.tolist(), count),
        "self_influence": plain(None if items.self_influence is None else items.self_influence.tolist(), count),
        "fold": [None if code < 0 else code for code in sketch.classes_of(items.out_of_fold, count)],
    }


class _Numbers:
    """What is told of all items of a side: how many, how many of them wrong, their numbers in a histogram."""

    def __init__(self) -> None:
        self.parts: dict[str, list[NDArray[np.float64]]] = {"loss": [], "margin": [], "self_influence": []}
        self.confusion: dict[tuple[int, int], int] = {}

    def add(self, items: Items, codes: NDArray[np.int32]) -> None:
        for name, values in zip(self.parts, (items.losses, items.margins, items.self_influence), strict=True):
            if values is not None:
                self.parts[name].append(np.asarray(values, dtype=np.float64))
        pairs, counts = np.unique(codes[:2], axis=1, return_counts=True)
        for (label, said), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            self.confusion[label, said] = self.confusion.get((label, said), 0) + count

    def told(self) -> dict[str, Any]:
        whole = {name: np.concatenate(parts) for name, parts in self.parts.items() if parts}
        both = {pair: count for pair, count in self.confusion.items() if -1 not in pair}
        return {
            "count": len(whole["loss"]),
            "labelled": sum(both.values()),
            "wrong": sum(count for (label, said), count in both.items() if label != said),
            "confusion": [[*pair, count] for pair, count in sorted(both.items())],
            "histograms": {name: histogram(values) for name, values in whole.items()},
            "uncertain": float(np.quantile(np.abs(whole["margin"]), 0.1)) if "margin" in whole else None,
            "ranks": ranks(whole["self_influence"]) if "self_influence" in whole else [],
            "means": {name: float(np.mean(values)) for name, values in whole.items()},
        }


def ranks(values: NDArray[np.float64]) -> list[tuple[float, int]]:
    """Every 1,000th of the values from the largest on, and how many are larger: what a rank is counted from."""
    known = np.sort(values[np.isfinite(values)])
    some = known[::-1][_RANKED - 1 :: _RANKED]
    return list(zip(some.tolist(), (len(known) - np.searchsorted(known, some, side="right")).tolist(), strict=True))


def histogram(values: NDArray[np.float64], bins: int = _BINS) -> dict[str, Any]:
    """Counts and edges of finite values; the outermost thousandth on either side stands in the outermost bins."""
    known = values[np.isfinite(values)]
    if not known.size:
        return {"counts": [], "edges": [], "beyond": 0}
    low, high = np.quantile(known, [0.001, 0.999])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(known, low, high), bins, (low, high))
    beyond = int(np.count_nonzero(known < low) + np.count_nonzero(known > high))
    return {"counts": counts.tolist(), "edges": edges.tolist(), "beyond": beyond}


def _keep_values(run: Run, folder: Path, shape: tuple[int, int], sketch: Sketch, steps: tqdm) -> None:
    """The scores query by query, and their sums over classes and levels."""
    q, n = shape
    levels = sketch.levels[:1] + sketch.levels[2:]  # a row's own class, and its columns
    codes = np.memmap(folder / CODES, dtype=np.int32, mode="r", shape=(len(sketch.levels), n)) if n else None
    sums = np.zeros((q, sum(levels)))
    with (folder / VALUES).open("wb") as file:
        file.truncate(8 * q * n)
        start = 0
        for block in _joined(_counted(run.blocks(), steps), max(1, _BUFFER // (8 * q))):
            for query, line in enumerate(block):
                os.pwrite(file.fileno(), line.tobytes(), 8 * (query * n + start))
            place = 0
            for line, count in zip([0, *range(2, len(sketch.levels))], levels, strict=True):
                assert codes is not None  # there are rows
                sums[:, place : place + count] += _sums(
                    block, np.asarray(codes[line, start : start + block.shape[1]]), count
                )
                place += count
            start += block.shape[1]
        file.flush()
        os.fsync(file.fileno())
    (folder / SUMS).write_bytes(sums.tobytes())


def _sums(block: NDArray[np.float64], codes: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    """(q, count) sums of a block's columns by their codes."""
    found = np.zeros((len(block), count))
    for code in np.unique(codes[codes >= 0]).tolist():
        found[:, code] = block[:, codes == code].sum(1)
    return found


def _joined(blocks: Iterator[NDArray[np.float64]], least: int) -> Iterator[NDArray[np.float64]]:
    """Blocks, several of them together, so that each has so many columns."""
    waiting: list[NDArray[np.float64]] = []
    for block in blocks:
        waiting.append(block)
        if sum(one.shape[1] for one in waiting) >= least:
            yield np.concatenate(waiting, axis=1)
            waiting = []
    if waiting:
        yield np.concatenate(waiting, axis=1)


def _counted(parts: Iterator[Any], steps: tqdm) -> Iterator[Any]:
    for part in parts:
        yield part
        steps.update(1)


def _hidden(progress: bool | None) -> bool:
    return not sys.stderr.isatty() if progress is None else not progress


def facts_in(folder: Path) -> Mapping[str, Any]:
    """What an index tells of its run."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))
