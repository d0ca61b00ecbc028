"""The command line: `upweight COMMAND`; commands, the Study they work on, the demo, and the console they share."""

from upweight.cli.commands import main

__all__ = ["main"]
