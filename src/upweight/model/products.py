"""Products of matrices in float32, by a convolution where that is the faster way to the same numbers.

torch multiplies matrices by MKL, which keeps AVX-512 to Intel's processors, and convolves by oneDNN, which takes it
wherever it is. A row of M is a pixel whose channels are its entries, and M Q a convolution of one pixel by Qᵀ, of
pictures of 2 × 4 pixels that stay where they are in memory. What it saves: benchmarks/small_kernels.py.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_PICTURE = (2, 4)
_PICTURES, _FLOPS = 16, 2**23  # with fewer pictures oneDNN takes another way; fewer flops are not worth the other order


def product(M: Float[Tensor, "*rows i"], Q: Float[Tensor, "i j"]) -> Float[Tensor, "*rows j"]:
    """M Q."""
    flat = M.reshape(-1, M.shape[-1])
    if not _pays(flat, Q):
        return M @ Q
    whole = len(flat) // math.prod(_PICTURE) * math.prod(_PICTURE)
    pictures = flat[:whole].reshape(-1, *_PICTURE, flat.shape[1]).permute(0, 3, 1, 2)
    found = functional.conv2d(pictures, Q.T[:, :, None, None]).permute(0, 2, 3, 1).reshape(whole, -1)
    found = found if whole == len(flat) else torch.cat([found, flat[whole:] @ Q])
    return found.reshape(*M.shape[:-1], -1)


def _pays(flat: Tensor, Q: Tensor) -> bool:
    """Whether there is a processor for it, and enough to do."""
    size = 2 * flat.numel() * Q.shape[1]
    near = flat.dtype == Q.dtype == torch.float32 and flat.device.type == "cpu"
    return near and size >= _FLOPS and len(flat) >= _PICTURES * math.prod(_PICTURE) and convolves_faster()


@cache
def convolves_faster() -> bool:
    """Whether the processor has AVX-512 and is not Intel's, and torch has MKL and oneDNN."""
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    told = Path("/proc/cpuinfo")
    if not built or not torch.backends.mkldnn.enabled or not told.exists():
        return False
    first = told.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    return "AuthenticAMD" in first and "avx512f" in first
