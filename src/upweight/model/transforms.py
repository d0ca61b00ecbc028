"""The one door to torch.func, function transforms and stateless module calls, and the state torch computes in here."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad

from upweight.errors import InvalidInput

__all__ = [
    "batched",
    "functional_call",
    "grad",
    "pushed",
    "quietly",
    "refuse_inference_mode",
    "unbatched",
    "undisturbed",
    "vmap",
]

_NO_RULE = "There is a performance drop because we have not yet implemented the batching rule"  # how torch begins
_LISTENING: list[bool] = []  # while `unbatched` gathers
_QUIET = [0]  # how many are inside of `quietly`, in all threads: torch has one switch, and does not tell how it stands
_SWITCHING = threading.Lock()
_SAID: dict[Any, Any] = {}  # warnings of a user's code that were passed on


def batched(x: Tensor) -> bool:
    """Whether a tensor stands for several under vmap, as gradients do that autograd takes together."""
    kinds: Any = torch._C._functorch  # pyright: ignore
    return kinds.is_batchedtensor(x) or kinds.is_legacy_batchedtensor(x)  # is_grads_batched makes the latter


@contextmanager
def undisturbed() -> Iterator[None]:
    """Autograd records and precisions are what they are, even inside the caller's no_grad() or autocast()."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def refuse_inference_mode(what: str) -> None:
    """Raises inside of the caller's inference_mode(), which nothing can leave from within.

    Raises:
        InvalidInput: if it is on.
    """
    if torch.is_inference_mode_enabled():
        message = f"{what} is to be differentiated, which torch.inference_mode() forbids. Leave it first."
        raise InvalidInput(message)


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's warnings that vmap takes an operation row by row, which `unbatched` gathers once for `check`."""
    if _LISTENING:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


@contextmanager
def unbatched(operations: set[str]) -> Iterator[None]:
    """Adds the operations for which vmap has no rule, and which it therefore takes row by row; other warnings stay."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _LISTENING.append(True)
        _warn(True)
        try:
            yield
        finally:
            _LISTENING.pop()
            _count(0)
    for one in seen:
        if str(one.message).startswith(_NO_RULE):
            operations.update(re.findall(r"aten::\w+", str(one.message))[:1])
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, registry=_SAID)


def _count(more: int) -> None:
    """So many more are inside of `quietly`; torch warns where nobody is."""
    with _SWITCHING:
        _QUIET[0] += more
        _warn(not _QUIET[0])


def _warn(on: bool) -> None:
    """Whether torch warns of a missing rule from now on."""
    switch = getattr(getattr(torch._C, "_functorch", None), "_set_vmap_fallback_warning_enabled", None)
    if switch is not None:
        switch(on)


def vmap(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """torch.func.vmap, quietly."""
    return quietly()(torch.func.vmap(function, in_dims=in_dims))


def pushed(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, *, at_once: int) -> Tensor:
    """The derivative of function at one place along every one of k directions, (k, …), by forward mode.

    Args:
        function: from a tensor to a tensor.
        at: the place.
        along: (k, …) directions of its shape.
        at_once: directions that are taken together.
    """

    def one(direction: Tensor) -> Tensor:
        return torch.func.jvp(function, (at,), (direction,))[1]

    return quietly()(torch.func.vmap(one, chunk_size=at_once))(along)


def transformed() -> bool:
    """Whether vmap or a derivative of torch.func runs; True where this version of torch does not tell."""
    inner = getattr(torch._C, "_functorch", None)
    peek = getattr(inner, "peek_interpreter_stack", None)
    return peek is None or peek() is not None
