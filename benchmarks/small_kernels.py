"""Claim: the two operations that are written here in place of torch's are faster than torch's, at the same numbers.

Attention, forward and first derivatives, of the tiny Llama's shapes (39 rows, 8 heads, 80 places, 8 numbers a head, a
mask that heads share): as `attention_twice` has it, as autograd takes its plain form, and by torch's fused kernel. And
float32 products of matrices: `products.product` and `@`, which are one where the processor is Intel's, or has no
AVX-512. One thread, in turns; the medians of 31.

    python benchmarks/small_kernels.py         # writes results/small_kernels.json
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from common import report, seconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from upweight.model import attention_twice, products
from upweight.model.attention import ShortAttention

ROWS, HEADS, PLACES, WIDTH, TURNS = 39, 8, 80, 8, 31
SHAPES = ((3120, 64, 64), (3120, 172, 172), (9600, 288, 288), (256, 8192, 100))


def in_turns(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each."""
    times = [{name: seconds(way)[0] for name, way in ways.items()} for _ in range(TURNS)]
    return {name: 1e3 * float(np.median([one[name] for one in times])) for name in ways}


def attention() -> dict[str, float]:
    """Milliseconds of the three, and how far ours is from autograd's."""
    q, k, v = (torch.randn(ROWS, HEADS, PLACES, WIDTH, requires_grad=True) for _ in range(3))
    slope = torch.randn(q.shape)
    seen = torch.ones(PLACES, PLACES, dtype=torch.bool).tril().expand(ROWS, 1, PLACES, PLACES)

    def fused() -> tuple[Tensor, ...]:
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        return torch.autograd.grad(output, (q, k, v), slope)

    def ours() -> tuple[Tensor, ...]:
        with attention_twice.bent():
            return fused()

    def plain() -> tuple[Tensor, ...]:
        with ShortAttention():
            output = scaled_dot_product_attention(q, k, v, seen)
        return torch.autograd.grad(output, (q, k, v), slope)

    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), plain(), strict=True))
    found = in_turns({"ours_milliseconds": ours, "autograd_milliseconds": plain, "fused_milliseconds": fused})
    ratio = found["autograd_milliseconds"] / found["ours_milliseconds"]
    return found | {"autograd_over_ours": ratio, "largest_difference": apart}


def multiplied(rows: int, i: int, j: int) -> dict[str, float]:
    """Milliseconds of both, and how far they are from each other."""
    M, Q = torch.randn(rows, i), torch.randn(i, j)
    apart = float((products.product(M, Q) - M @ Q).abs().max() / (M @ Q).abs().max())
    found = in_turns({"product_milliseconds": lambda: products.product(M, Q), "plain_milliseconds": lambda: M @ Q})
    ratio = found["product_milliseconds"] / found["plain_milliseconds"]
    return found | {"product_over_plain": ratio, "largest_difference": apart}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    numbers = {"attention": attention(), "convolves": float(products.convolves_faster())}
    numbers |= {" × ".join(map(str, shape)): multiplied(*shape) for shape in SHAPES}
    report(__file__, {"rows": ROWS, "heads": HEADS, "places": PLACES, "width": WIDTH, "turns": TURNS}, numbers)


if __name__ == "__main__":
    main()
