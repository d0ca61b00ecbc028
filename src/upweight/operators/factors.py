"""The blocks of a Kronecker curvature: what a batch adds to their factors, and to the curvature along eigenvectors.

A block is what one weight (with the bias added in the same call) takes of θ, as matrices (g, o, i): g groups of
channels, o outputs, i inputs. Every block ends as a `Basis`. A table's rows, and sides too wide to rotate, keep unit
vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from upweight.model.layers.convolution import Convolution, Seen
from upweight.model.layers.pieces import Direct, Lookup, Product, rows
from upweight.operators.basis import Basis, columns, eigen, within

WIDEST = 8192  # inputs or outputs of a layer; a wider side keeps only the diagonal of its factor
DENSE = 512  # parameters that no structure covers, up to which their whole block is kept; of more only the diagonal
_SYRK: dict[torch.dtype, Any] = {
    dtype: scipy.linalg.get_blas_funcs(["syrk"], dtype=kind)[0]
    for dtype, kind in ((torch.float64, np.float64), (torch.float32, np.float32))
}
_NUMBERS = 2**21  # of gradient matrices that are written out at once, where a layer has several positions


@dataclass(frozen=True)
class Weight:
    """A weight that multiplies, with the bias added in the same call, in all its uses.

    Args:
        name: of the parameters.
        numbers: which pieces of a batch are its uses.
        at: places in θ.
    """

    name: str
    numbers: tuple[int, ...]
    at: Int[Tensor, "g o i"]

    def sums(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"]) -> list[Tensor]:
        """What a batch adds to the factors: Σ w Σ_t a aᵀ, Σ w Σ_t d dᵀ, and Σ w Σ_t 1, over positions that count."""
        a, d = self._sides(pieces)
        w, reached = weights.to(a), _reached(d)
        a = a if reached is None else a * reached[..., None]
        ones = a.new_ones(a.shape[:3]) if reached is None else reached
        A, mass = _gram(a[None], w, WIDEST), torch.einsum("bgt,b->g", ones, w)
        if self._biased(a) and A.ndim == 2:
            A = torch.cat([A, mass[:, None]], 1)
        elif self._biased(a):  # the row and column of the 1 behind a
            A = functional.pad(A, (0, 1, 0, 1))
            A[:, :-1, -1] = _summed(a, w)
            A[:, -1, -1] = mass
        return [A, _gram(d, w, WIDEST), mass]

    def basis(self, sums: list[Tensor], n: int, strengths: Float[Tensor, " p"]) -> Basis:
        """Eigenvectors of A = Σ w Σ_t a aᵀ / Σ w t and B = Σ w Σ_t d dᵀ / n, and products of their eigenvalues.

        They take the memory of the sums, as those of every layer do.
        """
        A, B, mass = sums
        a, right = eigen(A.div_(mass.clamp(min=1e-300).reshape(-1, *[1] * (A.ndim - 1))))
        b, left = eigen(B.div_(n))
        return Basis(
            self.name, self.at, left, right, b[:, :, None] * a[:, None], within(strengths[self.at], left, right)
        )

    def squares(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"], basis: Basis) -> list[Tensor]:
        """Σ_b w_b Σ_m (Q_leftᵀ G_bm Q_right)², (g, o, i).

        For one position (D Q_left)²ᵀ (A Q_right)², else from the matrices of a few examples at a time.
        """
        a, d = self._sides(pieces)
        w = weights.to(a)
        if a.shape[2] == 1:
            left, right = self._squared(a, d, basis)
            return [((left * w[:, None, None]).permute(1, 2, 0) @ right.transpose(0, 1))]
        total = a.new_zeros(basis.values.shape)
        for start, G in self._written(a, d, basis):
            repeated = w[start : start + G.shape[1]].expand(G.shape[:2]).reshape(-1)
            total += (repeated @ G.square_().reshape(len(repeated), -1)).reshape(total.shape)
        return [total]

    def rotated(self, pieces: Sequence[Seen], basis: Basis) -> Iterator[Float[Tensor, "c goi"]]:
        """Q_leftᵀ G Q_right of a few examples at a time, flat, for pieces of the loss."""
        a, d = self._sides(pieces)
        for _, G in self._written(a, d, basis):
            yield G[0].flatten(1)

    def weighed(self, pieces: Sequence[Seen], scale: Float[Tensor, "g o i"], basis: Basis) -> Float[Tensor, " b"]:
        """Σ_m Σ (Q_leftᵀ G_bm Q_right)² scale of every example; for one position without its matrix."""
        a, d = self._sides(pieces)
        if a.shape[2] == 1:
            left, right = self._squared(a, d, basis)
            across = (right.transpose(0, 1) @ scale.mT).transpose(0, 1)  # (b, g, o)
            return (left * across).sum((1, 2))
        parts = [(G.square_().flatten(2) @ scale.flatten()).sum(0) for _, G in self._written(a, d, basis)]
        return torch.cat(parts)

    def _sides(self, pieces: Sequence[Seen]) -> tuple[Tensor, Tensor]:
        """Inputs (b, g, t, i), without the 1 for the bias, and slopes (m, b, g, t, o), over all uses."""
        uses = (pieces[number] for number in self.numbers)
        sides = [use.sides() for use in uses if isinstance(use, Product | Convolution)]
        if len(sides) == 1:
            return sides[0]
        return torch.cat([inputs for inputs, _ in sides], 2), torch.cat([slopes for _, slopes in sides], 3)

    def _biased(self, a: Tensor) -> bool:
        return a.shape[3] < self.at.shape[2]

    def _turned(self, a: Tensor, right: Tensor | None) -> Tensor:
        """(a, 1) Q_right, (b, g, t, i)."""
        if right is None:
            return torch.cat([a, a.new_ones(*a.shape[:3], 1)], 3) if self._biased(a) else a
        if not self._biased(a):
            return columns(a, right)
        return columns(a, right[:, :-1]).add_(right[:, -1:])

    def _squared(self, a: Tensor, d: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
        """(D Q_left)² summed over cotangents, (b, g, o), and (A Q_right)², (b, g, i), of single positions."""
        left = d if basis.left is None else columns(d, basis.left)
        return left.square().sum(0)[:, :, 0], self._turned(a, basis.right).square()[:, :, 0]

    def _written(self, a: Tensor, d: Tensor, basis: Basis) -> Iterator[tuple[int, Tensor]]:
        """Q_leftᵀ G Q_right of a few examples at a time, (m, c, g, o, i), with the number of the first.

        Each side is rotated before or after its sum over positions, whichever costs fewer flops.
        """
        (b, g, t, i), m, o = a.shape, len(d), d.shape[-1]
        early = replace(basis, left=basis.left if t <= i else None, right=basis.right if t <= m * o else None)
        late = replace(basis, left=basis.left if t > i else None, right=basis.right if t > m * o else None)
        step = max(1, _NUMBERS // (m * g * max(o * i, t * max(o, i))))
        for start in range(0, b, step):
            slopes, inputs = d[:, start : start + step], a[start : start + step]
            slopes = slopes if early.left is None else columns(slopes, early.left)
            if early.right is not None:
                G = slopes.mT @ self._turned(inputs, early.right)
            else:
                G = slopes.mT @ inputs
                G = torch.cat([G, slopes.sum(3)[..., None]], 4) if self._biased(a) else G
            yield start, late.rotated(G.flatten(0, 1)).unflatten(0, G.shape[:2])


@dataclass(frozen=True)
class Tied(Weight):
    """A weight that multiplies and is looked up as well, as the embeddings of language models are.

    A use as a table is a product with unit vectors: its rows are outputs, and what is read has the gradient s, which
    takes the place of the input. With positions as independent, the eigenvectors are those of the marginals

        right: Σ w Σ_t (|d|² a aᵀ + s sᵀ)        left: Σ w Σ_t (|a|² d dᵀ + |s|² e eᵀ)

    of E[GᵀG] and E[GGᵀ], and KFAC's eigenvalues their products over the common trace, which is KFAC itself where there
    are no lookups. EKFAC measures the curvature along each pair, over all uses together.
    """

    def sums(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"]) -> list[Tensor]:
        """What a batch adds to the two marginals."""
        a, d, indices, s = self._uses(pieces)
        w = weights.to(a)
        right = _gram((a * d.square().sum((0, 4)).sqrt()[..., None])[None], w, WIDEST)
        read = _gram(s[:, :, None], w, WIDEST)
        left = _gram(d * a.square().sum(3).sqrt()[None, ..., None], w, WIDEST)
        counts = d.new_zeros(self.at.shape[1])
        counts.index_add_(0, indices.flatten(), (s.square().sum((0, 3)) * w[:, None]).flatten())
        return [_upper(right) + _upper(read), _upper(left) + (counts if left.ndim == 2 else torch.diag(counts))]

    def basis(self, sums: list[Tensor], n: int, strengths: Float[Tensor, " p"]) -> Basis:
        """Eigenvectors of the marginals, and products of their eigenvalues over the trace."""
        (a, right), (b, left) = (eigen(total.div_(n)) for total in sums)
        values = b[:, :, None] * a[:, None] / a.sum().clamp(min=1e-300)
        return Basis(self.name, self.at, left, right, values, within(strengths[self.at], left, right))

    def squares(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"], basis: Basis) -> list[Tensor]:
        """Σ_b w_b Σ_m (Q_leftᵀ G_bm Q_right)², from the matrices of a few examples at a time."""
        total = weights.new_zeros(basis.values.shape)
        for some, G in self._matrices(pieces, basis):
            total += torch.einsum("b,mbgoi->goi", weights[some].to(G), G.square_()).to(total)
        return [total]

    def rotated(self, pieces: Sequence[Seen], basis: Basis) -> Iterator[Float[Tensor, "c goi"]]:
        """Q_leftᵀ G Q_right of a few examples at a time, flat, for pieces of the loss."""
        for _, G in self._matrices(pieces, basis):
            yield G[0].flatten(1)

    def weighed(self, pieces: Sequence[Seen], scale: Float[Tensor, "g o i"], basis: Basis) -> Float[Tensor, " b"]:
        """Σ_m Σ (Q_leftᵀ G_bm Q_right)² scale of every example."""
        parts = [(G.square_().flatten(2) @ scale.flatten()).sum(0) for _, G in self._matrices(pieces, basis)]
        return torch.cat(parts)

    def _uses(self, pieces: Sequence[Seen]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs (b, 1, t, i) with a 1 for the bias, slopes (m, b, 1, t, o); rows read (b, t), and s (m, b, t, i)."""
        uses = [pieces[number] for number in self.numbers]
        a, d = Weight(self.name, self._products(uses), self.at)._sides(pieces)
        lookups = [use for use in uses if isinstance(use, Lookup)]
        indices = torch.cat([use.indices for use in lookups], 1)
        s = torch.cat([use.slopes for use in lookups], 2) * (indices >= 0).to(a)[None, :, :, None]
        return self._turned(a, None), d, indices.clamp(min=0), functional.pad(s, (0, self.at.shape[2] - s.shape[3]))

    def _products(self, uses: Sequence[Seen]) -> tuple[int, ...]:
        return tuple(
            number for number, use in zip(self.numbers, uses, strict=True) if isinstance(use, Product | Convolution)
        )

    def _matrices(self, pieces: Sequence[Seen], basis: Basis) -> Iterator[tuple[slice, Tensor]]:
        """Q_leftᵀ G Q_right of a few examples at a time, (m, c, 1, o, i)."""
        a, d, indices, s = self._uses(pieces)
        (_, o, i), m, t = self.at.shape, len(d), a.shape[2] + indices.shape[1]
        step = max(1, _NUMBERS // (m * o * max(t, i)))
        for start in range(0, len(a), step):
            some = slice(start, start + step)
            read = functional.one_hot(indices[some], o).to(d).expand(m, -1, -1, -1)
            inputs = torch.cat([a[some].expand(m, *a[some].shape), s[:, some, None]], 3).flatten(0, 1)
            slopes = torch.cat([d[:, some], read[:, :, None]], 3).flatten(0, 1)[None]
            G = torch.cat([part[0] for _, part in self._written(inputs, slopes, basis)])
            yield some, G.unflatten(0, (m, -1))


@dataclass(frozen=True)
class Table:
    """A table whose rows are read: its left factor is diagonal, how often each row is.

    Args:
        name: of the parameter.
        numbers: which pieces of a batch are its uses.
        at: places in θ, (1, rows, o).
    """

    name: str
    numbers: tuple[int, ...]
    at: Int[Tensor, "g o i"]

    def sums(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"]) -> list[Tensor]:
        """Σ w (how often each row is read), Σ w Σ_t d dᵀ, and Σ w Σ_t 1, over positions that count."""
        indices, d = self._sides(pieces)
        w, reached = weights.to(d), _reached(d[:, :, None])
        read = (indices >= 0).to(d) * w[:, None] * (1 if reached is None else reached[:, 0])
        counts = d.new_zeros(self.at.shape[1]).index_add_(0, indices.clamp(min=0).flatten(), read.flatten())
        return [counts[None], _gram(d[:, :, None], w, WIDEST), read.sum()[None]]

    def basis(self, sums: list[Tensor], n: int, strengths: Float[Tensor, " p"]) -> Basis:
        """Eigenvectors of B, and the frequencies times its eigenvalues."""
        counts, B, mass = sums
        b, right = eigen(B.div_(n))
        values = (counts / mass.clamp(min=1e-300))[:, :, None] * b[:, None]
        return Basis(self.name, self.at, None, right, values, within(strengths[self.at], None, right))

    def squares(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"], basis: Basis) -> list[Tensor]:
        """Squares of what each example gives each row that it reads, rotated."""
        row, example, D = self._gathered(pieces, basis)
        total = D.new_zeros(basis.values.shape[1:])
        return [total.index_add_(0, row, D * weights.to(D)[example][:, None])[None]]

    def rotated(self, pieces: Sequence[Seen], basis: Basis) -> Iterator[Float[Tensor, "c goi"]]:
        """The rows that each example reads, rotated, among zeros: a few examples at a time, flat."""
        indices, d = self._sides(pieces)
        d = d[0] if basis.right is None else columns(d[0][:, None], basis.right)[:, 0]
        size, (t, o) = self.at.shape[1], d.shape[1:]
        step = max(1, _NUMBERS // (size * o))
        for start in range(0, len(d), step):
            some, index = d[start : start + step], indices[start : start + step].clamp(min=0)
            flat = d.new_zeros(len(some), size, o)
            yield flat.scatter_add_(1, index[..., None].expand(len(some), t, o), some).flatten(1)

    def weighed(self, pieces: Sequence[Seen], scale: Float[Tensor, "g o i"], basis: Basis) -> Float[Tensor, " b"]:
        """The same squares times the scale of their row."""
        row, example, D = self._gathered(pieces, basis)
        b = len(self._sides(pieces)[0])
        return D.new_zeros(b).index_add_(0, example, (D * scale[0, row]).sum(1))

    def _sides(self, pieces: Sequence[Seen]) -> tuple[Tensor, Tensor]:
        """Indices (b, t) and slopes (m, b, t, o), zero where an index is padding."""
        uses = [piece for piece in (pieces[number] for number in self.numbers) if isinstance(piece, Lookup)]
        indices = torch.cat([use.indices for use in uses], 1)
        d = torch.cat([use.slopes for use in uses], 2)
        return indices, d * (indices >= 0).to(d)[None, :, :, None]

    def _gathered(self, pieces: Sequence[Seen], basis: Basis) -> tuple[Tensor, Tensor, Tensor]:
        """For every pair of an example and a row it reads: the row, the example, and Σ_m (Σ_t d Q)², (pairs, o)."""
        indices, d = self._sides(pieces)
        d = d if basis.right is None else columns(d[:, :, None], basis.right)[:, :, 0]
        b, t = indices.shape
        size = self.at.shape[1]
        pair = (torch.arange(b, device=indices.device)[:, None] * size + indices.clamp(min=0)).flatten()
        pairs, place = torch.unique(pair, return_inverse=True)
        D = d.new_zeros(len(d), len(pairs), d.shape[3]).index_add_(1, place, d.reshape(len(d), b * t, -1))
        return pairs % size, pairs // size, D.square_().sum(0)


@dataclass(frozen=True)
class Whole:
    """Parameters that no structure covers, or whose uses have different ones: their own block of C, or its diagonal.

    Args:
        name: of the parameters.
        numbers: which pieces of a batch hold their gradients.
        at: places in θ, (1, 1, size).
        sizes: entries of every θ block that is involved.
        used: the places of `at` in those blocks, joined.
    """

    name: str
    numbers: tuple[int, ...]
    at: Int[Tensor, "g o i"]
    sizes: dict[str, int]
    used: Int[Tensor, " size"]

    def sums(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"]) -> list[Tensor]:
        """Σ w Σ_m g gᵀ, or its diagonal."""
        G = self._gradients(pieces)
        return [_gram(G[:, :, None, None], weights.to(G), DENSE)]

    def basis(self, sums: list[Tensor], n: int, strengths: Float[Tensor, " p"]) -> Basis:
        """Eigenvectors of the block with its penalty, exactly; or unit vectors."""
        own = strengths[self.at]
        mean = sums[0] / n
        if mean.ndim == 2:
            return Basis(self.name, self.at, None, None, mean[None], own)
        values, Q = eigen(mean + torch.diag_embed(own[0]))
        return Basis(self.name, self.at, None, Q, values[None], torch.zeros_like(own))

    def squares(self, pieces: Sequence[Seen], weights: Float[Tensor, " b"], basis: Basis) -> list[Tensor]:  # noqa: ARG002
        """Nothing: the eigenvalues of a whole block are its own."""
        return []

    def rotated(self, pieces: Sequence[Seen], basis: Basis) -> Iterator[Float[Tensor, "c goi"]]:
        """g Q."""
        G = self._gradients(pieces)[0]
        yield G if basis.right is None else G @ basis.right[0]

    def weighed(self, pieces: Sequence[Seen], scale: Float[Tensor, "g o i"], basis: Basis) -> Float[Tensor, " b"]:
        """(g Q)² · scale."""
        G = self._gradients(pieces)
        G = G if basis.right is None else G @ basis.right[0]
        return (G.square() @ scale.flatten()).sum(0)

    def _gradients(self, pieces: Sequence[Seen]) -> Float[Tensor, "m b size"]:
        chosen = [pieces[number] for number in self.numbers]
        if len(chosen) == 1 and isinstance(chosen[0], Direct):
            return chosen[0].values
        return rows(chosen, self.sizes).transpose(0, 1)[:, :, self.used]


Layer = Weight | Table | Whole


def _reached(d: Float[Tensor, "m b g t o"]) -> Float[Tensor, "b g t"] | None:
    """1 where the loss depends on a position, 0 elsewhere, as at padding; None where all count, as a single one does.

    Padding is as long as the longest row of a batch asks for, so that factors would depend on how rows were batched.
    """
    if d.shape[3] == 1:
        return None
    reached = (d != 0).any(4).any(0)
    return None if bool(reached.all()) else reached.to(d)


def _gram(x: Float[Tensor, "m b g t i"], weights: Float[Tensor, " b"], widest: int) -> Tensor:
    """Σ w x xᵀ over all axes but the group's, (g, i, i), right in its upper half; of wide x its diagonal, (g, i)."""
    x = x if bool((weights == 1).all()) else x * weights.sqrt()[:, None, None, None]
    if x.shape[-1] > widest:
        return x.square().sum((0, 1, 3))
    if x.shape[2] > 1:
        across = x.movedim(2, 0).flatten(1, 3)
        return across.mT @ across
    flat = x.flatten(0, 3)
    symmetric = _SYRK.get(flat.dtype) if flat.device.type == "cpu" else None
    if symmetric is None:
        return (flat.T @ flat)[None]
    return torch.from_numpy(symmetric(1.0, flat.numpy().T, lower=1).T)[None]  # half the flops of a product


def _summed(a: Float[Tensor, "b g t i"], weights: Float[Tensor, " b"]) -> Float[Tensor, "g i"]:
    """Σ_b w_b Σ_t a: of one group by one product of a vector, which reads a once."""
    if a.shape[1] > 1:
        return torch.einsum("bgti,b->gi", a, weights)
    return (weights.repeat_interleave(a.shape[2]) @ a.flatten(0, 2))[None]


def _upper(gram: Tensor) -> Tensor:
    """A Gram matrix with its upper half only, so that sums of several are alike; a diagonal as it is."""
    return gram if gram.ndim == 2 else gram.triu()
