"""The exact Hessian of models with a linear predictor, at the speed of the data's own memory.

With x̃ = (x, 1) and the curvature of the loss in its outputs written as hᵢ = diag(aᵢ) − uᵢuᵢᵀ,

    C = (1/n) Σᵢ wᵢ hᵢ ⊗ x̃ᵢx̃ᵢᵀ + ∇²r

The hᵢ depend on θ̂ only: they are computed once, (n, K) or (n, 2K) numbers, and every later product reads X once, in
chunks of rows that stay in cache. Nothing of size n × p is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.arrays import as_tensor
from upweight.data.stored import Stored
from upweight.errors import UpweightError
from upweight.model import linear, penalties
from upweight.model.objective import Linear
from upweight.model.sweep import Sweep, finite
from upweight.operators import sparse
from upweight.operators.mean_factors import kronecker_inverse, mean_factors
from upweight.operators.shift import Shift, shift_invariant
from upweight.runs import ranks
from upweight.runs.sums import Sums

_CHUNK_BYTES = 2**23  # of X in one chunk, a few times the cache of a core
_PADDED = 16  # columns: with fewer, X V in float32 runs at half the speed; float64 and RᵀX do not
_CHUNK_ROWS = (1024, 16_384)
_CACHED_ROWS = 1024
_KEPT_BYTES = 2**26  # of V x̃ᵢ for every row, which the scores can use again
_COPY_BYTES = 2**31  # a float32 copy of X is kept if it is smaller; else chunks are cast as they are read
(_syrk,) = scipy.linalg.get_blas_funcs(("syrk",), dtype=np.float64)
_FEW_ACTIVE = 0.95  # of the columns: fewer are worth a copy without the others
_UNSEEN = 1e-30  # of the largest number on the diagonal
_KRONECKER_FEATURES = 1024  # eigenvectors of a larger XᵀX cost more than they save


class LinearHessian:
    """C of an objective with a linear predictor; also its Gauss–Newton matrix, for both are the same here.

    Cost: a product with k vectors is one pass over X, 4·n·d·K·k flops; the matrix is n·d² flops for each pair of
    outputs, for only the upper half of each symmetric block is computed.

    Args:
        sweep: the objective and the rows it averages over.
        precision: of X and of products; sums over chunks are float64 in any case.
        curvatures: the (n, m) numbers of `linear.factors`, if they are known already.
    """

    def __init__(self, sweep: Sweep, precision: torch.dtype = torch.float64, curvatures: Tensor | None = None) -> None:
        self.sweep = sweep
        self.precision = precision
        self._curvatures = curvatures
        self._moved: tuple[Tensor, Tensor] | None = None  # the V of the last float64 product, and V x̃ᵢ of the rows
        self._structure: Linear = sweep.objective.linear  # type: ignore[assignment]

    @property
    def exact(self) -> bool:
        """True: C is the Hessian itself, so that R is flat where C is 0."""
        return True

    @property
    def size(self) -> int:
        """p."""
        return self.sweep.objective.size

    @property
    def curvatures(self) -> Float[Tensor, "n m"]:
        """wᵢhᵢ as `linear.factors` writes it.  Cost: one pass, once, shared with `slopes`."""
        if self._curvatures is None:
            self._curvatures = self._derivatives[:, self._structure.n_outputs :]
        return self._curvatures

    @property
    def slopes(self) -> Float[Tensor, "n K"]:
        """∂ℓ/∂η of every row, unweighted."""
        return self._derivatives[:, : self._structure.n_outputs]

    @cached_property
    def _derivatives(self) -> Tensor:
        """(n, K + m): first and second derivatives of every row's loss in its outputs, from one predictor."""
        return self._first_look[0]

    def gradient(self) -> Float[Tensor, " p"]:
        """(1/n) Σᵢ wᵢ ∇Lᵢ, without the penalty.  Cost: nothing once the derivatives of the rows are known."""
        _, total = self._first_look
        if total is None:
            objective = self.sweep.objective

            def pulled(batch: Any, weights: Tensor) -> Tensor:
                slope = batch[1] * weights[:, None]
                return linear.transposed(objective, linear.wide(batch[0]), slope[:, None])[0]

            total = self._summed(pulled, 1, "gradient", self.slopes)
            total = self.sloped.fold(pulled, label="gradient", chunk=self._chunk) if total is None else total
        return total / self.sweep.n

    @cached_property
    def _first_look(self) -> tuple[Tensor, Tensor | None]:
        """`_derivatives`, and Σᵢ wᵢ ∇Lᵢ from the same reading of X; of a sparse X a pass of its own costs less."""
        objective, K = self.sweep.objective, self._structure.n_outputs
        label = "derivatives of the rows"
        if self.sparse:
            at_once = self._derived_at_once()
            if at_once is not None:
                return at_once, None
            found = self.sweep.emit(lambda batch, weights: linear.derivatives(objective, batch, weights), label=label)
            return torch.from_numpy(found), None

        def look(batch: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
            found = linear.derivatives(objective, batch, weights)
            slope = found[:, :K] * weights[:, None]
            return found, linear.transposed(objective, linear.wide(batch[0]), slope[:, None])[0]

        found, total = self.sweep.emit_with_sum(look, label=label)
        return torch.from_numpy(found), total

    def _derived_at_once(self) -> Tensor | None:
        """`_derivatives` of sparse rows by whole chunks; None where one fails, for the sweep says which row it is."""
        sweep, X, y = self.sweep, self._x, self.sweep.examples.y
        if not self._by_whole_chunks(1) or y is None:
            return None
        weights, targets = torch.from_numpy(np.array(sweep.examples.weights)), as_tensor(y)
        try:
            found = torch.cat(
                [
                    linear.derivatives(
                        sweep.objective, (sparse.rows(X, *part), targets[slice(*part)]), weights[slice(*part)]
                    )
                    for part in self._ends
                ]
            )
        except (UpweightError, MemoryError, RuntimeError, ValueError, TypeError, IndexError, KeyError):
            return None
        return found if bool(torch.isfinite(found.sum())) else None

    def dots(self, V: Float[Tensor, "k p"]) -> tuple[Sweep, Callable[[Any, Tensor], Tensor]]:
        """A sweep, and what gives ∇Lᵢᵀ v for every row of its batches and vector, (b, k).

        Cost: one pass over X; none when C v has just been computed in float64, as CG does to be sure of its answer.
        """
        objective, K = self.sweep.objective, self._structure.n_outputs
        if self._moved is None or not torch.equal(self._moved[0], V):
            return self.sloped, lambda batch, _: linear.sloped_dots(objective, linear.wide(batch[0]), batch[1], V)
        along = self.sweep.whole(self._moved[1], self._chunk)
        moved = self.sweep.over(objective, self.sweep.examples.carrying(along, self.slopes))
        return moved, lambda batch, _: torch.einsum("bkj,bj->bk", batch[0].reshape(-1, len(V), K), batch[1])

    @cached_property
    def sloped(self) -> Sweep:
        """The sweep over (x, slopes), instead of (x, y)."""
        return self._over(self._x, self.slopes)

    @cached_property
    def coarse(self) -> LinearHessian:
        """The same operator with products in float32, twice as fast; sparse X gains nothing and stays as it is."""
        if self.sparse or self.precision == torch.float32:
            return self
        return LinearHessian(self.sweep, torch.float32, self.curvatures)

    def kept_bytes(self, vectors: int) -> int:
        """Memory that products with so many vectors keep: a float32 copy of a dense X, and V x̃ᵢ of every row."""
        structure, n = self._structure, self.sweep.n
        dense = not self.sparse and as_tensor(self._x[:1]).dtype != torch.float32
        copy, moved = 4 * n * structure.n_features if dense else 0, 8 * n * vectors * structure.n_outputs
        known = ((copy, _COPY_BYTES), (moved, _KEPT_BYTES))
        return sum(size for size, most in known if size <= self.sweep.at_most(most, 4))

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        few = 8 * self.sweep.n * len(V) * self._structure.n_outputs <= self.sweep.at_most(_KEPT_BYTES, 4)
        kept: list[Tensor] | None = [] if few and self.precision == torch.float64 else None
        product = self._product(V, kept)
        total = self._summed(product, len(V), "curvature product", self.curvatures)
        if total is None:
            if kept is not None:
                kept.clear()
            rows = self.rows_with_curvatures
            total = rows.fold(product, vectors=len(V), label="curvature product", chunk=self._chunk)
        self._moved = None if kept is None else (V.clone(), torch.cat(kept) if kept else torch.empty(0))
        return penalties.add_hvp(total.div_(self.sweep.n), self.sweep.objective, V)

    def _summed(
        self, of_batch: Callable[[Any, Tensor], Tensor], vectors: int, label: str, beside: Float[Tensor, "n m"]
    ) -> Tensor | None:
        """The fold of sparse rows, and what stands beside them, by whole chunks.

        What a fold does beside a product costs more than their entries.

        None where rows are dense or shared with other ranks, or a chunk does not fit.
        """
        if not self._by_whole_chunks(vectors):
            return None
        sums, weights = Sums(), torch.from_numpy(np.array(self.sweep.examples.weights))
        try:
            for number, (part, X) in enumerate(self._whole_chunks):
                sums.add(number, of_batch((X, beside[part]), weights[part]))
        except MemoryError:
            return None
        return finite(sums.total(), label)

    def _by_whole_chunks(self, vectors: int) -> bool:
        """Whether sparse rows are taken by whole chunks: they are this process's own, and a chunk fits."""
        if not self.sparse or ranks.several() or self.sweep.batch_size is not None:
            return False
        needed = min(self._chunk, self.sweep.n) * (1 + vectors) * sparse.row_bytes(self._x, self._structure.n_outputs)
        return needed <= self.sweep.at_most(self.sweep.memory, 4)

    @property
    def _ends(self) -> list[tuple[int, int]]:
        return [(start, min(start + self._chunk, self.sweep.n)) for start in range(0, self.sweep.n, self._chunk)]

    @cached_property
    def _whole_chunks(self) -> list[tuple[slice, Any]]:
        return [(slice(*part), sparse.rows(self._x, *part)) for part in self._ends]

    def apply_rows(self, V: Float[Tensor, "k p"], rows: NDArray[np.int64]) -> Float[Tensor, "k p"]:
        """(1/b) Σ_{i in rows} wᵢ hᵢ ⊗ x̃ᵢx̃ᵢᵀ v + ∇²r v."""
        total = self._product(V)(self.rows_with_curvatures.examples.batch(rows), torch.empty(0))
        return total.double() / len(rows) + penalties.hvp(self.sweep.objective, V)

    def largest_row_curvature(self) -> float:
        """max wᵢ λmax(hᵢ) ‖x̃ᵢ‖² + the largest penalty strength."""
        objective = self.sweep.objective
        largest = self.sweep.emit(
            lambda batch, weights: weights * linear.largest_curvature(objective, batch), label="curvature bound"
        )
        return float(largest.max()) + float(penalties.diagonal(objective).max())

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return self.sweep.objective.project(V)

    def subsample(self, count: int, seed: int = 0) -> LinearHessian:
        """The same mean over `count` rows drawn without replacement: an unbiased estimate of C that costs less."""
        rows = np.sort(np.random.default_rng(seed).choice(self.sweep.n, size=count, replace=False))
        return self.of_rows(rows)

    def of_rows(self, rows: NDArray[np.int64]) -> LinearHessian:
        """The mean over these rows only; they are copied."""
        sweep = self.sweep.over(self.sweep.objective, self.sweep.examples.subset(rows))
        return LinearHessian(replace(sweep, progress=False), self.precision, self.curvatures[torch.from_numpy(rows)])

    def matrix(self) -> Float[Tensor, "p p"]:
        """C as a dense float64 matrix.  Cost: n·d² flops for each pair of outputs, 8p² bytes."""
        K, d = self._structure.n_outputs, self._structure.n_features
        total = np.zeros((self.size, self.size))
        blocks, columns = self._blocks(), self._columns()
        numbers = iter(range(len(columns)))
        for i in range(K):
            for j in range(i, K):
                at = next(numbers)
                total[i * d : (i + 1) * d, j * d : (j + 1) * d] = blocks.pop((i, j), 0.0)
                if self._structure.intercept:
                    total[i * d : (i + 1) * d, K * d + j] = columns[at, :d]
                    total[j * d : (j + 1) * d, K * d + i] = columns[at, :d]
                    total[K * d + i, K * d + j] = columns[at, d]
        return self._completed(total)

    @cached_property
    def shift(self) -> Shift | None:
        """What a common shift of a feature's K coefficients meets, if only the penalty curves it; else None.

        No gradient of a softmax points that way. Left in a matrix, its tiny curvature would cost the others digits.
        """
        K, d = self._structure.n_outputs, self._structure.n_features
        strengths = penalties.diagonal(self.sweep.objective)[: K * d].reshape(K, d)
        coupled = self.curvatures.shape[1] > K and shift_invariant(self.curvatures, K)
        if not coupled or not bool((strengths == strengths[0]).all()) or float(strengths.min()) <= 0:
            return None
        return Shift(K, strengths[0])

    def mean_factors(self) -> tuple[Float[Tensor, "w w"], Float[Tensor, "K K"]]:
        """mean(x̃x̃ᵀ) and mean(wᵢhᵢ), whose Kronecker product approximates C without its penalty.  Cost: one pass."""
        return mean_factors(self.rows_with_curvatures, self.curvatures, self._structure, self.precision)

    def approximate_inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """(C + λI)⁻¹ with C ≈ mean(wᵢhᵢ) ⊗ mean(x̃ᵢx̃ᵢᵀ) + ∇²r, or with C's diagonal where that would cost too much.

        Of a sparse X the columns that most rows have are taken together, the others each for itself.
        """
        if self.dense_and_narrow:
            diagonal = penalties.diagonal(self.sweep.objective)
            return kronecker_inverse(self.mean_factors(), self._structure, diagonal, damping)
        diagonal = self.diagonal() + damping
        if self.sparse:
            spread = _diagonals(self.curvatures, self._structure.n_outputs)
            return sparse.frequent_inverse(self._x, spread, diagonal, self._structure)
        largest = float(diagonal.max()) or 1.0  # in place of what no row sees
        held = torch.where(diagonal > _UNSEEN * largest, diagonal, largest)
        return lambda R: (R / held).to(R)  # in float64, which small units need

    @property
    def dense_and_narrow(self) -> bool:
        """Whether eigenvectors of XᵀX cost little."""
        return not self.sparse and self._structure.n_features <= _KRONECKER_FEATURES

    @property
    def sparse(self) -> bool:
        """Whether X is sparse."""
        return scipy.sparse.issparse(self._x)

    def diagonal(self) -> Float[Tensor, " p"]:
        """The diagonal of C.  Cost: one pass, once."""
        return self._diagonal

    @cached_property
    def _diagonal(self) -> Tensor:
        K = self._structure.n_outputs

        def squares(batch: Any, _: Tensor) -> Tensor:
            X, h = batch
            spread = _diagonals(h, K).double()
            coef = sparse.squares(X, spread) if self.sparse else spread.T @ linear.wide(X) ** 2
            return torch.cat([coef.reshape(-1), spread.sum(0)]) if self._structure.intercept else coef.reshape(-1)

        total = self._summed(squares, 2, "diagonal", self.curvatures) if self.sparse else None
        if total is None:
            total = self.rows_with_curvatures.fold(squares, vectors=2, label="diagonal", chunk=self._chunk)
        curved = penalties.diagonal(self.sweep.objective)
        for rows, second in penalties.rows(self.sweep.objective):
            curved[rows] += second[:, rows].diagonal()
        return total / self.sweep.n + curved

    @property
    def _x(self) -> Any:
        return self.sweep.examples.x

    @cached_property
    def active(self) -> NDArray[np.int64]:
        """The columns of a dense x̃ that are not 0 in every row.  Cost: one reading, once."""
        seen = torch.zeros(self._structure.n_features, dtype=torch.bool)
        for start in range(0, self.sweep.n, _CHUNK_ROWS[1]):
            seen |= (self.sweep.examples.batch(slice(start, start + _CHUNK_ROWS[1]))[0] != 0).any(0)
        whole = torch.cat([seen, torch.ones(int(self._structure.intercept), dtype=torch.bool)])
        return np.flatnonzero(whole.numpy())

    # ---- inner steps -------------------------------------------------------------------------------------------------

    @cached_property
    def rows_with_curvatures(self) -> Sweep:
        """The rows as (x, h) instead of (x, y), in this operator's precision."""
        x, h = self._x, self.curvatures
        if not self.sparse:
            h = h.to(self.precision)
            x = _cast(x, self.precision, self.sweep.at_most(_COPY_BYTES, 4))
        return self._over(x, h)

    def _over(self, x: Any, beside: Tensor) -> Sweep:
        """The rows as (x, beside), in batches that fit a product."""
        sweep = self.sweep.over(self.sweep.objective, self.sweep.examples.carrying(x, beside))
        return replace(sweep, example_bytes=sparse.row_bytes(x, self._structure.n_outputs)) if self.sparse else sweep

    @property
    def _chunk(self) -> int:
        low, high = _CHUNK_ROWS
        if self.sparse:
            return sparse.chunk(self._x, high)
        width = 1 + self._structure.n_features
        return int(min(high, max(low, 2 ** int(np.log2(max(1, _CHUNK_BYTES // (self.precision.itemsize * width)))))))

    def _product(self, V: Tensor, kept: list[Tensor] | None = None) -> Callable[[Any, Tensor], Tensor]:
        """Σ_b wᵢ hᵢ ⊗ x̃ᵢx̃ᵢᵀ V of a batch (x, h), with what depends on V only prepared once; `kept` gathers V x̃ᵢ."""
        structure, k = self._structure, len(V)
        K, d = structure.n_outputs, structure.n_features
        single = k * K == 1 and not self.sparse
        width = max(k * K, _PADDED) if self.precision == torch.float32 and not single else k * K
        across = torch.zeros(d, width, dtype=self.precision)
        across[:, : k * K] = V[:, : K * d].reshape(k * K, d).T
        shift = V[:, K * d :].reshape(k, K).to(self.precision) if structure.intercept else None
        if self.sparse:
            return sparse.product(across[:, : k * K].numpy(), shift, (k, K), kept)
        if single:
            return _of_one_vector(across[:, 0].numpy(), shift, self.precision, kept)

        def product(batch: Any, _: Tensor) -> Tensor:
            X, h = batch
            X = X.to(self.precision)
            Z = linear.times(X, across)[:, : k * K].reshape(len(X), k, K)
            Z = Z if shift is None else Z + shift
            R = linear.curved(h, Z)
            coef = (R.reshape(len(R), -1).T @ X).reshape(k, -1)
            if kept is not None:  # at the end: a batch that does not fit comes again in halves
                kept.append(Z.flatten(1))
            return torch.cat([coef, R.sum(0)], 1) if shift is not None else coef

        return product

    def _blocks(self) -> dict[tuple[int, int], NDArray[np.float64]]:
        """Σᵢ wᵢ hᵢ[i, j] xᵢxᵢᵀ for every pair of outputs i ≤ j; pairs that are zero are left out."""
        K, X = self._structure.n_outputs, self._x
        h = self.curvatures
        pairs = [(i, i) for i in range(K)] if h.shape[1] == K else [(i, j) for i in range(K) for j in range(i, K)]
        if scipy.sparse.issparse(X):
            return {
                pair: np.asarray((X.T @ X.multiply(_entry(h, K, *pair).numpy()[:, None]).tocsr()).toarray())
                for pair in pairs
            }
        if h.shape[1] > K and shift_invariant(h, K):
            off = self._weighted_gram([pair for pair in pairs if pair[0] != pair[1]])
            for i in range(K):
                off[i, i] = -sum(block for pair, block in off.items() if i in pair and pair[0] != pair[1])  # type: ignore[assignment]
            return off
        return self._weighted_gram(pairs)

    def _weighted_gram(self, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], NDArray[np.float64]]:
        """Σ_b D_b x_b x_bᵀ with D = h[i, j], as a symmetric product of √|D| x where D keeps one sign."""
        K, d = self._structure.n_outputs, self._structure.n_features
        seen = self.active[self.active < d]
        few = 0 < len(seen) < _FEW_ACTIVE * d
        width = len(seen) if few else d
        grams = {pair: np.zeros((width, width), order="F") for pair in pairs}
        rows = 4 * self._chunk
        for start in range(0, self.sweep.n, rows):
            X = self.sweep.examples.batch(slice(start, start + rows))[0].to(torch.float64)
            X = X[:, torch.from_numpy(seen)] if few else X
            h = self.curvatures[start : start + rows]
            for pair in pairs:
                D = _entry(h, K, *pair)
                for sign, part in ((1.0, D.clamp(min=0)), (-1.0, (-D).clamp(min=0))):
                    if bool((part > 0).any()):
                        scaled = (X * part.sqrt()[:, None]).numpy()
                        grams[pair] = _syrk(sign, scaled.T, beta=1.0, c=grams[pair], overwrite_c=1)
                        del scaled
            del X  # before the next rows are read: these are the largest arrays of a closed form
        for pair, gram in grams.items():
            grams[pair] = np.triu(gram) + np.triu(gram, 1).T
            if few:
                whole = np.zeros((d, d))
                whole[np.ix_(seen, seen)] = grams[pair]
                grams[pair] = whole
        return grams

    def _columns(self) -> NDArray[np.float64]:
        """Σᵢ wᵢ hᵢ[i, j] x̃ᵢ for every pair i ≤ j: the intercept's columns of C, (pairs, d + 1)."""
        K = self._structure.n_outputs
        pairs = [(i, j) for i in range(K) for j in range(i, K)]
        if not self._structure.intercept:
            return np.zeros((len(pairs), 0))

        def sums(batch: Any, _: Tensor) -> Tensor:
            X, h = batch
            D = torch.stack([_entry(h, K, *pair) for pair in pairs], 1).double()
            across = X.T @ D.numpy() if scipy.sparse.issparse(X) else (X.to(torch.float64).T @ D).numpy()
            return torch.cat([torch.from_numpy(np.ascontiguousarray(across.T)), D.sum(0)[:, None]], 1)

        return self.rows_with_curvatures.fold(
            sums, vectors=len(pairs), label="curvature matrix", chunk=self._chunk
        ).numpy()

    def _completed(self, total: NDArray[np.float64]) -> Tensor:
        """The sums over n, the penalty added, and the lower triangle mirrored, in blocks that need no second matrix."""
        total /= self.sweep.n
        objective = self.sweep.objective
        p, step = self.size, 1024
        for start in range(0, p, step):
            stop = min(start + step, p)
            block = total[start:stop, start:stop]
            block[:] = np.triu(block) + np.triu(block, 1).T
            total[stop:, start:stop] = total[start:stop, stop:].T
        total[np.diag_indices(p)] += penalties.diagonal(objective).numpy()
        for rows, second in penalties.rows(objective):
            total[rows] += second.numpy()
        return torch.from_numpy(total)


def _of_one_vector(
    a: NDArray[Any], shift: Tensor | None, precision: torch.dtype, kept: list[Tensor] | None
) -> Callable[[Any, Tensor], Tensor]:
    """The same for one vector and one output, reading X once.

    By NumPy's product of a matrix and a vector, which takes less than half the time of torch's here, and a thousand
    rows at a time, which are in the cache when they are read for the second time.
    """

    def product(batch: Any, _: Tensor) -> Tensor:
        X, h = batch[0].to(precision).numpy(), batch[1]
        moved, total = np.empty(len(X), X.dtype), np.zeros(len(a) + 1)
        for start in range(0, len(X), _CACHED_ROWS):
            rows = slice(start, start + _CACHED_ROWS)
            np.dot(X[rows], a, out=moved[rows])
            if shift is not None:
                moved[rows] += shift.item()
            R = h[rows, 0].numpy() * moved[rows]
            if h.shape[1] > 1:
                R = linear.curved(h[rows], torch.from_numpy(moved[rows, None, None])).numpy().reshape(-1)
            total[:-1] += R @ X[rows]
            total[-1] += R.sum()
        if kept is not None:  # at the end: a batch that does not fit comes again in halves
            kept.append(torch.from_numpy(moved[:, None]))
        return torch.from_numpy(total if shift is not None else total[:-1])[None]

    return product


def _entry(h: Tensor, K: int, i: int, j: int) -> Tensor:
    """hᵢ[i, j] of every row."""
    if h.shape[1] == K:
        return h[:, i] if i == j else torch.zeros_like(h[:, i])
    coupled = -h[:, K + i] * h[:, K + j]
    return coupled + h[:, i] if i == j else coupled


def _diagonals(h: Tensor, K: int) -> Tensor:
    return h if h.shape[1] == K else h[:, :K] - h[:, K:] ** 2


def _cast(x: Any, precision: torch.dtype, most: int) -> Any:
    """X in this precision, if X is wider and the copy takes at most so many bytes; else X, cast as chunks are read."""
    narrow = isinstance(x, Stored) or x.dtype.itemsize <= precision.itemsize
    if precision != torch.float32 or narrow or 4 * x.shape[0] * x.shape[1] > most:
        return x
    return as_tensor(x).to(precision)
