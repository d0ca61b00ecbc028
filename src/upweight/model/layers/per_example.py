"""How parameters act inside a model, found by watching one forward pass; gradients of examples from it.

While the loss of one example runs under vmap, every torch function that is given a parameter, or a view of one, is
seen. Where the function multiplies (linear, matmul, convolutions, embeddings) its output gets an offset of zeros, one
per example; the gradient with respect to the offset is the output gradient, and with the input that was seen it makes
a `pieces.Product` or `Lookup`. Any other use (norms, lone biases, positional tables, whatever a user writes) gets the
offset on the parameter itself, and its gradient is a `Direct`: autograd's own answer, still exact. So every use of
every parameter has a rule, shared and functional uses included, and the model is neither wrapped nor hooked.

`plan` traces once, and compares with plain autograd on the same examples; `capture` then works on any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.trees import batch_length, leaves, tree_map
from upweight.errors import first_line
from upweight.model import attention_twice, calculus, linear
from upweight.model.agreement import agree, tolerance
from upweight.model.layers import pieces
from upweight.model.layers.convolution import Convolution, Seen, unrolled, windows
from upweight.model.layers.pieces import Direct, Lookup, Piece, Product, merged
from upweight.model.layers.watching import Use, Watch
from upweight.model.layers.written import Vectors
from upweight.model.objective import Objective
from upweight.model.transforms import vmap

_FEW = 3
_UNWATCHED = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)  # of losses that resist it


@dataclass(frozen=True)
class Plan:
    """Every use of every parameter, in the order in which the model makes them.

    Args:
        uses: what was seen.
        rules: for every block of θ the rules that cover it, in words.
        structured: whether `capture` goes by the uses; otherwise by autograd, example by example.
        reason: why not, if so.
        sizes: numbers in every block.
        bytes: memory that the captured pieces of one example need, for one cotangent.
        shapes: of the tensors of an example; another shape needs another plan.
        others: the plans of other shapes that were met.
    """

    uses: tuple[Use, ...]
    rules: dict[str, str]
    structured: bool
    reason: str
    sizes: dict[str, int]
    bytes: int
    shapes: tuple[tuple[int, ...], ...] = ()
    others: dict[tuple[tuple[int, ...], ...], Plan] = field(default_factory=dict, compare=False, repr=False)

    def at(self, objective: Objective, batch: Any) -> Plan:
        """The plan for examples of these shapes: the same uses, made at other sizes, or one that is found anew."""
        shapes = _shapes(batch)
        if not self.structured or shapes == self.shapes:
            return self
        if shapes not in self.others:
            few = tree_map(lambda leaf: leaf[:_FEW], batch)
            self.others[shapes] = _resized(objective, self, few) or plan(objective, few)
        return self.others[shapes]


def plan(objective: Objective, batch: Any, truth: Float[Tensor, "b p"] | None = None) -> Plan:
    """The uses of every parameter, found on a few examples and compared with plain autograd on them.

    Cost: one forward and backward pass over `batch`, twice.

    Args:
        objective: whose θ̂ it is.
        batch: some examples.
        truth: their gradients by plain autograd, if they are known.
    """
    sizes = {name: block.numel() for name, block in objective.blocks.items()}
    batch = calculus.ready(objective, batch)
    shapes = _shapes(batch)

    def unstructured(reason: str) -> Plan:
        return Plan((), dict.fromkeys(sizes, "autograd"), False, reason, sizes, 8 * objective.size, shapes)

    if objective.route.examples != "vmap":
        return unstructured(objective.route.reason or "vmap cannot follow the loss")
    try:
        return _structured(objective, batch, truth, sizes, shapes, unstructured)
    except _UNWATCHED as error:
        return unstructured(f"the loss cannot be watched: {first_line(error)}")


def _structured(
    objective: Objective,
    batch: Any,
    truth: Tensor | None,
    sizes: dict[str, int],
    shapes: tuple[tuple[int, ...], ...],
    unstructured: Callable[[str], Plan],
) -> Plan:
    """The plan by what is seen, if nothing else acts and its gradients are right on this batch."""
    params = calculus.leaves_of(objective)
    watch = Watch(objective, params)
    values = vmap(lambda example: _watched(watch, objective.loss, params, example))(batch)
    unseen = [name for name, acts in calculus.depends(values, params, sizes).items() if acts]
    if unseen:
        return unstructured(f"'{unseen[0]}' acts where it cannot be seen, such as in a compiled function")
    uses = tuple(watch.uses)
    rules = {name: [use.rule for use in uses if name in (use.block, use.bias)] for name in sizes}
    words = {
        name: " + ".join(dict.fromkeys(found)) if found else "not used by the loss" for name, found in rules.items()
    }
    found = Plan(uses, words, True, "", sizes, watch.bytes, shapes)
    truth = calculus.gradients(objective, batch) if truth is None else truth
    ours = pieces.rows(capture(objective, found, batch), sizes)[:, 0]
    if agree(ours, truth, tolerance(objective, batch)):
        return found
    return unstructured(f"captured gradients differ from autograd's by {float((ours - truth).abs().max()):.2g}")


def capture(
    objective: Objective,
    found: Plan,
    batch: Any,
    cotangents: Callable[[Tensor], Float[Tensor, "m b K"]] | None = None,
) -> list[Piece]:
    """The pieces of a batch: of each example's loss, or of u·f for m cotangents u of its flattened outputs f.

    Cost: one forward pass, and one backward pass per cotangent.

    Args:
        objective: whose θ̂ it is.
        found: of `plan`.
        batch: b examples.
        cotangents: u, from the outputs (b, …); None means the loss.
    """
    each = None if cotangents is None else lambda f: [cotangents(f)]
    seen = _as_met(objective, found, batch, each)[0]
    return merged([piece.product() if isinstance(piece, Convolution) else piece for piece in seen])


def captured(
    objective: Objective,
    found: Plan,
    batch: Any,
    cotangents: Callable[[Tensor], Sequence[Float[Tensor, "m b K"]]] | None,
) -> list[list[Seen]]:
    """The same of several sets of cotangents, which share the forward pass and what they have in common.

    Convolutions are as they are: their inputs are unrolled by who asks for them, and only while it does.

    Args:
        objective: whose θ̂ it is.
        found: of `plan`.
        batch: b examples.
        cotangents: the sets, from the outputs (b, …); None means one, the loss.
    """
    return [merged(seen) for seen in _as_met(objective, found, batch, cotangents)]


def _as_met(
    objective: Objective,
    found: Plan,
    batch: Any,
    cotangents: Callable[[Tensor], Sequence[Float[Tensor, "m b K"]]] | None = None,
) -> list[list[Seen]]:
    """The pieces of a batch as they are met: a shared weight's one by one, and convolutions without their matrices."""
    batch = calculus.ready(objective, batch)
    found = found.at(objective, batch)
    if not found.structured:
        return [[*pieces] for pieces in _by_autograd(objective, found, batch, cotangents)]
    zero = objective.reference.new_zeros(())
    offsets = [zero.expand(batch_length(batch), *use.offset) for use in found.uses]
    for offset in offsets:
        offset.requires_grad_()
    function = objective.loss if cotangents is None else calculus.structure(objective)[0]

    def one(example: Any, *offsets: Tensor) -> tuple[Tensor, list[Tensor]]:
        watch = Watch(objective, objective.params, offsets)
        with attention_twice.bent(unless=watch.holds):
            value = _watched(watch, function, objective.params, example)
        return value, watch.inputs

    values, inputs = vmap(one)(batch, *offsets)
    if cotangents is None:
        every = [calculus.slopes(objective, values, offsets, None)]
    else:
        flat = values.reshape(len(values), -1)
        every = [calculus.slopes(objective, flat, offsets, u) for u in cotangents(values.detach())]
    inputs = [x.detach() for x in inputs]
    return [
        [piece for use, x, slope in zip(found.uses, inputs, slopes, strict=True) for piece in _piece(use, x, slope)]
        for slopes in every
    ]


