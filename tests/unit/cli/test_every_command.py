"""Every command runs on examples/study.py, as a reader of the help would type it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from upweight.cli.commands import NAMES

SOURCE = ""
NETWORK = """
import torch
import upweight as uw


def digits():
    torch.manual_seed(0)
    X, y = torch.randn(40, 3), torch.arange(40) % 2
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval()
    settings = {"loss": torch.nn.functional.cross_entropy, "curvature": uw.operators.EKFAC(), "damping": 0.1}
    return uw.Study(uw.explain(net, X, y, **settings), (X[:2], y[:2]))
"""
EXAMPLE = Path(__file__).parents[3] / "examples" / "study.py"
STUDY = "study.py:breast_cancer"
LINES = {
    "demo": ["--rows", "2", "--out", "report"],
    "check": [STUDY],
    "plan": [STUDY],
    "doctor": [],
    "score": [STUDY, "--out", "new/scores.safetensors", "--store", "run"],
    "merge": ["parts", "--out", "new/merged.safetensors"],
    "index": ["network.py:digits", "--store", "index"],
    "run": [STUDY, "--store", "run"],
    "resume": ["run", "--study", STUDY],
    "top": [STUDY, "--query", "3"],
    "validate": [STUDY, "--rows", "3"],
    "understand": [STUDY, "--plot", "new/answer.png"],
    "mismatch": [STUDY, "--plot", "new/rows.svg"],
    "contrast": [STUDY],
    "repair": [STUDY, "--inspect", "5%", "--out", "review.csv"],
    "attack": [STUDY, "--rows", "2", "--iterations", "2"],
    "reviews": ["run", "--add", "said.csv"],
    "report": ["run", "--out", "new/page.html"],
    "export": ["run", "--as", "cleanlab", "--out", "new/issues.csv"],
    "apply": ["run", "--to", "data.csv", "--label", "kind", "--out", "new/data.csv"],
    "prove": [STUDY, "--run", "run"],
}
REVIEWING = ("reviews", "report", "export", "apply", "prove")


@pytest.fixture
def example(upweight, tmp_path):
    """The command line in a folder that holds the example study."""
    shutil.copy(EXAMPLE, tmp_path)
    yield upweight
    sys.modules.pop("study", None)


def reviewed(example):
    """A run of the example in which one label was found wrong, and the table of its labels."""
    import upweight as uw
    from upweight.cli.study import load

    study = load(STUDY)
    run = uw.write_run(study.influence, "run", *study.queries)
    other = next(name for name in set(run.rows.labels.tolist()) if name != run.rows.labels[3])
    Path("data.csv").write_text("\n".join(["kind", *run.rows.labels.tolist()]) + "\n")
    Path("said.csv").write_text(f"row,new\n3,{other}\n")
    assert example("reviews", "run", "--add", "said.csv")[0] == 0


@pytest.mark.parametrize("command", [name for name in NAMES if name != "explore"])  # it serves until it is ended
def test_a_command_runs_on_the_example(example, command):
    if command == "merge":
        assert example("score", STUDY, "--store", "parts", "--shard", "0/1")[0] == 0
    if command == "index":
        Path("network.py").write_text(NETWORK)
    if command == "resume":
        assert example("run", *LINES["run"])[0] == 0
    if command in REVIEWING:
        reviewed(example)
    code, out, err = example(command, *LINES[command])
    assert (code, err) == (0, "")
    assert out
    for option in {"--out", "--plot"} & set(LINES[command]):
        assert Path(LINES[command][LINES[command].index(option) + 1]).exists()


def test_attack_flips_a_label_of_the_example(example):
    code, out, _ = example("attack", STUDY, "--flip", "1")
    assert code == 0
    assert "malignant" in out
