"""The entry point: a command from its words to its exit code, whatever comes in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from upweight.cli import endings


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; ends the process with the documented exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: `runs.threads`
    try:
        code = _code([word for word in words if word != "--debug"], debug)
    except BrokenPipeError:
        code = endings.CLOSED_PIPE
    _forget_what_cannot_be_written()
    if (ranks := sys.modules.get("upweight.runs.ranks")) is not None:  # it imports torch, which `--help` does without
        ranks.leave(code)
    sys.exit(code)


def _code(words: list[str], debug: bool) -> int:
    """The exit code of a command, after it ran and what went wrong was told.

    Raises:
        BrokenPipeError: if nobody reads stdout or stderr any more.
    """
    try:
        try:
            from upweight.cli import commands

            return commands.run(words)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return endings.told(error, debug, words)


def _forget_what_cannot_be_written() -> None:
    """Point a stream that was closed nowhere: Python would flush it again at its exit, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