def gradients(objective: Objective, batch: Any) -> Float[Tensor, "b p"]:
    """∇L(z_b, θ̂) for every example, from its pieces where the model has structure.  Memory: b × p numbers."""
    found = objective.route.plan
    if objective.linear is not None or found is None or not found.structured:
        return calculus.gradients(objective, batch)
    return pieces.rows(capture(objective, found, batch), found.sizes)[:, 0]


def in_order(objective: Objective, V: Float[Tensor, "k p"]) -> Tensor | Vectors:
    """Vectors for `dots` of many batches: cast once, and put once into the order in which layers read them."""
    if not structured(objective):
        return V.to(objective.reference)
    return Vectors(V, objective.route.plan.sizes, objective.reference)


def dots(objective: Objective, batch: Any, V: Float[Tensor, "k p"] | Vectors) -> Float[Tensor, "b k"]:
    """∇L(z_b)ᵀ v for every example and vector.

    Cost: a forward and a backward pass whatever k is, then 2·k·p flops per example, and where a weight acts at t > 1
    positions 2·t·p more to write its gradient out, one layer at a time.
    """
    ordered = in_order(objective, V) if isinstance(V, Tensor) else V
    if isinstance(ordered, Tensor):
        return calculus.dots(objective, batch, ordered)
    seen = _as_met(objective, objective.route.plan, batch)[0]
    return pieces.along_kept(seen, ordered)[:, :, 0].T


