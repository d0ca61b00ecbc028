"""A command with a store goes on by `resume`, with the folder's settings and the user's places."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import upweight as uw
from small import NAMESQ, XQ, X, logistic
from upweight.cli.jobs import SETTINGS
from upweight.runs import job
from upweight.runs.store import JOB
from upweight.show.parts import packed_in

SOURCE = """
import upweight as uw
from small import NAMES, NAMESQ, X, XQ, logistic


def good():
    return uw.Study(logistic(), (XQ, NAMESQ), describe=lambda row: f"row {row}")


def carded():
    return uw.Study(logistic(), (XQ, NAMESQ), card=lambda row: f"card {row}", query_card=lambda row: f"query {row}")


def wrong():
    return uw.Study(logistic(), (X, NAMES))


def other():
    return uw.Study(logistic(), (XQ[:1], NAMESQ[:1]))
"""
NETWORK = """

def network():
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(X.shape[1], 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double().eval()
    settings = {"curvature": uw.operators.EKFAC(), "damping": 0.1, "progress": False}
    y = (X[:, 0] > 0).astype(int)
    influence = uw.explain(net, X, y, loss=torch.nn.functional.cross_entropy, **settings)
    return uw.Study(influence, (XQ, (XQ[:, 0] > 0).astype(int)))
"""
SOURCE += NETWORK
STUDY = "cli_studies.py:good"
COMMANDS = {
    "score": ["--top", "3", "--out", "told"],
    "run": ["--parts", "2", "--folds", "3"],
    "index": ["--error", "0.3", "--bits", "8"],
    "validate": ["--query", "1", "--rows", "3"],
    "contrast": ["--most", "4"],
    "repair": ["--inspect", "20%", "--out", "told"],
    "attack": ["--query", "1", "--iterations", "2", "--level", "0.1"],
}


def answered(upweight, *words):
    """What a command that works prints, and the bytes of the file it writes."""
    code, out, err = upweight(*words)
    assert code == 0, err
    return out, Path("told").read_bytes() if Path("told").exists() else b""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_goes_on_with_what_it_was_told(upweight, command):
    study = {"contrast": "cli_studies.py:wrong", "index": "cli_studies.py:network"}.get(command, STUDY)
    first = answered(upweight, command, study, *COMMANDS[command], "--store", "run")
    told = tomllib.loads((Path("run") / JOB).read_text())
    assert (told["command"], told["study"], told["folder"]) == (command, study, "..")
    assert set(told["settings"]) <= set(SETTINGS[command])
    places = ["--out", "told"] if "--out" in COMMANDS[command] else []
    Path("told").unlink(missing_ok=True)
    kept = {path: path.stat().st_mtime_ns for kind in ("chunk", "passed") for path in Path("run").rglob(f"{kind}-*")}
    assert kept
    assert answered(upweight, "resume", "run", "--study", study, *places) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_a_command_can_be_in_a_job(upweight, command):
    """What the parser takes and what a job keeps are the same, but for places and how results are shown."""
    _, text, _ = upweight(command, "--help")
    words = set(re.findall(r"--([a-z]+)\b", text))
    assert words - {"help", "store", "out", "json", "shard", "corrections", "patch", "overwrite"} == set(
        SETTINGS[command]
    )


def test_the_run_folder_of_a_study(upweight):
    code, out, err = upweight("run", "cli_studies.py:carded", "--store", "run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"store": "run", "queries": len(XQ), "rows": len(X)}
    run = uw.Run.open("run")
    assert run.rows.cards[3] == "card 3"
    assert run.queries.cards == [f"query {row}" for row in range(len(XQ))]
    np.testing.assert_allclose(run.rows.self_influence, logistic().of_self().values)
    upweight("run", STUDY, "--store", "plain")
    assert list(uw.Run.open("plain").rows.cards[0].values()) == X[0].tolist()


def test_parts_of_an_index_are_made_one(upweight):
    """The bytes are those of one call; a part is told, and the command that the last part prints makes them one."""
    asked = ("index", "cli_studies.py:network", "--error", "0.3")
    answered(upweight, *asked, "--store", "whole")
    for i in (1, 0):
        code, out, err = upweight(*asked, "--store", "the parts", "--shard", f"{i}/2", "--json")
        assert (code, err) == (0, "")
        told = json.loads(out)
        assert (told["shard"], told["shards"], told["store"]) == (i, 2, "the parts")
    assert not (Path("the parts") / JOB).exists()
    _, said, _ = upweight(*asked, "--store", "the parts", "--shard", "1/2")
    found, _ = answered(upweight, *shlex.split(said.partition("upweight ")[2]))
    one, parts = (
        {file.name: file.read_bytes() for file in Path(name).glob("[cb]*.safetensors")}
        for name in ("whole", "the parts")
    )
    assert one == parts
    assert "chunk-000000.safetensors" in one
    opened = uw.Index.open("the parts")
    assert (opened.n, repr(opened) in found) == (len(X), True)


def test_a_run_folder_holds_parts_and_labels_out_of_fold_if_they_are_asked_for(upweight):
    assert upweight("run", STUDY, "--store", "run", "--parts", "2", "--folds", "3")[0] == 0
    run, own = uw.Run.open("run"), uw.write_run(logistic(), "own", XQ, NAMESQ, parts=2, out_of_fold=3)
    assert packed_in(run).keys() == packed_in(own).keys()
    assert run.rows.out_of_fold.tolist() == own.rows.out_of_fold.tolist()
    assert upweight("run", STUDY, "--store", "run")[0] == 0
    assert packed_in(uw.Run.open("run")) == {}
    assert uw.Run.open("run").rows.out_of_fold is None
    for option, value in (("--parts", "-1"), ("--folds", "1")):
        code, _, err = upweight("run", STUDY, "--store", "new", option, value)
        assert code == 3
        assert value in err


def test_an_interrupted_command_goes_on(upweight, monkeypatch):
    """The job stands there before the first chunk does."""

    def killed(self, *arguments, **settings):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("upweight.runs.store.Store.passing", killed)
        assert upweight("score", STUDY, "--store", "run", "--out", "told")[0] != 0
    assert not list(Path("run").glob("chunk-*"))
    first = answered(upweight, "resume", "run", "--study", STUDY, "--out", "told")
    Path("told").unlink()
    assert answered(upweight, "score", STUDY, "--out", "told") == first


def test_the_folder_may_have_moved(upweight, tmp_path):
    answered(upweight, "score", STUDY, "--store", "run", "--out", "told")
    Path("elsewhere").mkdir()
    Path("run").rename("elsewhere/renamed")
    answered(upweight, "resume", "elsewhere/renamed", "--study", str(tmp_path / STUDY), "--out", "told")


# ---- nothing that stands in a folder is run, read or written ---------------------------------------------------------


@pytest.fixture
def strangers(upweight, tmp_path):
    """A folder of somebody else, whose job is what the test makes of it."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    mine = job.file_digest(tmp_path / "cli_studies.py")

    def made(**told):
        job.write(
            folder,
            job.Job(**{"command": "score", "study": "theirs/evil.py:good", "sha256": mine, "folder": ".", **told}),
        )
        return folder

    return made


def test_the_study_of_a_folder_is_not_run(upweight, strangers):
    """Its name is shown at most; what is run is what the user names, if it is the same file."""
    folder = strangers()
    assert upweight("resume", folder)[0] == 2  # --study is required
    code, _, err = upweight("resume", folder, "--study", "theirs/evil.py:good")
    assert code == 3
    assert "is not the study of" in err
    assert "evil" not in sys.modules


def test_a_place_of_a_folder_is_not_written(upweight, strangers):
    before = Path("cli_studies.py").read_text()
    folder = strangers(places={"out": "cli_studies.py"})
    code, _, err = upweight("resume", folder, "--study", STUDY)
    assert code == 3
    assert "Nothing is written or read where only a folder says so" in err
    assert Path("cli_studies.py").read_text() == before


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({"command": "demo"}, 3),
        ({"command": "resume"}, 3),
        ({"settings": {"out": "cli_studies.py"}}, 3),
        ({"settings": {"store": "/tmp"}}, 3),
        ({"settings": {"top --out": "x"}}, 3),
        ({"settings": {"top": "3 --out cli_studies.py"}}, 2),
        ({"settings": {"top": "--out=cli_studies.py"}}, 2),
        ({"command": "repair", "settings": {"overwrite": True}}, 3),
        ({"command": "repair", "settings": {"by": "--overwrite"}}, 3),
    ],
)
def test_settings_are_settings(upweight, strangers, told, code):
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    try:
        folder = strangers(**told)
    except Exception:
        pytest.fail("a job of such settings must be written to be refused")
    found, _, err = upweight("resume", folder, "--study", STUDY)
    assert found == code, err
    after = {
        path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path.name for path in after.keys() - before.keys()} <= {JOB}


def test_a_folder_of_something_else_is_left_alone(upweight):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    assert upweight("score", STUDY, "--store", "mine", "--out", "told")[0] == 3
    assert os.listdir("mine") == ["letter.txt"]


def test_a_command_that_a_folder_refuses_leaves_its_job(upweight):
    answered(upweight, "score", STUDY, "--store", "run", "--out", "told")
    before = (Path("run") / JOB).read_bytes()
    assert upweight("score", "cli_studies.py:other", "--store", "run", "--out", "more")[0] == 3
    assert (Path("run") / JOB).read_bytes() == before
    answered(upweight, "score", STUDY, "--store", "run", "--out", "more", "--top", "2")
    assert job.read(Path("run")).settings == {"top": 2}


def test_shards_leave_no_job(upweight):
    assert upweight("score", STUDY, "--store", "parts", "--shard", "0/1")[0] == 0
    assert not (Path("parts") / JOB).exists()
