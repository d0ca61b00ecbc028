"""Trainings on workers: the same bits under every backend of joblib, and what is said when something goes wrong."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import joblib
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.runs import workers

n, d = 200, 5
DRAW = np.random.default_rng(7)
X = DRAW.normal(size=(n, d))
Z = X @ DRAW.normal(size=d) + DRAW.normal(size=n)
Y = (Z > 0).astype(int)
XT, YT = torch.from_numpy(X), torch.from_numpy(Y)
MASKS = uw.random_subsets(n, 5, seed=2)
ON = X[:3] + 0.2, Y[:3]
BACKENDS = ["threading", "loky"]


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(d, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def factory():
    layers = torch.nn.Linear(d, 4), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers).double()


def by_chance(weights, seed=0):
    """Draws from all three global states, and never looks at its seed."""
    import random

    model, w = torch.nn.Linear(d, 2, dtype=torch.float64), torch.from_numpy(weights)
    rows = np.append(torch.randint(n, (30,)).numpy(), np.random.randint(n, size=30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + 0.1 * random.random())
    for _ in range(3):
        optimizer.zero_grad()
        (cross_entropy(model(XT[rows]), YT[rows], reduction="none") * w[rows]).mean().backward()
        optimizer.step()
    return model


def logistic():
    return uw.explain(LogisticRegression(tol=1e-10, max_iter=1000).fit(X, Y), X, Y)


def of_module(module):
    return uw.explain(module.eval(), XT, YT, loss=cross_entropy, penalty=0.01)


def cases():
    linear = of_module(torch.nn.Linear(d, 2, dtype=torch.float64))
    stacked = uw.StackedTraining(uw.minibatch.Adam(1e-2), uw.minibatch.Shuffled(32), 1, factory=factory, together=3)
    return {
        "Newton": (logistic(), ON, None),
        "Refit": (uw.explain(Ridge().fit(X, Z), X, Z), (ON[0], Z[:3]), uw.Refit()),
        "stacked": (of_module(factory()), ON, stacked),
        "by chance": (linear, ON, by_chance),
        "a lambda": (linear, ON, lambda weights, seed: torch.from_numpy(np.r_[weights[:11], seed])),
    }


def all_of(influence, on, retrain, **settings):
    """What subset_retraining and leave_one_out find, as bytes."""
    subsets = uw.subset_retraining(influence, on, MASKS, retrain, seeds=2, **settings)
    left_out = uw.leave_one_out(influence, on, [3, 5], retrain, **settings)
    return [array.tobytes() for array in (subsets.values, left_out.actual, left_out.control)]


def test_every_retrainer_finds_the_same_bits_on_workers():
    for name, (influence, on, retrain) in cases().items():
        alone = all_of(influence, on, retrain)
        for backend in BACKENDS:
            with joblib.parallel_config(backend=backend, n_jobs=2):
                assert all_of(influence, on, retrain) == alone, (name, backend)


def test_chance_belongs_to_the_training():
    """Nothing drawn before, between or after changes a training, and a training changes nothing that is drawn."""
    influence = of_module(torch.nn.Linear(d, 2, dtype=torch.float64))
    torch.manual_seed(1)
    before = uw.subset_retraining(influence, ON, MASKS, by_chance, seeds=2)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    some = uw.subset_retraining(influence, ON, MASKS[2:], by_chance, seeds=2)
    assert np.array_equal(some.values, before.values[:, 2:])
    assert not np.array_equal(before.values[:, :, 0], before.values[:, :, 1])


@dataclass(frozen=True)
class Threads:
    """What a job tells about where it runs."""

    def __call__(self, jobs):
        from threadpoolctl import threadpool_info

        blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        return [(job, os.getpid(), torch.get_num_threads(), blas, torch.get_default_dtype()) for job in jobs]


def blocks(count):
    return [((number,), [number]) for number in range(count)]


def test_workers_have_the_callers_threads_and_precision(monkeypatch):
    """Sums depend on both: torch's Σ of 10⁶ numbers has other last bits with two threads than with one."""
    from threadpoolctl import threadpool_limits

    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        with threadpool_limits(2, user_api="blas"), joblib.parallel_config(backend="loky", n_jobs=2):
            torch.set_num_threads(3)
            torch.set_default_dtype(torch.float64)
            found = dict(workers.finished(Threads(), blocks(4)))
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)
    assert sorted(found) == [(0,), (1,), (2,), (3,)]
    for (number,), ((job, process, threads, blas, precision),) in found.items():
        assert job == number
        assert process != os.getpid()
        assert (threads, blas, precision) == (3, {2}, torch.float64)


