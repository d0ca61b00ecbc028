"""A Study: what a `module:function` on the command line returns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.errors import InvalidInput, PathNotFound
from upweight.influence.face import Influence


@dataclass(frozen=True)
class Study:
    """A model with its training data, the queries to explain, and how to train it again.

    Args:
        influence: from `explain(...)` or `Influence(...)`.
        queries: (Xq, yq).
        retrain: for `validate`; None takes the reference retrainer.
        describe: turns a training row into a few words for the tables; None shows its number only.
    """

    influence: Influence
    queries: tuple[Any, ...]
    retrain: Any = None
    describe: Callable[[int], str] | None = None


def load(name: str) -> Study:
    """The Study that `module:function` returns; the working directory is on the import path.

    Raises:
        InvalidInput: if the name has no colon, or the function is missing or returns something else.
        PathNotFound: if the module cannot be found.
    """
    module_name, colon, function_name = name.partition(":")
    if not module_name or not colon or not function_name:
        message = (
            f"'{name}' does not name a function. Write module:function, for example my_study:digits, where digits() "
            "returns an upweight.Study."
        )
        raise InvalidInput(message)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        message = (
            f"There is no module '{error.name}' on the path. Run from the folder that holds "
            f"{error.name.partition('.')[0]}.py, or install it."
        )
        raise PathNotFound(message) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        message = f"Module '{module_name}' has no function '{function_name}'."
        raise InvalidInput(message)
    study = function()
    if not isinstance(study, Study):
        message = f"{name}() returned a {type(study).__name__}. Return upweight.Study(influence, (Xq, yq))."
        raise InvalidInput(message)
    return study
