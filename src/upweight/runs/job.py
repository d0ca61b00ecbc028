"""job.toml: the command that made a folder, as a note to be read, never as something to be run.

    format = 1
    command = "score"
    study = "study.py:digits"
    sha256 = "9f86…"         of the study's file; "" where it has none
    folder = ".."            where the command was typed, from here

    [settings]               what the command was told beside places
    top = 20

    [places]                 files it was told, as they were typed: for people, never opened
    out = "scores.safetensors"

    [versions]
    upweight = "0.2.0"

A folder may come from a stranger. What is read here is compared and shown; the study's code and every place that is
read or written are named by whoever goes on (`upweight resume`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from upweight.errors import Damaged, PathNotFound, first_line
from upweight.runs.files import TEMPORARY, write_file
from upweight.runs.store import JOB, LOCK

FORMAT = 1
_LARGEST = 65536  # bytes of a job.toml
_TABLES = ("settings", "places", "versions")
_TEXTS = ("command", "study", "sha256", "folder")
Setting = str | int | float | bool


@dataclass(frozen=True)
class Job:
    """What a command was told.

    Args:
        command: its name.
        study: what it was given as the study, or as the table.
        sha256: of the file that holds it; "" where there is none.
        folder: where it was typed, from the folder that keeps it.
        settings: by their names, but for what is None.
        places: files it was told, by the names of their options.
        versions: of what it ran with.
    """

    command: str
    study: str
    sha256: str
    folder: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a number depends on."""
    found = {name: version(name) for name in ("upweight", "torch", "numpy")}
    return {"python": platform.python_version(), **found}


def from_here(folder: Path) -> str:
    """The working folder, as seen from another one."""
    try:
        return Path(os.path.relpath(Path.cwd(), folder.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return Path.cwd().as_posix()


def file_digest(file: Path | None) -> str:
    """The sha256 of a file, "" of none."""
    if file is None:
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_fresh(folder: Path) -> bool:
    """Whether a folder is not there yet, or holds nothing but a job that never began."""
    try:
        return all(name.startswith((TEMPORARY, LOCK, JOB)) for name in os.listdir(folder))
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def write(folder: Path, job: Job) -> None:
    """Keep the job of a folder, in place of the one that was there.

    Raises:
        InvalidInput: if the folder may not be written.
        StorageFailed: if the disk is full.
    """
    head = {"format": FORMAT, **{name: getattr(job, name) for name in _TEXTS}}
    lines = [f"{name} = {_toml(value)}" for name, value in head.items()]
    for table in _TABLES:
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in getattr(job, table).items())]
    write_file(folder / JOB, "\n".join([*lines, ""]).encode("utf-8", "replace"))


def read(folder: Path) -> Job:
    """The job of a folder.

    Raises:
        PathNotFound: if it has none.
        Damaged: if it is no job, or one of another format.
    """
    file = folder / JOB
    if not file.is_file():
        message = (
            f"{folder} has no {JOB}, which commands with --store leave there, but shards and calls in a script do not. "
            "Make the same call again, or type the same command: it goes on from what is there."
        )
        raise PathNotFound(message)
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            reason = f"more than {_LARGEST:,} bytes"
        else:
            told = tomllib.loads(content.decode())
            if (reason := _wrong(told)) is None:
                return Job(**{name: told[name] for name in (*_TEXTS, *_TABLES)})
    except (ValueError, RecursionError) as error:  # of TOML and of UTF-8 too
        reason = first_line(error) or type(error).__name__
    message = f"{file} is no job that this version can read ({reason}). Type the command itself, with --store {folder}."
    raise Damaged(message)


def _wrong(told: dict[str, Any]) -> str | None:
    """What is wrong with the content of a job.toml, if anything."""
    if told.get("format") != FORMAT:
        return f"format {told.get('format')!r}, not {FORMAT}"
    if any(not isinstance(told.get(name), str) for name in _TEXTS):
        return f"one of {', '.join(_TEXTS)} is no text"
    if any(not isinstance(told.get(name), dict) for name in _TABLES):
        return f"one of {', '.join(_TABLES)} is no table"
    if any(not isinstance(value, Setting) for value in told["settings"].values()):
        return "a setting is neither a text nor a number"
    if any(not isinstance(value, str) for name in ("places", "versions") for value in told[name].values()):
        return "a place or a version is no text"
    return None


def _toml(value: Setting) -> str:
    """A value as TOML has it, whose strings are JSON's but for U+007F."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
