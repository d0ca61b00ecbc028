"""What is said to type by upweight/cli, typed on the command line."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import upweight as uw
from refusals import refused
from small import NAMES, NAMESQ, XQ, N, X, logistic
from upweight.cli import commands, studies, table
from upweight.cli.app_commands import _share

SOURCE = """
import csv
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

import upweight as uw
from small import NAMES, NAMESQ, X, XQ, Y, fitted, logistic, pairs


def good():
    return uw.Study(logistic(), (XQ, NAMESQ))


def right():
    return uw.Study(logistic(), (XQ, fitted().predict(XQ)))


def wrong():
    return uw.Study(logistic(), (X, NAMES))


def unlabelled():
    return uw.Study(logistic(), (X, None))


def dataset():
    return uw.Study(logistic(), (pairs(X, Y),))


def fitted_to(X, labels):
    return uw.explain(LogisticRegression(tol=1e-10, max_iter=5000).fit(X, labels), X, labels)


def sixty():
    return uw.Study(fitted_to(np.r_[X, X[:20]], np.r_[NAMES, NAMES[:20]]), (XQ, NAMESQ))


def mended():
    with Path("new/labels.csv").open(newline="") as stream:
        labels = np.array([line["label"] for line in csv.DictReader(stream)])
    return uw.Study(fitted_to(X, labels), (XQ, NAMESQ))


def number():
    return 3


def needy(rows, *, seed):
    return good()
