"""A file whose rows come part after part is the file that would have been written at once, or is not there."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given, strategies as st

from upweight.errors import InvalidInput, StorageFailed
from upweight.runs.files import read_tensors, write_tensors
from upweight.runs.growing import Growing

CARD = {"work": "0123456789abcdef", "name": 'chunk "1" \N{GREEK SMALL LETTER LAMDA}'}


def grown(path, values, cuts=()):
    file = Growing(path, "values", values.shape, CARD)
    for part in np.split(values, cuts):
        file.add(part)
    file.finish()
    file.settle()


@given(st.lists(st.integers(0, 40), max_size=5).map(sorted), st.sampled_from([(40,), (40, 3), (40, 2, 2), (40, 0)]))
def test_the_bytes_are_those_of_one_write(tmp_path_factory, cuts, shape):
    folder, values = tmp_path_factory.mktemp("grown"), np.random.default_rng(0).normal(size=shape)
    write_tensors(folder / "once", {"values": values}, CARD)
    grown(folder / "grown", values, cuts)
    grown(folder / "turned", np.asfortranarray(values), cuts)
    assert (folder / "grown").read_bytes() == (folder / "turned").read_bytes() == (folder / "once").read_bytes()
    arrays, card = read_tensors(folder / "grown")
    assert np.array_equal(arrays["values"], values)
    assert card == CARD
    assert sorted(os.listdir(folder)) == ["grown", "once", "turned"]


def test_what_is_dropped_was_never_there(tmp_path):
    grown(tmp_path / "file", np.ones(5))
    file = Growing(tmp_path / "file", "values", (5,), CARD)
    file.add(np.zeros(3))
    file.drop()
    assert os.listdir(tmp_path) == ["file"]
    assert read_tensors(tmp_path / "file")[0]["values"].all()


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFailed), (errno.EACCES, InvalidInput)])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_what_the_disk_refuses_is_told_and_not_left(tmp_path, monkeypatch, number, kind, where):
    def refused(*_):
        raise OSError(number, os.strerror(number)) if number != errno.EACCES else PermissionError(number, "no")

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else ("pathlib.Path.replace",)), refused)
    file = Growing(tmp_path / "file", "values", (5,), CARD)
    file.add(np.zeros(5))
    with pytest.raises(kind, match="The disk is full" if kind is StorageFailed else "cannot be written"):
        file.finish()
    file.drop()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_takes_a_part_is_given_the_rest(tmp_path, monkeypatch):
    """A write may end early; what is left comes with the next one."""
    values, opened = np.random.default_rng(0).normal(size=(40, 3)), type(tmp_path).open

    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            return self.file.write(content[:17])

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "open", lambda *given, **how: Slow(opened(*given, **how)))
        grown(tmp_path / "slow", values, [7])
    grown(tmp_path / "fast", values)
    assert (tmp_path / "slow").read_bytes() == (tmp_path / "fast").read_bytes()
