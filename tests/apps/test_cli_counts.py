"""Counts of no rows are refused by the name of the option that was typed."""

from __future__ import annotations

import sys

import pytest

from upweight.cli import commands as cli

SOURCE = """
from small import NAMESQ, XQ, logistic
from upweight import Study


def errors():
    return Study(logistic(), (XQ, ["no" if name == "yes" else "yes" for name in NAMESQ]))
"""


@pytest.fixture(autouse=True)
def _studies(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "cli_counts.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("cli_counts", None)


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
def test_no_rows(arguments, message, capsys):
    command, *options = map(str, arguments)
    with pytest.raises(SystemExit) as end:
        cli.main([command, "cli_counts:errors", *options])
    out, err = capsys.readouterr()
    assert end.value.code == 3
    assert not out
    assert message in err
