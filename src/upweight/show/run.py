"""A run folder: the scores of some queries, what they and the training rows are, and what happened, for later readers.

    run/
    ├── manifest.json, events.jsonl, chunk-….safetensors, scores.safetensors, …   as `on_loss(store=)` keeps them
    ├── items-000000.safetensors   of 1,024 training rows: label, prediction, loss, self-influence, and a card
    ├── …
    └── queries.safetensors        the same of the queries, but self-influence

`write_run` (show/items.py) makes it; `Run.open` reads it without the model and without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data import markup
from upweight.errors import Damaged, InvalidInput, PathNotFound, first_line
from upweight.influence.scores import Scores
from upweight.runs.store import EVENTS, MANIFEST, SCORES, SOLUTIONS, SUFFIX, read_part, work_of
from upweight.show.cards import Card

ITEMS = 1024  # rows in a file
QUERIES = "queries"
_LINE = 300  # bytes that an event mostly has


@dataclass(frozen=True)
class Items:
    """What training rows or queries are.

    Args:
        labels: (n,) by the user's own names or as numbers; None where they have none.
        predictions: (n,) the model's labels, or its output where that is one number; None where it has neither.
        losses: (n,) at θ̂.
        self_influence: (n,) as `Influence.of_self`; None of queries, or where it was not asked for.
        cards: what each looks like: a text, columns by their names, a picture (H, W) or (H, W, 3), tokens as a list
            of texts, or None.
        margins: (n,) by how much the output of the own label is ahead of the strongest other; None without classes.
        out_of_fold: (n,) labels that models gave which were trained without the row; None where nobody asked for them.
    """

    labels: NDArray[Any] | None
    predictions: NDArray[Any] | None
    losses: NDArray[np.float64]
    self_influence: NDArray[np.float64] | None
    cards: list[Card]
    margins: NDArray[np.float64] | None = None
    out_of_fold: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.losses)


class Run:
    """A run folder, for reading.

    Attributes:
        path: the folder.
        manifest: `format` and `fingerprint`: what the work was.

    Every file is read with its sha256, so that a damaged one is an error and never a number.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        """The run in a folder.

        Raises:
            PathNotFound: if the folder holds none.
            Damaged: if its manifest cannot be read.
        """
        path = Path(folder)
        file = path / MANIFEST
        if not file.is_file():
            message = (
                f"{path} holds no run. Make one: uw.write_run(influence, {str(path)!r}, Xq, yq), or "
                f"influence.on_loss(Xq, yq, store={str(path)!r})."
            )
            raise PathNotFound(message)
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            dict(manifest["fingerprint"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            message = (
                f"{file} is damaged ({first_line(error) or type(error).__name__}). Delete the folder, and make the run "
                "again."
            )
            raise Damaged(message) from error
        return cls(path, manifest)

    def __repr__(self) -> str:
        state = "finished" if self.finished else f"{len(self._chunks)} chunks, not finished"
        return f"Run({str(self.path)!r}, {state}; {self.manifest['fingerprint'].get('objective', '')})"

    def _repr_html_(self) -> str:
        """Its first queries with the rows that help and harm them, as they look; its name while it is not finished."""
        from upweight.show.look import look  # the server reads runs without SciPy, which scores in Python need

        if not self.finished:
            return markup.frame(f"<p>{markup.text(repr(self))}</p>")
        rows, queries = self.rows, self.queries
        cards = [] if rows is None else rows.cards
        return look(self.scores, cards, None if queries is None else queries.cards)._repr_html_()

    @property
    def finished(self) -> bool:
        """Whether its scores are whole."""
        return self._file(SCORES).is_file()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened when, in order; lines that a crash has cut are left out."""
        try:
            lines = (self.path / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return list(_objects(lines))

    def last_events(self, count: int) -> list[dict[str, Any]]:
        """The last of the events, in order, without reading those before."""
        try:
            with (self.path / EVENTS).open("rb") as content:
                end = content.seek(0, os.SEEK_END)
                size, lines = _LINE * count, []
                while len(lines) <= count and (not lines or size < 2 * end):
                    content.seek(max(0, end - size))
                    lines = content.read().decode("utf-8", "replace").splitlines() or [""]
                    size *= 2
        except FileNotFoundError:
            return []
        return list(_objects(lines))[-count:]

    @cached_property
    def scores(self) -> Scores:
        """The scores.  Memory: q × n numbers.

        Raises:
            InvalidInput: if the run is not finished.
            Damaged: if a file is.
        """
        return replace(self.outline, values=np.concatenate(list(self.blocks()), axis=1))

    @cached_property
    def outline(self) -> Scores:
        """The scores but for their values, of which there are none; what tells of them is whole.

        Raises:
            InvalidInput, Damaged: as for `scores`.
        """
        self._refuse_unfinished()
        file = self._file(SCORES)
        arrays, card = self._part(file)
        try:
            queries = len(self._part(self._file(SOLUTIONS))[0][SOLUTIONS])
            return Scores.of_parts({**arrays, "scale": arrays["scale"], "values": np.empty((queries, 0))}, card)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if isinstance(error, Damaged):
                raise
            message = f"{file} holds no scores ({first_line(error)}). Delete it, and make the same call again."
            raise Damaged(message) from error

    def blocks(self) -> Iterator[NDArray[np.float64]]:
        """The values of some rows after the other, (q, rows): `scores` without holding them all at once.

        Raises:
            InvalidInput, Damaged: as for `scores`.
        """
        outline, file = self.outline, self._file(SOLUTIONS)
        S = _matrix(file, self._part(file)[0], SOLUTIONS, len(outline.values))
        leaning = np.isnan(S).any(1)  # queries without a solution
        start, rows = 0, len(outline.rows)
        scale = np.empty(0) if outline.scale is None else outline.scale
        for chunk in self._chunks:
            values = _matrix(chunk, self._part(chunk)[0], "values", None, len(S))
            values[:, leaning] = np.nan
            stop = start + len(values)
            if stop <= min(rows, len(scale)):
                yield values.T * -scale[start:stop]
            start = stop
        if (start, len(scale)) != (rows, rows):
            message = (
                f"{self.path} holds chunks of {start:,} rows, and its scores have {rows:,}. Make the call "
                "again that made it: it fills the gap."
            )
            raise Damaged(message)

    @cached_property
    def rows(self) -> Items | None:
        """What the training rows are; None where only scores were kept."""
        parts = list(self.items())
        return joined(parts) if parts else None

    @cached_property
    def queries(self) -> Items | None:
        """What the queries are; None where only scores were kept."""
        file = self._file(QUERIES)
        return _items(file, self._part(file)[0]) if file.is_file() else None

    def items(self) -> Iterator[Items]:
        """What some training rows after the other are: `rows` without holding them all at once.

        Raises:
            Damaged: if a file is, or one is missing.
        """
        for number, file in enumerate(self.items_files()):
            if file.name != f"items-{number:06d}{SUFFIX}":
                message = f"{self.path} has no items-{number:06d}{SUFFIX}. Make the call again that made it."
                raise Damaged(message)
            yield _items(file, self._part(file)[0])

    def items_files(self) -> list[Path]:
        """The files that say what training rows are."""
        return sorted(self.path.glob(f"items-*{SUFFIX}"))

    def _refuse_unfinished(self) -> None:
        if not self.finished:
            message = (
                f"{self.path} is not finished: {len(self._chunks)} chunks of its scores are there. Ask for all "
                f"of them, influence.on_loss(Xq, yq, store={str(self.path)!r}), which goes on from there."
            )
            raise InvalidInput(message)

    @property
    def _chunks(self) -> list[Path]:
        return sorted(self.path.glob("chunk-*.safetensors"))

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"

    def _part(self, file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        return read_part(file, work_of(self.manifest))


# ---- reading ---------------------------------------------------------------------------------------------------------

NOTHING, TEXT, COLUMNS, PICTURE, TOKENS = range(5)  # kinds of cards


def joined(parts: list[Items]) -> Items:
    """Items one behind the other."""

    def whole(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    return Items(
        whole("labels"),
        whole("predictions"),
        whole("losses"),
        whole("self_influence"),
        [card for part in parts for card in part.cards],
        whole("margins"),
        whole("out_of_fold"),
    )


def _matrix(
    file: Path, arrays: Mapping[str, NDArray[Any]], name: str, rows: int | None, columns: int | None = None
) -> NDArray[np.float64]:
    """A matrix of a file, if it is one.

    Raises:
        Damaged: if it is not.
    """
    found = arrays.get(name)
    fits = found is not None and found.ndim == 2 and found.dtype == np.float64
    if found is None or not fits or rows not in (None, len(found)) or columns not in (None, found.shape[1]):
        what = "nothing of that name" if found is None else f"{found.dtype} numbers of shape {found.shape}"
        message = (
            f"{file} holds no {name} of this run ({what}). Delete it, and make the call again that made it: it fills "
            "the gap."
        )
        raise Damaged(message)
    return found


def _items(file: Path, arrays: Mapping[str, NDArray[Any]]) -> Items:
    """The items of a file.

    Raises:
        Damaged: if it holds none.
    """
    try:
        labels, predictions, out_of_fold = (
            _values(arrays.get(name)) for name in ("labels", "predictions", "out_of_fold")
        )
        cards = [_card(*one) for one in _cut(arrays)]
        others = (arrays.get("self_influence"), cards, arrays.get("margins"), out_of_fold)
        found = Items(labels, predictions, arrays["losses"], *others)
        sizes = {len(part) for part in (labels, predictions, *others) if part is not None}
        if sizes == {len(found)}:
            return found
        reason = f"{len(found)} losses beside {sorted(sizes)}"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = first_line(error)
    message = f"{file} holds no items ({reason}). Delete it, and make the same call again."
    raise Damaged(message)


def _values(array: NDArray[Any] | None) -> NDArray[Any] | None:
    """Numbers, or the texts in the bytes of a JSON text."""
    if array is None or array.dtype != np.uint8:
        return array
    return np.array(json.loads(array.tobytes()))


def _cut(arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[int, bytes, list[int]]]:
    """Kind, bytes and shape of every card."""
    blob, ends = arrays["cards"].tobytes(), arrays["card_ends"].tolist()
    starts = [0, *ends]
    for place, end in enumerate(ends):
        yield int(arrays["card_kinds"][place]), blob[starts[place] : end], arrays["card_shapes"][place].tolist()


def _card(kind: int, content: bytes, shape: list[int]) -> Card:
    if kind == TEXT:
        return content.decode("utf-8", "surrogatepass")
    if kind == COLUMNS:
        return dict(json.loads(content))
    if kind == TOKENS:
        return [str(token) for token in json.loads(content)]
    if kind == PICTURE:
        return np.frombuffer(content, dtype=np.uint8).reshape([size for size in shape if size])
    return None


def _objects(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(told, dict):
            yield told
