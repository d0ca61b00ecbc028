"""Solvers of (C + λI) x = v."""

from upweight.solvers.base import Prepared, Solution, Solver
from upweight.solvers.cg import CG
from upweight.solvers.direct import Cholesky
from upweight.solvers.lissa import LiSSA

__all__ = ["CG", "Cholesky", "LiSSA", "Prepared", "Solution", "Solver"]
