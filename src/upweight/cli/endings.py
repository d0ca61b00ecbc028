"""How a command ends: the exit codes, and what stderr says of an error."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

DONE, BUG, USAGE, REFUSED, ASSUMPTIONS_FAIL, STUDY_FAILED = 0, 1, 2, 3, 4, 5
INTERRUPTED, CLOSED_PIPE, TERMINATED = 130, 141, 143  # 128 and the signal's number, as shells have it
CODES = {
    DONE: "done",
    BUG: "a bug of upweight",
    USAGE: "wrong usage",
    REFUSED: "an input, a file or a computation was refused, with the reason on stderr",
    ASSUMPTIONS_FAIL: (
        "`check` found that the theory's assumptions do not hold, or `doctor` a machine that does not compute alike"
    ),
    STUDY_FAILED: "the study's own code failed; stderr says where",
    INTERRUPTED: "interrupted by Ctrl-C; what a --store has finished is kept, and stderr says how to go on",
    CLOSED_PIPE: "the reader of stdout went away, as `head` does",
    TERMINATED: "ended by SIGTERM; the same is kept",
}


class StudyFailed(Exception):
    """The code of the study `name` raised what `__cause__` holds."""

    def __init__(self, name: str) -> None:
        Exception.__init__(self, name)
        self.name = name


def told(error: BaseException, debug: bool, words: Sequence[str] = ()) -> int:
    """The exit code for an error, which is told on stderr: in a line, and with its traceback if asked for.

    `words` are those of the command, which go on where a signal has ended it.
    """
    from upweight.errors import UpweightError
    from upweight.runs.stopping import Stopped

    study = error.name if isinstance(error, StudyFailed) else None
    error = error.__cause__ or error if isinstance(error, StudyFailed) else error
    traceback.clear_frames(error.__traceback__)  # progress bars that are still open go, and leave their line empty
    place = where(error) or (study and f"in {study}")
    if isinstance(error, SystemExit) and place is None:
        return int(error.code or DONE)  # how tyro ends, after its own words
    if debug:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        code, text = 128 + error.signal, f"{error}\nGo on: {shlex.join(['upweight', *words])}"
    elif isinstance(error, KeyboardInterrupt):
        code, text = INTERRUPTED, "Interrupted by Ctrl-C."
    elif place is not None:
        code, text = STUDY_FAILED, f"{_line(error)}\n  {place}  (the study's own code; --debug shows the traceback)"
    elif isinstance(error, UpweightError | OSError | MemoryError):
        code, text = REFUSED, f"{type(error).__name__}: {error}"
    else:
        code, text = BUG, f"{_line(error)} (A bug of upweight: run this again with --debug, and report what it prints.)"
    print("\n  ".join([text, *getattr(error, "__notes__", ())]), file=sys.stderr)
    return code


def _line(error: BaseException) -> str:
    """The kind of an error and what it says, in one line; a SyntaxError says its place elsewhere."""
    text = (error.msg if isinstance(error, SyntaxError) else str(error)) or "no message"
    return textwrap.shorten(f"{type(error).__name__}: {text}", 1000, placeholder=" …")


def where(error: BaseException) -> str | None:
    """`File "st.py", line 12, in study`: the innermost line of the user's own code that an error came through, if any.

    Where upweight says in its own words what the user's code raised, the line is that of the error behind them.
    """
    from upweight.errors import UpweightError

    if isinstance(error, UpweightError) and error.__cause__ is not None and (place := where(error.__cause__)):
        return place
    if isinstance(error, SyntaxError) and error.filename and _own(error.filename):
        return f'File "{_short(error.filename)}", line {error.lineno}'
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for code, line in reversed(frames):
        if _own(code.co_filename):
            return f'File "{_short(code.co_filename)}", line {line}, in {code.co_name}'
    return None


def _own(file: str) -> bool:
    """Whether a file is the user's own code: neither installed, nor Python's, nor upweight's."""
    path, library = Path(file), Path(os.__file__).parent
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    ours = Path(__file__).parents[1]
    return path.is_file() and not installed and not {library, ours} & set(path.parents)


def _short(file: str) -> str:
    """The path from the working directory, if it lies in there."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