def test_without_a_backend_nothing_is_sent(monkeypatch):
    monkeypatch.setattr(workers, "_packed", None)
    lock = threading.Lock()  # cannot be sent
    found = list(workers.finished(lambda jobs: [lock.locked() or os.getpid() for _ in jobs], blocks(3)))
    assert found == [((number,), [os.getpid()]) for number in range(3)]


def test_threads_train_one_at_a_time():
    """A module and the global random state are shared by all threads of a process."""
    inside, most = [], []

    def work(jobs):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        return jobs

    with joblib.parallel_config(backend="threading", n_jobs=4):
        found = dict(workers.finished(work, blocks(8)))
    assert found == dict(blocks(8))
    assert max(most) == 1


def test_work_is_sent_once_and_results_come_in_the_order_of_the_jobs(tmp_path):
    """Later jobs end first."""
    influence, log = of_module(torch.nn.Linear(d, 2, dtype=torch.float64)), tmp_path / "log"

    def slowest_first(weights, seed):
        import time

        time.sleep(0.2 if weights.sum() == n else 0.0)  # the control
        with log.open("a") as file:
            file.write(f"{int(weights.sum())}\n")
        return torch.full((12,), float(np.flatnonzero(weights == 0).sum()))

    with joblib.parallel_config(backend="loky", n_jobs=2):
        found = uw.leave_one_out(influence, ON, [4, 0, 9], slowest_first)
    assert log.read_text().split()[0] != str(n)
    alone = uw.leave_one_out(influence, ON, [4, 0, 9], slowest_first)
    assert np.array_equal(found.actual, alone.actual)


class Odd(Exception):
    """Cannot be sent: it needs two arguments, and says one."""

    def __init__(self, one, other):
        Exception.__init__(self, one)


def raised(retrain, backend="loky", **settings):
    with (
        joblib.parallel_config(backend=backend, n_jobs=2),
        pytest.raises((ZeroDivisionError, RuntimeError)) as caught,
    ):
        uw.subset_retraining(of_module(torch.nn.Linear(d, 2, dtype=torch.float64)), ON, MASKS, retrain, **settings)
    return caught.value


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_an_error_says_in_which_training(backend):
    def fails(weights, seed):
        if np.array_equal(weights, MASKS[3]):
            return 1 / 0
        return torch.zeros(12)

    error = raised(fails, "sequential" if backend is None else backend)
    assert isinstance(error, ZeroDivisionError)
    assert str(error) == "division by zero"
    assert error.__notes__[0] == "In training 4."
    assert backend is None or "in fails" in error.__notes__[-1]


def test_an_error_that_cannot_be_sent_keeps_its_words():
    def fails(weights, seed):
        raise Odd("too hot", 3)

    error = raised(fails)
    assert type(error) is RuntimeError
    assert str(error) == "Odd: too hot"
    assert error.__notes__[0].startswith("In training ")


@pytest.mark.slow
def test_two_processes_of_a_dask_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__OFFLOAD", "False")  # else a worker draws from Python's random, too
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster),
    ):
        check_cluster("dask", 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_two_processes_of_ray():
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        check_cluster("ray", 2)
    finally:
        ray.shutdown()


def check_cluster(backend, n_jobs):
    """Every retrainer to the same bits, on other processes."""
    for name, (influence, on, retrain) in cases().items():
        alone = all_of(influence, on, retrain)
        with joblib.parallel_config(backend=backend, n_jobs=n_jobs):
            assert all_of(influence, on, retrain) == alone, name
    with joblib.parallel_config(backend=backend, n_jobs=n_jobs):
        found = dict(workers.finished(Threads(), blocks(8)))
        processes = {told[1] for (told,) in found.values()}
        assert os.getpid() not in processes
        assert {told[2] for (told,) in found.values()} == {torch.get_num_threads()}
