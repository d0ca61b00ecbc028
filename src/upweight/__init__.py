"""Influence functions: which training data made the model say that, and what would it say without them?

Names are loaded when first used, so that `import upweight` and `upweight --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight import adapters, calculus, datasets, defaults, diagnostics, errors, losses, operators, plots, solvers
    from upweight.adapters import explain
    from upweight.checks import Report
    from upweight.examples import Examples
    from upweight.influence import Influence
    from upweight.objective import L2, Linear, Objective
    from upweight.retrain import LBFGS, Newton, Refit, Retrain
    from upweight.scores import Certificate, Extremes, Scores, SelfScores, TopK, extremes
    from upweight.study import Study
    from upweight.validate import Agreement, Outcomes, agreement, leave_one_out

__version__ = "0.1.0"

__all__ = [
    "L2",
    "LBFGS",
    "Agreement",
    "Certificate",
    "Examples",
    "Extremes",
    "Influence",
    "Linear",
    "Newton",
    "Objective",
    "Outcomes",
    "Refit",
    "Report",
    "Retrain",
    "Scores",
    "SelfScores",
    "Study",
    "TopK",
    "adapters",
    "agreement",
    "calculus",
    "datasets",
    "defaults",
    "diagnostics",
    "errors",
    "explain",
    "extremes",
    "leave_one_out",
    "losses",
    "operators",
    "plots",
    "solvers",
]

_HOMES = {
    "L2": "objective",
    "LBFGS": "retrain",
    "Agreement": "validate",
    "Certificate": "scores",
    "Examples": "examples",
    "Extremes": "scores",
    "Influence": "influence",
    "Linear": "objective",
    "Newton": "retrain",
    "Objective": "objective",
    "Outcomes": "validate",
    "Refit": "retrain",
    "Report": "checks",
    "Retrain": "retrain",
    "Scores": "scores",
    "SelfScores": "scores",
    "Study": "study",
    "TopK": "scores",
    "agreement": "validate",
    "explain": "adapters",
    "extremes": "scores",
    "leave_one_out": "validate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"upweight.{_HOMES[name]}"), name)
        globals()[name] = value  # a function may share its module's name; the public name is the function
        return value
    if name in __all__:
        return importlib.import_module(f"upweight.{name}")
    message = f"module 'upweight' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
