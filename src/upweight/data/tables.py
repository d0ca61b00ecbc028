"""Tables as X, with y and ids the names of two of their columns: pyarrow's, and a Hugging Face Dataset's.

    pyarrow.Table, RecordBatch · pyarrow.parquet.ParquetFile · pyarrow.dataset.Dataset · datasets.Dataset

The other columns are the features, those that the model was fitted on where it knows their names. Rows stay where they
are and are read in blocks (`data/stored.py`); a column of lists of one fixed length stands for as many features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upweight.data.stored import Files, Stored
from upweight.errors import InvalidInput, require

_NAMES = ("id", "idx")  # columns that name rows
_BATCH_ROWS = 16_384


class Table(Protocol):
    """A table whose rows are read in the order in which they lie, and again."""

    @property
    def schema(self) -> Any:
        """pyarrow's names and types of the columns."""
        ...

    @property
    def length(self) -> int:
        """The number of rows."""
        ...

    @property
    def files(self) -> Files:
        """Where the rows lie."""
        ...

    @property
    def without(self) -> str:
        """What to type for the same table without the columns {names}."""
        ...

    def reader(self, names: list[str]) -> Callable[[int, int], Any]:
        """What gives rows start … stop − 1 of these columns, as a pyarrow Table."""
        ...


def columns_of(
    X: Any, y: Any = None, ids: Any = None, *, features: Sequence[str] | None = None, frames: bool = False
) -> tuple[Any, Any, Any]:
    """X, y and ids as arrays where X is a table, whose features stay where they are; anything else as it is.

    Args:
        X: a table, or anything else.
        y: the name of a column, or an array.
        ids: the name of a column, or an array; None takes a column `id` or `idx`.
        features: the columns to take; None takes all but those that are y, ids, or names of rows.
        frames: whether blocks are pandas DataFrames, with columns of any kind.

    Raises:
        InvalidInput: if there is no such column, or one holds something else than numbers.
    """
    table = None if X is None else table_of(X)
    if table is None or (type(table) is _HuggingFace and y is None):  # which is a Dataset of whole examples
        return X, y, ids
    apart = {name for name in (y, ids) if isinstance(name, str)}
    found = [name for name in table.schema.names if name not in apart and name not in _NAMES]
    chosen = found if features is None else list(features)
    for name in (*apart, *chosen):
        if name not in table.schema.names:
            raise InvalidInput(_missing(name, table, "y" if name == y else "ids" if name == ids else "the model"))
    source = _Frames(table, chosen) if frames else _Numbers(table, chosen)
    named = next((name for name in _NAMES if name in table.schema.names and name not in chosen and name != y), None)
    own = None if named is None or ids is not None else _column(table, named)
    target = _column(table, y) if isinstance(y, str) else y
    return Stored(source, own), target, _column(table, ids) if isinstance(ids, str) else ids


def table_of(X: Any) -> Table | None:
    """X as a table; None for what is none.

    Raises:
        InvalidInput: if its rows cannot be read twice in one order.
    """
    library = type(X).__module__.partition(".")[0]
    if library == "datasets" and hasattr(X, "with_format") and hasattr(X, "__len__"):
        return _HuggingFace(X)
    if library != "pyarrow":
        return None
    if hasattr(X, "iter_batches"):
        return _Parts.of_file(X)
    if hasattr(X, "get_fragments"):
        return _Parts.of_dataset(X)
    if hasattr(X, "to_batches") and hasattr(X, "slice"):
        return _InMemory(X)
    if hasattr(X, "schema") and hasattr(X, "slice"):
        return _InMemory(require("pyarrow", "parquet").Table.from_batches([X]))
    return None


class _InMemory:
    """A pyarrow Table: in memory, or in a mapped file, where it takes none."""

    files, without = Files(), "X.drop_columns({names})"

    def __init__(self, table: Any) -> None:
        self.table, self.schema, self.length = table, table.schema, table.num_rows

    def reader(self, names: list[str]) -> Callable[[int, int], Any]:
        chosen = self.table.select(names)
        return lambda start, stop: chosen.slice(start, stop - start)


class _HuggingFace:
    """A Dataset of the library `datasets`, with the rows that were selected, in their order."""

    without = "X.remove_columns({names})"

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.length = dataset.with_format("arrow"), len(dataset)
        self.schema = self.dataset[:0].schema if self.length else dataset.features.arrow_schema
        self.files = Files.of(part["filename"] for part in dataset.cache_files)

    def reader(self, names: list[str]) -> Callable[[int, int], Any]:
        chosen = self.dataset.select_columns(names)
        return lambda start, stop: chosen[start:stop]


