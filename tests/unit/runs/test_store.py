"""A folder of chunks: whole files only, the same work only, no pickles."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest

from small import refuses
from upweight.errors import StoreMismatch
from upweight.runs.files import read_tensors, write_file, write_tensors
from upweight.runs.store import Store

WORK = {"theta": "abc", "n": 40, "damping": 0.1, "solver": "Cholesky()"}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in {"events.jsonl", ".lock"})


def test_a_folder_is_made_with_its_parents_and_holds_what_the_work_is(tmp_path):
    Store(tmp_path / "a" / "b", WORK)
    assert json.loads((tmp_path / "a" / "b" / "manifest.json").read_text()) == {"format": 2, "fingerprint": WORK}


def test_chunks_come_back_as_they_were(tmp_path):
    store = Store(tmp_path, WORK)
    values = np.random.default_rng(0).normal(size=(7, 3))
    assert 3 not in store
    store.write(3, values)
    assert 3 in store
    again = Store(str(tmp_path), WORK)
    assert np.array_equal(again.read(3), values)
    again.write(3, np.asfortranarray(values + 1))
    assert np.array_equal(again.read(3), values + 1)


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_crash_at_any_moment_leaves_no_part_of_a_file(tmp_path, monkeypatch, moment):
    store = Store(tmp_path, WORK)
    store.write(0, np.zeros(3))

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr("upweight.runs.files.save_tensors", crash)
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", crash)
    else:
        monkeypatch.setattr("pathlib.Path.replace", crash)
    for chunk in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            store.write(chunk, np.ones(3))
    monkeypatch.undo()
    again = Store(tmp_path, WORK)
    assert 1 not in again
    assert not again.read(0).any()


def test_events_that_cannot_be_noted_keep_nobody_from_work(tmp_path):
    store = Store(tmp_path, WORK)
    (tmp_path / "events.jsonl").mkdir()
    for error in (None, KeyError("own")):
        with pytest.raises(KeyError, match="own") if error else nullcontext(), store:
            store.write(0, np.ones(2))
            if error:
                raise error
    assert np.array_equal(store.read(0), np.ones(2))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_temporary_is_left(tmp_path):
    store = Store(tmp_path, WORK)
    store.write(0, np.zeros(3))
    store.agree("solutions", np.ones(3), 0.0)
    assert names(tmp_path) == ["chunk-000000.safetensors", "manifest.json", "solutions.safetensors"]


def test_a_folder_of_leftovers_alone_is_a_new_store(tmp_path):
    (tmp_path / ".tmp-manifest.json-1").write_text("{")
    Store(tmp_path, WORK)


def test_a_crash_before_the_manifest_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, WORK)
    monkeypatch.undo()
    Store(tmp_path, WORK).write(0, np.zeros(3))


def test_a_mismatch_lists_every_difference_with_both_sides(tmp_path):
    Store(tmp_path, WORK)
    refused = refuses(lambda: Store(tmp_path, WORK | {"n": 41, "theta": "abd"}), ValueError, "n: 40 there, 41 now")
    assert isinstance(refused, StoreMismatch)
    assert "theta: 'abc' there, 'abd' now" in str(refused)
    assert "damping" not in str(refused)
    assert str(tmp_path) in str(refused)


def test_missing_and_new_keys_are_differences(tmp_path):
    Store(tmp_path, WORK)
    refuses(lambda: Store(tmp_path, WORK | {"device": "cpu"}), ValueError, "device: None there, 'cpu' now")
    refuses(lambda: Store(tmp_path, {}), ValueError, "theta: 'abc' there, None now")


def test_a_folder_of_another_format_is_refused(tmp_path):
    Store(tmp_path, WORK)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "fingerprint": WORK}))
    refuses(lambda: Store(tmp_path, WORK), ValueError, "format: 99 there, 2 now")


def test_agree_keeps_the_first_and_hands_it_back(tmp_path):
    store = Store(tmp_path, WORK)
    first = np.array([[1.0, 2.0]])
    assert store.agree("solutions", first, 1e-6) is first
    assert np.array_equal(store.agree("solutions", first * (1 + 1e-9), 1e-6), first)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (np.array([[1.0, 2.1]]), r"penalty gradient differ by 0\.043"),
        (np.ones((2, 2)), r"shape \(1, 2\) there and \(2, 2\) now"),
        (np.array([[np.nan, 2.0]]), "differ by nan"),
    ],
)
def test_agree_refuses_what_differs(tmp_path, other, text):
    store = Store(tmp_path, WORK)
    store.agree("penalty_gradient", np.array([[1.0, 2.0]]), 1e-6)
    assert isinstance(refuses(lambda: store.agree("penalty_gradient", other, 1e-6), ValueError, text), StoreMismatch)


def test_agree_on_zeros(tmp_path):
    store = Store(tmp_path, WORK)
    store.agree("penalty_gradient", np.zeros(3), 1e-6)
    assert not store.agree("penalty_gradient", np.zeros(3), 1e-6).any()
    refuses(lambda: store.agree("penalty_gradient", np.ones(3), 1e-6), ValueError, "differ by 1")


def test_tensors_and_text_come_back(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3).T, "b": np.zeros(0), "c": np.float32([1.5])}
    write_tensors(tmp_path / "file", arrays, {"text": "λ ≥ 0"})
    found, text = read_tensors(tmp_path / "file")
    assert text == {"text": "λ ≥ 0"}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_writing_needs_a_folder(tmp_path):
    refuses(lambda: write_file(tmp_path / "no" / "file", b""), FileNotFoundError, "no folder .*no")
    (tmp_path / "file").write_bytes(b"")
    refuses(lambda: write_file(tmp_path / "file" / "below", b""), FileNotFoundError, "no folder")
