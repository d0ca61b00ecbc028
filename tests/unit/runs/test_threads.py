"""Threads that do not pay are left; whoever names a number gets it."""

from __future__ import annotations

from threading import Barrier

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from small import XQ, YQ, classifier
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
