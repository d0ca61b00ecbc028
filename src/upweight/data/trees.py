"""Examples are nested tuples, lists and dicts of tensors; these few functions walk them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with `function` applied to every leaf."""
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(tree_map(function, value) for value in tree)
    return function(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves from left to right; None is no leaf."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from leaves(value)
    elif tree is not None:
        yield tree


def batch_length(batch: Any) -> int:
    """How many examples a batch holds: the length of its first leaf."""
    return int(next(leaves(batch)).shape[0])


def take(batch: Any, index: int) -> Any:
    """Example `index` of a batch."""
    return tree_map(lambda leaf: leaf[index], batch)


def like(batch: Any, reference: Tensor) -> Any:
    """The batch with floating-point leaves in the dtype of `reference`, dense, and every leaf on its device."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_inference():
            leaf = leaf.clone()  # autograd cannot save what inference_mode() made
        if leaf.is_floating_point():
            return leaf.to(device=reference.device, dtype=reference.dtype)
        return leaf.to(device=reference.device)

    return tree_map(cast, batch)