def dots_and_sum(
    objective: Objective, batch: Any, weights: Float[Tensor, " b"], V: Float[Tensor, "k p"] | Vectors
) -> tuple[Float[Tensor, "b k"], Float[Tensor, " p"]]:
    """The same, and Σ_b w_b ∇L(z_b) from the same passes, for a model that is `structured`."""
    found = objective.route.plan
    seen = _as_met(objective, found, batch)[0]
    ordered = Vectors(V, found.sizes, objective.reference) if isinstance(V, Tensor) else V
    total = pieces.onto(seen, weights.to(objective.reference)[None, :, None], found.sizes)[0]
    return pieces.along_kept(seen, ordered)[:, :, 0].T, total


def structured(objective: Objective) -> bool:
    """Whether gradients of examples come from layers."""
    found = objective.route.plan
    return objective.linear is None and found is not None and found.structured


def squares(objective: Objective, batch: Any) -> Float[Tensor, " b"]:
    """‖∇L(z_b)‖² for every example; where a weight acts at one position its gradient is never written out."""
    found = objective.route.plan
    if objective.linear is not None:
        return linear.squares(objective, batch)
    if found is None or not found.structured:
        return (calculus.gradients(objective, batch).double() ** 2).sum(1)
    return pieces.squares(capture(objective, found, batch))[:, 0].double()


def rules(objective: Objective) -> dict[str, str]:
    """For every parameter, in words, how the gradients of examples in it are computed."""
    found = objective.route.plan
    if objective.linear is not None:
        return dict.fromkeys(objective.blocks, "closed form of a linear predictor")
    if found is None:
        return dict.fromkeys(objective.blocks, "autograd")
    return found.rules if found.structured else dict.fromkeys(objective.blocks, f"autograd ({found.reason})")


def written_out(objective: Objective, batch: Any) -> dict[str, int]:
    """The weights whose gradients are written out, one layer at a time, for k > 1 vectors, and their positions t.

    At one position 2·k·i·o flops give all products; at t positions factors would take 2·k·t·i·o, and the matrix
    2·(t + k)·i·o.
    """
    found = objective.route.plan
    if objective.linear is not None or found is None or not found.structured:
        return {}
    products = [piece for piece in capture(objective, found, batch) if isinstance(piece, Product)]
    return {piece.block: piece.inputs.shape[2] for piece in products if piece.inputs.shape[2] > 1}


def vectors(objective: Objective, example_bytes: int, k: int | None = None) -> int:
    """How many vectors' memory `dots` of k vectors takes for one example; without k, its gradient written out."""
    found = objective.route.plan
    if not structured(objective):
        return k or 0
    if k is None:
        return 1 + (found.bytes + 8 * max(found.sizes.values())) // example_bytes
    lookups = [math.prod(use.offset) for use in found.uses if use.rule == "embedding"]  # their vectors' rows are read
    return 1 + (found.bytes + 8 * k * max([4096, *lookups])) // example_bytes


# ---- inner steps -----------------------------------------------------------------------------------------------------


def _watched(watch: Watch, function: Callable[[Any, Any], Tensor], params: Any, example: Any) -> Tensor:
    with watch:
        return function(params, example)


