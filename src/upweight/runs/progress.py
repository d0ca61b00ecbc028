"""Progress bars on stderr, and one line about what will take more than a minute, as soon as that is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LONG = 60.0  # seconds that are announced
_A_WHILE = 2.0
_SAID: set[tuple[str, int]] = set()  # as with warnings: the same passes again, in an iteration, say nothing new


@contextmanager
def bar(total: int, label: str, shown: bool | None, *, unit: str = "it") -> Iterator[Callable[[int], None]]:
    """What counts steps that are done; a bar shows them, and after the first of them a line says what all will cost.

    Args:
        total: steps.
        label: what is being done, in words.
        shown: True or False forces bar and line on or off; None shows the bar on a terminal only, and the line always.
        unit: what a step is called.
    """
    hidden = not sys.stderr.isatty() if shown is None else not shown
    start, seen = time.monotonic(), [0]
    with tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "row", leave=False, disable=hidden, file=sys.stderr
    ) as steps:

        def update(count: int = 1) -> None:
            seen[0] += count
            first = seen[0] == count
            if first and shown is not False:
                _announce(total, count, label, unit, time.monotonic() - start)
            steps.update(count)

        yield update


@contextmanager
def count(label: str, unit: str) -> Iterator[Callable[[], None]]:
    """What counts steps whose number is not known; shown on a terminal only, once it has taken a while."""
    hidden = not sys.stderr.isatty()
    with tqdm(desc=label, unit=unit, leave=False, disable=hidden, file=sys.stderr, delay=_A_WHILE) as steps:

        def step() -> None:
            steps.update()

        yield step


def in_words(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 2 * LONG:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _announce(total: int, done: int, label: str, unit: str, seconds: float) -> None:
    whole = seconds * total / done
    if whole <= LONG or (label, total) in _SAID:
        return
    _SAID.add((label, total))
    first = f"the first {unit}" if done == 1 else f"the first {done:,} {unit}s"
    tqdm.write(
        f"{label}: {total:,} {unit}s, about {in_words(whole)} in all ({first} took {in_words(seconds)})",
        file=sys.stderr,
    )
