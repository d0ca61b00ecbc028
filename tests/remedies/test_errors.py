"""What is said to type by upweight/errors.py, typed."""

from __future__ import annotations

import pytest

from refusals import refused
from upweight.errors import checked_count, require


@pytest.mark.parametrize("value", [0, True, 2.0, "2"])
def test_a_number_of_things(value):
    with refused("=", "It must be a whole number ≥"):
        checked_count(value, "k", hint="such as 3")
    assert checked_count(3, "k") == 3


def test_an_extra_that_is_not_installed():
    with refused("is not installed, and this needs it", "Install it with: pip install 'upweight["):
        require("a_module_that_nobody_wrote", "plots")
    assert require("numpy", "plots").ndarray
