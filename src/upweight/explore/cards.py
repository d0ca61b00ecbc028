"""What an item looks like on a page, alone or beside a query: pictures, texts with what both say marked, columns with
their differences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from upweight.explore.columns import is_number
from upweight.explore.explorer import Explorer, Side
from upweight.explore.tables import LONGEST
from upweight.show.run import Card
from upweight.show.token_cards import joined

EXCERPT, WHOLE = 360, 20_000  # characters of a text
FEW_TOKENS, WHOLE_TOKENS = 90, 5_000
FEW, MANY = 6, 200  # columns
_PIECES = re.compile(r"\w+|\W+")


def shown(
    explorer: Explorer,
    side: Side,
    items: Sequence[Mapping[str, Any]],
    beside: Card = None,
    *,
    beside_is: str = "query",
    whole: bool = False,
) -> list[dict[str, Any]]:
    """Items with their cards, as templates and twins tell them.

    Args:
        explorer: of the run.
        side: of the items.
        items: as `Explorer.items` gives them.
        beside: the card that they are compared with.
        beside_is: whose card that is: "query" or "row".
        whole: whether texts and columns are told to their end.
    """
    cards = explorer.cards(side, [item["id"] for item in items])
    spreads = {column["name"]: column["spread"] for column in explorer.facts["columns"]}
    found = []
    for item in items:
        told = {name: value for name, value in item.items() if name != "twin"}
        told["address"] = f"/{side}/{item['id']}"
        told["card"] = _card(cards.get(item["id"]), told["address"], beside, spreads, whole)
        told["card"] |= {"beside_is": beside_is} if told["card"].get("compared") else {}
        cut = told["card"]["kind"] == "text" and told["card"].get("characters", 0) >= LONGEST
        if cut:  # when the index was made
            size = explorer.ask(f"select size from {side}_card where id = ?", [item["id"]])
            told["card"]["characters"] = int(size[0][0])
        found.append(told)
    return found


def _card(card: Card, address: str, beside: Card, spreads: Mapping[str, float | None], whole: bool) -> dict[str, Any]:
    if isinstance(card, str):
        return {"kind": "text", **_text(card, beside if isinstance(beside, str) else None, whole)}
    if isinstance(card, list):
        return {"kind": "tokens", **_tokens(card, beside if isinstance(beside, list) else None, whole)}
    if isinstance(card, np.ndarray):
        height, width = card.shape[:2]
        return {"kind": "picture", "address": f"{address}/picture.png", "height": height, "width": width}
    if isinstance(card, Mapping):
        return {"kind": "columns", **_columns(card, beside if isinstance(beside, Mapping) else None, spreads, whole)}
    return {"kind": "none"}


def _text(text: str, beside: str | None, whole: bool) -> dict[str, Any]:
    """A text in parts, of which those are marked whose words the other has too; and words that only the other has."""
    most = WHOLE if whole else EXCERPT
    told = text[:most]
    known = set() if beside is None else {word.lower() for word in re.findall(r"\w+", beside[:WHOLE])}
    parts: list[dict[str, Any]] = []
    for piece in _PIECES.findall(told):
        both = piece.lower() in known
        between = not piece.strip() and parts and parts[-1]["both"]
        if parts and (parts[-1]["both"] == both or between) and not (between and not both and "\n" in piece):
            parts[-1]["text"] += piece
        else:
            parts.append({"text": piece, "both": both})
    own = {word.lower() for word in re.findall(r"\w+", text[:WHOLE])}
    missing = (
        []
        if beside is None
        else list(dict.fromkeys(w for w in re.findall(r"\w+", beside[:WHOLE]) if w.lower() not in own))
    )
    told = {"parts": parts, "cut": len(text) > most, "characters": len(text), "compared": beside is not None}
    return {**told, "only_beside": missing[:12]}


def _tokens(tokens: list[str], beside: list[str] | None, whole: bool) -> dict[str, Any]:
    """Tokens in parts, of which those are marked that the other has too; and tokens that only the other has."""
    most = WHOLE_TOKENS if whole else FEW_TOKENS
    spaced = any(token[:1].isspace() for token in tokens)
    known = set() if beside is None else {token.strip() for token in beside}
    parts: list[dict[str, Any]] = []
    for token in tokens[:most]:
        both, text = token.strip() in known and _has_word(token), token if spaced else f"{token} "
        if parts and not both and not parts[-1]["both"]:
            parts[-1]["text"] += text
        else:
            parts.append({"text": text, "both": both})
    own = {token.strip() for token in tokens}
    missing = [] if beside is None else dict.fromkeys(one.strip() for one in beside if _has_word(one))
    only = [token for token in missing if token not in own]
    told = {"parts": parts, "cut": len(tokens) > most, "characters": len(tokens), "compared": beside is not None}
    return {**told, "only_beside": only[:12]}


def _has_word(token: str) -> bool:
    return re.search(r"\w", token) is not None


def _columns(
    card: Mapping[str, Any], beside: Mapping[str, Any] | None, spreads: Mapping[str, float | None], whole: bool
) -> dict[str, Any]:
    """Columns with the other's values beside them, those first that differ most, in standard deviations of the rows."""
    lines = []
    for name, value in list(card.items())[:MANY]:
        line: dict[str, Any] = {"name": name, "value": value}
        if beside is not None:
            line |= {"beside": beside.get(name), "apart": _apart(value, beside.get(name), spreads.get(name))}
        lines.append(line)
    if beside is not None:
        lines.sort(key=lambda line: -abs(line.get("apart") or 0.0))
    most = MANY if whole else FEW
    return {"lines": lines[:most], "rest": lines[most:], "compared": beside is not None}


def _apart(value: Any, other: Any, spread: float | None) -> float | None:
    """How far a value is from another, in standard deviations; 1 or 0 of texts, None where there is no telling."""
    if is_number(value) and is_number(other):
        return (float(value) - float(other)) / spread if spread else (0.0 if value == other else None)
    return None if value is None or other is None else float(value != other)


def distance(one: Card, other: Card, spreads: Mapping[str, float | None]) -> float | None:
    """How far two cards are apart: root mean square of pixels' differences, of columns' in standard deviations, or the
    share of words that not both have; None of different kinds.
    """
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.shape == other.shape:
        return float(np.sqrt(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)) / 255)
    if isinstance(one, list) and isinstance(other, list):
        one, other = joined(one), joined(other)
    if isinstance(one, str) and isinstance(other, str):
        a, b = ({word.lower() for word in re.findall(r"\w+", text[:WHOLE])} for text in (one, other))
        return 1 - len(a & b) / len(a | b) if a | b else 0.0
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        gaps = [_apart(one[name], other[name], spreads.get(name)) for name in one if name in other]
        known = [gap for gap in gaps if gap is not None]
        return math.sqrt(sum(gap * gap for gap in known) / len(known)) if known else None
    return None


def distance_is(card: Card) -> str:
    """What `distance` measures for such a card, in words."""
    if isinstance(card, np.ndarray):
        return "root mean square difference of pixels"
    return "share of words that not both have" if isinstance(card, str | list) else "standard deviations apart"
