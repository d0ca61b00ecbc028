"""MNIST from a local folder; other content than the published is refused."""

from __future__ import annotations

import gzip
import shutil

import numpy as np
import pytest
from small import refuses

from upweight import datasets

FOLDER = datasets.local("mnist")
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no test downloads anything")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.data
@pytest.mark.skipif(FOLDER is None, reason="UPWEIGHT_DATA has no mnist folder")
def test_the_published_digits_are_read():
    for data in (datasets.mnist(), datasets.mnist(FOLDER)):
        assert data.images.shape == (60_000, 784)
        assert data.test_images.shape == (10_000, 784)
        assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
        assert data.images.dtype == data.labels.dtype == np.uint8
        assert np.bincount(data.labels).min() == 5421


@pytest.mark.data
@pytest.mark.skipif(FOLDER is None, reason="UPWEIGHT_DATA has no mnist folder")
def test_a_missing_file_among_four_is_named(tmp_path):
    for name in NAMES[:3]:
        shutil.copy(FOLDER / f"{name}.gz", tmp_path)
    refuses(lambda: datasets.mnist(tmp_path), FileNotFoundError, f"no {NAMES[3]}.gz in {tmp_path}")


def test_an_empty_folder_is_refused(tmp_path):
    refuses(lambda: datasets.mnist(tmp_path), FileNotFoundError, f"no {NAMES[0]}.gz in {tmp_path}")


def test_other_content_is_refused(tmp_path):
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(16)))
    refuses(lambda: datasets.mnist(tmp_path), ValueError, f"{NAMES[0]}.gz has SHA-256 374708ff.*published")


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(bytes(1000))[:-4]], ids=["empty", "text", "cut"])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(content)
    refuses(lambda: datasets.mnist(tmp_path), ValueError, f"{NAMES[0]}.gz")


def test_a_local_folder_needs_the_variable_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UPWEIGHT_DATA", str(tmp_path))
    assert datasets.local("mnist") is None
    (tmp_path / "mnist").mkdir()
    assert datasets.local("mnist") == tmp_path / "mnist"
    refuses(datasets.mnist, FileNotFoundError, "unset UPWEIGHT_DATA")
    monkeypatch.delenv("UPWEIGHT_DATA")
    assert datasets.local("mnist") is None


def test_the_cache_is_used_before_the_network(tmp_path, monkeypatch):
    monkeypatch.delenv("UPWEIGHT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "upweight" / "mnist").mkdir(parents=True)
    (tmp_path / "upweight" / "mnist" / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(16)))
    refuses(datasets.mnist, ValueError, "374708ff")
