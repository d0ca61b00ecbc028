"""Every message of the library is provoked by a test that then types what it says: tests/remedies."""

from __future__ import annotations

import messages
import pytest

PACKAGES = sorted({message.package for message in messages.messages()})


@pytest.mark.parametrize("package", PACKAGES)
def test_every_message_is_provoked_and_followed(package):
    missing = [f"{one.file}:{one.line} {one.text}" for one in messages.without_a_test(package)]
    assert not missing, "write a test in tests/remedies/ with `refused(what it says, what to type)`"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_words_of_a_test_stand_in_one_message_and_something_follows(package):
    assert not messages.unclear(package)


def test_the_reading_of_messages_finds_what_there_is():
    """Hard cases of the source, by hand: a message put together, a choice inside, one in a method, a warning."""
    texts = {message.text for message in messages.messages()}
    assert any("It must be a whole number ≥" in text for text in texts)
    assert any(text.startswith("There are no examples: X has 0 rows.") for text in texts)
    assert any("L-BFGS stopped with" in text and "Raise max_steps" in text for text in texts)
    kinds = {message.kind for message in messages.messages()}
    assert {"InvalidInput", "TheoryWarning", "StoreMismatch", "NotPositiveDefinite"} <= kinds
