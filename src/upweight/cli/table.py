"""A table in a file as training rows: what each column is, what is left out and why, and what each row is called.

Reading is pandas'. What is decided here is what a column of such a type means to a linear model:

    number, boolean     as it is; infinite values count as missing
    date                days since 1970
    category            a column of text with few distinct values
    text                many distinct values of three words or more: weighted word counts
    dropped             empty, constant, a numbering of the rows, or many distinct values that are no texts

Empty cells, "?" and what pandas takes for missing are missing. A row is called by its number in the file as a
spreadsheet shows it, the line of names being 1; in Parquet, which has no such line, rows count from 0.
"""

from __future__ import annotations

import difflib
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from upweight.data.rewritten import is_parquet, labels_in, opened, rewrite, separator
from upweight.errors import InvalidInput, PathNotFound, first_line, require

if TYPE_CHECKING:  # pandas is optional
    from pandas import DataFrame, Series

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
FEWEST_OF_A_CLASS = 10  # two for each of five folds, so that a planted flip leaves one
_MOST_CLASSES, _MOST_NUMBERS = 100, 20  # beyond these a label is no class but a text or a measurement
_WORDS = 3  # of a text, on average
_NO_LABEL = (  # what pandas takes for missing, and a question mark
    *("", "?", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
_DATES = ("ISO8601", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y")


@dataclass(frozen=True)
class Column:
    """A column, what it was taken for, and a few words about it."""

    name: str
    kind: str
    note: str


@dataclass(frozen=True)
class Table:
    """The rows of a file that have a label.

    Args:
        file: where they come from.
        label: the column of labels.
        cells: (n rows, all columns but the label) as they were read.
        frame: (n rows, used columns), numbers as float, categories and texts as str.
        labels: (n,) labels as text.
        numbers: (n,) what each row is called in the file.
        columns: what became of each column.
        left_out: what rows were left out, as sentences.
    """

    file: Path
    label: str
    cells: DataFrame = field(repr=False)
    frame: DataFrame = field(repr=False)
    labels: NDArray[Any] = field(repr=False)
    numbers: NDArray[np.int64] = field(repr=False)
    columns: tuple[Column, ...]
    left_out: tuple[str, ...]

    def named(self, *kinds: str) -> list[str]:
        """The columns of these kinds."""
        return [column.name for column in self.columns if column.kind in kinds]

    def describe(self, row: int) -> str:
        """The cells of a row in words; those that are missing are left out."""
        cells = self.cells.iloc[row].dropna()
        return "; ".join(f"{name}: {str(cell)[:80]}" for name, cell in cells.items())

    def __str__(self) -> str:
        names, counts = np.unique(self.labels, return_counts=True)
        classes = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        width = max(len(column.name) for column in self.columns)
        lines = [f"{self.file}: {len(self.labels)} rows; {self.label}: {classes}"]
        lines += [f"  {column.name:<{width}}  {column.kind:<8}  {column.note}".rstrip() for column in self.columns]
        return "\n".join([*lines, *self.left_out])

    def to_dict(self) -> dict[str, Any]:
        """What was read, as plain numbers and lists."""
        columns = [{"name": one.name, "kind": one.kind, "note": one.note} for one in self.columns]
        return {"rows": len(self.labels), "label": self.label, "columns": columns, "left_out": list(self.left_out)}


def is_table(name: str) -> bool:
    """Whether a name is that of a table rather than of a study."""
    return name.lower().endswith(SUFFIXES)


def read(file: Path, label: str | None) -> Table:
    """The rows that have a label, with what each column was taken for.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if it cannot be read, or the label is no column of classes.
        MissingExtra: if pandas, or for Parquet pyarrow, is not installed.
    """
    if not file.is_file():
        message = f"There is no file {file}. Name a table ({', '.join(SUFFIXES)}), or a study: file.py:function."
        raise PathNotFound(message)
    whole = _parquet(file) if is_parquet(file) else _csv(file, na_values=["?"])
    others = [str(name) for name in whole.columns if name != label]
    if label is None or label not in whole.columns:
        problem = "no label was named" if label is None else f"there is no column '{label}'"
        message = f"{file} is a table, and {problem}. Its columns are {', '.join(map(str, whole.columns))}. Name the "
        raise InvalidInput(message + f"one to repair: {_command(file, _meant(whole, label))}.")
    if not is_parquet(file):
        _refuse_two_of_one_name(file, label)
    text = _labels(file, whole, label)
    typed = {name: _typed(name, cast("Series", whole[name])) for name in others}
    columns = tuple(column for column, _ in typed.values())
    _check_few(file, text[text != ""], label, [name for name in others if _of_classes(whole[name])])
    kept, left_out = _kept(file, text, label)
    _check_two(text[kept], label)
    frame = require("pandas", "pandas").DataFrame(
        {name: cells for name, (column, cells) in typed.items() if column.kind != "dropped"}
    )
    if not frame.shape[1]:
        notes = "; ".join(f"{column.name}: {column.note}" for column in columns)
        message = f"No column of {file} beside '{label}' says anything ({notes}). "
        raise InvalidInput(message + "Add the columns that the labels were chosen by.")
    rows = np.flatnonzero(kept)
    cells, used = (part.iloc[rows].reset_index(drop=True) for part in (whole[others], frame))
    return Table(file, label, cells, used, text[rows], rows + _first(file), columns, left_out)


def write_corrected(table: Table, patch: Mapping[int, tuple[Any, Any]], file: Path) -> Path:
    """A copy of the table's file in which rows of a patch have their new labels; all other rows are the same bytes."""
    changed = {int(table.numbers[row]) - _first(table.file): new for row, (_, new) in patch.items()}
    if is_parquet(table.file):
        values = {str(value): value for value in labels_in(table.file, table.label) if value is not None}
        changed = {number: values[new] for number, new in changed.items()}
    return rewrite(table.file, table.label, changed, (), file)


def _first(file: Path) -> int:
    """What the first row is called."""
    return 0 if is_parquet(file) else 2


def _parquet(file: Path) -> DataFrame:
    require("pyarrow", "parquet")
    return require("pandas", "pandas").read_parquet(file).reset_index(drop=True)


def _csv(file: Path, **settings: Any) -> DataFrame:
    """The cells of a CSV file; a blank line is a row, so that rows keep their numbers.

    Raises:
        InvalidInput: if it is no UTF-8, has no rows, or a row has more cells than there are columns.
    """
    pd = require("pandas", "pandas")
    settings = {"sep": separator(file), "encoding": "utf-8-sig", "skipinitialspace": True, **settings}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            whole = pd.read_csv(file, index_col=False, skip_blank_lines=False, low_memory=False, **settings)
    except UnicodeDecodeError as error:
        message = f"{file} is not encoded in UTF-8 ({first_line(error)}). Save it so, for example with: "
        raise InvalidInput(message + _recoding(file)) from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        message = (
            f"{file} cannot be read as a table: {first_line(error)}. Write the names of the columns into "
            "the first line, and as many cells into every other."
        )
        raise InvalidInput(message) from error
    if not len(whole):
        message = f"{file} has a line of names and no rows. Add rows."
        raise InvalidInput(message)
    if "header" not in settings:
        names = pd.Series([str(name).strip() for name in whole.columns])  # pandas numbers equal ones before the strip
        again = names.groupby(names).cumcount()
        whole.columns = [f"{name}.{k}" if k else name for name, k in zip(names, again, strict=True)]
    return whole


def _refuse_two_of_one_name(file: Path, label: str) -> None:
    """Raises if two columns have the label's name: pandas would take the second for a feature, which tells the answer.

    Raises:
        InvalidInput: with their places.
    """
    names = _csv(file, header=None, nrows=1, dtype=str).iloc[0].astype(str).str.strip().tolist()
    places = [place for place, name in enumerate(names, 1) if name == label]
    if len(places) > 1:
        message = (
            f"{file} has {len(places)} columns called '{label}', columns {', '.join(map(str, places))}. Rename or "
            "remove all but the one whose labels are to be repaired."
        )
        raise InvalidInput(message)


def _labels(file: Path, whole: DataFrame, label: str) -> NDArray[Any]:
    """(rows,) the labels as they are written, "" where there is none."""
    if is_parquet(file):
        missing = whole[label].isna().to_numpy()
        return np.where(missing, "", whole[label].astype(str).to_numpy(dtype=object)).astype(object)
    place = list(whole.columns).index(label)
    cells = _csv(file, usecols=[place], dtype=str, na_filter=False).iloc[:, 0].str.strip().to_numpy(dtype=object)
    return np.where(np.isin(cells.astype(str), _NO_LABEL), "", cells).astype(object)


def _kept(file: Path, text: NDArray[Any], label: str) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Which rows have a label of a class that is no rarity, and what to say about the others."""
    left_out, kept = [], text != ""
    if not kept.all():
        left_out.append(f"{_rows(file, ~kept)} left out: no {label}")
    names, counts = np.unique(text[kept].astype(str), return_counts=True)
    for name, count in zip(names, counts, strict=True):
        if count < FEWEST_OF_A_CLASS:
            rare = text == name
            left_out.append(f"{_rows(file, rare)} left out: fewer than {FEWEST_OF_A_CLASS} have the {label} '{name}'")
            kept = kept & ~rare
    return kept, tuple(left_out)


def _rows(file: Path, which: NDArray[np.bool_]) -> str:
    """The numbers of some rows, in words."""
    numbers = (np.flatnonzero(which) + _first(file)).tolist()
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:10]))}{more}"


def _check_two(labels: NDArray[Any], label: str) -> None:
    """Raises where there is nothing to tell apart.

    Raises:
        InvalidInput: if there is one class or none.
    """
    names = np.unique(labels.astype(str))
    if len(names) < 2:
        found = f"only '{names[0]}'" if len(names) else "none"
        message = f"Of the classes in '{label}' {found} has {FEWEST_OF_A_CLASS} rows or more, and repair compares two "
        raise InvalidInput(message + "classes at least. Name a column of classes with --label, or add rows.")


def _check_few(file: Path, labels: NDArray[Any], label: str, classes: list[str]) -> None:
    """Raises where a label is no class, and names one of the columns of classes.

    Raises:
        InvalidInput: if there are too many different ones.
    """
    names = np.unique(labels.astype(str))
    numeric = not np.isnan(require("pandas", "pandas").to_numeric(names, errors="coerce")).any()
    if len(names) > (_MOST_NUMBERS if numeric else _MOST_CLASSES):
        other = f", such as {classes[0]}: {_command(file, classes[0])}" if classes else ""
        message = (
            f"'{label}' has {len(names)} different values, which are a measurement or a text, and no classes. Cut "
            f"numbers into classes first (pandas.cut), or name a column of classes{other}."
        )
        raise InvalidInput(message)


def _of_classes(cells: Any) -> bool:
    """Whether a column could be one of labels: a few different values, two of them frequent."""
    counts = cells.dropna().astype(str).value_counts()
    return len(counts) <= _MOST_NUMBERS and (counts >= FEWEST_OF_A_CLASS).sum() > 1


def _meant(whole: DataFrame, label: str | None) -> str:
    """The column that was meant: called nearly so, or else the last that could be one of labels."""
    names = [str(name) for name in whole.columns]
    alike = difflib.get_close_matches(label or "", names, n=1)
    return [*names[-1:], *(name for name in names if _of_classes(whole[name])), *alike][-1]


def _command(file: Path, label: str) -> str:
    """How the labels of a column are repaired, as a shell takes it."""
    return f"upweight repair {shlex.quote(str(file))} --label " + (shlex.quote(label) if "'" in label else f"'{label}'")


def _recoding(file: Path) -> str:
    """What turns a file into UTF-8, as a shell takes it."""
    zipped = file.name.lower().endswith(".gz")
    with opened(file) as stream:
        start = stream.read(2)
    code = "UTF-16" if start in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    old, new = shlex.quote(str(file)), shlex.quote(f"utf8-{file.name[:-3] if zipped else file.name}")
    if zipped:
        return f"gunzip -c {old} | iconv -f {code} -t UTF-8 > {new}"
    return f"iconv -f {code} -t UTF-8 {old} > {new}"


def _typed(name: str, cells: Series) -> tuple[Column, Series]:
    """What a column is, and its cells as that."""
    pd = require("pandas", "pandas")
    cells = cells.replace([np.inf, -np.inf], np.nan) if cells.dtype.kind == "f" else cells
    missing = f"{cells.isna().mean():.1%} missing" if cells.isna().any() else ""
    present = cells.dropna()
    if pd.api.types.is_bool_dtype(present) or {*map(type, present)} == {bool}:
        return Column(name, "boolean", missing), cells.astype(object).map({True: 1.0, False: 0.0}).astype(float)
    number = pd.api.types.is_numeric_dtype(cells)
    if not number and not pd.api.types.is_datetime64_any_dtype(cells):
        cells = cells.astype(object).where(cells.isna(), cells.astype(str))
        present = cells.dropna()
    distinct = present.nunique()
    useless = _useless(name, present, distinct, len(cells), number)
    if useless:
        return Column(name, "dropped", useless), cells
    if number:
        return Column(name, "number", missing), cells.astype(float)
    days = _days(cells)
    if days is not None:
        return Column(name, "date", missing), days
    if distinct <= max(20, len(cells) // 10):
        return Column(name, "category", ", ".join(filter(None, (f"{distinct} values", missing)))), cells
    if present.str.split().str.len().mean() >= _WORDS:
        return Column(name, "text", ", ".join(filter(None, ("weighted words", missing)))), cells.fillna("")
    return Column(name, "dropped", f"{distinct} different values that are no texts"), cells


def _useless(name: str, present: Series, distinct: int, n: int, number: bool) -> str:
    """Why a column says nothing about a label; "" if it may."""
    if not distinct:
        return "empty"
    if distinct == 1 and len(present) == n:
        return f"the same in every row: {present.iloc[0]}"
    if number and distinct == n and (present == present.round()).all():
        consecutive = present.max() - present.min() == n - 1
        if consecutive or name.lower().split("_")[-1] == "id":
            return "numbers the rows"
    return ""


def _days(cells: Series) -> Series | None:
    """Dates as days since 1970; None where a cell is no date of the same form as the others."""
    pd = require("pandas", "pandas")
    present = cells.dropna()
    for form in _DATES:
        dates = pd.to_datetime(present, format=form, errors="coerce", utc=True)
        if dates.notna().all():
            return ((dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).reindex(cells.index)
    return None
