"""Convolutions as the weight of a piece: unrolled where a matrix is asked for, convolved where that is cheaper.

With images x and output gradients d an example's gradient along a weight W is Σ d · (W ∗ x), another convolution, which
costs 2·t·i·o flops a vector at t positions and takes no more memory than its output. For many vectors the example's
matrix is written out, 2·t·i·o flops once and 2·i·o a vector, and its inputs are unrolled a few examples at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional, grad as gradient_of

from upweight.model.layers.pieces import Piece, Product
from upweight.model.layers.written import Vectors, written

_CONVOLVED = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_WEIGHTS = {1: gradient_of.conv1d_weight, 2: gradient_of.conv2d_weight, 3: gradient_of.conv3d_weight}
_RATE = 3.0  # flops of a convolution, a vector's, in the time of one for a matrix that is written out and read again
_UNROLLED = 2**26  # bytes of inputs that are unrolled at once: enough rows for a product, and no copy of a large batch


@dataclass(frozen=True)
class Convolution:
    """A weight that is convolved: the gradient of example b is Σ over its N images of d ∗ x.

    Args:
        block: the weight's name.
        bias: the name of the bias that is added to the output, or None.
        images: (b·N, C, …) what was convolved.
        slopes: (m, b·N, O, …) the gradient with respect to the output.
        examples: b.
        settings: kernel, stride, padding, dilation and groups.
        shape: the block's shape.
        where: for each entry of the weight its place in the flat block; None where the order is the same.
    """

    block: str
    bias: str | None
    images: Tensor
    slopes: Tensor
    examples: int
    settings: dict[str, Any]
    shape: tuple[int, ...]
    where: Int[Tensor, " entries"] | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that it holds gradients of."""
        return (self.block,) if self.bias is None else (self.block, self.bias)

    def product(self) -> Product:
        """The same with its inputs unrolled."""
        N, count = len(self.images) // self.examples, tuple(self.slopes.shape[3:])
        inputs = unrolled(windows(self.images, self.settings, count), N, self.settings["groups"])
        return Product(self.block, self.bias, inputs, self._by_position(), self.shape, self.where)

    def by_pixel(self) -> Product:
        """The same with inputs in the order kernel, channel: whole pixels are copied, and lie one after the other."""
        groups, (outputs, channels, *kernel) = self.settings["groups"], self._weight
        inputs = self._unrolled(slice(None), len(self.images) // self.examples)
        places = torch.arange(math.prod(self._weight)) if self.where is None else self.where
        apart = places.reshape(groups, outputs // groups, channels, math.prod(kernel))
        where = apart.transpose(2, 3).reshape(-1).to(self.images.device)
        return Product(self.block, self.bias, inputs, self._by_position(), self.shape, where)

    def sides(self) -> tuple[Float[Tensor, "b g t i"], Float[Tensor, "m b g t o"]]:
        """Inputs and slopes of `by_pixel`."""
        return self._unrolled(slice(None), len(self.images) // self.examples), self._by_position()

    def _by_position(self) -> Float[Tensor, "m b g t o"]:
        groups, (m, _, outputs) = self.settings["groups"], self.slopes.shape[:3]
        apart = self.slopes.reshape(m, self.examples, -1, groups, outputs // groups, self.slopes[0, 0, 0].numel())
        return apart.permute(0, 1, 3, 2, 5, 4).reshape(m, self.examples, groups, -1, outputs // groups)

    def rows(self) -> dict[str, Tensor]:
        """(m, b, size) the gradients of weight and bias."""
        return self.product().rows()

    def squares(self) -> Float[Tensor, "m b"]:
        """‖gradient‖² of every example."""
        return self.product().squares()

    def along(self, V: Vectors) -> Float[Tensor, "k b m"]:
        """J v for vectors (k, size) of weight and bias."""
        if len(self.slopes) > 1:
            return self.product().along(V)
        k, t = len(V), self._positions
        out = self._convolved(self._placed(V[self.block])) if t * k <= _RATE * (t + k) else self._written(V)
        if self.bias is not None:
            summed = self.slopes[0].flatten(2).sum(2).reshape(self.examples, -1, self.slopes.shape[2]).sum(1)
            out = out + V[self.bias] @ summed.T
        return out[:, :, None]

    def onto(self, U: Float[Tensor, "k b m"]) -> dict[str, Tensor]:
        """Jᵀ u for weight and bias, (k, size)."""
        padding = self.settings["padding"]
        if len(self.slopes) > 1 or padding == "same":
            return self.product().onto(U)
        axes, N = len(self.settings["kernel"]), len(self.images) // self.examples
        how = [self.settings[name] for name in ("stride", "padding", "dilation", "groups")]
        how[1] = (0,) * axes if padding == "valid" else padding
        found, biases = [], []
        for u in U[:, :, 0]:
            weighed = self.slopes[0] * u.repeat_interleave(N).reshape(-1, *[1] * (1 + axes))
            found.append(_WEIGHTS[axes](self.images, self._weight, weighed, *how).reshape(-1))
            biases.append(weighed.flatten(2).sum((0, 2)))
        flat = torch.stack(found)
        if self.where is not None:
            flat = flat.new_zeros(len(flat), math.prod(self.shape)).index_add_(1, self.where, flat)
        return {self.block: flat} | ({} if self.bias is None else {self.bias: torch.stack(biases)})

    @property
    def _positions(self) -> int:
        return self.slopes[0, 0, 0].numel() * len(self.images) // self.examples

    @property
    def _weight(self) -> tuple[int, ...]:
        """The weight's shape."""
        return (self.slopes.shape[2], self.images.shape[1] // self.settings["groups"], *self.settings["kernel"])

    def _convolved(self, W: Float[Tensor, "k entries"]) -> Float[Tensor, "k b"]:
        """Σ d · (W ∗ x) of every example, all vectors as channels of one convolution."""
        k, groups, (outputs, *rest) = len(W), self.settings["groups"], self._weight
        kernels = W.reshape(k, groups, outputs // groups, *rest).transpose(0, 1).reshape(k * outputs, *rest)
        how = (self.settings[name] for name in ("stride", "padding", "dilation", "groups"))
        moved = _CONVOLVED[len(self.settings["kernel"])](self.images, kernels, None, *how)
        moved = moved.reshape(len(moved), groups, k, -1)
        found = torch.einsum("bgko,bgo->bk", moved, self.slopes[0].reshape(len(moved), groups, -1))
        return found.reshape(self.examples, -1, k).sum(1).T

    def _written(self, V: Vectors) -> Float[Tensor, "k b"]:
        """The same by the matrices of the examples, whose columns are in the order kernel, channel."""
        groups, (outputs, channels, *kernel) = self.settings["groups"], self._weight
        across = V.tiles(self.block, (groups, self._weight), self.where, self._matrices)
        each = self._positions * groups * channels * math.prod(kernel) * self.images.element_size()
        N, most = len(self.images) // self.examples, max(1, _UNROLLED // each)
        size = -(-self.examples // -(-self.examples // most))  # parts alike
        parts = []
        for start in range(0, self.examples, size):
            b = min(size, self.examples - start)
            inside = slice(N * start, N * (start + b))
            apart = self.slopes[0, inside].reshape(b, N, groups, outputs // groups, -1)
            slopes = apart.permute(0, 2, 1, 4, 3).reshape(b, groups, -1, outputs // groups)
            parts.append((self._unrolled(inside, N), slopes))
        return written(parts, across, len(V))

    def _placed(self, W: Float[Tensor, "k size"]) -> Float[Tensor, "k entries"]:
        """Vectors of the block in the order of the weight."""
        return W if self.where is None else W[:, self.where]

    def _matrices(self, W: Float[Tensor, "k size"]) -> Float[Tensor, "k g o i"]:
        """Vectors of the block as matrices whose columns are in the order kernel, channel."""
        groups, (outputs, channels, *_) = self.settings["groups"], self._weight
        kernels = self._placed(W).reshape(len(W), groups, outputs // groups, channels, -1).transpose(3, 4)
        return kernels.reshape(len(W), groups, outputs // groups, -1)

    def _unrolled(self, inside: slice, N: int) -> Float[Tensor, "b g t i"]:
        """What each position sees, kernel before channel: whole pixels are copied, not numbers."""
        groups, count = self.settings["groups"], tuple(self.slopes.shape[3:])
        if self.images.shape[1] == groups:  # a pixel is one number
            return unrolled(windows(self.images[inside], self.settings, count), N, groups)
        pixels = self.images[inside].movedim(1, -1).contiguous().movedim(-1, 1)
        seen, axes = windows(pixels, self.settings, count), len(count)
        apart = seen.unflatten(1, (groups, -1)).unflatten(0, (-1, N))  # (b, N, groups, C/groups, *count, *kernel)
        order = (0, 2, 1, *range(4, 4 + 2 * axes), 3)
        b, positions = len(apart), N * math.prod(count)
        return apart.permute(order).reshape(b, groups, positions, -1)


Seen = Piece | Convolution


def windows(images: Tensor, settings: dict[str, Any], count: tuple[int, ...]) -> Tensor:
    """What each position of a convolution sees: (b, C, *count, *kernel), a view of the padded images."""
    kernel, stride, padding = settings["kernel"], settings["stride"], settings["padding"]
    dilation = settings["dilation"]
    spans = [every * (size - 1) for size, every in zip(kernel, dilation, strict=True)]
    if padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(side, side) for side in ((0,) * len(kernel) if padding == "valid" else padding)]
    out = functional.pad(images, [side for pair in reversed(sides) for side in pair])
    for axis, (span, step, every, positions) in enumerate(zip(spans, stride, dilation, count, strict=True)):
        out = out.unfold(2 + axis, span + 1, step)[..., ::every].narrow(2 + axis, 0, positions)
    return out


def unrolled(seen: Tensor, N: int, groups: int) -> Tensor:
    """Windows of b·N images as (b, groups, N·positions, C/groups·kernel), copied once; positions lie last in memory."""
    axes = (seen.ndim - 2) // 2
    apart = seen.unflatten(1, (groups, -1)).unflatten(0, (-1, N))  # (b, N, groups, C/groups, *count, *kernel)
    order = (0, 2, 3, *range(4 + axes, 4 + 2 * axes), 1, *range(4, 4 + axes))
    b, inner = len(apart), math.prod(seen.shape[2 + axes :]) * apart.shape[3]
    return apart.permute(order).reshape(b, groups, inner, -1).transpose(-1, -2)
