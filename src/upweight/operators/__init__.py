"""Curvatures: symmetric operators that stand for the Hessian of the risk."""

from upweight.operators.base import Curvature, Operator, Sampled, Spectral
from upweight.operators.dense import Dense, DenseOperator
from upweight.operators.implicit import EmpiricalFisher, GaussNewton, Hessian, Identity
from upweight.operators.kronecker import EKFAC, KFAC, Kronecker
from upweight.operators.lowrank import Arnoldi, LowRank, Nystroem

__all__ = [
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "Curvature",
    "Dense",
    "DenseOperator",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Kronecker",
    "LowRank",
    "Nystroem",
    "Operator",
    "Sampled",
    "Spectral",
]
