"""Which items of a side are wanted, in which order: from numbers and words of an address to SQL with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from upweight.explore.tables import LEVELS, match_of

PAGE = 25  # items
SORTS = {
    "id": "id",
    "loss": "loss",
    "self-influence": "self_influence",
    "margin": "margin",
}
SortName = str


@dataclass(frozen=True)
class Wanted:
    """A choice among the rows or the queries.

    Args:
        side: rows or queries.
        label: number of the class that they are labelled with.
        said: number of the class that the model says.
        wrong: True where the two differ, False where they do not; None for both.
        level: (column, level), numbers of a column with levels and of one of them.
        uncertain: margins nearer to 0 than this.
        search: words that all stand in name, label or card; the last may be a beginning.
        sort: one of SORTS.
        descending: the largest first; items without the number come last either way.
        page: from 0.
    """

    side: Literal["rows", "queries"]
    label: int | None = None
    said: int | None = None
    wrong: bool | None = None
    level: tuple[int, int] | None = None
    uncertain: float | None = None
    search: str = ""
    sort: SortName = "id"
    descending: bool = False
    page: int = 0

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self == replace(self.first, side=self.side, sort=self.sort, descending=self.descending, page=self.page)

    @property
    def first(self) -> Wanted:
        """All of a side."""
        return Wanted(self.side)

    def condition(self) -> tuple[str, list[Any]]:
        """What stands behind `where`, and its parameters."""
        parts: list[str] = []
        values: list[Any] = []
        for column, value in (("class", self.label), ("said", self.said)):
            if value is not None:
                parts.append(f"{column} = ?")
                values.append(value)
        if self.wrong is not None:
            parts.append("wrong = ?")
            values.append(int(self.wrong))
        if self.level is not None:
            column, code = self.level
            assert_column(column)
            parts.append(f"c{column} = ?")
            values.append(code)
        if self.uncertain is not None:
            parts.append("margin between ? and ?")
            values += [-self.uncertain, self.uncertain]
        match = match_of(self.search)
        if match is not None:
            parts.append(f"id in (select rowid from {self.side}_text where {self.side}_text match ?)")
            values.append(match)
        elif self.search:
            parts.append("0")  # nothing but signs
        return " and ".join(parts) or "1", values

    def order(self) -> str:
        """What stands behind `order by`."""
        column = SORTS[self.sort]
        if column == "id":
            return "id desc" if self.descending else "id"
        return f"{column} {'desc' if self.descending else 'asc'} nulls last"


def assert_column(column: int) -> None:
    """Raises for a number that no column has, which would be a mistake of ours: addresses are checked before.

    Raises:
        IndexError: then.
    """
    if not 0 <= column < LEVELS:
        raise IndexError(column)


def choices(sides: Sequence[str]) -> list[str]:
    """Names of what items can be sorted by."""
    return [name for name in SORTS if name in sides or name == "id"]
