"""Derivatives of single-example losses: the only room that knows autograd.

Every function takes an objective and a batch of b examples and returns sums or rows over that batch: no mean, no
penalty, no 1/n. Vectors are rows of (k, p). Objectives with a linear predictor go through the closed forms of
`linear`; all others through autograd, on the route that `routes.probe` found.

Hessian products are a double backward pass with batched cotangents over a vmapped single-example loss, which is
2–4× faster for 1 to 8 vectors than nesting forward over reverse.  References: Pearlmutter (1994); paper, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.trees import batch_length, like, take, tree_map
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.model import linear
from upweight.model.objective import Objective
from upweight.model.transforms import grad, pushed, quietly, vmap

Function = torch.autograd.Function  # for derivatives that are written out
_FEW_OUTPUTS = 32  # so many rows of J are always affordable
AT_ONCE = 64  # columns of J in forward mode at most
_NUMBERS_AT_ONCE, _FEWEST_AT_ONCE = 2**19, 8  # of outputs in these columns, so that they stay near the processor


def losses(objective: Objective, batch: Any) -> Float[Tensor, " b"]:
    """L(z_b, θ̂) for every example."""
    if objective.linear is not None:
        return linear.losses(objective, batch)
    with torch.no_grad():
        return _losses(objective, objective.params, ready(objective, batch))


def losses_at(objective: Objective, params: Any, batch: Any) -> Float[Tensor, " b"]:
    """L(z_b, θ) for every example at other parameters, with its graph."""
    return _losses(objective, params, ready(objective, batch))


def gradients(objective: Objective, batch: Any) -> Float[Tensor, "b p"]:
    """∇L(z_b, θ̂) for every example.  Cost: one backward pass, and b × p numbers."""
    if objective.linear is not None:
        return linear.gradients(objective, batch)
    batch = ready(objective, batch)
    if objective.route.examples == "vmap":
        tree = vmap(grad(objective.loss), in_dims=(None, 0))(objective.params, batch)
        blocks = list(tree.values()) if isinstance(tree, dict) else [tree]
        return torch.cat([block.detach().reshape(len(block), -1) for block in blocks], 1)
    params = leaves_of(objective)
    rows = []
    for b in range(batch_length(batch)):
        loss = objective.loss(params, take(batch, b))
        rows.append(_flat(torch.autograd.grad(loss, _blocks(params), allow_unused=True), _blocks(params)))
    return torch.stack(rows)


def first_derivatives(objective: Objective, example: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss of one example and its gradient in every block of θ, with the graph that a second derivative needs."""
    params = leaves_of(objective)
    value = objective.loss(params, ready(objective, example))
    if not value.requires_grad:
        return value, []
    pieces = torch.autograd.grad(value, _blocks(params), create_graph=True, allow_unused=True)
    return value, [piece for piece in pieces if piece is not None]


def dots(objective: Objective, batch: Any, V: Float[Tensor, "k p"]) -> Float[Tensor, "b k"]:
    """∇L(z_b)ᵀ v for every example and vector, without forming b × p.

    Σ_b u_b ∇L_b is linear in u, so its derivative along v with respect to u holds every dot product.
    Cost: two backward passes, shared by the k vectors.
    """
    if objective.linear is not None:
        return linear.dots(objective, batch, V)
    params = leaves_of(objective)
    values = _losses(objective, params, ready(objective, batch))
    u = torch.ones_like(values, requires_grad=True)
    pulled = vjps(values, params, u[None], create_graph=True)[0]
    return _pull_rows(objective, pulled, u, V.to(pulled)).T


def pull(objective: Objective, batch: Any, R: Float[Tensor, "k b"]) -> Float[Tensor, "k p"]:
    """Σ_b R[k, b] ∇L(z_b): weighted sums of gradients.  Cost: one forward pass, one backward pass per k (batched)."""
    if objective.linear is not None:
        return linear.pull(objective, batch, R)
    params = leaves_of(objective)
    values = _losses(objective, params, ready(objective, batch))
    return _pull_rows(objective, values, params, R.to(values))


