"""A folder of finished chunks and a manifest; also the one door to the safetensors format.

    run/
    ├── manifest.json            what the work is: format, fingerprint, rows per chunk, number of rows
    ├── state.safetensors        where the iteration that solves the systems has come to
    ├── solutions.safetensors    what the chunks were computed with; compared, and used again, by the next run
    ├── chunk-000000.safetensors  a chunk file that exists is complete
    └── chunk-000001.safetensors

Every file is written under a temporary name, flushed to the disk, and renamed; a crash at any moment leaves only whole
chunks. Opening a folder with another fingerprint is an error that lists the differences, never a silent reuse.
Nothing in a folder is ever executed: there are no pickles.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors, save as save_tensors

from upweight.errors import InvalidInput, PathNotFound, StoreMismatch

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.safetensors"
SOLUTIONS, SETTLED = "solutions", "settled"


class Store:
    """Chunks of one piece of work, kept in a folder so that the work can be interrupted and resumed.

    Args:
        path: the folder; created if it does not exist.
        fingerprint: what the work is; every value must survive JSON.

    Raises:
        StoreMismatch: if the folder holds other work.
        InvalidInput: if the folder is not empty and holds no store.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        self.path = _folder(path)
        manifest = {"format": FORMAT, "fingerprint": json.loads(json.dumps(dict(fingerprint)))}
        file = self.path / MANIFEST
        if file.exists():
            _compare(_manifest(file), manifest, self.path)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".tmp-"))
            if MANIFEST in strangers:  # another shard has just made it
                _compare(_manifest(file), manifest, self.path)
            elif strangers:
                message = (
                    f"{self.path} is not empty ({strangers[0]}, …) and is no upweight store. Name an empty or a new "
                    "folder."
                )
                raise InvalidInput(message)
            else:
                write_file(file, json.dumps(manifest, indent=1, sort_keys=True).encode())

    def __contains__(self, chunk: int) -> bool:
        return self._file(chunk).exists()

    def write(self, chunk: int, values: NDArray[np.float64]) -> None:
        """Keep a finished chunk."""
        write_tensors(self._file(chunk), {"values": values})

    def read(self, chunk: int) -> NDArray[np.float64]:
        """A chunk that was kept."""
        return read_tensors(self._file(chunk))[0]["values"]

    @property
    def state(self) -> dict[str, NDArray[np.float64]] | None:
        """Where an iteration had come to: its solutions, or what it kept last; None if it kept nothing."""
        done, file = self.path / f"{SOLUTIONS}.safetensors", self.path / STATE
        kept = read_tensors(file)[0] if file.exists() else None
        return {**(kept or {}), "x": read_tensors(done)[0][SOLUTIONS]} if done.exists() else kept

    def keep_state(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep where an iteration has come to, in place of what was kept before."""
        write_tensors(self.path / STATE, state)

    @property
    def solutions(self) -> NDArray[np.float64]:
        """What the chunks were computed with."""
        return read_tensors(self.path / f"{SOLUTIONS}.safetensors")[0][SOLUTIONS]

    def end_state(self, settled: NDArray[np.float64] | None) -> None:
        """The iteration has ended, and its solutions are kept; of its state only how far their values had settled."""
        if settled is None:
            (self.path / STATE).unlink(missing_ok=True)
        else:
            self.keep_state({SETTLED: settled})

    def agree(self, name: str, array: NDArray[np.float64], rtol: float) -> NDArray[np.float64]:
        """What was kept under `name`, or `array`, kept now: what the chunks depend on but a hash cannot compare.

        Raises:
            StoreMismatch: if what was kept differs from `array` by more than rounding.
        """
        file = self.path / f"{name}.safetensors"
        if not file.exists() and _written_once(file, save_tensors({name: np.ascontiguousarray(array)})):
            return array
        kept = read_tensors(file)[0][name]
        if kept.shape == array.shape:
            apart = np.where(np.isnan(kept) & np.isnan(array), 0.0, kept - array)  # queries without a solution are NaN
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

    def _file(self, chunk: int) -> Path:
        return self.path / f"chunk-{chunk:06d}.safetensors"


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it exists either whole or not at all.

    Raises:
        PathNotFound: if the folder does not exist.
        InvalidInput: if the path is a folder, or may not be written.
    """
    if not path.parent.is_dir():
        message = f"There is no folder {path.parent} to write {path.name} into. Create it first."
        raise PathNotFound(message)
    temporary = path.with_name(f".tmp-{path.name}-{socket.gethostname()}-{os.getpid()}")  # of one machine or another
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        temporary.unlink(missing_ok=True)
        message = f"{path} cannot be written ({error.strerror}). Name a file, in a folder that you may write to."
        raise InvalidInput(message) from error


def fingerprint(folder: Path) -> dict[str, Any]:
    """What the work in a folder is.

    Raises:
        StoreMismatch: if its manifest cannot be read.
    """
    return _manifest(folder / MANIFEST).get("fingerprint", {})


def _written_once(path: Path, content: bytes) -> bool:
    """Whether this process wrote the file; False if another did before, whose content stays."""
    own = path.with_name(f".tmp-once-{path.name}-{socket.gethostname()}-{os.getpid()}")
    write_file(own, content)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    return True


def write_tensors(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Arrays and text in one safetensors file, written atomically."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_file(Path(path), save_tensors(whole, metadata=dict(metadata) if metadata else None))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays and the text of a safetensors file.

    Raises:
        PathNotFound: if there is no such file.
        InvalidInput: if the file is no safetensors file.
    """
    file = Path(path)
    if not file.is_file():
        message = f"There is no file at {file}. Scores are written by scores.save(path)."
        raise PathNotFound(message)
    try:
        with safetensors.safe_open(str(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
        return load_tensors(file.read_bytes()), metadata
    except safetensors.SafetensorError as error:
        message = f"{file} is not a safetensors file, or is damaged ({error}). Delete it, and compute it again."
        raise InvalidInput(message) from error


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
