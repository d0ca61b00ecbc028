"""Rows of numbers as files of every kind, for tests of data that stay in their file."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

import upweight as uw
from upweight.data import stored, tables


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1 KB, so that few rows are many blocks."""
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 1024)
    monkeypatch.setattr(tables, "_BATCH_ROWS", 50)


def mapped(path, array, mode="r"):
    """The array in a mapped file."""
    np.save(path, array)
    return np.load(path, mmap_mode=mode)


def columns(X, **others):
    """A pyarrow Table with the columns x0, x1, … and others."""
    pa = pytest.importorskip("pyarrow")
    return pa.table({f"x{j}": X[:, j] for j in range(X.shape[1])} | others)


def opened(kind, table, folder):
    """A pyarrow Table as `kind` says, opened from a file."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import dataset, parquet

    file = folder / "rows.parquet"
    if kind == "Table":
        return table
    if kind == "RecordBatch":
        return table.combine_chunks().to_batches()[0]
    if kind == "mapped Table":
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=37)
        return pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    if kind == "datasets.Dataset":
        datasets = pytest.importorskip("datasets")
        place = np.random.default_rng(5).permutation(len(table))
        return datasets.Dataset(table.take(np.argsort(place))).select(place)  # rows in another order on the disk
    parquet.write_table(table, file, row_group_size=37)
    return parquet.ParquetFile(file) if kind == "ParquetFile" else dataset.dataset(file)


KINDS = ("Table", "RecordBatch", "mapped Table", "datasets.Dataset", "ParquetFile", "Dataset")


@contextmanager
def counted(monkeypatch, source):
    """Which rows were read from a source, in order."""
    read, asked = source.read, []

    def counting(start, stop):
        asked.append((start, stop))
        return read(start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(source, "read", counting)
        yield asked


def values(model, X, y, queries, **settings):
    """on_loss of a few queries."""
    return uw.explain(model, X, y, **settings).on_loss(*queries).values
