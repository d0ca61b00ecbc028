"""The tables of the explorer's index: what training rows and queries are, in SQLite, searched and sorted.

    rows, queries             id, name, label, prediction, class, said, wrong, loss, margin, self_influence, fold,
                              twin, c0 …
    rows_card, queries_card   what each looks like: kind, three sizes, bytes, and how long it was before it was cut
    rows_text, queries_text   full text: names, labels, texts of cards
    parts                     which parts of a row matter to a query, as `show.parts` packs them

`class`, `said` and `fold` (said out of fold) are numbers of classes, c0 … c7 of levels of the first columns; clients
name numbers, never texts.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.show.parts import Packed
from upweight.show.run import COLUMNS, NOTHING, PICTURE, TEXT, TOKENS, Card
from upweight.show.token_cards import joined

SIDES = ("rows", "queries")
LEVELS = 8  # columns whose levels are kept with every item
LONGEST = 64 * 1024  # characters of a text that are kept
LONGEST_VALUE = 2_000  # … of a text in a column
WIDEST = 200  # columns that are kept
MOST_TOKENS = 16 * 1024  # … and tokens
_NAME = 200  # characters of a column's name
_INDEXED = 4_000  # characters of a card that are searched
_SAME = 8  # pixels of a picture's side when twins are looked for

SCHEMA = """
create table {side}(
  id integer primary key, name text, label, prediction, class integer, said integer, wrong integer,
  loss real, margin real, self_influence real, fold integer, twin integer{levels});
create table {side}_card(
  id integer primary key, kind integer, h integer, w integer, d integer, size integer, card blob);
create virtual table {side}_text using fts5(words, content='', detail='none', columnsize=0);
"""
PARTS = """
create table parts(
  query integer, row integer, kind integer, h integer, w integer, scale real, content blob,
  primary key(query, row)) without rowid;
"""
_SORTED = "loss, self_influence, margin"  # so that a filter and an order read an index alone
INDEXES = """
create index {side}_loss on {side}(loss);
create index {side}_self on {side}(self_influence);
create index {side}_margin on {side}(margin, class, wrong, said, loss, self_influence);
create index {side}_class on {side}(class, wrong, said, loss, self_influence, margin);
create index {side}_said on {side}(said, wrong, class, loss, self_influence, margin);
create index {side}_wrong on {side}(wrong, class, said, loss, self_influence, margin);
create index {side}_twin on {side}(twin) where twin is not null;
"""


def make_tables(connection: sqlite3.Connection) -> None:
    """Empty tables of both sides."""
    levels = "".join(f", c{place} integer" for place in range(LEVELS))
    for side in SIDES:
        connection.executescript(SCHEMA.format(side=side, levels=levels))
    connection.executescript(PARTS)


def insert_parts(connection: sqlite3.Connection, found: Mapping[tuple[int, int], Packed]) -> None:
    """The parts of rows, by query and row."""
    lines = ((*pair, one.kind, *one.shape, one.scale, one.content) for pair, one in found.items())
    connection.executemany("insert into parts values(?, ?, ?, ?, ?, ?, ?)", lines)


def make_indexes(connection: sqlite3.Connection, columns: int) -> None:
    """What makes filters and sorting fast, when all items are there."""
    for side in SIDES:
        connection.executescript(INDEXES.format(side=side))
        for place in range(columns):
            connection.execute(f"create index {side}_c{place} on {side}(c{place}, wrong, class, said, {_SORTED})")
        connection.execute(f"insert into {side}_text({side}_text) values('optimize')")
    connection.execute("analyze")


def insert(
    connection: sqlite3.Connection,
    side: str,
    start: int,
    values: Mapping[str, list[Any]],
    levels: NDArray[np.int32],
    cards: list[Card],
) -> None:
    """Some items into the tables.

    Args:
        connection: to the index.
        side: rows or queries.
        start: the number of the first.
        values: the columns of the table but for id, twin and levels, by their names.
        levels: (columns, items) the numbers of their levels, -1 where one has none.
        cards: what they look like.
    """
    packed = [pack(card) for card in cards]
    ids = range(start, start + len(cards))
    coded = [[None if code < 0 else code for code in line] for line in levels.tolist()]
    coded += [[None] * len(cards)] * (LEVELS - len(coded))
    names = ("name", "label", "prediction", "class", "said", "wrong", "loss", "margin", "self_influence", "fold")
    lines = zip(ids, *(values[name] for name in names), [twin_of(card) for card in cards], *coded, strict=True)
    marks = ", ".join("?" * (2 + len(names) + LEVELS))
    connection.executemany(f"insert into {side} values({marks})", lines)
    connection.executemany(
        f"insert into {side}_card values(?, ?, ?, ?, ?, ?, ?)",
        ((id, *one) for id, one in zip(ids, packed, strict=True)),
    )
    words = (f"{_told(name)} {_told(label)}" for name, label in zip(values["name"], values["label"], strict=True))
    texts = (
        (id, clean(f"{word} {words_of(card)}", _INDEXED)) for id, word, card in zip(ids, words, cards, strict=True)
    )
    connection.executemany(f"insert into {side}_text(rowid, words) values(?, ?)", texts)


def pack(card: Card) -> tuple[int, int, int, int, int, bytes]:
    """A card as kind, three sizes of a picture, its size before it was cut, and its bytes."""
    if isinstance(card, str):
        return TEXT, 0, 0, 0, len(card), card[:LONGEST].encode("utf-8", "surrogatepass")
    if isinstance(card, list):
        return TOKENS, 0, 0, 0, len(card), json.dumps([clean(one, _NAME) for one in card[:MOST_TOKENS]]).encode()
    if isinstance(card, np.ndarray):
        height, width, depth = (*card.shape, 1)[:3]
        return PICTURE, height, width, depth, card.size, card.tobytes()
    if isinstance(card, Mapping):
        few = {name[:_NAME]: _cut(value) for name, value in list(card.items())[:WIDEST]}
        return COLUMNS, 0, 0, 0, len(card), json.dumps(few, default=str).encode()
    return NOTHING, 0, 0, 0, 0, b""


def unpack(kind: int, height: int, width: int, depth: int, content: bytes) -> Card:
    """The card of a line of the table; a picture whose sizes are not its bytes is an error of NumPy's."""
    if kind == TEXT:
        return content.decode("utf-8", "surrogatepass")
    if kind == COLUMNS:
        return dict(json.loads(content))
    if kind == TOKENS:
        return [str(token) for token in json.loads(content)]
    if kind == PICTURE:
        shape = (height, width) if depth == 1 else (height, width, depth)
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)
    return None


