"""Threads that do not pay are left; whoever names a number gets it."""

from __future__ import annotations

from threading import Barrier

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

import upweight as uw
from small import XQ, YQ, classifier
from upweight.model.chunks import CHUNK
from upweight.runs import threads
from upweight.runs.store import Store


@pytest.fixture(autouse=True)
def two(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(threads, "_CHOICE", threads._Choice())
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def inside():
    with threads.shared():
        return torch.get_num_threads()


@pytest.mark.parametrize(("all_of_them", "taken"), [(0.5, 2), (2.0, 1)])
def test_a_sweep_takes_what_won_the_trial_and_gives_it_back(all_of_them, taken, monkeypatch):
    monkeypatch.setattr(threads, "_seconds", lambda *_: 1.0 if torch.get_num_threads() == 1 else all_of_them)
    assert inside() == taken
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="midway"), threads.shared():
        raise RuntimeError("midway")
    assert torch.get_num_threads() == 2


def test_a_trial_holds_for_a_while_and_longer_when_it_is_won_again(monkeypatch):
    now, trials = [100.0], []
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threads, "tried", lambda most: trials.append(now[0]) or most)
    for _ in range(100):
        inside()
        now[0] += 0.1
    gaps = np.diff(trials)
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps.max() <= 2.2


@pytest.mark.parametrize("left", [1, 2])
def test_blas_takes_no_more_threads_than_torch(left, monkeypatch):
    def blas():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    monkeypatch.setattr(threads, "tried", lambda _: 1)
    torch.set_num_threads(left)
    with threadpool_limits(2, user_api="blas"):
        with threads.shared():
            assert blas() == {1}
        assert blas() == {2}
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with threads.shared():
            assert blas() == {2}


@pytest.mark.parametrize("setting", [("OMP_NUM_THREADS", "2"), ("OMP_WAIT_POLICY", "PASSIVE")])
def test_a_number_that_is_named_is_taken_without_a_trial(setting, monkeypatch):
    monkeypatch.setattr(threads, "tried", lambda _: pytest.fail("tried"))
    monkeypatch.setenv(*setting)
    assert inside() == 2
    monkeypatch.delenv(setting[0])
    torch.set_num_threads(1)
    assert inside() == 1


def test_a_real_trial_says_all_or_one():
    assert threads.tried(2) in {1, 2}
    assert torch.get_num_threads() == 2


def test_a_question_leaves_as_many_threads_as_it_found(monkeypatch):
    seen = []
    monkeypatch.setattr(threads, "tried", lambda _: 1)
    real = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (seen.append(n), real(n)))
    classifier().on_loss(XQ, YQ)
    assert 1 in seen
    assert torch.get_num_threads() == 2


def test_a_run_in_a_folder_keeps_the_number_that_its_bits_depend_on(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "tried", lambda _: 1)
    influence = classifier()
    plain = influence.on_loss(XQ, YQ).values
    assert threads._CHOICE.count == 1  # alone it is tried
    with threads.fixed():
        assert inside() == 2
    seen = []
    original = Store.passing
    monkeypatch.setattr(Store, "passing", lambda *given, **named: seen.append(inside()) or original(*given, **named))
    kept = influence.on_loss(XQ, YQ, store=tmp_path / "run").values
    np.testing.assert_allclose(kept, plain, rtol=1e-8)
    assert seen
    assert set(seen) == {2}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_independent_tasks_have_a_thread_each(count):
    """Each is done once, two of them at a time where there are two, and inside of each torch has one thread."""
    seen, met = [], []
    meeting = Barrier(2, timeout=30)

    def task(number):
        if count > 1 and number < 2:  # passes if they run side by side only
            met.append(meeting.wait())
        seen.append((number, torch.get_num_threads()))

    threads.each(count, task)
    assert sorted(seen) == [(number, 1) for number in range(count)]
    assert len(met) == (2 if count > 1 else 0)
    assert torch.get_num_threads() == 2


def test_a_task_that_fails_fails_for_all():
    def task(number):
        if number == 3:
            message = "three"
            raise ValueError(message)

    with pytest.raises(ValueError, match="three"):
        threads.each(5, task)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("at_once", "count", "side_by_side"), [(8, 5, True), (1, 5, False), (8, 1, False)])
def test_tasks_in_turn_have_one_thread_each_and_keep_their_order(at_once, count, side_by_side):
    seen, met = [], []
    meeting = Barrier(2, timeout=30)

    def task(number):
        if side_by_side and number < 2:  # passes if they run side by side only
            met.append(meeting.wait())
        seen.append(torch.get_num_threads())
        return number

    found = threads.in_turn(task, range(count), at_once)
    assert next(found) == 0
    assert torch.get_num_threads() == 2  # where the values are taken
    assert list(found) == list(range(1, count))
    assert seen == [1] * count
    assert len(met) == (2 if side_by_side else 0)
    assert torch.get_num_threads() == 2


def test_tasks_in_turn_are_no_more_ahead_than_there_are_threads():
    begun = []
    found = threads.in_turn(lambda number: begun.append(number) or number, range(100), 2)
    next(found)
    found.close()
    assert len(begun) <= 3
    assert torch.get_num_threads() == 2


def test_a_task_in_turn_that_fails_fails_where_it_is_asked_for():
    def task(number):
        if number == 2:
            message = "two"
            raise ValueError(message)
        return number

    found = threads.in_turn(task, range(50), 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(found)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("begun", [0, 2])
def test_narrow_rows_of_linear_models_come_from_one_thread_each(begun, monkeypatch):
    """Where all chunks are asked for as where one is left, so that a run that goes on has the same bits."""
    X, y = np.arange(12.0).reshape(6, 2), np.array([0, 1, 0, 1, 1, 0])
    sweep = uw.explain(LogisticRegression().fit(X, y), X, y).system.sweep
    monkeypatch.setattr(threads, "tried", lambda _: pytest.fail("tried"))
    rows, seen = np.zeros(3 * CHUNK, np.int64), []

    def counted(batch, weights):
        seen.append(torch.get_num_threads())
        return weights

    found = list(sweep.chunks(counted, rows=rows, begun=begun))
    assert [number for number, _ in found] == list(range(begun, 3))
    assert seen == [1] * (3 - begun)
    assert torch.get_num_threads() == 2
