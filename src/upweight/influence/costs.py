"""What a solver costs for some linear systems, estimated before anything is computed: flops, bytes and time.

Seconds are those of a core that makes 30 billion float64 operations, twice as many in float32, or moves 8 GB in one;
only their ratios matter. What an iteration needs is not known before: products are those of data that are like others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.sparse
import torch

from upweight.data.examples import Examples
from upweight.model import penalties
from upweight.model.objective import Linear, Objective
from upweight.operators import EKFAC, KFAC, Arnoldi, Curvature, GaussNewton, Hessian, Identity, Nystroem, core
from upweight.solvers import (
    CG,
    Approximate,
    Cholesky,
    Dual,
    Factored,
    Preconditioner,
    Solver,
    SparseCholesky,
    TwoLevel,
)

DIRECT_UP_TO = 4000
DUAL_UP_TO = 8000
FACTOR_UP_TO = 12_000
SPECTRAL = (EKFAC, KFAC, Arnoldi, Identity, Nystroem)
_FLOPS, _BYTES = 30e9, 8e9
_PASSES = {True: 12, False: 60}  # products that CG needs for 1e-6: with TwoLevel, without
_SPARSE_PASSES = 40  # with Approximate
_MATRIX = {True: 28.0, False: 60.0}  # bytes an entry while C is written out and factorised: linear predictors, others
_SUBSTITUTIONS = 60  # triangles that are read to find the smallest curvature
_VECTORS = {True: 24, False: 90}  # that a step of an iteration reads and writes: sparse rows, others
_DEAR = 4.0  # times the products that it is to save
_NARROW = 1024  # columns whose principal directions cost little
_ENTRY = 12.0  # bytes of a sparse number and its place
_SURE = 4.0  # times: what an iteration on sparse rows is forecast at most, over what it takes
_COUNTED = 40.0  # times the pairs of entries: the seconds of an iteration beside which counting a core is little
_EIGENVECTORS = 9.0  # flops, times the cube


@dataclass(frozen=True)
class Cost:
    """What a solver costs for some right-hand sides, estimated before anything is computed.

    Args:
        solver: the specification.
        flops: floating-point operations, preparation included.
        memory: bytes beside the data.
        possible: whether it may be chosen by default: the matrix is not too large, and Dual has what it divides by.
        seconds: on the core above.
        order: rows of the matrix that is factorised, where they are not those of C.
    """

    solver: Solver
    flops: float
    memory: float
    possible: bool
    seconds: float = math.nan
    order: int | None = None

    def __str__(self) -> str:
        size = f"{type(self.solver).__name__} {self.flops / 1e9:.3g} GFLOP, {self.memory / 2**30:.2g} GiB"
        return size if self.possible else f"{size} (not a default here)"


def costs(
    objective: Objective,
    examples: Examples,
    curvature: Curvature,
    *,
    systems: int = 1,
    counted: bool = False,
    budget: int | None = None,
) -> list[Cost]:
    """What each solver would cost for so many linear systems; the iteration is the last.

    SparseCholesky is among them where its core was counted: by itself only for systems that would take long, and within
    a budget of bytes.
    """
    p, n = objective.size, len(examples)
    if isinstance(curvature, SPECTRAL):
        width = min(curvature.rank, p) if isinstance(curvature, Arnoldi | Nystroem) else math.sqrt(p)
        return [Cost(Factored(), 4.0 * systems * p * width, 8.0 * p * width, True)]
    if objective.linear is None or not isinstance(curvature, Hessian | GaussNewton):
        product = 6.0 * n * p
        direct = p * product + p**3 / 3 + 2.0 * systems * p**2
        return [
            Cost(Cholesky(), direct, _MATRIX[False] * p**2, p <= DIRECT_UP_TO),
            Cost(CG(rtol=1e-6), _PASSES[False] * systems * product, 32.0 * p * systems, True),
        ]
    K, entries = objective.linear.n_outputs, entries_of(objective.linear, examples)
    pairs = K * (K - 1) / 2 if objective.linear.loss.coupling is not None else K
    order, sparse = n * K, scipy.sparse.issparse(examples.x)
    gram, rows = pairs * entries * entries / n, entries * n
    factor, factors = p**3 / 3 + 2.0 * systems * p**2, order**3 / 3 + systems * (2.0 * order**2 + 4 * entries * K)
    limit = DIRECT_UP_TO if systems == 1 else FACTOR_UP_TO
    passes = (_SPARSE_PASSES if sparse else _PASSES[True]) * systems * 4 * entries * K
    # products of sparse rows move their entries, and leave a matrix that is full
    gram_seconds = _ENTRY * gram / _BYTES if sparse else max(gram / _FLOPS, 8 * entries * max(1.0, pairs) / _BYTES)
    rows_seconds = _ENTRY * entries * entries / objective.linear.n_features / _BYTES if sparse else 2 * rows / _FLOPS
    possible = order < p and order <= DUAL_UP_TO and held(objective)
    return [
        Cost(
            Cholesky(),
            gram + factor,
            _MATRIX[True] * p**2,
            p <= limit,
            gram_seconds + factor / _FLOPS + (24.0 + 4.0 * _SUBSTITUTIONS) * p**2 / _BYTES,
        ),
        Cost(
            Dual(),
            rows + factors,
            dual_bytes(n, K),
            possible,
            rows_seconds + factors / _FLOPS + (8.0 * K + 4.0 * _SUBSTITUTIONS) * order**2 / _BYTES,
        ),
        *_levelled(objective, examples, systems, counted, budget),
        Cost(
            CG(rtol=1e-6, preconditioner=preconditioner(objective.linear, examples)),
            passes,
            32.0 * p * systems + 4 * entries,
            True,
            _iterated(objective.linear, examples, systems),
        ),
    ]


def _levelled(objective: Objective, examples: Examples, systems: int, counted: bool, budget: int | None) -> list[Cost]:
    """SparseCholesky, whose core is known when its levels were counted."""
    structure, X = objective.linear, examples.x
    if structure is None or structure.n_outputs > 1 or not scipy.sparse.issparse(X):
        return []
    pairs, iterated = core.pairs(X), _iterated(structure, examples, systems)
    room = math.inf if budget is None else budget
    able = pairs <= core.PAIRS and core.counting(X) <= room and held(objective)
    if not counted and not (able and iterated > _SURE * _COUNTED * core.SECONDS * pairs):
        return []
    found = core.counted(X, structure.intercept, FACTOR_UP_TO, math.inf if counted else room)
    each = 2.0 * systems * found.size**2
    seconds = found.seconds + each / _FLOPS
    pays = found.size <= FACTOR_UP_TO and _SURE * seconds <= iterated
    return [Cost(SparseCholesky(), found.flops + each, found.memory, able and pays, seconds, found.size)]


def product_seconds(structure: Linear, examples: Examples, systems: int) -> float:
    """Of a step with so many vectors: C times them, in float32 where rows are dense, and what is done with vectors."""
    entries, across = entries_of(structure, examples), structure.n_outputs * systems
    sparse = scipy.sparse.issparse(examples.x)
    vectors = _VECTORS[sparse] * 8.0 * across * (structure.n_features + 1) / _BYTES
    if sparse:
        return vectors + (_ENTRY + 16.0 * across) * entries / _BYTES
    return vectors + max(2.0 * entries * across / _FLOPS, 4 * entries / _BYTES)


def _iterated(structure: Linear, examples: Examples, systems: int) -> float:
    """Seconds of CG: its preconditioner, its products, and those in float64 that it is sure by."""
    n, K, width = len(examples), structure.n_outputs, structure.n_features + 1
    entries, product = entries_of(structure, examples), product_seconds(structure, examples, systems)
    if scipy.sparse.issparse(examples.x):
        return (_SPARSE_PASSES + 20) * product
    few = min(n, TwoLevel().rows) if n >= 2 * TwoLevel().rows else n
    sure = 12 * entries / _BYTES + 2 * max(4.0 * entries * K * systems / _FLOPS, 8 * entries / _BYTES)
    if width > _NARROW:  # inner iterations on a subsample, or the diagonal alone
        inner = few / n * TwoLevel().max_steps / 2 if few < n else 0.0
        return sure + (_PASSES[True] if few < n else _PASSES[False]) * product * (1 + inner)
    block = min(width, TwoLevel().rank) * K
    exact = (few * block**2 + block**3) / _FLOPS if few < n else 0.0
    means = (2.0 * few * width**2 + _EIGENVECTORS * width**3) / _FLOPS / (2 if few < n else 1)
    return sure + means + exact + _PASSES[True] * product


def cost(solver: Solver, objective: Objective, examples: Examples, curvature: Curvature, *, systems: int = 1) -> Cost:
    """What this solver would cost; nothing is known of one that `costs` does not list, as LiSSA."""
    listed = costs(objective, examples, curvature, systems=systems, counted=isinstance(solver, SparseCholesky))
    return next((one for one in listed if type(one.solver) is type(solver)), Cost(solver, 0.0, 0.0, False))


def dual_bytes(n: int, n_outputs: int) -> float:
    """Bytes while Dual's (nK) × (nK) matrix is made and factorised; several outputs are added up from parts."""
    return (16.0 if n_outputs == 1 else 36.0) * (n * n_outputs) ** 2


