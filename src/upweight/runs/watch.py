"""Who of several processes is still there, and what each was doing: so that none waits for one that is lost.

Rank 0 holds a connection to each of the others. Over it everybody says twice a second what it is at, and at once that
it has failed. A connection that closes belongs to a process that has ended, which the operating system tells in
milliseconds, whatever killed it. A process that is only silent is lost after a minute, for some other code may hold the
interpreter; if the system says that it is stopped, after five seconds. Rank 0 tells the others.

What is said is JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

BEAT = 0.5
SILENT, STOPPED = 60.0, 5.0  # seconds without a word after which a process is lost; of one that is seen to be stopped
_ASLEEP = 3.0  # a loop that took longer was itself stopped, and has heard nobody


@dataclass
class Peer:
    """Another process, as far as it is known from here.

    Args:
        rank: its number.
        facts: host, process and parent process.
        doing: what it said last.
        heard: when, by the clock of this process.
        ended: whether its connection has closed.
    """

    rank: int
    facts: Mapping[str, Any]
    doing: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    ended: bool = False

    @property
    def stopped(self) -> bool:
        """Whether the system says so: of a process on this machine, where it has /proc."""
        if self.facts["host"] != socket.gethostname():
            return False
        try:
            return Path(f"/proc/{self.facts['pid']}/stat").read_text().rpartition(") ")[2][:1] in "tT"
        except OSError:
            return False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.facts['pid']} on {self.facts['host']})"


class Watch:
    """What is known of the other processes, kept up to date by a thread of its own.

    Args:
        rank: the number of this process.
        connections: to the others, by their rank: of rank 0 to all, of the others to rank 0.
        facts: of every process, by `facts`.
    """

    def __init__(self, rank: int, connections: Mapping[int, Connection], facts: list[dict[str, Any]]) -> None:
        self.rank, self._own, self._connections = rank, facts[rank], dict(connections)
        self.peers = {other: Peer(other, facts[other]) for other in connections}
        self.doing = "starting"
        self.working = False  # whether rows are being visited, so that nobody may have ended
        self.verdict: str | None = None  # why this job cannot go on
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="upweight-watch", daemon=True).start()

    @property
    def ended(self) -> str | None:
        """What to say of a process that has ended, failed or not; None while all are there."""
        gone = next((peer for peer in list(self.peers.values()) if peer.ended), None)
        return self.verdict or (None if gone is None else f"{gone} has ended; it was last at: {gone.doing}")

    def say(self, doing: str) -> None:
        """What this process is at, told at once."""
        self.doing = doing
        self._tell({"doing": doing})

    def fail(self, why: str) -> None:
        """This process has failed, and the others shall not wait for it."""
        self._tell({"verdict": f"rank {self.rank} failed at {self.doing}: {why}"})

    # ---- inner steps -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        seen = said = time.monotonic()
        while self._connections:
            for connection in wait(list(self._connections.values()), BEAT):
                self._hear(next(rank for rank, one in self._connections.items() if one is connection))
            now = time.monotonic()
            if now - seen > _ASLEEP:
                for peer in self.peers.values():
                    peer.heard = now
            seen = now
            if now - said >= BEAT:
                self._tell({"doing": self.doing})
                said = now
                self._look_for_silence(now)

    def _hear(self, rank: int) -> None:
        peer = self.peers[rank]
        try:
            told = json.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            del self._connections[rank]
            peer.ended = True
            if self.working:
                self._judge(
                    f"{peer} has ended without a word, as a process does that is killed; it was last at: {peer.doing}"
                )
            elif self.rank == 0:
                self._tell({"ended": rank, "doing": peer.doing, "facts": dict(peer.facts)})
            return
        peer.heard = time.monotonic()
        peer.doing = told.get("doing", peer.doing) if "ended" not in told else peer.doing
        if "verdict" in told:
            self._judge(told["verdict"])
        if "ended" in told:
            other = self.peers[told["ended"]] = Peer(told["ended"], told["facts"], told["doing"], ended=True)
            if self.working:
                self._judge(f"{other} has ended without a word; it was last at: {other.doing}")

    def _look_for_silence(self, now: float) -> None:
        for peer in self.peers.values():
            silent = now - peer.heard
            if peer.ended or silent < STOPPED or (silent < SILENT and not peer.stopped):
                continue
            stopped = peer.stopped
            how = "is stopped" if stopped else "says nothing any more"
            self._judge(f"{peer} {how}, since {silent:.0f} s; it was last at: {peer.doing}")
            if stopped and peer.facts["parent"] == self._own["parent"]:  # its launcher would wait for it
                with contextlib.suppress(OSError):
                    os.kill(peer.facts["pid"], signal.SIGKILL)
            peer.ended = True

    def _judge(self, verdict: str) -> None:
        """The job cannot go on: told to all, and at once on stderr, for a launcher may end this process any moment."""
        if self.verdict is not None:
            return
        self.verdict = verdict
        if self.rank == 0:
            self._tell({"verdict": verdict})
        if self.working:
            print(f"upweight, rank {self.rank}, at {self.doing}: {verdict}", file=sys.stderr, flush=True)

    def _tell(self, what: Mapping[str, Any]) -> None:
        content = json.dumps(what).encode()
        with self._lock:
            for connection in list(self._connections.values()):
                with contextlib.suppress(OSError):
                    connection.send_bytes(content)


def facts() -> dict[str, Any]:
    """What the others need to know of this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}


def listener() -> tuple[Listener, dict[str, Any]]:
    """Where rank 0 waits for the others, and what they need to connect."""
    key = secrets.token_hex(16)
    place = Listener(("", 0), authkey=bytes.fromhex(key), backlog=512)
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    return place, {"at": [host, place.address[1]], "key": key}


def connected(rank: int, everybody: list[dict[str, Any]], place: Listener | None) -> dict[int, Connection]:
    """The connections of this process: of rank 0 to all that come to `place`, of the others to rank 0."""
    if place is None:
        hub = everybody[0]["hub"]
        connection = Client(tuple(hub["at"]), authkey=bytes.fromhex(hub["key"]))
        connection.send_bytes(str(rank).encode())
        return {0: connection}
    found = {}
    while len(found) < len(everybody) - 1:
        with contextlib.suppress(AuthenticationError, EOFError, OSError):  # of somebody else who knocked
            connection = place.accept()
            found[int(connection.recv_bytes())] = connection
    place.close()
    return found
