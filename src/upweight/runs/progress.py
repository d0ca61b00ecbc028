"""Progress bars on stderr, and one line about what will take more than a minute, as soon as that is known."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from upweight.runs import ranks

LONG = 60.0  # seconds that are announced
_A_WHILE = 2.0
_FIRST = 20  # steps of an iteration from which their number is extrapolated
_FEWER = (5, 10.0)  # … or so many that took so many seconds
_SAID: set[tuple[str, int]] = set()  # as with warnings: the same passes again, in an iteration, say nothing new


@contextmanager
def bar(
    total: int, label: str, shown: bool | None, *, unit: str = "it", announced: bool = True
) -> Iterator[Callable[[int], None]]:
    """What counts steps that are done; a bar shows them, and after the first of them a line says what all will cost.

    Args:
        total: steps.
        label: what is being done, in words.
        shown: True or False forces bar and line on or off; None shows the bar on a terminal only, and the line always.
        unit: what a step is called.
        announced: whether the first step tells what all will take; on several workers it does not.
    """
    hidden = _hidden(shown)
    start, seen = time.monotonic(), [0]
    with tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "row", leave=False, disable=hidden, file=sys.stderr
    ) as steps:

        def update(count: int = 1) -> None:
            seen[0] += count
            first = seen[0] == count
            if first and announced and shown is not False:
                _announce(total, count, label, unit, time.monotonic() - start, total)
            steps.update(count)

        yield update


@contextmanager
def count(label: str, unit: str) -> Iterator[Callable[[], None]]:
    """What counts steps whose number is not known; shown on a terminal only, once it has taken a while."""
    with tqdm(desc=label, unit=unit, leave=False, disable=_hidden(None), file=sys.stderr, delay=_A_WHILE) as steps:

        def step() -> None:
            steps.update()

        yield step


@contextmanager
def descent(
    label: str, unit: str, most: int, start: float, shown: bool | None, *, size: int
) -> Iterator[Callable[[float], None]]:
    """What counts the steps of an iteration, and is told what each leaves of its error, in units of the goal.

    The number of steps is not known before. After the first k, the pace from s₀ to the smallest s so far gives it,
    k ln s₀ / ln(s₀/s), and a line says what all will cost if that is more than a minute. k is 20, or 5 if they took
    10 seconds, or as many as took a minute.

    Args:
        label: what is being solved, in words.
        unit: what a step is called.
        most: steps at most.
        start: s₀, the error before the first step.
        shown: as for `bar`.
        size: of what is solved for; the line is said once for each.
    """
    hidden = _hidden(shown)
    began, taken, least, silent = time.monotonic(), 0, start, shown is False
    with tqdm(desc=label, unit=unit, leave=False, disable=hidden, file=sys.stderr, delay=_A_WHILE) as steps:

        def step(left: float) -> None:
            nonlocal taken, least, silent
            taken, least = taken + 1, min(least, left)
            steps.update()
            seconds = time.monotonic() - began
            known = taken >= _FIRST or (taken >= _FEWER[0] and seconds >= _FEWER[1]) or seconds > LONG
            if silent or least <= 1 or not known:
                return
            silent = True
            total = round(min(most, forecast(taken, start, least)))
            _announce(total, taken, label, unit, seconds, size, "up to " if total == most else "some ")

        yield step


def forecast(taken: int, start: float, least: float) -> float:
    """How many steps an iteration needs in all, k ln s₀ / ln(s₀/s), when k of them brought its error from s₀ to s.

    Errors are in units of the goal; infinite where nothing was gained.
    """
    gained = math.log(start / least)
    return max(taken, taken * math.log(start) / gained) if gained > 0 else math.inf


def in_words(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 2 * LONG:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _hidden(shown: bool | None) -> bool:
    """Whether a bar is not to be seen: of several ranks the first one shows its own."""
    return not ranks.first() or not (sys.stderr.isatty() if shown is None else shown)


def _announce(total: int, done: int, label: str, unit: str, seconds: float, size: int, about: str = "") -> None:
    """A line, if all steps take more than a minute and nothing was said of this label and size before."""
    whole = seconds * total / done
    if whole <= LONG or (label, size) in _SAID or not ranks.first():
        return
    _SAID.add((label, size))
    first = f"the first {unit}" if done == 1 else f"the first {done:,} {unit}s"
    tqdm.write(
        f"{label}: {about}{total:,} {unit}s, about {in_words(whole)} in all ({first} took {in_words(seconds)})",
        file=sys.stderr,
    )
