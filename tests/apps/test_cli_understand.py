"""`upweight understand`: the numbers of the app on stdout, a picture in a file."""

from __future__ import annotations

import json

import upweight as uw
from small import XQ, YQ, classifier, ridge

SOURCE = """
from small import XQ, YQ, ZQ, classifier, ridge
from upweight import Study


def module():
    return Study(classifier(), (XQ, YQ), describe=lambda row: f"case {row}")


def line():
    return Study(ridge(), (XQ, ZQ))
"""


def test_it_says_what_the_app_says(upweight, tmp_path):
    code, out, _ = upweight("understand", "cli_studies:module", "--query", 2, "-k", 3, "--json")
    assert code == 0
    numbers = json.loads(out)
    found = uw.apps.understand(classifier(), (XQ[2:3], YQ[2:3]), k=3)
    assert numbers["query"] == 2
    assert [line["row"] for line in numbers["helpful"]] == found.helpful().rows.tolist()
    assert numbers["rows_with_half_of_the_influence"] == found.half[0]
    code, out, _ = upweight("understand", "cli_studies:module", "--query", 2, "--plot", tmp_path / "new" / "a.png")
    assert code == 0
    assert "Query 2" in out
    assert f"case {found.helpful().rows[0]}" in out
    assert (tmp_path / "new" / "a.png").stat().st_size > 1000


def test_regressions_and_queries_that_do_not_exist(upweight):
    code, out, _ = upweight("understand", "cli_studies:line", "--json")
    assert code == 0
    assert json.loads(out)["predicted"] is None
    assert ridge().n
    code, _, err = upweight("understand", "cli_studies:line", "--query", 99)
    assert code == 3
    assert "99" in err