def _resized(objective: Objective, found: Plan, batch: Any) -> Plan | None:
    """The same uses at the sizes of these examples; None if they are others, or cannot be watched."""
    watch = Watch(objective, calculus.leaves_of(objective))
    try:
        with torch.no_grad():
            vmap(lambda example: _watched(watch, objective.loss, watch.params, example))(batch)
    except _UNWATCHED:
        return None
    if len(watch.uses) != len(found.uses):
        return None
    if not all(one.like(other) for one, other in zip(watch.uses, found.uses, strict=True)):
        return None
    places = [use.where for use in found.uses]  # the same tensors, by which Vectors know what they have kept
    uses = tuple(replace(use, where=where) for use, where in zip(watch.uses, places, strict=True))
    return replace(found, uses=uses, bytes=watch.bytes, shapes=_shapes(batch), others={})


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of every tensor of one example."""
    return tuple(tuple(leaf.shape[1:]) for leaf in leaves(batch))


# ---- from uses to pieces ---------------------------------------------------------------------------------------------


def _piece(use: Use, x: Tensor, slope: Tensor) -> list[Seen]:
    """What an input (b, …) and a slope (m, b, …) say about the parameters of a use."""
    m, b = slope.shape[:2]
    if use.rule.startswith("autograd"):
        return [Direct(use.block, slope.reshape(m, b, -1), use.shape, use.where)]
    if use.rule == "embedding":
        indices = x.reshape(b, -1)
        read = slope.reshape(m, b, -1, use.shape[1])
        return [Lookup(use.block, torch.where(indices == use.settings["padding"], -1, indices), read, use.shape)]
    if use.rule.startswith("conv_transpose"):
        inputs, slopes = _transposed_factors(use, x, slope)
        lone = [] if use.bias is None else [_lone_bias(use, _over_positions(use, slope))]
        return [Product(use.block, None, inputs, slopes, use.shape, use.where), *lone]
    if use.rule.startswith("conv"):
        found = _convolution(use, x, slope)
        lone = [] if use.bias_where is None else [_lone_bias(use, _over_positions(use, slope))]
        return [found, *lone]
    if use.settings.get("columns"):  # W X: positions are columns
        inputs, slopes = x.transpose(-1, -2)[:, None], slope.transpose(-1, -2)[:, :, None]
    else:
        inputs = x.reshape(b, 1, -1, x.shape[-1])
        slopes = slope.reshape(m, b, 1, -1, slope.shape[-1])
    if use.bias is not None and use.bias_where is not None:
        lone = _lone_bias(use, slopes.sum(3).flatten(2))
        return [Product(use.block, None, inputs, slopes, use.shape, use.where), lone]
    return [Product(use.block, use.bias, inputs, slopes, use.shape, use.where)]


def _lone_bias(use: Use, values: Tensor) -> Direct:
    assert use.bias is not None  # only uses with a bias come here
    return Direct(use.bias, values, use.bias_shape, use.bias_where)


def _convolution(use: Use, x: Tensor, slope: Tensor) -> Convolution:
    axes, (m, b) = len(use.settings["kernel"]), slope.shape[:2]
    images, slopes = x.reshape(-1, *x.shape[-axes - 1 :]), slope.reshape(m, -1, *slope.shape[-axes - 1 :])
    bias = use.bias if use.bias_where is None else None
    return Convolution(use.block, bias, images, slopes, b, use.settings, use.shape, use.where)


def _transposed_factors(use: Use, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    axes, groups = len(use.settings["kernel"]), use.settings["groups"]
    b, m = len(x), len(slope)
    N, positions = x[0].numel() // math.prod(x.shape[-axes - 1 :]), math.prod(x.shape[-axes:])
    inputs = x.reshape(b, N, groups, x.shape[-axes - 1] // groups, positions)
    inputs = inputs.permute(0, 2, 1, 4, 3).reshape(b, groups, N * positions, -1)
    images = slope.reshape(-1, *slope.shape[-axes - 1 :])
    slopes = unrolled(windows(images, use.settings, tuple(x.shape[-axes:])), N, groups)
    return inputs, slopes.unflatten(0, (m, b))


def _over_positions(use: Use, slope: Tensor) -> Tensor:
    """(m, b, channels): slopes of a convolution summed over images and positions."""
    axes, (m, b) = len(use.settings["kernel"]), slope.shape[:2]
    channels = slope.shape[-axes - 1]
    return slope.reshape(m, b, -1, channels, math.prod(slope.shape[-axes:])).sum((2, 4))


def _by_autograd(
    objective: Objective,
    found: Plan,
    batch: Any,
    cotangents: Callable[[Tensor], Sequence[Tensor]] | None,
) -> list[list[Piece]]:
    """Every block as a Direct, example by example."""
    if cotangents is None:
        every = [calculus.gradients(objective, batch)[None]]
    else:
        sets = cotangents(calculus.shaped_outputs(objective, batch))
        jacobians = calculus.output_jacobians(objective, batch)
        every = [torch.einsum("mbk,bkp->mbp", u, jacobians.to(u)) for u in sets]
    shapes = {name: tuple(block.shape) for name, block in objective.blocks.items()}
    return [
        [
            Direct(name, part, shapes[name])
            for name, part in zip(found.sizes, J.split(list(found.sizes.values()), 2), strict=True)
        ]
        for J in every
    ]
