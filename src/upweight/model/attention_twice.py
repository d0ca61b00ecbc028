"""Attention whose second derivatives are written out: a third of the time that autograd takes through its plain form.

With P = softmax(s q kᵀ + mask) by rows, o = P v and, for a slope ȯ of o,

    E = ȯ vᵀ − (ȯ·o),   D = P ∘ E,   q̇ = s D k,   k̇ = s Dᵀ q,   v̇ = Pᵀ ȯ

a function of (q, k, v, ȯ) whose own derivative along a, b, c, the slopes of q̇, k̇, v̇, is with

    M = P ∘ (Z − row sums of P ∘ Z),         Z = s (a kᵀ + q bᵀ)
    S = W − P ∘ row sums of W,               W = M ∘ E + P ∘ ȯ cᵀ

    by q: s (D b + S k),   by k: s (Dᵀ a + Sᵀ q),   by v: Mᵀ ȯ,   by ȯ: M v + P c

Heads are taken a few at a time, so that their scores stay near the processor, and narrow products are made from the
left, (kᵀ Dᵀ)ᵀ, for which BLAS is three times as fast. First derivatives gain as well
(benchmarks/small_kernels.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function as seen_by

from upweight.model.attention import of_heads
from upweight.model.calculus import Function
from upweight.model.transforms import batched

_NUMBERS_AT_ONCE = 2**17  # scores of the heads that are taken together
_NUMBERS_ELSEWHERE = 2**26  # the same on devices where every operation has to be started
_PLAINLY = F.scaled_dot_product_attention
_FOUND: list[Any] = []  # what stood in its place, once for each that is inside of `bent`, in all threads
_SWITCHING, _HERE = threading.Lock(), threading.local()


@contextmanager
def bent(unless: Callable[[Sequence[Any]], bool] | None = None) -> Iterator[None]:
    """torch's attention runs as written here, in this thread: it can be differentiated once or twice, and no more.

    Args:
        unless: whether somebody watches one of query, key, value and mask, and is to see torch's own function.
    """
    depth, before_unless = getattr(_HERE, "depth", 0), getattr(_HERE, "unless", None)
    with _SWITCHING:
        _FOUND.append(_FOUND[0] if _FOUND else F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = _attention
    _HERE.depth, _HERE.unless = depth + 1, unless
    try:
        yield
    finally:
        _HERE.depth, _HERE.unless = depth, before_unless
        with _SWITCHING:
            before = _FOUND.pop()
            if not _FOUND:
                F.scaled_dot_product_attention = before


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In the signature of torch's; what is not written here goes to torch, and what other threads ask."""
    if not getattr(_HERE, "depth", 0):
        before = _FOUND[0] if _FOUND else _PLAINLY  # the last may leave meanwhile
        settings: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return before(query, key, value, attn_mask, dropout_p, is_causal, **settings)
    tensors = (query, key, value)
    if _HERE.unless is not None and _HERE.unless((*tensors, attn_mask)) and seen_by(tensors):
        settings = {"scale": scale, "enable_gqa": enable_gqa}
        return handle_torch_function(_attention, tensors, *tensors, attn_mask, dropout_p, is_causal, **settings)
    if enable_gqa:
        key, value = (of_heads(query.shape[-3], x) for x in (key, value))
    added = attn_mask
    plain = bool(dropout_p) or query.ndim < 3 or query.dtype not in (torch.float32, torch.float64)
    odd = added is not None and (is_causal or added.ndim > query.ndim)
    if plain or odd or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return _PLAINLY(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if is_causal:
        added = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if added is not None and added.dtype == torch.bool:
        added = torch.zeros_like(added, dtype=query.dtype).masked_fill(~added, float("-inf"))
    try:
        return _Attention.apply(query, key, value, added, query.shape[-1] ** -0.5 if scale is None else scale)[0]
    except _LearnedMask:
        return _PLAINLY(query, key, value, attn_mask, scale=scale)


class _LearnedMask(Exception):
    """A mask that is differentiated, which inside of vmap does not say so."""


def _over_batches(function: type[Function]) -> Callable[..., Any]:
    """The rule of vmap for a function of tensors whose leading axes are all alike: one more in front."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        moved = []
        for place, (one, at) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(one, Tensor):
                moved.append(one)
                continue
            there = one.expand(info.batch_size, *one.shape) if at is None else one.movedim(at, 0)
            missing = moved[0].ndim - there.ndim if place else 0  # of a mask that says nothing of heads
            moved.append(there.reshape(len(there), *[1] * missing, *there.shape[1:]))
        found = function.apply(*moved)
        return found, (0,) * len(found)

    return rule


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All leading axes as one, a few at a time; the first two are queries and keys."""
    scores = torch.Size((tensors[0].shape[-2], tensors[1].shape[-2]))
    together = _count(scores, tensors[0].device)
    yield from zip(*(_flat(one).split(together) for one in tensors), strict=True)


def _count(scores: torch.Size, device: torch.device) -> int:
    """How many heads are taken together, whose scores are (…, queries, keys)."""
    numbers = _NUMBERS_AT_ONCE if device.type == "cpu" else _NUMBERS_ELSEWHERE
    return max(1, numbers // max(1, scores[-2:].numel()))


def _added(mask: Tensor, flat: torch.Size, shape: torch.Size) -> tuple[int, Tensor]:
    """How many heads in a row a mask says the same of, and what it adds to each of them, (those, queries, keys)."""
    alike = mask.ndim < 3 or mask.shape[-3] == 1
    heads = shape[-3] if alike else 1
    over = (*shape[:-3], 1 if alike else shape[-3], *flat[1:])
    return heads, _flat(mask.expand(over))


def _together(P: Tensor, heads: int) -> Iterator[tuple[slice, slice]]:
    """The heads that are taken together, and the lines of `_added` that are theirs: whole lines, or parts of one."""
    some = _count(P.shape, P.device)
    whole = some // heads * heads  # 0 where they are fewer than the heads of a line
    for start in range(0, len(P), whole or heads):
        stop = min(start + (whole or heads), len(P))
        for first in range(start, stop, whole or some):
            yield slice(first, min(first + (whole or some), stop)), slice(start // heads, stop // heads)


class _Attention(Function):
    """(q, k, v, mask, s) → o, and P for its derivatives."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: float) -> tuple[Tensor, Tensor]:
        flat = [_flat(one) for one in (q, k, v)]
        P = q.new_empty(len(flat[0]), q.shape[-2], k.shape[-2])
        turned = q.new_empty(len(P), v.shape[-1], q.shape[-2])
        heads, added = (1, None) if mask is None else _added(mask, P.shape, q.shape)
        blind = None if added is None else added.amax(-1, keepdim=True) == -torch.inf  # queries that may see no key
        blind = blind if blind is not None and bool(blind.any()) else None
        for some, rows in _together(P, heads):
            q_, k_, v_, p, out = (one[some] for one in (*flat, P, turned))
            p.baddbmm_(q_, k_.mT, beta=0, alpha=size)
            if added is not None:
                p.unflatten(0, (rows.stop - rows.start, -1)).add_(added[rows, None])
            torch.softmax(p, -1, out=p)
            if blind is not None:
                p.unflatten(0, (rows.stop - rows.start, -1)).masked_fill_(blind[rows, None], 0)
            out.baddbmm_(v_.mT, p.mT, beta=0)
        return turned.mT.reshape(*q.shape[:-1], v.shape[-1]), P.reshape(*q.shape[:-1], k.shape[-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        if ctx.needs_input_grad[3]:
            raise _LearnedMask
        q, k, v, _, ctx.size = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if slope is None:
            return (None,) * 5
        q, k, v, o, P = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_Slopes.apply(q, k, v, slope, o.detach(), P, ctx.size)[:3], None, None
        together = _of_several if batched(slope) else _slopes
        return *together(q, k, v, slope, o, P, ctx.size), None, None


def _slopes(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, o: Tensor, P: Tensor, size: float, E: Tensor | None = None
) -> list[Tensor]:
    """q̇, k̇ and v̇; E is written to where it is wanted."""
    found = [_turned(one) for one in (q, k, v)]
    inner, kept = (slope * o).sum(-1, keepdim=True), P if E is None else E
    room = P.new_empty(min(_count(P.shape, P.device), P.shape[:-2].numel()), *P.shape[-2:])
    for q_, k_, v_, g, own, P_, E_, by_q, by_k, by_v in _heads(q, k, v, slope, inner, P, kept, *found):
        D = room[: len(P_)]
        if E is None:
            torch.baddbmm(own, g, v_.mT, beta=-1, out=D).mul_(P_)
        else:
            torch.mul(torch.baddbmm(own, g, v_.mT, beta=-1, out=E_), P_, out=D)
        by_q.baddbmm_(k_.mT, D.mT, beta=0, alpha=size)
        by_k.baddbmm_(q_.mT, D, beta=0, alpha=size)
        by_v.baddbmm_(g.mT, P_, beta=0)
    return [_back(x, one) for x, one in zip(found, (q, k, v), strict=True)]


def _of_several(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, o: Tensor, P: Tensor, size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of several slopes at once, which are batched: nothing is written into what is there."""
    D = (slope @ v.mT - (slope * o).sum(-1, keepdim=True)) * P
    return (k.mT @ D.mT).mT * size, (q.mT @ D).mT * size, (slope.mT @ P).mT


def _turned(like: Tensor) -> Tensor:
    """Room for as many numbers, heads as one axis and the last two exchanged."""
    return like.new_empty(like.shape[:-2].numel(), like.shape[-1], like.shape[-2])


def _back(turned: Tensor, like: Tensor) -> Tensor:
    """As the other one lies."""
    return turned.mT.reshape(like.shape)


def _flat(one: Tensor) -> Tensor:
    """All leading axes as one."""
    return one.reshape(-1, *one.shape[-2:])


class _Slopes(Function):
    """(q, k, v, ȯ; o, P, s) → q̇, k̇, v̇, and E for its derivative."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, slope: Tensor, o: Tensor, P: Tensor, size: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        E = torch.empty(P.shape, dtype=P.dtype, device=P.device)
        by_q, by_k, by_v = _slopes(q, k, v, slope, o, P, size, E)
        return by_q, by_k, by_v, E

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, slope, _, P, ctx.size = inputs
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, slope, P, output[3])

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            message = "Attention is differentiated twice here, not three times."
            raise NotImplementedError(message)
        q, k, v, slope, P, E = ctx.saved_tensors
        a, b, c = (torch.zeros_like(x) if one is None else one for one, x in zip((a, b, c), (q, k, v), strict=True))
        size = ctx.size
        found = [_turned(one) for one in (q, k, v, slope)]
        left, right = torch.cat([a, q], -1), torch.cat([k, b], -1)
        for q_, k_, v_, g, P_, E_, a_, b_, c_, left_, right_, by_q, by_k, by_v, by_slope in _heads(
            q, k, v, slope, P, E, a, b, c, left, right, *found
        ):
            M = (left_ @ right_.mT).mul_(P_).mul_(size)
            M.addcmul_(P_, M.sum(-1, keepdim=True), value=-1)
            S = (g @ c_.mT).mul_(P_).addcmul_(M, E_)
            S.addcmul_(P_, S.sum(-1, keepdim=True), value=-1)
            D = P_ * E_
            by_q.baddbmm_(b_.mT, D.mT, beta=0, alpha=size).baddbmm_(k_.mT, S.mT, alpha=size)
            by_k.baddbmm_(a_.mT, D, beta=0, alpha=size).baddbmm_(q_.mT, S, alpha=size)
            by_v.baddbmm_(g.mT, M, beta=0)
            by_slope.baddbmm_(v_.mT, M.mT, beta=0).baddbmm_(c_.mT, P_.mT)
        by_q, by_k, by_v, by_slope = (_back(x, one) for x, one in zip(found, (q, k, v, slope), strict=True))
        return by_q, by_k, by_v, by_slope, None, None, None


_Attention.vmap = staticmethod(_over_batches(_Attention))
_Slopes.vmap = staticmethod(_over_batches(_Slopes))
