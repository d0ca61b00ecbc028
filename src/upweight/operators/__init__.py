"""Curvatures: symmetric operators that stand for the Hessian of the risk."""

from upweight.operators.base import Curvature, Operator, Sampled, Spectral
from upweight.operators.dense import Dense, DenseOperator
from upweight.operators.implicit import EmpiricalFisher, GaussNewton, Hessian, Identity

__all__ = [
    "Curvature",
    "Dense",
    "DenseOperator",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Operator",
    "Sampled",
    "Spectral",
]
