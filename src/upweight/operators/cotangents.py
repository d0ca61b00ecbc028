"""Output gradients u that stand for the curvature of the loss in its outputs: Σ_m E[u_m u_mᵀ] = ∂²ℓ/∂f².

With H = ∂²ℓ/∂f² = LLᵀ for one example, the columns of L give H exactly, and L ε with random signs ε gives it in
expectation. A small H is formed and factorised. A large one is known in closed form for the two kinds that losses have:

    separate outputs (squared, logistic, Poisson, …)    H = diag(h)                            L = diag(√h)
    cross-entropy over an axis, scaled by c             H = c (diag(π) − ππᵀ), π = softmax(f)   L = √c (diag(√π) − π√πᵀ)

Which of them holds is not taken from the criterion's name: it is checked on every batch, against products with H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.trees import batch_length, take, tree_map
from upweight.errors import UnsupportedModel
from upweight.model import calculus, linear
from upweight.model.objective import Objective
from upweight.model.transforms import grad, vmap

FORMED = 32  # outputs up to which H is formed and factorised, example by example, without asking for its kind
MOST = 1000  # outputs up to which a K × K matrix, or K cotangents, are affordable for every example
_NOISE = {torch.float64: 1e-8}  # of products with H, relative to the largest; 1e-3 in lower precision

Root = Callable[[Tensor], Tensor]  # maps (m, b, K) to L times each row


class Observed:
    """No cotangents: the gradients of the losses themselves."""

    def __call__(self, objective: Objective, batch: Any) -> None:
        """None, which `layers.capture` reads as the loss."""

    def count(self, objective: Objective, batch: Any) -> int:  # noqa: ARG002
        """1 gradient per example."""
        return 1

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Nothing is drawn."""
        yield


