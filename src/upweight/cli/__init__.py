"""The command line: `upweight COMMAND`; commands, the Study they work on, the demo, and how all of them end."""

from upweight.cli.entry import main

__all__ = ["main"]
