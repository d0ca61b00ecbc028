"""Rows that stay in their file give the numbers that they give in memory, and are never copied as a whole."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import upweight as uw
from stored import counted, mapped, small_blocks, values  # noqa: F401 a fixture
from upweight.data.stored import MappedFile, Stored, stored
from upweight.operators import Identity
from upweight.solvers import CG

N, D = 500, 7
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, D)) * 20
Y = (X @ DRAW.normal(size=D) + 20 * DRAW.logistic(size=N) > 0).astype(int)
KINDS = ("<f4", "<f8", ">f4", ">f8", "<f2", "<i4", ">i8", "|u1", "<u2", "|b1")

pytestmark = pytest.mark.usefixtures("small_blocks")


def as_kind(kind):
    return (np.abs(X) if kind[1] == "u" else X > 0 if kind[1] == "b" else X).astype(kind)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_file_gives_the_values_of_its_numbers_bit_for_bit(tmp_path, kind, order):
    array = as_kind(kind)
    model = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000).fit(array, Y)
    there = mapped(tmp_path / "X.npy", np.asarray(array, order=order))
    expected = values(model, array, Y, (array[:3], Y[:3]))
    assert np.array_equal(values(model, there, Y, (there[:3], Y[:3])), expected)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("rows", [slice(None), slice(100, 450), slice(10, 400, 3), slice(None, None, -1)], ids=str)
def test_slices_of_a_mapped_file_in_any_mode(tmp_path, rows, mode):
    part = mapped(tmp_path / "X.npy", X.astype(np.float32), mode)[rows]
    examples = uw.Examples(part, Y[rows])
    assert isinstance(examples.x, Stored)
    for chosen in ([5, 3, 3, 40], np.arange(7, 90), slice(0, 300), slice(200, 80, -7), [len(part) - 1]):
        x, y = examples.batch(chosen)
        assert np.array_equal(x.numpy(), X.astype(np.float32)[rows][chosen])
        assert np.array_equal(y.numpy(), Y[rows][chosen])


def test_what_was_changed_in_memory_only_is_read():
    """A private copy of pages is no copy of the file: handing it back would lose the change."""
    here = np.memmap.__new__(np.memmap, "/dev/zero", np.float64, "c", shape=(N, D))
    here[:] = X
    examples = uw.Examples(here)
    for _ in range(2):
        assert np.array_equal(np.asarray(examples.x), X)
    assert np.array_equal(here, X)


def test_a_view_of_a_mapped_file_is_one_too(tmp_path):
    there = mapped(tmp_path / "X.npy", X)
    assert isinstance(stored(np.asarray(there)[:, 2:]), Stored)
    assert np.array_equal(np.asarray(stored(np.asarray(there)[3:, 2:])), X[3:, 2:])
    assert isinstance(stored(there + 1), np.ndarray)  # memory of its own


def test_a_pass_reads_every_row_once_and_the_next_block_meanwhile(tmp_path, monkeypatch):
    there = stored(mapped(tmp_path / "X.npy", X))
    threads = set()
    read = there.source.read
    monkeypatch.setattr(there.source, "read", lambda *rows: (threads.add(threading.current_thread()), read(*rows))[1])
    with counted(monkeypatch, there.source) as asked:
        whole = np.concatenate([there[at : at + 9] for at in range(0, N, 9)])
    assert np.array_equal(whole, X)
    assert sorted(asked) == [(at, min(at + there.block_rows, N)) for at in range(0, N, there.block_rows)]
    assert len(asked) > 4
    assert len(threads) > len(asked) - 3  # the first two blocks are read when they are asked for, at most


def test_rows_here_and_there_read_no_more_than_their_blocks(tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr")
    there = stored(zarr.create_array(tmp_path / "X.zarr", data=X, chunks=(50, D)))
    monkeypatch.setattr(there.source, "take", lambda rows: None)
    with counted(monkeypatch, there.source) as asked:
        assert np.array_equal(there[[499, 3, 3, 120]], X[[499, 3, 3, 120]])
    assert asked == [(0, 50), (100, 150), (450, 500)]


@pytest.mark.parametrize("chunks", [(150, D), (N, 1), (200, 4)], ids=str)
def test_a_zarr_array_of_any_layout(tmp_path, chunks):
    zarr = pytest.importorskip("zarr")
    there = zarr.create_array(tmp_path / "X.zarr", data=X.astype(np.float32), chunks=chunks)
    model = Ridge().fit(X, Y)
    expected = values(model, X.astype(np.float32), Y, (there[:3], Y[:3]))
    assert np.array_equal(values(model, there, Y, (there[:3], Y[:3])), expected)
    assert np.array_equal(uw.Examples(there).batch([7, 400, 7]).numpy(), X.astype(np.float32)[[7, 400, 7]])


def test_transformers_see_a_block_at_a_time(tmp_path, monkeypatch):
    model = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10)).fit(X, Y)
    there = mapped(tmp_path / "X.npy", X)
    seen = []
    transform = StandardScaler.transform
    monkeypatch.setattr(StandardScaler, "transform", lambda self, X: (seen.append(len(X)), transform(self, X))[1])
    found = values(model, there, Y, (X[:3], Y[:3]))
    assert max(seen) < N
    assert np.array_equal(found, values(model, X, Y, (X[:3], Y[:3])))


def test_sparse_features_of_blocks_are_kept_sparse(tmp_path):
    from sklearn.preprocessing import OneHotEncoder

    codes = (np.abs(X[:, :2]) // 10).astype(np.int64)
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), Ridge()).fit(codes, Y)
    influence = uw.explain(model, mapped(tmp_path / "X.npy", codes), Y)
    assert scipy.sparse.issparse(influence.examples.x)
    assert np.array_equal(influence.on_loss(codes[:3], Y[:3]).values, values(model, codes, Y, (codes[:3], Y[:3])))


@pytest.mark.parametrize("kind", ["<f4", "|u1", ">i4"])
def test_a_module_reads_it_too(tmp_path, kind):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2))
    array = as_kind(kind)
    asked = {"loss": nn.functional.cross_entropy, "curvature": Identity(), "penalty": 0.1}
    there = uw.explain(module, mapped(tmp_path / "X.npy", array), Y, **asked)
    assert isinstance(there.examples.x, Stored)
    in_memory = array.astype(array.dtype.newbyteorder("="))
    found = there.on_loss(in_memory[:3], Y[:3]).values
    assert np.array_equal(found, values(module, in_memory, Y, (in_memory[:3], Y[:3]), **asked))


def test_changed_rows_leave_the_file_as_it_is(tmp_path):
    there = mapped(tmp_path / "X.npy", X.astype(np.float32))
    model = LogisticRegression(tol=1e-10).fit(X, Y)
    rows, new = [300, 2, 499], np.arange(3.0 * D).reshape(3, D)
    edited = uw.edited(uw.explain(model, there, Y), rows, X_new=new)
    expected = X.astype(np.float32).astype(float)
    expected[rows] = new
    assert isinstance(edited.examples.x, Stored)
    assert np.array_equal(np.asarray(edited.examples.x), expected)
    assert np.array_equal(edited.examples.batch([499, 1, 2])[0].numpy(), expected[[499, 1, 2]])
    assert np.array_equal(there, X.astype(np.float32))


def test_cg_casts_no_copy(tmp_path):
    """Neither of a file, nor of numbers that are as narrow as the copy."""
    for array in (mapped(tmp_path / "X.npy", X), X.astype(np.float32), X.astype(np.int16)):
        model = Ridge().fit(array.astype(float), Y)
        influence = uw.explain(model, array, Y, solver=CG())
        assert influence.operator.coarse.rows_with_curvatures.examples.x is influence.examples.x
        assert np.allclose(influence.on_loss(X[:2], Y[:2]).values, values(model, array, Y, (X[:2], Y[:2])), rtol=1e-4)


def test_rows_that_lie_apart_are_copied_a_few_at_a_time(tmp_path, monkeypatch):
    """The system maps up to megabytes around each; the pages of some are handed back before the next are read."""
    there = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.float32, (5000, 3))
    there[:] = DRAW.standard_normal((5000, 3))
    there.flush()
    counts, copied = [], MappedFile._copied

    def seen(self, rows):
        counts.append(len(rows))
        return copied(self, rows)

    monkeypatch.setattr(MappedFile, "_copied", seen)
    rows = DRAW.choice(5000, 700, replace=False)
    found = stored(np.load(tmp_path / "X.npy", mmap_mode="r"))[rows]
    assert np.array_equal(found, there[rows])
    assert (sum(counts), max(counts)) == (700, 64)


def test_forty_megabytes_are_not_copied(tmp_path, monkeypatch):
    """What n rows of 400 bytes leave in memory is 60 bytes each, beside a few blocks."""
    n, d = 100_000, 100
    monkeypatch.setattr("upweight.data.stored._BLOCK_BYTES", 2**20)
    there = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.float32, (n, d))
    for start in range(0, n, 10_000):
        there[start : start + 10_000] = DRAW.standard_normal((10_000, d), dtype=np.float32)
    y = DRAW.normal(size=n)
    model = Ridge().fit(there, y)
    values(Ridge().fit(X, Y), X, Y, (X[:2], Y[:2]))  # what is imported then is no data
    tracemalloc.start()
    try:
        values(model, np.load(tmp_path / "X.npy", mmap_mode="r"), y, (there[:2], y[:2]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.75 * there.nbytes, peak
