"""Processes with torchrun's variables, without torchrun: its agent would be one more import of torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

WORK = Path(__file__).with_name("work.py")


@dataclass(frozen=True)
class Ended:
    codes: list[int | None]
    said: list[str]
    seconds: float


def launched(size: int, command: list[str], within: float = 300.0) -> Ended:
    """The ends of `size` ranks of a command; what still runs when rank 0 has ended for a minute is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = os.pathsep.join([str(WORK.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {"PYTHONPATH": found}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [running[0].communicate(timeout=within)[0]]
        seconds = time.monotonic() - begun
        said += [one.communicate(timeout=60)[0] for one in running[1:]]
    finally:
        for one in running:
            one.kill()
            one.communicate()
    return Ended([one.returncode for one in running], said, seconds)


def at_work(size: int, folder: Path, *scenarios: str) -> Ended:
    """The ends of the ranks that work on some scenarios of work.py."""
    return launched(size, [str(WORK), str(folder), *scenarios])
