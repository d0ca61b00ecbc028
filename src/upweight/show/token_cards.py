"""Cards of token sequences: a list of pieces of text, one a token."""

from __future__ import annotations

from collections.abc import Sequence

_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})  # what tokenizers write for a space and for a new line


def readable(texts: Sequence[str]) -> list[str]:
    """Tokens as a reader knows them: a space where the tokenizer has a sign for it."""
    return [text.translate(_SPACES) for text in texts]


def joined(tokens: Sequence[str]) -> str:
    """Tokens as a text: with a space between them where none of them brings its own."""
    return ("" if any(token[:1].isspace() for token in tokens) else " ").join(tokens)
