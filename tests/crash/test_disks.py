"""Disks as they are: full, not to be written, seen through another name; and clocks that go backwards."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import upweight as uw
from upweight.errors import InvalidInput, StorageFailed
from upweight.model import chunks
from upweight.runs import store
from upweight.runs.store import Store

n, ROOM = 6 * chunks.CHUNK, 2**20  # bytes: for six chunks of 64 kB and the files beside them
X = np.random.default_rng(0).normal(size=(n, 4))
Y = X @ [1.0, -2.0, 0.5, 0.0] + np.random.default_rng(1).normal(size=n)
XQ, YQ = X[:8] + 0.1, Y[:8]
OTHER_SYSTEM = sys.platform != "linux" or os.geteuid() != 0


def influence():
    return uw.explain(LinearRegression().fit(X, Y), X, Y, progress=False)


@pytest.fixture(scope="module")
def values():
    return influence().on_loss(XQ, YQ).values


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with little room; its owner fills and empties it."""
    place = tmp_path / "disk"
    place.mkdir()
    if OTHER_SYSTEM or shutil.which("mount") is None:
        pytest.skip("a small disk is mounted by root, on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def there(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.glob("*.safetensors")}


def test_a_disk_that_others_fill_meanwhile_loses_nothing(small_disk, values, monkeypatch):
    """Somebody else takes what was free when the run began; with room again the same call ends at the same values."""
    run, other = small_disk / "run", small_disk / "theirs"
    note = Store.note

    def filled(store, event, **told):
        note(store, event, **told)
        if event == "chunk" and not other.exists():
            with suppress(OSError), other.open("wb", buffering=0) as file:
                for _ in range(ROOM // 1024 + 1):
                    file.write(bytes(1024))

    with monkeypatch.context() as patched:
        patched.setattr(Store, "note", filled)
        with pytest.raises(StorageFailed, match=r"The disk is full: .*chunk-.* What was finished is kept"):
            influence().on_loss(XQ, YQ, store=run)
    kept = there(run)
    assert 1 <= sum(name.startswith("chunk") for name in kept) < 6
    assert not list(run.glob(".tmp-*"))
    with pytest.raises(StorageFailed, match=r"would take .* and its disk has 0 B left|The disk is full"):
        influence().on_loss(XQ, YQ, store=run)
    assert there(run) == kept
    other.unlink()
    assert np.array_equal(influence().on_loss(XQ, YQ, store=run).values, values)
    assert kept.items() <= there(run).items()


def test_what_a_small_disk_has_no_room_for_is_not_begun(small_disk):
    many = np.repeat(XQ, 20, 0), np.repeat(YQ, 20)
    with pytest.raises(StorageFailed, match=r"Nothing was computed"):
        influence().on_loss(*many, store=small_disk / "run")
    assert not list((small_disk / "run").glob("*.safetensors"))


def test_a_disk_that_is_not_to_be_written_is_still_read(small_disk, values):
    """A finished run on a mount that is read-only now: `Run` reads it, and whoever would write there is told so."""
    run = small_disk / "run"
    influence().on_loss(XQ, YQ, store=run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert np.array_equal(uw.Run.open(run).scores.values, values)
    with pytest.raises(InvalidInput, match=r"cannot be written \(Read-only"):
        influence().on_loss(XQ, YQ, store=run)
    with pytest.raises(InvalidInput, match=r"cannot be written \(Read-only"):
        influence().on_loss(XQ, YQ, store=small_disk / "new")


def test_a_folder_without_the_right_to_write_is_read(tmp_path, values):
    influence().on_loss(XQ, YQ, store=tmp_path / "run")
    (tmp_path / "run").chmod(0o500)
    try:
        assert np.array_equal(uw.Run.open(tmp_path / "run").scores.values, values)
        if OTHER_SYSTEM:  # root may write anywhere
            with pytest.raises(InvalidInput, match=r"cannot be written \(Permission"):
                influence().on_loss(XQ, YQ, store=tmp_path / "run")
    finally:
        (tmp_path / "run").chmod(0o700)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, values, monkeypatch):
    """The wall clock falls by an hour with every look; how long things took is told by a clock that does not."""
    hours = itertools.count()

    class Falling(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2030, 1, 1, tzinfo=tz).replace(year=2030 - next(hours) % 20)

    monkeypatch.setattr("upweight.runs.store.datetime", Falling)
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    assert np.array_equal(influence().on_loss(XQ, YQ, store=tmp_path / "run").values, values)
    times = [told["time"] for told in uw.Run.open(tmp_path / "run").events]
    assert times != sorted(times)
    seconds = [told["seconds"] for told in uw.Run.open(tmp_path / "run").events]
    assert seconds == sorted(seconds)
    (tmp_path / "run" / "chunk-000003.safetensors").unlink()
    assert np.array_equal(influence().on_loss(XQ, YQ, store=tmp_path / "run").values, values)


@pytest.mark.parametrize("far", [0.0, 2**31 + 10.0], ids=["1970", "2038"])
def test_files_of_another_time_are_what_they_are(tmp_path, values, far):
    """What is done is told by what exists, never by when it was written."""
    influence().on_loss(XQ, YQ, store=tmp_path / "run")
    (tmp_path / "run" / "scores.safetensors").unlink()
    (tmp_path / "run" / "chunk-000001.safetensors").unlink()
    for file in (tmp_path / "run").iterdir():
        os.utime(file, (far, far))
    assert np.array_equal(influence().on_loss(XQ, YQ, store=tmp_path / "run").values, values)
    assert (tmp_path / "run" / "chunk-000000.safetensors").stat().st_mtime == far


def test_a_folder_that_was_copied_and_renamed_goes_on(tmp_path, values):
    """As on another machine: other path, other owner of the lock, files in another order."""
    influence().on_loss(XQ, YQ, store=tmp_path / "run")
    for lost in ("scores", "chunk-000002"):
        (tmp_path / "run" / f"{lost}.safetensors").unlink()
    copy = tmp_path / "far away" / "ein Lauf, λ"
    copy.mkdir(parents=True)
    for file in sorted((tmp_path / "run").iterdir(), reverse=True):
        shutil.copyfile(file, copy / file.name)  # without times and rights
    shutil.rmtree(tmp_path / "run")
    before = there(copy)
    assert np.array_equal(influence().on_loss(XQ, YQ, store=copy).values, values)
    assert before.items() <= there(copy).items()
    copy.rename(tmp_path / "again")
    assert np.array_equal(uw.Run.open(tmp_path / "again").scores.values, values)


def test_a_folder_behind_a_link_has_one_writer(tmp_path):
    """Two names of one folder are one folder."""
    influence().on_loss(XQ, YQ, store=tmp_path / "run")
    Path(tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    work = store.fingerprint(tmp_path / "run")
    with store.Store(tmp_path / "run", work), pytest.raises(StorageFailed, match=r"another process"):
        influence().on_loss(XQ, YQ, store=tmp_path / "link")


def test_events_are_times_of_the_world(tmp_path):
    influence().on_loss(XQ, YQ, store=tmp_path / "run")
    for told in uw.Run.open(tmp_path / "run").events:
        assert datetime.fromisoformat(told["time"]).tzinfo == UTC
