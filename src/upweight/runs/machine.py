"""The machine: its memory and how sizes are written, its processors, and the disk below the working folder."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from upweight.errors import InvalidInput

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WRITTEN = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1))
_UNLIMITED = 2.0**60  # what stands for no limit in the first version of control groups


def total_bytes() -> float:
    """Memory that is built in; NaN where the system does not tell."""
    return _asked("SC_PHYS_PAGES")


def available_bytes() -> float:
    """Memory that can be had without swapping, within the limit of a container; infinite where nothing tells."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
    limit, used = container_bytes()
    return min(free, limit - used)


def container_bytes() -> tuple[float, float]:
    """The limit of memory that a container sets, infinite where there is none, and what is used of it."""
    for limit, used in _LIMITS:
        try:
            text = limit.read_text().strip()
            if text != "max" and float(text) < _UNLIMITED:
                return float(text), float(used.read_text())
        except (OSError, ValueError):
            continue
    return float("inf"), 0.0


def processor() -> dict[str, Any]:
    """Its name, its cores, and how many of them this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"name": named or platform.processor() or platform.machine(), "cores": os.cpu_count(), "allowed": allowed}
    quota = _CGROUP / "cpu.max"
    words = quota.read_text().split() if quota.exists() else []
    return found | ({"quota": int(words[0]) / int(words[1])} if words and words[0] != "max" else {})


def disk() -> dict[str, Any]:
    """What is free below the working folder, and whether what is written there is safe: fsync, and locks of files."""
    found: dict[str, Any] = {"free": float(shutil.disk_usage(".").free)}
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"upweight")
            file.flush()
            return found | {"fsync": _tried(lambda: os.fsync(file.fileno())), "flock": _tried(lambda: _lock(file))}
    except OSError as error:
        return found | {"writing": f"fails ({error.strerror})"}


def unsafe(found: dict[str, Any]) -> list[str]:
    """What `disk` found to fail that a store relies on; a folder that may not be written to is only that."""
    return [name for name in ("fsync", "flock") if str(found.get(name, "")).startswith("fails")]


def _tried(call: Callable[[], Any]) -> str:
    try:
        call()
    except OSError as error:
        return f"fails ({error.strerror})"
    return "works"


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has other locks
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_bytes(size: float) -> str:
    """512 B, 3.4 MB, 25.6 GB: in powers of ten; a question mark where it is not known."""
    if math.isnan(size):
        return "?"
    name, unit = next(((name, unit) for name, unit in _WRITTEN if size >= unit), _WRITTEN[-1])
    return f"{size / unit:.3g} {name}"


def budget_of(size: Any, name: str = "memory_budget") -> int | None:
    """A budget that is a number of bytes, or words such as "2 GB" or "512 MiB"; None for None.

    Raises:
        InvalidInput: if it is anything else.
    """
    if size is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if found is not None and found[1].count(".") < 2 and (found[2].upper() or "B") in _UNITS:
        size = float(found[1]) * _UNITS[found[2].upper() or "B"]
    if isinstance(size, bool | str) or not isinstance(size, int | float) or not 1 <= size < float("inf"):
        message = f"{name}={size!r}. It is a number of bytes, or words such as {name}='2 GB'."
        raise InvalidInput(message)
    return int(size)


def _asked(name: str) -> float:
    try:
        return float(os.sysconf(name)) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return float("nan")