class Exact:
    """The columns of L: as many cotangents as the loss has outputs, and no chance."""

    def count(self, objective: Objective, batch: Any) -> int:
        """K cotangents per example."""
        return count(objective, batch)

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Nothing is drawn."""
        yield

    def __call__(self, objective: Objective, batch: Any) -> Float[Tensor, "m b K"]:
        """The cotangents of a batch.

        Raises:
            UnsupportedModel: if there are too many outputs, or the loss is not convex in them.
        """
        K = count(objective, batch)
        if K > MOST:
            message = (
                f"{objective.name} has {K:,} outputs per example, and an exact expectation over them takes as many "
                f"backward passes; {MOST:,} is the most that is tried. Pass samples=1: random cotangents, unbiased."
            )
            raise UnsupportedModel(message)
        if K <= FORMED:
            L = _formed(objective, batch)
            used = (L != 0).any(0).any(0)  # the softmax's H has one direction of zero curvature
            return L[:, :, used if bool(used.any()) else slice(0, 1)].permute(2, 0, 1)
        f, shape = outputs(objective, batch)
        eye = torch.eye(K, dtype=f.dtype, device=f.device)[:, None].expand(K, len(f), K)
        return _root(objective, batch, f, shape)(eye)


class Signs:
    """L ε with seeded random signs ε, `samples` times and divided by √samples.

    The numbers of an example depend on how many examples came before it, not on how they were batched.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, objective: Objective, batch: Any) -> Float[Tensor, "m b K"]:
        """The cotangents of a batch.

        Raises:
            UnsupportedModel: if there are too many outputs for a loss of unknown kind, or it is not convex in them.
        """
        K = count(objective, batch)
        if K <= FORMED:
            L = _formed(objective, batch)
            return torch.einsum("bij,mbj->mbi", L, self._draw(len(L), K).to(L)) / self.samples**0.5
        f, shape = outputs(objective, batch)
        return _root(objective, batch, f, shape)(self._draw(len(f), K).to(f)) / self.samples**0.5

    def count(self, objective: Objective, batch: Any) -> int:  # noqa: ARG002
        """`samples` cotangents per example."""
        return self.samples

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Inside, what was drawn will be drawn again if an error ends it."""
        before = self._generator.get_state()
        try:
            yield
        except BaseException:
            self._generator.set_state(before)
            raise

    def _draw(self, b: int, K: int) -> Tensor:
        signs = 2.0 * torch.randint(0, 2, (b, self.samples, K), generator=self._generator, dtype=torch.int8) - 1
        return signs.transpose(0, 1)


def outputs(objective: Objective, batch: Any) -> tuple[Float[Tensor, "b K"], tuple[int, ...]]:
    """The flattened model outputs of every example, and the shape of one example's.

    Raises:
        UnsupportedModel: if the objective does not know its outputs.
    """
    if objective.linear is not None:
        f = linear.predictor(objective, linear.wide(batch[0]))
        return f, tuple(f.shape[1:])
    if objective.outputs is None or objective.output_loss is None:
        message = (
            f"Kronecker factors need the model's output apart from its loss, and {objective.name} is one function. "
            "Pass Objective(..., outputs=f, output_loss=l), or take the gradients themselves: of=EmpiricalFisher()."
        )
        raise UnsupportedModel(message)
    batch = calculus.ready(objective, batch)
    with torch.no_grad():
        if objective.route.examples == "vmap":
            f = vmap(objective.outputs, in_dims=(None, 0))(objective.params, batch)
        else:
            rows = [objective.outputs(objective.params, take(batch, b)) for b in range(batch_length(batch))]
            f = torch.stack(rows)
    return f.reshape(len(f), -1), tuple(f.shape[1:])


def count(objective: Objective, batch: Any) -> int:
    """K, from the first example."""
    return outputs(objective, tree_map(lambda leaf: leaf[:1], batch))[0].shape[1]


def _formed(objective: Objective, batch: Any) -> Float[Tensor, "b K K"]:
    """L of every example, from the eigenvalues of H; columns of zero curvature are exact zeros."""
    H = (linear.curvatures if objective.linear is not None else calculus.output_hessians)(objective, batch)
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
    return (Q * torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()[:, None]).to(H)


def _root(objective: Objective, batch: Any, f: Tensor, shape: tuple[int, ...]) -> Root:
    """L as a function, for outputs too many to form H: the closed form that products with H confirm."""
    if objective.linear is not None:
        L = _formed(objective, batch)
        return lambda E: torch.einsum("bij,mbj->mbi", L, E)
    draw = torch.Generator().manual_seed(0)
    Z = torch.rand(2, *f.shape, generator=draw, dtype=torch.float64).add_(1)  # away from 0, and of both signs
    Z = (Z * (2 * torch.randint(0, 2, Z.shape, generator=draw) - 1)).to(f)
    HZ = torch.stack([_curved(objective, batch, f, shape, z) for z in Z])
    noise = _NOISE.get(f.dtype, 1e-3) * float(HZ.abs().max())
    h = HZ[0] / Z[0]
    if float((h * Z[1] - HZ[1]).abs().max()) <= noise and float(h.min()) >= -noise:
        roots = h.clamp(min=0).sqrt()
        return lambda E: E * roots
    for axis in range(len(shape)):
        found = _softmax_root(f.reshape(-1, *shape), axis, Z, HZ, noise)
        if found is not None:
            return found
    if f.shape[1] <= MOST:
        L = _formed(objective, batch)
        return lambda E: torch.einsum("bij,mbj->mbi", L, E)
    message = (
        f"{objective.name} has {f.shape[1]:,} outputs per example, and its second derivative in them is neither "
        "diagonal nor that of a cross-entropy, so no square root of it is known. Write the criterion as "
        "torch.nn.functional.cross_entropy over one axis of the output, or use of=EmpiricalFisher()."
    )
    raise UnsupportedModel(message)


def _softmax_root(f: Tensor, axis: int, Z: Tensor, HZ: Tensor, noise: float) -> Root | None:
    """√c (diag(√π) − π√πᵀ) with the softmax over this axis of an example's output, or None if HZ is not H's of it."""

    def arranged(E: Tensor) -> Tensor:
        return E.reshape(len(E), *f.shape).movedim(2 + axis, -1)

    pi = f.movedim(1 + axis, -1).softmax(-1)
    E, HE = arranged(Z), arranged(HZ)
    Q = pi * (E - (pi * E).sum(-1, keepdim=True))
    size = Q.square().sum((0, -1), keepdim=True)
    c = (Q * HE).sum((0, -1), keepdim=True) / size.clamp(min=torch.finfo(Q.dtype).tiny)  # one per position
    if float((c * Q - HE).abs().max()) > noise or float((c * size).min()) < -noise:
        return None
    roots, scale = pi.sqrt(), c.clamp(min=0).sqrt()

    def root(E: Tensor) -> Tensor:
        e = arranged(E) * roots
        return (scale * (e - pi * e.sum(-1, keepdim=True))).movedim(-1, 2 + axis).reshape(E.shape)

    return root


def _curved(objective: Objective, batch: Any, f: Tensor, shape: tuple[int, ...], z: Tensor) -> Tensor:
    """H z of every example, by differentiating the output's loss twice."""
    batch = calculus.ready(objective, batch)

    def one(f: Tensor, z: Tensor, example: Any) -> Tensor:
        def along(f: Tensor) -> Tensor:
            return (grad(lambda g: objective.output_loss(g.reshape(shape), example))(f) * z).sum()  # type: ignore[misc]

        return grad(along)(f)

    if objective.route.examples == "vmap":
        return vmap(one)(f, z, batch)
    return torch.stack([one(f[b], z[b], take(batch, b)) for b in range(len(f))])
