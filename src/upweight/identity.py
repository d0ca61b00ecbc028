"""The identity of cached work: what scores depend on, and whether a folder's chunks were computed from the same."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from types import CellType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upweight import calculus, scoring
from upweight.examples import PROBE_ROWS, Examples
from upweight.solvers import Solution
from upweight.store import Store

if TYPE_CHECKING:
    from upweight.influence import Influence

_KNOWN = {"builtins", "torch", "numpy", "scipy", "sklearn", "pandas", "upweight"}  # classes that their names tell apart


def fingerprint(influence: Influence, queries: Examples, measure: str) -> dict[str, Any]:
    """What scores on these queries depend on: θ̂, a probe of the data, n, curvature, solver, damping, versions."""
    import upweight

    return {
        "theta": hashlib.sha256(influence.objective.theta.numpy().tobytes()).hexdigest()[:16],
        "data": influence.examples.fingerprint(),
        "queries": queries.fingerprint(),
        "n": influence.n,
        "objective": influence.objective.name,
        "measure": measure,
        "penalty_per_example": influence.objective.folded,
        "curvature": repr(influence.curvature),
        "solver": repr(influence.solver),
        "damping": influence.damping,
        "versions": f"upweight {upweight.__version__}, torch {torch.__version__}",
    }


def compared(influence: Influence, folder: Store, solution: Solution) -> Solution:
    """The solution that the folder's chunks were computed with, if this is the same work.

    What a hash cannot compare (losses, gradients, solutions that differ by rounding) is compared by value.
    """
    probe = influence.examples.batch(influence.examples.spread(PROBE_ROWS))
    folder.agree("losses", calculus.losses(influence.objective, probe).double().cpu().numpy(), 1e-6)
    folder.agree("penalty_gradient", influence.penalty_share.numpy(), 1e-6)
    scale = scoring.typical_row(influence.sweep)  # keeps a gradient that is 0 up to rounding comparable
    gradient = np.append(influence.risk_gradient.numpy(), scale)
    folder.agree("risk_gradient", gradient, 1e-3)
    rtol = min(1e-3, max(1e-6, 100 * float(solution.residual.max()))) if solution.replicas is None else 1e-6
    kept = folder.agree("solutions", solution.x.numpy(), rtol)
    return replace(solution, x=torch.from_numpy(kept))


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
