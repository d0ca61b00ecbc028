"""A copy of a table's file with other cells in one column and without some rows; everything else is the same.

CSV and TSV are copied byte for byte but for the records that change. Parquet keeps its schema: types, categories,
nullability, names and metadata of columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upweight.errors import InvalidInput, require

_UNFINISHED = ".unfinished"
_BYTES = "surrogateescape"  # what is no UTF-8 is copied as it is
_LONGEST = 2**31 - 1  # characters of a cell


def is_parquet(file: Path) -> bool:
    """Whether a file is called like a Parquet file."""
    return file.name.lower().endswith(".parquet")


def labels_in(file: Path, column: str) -> list[Any]:
    """The cells of a column: texts as they stand in a CSV file, values with None for a missing one of Parquet.

    Raises:
        InvalidInput: if there is no such column, or the file cannot be read.
    """
    if is_parquet(file):
        table = require("pyarrow.parquet", "parquet").read_table(file, columns=[_known(file, column, _names(file))])
        return table.column(0).to_pylist()
    with _long_cells(), _text(file) as stream:
        records = _records(stream, separator(file))
        place = _place(file, column, next(records, ("", []))[1])
        return [cells[place] if place < len(cells) else "" for _, cells in records]


def columns_in(file: Path) -> list[str]:
    """The names of a file's columns that stand once.

    Raises:
        InvalidInput: if it cannot be read.
    """
    if is_parquet(file):
        names = _names(file)
    else:
        with _long_cells(), _text(file) as stream:
            names = next(_records(stream, separator(file)), ("", []))[1]
    return [name for name in names if names.count(name) == 1]


def rewrite(file: Path, column: str, changed: Mapping[int, Any], dropped: Collection[int], out: Path) -> Path:
    """Write the copy, under another name first.

    Args:
        file: the table; it is only read.
        column: whose cells change.
        changed: the new cells, by the numbers of their rows from 0: texts for CSV, values for Parquet.
        dropped: the numbers of the rows that are left out.
        out: where; its folder is made.

    Raises:
        InvalidInput: if there is no such column, a value does not fit its type, or `out` is the file itself.
    """
    if out.exists() and out.samefile(file):
        message = f"{out} is the file itself, which is never edited. Name another one, such as corrected-{out.name}."
        raise InvalidInput(message)
    out.parent.mkdir(parents=True, exist_ok=True)
    if _kind(file) != _kind(out):
        message = (
            f"{file} and {out} are of different kinds, and the copy has the file's. Name it {_bare(out)}{_kind(file)}."
        )
        raise InvalidInput(message)
    unfinished = out.with_name(f".{out.name}{_UNFINISHED}")
    (_rewrite_parquet if is_parquet(file) else _rewrite_csv)(file, column, changed, frozenset(dropped), unfinished)
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    return unfinished.replace(out)


def _kind(file: Path) -> str:
    """The ending by which a reader knows what separates cells: .parquet, .tsv, or .csv of all others, zipped or not."""
    name = file.name.lower().removesuffix(".gz")
    return ".parquet" if is_parquet(file) else ".tsv" if name.endswith(".tsv") else ".csv"


def _bare(file: Path) -> str:
    """A name without such an ending."""
    return file.name.split(".")[0] or "corrected"


def separator(file: Path) -> str:
    """What separates cells: tabs by the suffix, else whichever of comma and semicolon the first line has more of."""
    if ".tsv" in file.name.lower():
        return "\t"
    with opened(file) as stream:
        first = stream.readline()
    return ";" if first.count(b";") > first.count(b",") else ","


def opened(file: Path) -> Any:
    """The bytes of a file, or of what was zipped in it."""
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _rewrite_csv(file: Path, column: str, changed: Mapping[int, Any], dropped: frozenset[int], out: Path) -> None:
    between = separator(file)
    zipped = out.name.removesuffix(_UNFINISHED).lower().endswith(".gz")
    with _long_cells(), _text(file) as source, gzip.open(out, "wb") if zipped else out.open("wb") as raw:  # type: ignore[arg-type]
        target = io.TextIOWrapper(raw, encoding="utf-8", errors=_BYTES, newline="")
        records = _records(source, between, marked=True)
        head, names = next(records, ("", []))
        place = _place(file, column, names)
        target.write(head)
        for number, (text, cells) in enumerate(records):
            if number not in dropped:
                target.write(_with(text, cells, place, str(changed[number]), between) if number in changed else text)
        target.flush()
        target.detach()


def _with(text: str, cells: list[str], place: int, new: str, between: str) -> str:
    """A record with another cell; the others keep their text, and only what needs quotes has them."""
    end = text[len(text.rstrip("\r\n")) :]
    stream = io.StringIO()
    csv.writer(stream, delimiter=between, lineterminator="").writerow([*cells[:place], new, *cells[place + 1 :]])
    return stream.getvalue() + end


def _records(stream: Any, between: str, *, marked: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Records with the text that they were read from; blank lines are records of no cells."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in stream:
            taken.append(line)
            yield line

    for number, cells in enumerate(csv.reader(lines(), delimiter=between, skipinitialspace=True)):
        text = "".join(taken)
        if not number and text.startswith("\ufeff"):
            cells = next(csv.reader(io.StringIO(text[1:], newline=""), delimiter=between, skipinitialspace=True), [])
            text = text if marked else text[1:]
        yield text, cells
        taken.clear()


@contextmanager
def _long_cells() -> Iterator[None]:
    """Inside, a cell may be longer than 131,072 characters; the limit is the csv module's own, and global."""
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _text(file: Path) -> Any:
    return io.TextIOWrapper(opened(file), encoding="utf-8", errors=_BYTES, newline="")


