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
_WALKED = {"loss": "loss", "self-influence": "self", "margin": "margin"}  # indexes of the orders
_MANY = 20_000  # found by a search


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
        descending: the largest first; items without the number are the smallest.
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

    @property
    def by_words_alone(self) -> bool:
        """Whether a search is all that is asked, so that the full text alone knows how many there are."""
        return match_of(self.search) is not None and replace(self, search="").everything

    def source(self, total: int) -> tuple[str, list[Any]]:
        """Numbers of items in their order, as a select without its limit, and its parameters.

        Args:
            total: how many there are; where a search finds many, the index of the order is walked, and words are
                looked up, instead of all that were found being sorted.
        """
        side, (condition, values) = self.side, self.condition()
        if self.by_words_alone and self.sort == "id":
            down = " desc" if self.descending else ""
            text = f"{side}_text"
            return f"select rowid from {text} where {text} match ? order by rowid{down}", values
        many = self.search and total > _MANY and self.sort != "id"
        walked = f" indexed by {side}_{_WALKED[self.sort]}" if many else ""
        return f"select id from {side}{walked} where {condition} order by {self.order()}", values

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
        return f"{column} {'desc' if self.descending else 'asc'}"


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
