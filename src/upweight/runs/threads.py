"""How many threads a sweep takes where other processes want the processors too.

A sweep is hundreds of small parallel regions, and threads wait for each other at the end of each by spinning. Beside a
process that keeps the cores busy, the one that others wait for is often not running, and a sweep takes ten times as
long as with one thread. Whether more threads pay is not told by any number of the system, least of all inside a
container, so it is tried: a few small regions with all threads and with one. One thread stays for two seconds; all stay
for a quarter of one, and twice as long each time that they have won again.

The setting is OMP_NUM_THREADS, which BLAS, OpenMP and torch all follow: a number that is named there, or one thread
left by `torch.set_num_threads`, is what a sweep takes, and nothing is tried. Ranks never try, and neither does a run
that is kept in a folder: sums depend on how many share them, and its bits must be those of another process or day.
With OMP_WAIT_POLICY=PASSIVE, which the commands set and which has to be there before torch is imported, threads sleep
at barriers, and all of them can be had beside others.

SciPy's and NumPy's BLAS have threads of their own, which wait in the same way: they are never more than torch's.

Where regions are small and their order is known, threads share none: each has tasks of its own (`in_turn`), whose bits
are those of one thread, nobody waits, and nothing is tried.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from upweight.runs import ranks

_LEAST, _SECONDS = 0.25, 2.0  # for which a trial holds
_REGIONS = 24  # of a trial: a few milliseconds where nothing else runs
_ROWS, _WIDTH, _COLUMNS = 1024, 256, 16
_LOST = 3.0  # times as long as one thread takes, and a trial ends

T = TypeVar("T")


@dataclass
class _Choice:
    """The outcome of the last trial."""

    count: int = 0
    until: float = 0.0
    holds: float = _LEAST


_CHOICE = _Choice()
_FIXED = [0]


@contextmanager
def fixed() -> Iterator[None]:
    """Inside, the number of threads stays what it is."""
    _FIXED[0] += 1
    try:
        yield
    finally:
        _FIXED[0] -= 1


@contextmanager
def shared() -> Iterator[None]:
    """Inside, torch and BLAS take as many threads as pay at present; afterwards as many as before."""
    before = torch.get_num_threads()
    if _FIXED[0] or named() or ranks.several():
        yield
        return
    if before == 1:
        with blas_at_most(1):
            yield
        return
    now = time.monotonic()
    if now > _CHOICE.until:
        count = tried(before)
        _CHOICE.holds = min(_SECONDS, 2 * _CHOICE.holds) if count > 1 and _CHOICE.count == count else _LEAST
        _CHOICE.count, _CHOICE.until = count, time.monotonic() + (_SECONDS if count == 1 else _CHOICE.holds)
    if _CHOICE.count == before:
        yield
        return
    torch.set_num_threads(min(before, _CHOICE.count))
    try:
        with blas_at_most(_CHOICE.count):
            yield
    finally:
        torch.set_num_threads(before)


def blas_at_most(count: int) -> AbstractContextManager[Any]:
    """Inside, no BLAS of SciPy or NumPy takes more threads."""
    pools = _pools()
    if all(pool["num_threads"] <= count for pool in pools.info()):
        return nullcontext()
    return pools.limit(limits=count)


@cache
def _pools() -> Any:
    """The BLAS libraries of this process; both are loaded before the first sweep."""
    import numpy  # noqa: F401
    import scipy.linalg.blas  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def each(count: int, task: Callable[[int], None]) -> None:
    """task(0), …, task(count − 1): independent ones, side by side on as many threads as torch has, and one for each.

    A task of many small operations gains nothing by threads inside of them. Its bits are those of one thread.
    """
    most = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # for threads that begin now, too
        if min(most, count) <= 1:
            for number in range(count):
                task(number)
            return
        with ThreadPoolExecutor(min(most, count)) as pool:
            list(pool.map(task, range(count)))
    finally:
        torch.set_num_threads(most)


def in_turn(task: Callable[[int], T], numbers: Sequence[int], at_once: int) -> Iterator[T]:
    """task(number) of each number, in their order; up to so many side by side, each on one thread.

    One more than that are at hand at most. The bits are those of one thread, whatever the number of them.
    """
    most = torch.get_num_threads()
    several = min(most, at_once, len(numbers))
    if several > 1:
        yield from _side_by_side(task, numbers, several)
        return
    for number in numbers:
        torch.set_num_threads(1)
        try:
            found = task(number)
        finally:
            torch.set_num_threads(most)
        yield found


def _side_by_side(task: Callable[[int], T], numbers: Sequence[int], several: int) -> Iterator[T]:
    most, waiting = torch.get_num_threads(), deque[Future[T]]()
    pool = ThreadPoolExecutor(several, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with blas_at_most(1):
            for number in numbers:
                waiting.append(pool.submit(task, number))
                if len(waiting) > several:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(most)  # for threads that begin later


def named() -> bool:
    """Whether the environment says how many threads to take, or how they wait."""
    return "OMP_NUM_THREADS" in os.environ or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


def tried(most: int) -> int:
    """`most` if that many threads go through small parallel regions sooner than one does; else 1."""
    X, V = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH, _COLUMNS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _seconds(X, V, float("inf"))
        torch.set_num_threads(most)
        return most if _seconds(X, V, _LOST * alone) < alone else 1
    finally:
        torch.set_num_threads(before)


def _seconds(X: torch.Tensor, V: torch.Tensor, most: float) -> float:
    torch.mm(X, V)  # starts the threads
    start = time.perf_counter()
    for _ in range(_REGIONS):
        torch.mm(X, V)
        if time.perf_counter() - start > most:
            break
    return time.perf_counter() - start
