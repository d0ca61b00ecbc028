"""A signal waits for what is at hand, a second one does not; outside of a store nothing is changed."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest

from small import XQ, ZQ, ridge
from upweight.runs.stopping import Stopped, asked, finishing, stop_here
from upweight.runs.store import Store

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_waits(number, capsys):
    with finishing():
        stop_here("nothing")
        signal.raise_signal(number)
        assert asked()
        with pytest.raises(Stopped, match=rf"Stopped by {number.name} after chunk 1 of 2\.") as caught:
            stop_here("chunk 1 of 2")
    assert caught.value.signal == number
    assert not asked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "once more stops at once" in capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_does_not(number):
    def wait():
        with finishing():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(number)
            stop_here("never")

    with pytest.raises(KeyboardInterrupt) as caught:
        wait()
    assert not isinstance(caught.value, Stopped)


def test_one_inside_another_changes_nothing():
    with finishing():
        with finishing():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            stop_here("the inner one")


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_comes_when_all_is_done_is_not_forgotten(number):
    def work():
        with finishing():
            stop_here("the last chunk")
            signal.raise_signal(number)

    with pytest.raises(Stopped, match="after all that was at hand"):
        work()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_of_the_work_is_what_is_raised():
    def work():
        with finishing():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert not asked()


def test_handlers_of_the_program_stay():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    with finishing():
        signal.raise_signal(signal.SIGTERM)
        stop_here("nothing")
    assert seen == [1]


def test_another_thread_is_left_alone():
    found = []

    def inside():
        with finishing():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("number", SIGNALS)
def test_scores_go_on_from_the_chunk_that_was_finished(tmp_path, number, monkeypatch):
    whole = ridge().on_loss(XQ, ZQ).values
    passing, written = Store.passing, []

    def signalled(store, chunk, rows, parts):
        signal.raise_signal(number)
        yield from passing(store, chunk, rows, parts)
        written.append(chunk)

    monkeypatch.setattr(Store, "passing", signalled)
    with pytest.raises(Stopped):
        ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Store, "passing", lambda *_: pytest.fail("a finished chunk was written again"))
    assert written == [0]
    assert np.array_equal(ridge().on_loss(XQ, ZQ, store=tmp_path / "run").values, whole)
