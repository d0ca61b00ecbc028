"""The line that says what will take long."""

from __future__ import annotations

import re

import pytest
import torch

import upweight as uw
from upweight.runs import progress
from upweight.runs.progress import forecast


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(progress, "_SAID", set())
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def walk(clock, *, seconds, total=40, shown=None, label="retraining"):
    with progress.bar(total, label, shown, unit="training") as done:
        for _ in range(3):
            clock[0] += seconds
            done(1)


def test_the_forecast_of_a_steady_iteration():
    assert forecast(5, 1e6, 1e5) == pytest.approx(30)  # a factor of ten in five steps, six of them to go
    assert forecast(5, 1e6, 0.5) == 5
    assert forecast(5, 1e6, 1e6) == float("inf")


def test_more_than_a_minute_is_said_once_after_the_first_step(clock, capsys):
    walk(clock, seconds=6.0)
    walk(clock, seconds=6.0)
    assert capsys.readouterr().err == "retraining: 40 trainings, about 4 min in all (the first training took 6 s)\n"


def test_less_than_a_minute_is_not_said(clock, capsys):
    walk(clock, seconds=1.4)
    assert capsys.readouterr().err == ""


def test_progress_false_says_nothing(clock, capsys):
    walk(clock, seconds=6.0, shown=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "0.25 s"), (61, "61 s"), (600, "10 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_durations_in_words(seconds, words):
    assert progress.in_words(seconds) == words


def fall(clock, lefts, *, seconds, start=1e6, most=1000, shown=None, size=7):
    with progress.descent("CG", "product", most, start, shown, size=size) as step:
        for left in lefts:
            clock[0] += seconds
            step(left)


def test_steps_of_an_iteration_are_extrapolated_by_their_pace(clock, capsys):
    """Each step gains 10**0.02, so that 300 lead from 10⁶ to 1."""
    fall(clock, [10 ** (6 - 0.02 * (k + 1)) for k in range(40)], seconds=0.4)
    assert capsys.readouterr().err == "CG: some 300 products, about 2 min in all (the first 20 products took 8 s)\n"
    fall(clock, [10 ** (6 - 0.02 * (k + 1)) for k in range(40)], seconds=0.4)
    assert capsys.readouterr().err == ""


def test_slow_steps_are_extrapolated_sooner(clock, capsys):
    fall(clock, [10 ** (6 - 0.1 * (k + 1)) for k in range(40)], seconds=3.0)
    assert capsys.readouterr().err == "CG: some 60 products, about 3 min in all (the first 5 products took 15 s)\n"
    fall(clock, [10**5.9], seconds=70.0, size=8)
    assert capsys.readouterr().err == "CG: some 60 products, about 70 min in all (the first product took 70 s)\n"


def test_an_iteration_that_gains_nothing_costs_as_much_as_it_may(clock, capsys):
    fall(clock, [2e6] * 30, seconds=0.4, most=500)
    assert capsys.readouterr().err == "CG: up to 500 products, about 3 min in all (the first 20 products took 8 s)\n"


def test_fast_or_silent_iterations_say_nothing(clock, capsys):
    lefts = [10 ** (6 - 0.1 * (k + 1)) for k in range(40)]
    fall(clock, lefts, seconds=0.9)
    fall(clock, lefts, seconds=3.0, shown=False, size=8)
    fall(clock, [1e-3], seconds=61.0, size=9, most=1)
    assert capsys.readouterr().err == ""


def test_a_solve_by_cg_says_what_it_will_cost(clock, capsys):
    A = torch.diag(torch.linspace(1.0, 100.0, 60, dtype=torch.float64))

    class Slow(uw.operators.DenseOperator):
        def apply(self, V):
            clock[0] += 4.0
            return super().apply(V)

    for k in (1, 3):
        sides = torch.sin(torch.arange(60.0 * k, dtype=torch.float64) ** 2).reshape(k, 60)
        solution = uw.solvers.CG().prepare(Slow(A)).solve(sides)
        assert solution.converged
        told = re.search(
            r"CG: (some|up to) ([\d,]+) products, about .* in all \(the first 5 products took 2\d s\)\n",
            capsys.readouterr().err,
        )
        assert told
