"""Output gradients u that stand for the curvature of the loss in its outputs: Σ_m E[u_m u_mᵀ] = ∂²ℓ/∂f².

With H = ∂²ℓ/∂f² = LLᵀ for one example, the columns of L give H exactly, and L ε with random signs ε gives it in
expectation. A small H is formed and factorised. A large one is known in closed form for the two kinds that losses have:

    separate outputs (squared, logistic, Poisson, …)    H = diag(h)                            L = diag(√h)
    cross-entropy over an axis, scaled by c             H = c (diag(π) − ππᵀ), π = softmax(f)   L = √c (diag(√π) − π√πᵀ)

Which of them holds is not taken from the criterion's name: it is checked on every batch, against products with H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.trees import tree_map
from upweight.errors import UnsupportedModel
from upweight.model import calculus, linear
from upweight.model.objective import Objective

FORMED = 32  # outputs up to which H is formed and factorised, example by example, without asking for its kind
MOST = 1000  # outputs up to which a K × K matrix, or K cotangents, are affordable for every example
_NOISE = {torch.float64: 1e-8}  # of products with H, relative to the largest; 1e-3 in lower precision

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio: the step of splitmix64

Root = Callable[[Tensor], Tensor]  # maps (m, b, K) to L times each row


class Observed:
    """No cotangents: the gradients of the losses themselves."""

    name = "observed"

    def count(self, objective: Objective, batch: Any) -> int:  # noqa: ARG002
        """1 gradient per example."""
        return 1


class Exact:
    """The columns of L: as many cotangents as the loss has outputs, and no chance."""

    name = "exact"

    def count(self, objective: Objective, batch: Any) -> int:
        """K cotangents per example."""
        return count(objective, batch)

    def of(self, objective: Objective, batch: Any, f: Float[Tensor, "b ..."]) -> Float[Tensor, "m b K"]:
        """The cotangents of a batch whose outputs are f.

        Raises:
            UnsupportedModel: if there are too many outputs, or the loss is not convex in them.
        """
        K = f[0].numel()
        if K > MOST:
            message = (
                f"{objective.name} has {K:,} outputs per example, and an exact expectation over them takes as many "
                f"backward passes; {MOST:,} is the most that is tried. Pass samples=1: random cotangents, unbiased."
            )
            raise UnsupportedModel(message)
        if K <= FORMED:
            L = _formed(objective, batch, f)
            used = (L != 0).any(0).any(0)  # the softmax's H has one direction of zero curvature
            return L[:, :, used if bool(used.any()) else slice(0, 1)].permute(2, 0, 1)
        eye = torch.eye(K, dtype=f.dtype, device=f.device)[:, None].expand(K, len(f), K)
        return _root(objective, batch, f)(eye)


class Signs:
    """L ε with random signs ε, `samples` times and divided by √samples.

    The signs of a row depend on the seed, the stream and the row's number alone: not on the batch it came in, nor on
    what was computed before it, so that rows can be visited in any order and by any process.

    Args:
        samples: cotangents per example.
        seed: of the draws.
        stream: others of the same seed.
    """

    def __init__(self, samples: int, seed: int, stream: int = 0) -> None:
        self.samples = samples
        self.name = f"signs-{samples}-{seed}-{stream}"
        self._start = _mixed(_mixed(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream))[0]

    def of(
        self, objective: Objective, batch: Any, numbers: Sequence[int], f: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "m b K"]:
        """The cotangents of a batch whose outputs are f.

        Raises:
            UnsupportedModel: if there are too many outputs for a loss of unknown kind, or it is not convex in them.
        """
        return self._drawn(_root(objective, batch, f), numbers, f)

    def _drawn(self, root: Root, numbers: Sequence[int], f: Float[Tensor, "b ..."]) -> Float[Tensor, "m b K"]:
        signs = self._signs(numbers, f[0].numel(), f)
        return root(signs if self.samples == 1 else signs / self.samples**0.5)

    def count(self, objective: Objective, batch: Any) -> int:  # noqa: ARG002
        """`samples` cotangents per example."""
        return self.samples

    def _signs(self, numbers: Sequence[int], K: int, like: Tensor) -> Float[Tensor, "m b K"]:
        """The signs of these rows: the bits of one sequence per row and sample, as long as is asked for."""
        rows = np.asarray(numbers, dtype=np.uint64) * np.uint64(self.samples)
        rows = rows + np.arange(self.samples, dtype=np.uint64)[:, None]
        words = np.arange(1, -(-K // 64) + 1, dtype=np.uint64) * _GOLDEN
        drawn = _mixed(_mixed(rows + self._start)[..., None] + words)
        bits = np.unpackbits(drawn.astype("<u8").view(np.uint8), axis=-1, count=K, bitorder="little")
        return torch.from_numpy(bits).to(like).mul_(2).sub_(1)


Source = Exact | Signs | Observed


def of_each(
    sources: Sequence[Source], objective: Objective, batch: Any, numbers: Sequence[int]
) -> Callable[[Tensor], list[Float[Tensor, "m b K"]]] | None:
    """The cotangents of several sources, from the outputs of a batch; equal ones, and L, are made once.

    None, in place of a function, means the loss, as for `Observed`.
    """
    if any(isinstance(source, Observed) for source in sources):
        return None

    def every(f: Tensor) -> list[Tensor]:
        if all(isinstance(source, Signs) for source in sources):
            root = _root(objective, batch, f)
            return [source._drawn(root, numbers, f) for source in sources if isinstance(source, Signs)]
        return [source.of(objective, batch, f) for source in sources[:1] if isinstance(source, Exact)]

    return every


def outputs(objective: Objective, batch: Any) -> Float[Tensor, "b ..."]:
    """The model outputs of every example.

    Raises:
        UnsupportedModel: if the objective does not know its outputs.
    """
    if objective.linear is None and (objective.outputs is None or objective.output_loss is None):
        message = (
            f"Kronecker factors need the model's output apart from its loss, and {objective.name} is one function. "
            "Pass Objective(..., outputs=f, output_loss=l), or take the gradients themselves: of=EmpiricalFisher()."
        )
        raise UnsupportedModel(message)
    return calculus.shaped_outputs(objective, batch)


def count(objective: Objective, batch: Any) -> int:
    """K, from the first example."""
    return outputs(objective, tree_map(lambda leaf: leaf[:1], batch))[0].numel()


def _formed(objective: Objective, batch: Any, f: Tensor) -> Float[Tensor, "b K K"]:
    """L of every example, from the eigenvalues of H; columns of zero curvature are exact zeros."""
    if objective.linear is not None:
        H = linear.curvatures(objective, batch)
    else:
        H = calculus.output_hessians(objective, batch, f)
    eigenvalues, Q = torch.linalg.eigh(H.double())
    largest = float(eigenvalues.abs().max())
    noise = _NOISE.get(H.dtype, 1e-3) * largest + (0.0 if H.dtype == torch.float64 else 1e-6)
    if float(eigenvalues.min()) < -noise:
        message = (
            f"The loss of {objective.name} is not convex in the model's output: its second derivative has the "
            f"eigenvalue {float(eigenvalues.min()):.3g} (largest {largest:.3g}), and Kronecker factors need it ≥ 0. "
            "Use of=EmpiricalFisher(), or the curvature Hessian()."
        )
        raise UnsupportedModel(message)
    floor = 1e-14 * eigenvalues[:, -1:].clamp(min=0)
    L = Q * torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()[:, None]
    unused = H.diagonal(dim1=1, dim2=2) == 0  # outputs that do not count, as of padding: zeros, and not rounding
    return torch.where(unused[:, :, None], 0.0, L).to(H)


def _root(objective: Objective, batch: Any, f: Float[Tensor, "b ..."]) -> Root:
    """L as a function; for outputs too many to form H the closed form that products with H confirm."""
    K = f[0].numel()
    if objective.linear is not None or K <= FORMED:
        L = _formed(objective, batch, f)
        return lambda E: torch.einsum("bij,mbj->mbi", L, E.to(L))
    draw = torch.Generator().manual_seed(0)
    z = (torch.rand(2, K, generator=draw) + 1) * (2.0 * torch.randint(0, 2, (2, K), generator=draw) - 1)
    z = z.to(f)  # away from 0, and of both signs

    def product(z: Tensor) -> Float[Tensor, "b K"]:
        return calculus.output_products(objective, batch, z.expand(1, len(f), K), f)[0]

    Hz = product(z[0])
    noise = _NOISE.get(f.dtype, 1e-3) * float(Hz.abs().max())
    for axis in range(f.ndim - 1):
        found = _softmax_root(f, axis, z[0], Hz, noise)
        if found is not None:
            return found
    h = Hz / z[0]
    if float((h * z[1] - product(z[1])).abs().max()) <= noise and float(h.min()) >= -noise:
        roots = h.clamp(min=0).sqrt()
        return lambda E: E * roots
    if K <= MOST:
        L = _formed(objective, batch, f)
        return lambda E: torch.einsum("bij,mbj->mbi", L, E)
    message = (
        f"{objective.name} has {K:,} outputs per example, and its second derivative in them is neither "
        "diagonal nor that of a cross-entropy, so no square root of it is known. Write the criterion as "
        "torch.nn.functional.cross_entropy over one axis of the output, or use of=EmpiricalFisher()."
    )
    raise UnsupportedModel(message)


def _softmax_root(f: Tensor, axis: int, z: Float[Tensor, " K"], Hz: Float[Tensor, "b K"], noise: float) -> Root | None:
    """√c (diag(√π) − π√πᵀ) with the softmax over this axis of an example's output, or None if Hz is not H's of it."""
    if f.shape[1 + axis] < 2:
        return None

    def arranged(E: Tensor) -> Tensor:
        return E.reshape(*E.shape[:-1], *f.shape[1:]).movedim(E.ndim - 1 + axis, -1)

    pi = f.movedim(1 + axis, -1).softmax(-1)
    e, He = arranged(z), arranged(Hz)
    q = pi * (e - (pi * e).sum(-1, keepdim=True))
    size = q.square().sum(-1, keepdim=True)
    c = (q * He).sum(-1, keepdim=True) / size.clamp(min=torch.finfo(q.dtype).tiny)  # one per position
    if float((c * size).min()) < -noise or float((c * q).sub_(He).abs_().max()) > noise:
        return None
    roots, scale = pi.sqrt(), c.clamp(min=0).sqrt()

    def root(E: Tensor) -> Tensor:
        e = arranged(E) * roots
        return e.sub_(pi * e.sum(-1, keepdim=True)).mul_(scale).movedim(-1, E.ndim - 1 + axis).reshape(E.shape)

    return root


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well-mixed bits of 64-bit numbers that may be in order: the end of splitmix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