def words_of(card: Card) -> str:
    """What is searched of a card: its text, or the texts in its columns."""
    if isinstance(card, str | list):
        return joined(card)[:_INDEXED] if isinstance(card, list) else card[:_INDEXED]
    if isinstance(card, Mapping):
        return " ".join(value for value in card.values() if isinstance(value, str))
    return ""


def twin_of(card: Card) -> int | None:
    """A number that cards share which are the same but for what hardly counts; None where there is no card.

    Of texts: case, punctuation and spaces; of numbers: the fourth digit and those behind it; of pictures: what is not
    seen at 8 × 8 pixels of 16 shades.
    """
    if card is None:
        return None
    if isinstance(card, str | list):
        text = joined(card) if isinstance(card, list) else card
        told = " ".join(re.findall(r"\w+", text.lower()))
    elif isinstance(card, np.ndarray):
        told = repr(_coarse(card))
    else:
        told = json.dumps(
            {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in card.items()}, default=str
        )
    return int.from_bytes(hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()[:8], "little", signed=True)


def match_of(text: str) -> str | None:
    """What FTS5 is asked for a person's words: all of them, the last one as the beginning of a word; None without any.

    Every word stands in quotes, so that none is taken for an operator.
    """
    words = re.findall(r"\w+", text)
    return " ".join([*(f'"{word}"' for word in words[:-1]), f'"{words[-1]}"*']) if words else None


def _coarse(picture: NDArray[np.uint8]) -> list[list[int]]:
    """Means of the blocks of a picture, in 16 shades."""
    grey = picture.astype(np.float64).mean(2) if picture.ndim == 3 else picture.astype(np.float64)
    lines, columns = (np.linspace(0, size, min(size, _SAME) + 1).astype(int) for size in grey.shape)
    sums = np.add.reduceat(np.add.reduceat(grey, lines[:-1], 0), columns[:-1], 1)
    return (sums / np.outer(np.diff(lines), np.diff(columns)) // 16).astype(int).tolist()


def plain(values: Iterable[Any] | None, count: int) -> list[Any]:
    """Values as SQLite takes them; None for each where there are none."""
    if values is None:
        return [None] * count
    return [value if isinstance(value, int | float | None) else clean(str(value)) for value in values]


def clean(text: str, most: int = LONGEST_VALUE) -> str:
    """A text that is valid Unicode, and not too long."""
    return text[:most].encode("utf-8", "replace").decode()


def _cut(value: Any) -> Any:
    return value[:LONGEST_VALUE] if isinstance(value, str) else value


def _told(value: Any) -> str:
    return "" if value is None else str(value)
