"""The identity of code: what a function or an object does, as a digest that every process gives alike."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

_KNOWN = {"builtins", "torch", "numpy", "scipy", "sklearn", "pandas", "upweight"}  # classes that their names tell apart


def digest(value: Any) -> str:
    """What a function does, as a digest that every process gives alike: no address is in it.

    Code, defaults, what it closes over and what it is bound to; of an object its class's methods and its numbers,
    texts, arrays and functions. Globals that a function reads, and weights of a module, are not told.
    """
    return hashlib.sha256(repr(_told(value, ())).encode()).hexdigest()[:12]


def _told(value: Any, above: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, str | bytes | int | float | complex | np.generic):
        return repr(value)
    if id(value) in above:
        return "itself"
    above = (*above, id(value))
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_varnames, [_told(part, above) for part in value.co_consts]]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
        return [str(value.dtype), value.shape, hashlib.sha256(content).hexdigest()]
    if isinstance(value, Mapping):
        return sorted((repr(name), _told(part, above)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return [_told(part, above) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_told(part, above)) for part in value)
    if isinstance(value, functools.partial):
        return [_told(part, above) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return [_told(value.__func__, above), _told(value.__self__, above)]
    if isinstance(value, FunctionType):
        cells = [_told(cell.cell_contents, above) if _filled(cell) else "" for cell in value.__closure__ or ()]
        given = [_told(part, above) for part in (value.__code__, value.__defaults__, value.__kwdefaults__)]
        return [value.__qualname__, given, cells]
    if isinstance(value, type):
        own = value.__module__.partition(".")[0] not in _KNOWN
        methods = {name: part for name, part in vars(value).items() if own and isinstance(part, FunctionType)}
        return [value.__qualname__, _told(methods, above)]
    return _object(value, above)


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _object(value: Any, above: tuple[int, ...]) -> Any:
    """Its class, and of its attributes those whose identity is their content."""
    if isinstance(value, torch.nn.Module):
        return [repr(value), [_told(kind, above) for kind in dict.fromkeys(type(part) for part in value.modules())]]
    name = getattr(value, "__qualname__", None)  # of a function that is written in C
    if isinstance(name, str):
        return f"{getattr(value, '__module__', '')}.{name}"
    if not hasattr(value, "__dict__"):
        return repr(value)  # a dtype, a range, a slice
    plain = str | bytes | int | float | complex | np.ndarray | torch.Tensor | list | tuple | dict | FunctionType
    kept = {name: part for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, plain)}
    return [_told(type(value), above), _told(kept, above)]
