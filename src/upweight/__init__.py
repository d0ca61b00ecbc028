"""Influence functions: which training data made the model say that, and what would it say without them?

Names are loaded when first used, so that `import upweight` and `upweight --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight import (
        adapters,
        apps,
        baselines,
        calculus,
        datasets,
        defaults,
        diagnostics,
        errors,
        losses,
        minibatch,
        operators,
        plots,
        solvers,
    )
    from upweight.adapters import explain
    from upweight.checks import Report
    from upweight.counterfactual import edited, retrained
    from upweight.curves import MislabelCurve, RemovalCurve, mislabel_auc, removal_curve
    from upweight.damping import DampingPath
    from upweight.datamodels import LDS, lds
    from upweight.ensembles import Ensemble, ensemble
    from upweight.examples import Examples
    from upweight.influence import Influence
    from upweight.objective import L2, Linear, Objective
    from upweight.predictions import (
        Predictions,
        classes,
        features,
        predict,
        query_labels,
        training_inputs,
        training_labels,
    )
    from upweight.retrain import LBFGS, Newton, Refit, Retrain, RetrainMany
    from upweight.scores import Certificate, Extremes, Scores, SelfScores, TopK, extremes
    from upweight.stacked import StackedTraining
    from upweight.study import Study
    from upweight.subsets import SubsetOutcomes, random_subsets, subset_retraining
    from upweight.tracin import TracIn, checkpoints
    from upweight.validate import Agreement, Outcomes, agreement, leave_one_out

__version__ = "0.1.0"

__all__ = [
    "L2",
    "LBFGS",
    "LDS",
    "Agreement",
    "Certificate",
    "DampingPath",
    "Ensemble",
    "Examples",
    "Extremes",
    "Influence",
    "Linear",
    "MislabelCurve",
    "Newton",
    "Objective",
    "Outcomes",
    "Predictions",
    "Refit",
    "RemovalCurve",
    "Report",
    "Retrain",
    "RetrainMany",
    "Scores",
    "SelfScores",
    "StackedTraining",
    "Study",
    "SubsetOutcomes",
    "TopK",
    "TracIn",
    "adapters",
    "agreement",
    "apps",
    "baselines",
    "calculus",
    "checkpoints",
    "classes",
    "datasets",
    "defaults",
    "diagnostics",
    "edited",
    "ensemble",
    "errors",
    "explain",
    "extremes",
    "features",
    "lds",
    "leave_one_out",
    "losses",
    "minibatch",
    "mislabel_auc",
    "operators",
    "plots",
    "predict",
    "query_labels",
    "random_subsets",
    "removal_curve",
    "retrained",
    "solvers",
    "subset_retraining",
    "training_inputs",
    "training_labels",
]

_HOMES = {
    "L2": "objective",
    "LBFGS": "retrain",
    "LDS": "datamodels",
    "Agreement": "validate",
    "Certificate": "scores",
    "DampingPath": "damping",
    "Ensemble": "ensembles",
    "Examples": "examples",
    "Extremes": "scores",
    "Influence": "influence",
    "Linear": "objective",
    "MislabelCurve": "curves",
    "Newton": "retrain",
    "Objective": "objective",
    "Outcomes": "validate",
    "Predictions": "predictions",
    "Refit": "retrain",
    "RemovalCurve": "curves",
    "Report": "checks",
    "Retrain": "retrain",
    "RetrainMany": "retrain",
    "Scores": "scores",
    "SelfScores": "scores",
    "StackedTraining": "stacked",
    "Study": "study",
    "SubsetOutcomes": "subsets",
    "TopK": "scores",
    "TracIn": "tracin",
    "agreement": "validate",
    "checkpoints": "tracin",
    "classes": "predictions",
    "edited": "counterfactual",
    "ensemble": "ensembles",
    "explain": "adapters",
    "extremes": "scores",
    "features": "predictions",
    "lds": "datamodels",
    "leave_one_out": "validate",
    "mislabel_auc": "curves",
    "predict": "predictions",
    "query_labels": "predictions",
    "random_subsets": "subsets",
    "removal_curve": "curves",
    "retrained": "counterfactual",
    "subset_retraining": "subsets",
    "training_inputs": "predictions",
    "training_labels": "predictions",
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
