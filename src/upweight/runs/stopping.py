"""Ctrl-C and SIGTERM while something is kept on disk: what is at hand is finished first; a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked: list[int] = []  # signals since the outermost `finishing` began


class Stopped(KeyboardInterrupt):
    """The work ended where nothing is lost, because a signal had asked for it; `signal` is its number."""

    def __init__(self, message: str, number: int) -> None:
        KeyboardInterrupt.__init__(self, message)
        self.signal = number


@contextmanager
def finishing() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM waits for `stop_here`, or the end; the second is a KeyboardInterrupt at once.

    Outside the main thread, and where a program has handlers of its own, nothing is changed.
    """
    ours = [number for number in _SIGNALS if _is_default(number)]
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield
        return
    before = {number: signal.signal(number, _note) for number in ours}
    try:
        yield
        stop_here("all that was at hand")
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> bool:
    """Whether a signal has asked to end."""
    return bool(_asked)


def stop_here(done: str) -> None:
    """Where nothing is lost: end here if a signal has asked for it.

    Args:
        done: what is finished, for the message: "chunk 3 of 40".

    Raises:
        Stopped: if one has.
    """
    if asked():
        number = _asked[0]
        _asked.clear()  # it is told once
        message = f"Stopped by {signal.Signals(number).name} after {done}. The same call goes on from there."
        raise Stopped(message, number)


def _note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    _asked.append(number)
    if len(_asked) > 1:
        raise KeyboardInterrupt
    print(
        f"{signal.Signals(number).name}: what is at hand is finished first; once more stops at once.", file=sys.stderr
    )


def _is_default(number: int) -> bool:
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
