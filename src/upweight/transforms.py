"""The one door to torch.func: function transforms and stateless module calls come through here."""

from __future__ import annotations

from torch.func import functional_call, grad, vmap

__all__ = ["functional_call", "grad", "vmap"]
