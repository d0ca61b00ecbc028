"""The one loop: what a batch size, a full memory, a NaN or a store may and may not change."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import upweight as uw
from small import refuses
from upweight.model.chunks import CHUNK
from upweight.model.sweep import Sweep
from upweight.runs.store import Store

n = 2 * CHUNK + 300
DRAW = np.random.default_rng(1)
VALUES = DRAW.normal(size=(n, 3))
WEIGHTS = DRAW.uniform(0.5, 2, size=n)


def sweep(batch_size=None, **settings):
    objective = uw.Objective(lambda params, x: (params * x).sum(), torch.ones(3, dtype=torch.float64))
    return Sweep(objective, uw.Examples(VALUES, sample_weight=WEIGHTS), batch_size, **settings)


def total(batch, weights):
    return (weights[:, None] * batch).sum(0)


def squares(batch, weights):
    return weights[:, None] * batch**2


def test_fold_is_the_weighted_sum():
    np.testing.assert_allclose(sweep().fold(total).numpy(), WEIGHTS @ VALUES, rtol=1e-12)


def test_emit_is_one_line_per_row():
    assert np.array_equal(sweep().emit(squares), WEIGHTS[:, None] * VALUES**2)


@given(st.integers(1, 3 * CHUNK))
def test_emit_does_not_depend_on_the_batch_size(size):
    assert np.array_equal(sweep(size).emit(squares), sweep().emit(squares))


@given(st.integers(1, 3 * CHUNK))
def test_fold_of_whole_numbers_does_not_depend_on_the_batch_size(size):
    def count(batch, _):
        return (1000 * batch).round().sum(0)

    assert torch.equal(sweep(size).fold(count), sweep().fold(count))


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 1, 5 * CHUNK, None])
def test_no_batch_crosses_a_chunk_so_large_batches_agree_to_the_bit(size):
    sizes = []

    def noted(batch, weights):
        sizes.append(len(batch))
        return total(batch, weights)

    assert torch.equal(sweep(size).fold(noted), sweep(CHUNK).fold(total))
    assert sizes == [CHUNK, CHUNK, 300]


def test_rows_are_visited_in_the_order_given():
    rows = DRAW.permutation(n)[: CHUNK + 7]
    assert np.array_equal(sweep().emit(squares, rows=rows), (WEIGHTS[:, None] * VALUES**2)[rows])
    np.testing.assert_allclose(sweep().fold(total, rows=rows).numpy(), WEIGHTS[rows] @ VALUES[rows], rtol=1e-12)
    repeated = np.array([5, 5, 2])
    assert np.array_equal(sweep().emit(squares, rows=repeated), (WEIGHTS[:, None] * VALUES**2)[repeated])


def test_the_batch_size_fits_the_memory():
    sizes = []

    def noted(batch, _):
        sizes.append(len(batch))
        return batch.sum(0)

    sweep(example_bytes=1000, memory=100_000).fold(noted, vectors=4)
    assert max(sizes) == 20
    sizes.clear()
    sweep(example_bytes=10**12).fold(noted, rows=np.arange(3))
    assert sizes == [1, 1, 1]


FULL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
@pytest.mark.parametrize("room", [1, 7, 100, 1000])
def test_a_full_memory_halves_the_batch_and_loses_no_row(error, room):
    sizes = []

    def tight(function):
        def run(batch, weights):
            if len(batch) > room:
                raise error
            sizes.append(len(batch))
            return function(batch, weights)

        return run

    assert np.array_equal(sweep().emit(tight(squares)), sweep().emit(squares))
    assert sum(sizes) == n
    np.testing.assert_allclose(sweep().fold(tight(total)).numpy(), sweep().fold(total).numpy(), rtol=1e-12)


def test_scores_on_a_full_memory_are_the_same(monkeypatch):
    from upweight import calculus

    X = VALUES[:200]
    objective = uw.Objective(lambda p, x: torch.cosh(p @ x), torch.zeros(3, dtype=torch.float64), penalty=0.1)
    expected = uw.Influence(objective, (X,), damping=0.5).on_loss(X[:3] + 1).values
    whole = calculus.dots
    monkeypatch.setattr(calculus, "dots", lambda o, batch, V: whole(o, batch, V) if len(batch) < 9 else _full())
    found = uw.Influence(objective, (X,), damping=0.5).on_loss(X[:3] + 1).values
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def _full():
    raise MemoryError


def test_a_memory_too_small_for_one_example_is_the_callers_error():
    def never(batch, weights):
        raise MemoryError("one row of 8 EiB")

    with pytest.raises(MemoryError, match="8 EiB"):
        sweep().fold(never)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 1500, n - 1])
@pytest.mark.parametrize("size", [None, 1, 13])
def test_the_row_that_is_not_finite_is_named(row, value, size):
    def poisoned(batch, _):
        return torch.where((batch == torch.from_numpy(VALUES[row])).all(1), value, 1.0)

    refuses(lambda: sweep(size).emit(poisoned, label="scores"), ValueError, f"scores: row {row} gives NaN or infinite")
    refuses(lambda: sweep(size).fold(lambda b, w: poisoned(b, w).sum(), label="sum"), ValueError, "sum: .*NaN")


def test_the_row_named_is_the_training_row_not_its_place():
    rows = np.array([9, 1500, 4])
    refuses(lambda: sweep().emit(lambda b, _: b[:, 0] / 0, rows=rows), ValueError, "row 9 gives")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, IndexError, KeyError])
def test_a_failing_loss_names_its_rows_and_keeps_the_reason(error):
    def failing(batch, _):
        raise error("shapes differ\nand more")

    refused = refuses(
        lambda: sweep(10).fold(failing, label="gradient"), ValueError, "gradient: .* rows 0 to 9 .*shapes"
    )
    assert isinstance(refused.__cause__, error)
    assert "\n" not in str(refused)


def test_the_librarys_own_errors_pass():
    def refusing(batch, _):
        raise uw.errors.UnsupportedModel("no")

    with pytest.raises(uw.errors.UnsupportedModel, match=r"^no$"):
        sweep().fold(refusing)


def test_finished_chunks_are_kept_and_not_computed_again(tmp_path):
    calls = []

    def counted(batch, weights):
        calls.append(len(batch))
        return squares(batch, weights)

    first = sweep().emit(counted, store=Store(tmp_path / "run", {}))
    assert sum(calls) == n
    calls.clear()
    assert np.array_equal(sweep().emit(counted, store=Store(tmp_path / "run", {})), first)
    assert not calls
    os.unlink(tmp_path / "run" / "chunk-000001.safetensors")
    assert np.array_equal(sweep(100).emit(counted, store=Store(tmp_path / "run", {})), first)
    assert sum(calls) == CHUNK


def test_a_failed_chunk_is_not_kept(tmp_path):
    store = Store(tmp_path / "run", {})

    def poisoned(batch, _):
        return batch[:, 0] if len(batch) == CHUNK else batch[:, 0] * float("nan")

    refuses(lambda: sweep().emit(poisoned, store=store), ValueError, f"row {2 * CHUNK} gives")
    assert 0 in store
    assert 1 in store
    assert 2 not in store


def test_progress_is_quiet_unless_on_a_terminal_or_asked(capsys):
    sweep().fold(total)
    sweep(progress=False).fold(total)
    assert capsys.readouterr() == ("", "")
    sweep(progress=True).fold(total, label="gradient")
    out, err = capsys.readouterr()
    assert not out
    assert "gradient" in err


def test_progress_shows_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    sweep().fold(total, label="gradient")
    assert "gradient" in capsys.readouterr().err
    sweep(progress=False).fold(total)
    assert not capsys.readouterr().err


def test_over_walks_the_same_way():
    other = sweep(17, progress=False).over(sweep().objective, uw.Examples(VALUES[:5]))
    assert (other.batch_size, other.progress, other.n) == (17, False, 5)
    assert replace(other, batch_size=None).batch_size is None
