"""A folder of finished chunks and a manifest, that one process, or the processes of one job, write at a time.

    run/
    ├── manifest.json             what the work is: format and fingerprint
    ├── job.toml                  the command that made the folder, if one did (`runs.job`)
    ├── events.jsonl              what happened when: opened, chunk, kept, stopped, finished
    ├── state.safetensors         where the iteration that solves the systems has come to
    ├── estimates.safetensors    those that a stochastic solver has made, and where the next one has come to
    ├── sum-….safetensors         a sum over all rows, whole or as far as it has come
    ├── solutions.safetensors     what the chunks were computed with; compared, and used again, by the next run
    ├── chunk-000000.safetensors  a chunk file that exists is complete
    ├── chunk-000001.safetensors
    ├── card.safetensors          of scores that are made in parts (`influence.shards`): all but the chunks
    └── scores.safetensors        written last: what belongs to the scores beside the chunks

Every file exists whole or not at all (`runs.files`); a crash at any moment leaves only whole chunks. Opening a folder
with another fingerprint is an error that lists the differences, never a silent reuse. Nothing in a folder is ever
executed: there are no pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from upweight.errors import Damaged, InvalidInput, StorageFailed, StoreMismatch, first_line
from upweight.runs.files import TEMPORARY, read_tensors, write_file, write_tensors
from upweight.runs.growing import Growing
from upweight.runs.stopping import Stopped, finishing

FORMAT = 2
MANIFEST, JOB, EVENTS, LOCK, SUFFIX = "manifest.json", "job.toml", "events.jsonl", ".lock", ".safetensors"
STATE, ESTIMATES, SOLUTIONS, SCORES = "state", "estimates", "solutions", "scores"
_LOOK = 5.0  # seconds that a part waits for others that look, as it does, whether the whole is taken
WORK, NAME = "work", "name"  # of a file: what ties it to its folder


class Store:
    """Chunks of one piece of work, kept in a folder so that the work can be interrupted and resumed.

    Inside `with store:` no other process can write there, a signal waits for the chunk at hand (`runs.stopping`), and
    events are noted. Parts of the work exclude each other by their names, and all of them the whole.

    Args:
        path: the folder; created if it does not exist.
        fingerprint: what the work is; every value must survive JSON.
        part: the name of a part of the work that other processes do other parts of, in the same folder.
        follows: whether another process of the same job has taken the folder for all of them.
        span: chunks of a sweep that lie in one file: such a file is a chunk of the store.
        waiting: whether a signal waits for what is at hand; not where a loop of somebody else's runs inside.

    Raises:
        StoreMismatch: if the folder holds other work.
        InvalidInput: if the folder is not empty and holds no store, or may not be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        *,
        part: str = "",
        follows: bool = False,
        span: int = 1,
        waiting: bool = True,
    ) -> None:
        self.path = _folder(path)
        self.waiting = waiting
        self.part, self.follows, self.span = part, follows, span
        self._inside: ExitStack | None = None
        self._depth = 0
        self._last: Growing | None = None  # whose name may still be on its way to the disk
        self._since = time.monotonic()
        manifest = {"format": FORMAT, "fingerprint": json.loads(json.dumps(dict(fingerprint)))}
        file = self.path / MANIFEST
        if file.exists():
            _compare(_manifest(file), manifest, self.path)
        else:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _closed(self.path, error) from error
            strangers = sorted(name for name in os.listdir(self.path) if not name.startswith((TEMPORARY, LOCK, JOB)))
            if strangers and MANIFEST not in strangers:
                message = (
                    f"{self.path} is not empty ({strangers[0]}, …) and is no upweight store. Name an empty or a new "
                    "folder."
                )
                raise InvalidInput(message)
            if not write_file(file, json.dumps(manifest, indent=1, sort_keys=True).encode(), once=True):
                _compare(_manifest(file), manifest, self.path)  # another part has just made it
        self.work = work_of(manifest)

    # ---- one writer --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Store:
        """Take the folder for this process; inside of itself it is taken already.

        Raises:
            StorageFailed: if another process has it.
            InvalidInput: if it may not be written.
        """
        self._depth += 1
        if self._depth > 1:
            return self
        self._depth = 0
        with ExitStack() as stack:
            if not self.follows:
                self._take(stack)
            if self.waiting:
                stack.enter_context(finishing())
            self._inside = stack.pop_all()
        self._depth = 1
        self._since = time.monotonic()
        if not self.follows:
            self.note("opened", pid=os.getpid(), host=platform.node(), part=self.part)
        return self

    @property
    def held(self) -> bool:
        """Whether this process has the folder: inside `with store:`."""
        return self._depth > 0

    def _take(self, stack: ExitStack) -> None:
        """Take the lock of the part, or of the whole, which no part may hold; then leftovers have no owner."""
        try:
            stack.enter_context(FileLock(self.path / f"{LOCK}{self.part}", timeout=0))
            others = [self.path / LOCK] if self.part else list(self.path.glob(f"{LOCK}-*"))
            for other in others:  # each side holds its own while it looks at the other's: one of them sees the other
                with FileLock(other, timeout=_LOOK if self.part else 0):  # another part may look at this moment
                    pass
        except Timeout as error:
            held = Path(error.lock_file).name.removeprefix(LOCK)
            message = (
                f"{self.path} is being written by another process{_writer(self.path, held)}. Wait until it has ended, "
                "or name another folder."
            )
            raise StorageFailed(message) from error
        except OSError as error:
            raise _closed(self.path, error) from error
        if not self.part:
            for leftover in self.path.glob(f"{TEMPORARY}*"):  # of a process that died
                leftover.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._last is not None:
            self._last.settle()
        if error is None and not self.follows:
            self.note("finished")
        elif error is not None:
            self.note("stopped" if isinstance(error, Stopped) else "failed", why=first_line(error))
        if self._inside is not None:
            self._inside.__exit__(kind, error, trace)

    def note(self, event: str, **told: Any) -> None:
        """One more line of events.jsonl: when, how long after the folder was opened, what happened, what is told."""
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "seconds": round(time.monotonic() - self._since, 3), "event": event, **told}
        with suppress(OSError), (self.path / EVENTS).open("a", encoding="utf-8") as file:  # what is noted is no result
            file.write(json.dumps(line) + "\n")

    # ---- chunks ------------------------------------------------------------------------------------------------------

    def __contains__(self, chunk: int) -> bool:
        return self.has(chunk_name(chunk))

    def write(self, chunk: int, values: NDArray[np.float64]) -> None:
        """Keep a finished chunk."""
        self.keep(chunk_name(chunk), {"values": values}, event="chunk", number=chunk)

    def passing(self, chunk: int, rows: int, parts: Iterable[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
        """The parts of a chunk of so many rows, which is kept when the last of them has passed by."""
        name, file = chunk_name(chunk), None
        try:
            for part in parts:
                if file is None:
                    card = {WORK: self.work, NAME: name}
                    file = Growing(self._named(name), "values", (rows, *part.shape[1:]), card)
                file.add(part)
                yield part
            if file is not None:
                file.finish()
                self._last = file
        except BaseException:
            if file is not None:
                file.drop()
            raise
        self.note("chunk", name=name, number=chunk)

    def read(self, chunk: int) -> NDArray[np.float64]:
        """A chunk that was kept."""
        return self.kept(chunk_name(chunk))[0]["values"]

    # ---- any part ----------------------------------------------------------------------------------------------------

    def keep(
        self,
        name: str,
        arrays: Mapping[str, NDArray[Any]],
        card: Mapping[str, Any] | None = None,
        *,
        event: str = "kept",
        once: bool = False,
        **told: Any,
    ) -> bool:
        """Keep arrays, and what is told of them, under a name of this work; whether they are what is kept now.

        With `once` what another process has kept there, maybe at this moment, stays.
        """
        whole = {**(card or {}), WORK: self.work, NAME: name}
        written = write_tensors(self._named(name), arrays, whole, once=once)
        if written:
            self.note(event, name=name, **told)
        return written

    def kept(self, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays that were kept under a name, and what was told of them.

        Raises:
            Damaged: if they are not what was written, or were written under another name or for other work.
        """
        return read_part(self._named(name), self.work)

    def drop(self, name: str) -> None:
        """What was kept under a name is needed no more."""
        self._named(name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether something was kept under a name."""
        return self._named(name).exists()

    # ---- what the chunks are made from -------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, NDArray[np.float64]] | None:
        """Where an iteration had come to: its solutions, or what it kept last; None if it kept nothing."""
        kept = self.kept(self._state)[0] if self.has(self._state) else None
        return {**(kept or {}), "x": self.solutions} if self.has(SOLUTIONS) else kept

    @property
    def solutions(self) -> NDArray[np.float64]:
        """What the chunks were computed with."""
        return self.kept(SOLUTIONS)[0][SOLUTIONS]

    def keep_state(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep where an iteration has come to, in place of what was kept before."""
        self.keep(self._state, state)

    def end_state(self, settled: Mapping[str, NDArray[np.float64]]) -> None:
        """The iteration has ended, and its solutions are kept; of its state only how far their values had settled."""
        if settled:
            self.keep_state(settled)
        else:
            self._named(self._state).unlink(missing_ok=True)

    @property
    def estimates(self) -> dict[str, NDArray[Any]] | None:
        """What a stochastic solver has made, finished ones and one in the making; None if it kept nothing."""
        name = f"{ESTIMATES}{self.part}"
        return self.kept(name)[0] if self.has(name) else None

    def keep_estimates(self, estimates: Mapping[str, NDArray[Any]]) -> None:
        """Keep these in place of what was kept before."""
        self.keep(f"{ESTIMATES}{self.part}", estimates)

    def sum(self, name: str) -> tuple[NDArray[np.float64] | None, int]:
        """The nodes of a sum over the rows as far as it has come (`runs.sums`), and how many chunks are in them."""
        if not self.has(f"sum-{name}"):
            return None, 0
        arrays, card = self.kept(f"sum-{name}")
        return arrays["nodes"], int(card["chunks"])

    def keep_sum(self, name: str, nodes: NDArray[np.float64], chunks: int) -> None:
        """Keep the nodes of a sum over the rows of so many chunks, in place of what was kept before."""
        self.keep(f"sum-{name}", {"nodes": nodes}, {"chunks": chunks}, chunks=chunks)

    def once(
        self, name: str, compute: Callable[[], Mapping[str, NDArray[Any]]], card: Mapping[str, Any] | None = None
    ) -> Mapping[str, NDArray[Any]]:
        """What was kept under `name`, or what `compute` gives, kept now with what is told of it."""
        if self.has(name):
            return self.kept(name)[0]
        arrays = compute()
        return arrays if self.keep(name, arrays, card, once=True) else self.kept(name)[0]

    def agree(self, name: str, array: NDArray[np.float64], rtol: float) -> NDArray[np.float64]:
        """What was kept under `name`, or `array`, kept now: what the chunks depend on but a hash cannot compare.

        Raises:
            StoreMismatch: if what was kept differs from `array` by more than rounding.
        """
        if not self.has(name) and self.keep(name, {name: array}, once=True):
            return array
        kept = self.kept(name)[0][name]
        if kept.shape == array.shape:
            apart = np.where(np.isnan(kept) & np.isnan(array), 0.0, kept - array)  # a query may have no solution
            gap = float(np.linalg.norm(apart)) / max(float(np.linalg.norm(np.nan_to_num(array))), 1e-300)
            if gap <= rtol:
                return kept
            found = f"differ by {gap:.2g} (relative)"
        else:
            found = f"have shape {kept.shape} there and {array.shape} now"
        message = (
            f"{self.path} holds the results of other work: its {name.replace('_', ' ')} {found}. Name another folder, "
            "or delete this one to start again."
        )
        raise StoreMismatch(message)

    @property
    def _state(self) -> str:
        """Parts that solve at the same time keep states of their own."""
        return f"{STATE}{self.part}"

    def _named(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"


def chunk_name(chunk: int) -> str:
    """What a chunk is called: in the order of their numbers also as texts."""
    return f"chunk-{chunk:06d}"


def read_work(folder: Path) -> str:
    """The work of a folder that holds a store, by its manifest.

    Raises:
        StoreMismatch: if the manifest cannot be read.
    """
    return work_of(_manifest(folder / MANIFEST))


def fingerprint(folder: Path) -> dict[str, Any]:
    """What the work in a folder is.

    Raises:
        StoreMismatch: if its manifest cannot be read.
    """
    return _manifest(folder / MANIFEST).get("fingerprint", {})


def work_of(manifest: Mapping[str, Any]) -> str:
    """The work of a folder, in a few letters that stand in every file of it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def read_part(file: Path, work: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a file of a store, and what is told of them, if it is whole and lies where it was written.

    Raises:
        Damaged: if it is not.
    """
    arrays, card = read_tensors(file)
    there = card.pop(WORK, None), card.pop(NAME, None)
    name = file.name.removesuffix(SUFFIX)
    if there != (work, name):
        message = (
            f"{file} was written as {there[1]} of work {there[0]}, and stands as {name} of work {work}: it was copied "
            "or renamed. Delete it, and compute it again."
        )
        raise Damaged(message)
    return arrays, card


def _writer(folder: Path, part: str) -> str:
    """Who opened a folder last for that part, as far as that can be read."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = (folder / EVENTS).read_text(encoding="utf-8").splitlines()
        opened = [told for told in map(json.loads, lines) if told["event"] == "opened" and told["part"] == part][-1]
        return f" (number {opened['pid']} on {opened['host']}, since {opened['time']})"
    return ""


def _closed(folder: Path, error: OSError) -> InvalidInput:
    """What is said of a folder that cannot be written."""
    return InvalidInput(
        f"{folder} cannot be written ({error.strerror}). Name a folder that you may write to; what is in this one, "
        f"uw.Run.open({str(folder)!r}) reads."
    )


def _folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        message = f"store={path!r}. It is a folder for finished chunks: pass its path, or None to keep nothing."
        raise InvalidInput(message)
    folder = Path(path)
    found = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if found is not None and not found.is_dir():
        message = f"{found} is a file, and a store is a folder. Name another path."
        raise InvalidInput(message)
    return folder


def _manifest(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        message = f"{file} is no manifest of a store ({error}). Delete the folder to start again, or name another."
        raise StoreMismatch(message) from error
    return found if isinstance(found, dict) and isinstance(found.get("fingerprint"), dict) else {}


def _compare(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    old = {"format": found.get("format"), **found.get("fingerprint", {})}
    new = {"format": wanted["format"], **wanted["fingerprint"]}
    differences = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        message = (
            f"{path} holds the results of other work. Different: {'; '.join(differences)}. Name another folder, or "
            "delete this one to start again."
        )
        raise StoreMismatch(message)
