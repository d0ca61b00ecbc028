"""A Study: what the function that a command names returns; and how it is found, by its module or its file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from upweight.cli.endings import StudyFailed
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
        card: from a training row's number to what it looks like in a run folder, as `write_run` takes it; left out, by
            its columns or its picture, and otherwise by `describe`'s words.
        query_card: the same of the queries.
    """

    influence: Influence
    queries: tuple[Any, ...]
    retrain: Any = None
    describe: Callable[[int], str] | None = None
    card: Callable[[int], Any] | None = None
    query_card: Callable[[int], Any] | None = None


def load(name: str) -> Study:
    """The Study that `file.py:function` or `module:function` returns.

    A module is looked for in the working directory first. What the study prints goes to stderr.

    Raises:
        InvalidInput: if the name has no colon, or the function is missing, needs arguments or returns something else.
        PathNotFound: if there is no such module or file.
        StudyFailed: if the code of the study raises anything.
    """
    place, colon, function_name = name.rpartition(":")
    if not place or not colon or not function_name:
        of = name if name.endswith(".py") else "my_study"
        message = (
            f"'{name}' does not name a function. Write file.py:function or module:function, for example {of}:digits, "
            "where digits() returns an upweight.Study."
        )
        raise InvalidInput(message)
    with redirect_stdout(sys.stderr):  # stdout is for results
        module = _from_file(place, name) if place.endswith(".py") or os.sep in place else _from_path(place, name)
        function = _function(module, place, function_name)
        try:
            study = function()
        except (Exception, SystemExit) as error:
            raise StudyFailed(name) from error
    if not isinstance(study, Study):
        message = f"{name}() returned a {type(study).__name__}. Return upweight.Study(influence, (Xq, yq))."
        raise InvalidInput(message)
    return study


def cards(study: Study) -> tuple[Any, Any]:
    """What rows and queries of a study look like in a run folder, for `write_run`; None where they have columns."""
    plain = study.influence.examples.x
    seen = isinstance(plain, Tensor | np.ndarray) and plain.dtype != object
    return study.card or (None if seen else study.describe), study.query_card


def file_of(name: str) -> Path | None:
    """The file that holds the function, without importing it; None where there is none.

    A package in which a module lies is imported.
    """
    place = name.rpartition(":")[0] or name
    if place.endswith(".py") or os.sep in place:
        file = Path(place)
    else:
        _look_here()
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            return None
        if found is None or found.origin is None:
            return None
        file = Path(found.origin)
    return file if file.is_file() else None


def _look_here() -> None:
    """Modules are looked for in the working directory first."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _from_path(module: str, name: str) -> ModuleType:
    """The module of this name, from the working directory or any other place on the import path.

    Raises:
        PathNotFound: if there is none.
        StudyFailed: if it cannot be imported.
    """
    _look_here()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise StudyFailed(name) from error
        message = (
            f"There is no module '{error.name}' on the path. Run from the folder that holds "
            f"{module.replace('.', '/')}.py, or name the file: path/to/file.py:function."
        )
        raise PathNotFound(message) from error
    except (Exception, SystemExit) as error:
        raise StudyFailed(name) from error


def _from_file(place: str, name: str) -> ModuleType:
    """The module of a file; it can import its neighbours, and they and pickles find it under the file's name.

    A file that is called as another module, such as random.py, gets a name of its own, and its folder comes last on the
    import path: everybody else shall find the other.

    Raises:
        PathNotFound: if there is no such file.
        StudyFailed: if it cannot be imported.
    """
    file = Path(place).resolve()
    if not file.is_file() or file.suffix != ".py":
        message = (
            f"There is no Python file at {file}. Write the path of the file that holds the function, with its .py."
        )
        raise PathNotFound(message)
    free = _is_free(file)
    folders = str(file.parent), str(Path.cwd())
    sys.path[:] = [folders[0], *sys.path, folders[1]] if free else [*sys.path, *folders]
    spec = importlib.util.spec_from_file_location(file.stem if free else "study_" + re.sub(r"\W", "_", file.stem), file)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise StudyFailed(name) from error
    return module


def _is_free(file: Path) -> bool:
    """Whether the stem of a file can be the name of its module: nothing else is imported by it."""
    try:
        found = importlib.util.find_spec(file.stem) if "." not in file.stem else None
    except ValueError:  # __main__
        return False
    return "." not in file.stem and (found is None or found.origin in (None, str(file)))


def _function(module: ModuleType, place: str, name: str) -> Callable[[], Any]:
    """The function of this name, which can be called without arguments.

    Raises:
        InvalidInput: if there is none, or it needs arguments.
    """
    function = getattr(module, name, None)
    if not callable(function):
        message = f"'{place}' has no function '{name}'. {_instead(module, place, name)}"
        raise InvalidInput(message)
    if needed := _needed(function):
        message = (
            f"{place}:{name} needs {', '.join(needed)}, and the command line calls it without arguments. Give every "
            f"argument of {name} a default, or name a function without any."
        )
        raise InvalidInput(message)
    return function


def _instead(module: ModuleType, place: str, name: str) -> str:
    """What to type instead of a function that is not there."""
    file = Path(f"{place}.py")
    if file.is_file() and getattr(module, "__file__", None) != str(file.absolute()):
        return f"Another module of this name comes before the file in this folder; write {file}:{name}."
    others = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if not others:
        return f"Write one into it: {name}() returns an upweight.Study."
    callable_so = next((key for key in others if not _needed(getattr(module, key))), others[0])
    return f"It has {', '.join(others)}; write {place}:{callable_so}, for example."


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments that a call must have, as far as Python can tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    free = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [one.name for one in parameters if one.default is one.empty and one.kind not in free]
