"""Solvers of (C + λI) x = v."""

from upweight.solvers.base import Movable, Pairwise, Prepared, Quadratic, Solution, Solver
from upweight.solvers.cg import CG
from upweight.solvers.direct import Cholesky, Substitution
from upweight.solvers.dual import Dual
from upweight.solvers.factored import Factored
from upweight.solvers.lissa import LiSSA
from upweight.solvers.precondition import Approximate, Plain, Preconditioned, Preconditioner, TwoLevel
from upweight.solvers.sparse_cholesky import SparseCholesky

__all__ = [
    "CG",
    "Approximate",
    "Cholesky",
    "Dual",
    "Factored",
    "LiSSA",
    "Movable",
    "Pairwise",
    "Plain",
    "Preconditioned",
    "Preconditioner",
    "Prepared",
    "Quadratic",
    "Solution",
    "Solver",
    "SparseCholesky",
    "Substitution",
    "TwoLevel",
]
