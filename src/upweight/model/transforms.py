"""The one door to torch.func, function transforms and stateless module calls, and the state torch computes in here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.func import functional_call, grad, vmap

__all__ = ["functional_call", "grad", "undisturbed", "vmap"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Autograd records and precisions are what they are, even inside the caller's no_grad() or autocast()."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