def hvp(
    objective: Objective, batch: Any, V: Float[Tensor, "k p"], weights: Float[Tensor, " b"] | None = None
) -> Float[Tensor, "k p"]:
    """Σ_b w_b ∇²L(z_b, θ̂) V, a sum over the batch (not a mean; the penalty is not included).

    Cost: two backward passes over the batch, shared by the k rows of V.
    """
    if objective.linear is not None:
        return linear.hvp(objective, batch, V, _weights(batch, weights))
    params = leaves_of(objective)
    values = _losses(objective, params, ready(objective, batch))
    total = (values * _weights(batch, weights).to(values)).sum()
    first = vjps(total[None], params, total.new_ones(1, 1), create_graph=True)[0]
    if not first.requires_grad:  # a loss that is linear in θ has no curvature
        return torch.zeros_like(V)
    return _pull_rows(objective, first, params, V.to(first))


def ggnvp(
    objective: Objective, batch: Any, V: Float[Tensor, "k p"], weights: Float[Tensor, " b"] | None = None
) -> Float[Tensor, "k p"]:
    """Σ_b w_b J_bᵀ (∂²ℓ/∂f²) J_b V with f the model's output: the Gauss–Newton product, positive when ℓ is convex in f.

    Cost: three backward passes over the batch, shared by the k rows of V.  Ref: Schraudolph (2002).
    """
    if objective.linear is not None:
        return linear.hvp(objective, batch, V, _weights(batch, weights))
    batch = ready(objective, batch)
    params = leaves_of(objective)
    f = _outputs(objective, params, batch)  # (b, K)
    JV = _pushed(objective, f, params, V)
    bent = output_products(objective, batch, JV) * _weights(batch, weights).to(f)[:, None]
    return _pull_rows(objective, f, params, bent)


def gauss_newton(objective: Objective, batch: Any, weights: Float[Tensor, " b"]) -> Float[Tensor, "p p"]:
    """Σ_b w_b J_bᵀ (∂²ℓ/∂f²) J_b as a matrix, float64.

    Cost: a backward pass for each of the K outputs, or two for each of the p parameters where outputs are many
    (`through_parameters`). Memory: b·K·p numbers, and then no K × K matrix.
    """
    if not through_parameters(objective, outputs(objective, tree_map(lambda leaf: leaf[:1], batch)).shape[1]):
        J = output_jacobians(objective, batch).double()  # (b, K, p)
        h = output_hessians(objective, batch).double() * weights[:, None, None].to(J)
        return J.flatten(0, 1).T @ torch.einsum("bij,bjp->bip", h, J).flatten(0, 1)
    batch = ready(objective, batch)
    params = leaves_of(objective)
    f = _outputs(objective, params, batch)
    columns = _columns(objective, batch, f, params)  # (p, b, K)
    blocks = _hessians_of_places(objective, batch, f)
    if blocks is None:
        bent = output_products(objective, batch, columns)
    else:
        bent = torch.einsum("btij,pbtj->pbti", blocks, columns.reshape(len(columns), *blocks.shape[:-1]))
    bent = bent.reshape(columns.shape) * weights.to(f)[:, None]
    return (columns.flatten(1) @ bent.flatten(1).T).double()


