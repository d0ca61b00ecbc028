"""What a page is: an address, a function that makes a plain dict, and a template of the same name that shows it.

The page at /queries has its twin at /queries.json: the same dict as JSON. What changes something is an Action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from upweight.explore.explorer import Explorer, Side

LARGEST = 2**53  # numbers that JavaScript, too, holds exactly


@dataclass(frozen=True)
class Asked:
    """What an address asks for: whole numbers, one of some words, or short texts. Anything else is refused.

    Args:
        path: the numbers in the path, by their names.
        query: what stands behind the question mark; the last of each name.
    """

    path: Mapping[str, int]
    query: Mapping[str, str]

    def number(self, name: str, default: int | None = None, *, least: int = 0, most: int = LARGEST) -> int | None:
        """A whole number; `default` where it is not given.

        Raises:
            HTTPException: if it is none, or outside of its range.
        """
        text = self.query.get(name, "")
        if not text:
            return default
        if not (text.isascii() and text.isdecimal() and len(text) < 17 and least <= int(text) <= most):
            raise HTTPException(400, f"{name} is a whole number from {least} to {most}.")
        return int(text)

    def page(self) -> int:
        """The page of a list, from 0."""
        return self.number("page", 0) or 0

    def flag(self, name: str) -> bool:
        """Whether something is switched on: `1`."""
        return self.number(name, 0, most=1) == 1

    def choice(self, name: str, known: Sequence[str]) -> str:
        """One of some words; the first of them where it is not given.

        Raises:
            HTTPException: if it is another.
        """
        word = self.query.get(name) or known[0]
        if word not in known:
            raise HTTPException(400, f"{name} is one of: {', '.join(known)}.")
        return word

    def text(self, name: str, most: int = 200) -> str:
        """A text of a person.

        Raises:
            HTTPException: if it is longer.
        """
        text = self.query.get(name, "").strip()
        if len(text) > most:
            raise HTTPException(400, f"{name} has {len(text)} characters; at most {most} are searched for.")
        return text


@dataclass(frozen=True)
class Page:
    """A page, and its twin in JSON.

    Args:
        name: its template is templates/NAME.html.
        path: "/queries/{query:int}"; parts of it are whole numbers only.
        make: from the explorer and what is asked to a dict of plain values, which the template knows as `page`.
        tab: its word in the navigation; "" where other pages lead to it.
    """

    name: str
    path: str
    make: Callable[[Explorer, Asked], dict[str, Any]]
    tab: str = ""


@dataclass(frozen=True)
class Action:
    """What changes something: POST of a JSON object, answered with one; `Writes` in guard.py has looked at it before.

    Args:
        path: as of a page.
        do: from the explorer, what is asked and the object to a dict of plain values.
    """

    path: str
    do: Callable[[Explorer, Asked, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Download:
    """A file to be kept, made when it is asked for.

    Args:
        path: as of a page.
        make: from the explorer and what is asked to its name, its media type and its content.
    """

    path: str
    make: Callable[[Explorer, Asked], tuple[str, str, bytes]]


def existing(explorer: Explorer, side: Side, number: int) -> dict[str, Any]:
    """A row or query, as `Explorer.item` gives it.

    Raises:
        HTTPException: if there is none.
    """
    found = explorer.item(side, number) if number <= LARGEST else None
    if found is None:
        what, count = ("Row", explorer.n) if side == "rows" else ("Query", explorer.q)
        raise HTTPException(404, f"{what} {number} does not exist: there are {count:,}, from 0 to {count - 1:,}.")
    return found


def not_found(what: str) -> HTTPException:
    """What is raised where something does not exist."""
    return HTTPException(404, what)
