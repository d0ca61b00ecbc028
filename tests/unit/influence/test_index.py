"""An index on disk against the scores that it stands for."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import upweight as uw
from upweight.errors import InvalidInput, PathNotFound, StorageFailed, StoreMismatch
from upweight.influence import indexing
from upweight.model import calculus
from upweight.operators import EKFAC
from upweight.operators.kronecker import Kronecker
from upweight.runs.store import Store, fingerprint

N = 60


class Texts(nn.Module):
    """Tables, tied and not, a weight with a bias at every place, a normalisation, a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(40, 16), nn.Embedding(6, 16)
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 24)
        self.across, self.down = nn.Conv1d(24, 24, 3, padding=1, groups=4), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x) + self.places(torch.arange(x.shape[1]))
        inner = torch.tanh(self.up(self.norm(h)))
        h = h + self.down(torch.tanh(self.across(inner.transpose(1, 2)).transpose(1, 2)))
        return (h @ self.table.weight.T).transpose(1, 2)


def texts(n, seed):
    return torch.randint(0, 40, (n, 6), generator=torch.Generator().manual_seed(seed))


def explained(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = Texts().to(dtype).eval()
    X = texts(N, 1)
    weights = np.random.default_rng(0).random(N) + 0.5
    settings = {"curvature": EKFAC(samples=2), "damping": 1e-3, "sample_weight": weights, **settings}
    return uw.explain(model, X, X.roll(1, 1), loss=cross_entropy, progress=False, **settings)


XQ = texts(7, 2)
QUERIES = (XQ, XQ.roll(1, 1))


def miss(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_all_coordinates_in_eight_bits_are_the_scores(tmp_path):
    influence = explained(penalty=1e-3, penalty_per_example=True)
    index = influence.index(tmp_path / "index", error=0.001, bits=8)
    exact = influence.on_loss(*QUERIES)
    found = index.on_loss(index.coordinates(influence, *QUERIES))
    assert index.k > 0.95 * influence.objective.size
    assert miss(found.values, exact.values) < 0.02
    assert np.allclose(found.query_values, exact.query_values)
    assert np.allclose(found.scale, exact.scale)
    assert miss(found.derivative, exact.derivative) < 0.02


@pytest.mark.parametrize("part", [64, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("error", [0.4, 0.2])
def test_the_error_is_what_is_said(tmp_path, error, dtype, part, monkeypatch):
    monkeypatch.setattr(indexing, "_PART", part)
    influence = explained(dtype)
    index = influence.index(tmp_path / "index", error=error)
    exact, found = influence.on_loss(*QUERIES), index.on_loss(index.coordinates(influence, *QUERIES))
    missed = miss(found.values, exact.values)
    assert index.k < influence.objective.size
    assert index.error < 1.5 * error
    assert 0.4 * index.error < missed < 3 * index.error  # of four queries, which are few
    assert np.corrcoef(found.values.ravel(), exact.values.ravel())[0, 1] > 1 - 2 * error**2
    assert index.bytes < 8 * N * influence.objective.size
    assert f"error {index.error:.2g} on pairs held out" in str(found.certificate)


def test_another_damping_and_leading_rows_come_from_the_same_files(tmp_path):
    names = [f"text {k}" for k in range(N)]
    influence = explained(ids=names)
    index = influence.index(tmp_path / "index", error=0.01, bits=8)
    queries = index.coordinates(influence, *QUERIES)
    for damping in (1e-4, 1e-2):
        exact = explained(damping=damping).on_loss(*QUERIES).values
        assert miss(index.on_loss(queries, damping=damping).values, exact) < 0.05
    whole, leading = index.on_loss(queries), index.extremes(queries, 4)
    assert leading.helpful.rows.tolist() == whole.helpful(4).rows.tolist()
    assert leading.harmful.rows.tolist() == whole.harmful(4).rows.tolist()
    assert leading.helpful.ids.tolist() == whole.helpful(4).ids.tolist()
    assert whole.helpful(1).ids[0, 0] == names[int(whole.helpful(1).rows[0, 0])]
    assert np.allclose(leading.helpful.values, whole.helpful(4).values)


def test_chunks_go_on_where_they_stopped_and_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.influence.indexing._CHUNK_NUMBERS", 20_000)
    folder = tmp_path / "index"
    influence = explained()
    first = influence.index(folder, error=0.2)
    assert first.chunks > 3
    before = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    (folder / "chunk-000002.safetensors").unlink()
    with pytest.raises(InvalidInput, match="lacks 1 of"):
        uw.Index.open(folder)
    (folder / "coordinates.safetensors").unlink()
    with pytest.raises(PathNotFound):
        uw.Index.open(folder)
    again = explained()
    again.index(folder, error=0.2)
    assert "operator" not in again.system.__dict__  # the factors are on the disk
    assert {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} == before


def test_an_index_of_another_loss_of_the_same_name_is_refused(tmp_path, monkeypatch):
    explained().index(tmp_path / "index", error=0.2)
    other = explained()
    losses = calculus.losses
    monkeypatch.setattr(calculus, "losses", lambda *asked: 1.1 * losses(*asked))
    with pytest.raises(StoreMismatch, match="losses differ by"):
        other.index(tmp_path / "index", error=0.2)


def test_it_is_read_without_the_model(tmp_path):
    influence = explained()
    index = influence.index(tmp_path / "index", error=0.2)
    queries = index.coordinates(influence, *QUERIES)
    np.save(tmp_path / "z.npy", queries.values)
    program = (
        "import sys, numpy as np, upweight as uw; from upweight.influence.index import Coordinates\n"
        "z = np.load(sys.argv[2]); index = uw.Index.open(sys.argv[1])\n"
        "print(index.on_loss(Coordinates(z, np.zeros(len(z)))).values.tolist())"
    )
    ran = [sys.executable, "-c", program, str(tmp_path / "index"), str(tmp_path / "z.npy")]
    told = subprocess.run(ran, capture_output=True, text=True, check=True).stdout
    assert np.array_equal(np.array(json.loads(told)), index.on_loss(queries).values)


def test_names_of_queries_travel(tmp_path):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 3)), index=[f"r{k}" for k in range(40)])
    labels = torch.arange(40) % 3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    influence = uw.explain(net, features, labels, loss=cross_entropy, curvature=EKFAC(), damping=0.01)
    index = influence.index(tmp_path / "index", error=0.05, bits=8)
    found = index.on_loss(index.coordinates(influence, features[:2], labels[:2]))
    assert found.query_ids.tolist() == ["r0", "r1"]
    assert found.to_pandas().columns[3] == "r3"
    assert miss(found.values, influence.on_loss(features[:2], labels[:2]).values) < 0.15


def small(**settings):
    """A network with a layer that it does not use, and its rows."""
    X = torch.randn(80, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    y = X[:, :1].abs()
    settings = {"curvature": EKFAC(), "damping": 0.01, "progress": False, **settings}
    return uw.explain(Partly().double(), X, y, loss=mse_loss, **settings), (X, y)


@pytest.mark.parametrize(
    "ids",
    [[("text", k, "part") for k in range(80)], np.datetime64("2020-01-01") + np.arange(80), list(range(100, 180))],
    ids=["tuples", "dates", "numbers"],
)
def test_names_of_any_kind_come_back_from_the_folder(tmp_path, ids):
    influence, queries = small(ids=ids)
    influence.index(tmp_path / "index")
    index = uw.Index.open(tmp_path / "index")
    asked = index.coordinates(influence, queries[0][:2], queries[1][:2])
    found, exact = index.on_loss(asked), influence.on_loss(queries[0][:2], queries[1][:2])
    assert found.ids.dtype == exact.ids.dtype
    assert found.ids.tolist() == exact.ids.tolist()
    assert found.axes == exact.axes


def test_the_error_counts_what_a_row_carries_of_the_penalty(tmp_path):
    """Far from a minimum the shares of a large penalty are most of the values; what is left out cuts them."""
    influence, queries = small(penalty=30.0, penalty_per_example=True)
    index = influence.index(tmp_path / "index")
    exact = influence.on_loss(*queries).values
    missed = miss(index.on_loss(index.coordinates(influence, *queries)).values, exact)
    assert 0.5 * index.error < missed < 1.5 * index.error


def test_what_the_loss_does_not_use_is_never_kept(tmp_path):
    influence, queries = small()
    index = influence.index(tmp_path / "index", error=0.001, bits=8)  # less than eight bits lose, so all there is
    assert index.k == influence.objective.size - 30
    exact = influence.on_loss(*queries).values
    assert miss(index.on_loss(index.coordinates(influence, *queries)).values, exact) < 0.02


def test_other_work_in_the_folder_is_refused(tmp_path):
    influence = explained()
    index = influence.index(tmp_path / "index", error=0.3)
    moved = explained()
    moved.objective.params["up.bias"] += 1e-3
    with pytest.raises(StoreMismatch, match="other parameters"):
        index.coordinates(moved, *QUERIES)
    with pytest.raises(StoreMismatch, match="theta"):
        moved.index(tmp_path / "index", error=0.3)
    with pytest.raises(StoreMismatch, match="bits"):
        influence.index(tmp_path / "index", error=0.3, bits=8)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_make_the_index_of_one_call(tmp_path, parts, monkeypatch):
    """In any order, and to the byte; then nothing is left to be computed."""
    monkeypatch.setattr("upweight.influence.indexing._CHUNK_NUMBERS", 2**14)  # some rows a chunk
    whole = explained().index(tmp_path / "whole")
    assert whole.chunks > 3
    rows = [explained().index_shard(tmp_path / "parts", i, parts) for i in reversed(range(parts))]
    assert [row for part in reversed(rows) for row in part] == list(range(N))
    assert not (tmp_path / "parts" / "coordinates.safetensors").exists()
    monkeypatch.setattr(Kronecker, "coordinates", None)
    explained().index(tmp_path / "parts")
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.safetensors")}
    assert {file.name: file.read_bytes() for file in (tmp_path / "parts").glob("*.safetensors")} == files


def test_parts_exclude_themselves_and_the_whole(tmp_path):
    influence = explained()
    influence.index_shard(tmp_path / "run", 1, 2)
    with Store(tmp_path / "run", fingerprint(tmp_path / "run"), part="-0-of-2"):
        for call in (lambda: influence.index_shard(tmp_path / "run", 0, 2), lambda: influence.index(tmp_path / "run")):
            with pytest.raises(StorageFailed, match="is being written by another process"):
                call()
    with pytest.raises(PathNotFound, match="holds no finished index"):
        uw.Index.open(tmp_path / "run")


def test_a_model_of_more_parameters_than_are_rotated_at_once(tmp_path, monkeypatch):
    influence = explained()
    whole = influence.index(tmp_path / "whole", error=0.2)
    monkeypatch.setattr("upweight.influence.indexing._CHUNK_NUMBERS", influence.objective.size // 3)
    found = influence.index(tmp_path / "row by row", error=0.2)
    assert found.chunks == N
    assert found.error == pytest.approx(whole.error)
    scores = [index.on_loss(index.coordinates(influence, *QUERIES)).values for index in (whole, found)]
    assert miss(scores[1], scores[0]) < 0.01
