"""Counts of no rows are refused by the name of the option that was typed."""

from __future__ import annotations

import pytest

SOURCE = """
from small import NAMESQ, XQ, logistic
from upweight import Study


def errors():
    return Study(logistic(), (XQ, ["no" if name == "yes" else "yes" for name in NAMESQ]))
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attack", "--rows", 0), "--rows=0. It must be a whole number ≥ 1; 1 changes the most vulnerable row"),
        (("attack", "--rows", -2), "--rows=-2"),
        (("understand", "-k", 0), "k=0. It must be a whole number ≥ 1; 5 rows of each kind"),
        (("mismatch", "-k", 0), "k=0. It must be a whole number ≥ 1; 10 rows on either side"),
        (("contrast", "--most", 0), "most=0. It must be a whole number ≥ 1; 1 is a single row"),
        (("contrast", "--refits", 0), "refits=0. It must be a whole number ≥ 1; 1 confirms the predicted set"),
    ],
)
def test_no_rows(upweight, arguments, message):
    command, *options = arguments
    code, out, err = upweight(command, "cli_studies:errors", *options)
    assert code == 3
    assert not out
    assert message in err
