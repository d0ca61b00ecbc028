"""What an error says to type is typed: `with refused(what it says, what to type): …`, and then just that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from upweight.errors import TheoryWarning, UpweightError


@contextmanager
def refused(says: str, advice: str) -> Iterator[pytest.ExceptionInfo[UpweightError]]:
    """The block ends in an error of this library whose message says one thing and, behind it, advises the other.

    Args:
        says: words of the message as they stand in the source, between two placeholders; they tell it from others.
        advice: the first words of what it says to type, in the same way. docs/errors.md cuts the message there.
    """
    with pytest.raises(UpweightError) as caught:
        yield caught
    _in_this_order(str(caught.value), says, advice)


@contextmanager
def warned(says: str, advice: str) -> Iterator[None]:
    """The same for a TheoryWarning."""
    with pytest.warns(TheoryWarning) as caught:
        yield
    said = [str(one.message) for one in caught if says in str(one.message)]
    assert said, [str(one.message) for one in caught]
    _in_this_order(said[0], says, advice)


def _in_this_order(message: str, says: str, advice: str) -> None:
    assert says in message, message
    assert advice in message[message.index(says) :], message
