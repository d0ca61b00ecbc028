"""Attention in the few operations that differentiation needs, in place of torch's own plain form.

Torch's looks through all weights for rows without a key, three times, since such a row is 0 and not 0/0. The mask,
which has no heads, says as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ShortAttention(TorchFunctionMode):
    """Inside, scaled_dot_product_attention without dropout is `attended`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.pop("dropout_p", 0.0) or (given.get("is_causal") and given.get("attn_mask") is not None):
            return func(*args, **kwargs)
        mask = given["mask"] = given.pop("attn_mask", None)
        known = mask is None or mask.dtype == torch.bool or mask.is_floating_point()
        if not known or (mask is not None and mask.ndim > given["query"].ndim):
            return func(*args, **kwargs)  # torch says what it has against it
        return attended(**given)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, and 0 for a query that may see no key; arguments as torch has them.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> attended(x, x, x, torch.tensor([[True, False], [False, False]]))
    tensor([[[1., 0.],
             [0., 0.]]])
    """
    if enable_gqa:
        key, value = (of_heads(query.shape[-3], x) for x in (key, value))
    weights = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        mask = weights.new_ones(weights.shape[-2:], dtype=torch.bool).tril()
    if mask is None:
        return weights.softmax(-1) @ value
    least = torch.finfo(weights.dtype).min
    if mask.dtype == torch.bool:
        seen, bias = mask, torch.zeros_like(mask, dtype=weights.dtype).masked_fill(~mask, least)
    else:
        seen, bias = mask != -torch.inf, mask.to(weights.dtype).clamp(min=least)
    return ((weights + bias).softmax(-1) @ value) * seen.any(-1, keepdim=True)


def of_heads(count: int, x: Tensor) -> Tensor:
    """Keys or values of so many heads, where several share one."""
    return x if x.shape[-3] == count else x.repeat_interleave(count // x.shape[-3], -3)
