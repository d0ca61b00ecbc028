"""What all commands share: the application, how a study is named, and how results are printed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:  # nothing here may import torch before a command runs
    from upweight.cli.study import Study

StudyName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.PY:FUNCTION")]
StudyOrTable = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.PY:FUNCTION|TABLE")]
Stores = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]
OptionOfStudy = Annotated[str, tyro.conf.arg(metavar="FILE.PY:FUNCTION|TABLE")]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
As = Annotated[str, tyro.conf.arg(name="as", metavar="KIND")]
K = Annotated[int, tyro.conf.arg(aliases=["-k"])]
NAMES: list[str] = []  # of the commands
app = tyro.extras.SubcommandApp()


def command(function: Callable[..., int]) -> Callable[..., int]:
    """A function as a command of its name."""
    NAMES.append(function.__name__)
    return app.command(function)


def load(name: str) -> Study:
    """The Study that `file.py:function` or `module:function` returns."""
    from upweight.cli import study

    return study.load(name)


def one(study: Study, query: int) -> tuple[Any, ...]:
    """The single query number `query`, as Examples of one row."""
    examples = study.influence.encoder.examples(*study.queries)
    return (examples.only(line(query, len(examples))),)


def line(query: int, count: int) -> int:
    """The same number.

    Raises:
        RowOutOfRange: if there is no such query.
    """
    from upweight.errors import RowOutOfRange

    if not 0 <= query < count:
        message = f"Query {query} does not exist: there are {count} queries, numbered 0 to {count - 1}."
        raise RowOutOfRange(message)
    return query


def show(numbers: dict[str, Any], text: str, as_json: bool) -> None:
    """Results on stdout, as text or as JSON."""
    print(json.dumps(_finite(numbers), indent=1, allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """The same nesting with null for numbers that do not exist: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