def _place(file: Path, column: str, names: list[str]) -> int:
    bare = [name.strip() for name in names]
    return bare.index(_known(file, column, bare))


def _known(file: Path, column: str, names: list[str]) -> str:
    """The same column.

    Raises:
        InvalidInput: if there is none, or there are two.
    """
    if names.count(column) != 1:
        count = names.count(column) or "no"
        message = f"{file} has {count} columns '{column}'; its columns are {', '.join(names)}. Name the one of labels: "
        raise InvalidInput(message + "--label COLUMN.")
    return column


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _names(file: Path) -> list[str]:
    return list(require("pyarrow.parquet", "parquet").read_schema(file).names)


def _rewrite_parquet(file: Path, column: str, changed: Mapping[int, Any], dropped: frozenset[int], out: Path) -> None:
    arrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    source = parquet.ParquetFile(file)
    table = source.read()
    place = table.schema.names.index(_known(file, column, table.schema.names))
    kind = table.schema.field(place).type
    values = table.column(place).to_pylist()
    for number, new in changed.items():
        values[number] = new
    try:
        cells = _cells(arrow, table.column(place), values, kind)
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError) as error:
        some = next(iter(changed.values()), None)
        message = f"The column '{column}' of {file} holds {kind}, and {some!r} does not fit ({error}). Correct it to "
        raise InvalidInput(message + "labels that the column can hold.") from error
    table = table.set_column(place, table.schema.field(place), cells)
    kept = [number not in dropped for number in range(table.num_rows)]
    table = table.filter(arrow.array(kept, arrow.bool_())) if dropped else table
    codec = source.metadata.row_group(0).column(0).compression if source.metadata.num_row_groups else "SNAPPY"
    groups = source.metadata.row_group(0).num_rows if source.metadata.num_row_groups else None
    parquet.write_table(table, out, compression=codec.lower().replace("uncompressed", "none"), row_group_size=groups)


def _cells(arrow: Any, before: Any, values: list[Any], kind: Any) -> Any:
    """Values as a column of the same type; categories keep their order, new ones come last."""
    if not arrow.types.is_dictionary(kind):
        return arrow.chunked_array([arrow.array(values, type=kind)])
    known = list(dict.fromkeys(value for chunk in before.chunks for value in chunk.dictionary.to_pylist()))
    known += [value for value in dict.fromkeys(values) if value is not None and value not in set(known)]
    codes = {value: code for code, value in enumerate(known)}
    indices = arrow.array([None if value is None else codes[value] for value in values], type=kind.index_type)
    dictionary = arrow.array(known, type=kind.value_type)
    return arrow.chunked_array([arrow.DictionaryArray.from_arrays(indices, dictionary, ordered=kind.ordered)])