"""
READ_ONLY = "/proc/nowhere"  # also for root
WRONG = np.flatnonzero(uw.predict(logistic(), X).labels != NAMES)
OTHER = {"no": "yes", "yes": "no"}


def typed(*words):
    """A command whose errors are not caught."""
    return commands.run([str(word) for word in words])


@pytest.fixture(autouse=True)
def _nothing_stays_importable(tmp_path):
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def told(upweight):
    """What a command that works says on stdout as JSON."""

    def run(*words):
        code, out, err = upweight(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def words_of(refusal, start):
    """What stands behind `start` in a message, as a shell takes it."""
    return shlex.split(str(refusal.value).partition(start)[2].rstrip("."))


# ---- app_commands.py -------------------------------------------------------------------------------------------------


def test_where_there_is_no_error_a_query_is_named(told):
    with refused("so there is no error to explain", "Name a query with --query, or give the study others"):
        typed("mismatch", "cli_studies:right")
    one = told("mismatch", "cli_studies:right", "--query", 1)
    assert one["harmful"]["rows"][0] == logistic().on_loss(XQ, NAMESQ).harmful(1).rows[1, 0]
    assert told("mismatch", "cli_studies:wrong")["queries"] == len(WRONG)


@pytest.mark.parametrize("study", ["unlabelled", "dataset"])
def test_contrast_needs_queries_with_labels(told, study):
    with refused("The study's queries are (", "Give the study the pair (Xq, yq) of arrays"):
        typed("contrast", f"cli_studies:{study}", "--query", WRONG[0])
    for found in told("contrast", "cli_studies:wrong", "--query", WRONG[0]).values():
        assert found["answers"][0]["after"] == NAMES[WRONG[0]] != found["answers"][0]["label"]


def test_sources_stand_in_a_file_line_by_line(told):
    words = ("mismatch", "cli_studies:good", "--query", 0, "--groups", "sources.txt")
    with refused("There is no file at ", "Write one line per training row into it"):
        typed(*words)
    Path("sources.txt").write_text("\n".join(np.where(np.arange(N) < 15, "web", "book")))
    sizes = {group["name"]: group["size"] for group in told(*words)["groups"]["groups"]}
    assert sizes == {"web": 15, "book": 25}


@pytest.fixture
def review(told):
    """A review of five rows with one correction: its file, the row and its new label."""
    told("repair", "cli_studies:good", "--inspect", 5, "--by", "loss", "--out", "review.csv")
    with Path("review.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    lines[0]["correction"] = OTHER[lines[0]["label"]]
    with Path("review.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    return int(lines[0]["row"]), lines[0]["correction"]


def labels_in(file):
    with Path(file).open(newline="") as stream:
        return np.array([line["label"] for line in csv.DictReader(stream)])


def test_a_review_or_a_patch_and_a_patch_is_taken_back(told, review):
    row, label = review
    with refused("Both --corrections and --patch were given", "Make one of them at a time"):
        typed("repair", "cli_studies:good", "--corrections", "review.csv", "--patch", "new/patch.csv")
    made = told("repair", "cli_studies:good", "--corrections", "review.csv", "--out", "new")
    assert made["patch"] == [{"row": row, "old": OTHER[label], "new": label}]
    assert told("repair", "cli_studies:good", "--patch", "new/patch.csv")["patch"] == made["patch"]

    with refused("--revert takes a patch back, and none was given", "Name it: --patch FOLDER/patch.csv --revert"):
        typed("repair", "cli_studies:mended", "--revert")
    told("repair", "cli_studies:mended", "--patch", "new/patch.csv", "--revert", "--out", "old")
    assert np.flatnonzero(labels_in("new/labels.csv") != NAMES).tolist() == [row]
    assert np.array_equal(labels_in("old/labels.csv"), NAMES)


def test_a_label_is_a_column_of_a_table(told, frame):
    with refused(" is a study, which has its labels", "Leave it out, or name a file that ends in "):
        typed("repair", "cli_studies:good", "--label", "bought")
    assert told("repair", "cli_studies:good", "--inspect", 5, "--by", "loss")["inspected"] == 5
    frame.to_csv("a.csv", index=False)
    assert told("repair", "a.csv", "--label", "bought", "--inspect", 5, "--by", "loss")["table"]["label"] == "bought"


def inspected(told, share):
    return len(told("repair", "cli_studies:sixty", "--inspect", share, "--by", "loss")["rows"])


def test_what_is_inspected_is_a_number(told):
    for inspect in ("some", "10 rows", "1/10", "", "%"):
        with refused(" is no number", "Write a share such as 10% or 0.1, or a number of rows such as 50"):
            typed("repair", "cli_studies:sixty", "--inspect", inspect)
        assert _share("10%") == _share("0.1") == 0.1
    assert [inspected(told, share) for share in ("10%", "0.1", "50")] == [6, 6, 50]


def test_what_is_inspected_is_a_share(told):
    for inspect in ("110%", "1.5", "0%", "-0.1", "nan"):
        with refused(" is no share of the rows", "Write 10% or 0.1, up to 100% for all rows, or a whole number of"):
            typed("repair", "cli_studies:sixty", f"--inspect={inspect}")
        assert (_share("10%"), _share("100%"), _share("50")) == (0.1, 1.0, 50)
    assert [inspected(told, share) for share in ("0.1", "100%", "50")] == [6, 60, 50]


# ---- folders.py and jobs.py ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(told):
    """A folder that `upweight score` has kept, and its answer."""
    told("score", "cli_studies.py:good", "--store", "kept", "--out", "scores")
    return Path("scores").read_bytes()


def test_places_of_a_job_are_named_again(told, kept):
    with refused("Nothing is written or read where only a folder says so", "add it, or another place") as refusal:
        typed("resume", "kept", "--study", "cli_studies.py:good")
    option, place = words_of(refusal, "was told ")[:2]
    Path(place.rstrip(".")).unlink()
    for out in (place.rstrip("."), "another"):
        told("resume", "kept", "--study", "cli_studies.py:good", option, out)
        assert Path(out).read_bytes() == kept


def test_a_job_goes_on_with_the_study_that_it_was(told, kept):
    source = Path("cli_studies.py").read_text()
    Path("cli_studies.py").write_text(source + "\n# a word more")
    with refused(" is not the study of ", "Where the change is meant, type the command itself, with --store "):
        typed("resume", "kept", "--study", "cli_studies.py:good", "--out", "again")
    told("score", "cli_studies.py:good", "--store", "kept", "--out", "again")
    assert Path("again").read_bytes() == kept
    with refused(" is not the study of ", "Name that study, or undo what was changed in it"):
        typed("resume", "kept", "--study", "small:good", "--out", "again")
    told("score", "cli_studies.py:good", "--store", "kept", "--out", "again")
    told("resume", "kept", "--study", "cli_studies.py:good", "--out", "once more")
    assert Path("once more").read_bytes() == kept


def test_a_job_goes_on_with_the_function_that_it_was(told, kept):
    with refused(" names another function than ", "Name the same one; for another study"):
        typed("resume", "kept", "--study", "cli_studies.py:other", "--out", "again")
    told("resume", "kept", "--study", "cli_studies.py:good", "--out", "again")
    assert Path("again").read_bytes() == kept


def test_a_job_is_a_command_that_keeps_a_folder(told, kept):
    file = Path("kept", "job.toml")
    file.write_text(file.read_text().replace('"score"', '"demo"'))
    with refused(" which no command of this version is that keeps a folder", "Type the command itself"):
        typed("resume", "kept", "--study", "cli_studies.py:good", "--out", "again")
    told("score", "cli_studies.py:good", "--store", "kept", "--out", "again")
    assert Path("again").read_bytes() == kept


# ---- commands.py, console.py and demo.py -----------------------------------------------------------------------------


def test_top_reads_what_score_wrote_or_asks_a_study(told):
    with refused("and it is not of the form file.py:function", "Write the path that `upweight score` was given"):
        typed("top", "scores")
    told("score", "cli_studies:good", "--out", "scores")
    assert told("top", "scores") == told("top", "cli_studies:good")


def test_queries_have_numbers(told):
    with refused(" does not exist: there are ", "numbered 0 to ") as refusal:
        typed("top", "cli_studies:good", "--query", 4)
    first, last = re.findall(r"\d+", str(refusal.value).partition("numbered ")[2])
    for query in (int(first), int(last)):
        best = told("top", "cli_studies:good", "--query", query, "-k", 1)["helpful"][0]["row"]
        assert best == logistic().on_loss(XQ, NAMESQ).helpful(1).rows[query, 0]


def test_the_demo_opens_other_data_in_the_explorer(monkeypatch):
    with refused(", and the report of the demo is of the digits alone", "Add --explore: it makes a run of "):
        typed("demo", "--data", "mnist", "--out", "report")
    seen = []
    monkeypatch.setattr("upweight.cli.commands.opened", lambda folder: seen.append(str(folder)) or 0)
    monkeypatch.setattr("upweight.cli.demo.write_run", lambda study, folder, rows: folder)
    monkeypatch.setitem(studies.STUDIES, "mnist", lambda: None)
    assert typed("demo", "--data", "mnist", "--out", "report", "--explore") == 0
    assert seen == ["report/mnist"]


def test_the_demo_retrains_without_some_of_its_rows(told):
    with refused("The demo retrains without that many of ", "ask for 2 to ") as refusal:
        typed("demo", "--rows", 1401, "--out", "report")
    fewest = re.search(r"ask for (\d+)", str(refusal.value)).group(1)
    assert told("demo", "--rows", fewest, "--out", "report")["retrained_rows"] == 2
    assert Path("report/index.html").stat().st_size > 1000


# ---- outputs.py ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "option"), [("score", "--out"), ("understand", "--plot"), ("repair", "--out")])
def test_a_file_is_wanted(told, command, option):
    Path("folder").mkdir()
    more = ("--by", "loss", "--inspect", 5) if command == "repair" else ()
    with refused(" is a folder, and a file is wanted", "Name one, such as ") as refusal:
        typed(command, "cli_studies:good", option, "folder", *more)
    (name,) = words_of(refusal, "such as ")
    told(command, "cli_studies:good", option, name, *more)
    assert Path(name).stat().st_size > 100


def test_a_file_that_is_there_is_not_replaced_unasked(told):
    told("run", "cli_studies.py:good", "--store", "kept run")
    told("export", "kept run", "--out", "said.csv")
    Path("said.csv").write_text("mine")
    with refused(" is there already, and somebody may have worked in it", "Name another place, or add "):
        typed("export", "kept run", "--out", "said.csv")
    assert Path("said.csv").read_text() == "mine"
    told("export", "kept run", "--out", "other.csv")
    told("export", "kept run", "--out", "said.csv", "--overwrite")
    assert Path("said.csv").read_bytes() == Path("other.csv").read_bytes()


def test_a_folder_is_wanted(told):
    Path("taken").touch()
    with refused(" needs the folder ", "Name another place"):
        typed("score", "cli_studies:good", "--out", "taken/scores")
    told("score", "cli_studies:good", "--out", "free/scores")
    assert uw.Scores.load("free/scores").values.shape == (4, N)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write into")
def test_a_place_that_may_be_written_to(told):
    with refused(" needs to write into ", "Name another place"):
        typed("score", "cli_studies:good", "--out", f"{READ_ONLY}/scores")
    told("score", "cli_studies:good", "--out", "free/scores")
    assert uw.Scores.load("free/scores").values.shape == (4, N)


@pytest.mark.parametrize("plot", ["new.d/answer.jpgg", "answer"])
def test_a_picture_has_a_format(told, plot):
    with refused(" does not end in a format of pictures", "Name ") as refusal:
        typed("understand", "cli_studies:good", "--plot", plot)
    name = str(refusal.value).rpartition("Name ")[2].removesuffix(", for example.")
    told("understand", "cli_studies:good", "--plot", name)
    assert Path(name).read_bytes().startswith(b"\x89PNG")


# ---- study.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my_study", "my_study.py", ":digits", "my_study.py:"])
def test_a_study_is_a_function(told, name):
    Path("my_study.py").write_text(SOURCE.replace("def good()", "def digits()"))
    with refused(" does not name a function", "Write file.py:function or module:function") as refusal:
        typed("validate", name)
    assert re.search(r"my_study(\.py)?:digits", str(refusal.value))
    assert told("top", "my_study:digits") == told("top", "my_study.py:digits")


def test_a_study_is_returned(told):
    Path("returned.py").write_text(SOURCE)
    with refused("() returned a ", "Return upweight.Study(influence, (Xq, yq))"):
        typed("top", "returned.py:number")
    body = "influence, Xq, yq = logistic(), XQ, NAMESQ\n    import upweight\n    return "
    Path("returned.py").write_text(SOURCE.replace("return 3", f"{body}upweight.Study(influence, (Xq, yq))"))
    assert told("top", "returned.py:number") == told("top", "cli_studies:good")


@pytest.mark.parametrize("module", ["of_a_folder", "in_a_package.inner"])
def test_a_module_is_in_this_folder_or_its_file_is_named(told, monkeypatch, module):
    Path("elsewhere").mkdir()
    file = Path("elsewhere", *module.split(".")).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(SOURCE)
    with refused("There is no module '", "Run from the folder that holds ") as refusal:
        typed("top", f"{module}:good")
    named = told("top", f"{file}:good")
    monkeypatch.chdir("elsewhere")
    assert Path(str(refusal.value).partition("holds ")[2].partition(",")[0]).is_file()
    assert told("top", f"{module}:good") == named


@pytest.mark.parametrize("name", ["./cli_studies", "nowhere.py"])
def test_a_file_of_python_has_its_suffix(told, name):
    with refused("There is no Python file at ", "Write the path of the file that holds the function, with its .py"):
        typed("top", f"{name}:good")
    assert told("top", "./cli_studies.py:good") == told("top", "cli_studies:good")


def test_a_function_that_is_not_there_and_the_others_are(told):
    Path("others.py").write_text("from cli_studies import good as found\n\n\ndef needy(x):\n    return x\n\n\n")
    with Path("others.py").open("a") as stream:
        stream.write("def good():\n    return found()\n")
    with refused(" has no function '", "It has ") as refusal:
        typed("top", "others.py:godo")
    proposed = re.search(r"write (\S+), for example", str(refusal.value)).group(1)
    assert told("top", proposed) == told("top", "cli_studies:good")


def test_a_function_of_a_module_that_hides_the_file(told):
    Path("random.py").write_text(SOURCE)
    with refused(" has no function '", "Another module of this name comes before the file in this folder") as refusal:
        typed("top", "random:good")
    (proposed,) = words_of(refusal, "write ")
    assert told("top", proposed) == told("top", "cli_studies:good")


def test_a_function_that_is_not_written_yet(told):
    Path("empty_study.py").write_text("import upweight\n")
    with refused(" has no function '", "Write one into it: ") as refusal:
        typed("top", "empty_study.py:mine")
    assert "mine() returns an upweight.Study" in str(refusal.value)
    Path("empty_study.py").write_text(SOURCE.replace("def good()", "def mine()"))
    assert told("top", "empty_study.py:mine") == told("top", "cli_studies:good")


def test_a_study_is_called_without_arguments(told):
    Path("needs.py").write_text(SOURCE)
    with refused("and the command line calls it without arguments", "Give every argument of "):
        typed("top", "needs.py:needy")
    Path("needs.py").write_text(SOURCE.replace("def needy(rows, *, seed)", "def needy(rows=3, *, seed=0)"))
    assert told("top", "needs.py:needy") == told("top", "needs.py:good")


# ---- table.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def frame(monkeypatch):
    """60 rows: a measurement, some rare kinds, a city, the labels, and a measurement behind them."""
    pd = pytest.importorskip("pandas")
    monkeypatch.setattr("upweight.cli.labelled._STRENGTHS", (1.0,))  # a fit for each of two folds is enough here
    monkeypatch.setattr("upweight.cli.labelled._FOLDS", 2)
    draw = np.random.default_rng(0)
    age = draw.normal(40, 10, 60).round(1)
    return pd.DataFrame(
        {
            "kind": [f"kind {row // 4}" for row in range(60)],
            "age": age,
            "city": draw.choice(["Bonn", "Zürich", "Oslo"], 60),
            "bought": np.where(age + draw.normal(0, 5, 60) > 40, "yes", "no"),
            "price": np.arange(60) * 1.5,
        }
    )


FAST = ("--inspect", 5, "--by", "loss")


def test_a_table_is_a_file(told, frame):
    with refused("There is no file ", "Name a table ("):
        typed("repair", "tabel.csv", "--label", "bought")
    frame.to_csv("table.csv", index=False)
    assert told("repair", "table.csv", "--label", "bought", *FAST)["table"]["rows"] == 60
    assert told("repair", "cli_studies.py:good", *FAST)["inspected"] == 5


@pytest.mark.parametrize("label", [None, "bougth", "nothing like it"])
def test_a_label_is_named(told, frame, label):
    Path("my data").mkdir()
    frame.to_csv("my data/a.csv", index=False)
    with refused(" is a table, and ", "Name the one to repair: ") as refusal:
        typed("repair", "my data/a.csv", *(() if label is None else ("--label", label)))
    program, *words = words_of(refusal, "Name the one to repair: ")
    assert program == "upweight"
    assert told(*words, *FAST)["table"]["label"] == "bought"


def test_a_label_with_an_apostrophe(told, frame):
    frame.rename(columns={"bought": "who's it"}).to_csv("a.csv", index=False)
    with refused(" is a table, and ", "Name the one to repair: ") as refusal:
        typed("repair", "a.csv")
    _, *words = words_of(refusal, "Name the one to repair: ")
    assert told(*words, *FAST)["table"]["label"] == "who's it"


def test_labels_were_chosen_by_something(told, frame):
    frame[["bought"]].assign(unit="kg").to_csv("a.csv", index=False)
    with refused(" says anything (", "Add the columns that the labels were chosen by"):
        typed("repair", "a.csv", "--label", "bought")
    frame[["bought", "age"]].assign(unit="kg").to_csv("a.csv", index=False)
    assert told("repair", "a.csv", "--label", "bought", *FAST)["table"]["rows"] == 60


@pytest.mark.skipif(None in (shutil.which("iconv"), shutil.which("gunzip")), reason="iconv or gunzip is not installed")
@pytest.mark.parametrize(
    ("name", "encoding"), [("a.csv", "latin1"), ("my a.csv.gz", "latin1"), ("a.tsv", "utf-16"), ("a.csv.gz", "utf-16")]
)
@pytest.mark.usefixtures("upweight")
def test_another_encoding(frame, name, encoding):
    frame.to_csv(name, index=False, encoding=encoding, sep="\t" if "tsv" in name else ",")
    with refused(" is not encoded in UTF-8 (", "Save it so, for example with: ") as refusal:
        typed("repair", name, "--label", "bought")
    line = str(refusal.value).partition("for example with: ")[2]
    subprocess.run(line, shell=True, check=True)
    saved = Path(f"utf8-{name.removesuffix('.gz')}")
    assert np.array_equal(table.read(saved, "city").labels, frame["city"])


def test_every_line_has_a_cell_for_every_column(told, frame):
    lines = frame[["age", "city", "bought"]].to_csv(index=False, header=False)
    for text in ("", f"age,bought\n{lines}"):
        Path("a.csv").write_text(text)
        with refused(" cannot be read as a table: ", "Write the names of the columns into the first line, and as many"):
            typed("repair", "a.csv", "--label", "bought")
        Path("a.csv").write_text(f"age,city,bought\n{lines}")
    assert told("repair", "a.csv", "--label", "bought", *FAST)["table"]["rows"] == 60


def test_a_table_has_rows(told, frame):
    Path("a.csv").write_text("age,city,bought\n")
    with refused(" has a line of names and no rows", "Add rows"):
        typed("repair", "a.csv", "--label", "bought")
    frame[["age", "city", "bought"]].to_csv("a.csv", mode="a", index=False, header=False)
    assert told("repair", "a.csv", "--label", "bought", *FAST)["table"]["rows"] == 60


@pytest.mark.parametrize("names", ["age,age ,bought,bought", "age,age ,bought,bought "])
def test_two_columns_of_the_labels_name(told, frame, names):
    lines = frame[["age", "price", "bought", "bought"]].to_csv(index=False, header=False)
    Path("a.csv").write_text(f"{names}\n{lines}")
    with refused(" columns called '", "Rename or remove all but the one whose labels are to be repaired"):
        typed("repair", "a.csv", "--label", "bought")
    Path("a.csv").write_text(f"age,age ,bought,again\n{lines}")
    renamed = told("repair", "a.csv", "--label", "bought", *FAST)["table"]
    assert [column["name"] for column in renamed["columns"]] == ["age", "age.1", "again"]
    frame[["age", "bought"]].to_csv("a.csv", index=False)
    assert [one["name"] for one in told("repair", "a.csv", "--label", "bought", *FAST)["table"]["columns"]] == ["age"]


@pytest.mark.parametrize("label", ["unit", "blank", "kind"])
def test_labels_are_of_two_classes(told, frame, label):
    frame.assign(unit="kg", blank=np.nan).to_csv("a.csv", index=False)
    with refused(", and repair compares two classes at least", "Name a column of classes with --label, or add rows"):
        typed("repair", "a.csv", "--label", label)
    assert told("repair", "a.csv", "--label", "bought", *FAST)["table"]["rows"] == 60


def test_or_there_are_more_rows(told, frame):
    frame = frame.assign(bought=np.where(np.arange(60) % 8, "no", "yes"))
    frame.to_csv("a.csv", index=False)
    with refused(", and repair compares two classes at least", "Name a column of classes with --label, or add rows"):
        typed("repair", "a.csv", "--label", "bought")
    frame.to_csv("a.csv", mode="a", index=False, header=False)
    assert told("repair", "a.csv", "--label", "bought", *FAST)["table"]["rows"] == 120


def test_a_measurement_is_cut_into_classes(told, frame):
    import pandas as pd

    frame.to_csv("a.csv", index=False)
    with refused(
        " and no classes", "Cut numbers into classes first (pandas.cut), or name a column of classes"
    ) as refusal:
        typed("repair", "a.csv", "--label", "price")
    frame.assign(price=pd.cut(frame["price"], 2)).to_csv("cut.csv", index=False)
    assert told("repair", "cut.csv", "--label", "price", *FAST)["table"]["rows"] == 60
    _, *words = words_of(refusal, "such as city: ")
    assert words == ["repair", "a.csv", "--label", "city"]
    assert told(*words, *FAST)["table"]["rows"] == 60


# ---- outputs.py: parts -----------------------------------------------------------------------------------------------


def test_a_part_is_a_number_of_so_many_and_goes_into_a_store(told):
    score = "score", "cli_studies:good"
    with refused("Nothing says where the scores shall go", "Add --out scores.safetensors"):
        typed(*score)
    told(*score, "--out", "scores.safetensors")
    with refused(" is no part", "Write i/n with 0 ≤ i < n: --shard 0/4"):
        typed(*score, "--store", "D", "--shard", "2/2")
    with refused(" computes a part of the scores, which goes into a store", "Write --store FOLDER --shard "):
        typed(*score, "--store", "D", "--out", "file", "--shard", "0/2")
    parts = [told(*score, "--store", "D", "--shard", f"{i}/2") for i in range(2)]
    assert [part["rows"] for part in parts] == [0, N]  # one chunk
    assert told("merge", "D", "--out", "merged.safetensors")["rows"] == N
    one, merged = (uw.Scores.load(f"{name}.safetensors").values for name in ("scores", "merged"))
    assert one.tobytes() == merged.tobytes()


# ---- review_commands.py ----------------------------------------------------------------------------------------------


def test_something_is_reviewed_before_it_is_proved(told, tmp_path):
    run = uw.write_run(logistic(), tmp_path / "run", XQ, NAMESQ)
    with refused(" changes a label, so there is nothing to prove. ", "Review some rows first: upweight explore "):
        typed("prove", "cli_studies:good", "--run", run.path)
    (tmp_path / "said.csv").write_text(f"row,new\n3,{OTHER[NAMES[3]]}\n")
    assert told("reviews", run.path, "--add", "said.csv")["relabel"] == 1
    assert told("prove", "cli_studies:good", "--run", run.path)["relabelled"] == 1
