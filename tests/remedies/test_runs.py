"""What is said to type by upweight/runs, typed."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from functools import cache
from multiprocessing import Pipe

import joblib
import numpy as np
import pytest
import torch

import upweight as uw
from ranks import launch, work
from refusals import refused
from small import XQ, ZQ, X, Z, ridge
from upweight.cli import commands
from upweight.operators import Identity
from upweight.runs import job, ranks, watch
from upweight.runs.store import Store


@cache
def values():
    """The influences on the queries, without a store."""
    return ridge().on_loss(XQ, ZQ).values


def stored(folder, influence=None):
    """Whether the influences kept in a folder are those of the same model, and are there afterwards."""
    found = (influence or ridge()).on_loss(XQ, ZQ, store=folder).values
    return np.array_equal(found, values()) and (folder / "chunk-000000.safetensors").is_file()


def test_a_store_is_an_empty_or_a_new_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refused(" and is no upweight store", "Name an empty or a new folder"):
        ridge().on_loss(XQ, ZQ, store=tmp_path)
    (tmp_path / "empty").mkdir()
    assert stored(tmp_path / "empty")
    assert stored(tmp_path / "new")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_job_is_left_by_a_command(tmp_path):
    assert stored(tmp_path)
    with refused(
        ", which commands with --store leave there, but shards",
        "Make the same call again, or type the same command: it goes on from what is",
    ):
        job.read(tmp_path)
    assert stored(tmp_path)


def test_a_job_that_cannot_be_read_is_typed_again(tmp_path, monkeypatch):
    (tmp_path / "study.py").write_text(
        "import upweight as uw\nfrom small import XQ, ZQ, ridge\n\ndef of(): return uw.Study(ridge(), (XQ, ZQ))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["score", "study.py:of", "--store", "run", "--out", "scores"]
    assert commands.run(words) == 0
    (tmp_path / "run" / "job.toml").write_text("format = 7")
    with refused(" is no job that this version can read", "Type the command itself, with --store "):
        commands.run(["resume", "run", "--study", "study.py:of", "--out", "scores"])
    assert commands.run(words) == 0
    assert commands.run(["resume", "run", "--study", "study.py:of", "--out", "scores"]) == 0
    assert np.array_equal(uw.Scores.load("scores").values, values())


def study(power):
    """The influence of a model whose loss has one name for every power, so that only its numbers tell it apart."""
    theta = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)

    def loss(params, example):
        return (params @ example[0] - example[1]).abs() ** power

    return uw.Influence(uw.Objective(loss, theta, penalty=0.1), (X, Z), curvature=Identity())


def test_a_store_of_another_loss_is_left_or_deleted(tmp_path):
    study(2).on_loss(XQ, ZQ, store=tmp_path / "run")
    alone = study(4).on_loss(XQ, ZQ).values
    with refused(" holds the results of other work: its ", "Name another folder, or delete this one to start again"):
        study(4).on_loss(XQ, ZQ, store=tmp_path / "run")
    assert np.array_equal(study(4).on_loss(XQ, ZQ, store=tmp_path / "another").values, alone)
    shutil.rmtree(tmp_path / "run")
    assert np.array_equal(study(4).on_loss(XQ, ZQ, store=tmp_path / "run").values, alone)


def test_a_folder_is_created_before_a_file_is_written_into_it(tmp_path):
    scores = ridge().on_loss(XQ, ZQ)
    file = tmp_path / "new" / "scores.safetensors"
    with refused("There is no folder ", "Create it first"):
        scores.save(file)
    file.parent.mkdir()
    scores.save(file)
    assert np.array_equal(uw.Scores.load(file).values, values())


def test_scores_are_written_to_a_file(tmp_path):
    scores = ridge().on_loss(XQ, ZQ)
    with refused(" cannot be written (", "Name a file, in a folder that you may write to"):
        scores.save(tmp_path)
    scores.save(tmp_path / "scores.safetensors")
    assert np.array_equal(uw.Scores.load(tmp_path / "scores.safetensors").values, values())


def test_scores_are_loaded_from_where_they_were_saved(tmp_path):
    path = tmp_path / "scores.safetensors"
    with refused("There is no file at ", "Scores are written by scores.save(path)"):
        uw.Scores.load(path)
    ridge().on_loss(XQ, ZQ).save(path)
    assert np.array_equal(uw.Scores.load(path).values, values())


def test_a_damaged_file_of_scores_is_deleted(tmp_path):
    path = tmp_path / "scores.safetensors"
    path.write_bytes(b"half a file")
    with refused(" is not a safetensors file, or is damaged (", "Delete it, and compute it again"):
        uw.Scores.load(path)
    path.unlink()
    ridge().on_loss(XQ, ZQ).save(path)
    assert np.array_equal(uw.Scores.load(path).values, values())


@pytest.mark.parametrize("name", ["chunk-000000", "solutions", "losses"])
def test_a_damaged_file_of_a_store_is_deleted(tmp_path, name):
    assert stored(tmp_path / "run")
    file = tmp_path / "run" / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with refused(" is not a safetensors file, or is damaged (", "Delete it, and compute it again"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    file.unlink()
    assert stored(tmp_path / "run")


def flipped(file):
    """One bit of the last number of a file is another."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["chunk-000000", "solutions", "losses"])
