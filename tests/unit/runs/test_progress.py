"""The line that says what will take long."""

from __future__ import annotations

import pytest

from upweight.runs import progress


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
