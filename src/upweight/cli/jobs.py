"""The job.toml of a command with --store: written beside what it keeps, and made a command again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.cli.outputs import check_folder
from upweight.errors import InvalidInput, UpweightError

if TYPE_CHECKING:  # nothing here may import torch before a command runs
    from upweight.runs.job import Job

SETTINGS = {  # what is told of a command besides places: all that a job.toml can set
    "score": ("top",),
    "run": ("parts", "folds"),
    "index": ("error", "bits"),
    "validate": ("query", "rows"),
    "contrast": ("query", "most", "refits"),
    "repair": ("label", "inspect", "by", "revert"),
    "attack": ("query", "rows", "level", "step", "iterations", "flip", "k", "seed"),
}


@contextmanager
def noted(store: Path | None, command: str, study: str, told: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a command works; what it was told is kept in its store, once the store is known to be its own.

    Args:
        store: its folder; nothing is noted without one.
        command: its name.
        study: what it was given as the study.
        told: its arguments by their names; those in `SETTINGS` are settings, paths are places.

    Raises:
        InvalidInput: if a new folder may not be written.
        StorageFailed: if the disk is full.
    """
    from upweight.runs import job, ranks
    from upweight.runs.stopping import Stopped

    if store is None or not ranks.first():
        yield
        return
    check_folder(store, "--store")
    made = _job(store, command, study, told)
    if job.is_fresh(store):
        store.mkdir(parents=True, exist_ok=True)
        job.write(store, made)
    try:
        yield
    except Stopped:
        _again(store, made)
        raise
    _again(store, made)


def _job(store: Path, command: str, study: str, told: Mapping[str, Any]) -> Job:
    """The job of a command."""
    from upweight.cli.study import file_of
    from upweight.runs import job

    return job.Job(
        command=command,
        study=study,
        sha256=job.file_digest(file_of(study)),
        folder=job.from_here(store),
        settings={name: told[name] for name in SETTINGS[command] if told[name] is not None},
        places={name: str(value) for name, value in told.items() if isinstance(value, Path) and name != "store"},
        versions=job.versions(),
    )


def _again(store: Path, made: Job) -> None:
    """The job that a folder had let go on stands there now; if it cannot be noted, the result is not lost for that."""
    from upweight.runs import job

    with suppress(OSError, UpweightError):
        try:
            there = job.read(store)
        except UpweightError:
            there = None
        if there != made:
            job.write(store, made)


def words(folder: Path, study: str, places: Mapping[str, Path]) -> list[str]:
    """The command that goes on in a folder: its settings are the folder's, the study and all places the user's.

    Raises:
        PathNotFound: if the folder has no job.
        Damaged: if its job cannot be read.
        InvalidInput: if it is of no command that keeps a folder, the study's file is not what it was, or a place is
            missing.
    """
    from upweight.cli.study import file_of
    from upweight.runs import job

    found = job.read(folder)
    known = SETTINGS.get(found.command)
    if known is None or not found.settings.keys() <= set(known):
        other = sorted(found.settings.keys() - set(known or ()))
        said = f"{found.command!r}" + (f" with {', '.join(other)}" if known is not None else "")
        message = (
            f"The job of {folder} is {said}, which no command of this version is that keeps a folder. Type the command "
            "itself."
        )
        raise InvalidInput(message)
    if missing := sorted(found.places.keys() - places.keys()):
        told = " ".join(f"--{name} {shlex.quote(found.places[name])}" for name in missing)
        message = (
            f"The job of {folder} was told {told}. Nothing is written or read where only a folder says so: add it, or "
            "another place, to the command."
        )
        raise InvalidInput(message)
    digest = job.file_digest(file_of(study))
    if digest != found.sha256:
        message = (
            f"{study} is not the study of {folder}, which was {found.study}, typed in "
            f"{os.path.normpath(folder / found.folder)}: the sha256 of its file was "
            f"{found.sha256[:12] or 'none'}…, and is {digest[:12] or 'none'}…. Name that study, or undo what was "
            f"changed in it. Where the change is meant, type the command itself, with --store {folder}: it goes on if "
            "the numbers are the same."
        )
        raise InvalidInput(message)
    if _asked_of(study, digest) != _asked_of(found.study, digest):
        message = (
            f"{study} names another function than {found.study}, of which the job of {folder} is. Name the same one; "
            f"for another study type its own command, with another --store than {folder}."
        )
        raise InvalidInput(message)
    settings = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in found.settings.items()
        if value is not False
    ]
    return [
        found.command,
        study,
        *settings,
        f"--store={folder}",
        *(f"--{name}={path}" for name, path in places.items()),
    ]


def _asked_of(study: str, digest: str) -> str:
    """What is asked of a study's file: the function behind the colon; of what has no file, the whole name."""
    function = study.rpartition(":")[2]
    return study if not digest else function if ":" in study and function.isidentifier() else ""