def test_a_file_that_is_not_what_was_written_is_deleted(tmp_path, name):
    assert stored(tmp_path / "run")
    file = tmp_path / "run" / f"{name}.safetensors"
    flipped(file)
    with refused(" is damaged: its content is not what was written (sha256 ", "Delete it, and compute it again"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    file.unlink()
    assert stored(tmp_path / "run")


def test_a_file_under_another_name_is_deleted(tmp_path):
    assert stored(tmp_path / "run")
    chunk, solutions = (tmp_path / "run" / f"{name}.safetensors" for name in ("chunk-000000", "solutions"))
    shutil.copy(solutions, chunk)
    with refused(": it was copied or renamed", "Delete it, and compute it again"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    chunk.unlink()
    assert stored(tmp_path / "run")


def test_a_folder_has_one_writer(tmp_path):
    assert stored(tmp_path / "run")
    work = json.loads((tmp_path / "run" / "manifest.json").read_text())["fingerprint"]
    with Store(tmp_path / "run", work):
        with refused(" is being written by another process", "Wait until it has ended, or name another") as caught:
            ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
        assert f"(number {os.getpid()} on {platform.node()}, since " in str(caught.value)
    assert stored(tmp_path / "run")
    assert stored(tmp_path / "another")


def test_what_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch):
    room = 600  # bytes: enough for one query
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * room, room, room))
    with refused(" would take ", "Name a folder on another disk, make room, or ask fewer queries at once"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    assert np.array_equal(ridge().on_loss(XQ[:1], ZQ[:1], store=tmp_path / "few").values, values()[:1])
    monkeypatch.undo()
    assert stored(tmp_path / "run")


def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch):
    whole, flushed = os.fsync, []

    def full(handle):
        flushed.append(handle)
        if len(flushed) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(handle)

    monkeypatch.setattr(os, "fsync", full)
    with refused("The disk is full: ", "Make room, and repeat the same call: it goes on from there"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    monkeypatch.undo()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*.safetensors")}
    assert before
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert stored(tmp_path / "run")
    assert before.items() <= {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}.items()


def test_a_store_is_named_by_its_path(tmp_path):
    with refused("store=", "pass its path, or None to keep nothing"):
        ridge().on_loss(XQ, ZQ, store=True)
    assert stored(tmp_path / "run")
    assert np.array_equal(ridge().on_loss(XQ, ZQ, store=str(tmp_path / "run")).values, values())
    assert np.array_equal(ridge().on_loss(XQ, ZQ, store=None).values, values())


def test_a_folder_that_is_not_to_be_written_is_read(tmp_path, monkeypatch):
    """By whom it is not to be written; root may write anywhere."""
    assert stored(tmp_path / "run")

    def closed(*arguments, **settings):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("upweight.runs.store.FileLock", closed)
        patched.setattr("pathlib.Path.mkdir", closed)
        for folder in (tmp_path / "run", tmp_path / "new"):
            with refused(" cannot be written (", "Name a folder that you may write to; what is in this one"):
                ridge().on_loss(XQ, ZQ, store=folder)
            assert np.array_equal(uw.Run.open(tmp_path / "run").scores.values, values())
    assert stored(tmp_path / "new")


@pytest.mark.parametrize("name", ["run", "run/below", "run/far/below"])
def test_a_store_is_no_file(tmp_path, name):
    (tmp_path / "run").write_text("")
    with refused(" is a file, and a store is a folder", "Name another path"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / name)
    assert stored(tmp_path / "another")


@pytest.mark.parametrize("manifest", [b"{", b"", b"\xff"], ids=["half", "empty", "no text"])
def test_a_store_with_a_damaged_manifest_is_deleted_or_left(tmp_path, manifest):
    assert stored(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_bytes(manifest)
    with refused(" is no manifest of a store (", "Delete the folder to start again, or name another"):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    assert stored(tmp_path / "another")
    shutil.rmtree(tmp_path / "run")
    assert stored(tmp_path / "run")


def test_a_store_of_other_work_is_left_or_deleted(tmp_path):
    assert stored(tmp_path / "run")
    alone = ridge(damping=0.1).on_loss(XQ, ZQ).values
    with refused(" holds the results of other work. Different: ", "Name another folder, or delete this one to start"):
        ridge(damping=0.1).on_loss(XQ, ZQ, store=tmp_path / "run")
    assert np.array_equal(ridge(damping=0.1).on_loss(XQ, ZQ, store=tmp_path / "another").values, alone)
    assert stored(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert np.array_equal(ridge(damping=0.1).on_loss(XQ, ZQ, store=tmp_path / "run").values, alone)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["fingerprint"]["damping"] == 0.1


# ---- workers ---------------------------------------------------------------------------------------------------------

PROCESSES = {"backend": "loky", "n_jobs": 2}


def trained(retrain, **settings):
    """Four trainings, whose θ is what the retrainer says."""
    subsets = [np.delete(np.arange(len(X)), row) for row in range(4)]
    return uw.subset_retraining(ridge(), (XQ, ZQ), subsets, retrain, **settings)


def without(weights):
    """θ̂, moved by which row is left out."""
    return ridge().objective.theta * (1 + 0.1 * float(np.flatnonzero(weights == 0)[0]))


def test_a_worker_that_is_killed_leaves_what_had_finished(tmp_path):
    end = tmp_path / "end"
    end.touch()

    def dies_once(weights, seed):
        if weights[3] == 0 and end.exists():
            while len(list((tmp_path / "run").glob("chunk-*"))) < 3:
                time.sleep(0.01)
            end.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return without(weights)

    with (
        joblib.parallel_config(**PROCESSES),
        refused(" worker ended before its ", "make the same call again, with a smaller n_jobs") as caught,
    ):
        trained(dies_once, store=tmp_path / "run")
    assert "A loky worker ended before its training did, after 3 trainings (TerminatedWorkerError" in str(caught.value)
    kept = sorted((tmp_path / "run").glob("chunk-*"))
    before = [file.stat().st_mtime_ns for file in kept]
    assert [file.name[6:12] for file in kept] == ["000000", "000001", "000002"]
    with joblib.parallel_config(backend="loky", n_jobs=1):
        found = trained(dies_once, store=tmp_path / "run")
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert np.array_equal(found.values, trained(dies_once).values)


def test_what_cannot_be_sent_is_opened_where_it_is_used(tmp_path):
    file, ask = tmp_path / "moves.db", "select move from moves"

    def opens(weights, seed):
        with closing(sqlite3.connect(file)) as here:
            return here.execute(ask).fetchone()[0] * without(weights)

    with closing(sqlite3.connect(file)) as connection:
        connection.executescript("create table moves (move); insert into moves values (2.0)")
        retrain = lambda weights, seed: connection.execute(ask).fetchone()[0] * without(weights)  # noqa: E731
        alone = trained(retrain)
        with joblib.parallel_config(**PROCESSES):
            with refused(", which cannot be sent to another process ", "let the function open what it needs") as caught:
                trained(retrain)
            assert str(caught.value).startswith("trials.train.connection is a Connection")
            assert np.array_equal(trained(opens).values, alone.values)
        assert np.array_equal(trained(retrain).values, alone.values)


def test_a_retrainer_that_no_worker_finds_is_defined_in_the_script(tmp_path, monkeypatch):
    with joblib.parallel_config(**PROCESSES):
        trained(lambda weights, seed: without(weights))  # the workers have begun, and know the path as it was
        (tmp_path / "only_here.py").write_text("def retrain(weights, seed):\n    return 1 / 0\n")
        monkeypatch.syspath_prepend(tmp_path)
        import only_here

        with refused("A worker cannot read what is trained (", "Define it in the script that is run"):
            trained(only_here.retrain)
        assert len(trained(lambda weights, seed: without(weights)).values) == len(XQ)


@pytest.mark.parametrize("budget", ["2 gigs", "GB", "1.2.3 GB", 0, -1.0, float("nan"), float("inf"), True, ""])
def test_a_budget_that_is_no_size(budget):
    with refused(". It is a number of bytes, or", "words such as "):
        ridge(memory_budget=budget)
    assert ridge(memory_budget="2 GB").system.sweep.budget == ridge(memory_budget=2e9).system.sweep.budget == 2 * 10**9
    assert ridge(memory_budget="2 GiB").system.sweep.budget == 2**31


def raised(file):
    """What a rank was told, as an error of this process."""
    kind, _, text = file.read_text().partition(": ")
    raise getattr(uw.errors, kind)(text)


def test_ranks_do_the_same_work_and_those_that_are_left_are_started_again(tmp_path):
    """Two processes: one has another row, then asks another question; blocks are asked for that are elsewhere; one is
    killed. After each the remedy is done.
    """
    ended = launch.at_work(2, tmp_path, "other", "apart", "inside", "killed")
    with refused(" has other work than rank 0. Different: ", "Let every rank make the same model and the same data"):
        raised(tmp_path / "other-0")
    assert "rank 1 has other work than rank 0. Different: training rows: '4,196" in (tmp_path / "other-1").read_text()
    with refused("The ranks do not do the same: rank ", "every rank has to make the same calls"):
        raised(tmp_path / "apart-1")
    assert (tmp_path / "apart-0").read_text() == (tmp_path / "apart-1").read_text()
    one, two = (np.load(tmp_path / f"went-on-{rank}.npy") for rank in "01")
    assert one.tobytes() == two.tobytes()
    for number in range(2):
        said = (tmp_path / f"inside-{number}-{number}").read_text()
        assert said.startswith("RankFailed: 1 of 2 blocks of this curvature are on other ranks, ")
    assert (tmp_path / "inside-0.npy").read_bytes() == (tmp_path / "inside-1.npy").read_bytes()
    assert ended.codes == [1, -9]
    last = next(line for line in reversed(ended.said[0].splitlines()) if "RankFailed" in line)
    (tmp_path / "killed-0").write_text(last.partition("upweight.errors.")[2])
    with refused(". So rank ", "Look at what the lost rank said last, and start all ranks again"):
        raised(tmp_path / "killed-0")
    assert "rank 1 (process " in last
    assert "it was last at: scores of 4,196 rows" in last
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").glob("chunk-*")}
    assert 0 < len(kept) < 5
    found = work.function().on_loss(work.QUERIES, work.TARGETS, store=tmp_path / "store").values
    np.testing.assert_allclose(found, one, rtol=1e-6, atol=1e-12)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_a_connection_that_breaks_without_a_reason():
    world = object.__new__(ranks.World)
    world.rank, world.watch = 1, watch.Watch(0, {}, [watch.facts()])
    with refused("The connection between the ranks broke while rank ", "Start all ranks again"):
        raise world._broken(RuntimeError("Connection reset by peer"))
    assert np.array_equal(ridge().on_loss(XQ, ZQ).values, values())


def test_what_one_says_the_other_knows():
    """Two watches in one process, joined as two ranks are."""
    here, there = Pipe()
    every = [watch.facts(), watch.facts() | {"host": "elsewhere"}]
    first, second = watch.Watch(0, {1: here}, every), watch.Watch(1, {0: there}, every)
    second.say("the scores")
    assert until(lambda: first.peers[1].doing == "the scores")
    assert first.ended is None
    second.fail("ValueError: no")
    assert until(lambda: first.verdict)
    assert first.verdict == "rank 1 failed at the scores: ValueError: no"
    third, fourth = Pipe()
    alone = watch.Watch(0, {1: third}, every)
    fourth.close()
    assert until(lambda: alone.ended)
    assert "(process " in alone.ended
    assert " on elsewhere) has ended; it was last at: starting" in alone.ended


def until(done):
    """Whether it comes to be true within some seconds."""
    end = time.monotonic() + 10
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done())
