"""Every command: results alone on stdout, JSON that any parser reads, and the documented exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import upweight as uw
from small import XQ, ZQ, ridge
from upweight.cli.endings import ASSUMPTIONS_FAIL

pytestmark = pytest.mark.filterwarnings("ignore:.*has not settled:upweight.errors.TheoryWarning")  # a short LiSSA
SOURCE = """
import numpy as np
from small import X, XQ, Y, YQ, ZQ, classifier, net, ridge
from upweight import Study
from upweight.operators import Hessian
from upweight.solvers import CG, LiSSA


def good():
    return Study(ridge(), (XQ, ZQ), describe=lambda row: f"case {row}")


def plain():
    return Study(ridge(), (XQ, ZQ))


def by_cg():
    return Study(ridge(solver=CG()), (XQ, ZQ))


def stochastic():
    return Study(ridge(solver=LiSSA(depth=300, repeats=3)), (XQ, ZQ))


def untrained():
    return Study(classifier(), (XQ, YQ))


def indefinite():
    return Study(classifier(net(), curvature=Hessian(), penalty=None), (XQ, YQ))


def unmoved():
    influence = ridge()
    return Study(influence, (XQ, ZQ), retrain=lambda weights, seed: influence.objective.theta)


def diverging():
    return Study(ridge(), (XQ, ZQ), retrain=lambda weights, seed: np.full(4, np.nan))


def number():
    return 3
