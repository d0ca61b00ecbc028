"""Every error and warning that upweight raises.

    UpweightError
    ├── InvalidInput         (ValueError)         data, labels, shapes or settings that cannot be used as given
    │   ├── NotFitted                             the estimator has no fitted parameters yet
    │   └── Damaged                               a file is not what was written
    ├── RowOutOfRange        (IndexError)         a training row or a query that does not exist
    ├── UnsupportedModel     (TypeError)          the theory, or this version, has no answer for this model
    ├── NotDeterministic     (RuntimeError)       the loss or the dataset gives another answer when asked again
    ├── Undefined            (ValueError)         the quantity does not exist for these scores or rows
    ├── SolverError          (ArithmeticError)    carries `.solution`, the work done so far
    │   ├── NotConverged                          the promised residual was not reached
    │   ├── NotPositiveDefinite                   curvature ≤ 0; carries `.suggested_damping`
    │   └── Diverged                              a stochastic recursion grew instead of settling
    ├── StoreMismatch        (ValueError)         a folder holds results of other work
    ├── StorageFailed        (OSError)            the disk is full, or another process writes there
    ├── Outdated             (RuntimeError)       a decision about what has changed meanwhile; carries `.meanwhile`
    ├── RankFailed           (RuntimeError)       another process of the same job failed, is lost, or does other work
    ├── PathNotFound         (FileNotFoundError)  nothing is at this path
    ├── MissingExtra         (ImportError)        an optional dependency is not installed
    └── WorkerError          (RuntimeError)       work could not be sent to a process, or the process ended

    TheoryWarning            (UserWarning)        the theory is being stretched; the message carries the number

A message has four parts: what happened, with which numbers, why it usually happens, and what to type next.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__all__ = [
    "Damaged",
    "Diverged",
    "InvalidInput",
    "MissingExtra",
    "NotConverged",
    "NotDeterministic",
    "NotFitted",
    "NotLocal",
    "NotPositiveDefinite",
    "Outdated",
    "PathNotFound",
    "RankFailed",
    "RowOutOfRange",
    "SolverError",
    "StorageFailed",
    "StoreMismatch",
    "TheoryWarning",
    "Undefined",
    "UnsupportedModel",
    "UpweightError",
    "WorkerError",
]


class UpweightError(Exception):
    """The base of every error that upweight raises on purpose."""


class InvalidInput(UpweightError, ValueError):
    """Data, labels, shapes or settings that cannot be used as given."""


class NotFitted(InvalidInput):
    """The estimator has no fitted parameters yet."""


class Damaged(InvalidInput):
    """A file is not what was written: some of its bits are others, or are missing."""


class RowOutOfRange(UpweightError, IndexError):
    """A training row or a query that does not exist."""


class UnsupportedModel(UpweightError, TypeError):
    """The theory, or this version of upweight, has no answer for this model."""


class NotDeterministic(UpweightError, RuntimeError):
    """The loss or the dataset gives another answer when asked again."""


class Undefined(UpweightError, ValueError):
    """The quantity does not exist for these scores or rows."""


class SolverError(UpweightError, ArithmeticError):
    """A linear solve failed; `solution` holds the work done so far (or None)."""

    def __init__(self, message: str, solution: Any = None) -> None:
        ArithmeticError.__init__(self, message)
        self.solution = solution


class NotConverged(SolverError):
    """The promised residual was not reached; continue from `error.solution.state`."""


class NotPositiveDefinite(SolverError):
    """C + λI has a direction of curvature ≤ 0; `suggested_damping` removes it (None when unknown)."""

    def __init__(self, message: str, solution: Any = None, suggested_damping: float | None = None) -> None:
        SolverError.__init__(self, message, solution)
        self.suggested_damping = suggested_damping


class Diverged(SolverError):
    """A stochastic recursion grew instead of settling."""


class NotLocal(UpweightError, ArithmeticError):
    """A derivative does not predict what small changes really do."""


class StoreMismatch(UpweightError, ValueError):
    """A folder holds the results of other work than the one now asked for."""


class StorageFailed(UpweightError, OSError):
    """The disk is full, or another process writes to the same folder."""


class Outdated(UpweightError, RuntimeError):
    """A decision about what has changed meanwhile; nothing was written. `meanwhile` is what happened."""

    def __init__(self, message: str, meanwhile: Any = None) -> None:
        RuntimeError.__init__(self, message)
        self.meanwhile = meanwhile


class RankFailed(UpweightError, RuntimeError):
    """Another process of the same job has failed, is lost, or does other work."""


class PathNotFound(UpweightError, FileNotFoundError):
    """Nothing is at this path."""


class MissingExtra(UpweightError, ImportError):
    """An optional dependency is not installed."""


class WorkerError(UpweightError, RuntimeError):
    """Work could not be sent to another process, or the process ended before its work did."""


class TheoryWarning(UserWarning):
    """The theory is being stretched: the model is not at a minimum, or a curvature is negative."""


def first_line(error: BaseException, length: int = 160) -> str:
    """The first line of an error's text, short enough to be quoted in another."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


def checked_count(value: Any, name: str, *, least: int = 1, hint: str = "") -> int:
    """`value` as a whole number ≥ `least`.

    Raises:
        InvalidInput: if it is anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        message = f"{name}={value!r}. It must be a whole number ≥ {least}" + (f"; {hint}." if hint else ".")
        raise InvalidInput(message)
    return int(value)


def require(module: str, extra: str) -> ModuleType:
    """The imported optional `module`, or a MissingExtra that names the extra to install.

    Raises:
        MissingExtra: if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = (
            f"{module.partition('.')[0]} is not installed, and this needs it. Install it with: pip install "
            f"'upweight[{extra}]'"
        )
        raise MissingExtra(message) from error
