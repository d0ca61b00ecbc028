"""Where results are to go, checked before the work that makes them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from upweight.errors import InvalidInput, require


def check_file(file: Path, option: str, example: str = "results", *, overwrite: bool = True) -> None:
    """Raises for a file that could not be written.

    Args:
        file: where; folders that are missing will be made.
        option: the option that named it.
        example: a name that would do.
        overwrite: whether it may take the place of a file that is there.

    Raises:
        InvalidInput: if it is a folder, or its folder is a file, or may not be written to; or if it is there already.
    """
    if file.is_dir():
        message = f"{option} {file} is a folder, and a file is wanted. Name one, such as {file / example}."
        raise InvalidInput(message)
    if file.exists() and not overwrite:
        message = (
            f"{option} {file} is there already, and somebody may have worked in it. Name another place, or add "
            "--overwrite."
        )
        raise InvalidInput(message)
    check_folder(file.parent, option)


def check_folder(folder: Path, option: str) -> None:
    """Raises for a folder that files could not be written into.

    Args:
        folder: it, or one to be made.
        option: the option that named it.

    Raises:
        InvalidInput: if it, or one above it, is a file or may not be written to.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        message = f"{option} needs the folder {folder}, and {there} is a file. Name another place."
        raise InvalidInput(message)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        message = f"{option} needs to write into {there}, and cannot ({error.strerror}). Name another place."
        raise InvalidInput(message) from error


def checked_part(
    out: Path | None, store: Path | None, shard: str | None, top: int | None = None
) -> tuple[int, int] | None:
    """(i, n) of `--shard i/n`, or None for all, which needs a file.

    Raises:
        InvalidInput: if it is no such part, or has no store, or a file or `--top` beside it; or if it is None and
            there is no file.
    """
    if shard is None:
        if out is None:
            message = "Nothing says where the scores shall go. Add --out scores.safetensors."
            raise InvalidInput(message)
        return None
    part = named_part(shard)
    if store is None or out is not None or top is not None:
        message = (
            f"--shard {shard} computes a part of the scores, which goes into a store and not into a file. Write "
            f"--store FOLDER --shard {shard} without --out or --top, and when all have ended: upweight merge FOLDER "
            "--out FILE."
        )
        raise InvalidInput(message)
    return part


def named_part(shard: str) -> tuple[int, int]:
    """(i, n) of `--shard i/n`.

    Raises:
        InvalidInput: if it is no such part.
    """
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        message = f"--shard {shard} is no part. Write i/n with 0 ≤ i < n: --shard 0/4 is the first of four."
        raise InvalidInput(message)
    return int(i), int(n)


def check_picture(file: Path, option: str) -> None:
    """Raises for a picture that could not be written.

    Args:
        file: where; its suffix says the format.
        option: the option that named it.

    Raises:
        InvalidInput: if matplotlib writes no files of this suffix, or the file cannot be written.
        MissingExtra: if matplotlib is not installed.
    """
    check_file(file, option, "results.png")
    known = require("matplotlib.backend_bases", "plot").FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in known:
        message = f"{option} {file} does not end in a format of pictures, which are {', '.join(sorted(known))}. Name "
        raise InvalidInput(message + f"{file.with_suffix('.png')}, for example.")