"""


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"bare {name} is not JSON")

    return json.loads(text, parse_constant=refuse)


COMMANDS = {
    "check": (["check", "cli_studies:good"], "verdict              ok"),
    "score": (["score", "cli_studies:good", "--out", "new/scores.safetensors"], "Saved to "),
    "top": (["top", "cli_studies:good", "--query", "1"], "most harmful"),
    "validate": (["validate", "cli_studies:good", "--rows", "5"], "control (nothing removed)"),
}


@pytest.mark.parametrize(("arguments", "text"), COMMANDS.values(), ids=COMMANDS)
def test_text_goes_to_stdout_and_nothing_elsewhere(upweight, arguments, text):
    code, out, err = upweight(*arguments)
    assert code == 0
    assert text in out
    assert not err
    assert not out.startswith("{")


@pytest.mark.parametrize("study", ["good", "by_cg", "stochastic"])
@pytest.mark.parametrize("arguments", [line[0] for line in COMMANDS.values()], ids=COMMANDS)
def test_json_is_one_document_that_any_parser_reads(upweight, arguments, study):
    code, out, _ = upweight(*[a.replace(":good", f":{study}") for a in arguments], "--json")
    assert code in (0, ASSUMPTIONS_FAIL)
    assert isinstance(strict(out), dict)


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "cli_studies:untrained"],
        ["check", "cli_studies:indefinite"],
        ["validate", "cli_studies:unmoved", "--rows", "3"],
    ],
    ids=" ".join,
)
def test_json_of_numbers_that_do_not_exist_is_still_json(upweight, arguments):
    _, out, _ = upweight(*arguments, "--json")
    strict(out)


def test_check_tells_the_numbers_of_the_report(upweight):
    _, out, _ = upweight("check", "cli_studies:good", "--json")
    report = ridge().check((XQ, ZQ))
    found = strict(out)
    assert found["n"] == report.n == 40
    assert found["ok"] is True
    assert found["min_curvature"] == pytest.approx(report.min_curvature)


@pytest.mark.parametrize("study", ["untrained", "indefinite"])
def test_check_ends_with_4_when_the_theory_does_not_hold(upweight, study):
    code, out, err = upweight("check", f"cli_studies:{study}")
    assert code == 4
    assert "verdict              not ok: " in out
    assert not err


def test_score_writes_what_top_reads(upweight):
    code, out, _ = upweight("score", "cli_studies:good", "--out", "s.safetensors", "--store", "run", "--json")
    assert code == 0
    assert (strict(out)["queries"], strict(out)["rows"]) == (4, 40)
    scores = uw.Scores.load("s.safetensors")
    assert np.array_equal(scores.values, ridge().on_loss(XQ, ZQ).values)
    code, out, _ = upweight("top", "s.safetensors", "--query", "2", "-k", "3", "--json")
    assert code == 0
    found = strict(out)
    assert [line["row"] for line in found["helpful"]] == scores.helpful(3).rows[2].tolist()
    assert [line["value"] for line in found["harmful"]] == scores.harmful(3).values[2].tolist()
    assert upweight("score", "cli_studies:good", "--out", "again.safetensors", "--store", "run")[0] == 0
    assert np.array_equal(uw.Scores.load("again.safetensors").values, scores.values)


def test_score_can_keep_the_rows_that_lead_alone(upweight):
    code, out, _ = upweight("score", "cli_studies:good", "--out", "few.st", "--top", "3", "--store", "run", "--json")
    assert code == 0
    assert (strict(out)["queries"], strict(out)["rows"]) == (4, 3)
    scores = ridge().on_loss(XQ, ZQ)
    assert np.array_equal(uw.Leading.load("few.st").helpful(3).values, scores.helpful(3).values)
    code, out, _ = upweight("top", "few.st", "--query", "2", "-k", "5", "--json")
    assert code == 0
    assert [line["row"] for line in strict(out)["harmful"]] == scores.harmful(3).rows[2].tolist()
    assert upweight("top", "few.st", "--query", "4")[0] == 3


def test_top_reads_scores_of_any_name(upweight):
    assert upweight("score", "cli_studies:good", "--out", "s.st")[0] == 0
    code, out, _ = upweight("top", "s.st", "--query", "2", "--json")
    assert code == 0
    assert strict(out)["helpful"][0]["row"] == uw.Scores.load("s.st").helpful(1).rows[2, 0]


def test_top_describes_rows_when_the_study_does(upweight):
    best = int(ridge().on_loss(XQ, ZQ).helpful(1).rows[0, 0])
    _, out, _ = upweight("top", "cli_studies:good", "-k", "1")
    assert f"case {best}" in out
    _, out, _ = upweight("top", "cli_studies:plain", "-k", "1")
    assert "case" not in out


def test_top_shows_all_rows_when_asked_for_more(upweight):
    code, out, _ = upweight("top", "cli_studies:good", "-k", "1000", "--json")
    assert code == 0
    assert len(strict(out)["helpful"]) == 40


def test_validate_takes_the_largest_rows_and_tells_every_pair(upweight):
    _, out, _ = upweight("validate", "cli_studies:good", "--rows", "6", "--query", "3", "--json")
    found = strict(out)
    values = ridge().on_loss(XQ[3:], ZQ[3:]).values[0]
    assert [pair["row"] for pair in found["pairs"]] == np.argsort(-np.abs(values))[:6].tolist()
    assert found["agreement"]["pairs"] == 6
    assert found["agreement"]["pearson"] > 0.9
    assert abs(found["control"]) < 1e-6


REFUSED = {
    "no colon": (["check", "cli_studies"], "InvalidInput: 'cli_studies' does not name"),
    "no module": (["check", "nowhere_at_all:f"], "PathNotFound: There is no module 'nowhere_at_all'"),
    "no function": (["top", "cli_studies:nothing"], "no function 'nothing'"),
    "no study": (["score", "cli_studies:number", "--out", "s"], "returned a int"),
    "no file": (["top", "missing.safetensors"], "PathNotFound: There is no file at missing.safetensors"),
    "no file of another name": (["top", "runs/missing.st"], "PathNotFound: There is no file at runs/missing.st"),
    "no scores": (["top", "a file.txt"], "a file.txt"),
    "a file and no function": (["top", "cli_studies.py"], "does not name a function. .* cli_studies.py:digits"),
    "no query": (["top", "cli_studies:good", "--query", "4"], "RowOutOfRange: Query 4 does not exist"),
    "negative query": (["validate", "cli_studies:good", "--query", "-1"], "Query -1 does not exist"),
    "k": (["top", "cli_studies:good", "-k", "0"], "k=0"),
    "no rows": (["validate", "cli_studies:good", "--rows", "0"], "InvalidInput"),
    "negative rows": (["validate", "cli_studies:good", "--rows", "-3"], "InvalidInput"),
    "one row": (["validate", "cli_studies:good", "--rows", "1"], "rows=1"),
    "diverging": (["validate", "cli_studies:diverging"], "returned NaN"),
    "negative curvature": (["top", "cli_studies:indefinite"], "NotPositiveDefinite: .*damping="),
    "demo rows": (["demo", "--rows", "1"], "rows=1"),
    "store is a file": (["score", "cli_studies:good", "--out", "s", "--store", "cli_studies.py"], "is a file"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_refusal_ends_with_3_and_its_reason_on_stderr(upweight, arguments, text, as_json):
    Path("a file.txt").write_text("no scores")
    code, out, err = upweight(*arguments, *(["--json"] if as_json else []))
    assert code == 3
    assert not out
    assert len(err.splitlines()) < 6
    assert "Traceback" not in err
    assert re.search(text, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["chek"],
        ["top"],
        ["top", "cli_studies:good", "--query", "x"],
        ["check", "a", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(upweight, arguments):
    code, out, err = upweight(*arguments)
    assert code == 2
    assert not out
    assert err


@pytest.mark.parametrize(
    "arguments", [["--help"], *([command, "--help"] for command in (*COMMANDS, "demo"))], ids=" ".join
)
def test_help_ends_with_0(upweight, arguments):
    code, out, _ = upweight(*arguments)
    assert code == 0
    assert "usage: upweight" in out


def test_help_of_an_unknown_command_is_an_error(upweight):
    code, out, err = upweight("explian", "--help")
    assert code == 2
    assert not out
    assert "Unrecognized options: explian" in err or "Parsing error" in err  # tyro 0.9 has no room for more


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_names_no_module_of_ours(upweight, arguments):
    _, out, _ = upweight(*arguments)
    assert not re.search(r"app_commands|console|cli_|upweight\.(?!Study)\w", out)


@pytest.fixture(scope="module")
def story():
    from upweight.cli import demo

    return demo.run(rows=4)


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_demo_says_where_its_report_is(upweight, story, monkeypatch, tmp_path, as_json):
    from upweight.cli import demo

    asked = []
    monkeypatch.setattr(demo, "run", lambda rows: asked.append(rows) or story)
    code, out, err = upweight("demo", "--rows", "4", "--out", tmp_path / "report", *(["--json"] if as_json else []))
    assert (code, err, asked) == (0, "", [4])
    page = tmp_path / "report" / "index.html"
    assert page.stat().st_size > 1000
    assert str(page) in (strict(out)["report"] if as_json else out)


def test_the_command_as_a_process_prints_results_only(tmp_path):
    (tmp_path / "sklearn_study.py").write_text(
        """
import numpy as np
import upweight as uw
from sklearn.linear_model import Ridge


def made():
    X = np.eye(4)
    return uw.Study(uw.explain(Ridge().fit(X, X[0]), X, X[0]), (X, X[0]))
"""
    )
    command = [sys.executable, "-c", "from upweight.cli import main; main()", "top", "sklearn_study:made", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert len(strict(done.stdout)["helpful"]) == 4
    assert not done.stderr