@dataclass(frozen=True)
class _Part:
    """Rows that lie together: a row group of a Parquet file, or a file of another format.

    Args:
        count: the number of rows.
        stream: from names of columns to their RecordBatches, in order.
    """

    count: int
    stream: Callable[[list[str]], Iterator[Any]]


@dataclass(frozen=True)
class _Parts:
    """Files that are unpacked from the start of a part on.

    Args:
        schema: pyarrow's names and types of the columns.
        parts: in the order of their rows.
        files: where they lie.
        without: what to type for the same table without the columns {names}.
    """

    schema: Any
    parts: list[_Part]
    files: Files
    without: str

    @classmethod
    def of_file(cls, file: Any) -> _Parts:
        """The row groups of a ParquetFile, which does not say where it lies."""

        def part(group: int) -> _Part:
            def stream(names: list[str]) -> Iterator[Any]:
                return file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=names)

            return _Part(file.metadata.row_group(group).num_rows, stream)

        without = "pyarrow.parquet.read_table(path).drop_columns({names})"
        return cls(file.schema_arrow, [part(group) for group in range(file.num_row_groups)], Files(), without)

    @classmethod
    def of_dataset(cls, dataset: Any) -> _Parts:
        """The files of a Dataset, those of Parquet by row groups.

        Raises:
            InvalidInput: if it is filtered, so that its rows have no places.
        """
        try:
            fragments = list(dataset.get_fragments())
        except ValueError as error:
            message = (
                "X is a pyarrow Dataset with a filter, so that nobody knows how many rows it has before they are read. "
                "Write the rows out and open them again, or hold them in memory: X.to_table()."
            )
            raise InvalidInput(message) from error
        pieces = [piece for fragment in fragments for piece in _pieces(fragment)]

        def part(piece: Any, settings: dict[str, Any]) -> _Part:
            def stream(names: list[str]) -> Iterator[Any]:
                return piece.to_batches(dataset.schema, names, batch_size=_BATCH_ROWS, batch_readahead=1, **settings)

            groups = getattr(piece, "row_groups", None)  # for its own group count_rows() counts the file
            return _Part(sum(group.num_rows for group in groups) if groups else piece.count_rows(), stream)

        return cls(
            dataset.schema,
            [part(*piece) for piece in pieces],
            Files.of(getattr(dataset, "files", [])),
            "X.replace_schema(pyarrow.schema([field for field in X.schema if field.name not in {names}]))",
        )

    @property
    def length(self) -> int:
        """The number of rows."""
        return sum(part.count for part in self.parts)

    def reader(self, names: list[str]) -> Callable[[int, int], Any]:
        return _Cursor(self.parts, names, self.schema)


class _Cursor:
    """Rows of parts, read on from where the last ones ended, or else from the start of the part that holds them."""

    def __init__(self, parts: list[_Part], names: list[str], schema: Any) -> None:
        self.parts, self.names = parts, names
        self.arrow = require("pyarrow", "parquet")
        self.schema = self.arrow.schema([schema.field(name) for name in names])
        self.ends = np.cumsum([part.count for part in parts], dtype=np.int64)
        self._at, self._held, self._stream = 0, [], iter(())
        self._one = threading.Lock()  # several readers, each with a thread of its own, may share this place
        self._go_to(0)

    def __call__(self, start: int, stop: int) -> Any:
        """Rows start … stop − 1."""
        with self._one:
            return self._read(start, stop)

    def _read(self, start: int, stop: int) -> Any:
        part = self._part_of(start)
        if start < self._at or part > self._part_of(self._at):
            self._go_to(part)
        found, wanted = [], stop - start
        while wanted:
            batch = self._held.pop() if self._held else next(self._stream)
            skipped = min(len(batch), start - self._at)
            taken = min(len(batch) - skipped, wanted)
            found += [batch.slice(skipped, taken)] if taken else []
            if skipped + taken < len(batch):
                self._held.append(batch.slice(skipped + taken))
            self._at += skipped + taken
            start, wanted = max(start, self._at), wanted - taken
        return self.arrow.Table.from_batches([batch.select(self.names) for batch in found], self.schema)

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))

    def _go_to(self, part: int) -> None:
        self._at, self._held = int(self.ends[part - 1]) if part else 0, []
        self._stream = (batch for one in self.parts[part:] for batch in one.stream(self.names))