def _hessians_of_places(objective: Objective, batch: Any, f: Float[Tensor, "b K"]) -> Float[Tensor, "b t d d"] | None:
    """∂²ℓ/∂f² of every place of an output (…, d), if the loss is a sum over places and d is small; else None.

    A vector that lives in the places whose number has bit k must stay in them: any two places differ in some bit.
    Cost: d + log₂ t products, where the p columns would take as many as they are.
    """
    with torch.no_grad():
        d = structure(objective)[0](objective.params, take(batch, 0)).shape[-1]
    b, t = len(f), f.shape[1] // d
    if t < 2 or 2 * d > objective.size:
        return None
    bits = [torch.arange(t, device=f.device) >> k & 1 for k in range((t - 1).bit_length())]
    draw = torch.rand(b, t, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(f)
    some = torch.stack([draw * bit.to(f)[:, None] for bit in bits])
    left = output_products(objective, batch, some.flatten(2)).reshape(some.shape)
    if any(bool((moved * (1 - bit).to(f)[:, None]).any()) for bit, moved in zip(bits, left, strict=True)):
        return None
    units = torch.eye(d, dtype=f.dtype, device=f.device)[:, None, None].expand(d, b, t, d)
    return output_products(objective, batch, units.reshape(d, b, -1)).reshape(d, b, t, d).permute(1, 2, 0, 3)


def through_parameters(objective: Objective, n_outputs: int) -> bool:
    """Whether J is computed by its p columns, and not by its K rows, as for adapters of a language model.

    Columns are batched, so that they are worth it before p < K.
    """
    return n_outputs > _FEW_OUTPUTS and 4 * n_outputs > objective.size


def _columns(objective: Objective, batch: Any, f: Float[Tensor, "b K"], params: Any) -> Float[Tensor, "p b K"]:
    """J of every example, by its columns: forward mode where the model can and one random vector agrees with J v.

    Forward mode keeps nothing for a backward pass, and a block's columns begin at the block.
    """
    eye = torch.eye(objective.size, dtype=objective.reference.dtype, device=f.device)
    v = torch.randn(1, objective.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_once = min(AT_ONCE, max(_FEWEST_AT_ONCE, _NUMBERS_AT_ONCE // f.numel()))
    parts, start = [], 0
    try:
        for name, block in objective.blocks.items():

            def outputs(moved: Tensor, name: str = name) -> Tensor:
                whole = objective.params
                return _outputs(objective, {**whole, name: moved} if isinstance(whole, dict) else moved, batch)

            unit = eye[start : start + block.numel(), start : start + block.numel()].reshape(-1, *block.shape)
            parts.append(pushed(outputs, block.detach(), unit, at_once=at_once))
            start += block.numel()
        forward = torch.cat(parts).detach()
        along = _pushed(objective, f, params, v)[0]
        near = 1e-8 if f.dtype == torch.float64 else 1e-3
        if torch.allclose(
            torch.einsum("p,pbk->bk", v[0].to(forward), forward), along, near, near * float(along.abs().max())
        ):
            return forward
    except Exception:  # no rule for forward mode, in torch or in a function of the user's own
        pass
    return torch.cat([_pushed(objective, f, params, some) for some in eye.split(AT_ONCE)])


def _pushed(objective: Objective, f: Float[Tensor, "b K"], params: Any, V: Tensor) -> Float[Tensor, "k b K"]:
    """J v for every vector, by differentiating Jᵀu, which is linear in u."""
    u = torch.zeros_like(f, requires_grad=True)
    pulled = vjps(f.reshape(-1), params, u.reshape(1, -1), create_graph=True)[0]
    return _pull_rows(objective, pulled, u, V.to(pulled)).reshape(len(V), *f.shape)


def output_jacobians(objective: Objective, batch: Any) -> Float[Tensor, "b K p"]:
    """∂f/∂θ of every example, with f the flattened model output.  Cost: K backward passes per example."""
    batch = ready(objective, batch)
    params = leaves_of(objective)
    f = _outputs(objective, params, batch)
    if objective.route.examples == "vmap":
        rows = []
        for j in range(f.shape[1]):
            one = grad(lambda params, example, j=j: objective.outputs(params, example).reshape(-1)[j])  # type: ignore[misc]
            tree = vmap(one, in_dims=(None, 0))(objective.params, batch)
            blocks = list(tree.values()) if isinstance(tree, dict) else [tree]
            rows.append(torch.cat([block.detach().reshape(len(block), -1) for block in blocks], 1))
        return torch.stack(rows, 1)
    cotangents = torch.eye(f.numel(), dtype=f.dtype, device=f.device).reshape(f.numel(), *f.shape)
    return _pull_rows(objective, f, params, cotangents).reshape(*f.shape, -1)


def outputs(objective: Objective, batch: Any) -> Float[Tensor, "b K"]:
    """The model's output for every example as one flat vector."""
    if objective.linear is not None:
        return linear.predictor(objective, linear.wide(batch[0] if isinstance(batch, tuple | list) else batch))
    values = shaped_outputs(objective, batch)
    return values.reshape(len(values), -1)


def shaped_outputs(objective: Objective, batch: Any) -> Float[Tensor, "b ..."]:
    """The model's output for every example."""
    if objective.linear is not None:
        return outputs(objective, batch)
    batch = ready(objective, batch)
    with torch.no_grad():
        if batch_length(batch) == 1:  # as it is, which vmap has nothing to add to
            return structure(objective)[0](objective.params, take(batch, 0))[None]
        return _shaped_outputs(objective, objective.params, batch)


def depends(values: Tensor, params: Any, names: Iterable[str]) -> dict[str, bool]:
    """For every block of leaves whether autograd connects the values to it.

    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    >>> depends(2 * a, {"a": a, "b": b}, ["a", "b"])
    {'a': True, 'b': False}
    """
    blocks = _blocks(params)
    if not values.requires_grad:
        return dict.fromkeys(names, False)
    found = torch.autograd.grad(values.sum(), blocks, allow_unused=True)
    return {name: piece is not None for name, piece in zip(names, found, strict=True)}


@quietly()
def slopes(
    objective: Objective, values: Tensor, inputs: list[Tensor], cotangents: Float[Tensor, "m b K"] | None
) -> list[Float[Tensor, "m b ..."]]:
    """The gradients of Σ_b values[b], or of Σ_b u_b·values[b] for m cotangents u, with respect to every input.

    Cost: one backward pass, or m (batched where autograd can). The graph is kept for other cotangents.

    >>> import upweight as uw
    >>> objective = uw.Objective(lambda theta, example: theta.sum(), torch.zeros(1))
    >>> x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    >>> slopes(objective, (x**2)[:, 0], [x], None)[0]  # one gradient, of the sum: (1, b, 1)
    tensor([[[2.],
             [4.]]])
    """
    if cotangents is None:
        pieces = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
        return [_or_zero(piece, x)[None] for piece, x in zip(pieces, inputs, strict=True)]
    cotangents = cotangents.to(values)
    if objective.route.cotangents == "batched" and len(cotangents) > 1:
        settings = {"retain_graph": True, "allow_unused": True}
        pieces = torch.autograd.grad(values, inputs, cotangents, is_grads_batched=True, **settings)
        return [_or_zero(piece, x.expand(len(cotangents), *x.shape)) for piece, x in zip(pieces, inputs, strict=True)]
    every = [torch.autograd.grad(values, inputs, c, retain_graph=True, allow_unused=True) for c in cotangents]
    if len(every) == 1:  # which is not copied
        return [_or_zero(piece, x)[None] for piece, x in zip(every[0], inputs, strict=True)]
    return [torch.stack([_or_zero(one[j], x) for one in every]) for j, x in enumerate(inputs)]


def output_hessians(
    objective: Objective, batch: Any, f: Float[Tensor, "b ..."] | None = None
) -> Float[Tensor, "b K K"]:
    """∂²ℓ/∂f² of every example, with f the model output, which is computed if it is not given.

    Cost: K backward passes of the output loss.
    """
    return output_derivatives(objective, batch, f)[1]


def output_derivatives(
    objective: Objective, batch: Any, f: Float[Tensor, "b ..."] | None = None
) -> tuple[Float[Tensor, "b K"], Float[Tensor, "b K K"]]:
    """∂ℓ/∂f and ∂²ℓ/∂f² of every example, with f the model output, which is computed if it is not given.

    Cost: K + 1 backward passes of the output loss.
    """
    first, f = _output_slopes(objective, ready(objective, batch), f)
    if not first.requires_grad:
        return first, f.new_zeros(*f.shape, f.shape[1])
    rows = [pulled([column], [f], [torch.ones_like(column)])[0] for column in first.unbind(1)]
    return first.detach(), torch.stack(rows, 1).detach()


def output_products(
    objective: Objective, batch: Any, U: Float[Tensor, "k b K"], f: Float[Tensor, "b ..."] | None = None
) -> Float[Tensor, "k b K"]:
    """∂²ℓ/∂f² u for every example and vector, with f the model output, which is computed if it is not given.

    Cost: backward passes of the output loss, k of them or K, whichever are fewer; the K × K matrices of the examples
    are formed only if K is the smaller.
    """
    if U.shape[2] <= len(U):
        return torch.einsum("bij,kbj->kbi", output_hessians(objective, batch, f), U)
    first, f = _output_slopes(objective, ready(objective, batch), f)
    return _pull_rows(objective, first, f, U).reshape(U.shape) if first.requires_grad else torch.zeros_like(U)


def output_slopes(objective: Objective, batch: Any, f: Float[Tensor, "b ..."] | None = None) -> Float[Tensor, "b K"]:
    """∂ℓ/∂f of every example, with f the flattened model output, which is computed if it is not given.

    Cost: one backward pass of the output loss.
    """
    return _output_slopes(objective, ready(objective, batch), f)[0].detach()


def _output_slopes(
    objective: Objective, batch: Any, f: Float[Tensor, "b ..."] | None = None
) -> tuple[Float[Tensor, "b K"], Float[Tensor, "b K"]]:
    """∂ℓ/∂f of every example, with its graph, and the outputs f that it is a function of."""
    output, output_loss = structure(objective)
    if f is None:
        with torch.no_grad():
            shape = output(objective.params, take(batch, 0)).shape
            f = _outputs(objective, objective.params, batch)
    else:
        shape, f = f.shape[1:], f.reshape(len(f), -1)

    def one(f: Tensor, example: Any) -> Tensor:
        return output_loss(f.reshape(shape), example)

    f = f.detach().requires_grad_()
    many = objective.route.examples == "vmap"
    values = vmap(one)(f, batch) if many else torch.stack([one(f[b], take(batch, b)) for b in range(len(f))])
    return torch.autograd.grad(values.sum(), f, create_graph=True)[0], f


def input_gradients(objective: Objective, batch: Any, S: Float[Tensor, "k p"]) -> Float[Tensor, "k b ..."]:
    """∂/∂x of s·∇_θ L(x, θ̂), for every vector and example; x is the first leaf of the example.

    Raises:
        InvalidInput: if x is not made of floating-point numbers.
    """
    if objective.linear is not None:
        return linear.input_gradients(objective, batch, S)
    batch = ready(objective, batch)
    x = _float_input(batch).clone().requires_grad_()
    moved = (x, *batch[1:]) if isinstance(batch, tuple | list) else x
    params = leaves_of(objective)
    values = _losses(objective, params, moved)
    pulled = vjps(values.sum()[None], params, values.new_ones(1, 1), create_graph=True)[0]
    return _pull_rows(objective, pulled, x, S.to(pulled)).reshape(len(S), *x.shape)


def mixed_products(objective: Objective, batch: Any, deltas: Float[Tensor, "b ..."]) -> Float[Tensor, "b p"]:
    """[∇ₓ∇_θ L(z_b)] δ_b = ∇_θ (δ_b · ∇ₓL(z_b)) for every example.  Cost: two backward passes per example."""
    if objective.linear is not None:
        return linear.mixed_products(objective, batch, deltas)
    batch = ready(objective, batch)
    rows = []
    for b in range(batch_length(batch)):
        example, params = take(batch, b), leaves_of(objective)
        x = _float_input(example).clone().requires_grad_()
        moved = (x, *example[1:]) if isinstance(example, tuple | list) else x
        first = torch.autograd.grad(objective.loss(params, moved), x, create_graph=True)[0]
        blocks = _blocks(params)
        found = pulled([first], blocks, [deltas[b].to(first)]) if first.requires_grad else [None] * len(blocks)
        rows.append(_flat(found, blocks))
    return torch.stack(rows)


def pulled_back(function: Callable[[Tensor], Tensor], x: Float[Tensor, "1 ..."], G: Any) -> Float[Tensor, "q ..."]:
    """(∂h/∂x)ᵀ g for every line g of G; h = function(x), x a batch of one; float64.  Cost: a backward pass per line."""
    moved = x.clone().requires_grad_()
    h = function(moved)[0]
    lines = [torch.autograd.grad(h, moved, g.to(h).reshape(h.shape), retain_graph=True)[0][0] for g in G]
    return torch.stack(lines).double().cpu()


def pushed_forward(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "1 ..."], delta: Float[Tensor, "*delta"]
) -> Float[Tensor, "*h"]:
    """(∂h/∂x) δ, h = function(x), x a batch of one; float64.  Cost: two backward passes."""
    moved = x.clone().requires_grad_()
    h = function(moved)[0]
    cotangent = torch.zeros_like(h, requires_grad=True)
    back = torch.autograd.grad(h, moved, cotangent, create_graph=True)[0]
    return torch.autograd.grad(back, cotangent, delta.to(back).reshape(back.shape))[0].double().cpu()


# ---- autograd ----------------------------------------------------------------------------------------------------


def ready(objective: Objective, batch: Any) -> Any:
    """The batch dense, on the device and in the precision of θ̂.

    >>> import upweight as uw
    >>> objective = uw.Objective(lambda theta, example: (theta * example[0]).sum(), torch.zeros(2, dtype=torch.float64))
    >>> ready(objective, [scipy.sparse.csr_array([[0.0, 3.0]], dtype="float32")])
    [tensor([[0., 3.]], dtype=torch.float64)]
    """
    dense = tree_map(lambda leaf: torch.from_numpy(leaf.toarray()) if scipy.sparse.issparse(leaf) else leaf, batch)
    return like(dense, objective.reference)


def _float_input(example: Any) -> Tensor:
    """x of an example or of a batch.

    Raises:
        InvalidInput: if x is not made of floating-point numbers.
    """
    x = example[0] if isinstance(example, tuple | list) else example
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        message = (
            f"The input x is {kind}; only floating-point inputs can be moved by a small amount. Explain the embedded "
            "inputs instead."
        )
        raise InvalidInput(message)
    return x


def _weights(batch: Any, weights: Tensor | None) -> Tensor:
    return torch.ones(batch_length(batch), dtype=torch.float64) if weights is None else weights


def leaves_of(objective: Objective) -> Any:
    """A copy of θ̂ that records gradients."""
    return tree_map(lambda block: block.detach().clone().requires_grad_(), objective.params)


def _blocks(params: Any) -> list[Tensor]:
    return list(params.values()) if isinstance(params, dict) else [params]


def structure(objective: Objective) -> tuple[Callable[[Any, Any], Tensor], Callable[[Tensor, Any], Tensor]]:
    """The model's output, and the loss as a function of it.

    Raises:
        UnsupportedModel: if the objective is one function.
    """
    if objective.outputs is None or objective.output_loss is None:
        message = (
            f"Gauss–Newton needs the model's output apart from its loss, and {objective.name} is one function. "
            "Pass Objective(..., outputs=f, output_loss=l) with loss = l(f(params, example), example), or use "
            "curvature=Hessian()."
        )
        raise UnsupportedModel(message)
    return objective.outputs, objective.output_loss


def _losses(objective: Objective, params: Any, batch: Any) -> Tensor:
    if objective.route.examples == "vmap":
        return vmap(objective.loss, in_dims=(None, 0))(params, batch)
    return torch.stack([objective.loss(params, take(batch, b)) for b in range(batch_length(batch))])


def _outputs(objective: Objective, params: Any, batch: Any) -> Tensor:
    """(b, K): the flattened outputs."""
    values = _shaped_outputs(objective, params, batch)
    return values.reshape(len(values), -1)


def _shaped_outputs(objective: Objective, params: Any, batch: Any) -> Tensor:
    output, _ = structure(objective)
    if objective.route.examples == "vmap":
        return vmap(output, in_dims=(None, 0))(params, batch)
    return torch.stack([output(params, take(batch, b)) for b in range(batch_length(batch))])


@quietly()
def vjps(values: Tensor, params: Any, cotangents: Tensor, *, create_graph: bool = False) -> list[Float[Tensor, " p"]]:
    """cᵀ ∂values/∂params for every line c of the cotangents, flat, with its graph when asked."""
    blocks = _blocks(params)
    return [
        _flat(
            torch.autograd.grad(values, blocks, c, create_graph=create_graph, retain_graph=True, allow_unused=True),
            blocks,
        )
        for c in cotangents
    ]


def with_graph(value: Tensor, at: Tensor) -> Tensor:
    """∂value/∂at, with its graph.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> slope = with_graph(x**3, x)
    >>> slope.item(), with_graph(slope, x).item()  # 3x², 6x
    (27.0, 18.0)
    """
    (found,) = torch.autograd.grad(value, at, create_graph=True)
    return found


@quietly()
def pulled(values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Σ cᵀ ∂values/∂input for every input, 0 where there is no way to it; the graph is kept.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pulled([x**2], [x], [torch.tensor([10.0, 1.0])])[0]  # c · 2x
    tensor([20.,  4.])
    """
    found = torch.autograd.grad(values, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [_or_zero(part, one) for part, one in zip(found, inputs, strict=True)]


@quietly()
def _pull_rows(objective: Objective, values: Tensor, inputs: Any, cotangents: Tensor) -> Tensor:
    """The gradient of values·c for every row c of cotangents: (k, size of inputs), batched where autograd can."""
    blocks = _blocks(inputs)
    if not values.requires_grad:
        return values.new_zeros(len(cotangents), sum(block.numel() for block in blocks))
    if objective.route.cotangents == "batched" and len(cotangents) > 1:
        pieces = torch.autograd.grad(
            values, blocks, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        k, both = len(cotangents), zip(pieces, blocks, strict=True)
        rows = [_or_zero(piece, block.expand(k, *block.shape)).reshape(k, -1) for piece, block in both]
        return torch.cat(rows, 1).detach()
    return torch.stack(vjps(values, inputs, cotangents)).detach()


def _flat(pieces: Any, blocks: list[Tensor]) -> Tensor:
    return torch.cat([_or_zero(piece, block).reshape(-1) for piece, block in zip(pieces, blocks, strict=True)])


def _or_zero(piece: Tensor | None, block: Tensor) -> Tensor:
    return torch.zeros_like(block) if piece is None else piece
