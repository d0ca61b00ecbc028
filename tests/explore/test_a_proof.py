"""Refitted with the corrections: what the run's queries are answered then, and what may be chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made import N, labels_of, made, study, truth
from scipy.stats import t
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.errors import Damaged
from upweight.explore import proof
from upweight.explore.reviews import Reviews

SOURCE = """
import sys
sys.path.insert(0, {folder!r})
from made import study
import upweight as uw

def other():
    one = study()
    return uw.Study(one.influence, (one.queries[0][:5], one.queries[1][:5]))
"""
SOURCE = SOURCE.format(folder=str(__import__("pathlib").Path(__file__).parent))


@pytest.fixture
def run(tmp_path):
    return made(tmp_path / "run")


def reviewed(run):
    known = labels_of(run)
    log = Reviews(run.path, known)
    for row in range(10):
        log.decide(row, "relabel", new=str(truth()[row]))
    for row in (10, 11):
        log.decide(row, "drop")
    return log


def test_the_proof_is_what_scikit_learn_finds(upweight, run):
    reviewed(run)
    code, out, err = upweight("prove", "cli_studies.py:study", "--run", run.path, "--store", "kept", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    one = study()
    X, y = np.asarray(uw.training_inputs(one.influence)), np.array(truth())
    kept = np.setdiff1d(np.arange(N), [10, 11])
    own = LogisticRegression(tol=1e-10).fit(X[kept], y[kept])
    Xq, yq = one.queries
    spoilt = LogisticRegression(tol=1e-10).fit(X, uw.training_labels(one.influence))
    before, after = spoilt.predict(Xq), own.predict(Xq)
    assert told["right"] == {
        "before": (before == yq).sum(),
        "control": (before == yq).sum(),
        "after": (after == yq).sum(),
    }
    assert told["gained"] == ((before != yq) & (after == yq)).sum()
    assert [flip["query"] for flip in told["flips"]] == np.flatnonzero(before != after).tolist()
    loss = -own.predict_log_proba(Xq)[np.arange(len(yq)), np.searchsorted(own.classes_, yq)]
    assert told["losses"]["after"] == pytest.approx(loss.mean(), rel=1e-4)
    assert (told["relabelled"], told["dropped"], told["entry"]) == (10, 2, 12)
    (read,), refused = proof.read(run.path, told["work"])
    assert refused == []
    assert json.loads(json.dumps(read.to_dict())) == {name: value for name, value in told.items() if name != "file"}
    again = upweight("prove", "cli_studies.py:study", "--run", run.path, "--store", "kept")
    assert again[0] == 0
    assert "McNemar's exact p" in again[1]
    with pytest.raises(Damaged, match="belongs to another run"):
        proof.opened(next(run.path.glob("proof-*.json")), "0" * 16)


def test_another_study_proves_nothing(upweight, run):
    reviewed(run)
    code, _, err = upweight("prove", "cli_studies.py:other", "--run", run.path)
    assert code == 3
    assert "holds the results of other work" in err
    assert not list(run.path.glob("proof-*"))


def test_without_a_correction_there_is_nothing_to_prove(upweight, run):
    assert upweight("prove", "cli_studies.py:study", "--run", run.path)[0] == 3
    Reviews(run.path, labels_of(run)).decide(0, "keep")
    code, _, err = upweight("prove", "cli_studies.py:study", "--run", run.path)
    assert code == 3
    assert "there is nothing to prove. Review some rows first: upweight explore" in err


def answers(labels, losses=None):
    return proof.Answers(np.array(labels), np.zeros(len(labels)) if losses is None else np.array(losses))


def test_counts_by_hand():
    right = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    control, after = [1, 1, 1, 0, 1, 1, 0, 2], [0, 0, 0, 1, 1, 1, 0, 0]
    told = {"work": "w", "entry": 3, "at": "2026-01-01T00:00:00Z", "relabelled": 2, "dropped": 0}
    found = proof.proof(right, answers([0] * 8), answers(control), answers(after), **told)
    assert (found.gained, found.lost, found.difference) == (3, 1, 0.25)
    assert found.right == {"before": 4, "control": 3, "after": 5}
    assert [(one.query, one.kind) for one in found.flips] == [
        (0, "gained"),
        (1, "gained"),
        (2, "gained"),
        (3, "lost"),
        (7, "other"),
    ]
    assert found.low < 0 < found.high
    assert "may be chance" in found.says()
    assert found.p == pytest.approx(0.625)
    many = proof.proof(np.zeros(40), answers([0] * 40), answers([1] * 40), answers([0] * 40), **told)
    assert "The corrections helped" in many.says()
    worse = proof.proof(np.zeros(40), answers([0] * 40), answers([0] * 40), answers([1] * 40), **told)
    assert "did harm" in worse.says()
    assert "−100.00 points" in worse.says()
    assert "mean loss" not in many.says()  # no loss changed


@pytest.mark.parametrize(("shift", "word"), [(-0.1, "fell"), (0.1, "rose"), (0.0, "")])
def test_a_mean_loss_that_changed_is_said_beside_an_accuracy_that_did_not(shift, word):
    noise = np.tile([-0.01, 0.01], 20)
    told = {"work": "w", "entry": 3, "at": "2026-01-01T00:00:00Z", "relabelled": 2, "dropped": 0}
    before, after = answers([0] * 40, np.full(40, 0.5)), answers([0] * 40, 0.5 + shift + noise)
    says = proof.proof(np.zeros(40), before, before, after, **told).says()
    half = t.ppf(0.975, 39) * noise.std(ddof=1) / np.sqrt(40)
    ends = f"{shift - half:+.3g} to {shift + half:+.3g}".replace("-", "−")
    wanted = f"The mean loss {word}, 0.5000 → {0.5 + shift:.4f} (95 % interval {ends})."
    assert "may be chance" in says
    assert (wanted in says) if word else ("mean loss" not in says)


@pytest.mark.parametrize(
    "change",
    [
        {"gained": 50},
        {"right": {}},
        {"low": 0.5},
        {"flips": [{"query": 0}]},
        {"format": 9},
        {"queries": "8"},
        {"losses": None},
        {"more": 1},
    ],
)
def test_a_proof_that_cannot_have_been_written_is_damaged(tmp_path, change):
    told = {"work": "w", "entry": 3, "at": "2026-01-01T00:00:00Z", "relabelled": 2, "dropped": 0}
    file = proof.write(proof.proof(np.zeros(4), answers([0] * 4), answers([1] * 4), answers([0] * 4), **told), tmp_path)
    assert proof.opened(file, "w").entry == 3
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(Damaged, match="is no proof of this run"):
        proof.opened(file, "w")
    other = proof.write(
        proof.proof(np.zeros(4), answers([0] * 4), answers([1] * 4), answers([0] * 4), **{**told, "entry": 4}), tmp_path
    )
    found, refused = proof.read(tmp_path, "w")  # the others are shown
    assert [one.entry for one in found] == [4]
    assert other.name != file.name
    assert len(refused) == 1
    assert file.name in refused[0]


def test_the_other_commands(upweight, run, tmp_path):
    code, out, _ = upweight("reviews", run.path)
    assert (code, out.splitlines()[0]) == (0, "0 entries. What stands: 0 keep, 0 relabel, 0 drop, 0 skip.")
    reviewed(run)
    assert upweight("export", run.path, "--out", "r.csv")[0] == 0
    assert upweight("export", run.path, "--out", "r.csv")[0] == 3  # somebody may have worked in it
    assert upweight("export", run.path, "--out", "r.csv", "--overwrite")[0] == 0
    for kind in ("jsonl", "parquet", "cleanlab", "label-studio", "label-studio-setup", "patch"):
        code, out, _ = upweight("export", run.path, "--as", kind)
        assert code == 0, kind
        assert out.startswith(f"{kind} written to ")
    (run.path / "reviews.sqlite").unlink()
    for more in ("-wal", "-shm"):
        (run.path / f"reviews.sqlite{more}").unlink(missing_ok=True)
    code, out, err = upweight("reviews", run.path, "--add", "r.csv", "--who", "me", "--budget", "20")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [
        "12 decisions added, 0 stood already.",
        "12 entries. What stands: 0 keep, 10 relabel, 2 drop, 0 skip.",
    ]
    (tmp_path / "data.csv").write_text(
        "name,kind\n" + "".join(f"row {k},{name}\n" for k, name in enumerate(run.rows.labels))
    )
    code, out, _ = upweight("apply", run.path, "--to", "data.csv", "--label", "kind", "--out", "new.csv")
    assert (code, out) == (0, "new.csv: 118 of 120 rows, 10 with another label, 2 dropped\n")
    assert (tmp_path / "new.csv").read_text().splitlines()[1:11] == [
        f"row {k},{name}" for k, name in enumerate(truth()[:10])
    ]


def test_a_loss_without_end_loses_no_proof(tmp_path):
    truth = np.array([0, 1, 1])
    losses = np.array([0.1, np.inf, 0.3])
    answers = [proof.Answers(np.array(said), losses) for said in ([0, 0, 1], [0, 0, 1], [0, 1, 1])]
    told = {"work": "w", "entry": 3, "at": "now", "relabelled": 1, "dropped": 0}
    found = proof.proof(truth, *answers, **told)
    assert found.losses["after"] is None
    assert "–" in str(found)
    proof.write(found, tmp_path)
    assert proof.read(tmp_path, "w")[0][0].gained == 1
