"""Where results are to go, checked before the work that makes them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from upweight.errors import InvalidInput, require


def check_file(file: Path, option: str, example: str = "results") -> None:
    """Raises for a file that could not be written.

    Args:
        file: where; folders that are missing will be made.
        option: the option that named it.
        example: a name that would do.

    Raises:
        InvalidInput: if it is a folder, or its folder is a file, or may not be written to.
    """
    if file.is_dir():
        message = f"{option} {file} is a folder, and a file is wanted. Name one, such as {file / example}."
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
