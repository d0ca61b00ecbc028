"""Files that exist whole or not at all, and say themselves whether they are what was written; the one door to the
safetensors format.

A file is written under a temporary name, flushed to the disk and renamed, and the folder is flushed. Numbers lie in
safetensors files, whose metadata hold one JSON text under `upweight`: what is told of the numbers, and the sha256 of
both. One key, because the format leaves the order of several open, and then equal files have different bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors, save as save_tensors

from upweight.errors import Damaged, InvalidInput, PathNotFound, StorageFailed
from upweight.runs.machine import in_bytes

CARD, DIGEST = "upweight", "sha256"
TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_file(path: Path, content: bytes, *, once: bool = False) -> bool:
    """Write a file so that it exists either whole or not at all, also after a loss of power; whether this call did.

    Args:
        path: of the file.
        content: all of it.
        once: leave a file that is there, also if another process writes it at this moment.

    Raises:
        PathNotFound: if the folder does not exist.
        InvalidInput: if the path is a folder, or may not be written.
        StorageFailed: if the disk is full.
    """
    if not path.parent.is_dir():
        message = f"There is no folder {path.parent} to write {path.name} into. Create it first."
        raise PathNotFound(message)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written = _named(temporary, path, once=once)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise said(path, error, len(content)) from error
    return written


def write_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    card: Mapping[str, Any] | None = None,
    *,
    once: bool = False,
) -> bool:
    """Arrays, and what is told of them, in one safetensors file: written whole or not at all, with its sha256.

    Whether this call wrote it is returned.

    Args:
        path: of the file.
        arrays: by name.
        card: what JSON can hold.
        once: leave a file that is there.

    Raises:
        PathNotFound, InvalidInput, StorageFailed: as for `write_file`.
    """
    whole = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    told = json.loads(json.dumps(dict(card or {})))
    text = json.dumps({**told, DIGEST: digest(whole, told)}, sort_keys=True)
    return write_file(Path(path), save_tensors(whole, metadata={CARD: text}), once=once)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a safetensors file, and what it tells of them, if they are what was written.

    Files of version 0.1 carry no sha256, and are taken as they are.

    Raises:
        PathNotFound: if there is no such file.
        Damaged: if the file is no safetensors file, or its content is not what was written.
    """
    file = Path(path)
    if not file.is_file():
        message = f"There is no file at {file}. Scores are written by scores.save(path)."
        raise PathNotFound(message)
    try:
        content = file.read_bytes()
        arrays = load_tensors(content)
        told = _told(content)
        wanted = told.pop(DIGEST, None)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"{file} is not a safetensors file, or is damaged ({error}). Delete it, and compute it again."
        raise Damaged(message) from error
    if wanted is not None and wanted != digest(arrays, told):
        message = (
            f"{file} is damaged: its content is not what was written (sha256 {str(wanted)[:12]}…). Disks and copies "
            "that stop half-way do that. Delete it, and compute it again."
        )
        raise Damaged(message)
    return arrays, told


def digest(arrays: Mapping[str, NDArray[Any]], card: Mapping[str, Any]) -> str:
    """The sha256 of arrays and what is told of them: of a JSON text of both, and the arrays' bytes by their names."""
    found = summary({name: (array.dtype.str, array.shape) for name, array in arrays.items()}, card)
    for name in sorted(arrays):
        found.update(arrays[name].reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def summary(shapes: Mapping[str, tuple[str, tuple[int, ...]]], card: Mapping[str, Any]) -> Any:
    """The beginning of that sha256: of types and shapes, and what is told; the bytes of the arrays are missing yet."""
    told = {name: [kind, list(shape)] for name, (kind, shape) in shapes.items()}
    return hashlib.sha256(json.dumps({"arrays": told, "card": card}, sort_keys=True).encode())


def temporary_name(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(f"{TEMPORARY}{path.name}-{socket.gethostname()}-{os.getpid()}")


def check_room(folder: Path, needed: int) -> None:
    """Refuse to start what the disk has no room for.

    Args:
        folder: where it will be written; it need not exist.
        needed: bytes.

    Raises:
        StorageFailed: if fewer are free.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        message = (
            f"{folder} would take {in_bytes(needed)}, and its disk has {in_bytes(free)} left. Nothing was computed. "
            "Name a folder on another disk, make room, or ask fewer queries at once."
        )
        raise StorageFailed(message)


def _told(content: bytes) -> dict[str, Any]:
    """The JSON text in the metadata of a safetensors file that was read already, {} if it holds none."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    return dict(json.loads(metadata[CARD])) if CARD in metadata else {}


def _named(temporary: Path, path: Path, *, once: bool) -> bool:
    """Give a file that is written its name, unless `once` is asked for and another has it; whether it got it."""
    if once:
        try:
            os.link(temporary, path)
        except FileExistsError:
            temporary.unlink()
            return False
        except OSError:  # a file system without hard links
            pass
        else:
            temporary.unlink()
            return True
    temporary.replace(path)
    return True


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network disks have no such call, and order renames themselves
        pass
    finally:
        os.close(handle)


def said(path: Path, error: OSError, size: int) -> Exception:
    """What is said of a file that cannot be written."""
    if error.errno in _FULL:
        free = shutil.disk_usage(path.parent).free
        return StorageFailed(
            f"The disk is full: {path} takes {in_bytes(size)}, and {in_bytes(free)} are left. What was finished is "
            "kept. Make room, and repeat the same call: it goes on from there."
        )
    if isinstance(error, IsADirectoryError | NotADirectoryError | PermissionError) or error.errno == errno.EROFS:
        return InvalidInput(
            f"{path} cannot be written ({error.strerror}). Name a file, in a folder that you may write to."
        )
    return error
