"""What is said to type by upweight/runs, typed."""

from __future__ import annotations

import json
import shutil
import time
from functools import cache
from multiprocessing import Pipe

import numpy as np
import pytest
import torch

import upweight as uw
from ranks import launch, work
from refusals import refused
from small import XQ, ZQ, X, Z, ridge
from upweight.operators import Identity
from upweight.runs import ranks, watch


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


def test_a_store_is_named_by_its_path(tmp_path):
    with refused("store=", "pass its path, or None to keep nothing"):
        ridge().on_loss(XQ, ZQ, store=True)
    assert stored(tmp_path / "run")
    assert np.array_equal(ridge().on_loss(XQ, ZQ, store=str(tmp_path / "run")).values, values())
    assert np.array_equal(ridge().on_loss(XQ, ZQ, store=None).values, values())


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


def raised(file):
    """What a rank was told, as an error of this process."""
    kind, _, text = file.read_text().partition(": ")
    raise getattr(uw.errors, kind)(text)


def test_ranks_do_the_same_work_and_those_that_are_left_are_started_again(tmp_path):
    """Two processes: one has another row, then asks another question, then is killed; after each the remedy is done."""
    ended = launch.at_work(2, tmp_path, "other", "apart", "killed")
    with refused(" has other work than rank 0. Different: ", "Let every rank make the same model and the same data"):
        raised(tmp_path / "other-0")
    assert "rank 1 has other work than rank 0. Different: training rows: '4,196" in (tmp_path / "other-1").read_text()
    with refused("The ranks do not do the same: rank ", "every rank has to make the same calls"):
        raised(tmp_path / "apart-1")
    assert (tmp_path / "apart-0").read_text() == (tmp_path / "apart-1").read_text()
    one, two = (np.load(tmp_path / f"went-on-{rank}.npy") for rank in "01")
    assert one.tobytes() == two.tobytes()
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