def entries_of(structure: Linear, examples: Examples) -> float:
    """Numbers in X; of a sparse one those that are stored.

    >>> import upweight as uw
    >>> table = scipy.sparse.csr_array([[0.0, 3.0, 0.0], [1.0, 0.0, 2.0]])
    >>> entries_of(uw.Linear(uw.losses.squared, 1, 3, intercept=True), uw.Examples(table, [1.0, 2.0]))
    3.0
    """
    x = examples.x
    return float(x.nnz) if scipy.sparse.issparse(x) else float(len(examples)) * structure.n_features  # type: ignore[union-attr]


def preconditioner(structure: Linear, examples: Examples) -> Preconditioner:
    """What pays for linear predictors: a pass over sparse rows costs less than anything that would save one.

    Where outputs are many and columns few, the leading directions of all outputs together cost more than products.
    """
    if scipy.sparse.issparse(examples.x):
        return Approximate()
    n, two = len(examples), TwoLevel()
    block = min(structure.n_features + 1, two.rank) * structure.n_outputs
    exact = (min(n, two.rows) * block**2 + block**3) / _FLOPS
    few = structure.n_features < _NARROW and n >= 2 * two.rows
    return Approximate() if few and exact > _DEAR * _PASSES[True] * product_seconds(structure, examples, 1) else two


def held(objective: Objective) -> bool:
    """Whether a penalty holds every coefficient, none is projected out, and the loss is convex: what Dual needs."""
    split = objective.size - (objective.linear.n_outputs if objective.linear and objective.linear.intercept else 0)
    probe = torch.zeros(1, objective.size, dtype=torch.float64)
    probe[:, :split] = torch.linspace(1, 2, split, dtype=torch.float64)
    positive = float(penalties.diagonal(objective)[:split].min()) > 0 and objective.linear.loss.convex  # type: ignore[union-attr]
    return positive and bool(torch.equal(objective.project(probe), probe))