class _Numbers:
    """Columns of numbers side by side, as an array of their common type; nulls are refused where they are met."""

    chunk = 1

    def __init__(self, table: Table, names: list[str]) -> None:
        self.names, self.files, self.waits = names, table.files, not isinstance(table, _InMemory)
        fields = [table.schema.field(name) for name in names]
        wrong = [field for field in fields if not _is_number(_element(field.type))]
        if wrong:
            raise InvalidInput(_no_number(wrong, table))
        self.widths = [field.type.list_size if _is_list(field.type) else 1 for field in fields]
        self.shape = (table.length, sum(self.widths))
        kinds = [_element(field.type).to_pandas_dtype() for field in fields]
        self.dtype = np.result_type(*kinds) if kinds else np.dtype(np.float64)
        self._rows = table.reader(names)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start … stop − 1."""
        table = self._rows(start, stop)
        block = np.empty((stop - start, self.shape[1]), self.dtype)
        at = 0
        for name, width, column in zip(self.names, self.widths, table.columns, strict=True):
            block[:, at : at + width] = _values(column, name, start).reshape(-1, width)
            at += width
        return block

    def take(self, rows: NDArray[np.int64]) -> None:
        """None: they are read in blocks."""


class _Frames:
    """Columns of any kind as blocks of a pandas DataFrame, for the transformers of a Pipeline."""

    chunk, dtype = 1, np.dtype(object)

    def __init__(self, table: Table, names: list[str]) -> None:
        require("pandas", "pandas")
        self.shape, self.files = (table.length, len(names)), table.files
        self.waits = not isinstance(table, _InMemory)
        self._rows = table.reader(names)

    def read(self, start: int, stop: int) -> Any:
        """Rows start … stop − 1."""
        return self._rows(start, stop).to_pandas()

    def take(self, rows: NDArray[np.int64]) -> None:
        """None: they are read in blocks."""


def _pieces(fragment: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Parts of a fragment, and how they are read without holding more than a few pages of each column."""
    if not hasattr(fragment, "split_by_row_group"):
        return [(fragment, {})]
    scan = require("pyarrow.dataset", "parquet").ParquetFragmentScanOptions
    options = {"fragment_scan_options": scan(use_buffered_stream=True, pre_buffer=False)}
    return [(piece, options) for piece in fragment.split_by_row_group()]


def _column(table: Table, name: str) -> NDArray[Any]:
    """A column as a whole, decoded where it is a dictionary."""
    read = table.reader([name])
    parts = []
    for start in range(0, table.length, _BATCH_ROWS):
        column = read(start, min(start + _BATCH_ROWS, table.length)).column(0)
        if _types().is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        width = column.type.list_size if _is_list(column.type) else 0
        values = _values(column, name, start)
        parts.append(values.reshape(-1, width) if width else values)
    return np.concatenate(parts) if parts else np.empty(0)


def _values(column: Any, name: str, start: int) -> NDArray[Any]:
    """The values of a part of a column that begins at row `start`; lists one behind the other.

    Raises:
        InvalidInput: if one is null.
    """
    whole = column.combine_chunks()
    flat = whole.flatten() if _is_list(column.type) and not whole.null_count else whole
    if flat.null_count:
        place = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        row = start + place // (1 if flat is whole else column.type.list_size)
        message = (
            f"Column {name!r} holds no value (null) in row {row}, and {flat.null_count} of these {len(column)} rows "
            "lack one. One such value would make every score NaN. Impute or drop those rows before fitting and "
            "explaining; or fit and explain a Pipeline with a SimpleImputer in it, on a DataFrame."
        )
        raise InvalidInput(message)
    return flat.to_numpy(zero_copy_only=False)


def _types() -> Any:
    return require("pyarrow.types", "parquet")


def _is_list(kind: Any) -> bool:
    return bool(_types().is_fixed_size_list(kind))


def _element(kind: Any) -> Any:
    """The type of a column's numbers."""
    return kind.value_type if _is_list(kind) else kind


def _is_number(kind: Any) -> bool:
    types = _types()
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _missing(name: str, table: Table, asked: str) -> str:
    listed = table.schema.names
    shown = ", ".join(map(repr, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return (
        f"X is a table of the columns {shown}, and {asked} asks for {name!r}. Name a column as it is called there, or "
        "pass an array of one value per row."
    )


def _no_number(wrong: list[Any], table: Table) -> str:
    names = [field.name for field in wrong]
    kinds = ", ".join(f"{field.name!r} holds {field.type}" for field in wrong[:5])
    return (
        f"A feature is a number, and column {kinds}. Encode it: fit and explain a Pipeline whose transformers do, such "
        "as make_pipeline(ColumnTransformer([…]), model), on a DataFrame with these names; or leave out what the model "
        f"was not fitted on: {table.without.format(names=names)}."
    )
