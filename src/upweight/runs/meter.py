"""What a call takes: seconds, processor seconds, and the most memory that was in use while it ran."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Taken:
    """What one call took.

    Args:
        seconds: on the wall.
        processor_seconds: of all threads.
        peak: bytes that were resident at most, above those when the meter was made; NaN where the system does not tell
            (Linux does).
    """

    seconds: float
    processor_seconds: float
    peak: float


class Meter:
    """What calls take, one after the other; memory is counted from when this was made, or started again."""

    def __init__(self) -> None:
        gc.collect()
        self.start()

    def start(self) -> None:
        """Memory is counted from here on."""
        _give_back()
        self._before = _resident("VmRSS")

    def lap(self, call: Callable[[], Any]) -> tuple[Any, Taken]:
        """What a call returns, and what it took. What is free is given back to the system first, so that it counts."""
        _give_back()
        known = _forget_peak()
        start, processor = time.perf_counter(), time.process_time()
        value = call()
        seconds, busy = time.perf_counter() - start, time.process_time() - processor
        peak = _resident("VmHWM") - self._before if known else float("nan")
        return value, Taken(seconds, busy, max(peak, 0.0))


def _forget_peak() -> bool:
    """The most that was resident counts from here on; whether that can be asked for."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Memory that is free goes back to the system, where the C library can do that."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _resident(name: str) -> float:
    """A number of /proc/self/status, in bytes; NaN where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return float("nan")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), float("nan"))
