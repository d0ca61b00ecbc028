"""How many processes share the rows changes no bit; and the ends of ranks that fail, or are killed or stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import upweight as uw
from ranks import launch, work
from upweight.model.chunks import CHUNK


def chunks(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("chunk-*.safetensors")}


def index(folder):
    """Its files; of sums over the rows only one process keeps any."""
    files = (folder / "index").glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files if not file.name.startswith("sum-")}


def one_by_one(X, z):
    """Σᵢ ∇(θᵀxᵢ − zᵢ)² at least squares' θ, written out: what no chunk may be left out of, or counted twice in."""
    theta = np.linalg.lstsq(X, z, rcond=None)[0]
    return 2 * X.T @ (X @ theta - z)


def test_two_ranks_answer_in_the_bits_of_one_and_one_that_fails_ends_both(tmp_path):
    ended = launch.at_work(2, tmp_path, "before", "values", "failing")
    alone, *together = (np.load(tmp_path / name) for name in ("alone.npz", "rank-0.npz", "rank-1.npz"))
    for name, expected in alone.items():
        assert [found[name].tobytes() == expected.tobytes() for found in together] == [True, True], name
    X, z = work.X[: CHUNK + 1], work.Z[: CHUNK + 1]
    np.testing.assert_allclose(together[1]["few rows"], X.T @ np.ones(len(z)), rtol=1e-9)
    assert len(chunks(tmp_path / "together" / "store")) == 5
    assert len(index(tmp_path / "together")) == 10
    assert index(tmp_path / "together") == index(tmp_path / "alone")
    assert ended.codes == [1, 1]
    assert "ZeroDivisionError: of rank 1 alone" in ended.said[1]
    assert "rank 1 failed at scores of 4,196 rows, sweep" in ended.said[0]
    assert "chunk 3: ZeroDivisionError: of rank 1 alone. So rank 0 ends, too" in ended.said[0]


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_any_number_of_ranks_goes_on(tmp_path):
    ended = launch.at_work(2, tmp_path, "before", "stopped")
    assert ended.codes == [1, -9]
    assert re.search(r"is stopped, since \d+ s; it was last at: scores of 4,196 rows", ended.said[0])
    kept = chunks(tmp_path / "store")
    assert 0 < len(kept) < 5
    rest = launch.at_work(3, tmp_path, "again", "values")
    assert rest.codes == [0, 0, 0], rest.said
    now = chunks(tmp_path / "store")
    assert len(now) == 5
    assert kept.items() <= now.items()
    alone = np.load(tmp_path / "alone.npz")
    for rank in range(3):
        assert np.load(tmp_path / f"again-{rank}.npy").tobytes() == alone["… into a store"].tobytes()
        found = np.load(tmp_path / f"rank-{rank}.npz")
        assert [name for name in alone if found[name].tobytes() != alone[name].tobytes()] == []
    assert index(tmp_path / "together") == index(tmp_path / "alone")


@pytest.mark.slow
def test_torchrun_and_the_command_line(tmp_path):
    study = f"{work.__file__}:study"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    score = [str(Path(sys.executable).with_name("upweight")), "score", study, "--json", "--out"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [*torchrun, *score, str(tmp_path / "two")], capture_output=True, text=True, env=alone, check=False
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["rows"] == work.n  # by one rank only
    subprocess.run([*score, str(tmp_path / "one")], check=True, env=alone, capture_output=True)
    one, two = (uw.Scores.load(tmp_path / name) for name in ("one", "two"))
    assert one.values.tobytes() == two.values.tobytes()


def test_the_sum_of_rows_is_that_of_all_rows():
    """A process alone, against sums written out."""
    influence = work.function()
    theta = influence.objective.theta
    found = influence.sweep.fold(lambda batch, w: 2 * batch[0].T @ (w * (batch[0] @ theta - batch[1])))
    np.testing.assert_allclose(found.numpy(), one_by_one(work.X[: work.n], work.Z[: work.n]), atol=1e-9)
    assert found.dtype == torch.float64
