"""Which way autograd can take through an objective, found by trying on a few examples.

vmap cannot follow control flow that depends on data; such models run example by example. A
loss whose value depends on chance, or on the other examples of its batch, has no influence and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from upweight.data.trees import batch_length, take, tree_map
from upweight.errors import InvalidInput, NotDeterministic, UnsupportedModel, UpweightError, first_line
from upweight.model import calculus, layers
from upweight.model.agreement import agree, tolerance
from upweight.model.objective import Objective, Route
from upweight.model.transforms import refuse_inference_mode, unbatched, undisturbed

_ROUTES = (("vmap", "batched"), ("vmap", "loop"), ("loop", "batched"), ("loop", "loop"))
_REPEATS = 4  # dropout of small p leaves a few examples alone now and then
_TRIES = 200  # where numbers are drawn: does what is drawn ever matter?
_STEPS = (1e-4, 1e-5, 1e-6)  # of θ, over which the slope of the gradient is taken
_SLOPE = 1e-2
_AWAY = 1e-2  # of θ, to where no kink is hit exactly


@undisturbed()
def probe(objective: Objective, batch: Any) -> Objective:
    """The objective with the fastest route that gives right answers on this small batch.

    Raises:
        NotDeterministic: if the same example costs something else when asked again, or has another gradient.
        UnsupportedModel: if the loss has no first or no second derivatives.
        InvalidInput: if the loss fails, or does not return one finite number, or does not depend on the parameters.
    """
    if objective.linear is not None:
        return objective
    refuse_inference_mode(objective.name)
    with _chance_put_back():
        plainly = _sound(objective, batch)
        truth = _answers(plainly, batch, shortly=True)
        rtol = tolerance(plainly, batch)
        found: tuple[Tensor, ...] = ()
        whole: tuple[Tensor, ...] = ()
        reason = ""
        for over_examples, over_vectors in _ROUTES:
            candidate = replace(objective, route=Route(over_examples, over_vectors, reason))
            slow: set[str] = set()
            try:
                with unbatched(slow):
                    found = _answers(candidate, batch)
                    same = _agree(found, truth, rtol)
                if not same:  # another order of rounding, where a model computes in less than its precision
                    whole = whole or _answers(plainly, batch)
                    same = _agree(found, whole, rtol)
            except UpweightError:
                raise
            except Exception as error:
                reason = reason or f"vmap or batched backward refused: {first_line(error)}"
                continue
            if same:
                _refuse_half_derivatives(candidate, batch, found)
                route = replace(candidate.route, plan=layers.plan(candidate, batch, found[1]), slow=tuple(sorted(slow)))
                return replace(candidate, route=route)
            reason = reason or "vmapped values differ from one-by-one values"
    message = (
        f"The derivatives of {objective.name} were others when they were taken again, and its values were not: "
        "something in a backward pass is random. Influence needs one gradient per example: call model.eval(), or leave "
        "the noise out of backward() and of gradient hooks."
    )
    raise NotDeterministic(message)


@undisturbed()
def tried(objective: Objective, batch: Any) -> None:
    """Raises where the losses of a batch, or the derivatives of its first example, cannot be computed.

    Raises:
        NotDeterministic, UnsupportedModel, InvalidInput: as `probe` does, which looks for the route, too.
    """
    refuse_inference_mode(objective.name)
    with _chance_put_back():  # `probe` will ask for the losses more often
        _answers(_sound(objective, batch, repeats=1), tree_map(lambda leaf: leaf[:1], batch), shortly=True)


@contextmanager
def _chance_put_back() -> Iterator[None]:
    generator = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(generator)


def _sound(objective: Objective, batch: Any, *, repeats: int = _REPEATS) -> Objective:
    """The objective on its plainest route, whose losses are the same when they are asked for again, and move with θ."""
    generator = torch.get_rng_state()
    plainly = replace(objective, route=Route("loop", "loop"))
    once = _checked_losses(plainly, batch)
    for _ in range(repeats):
        _refuse_chance(once, _checked_losses(plainly, batch))
    if not torch.equal(torch.get_rng_state(), generator):
        for _ in range(_TRIES):
            _refuse_chance(once, _checked_losses(plainly, batch))
    _refuse_broken_graphs(plainly, batch)
    return plainly


def _checked_losses(objective: Objective, batch: Any) -> Tensor:
    examples = calculus.ready(objective, batch)
    try:
        with torch.no_grad():
            values = [objective.loss(objective.params, take(examples, b)) for b in range(batch_length(examples))]
    except UpweightError:
        raise
    except Exception as error:
        if "does not require grad" in str(error):
            message = (
                f"The loss failed on one example: {first_line(error)}. It seems to call autograd.grad or "
                "backward() inside, on values whose graph is not recorded here. Take inner derivatives with "
                "torch.func.grad(f)(x), which can be differentiated again."
            )
            raise InvalidInput(message) from error
        message = (
            f"The loss failed on one example: {type(error).__name__}: {first_line(error)}. Write it as "
            "loss(params, example) of one example, without a batch axis; that of a module as loss(output, target) of a "
            "batch, here of one."
        )
        raise InvalidInput(message) from error
    first = values[0]
    if not isinstance(first, Tensor) or first.shape != ():
        shape = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        message = (
            f"The loss of one example is {shape}; it must be one number, a tensor of shape (). Sum or average inside "
            "the loss (criterion: reduction='mean')."
        )
        raise InvalidInput(message)
    stacked = torch.stack(values)
    if not torch.isfinite(stacked).all():
        message = (
            f"The loss of an example is {stacked[~torch.isfinite(stacked)][0]}. Scores would be NaN. Usual reasons: "
            "log(0), so clamp inside the loss; or a label that the criterion ignores (ignore_index) inside a function: "
            "pass the criterion itself, torch.nn.CrossEntropyLoss(), whose ignored labels become weights of 0."
        )
        raise InvalidInput(message)
    return stacked


def _refuse_chance(once: Tensor, again: Tensor) -> None:
    if torch.equal(once, again):
        return
    b = int((once - again).abs().argmax())
    message = (
        f"The loss of one example was {once[b]:.6g} and then {again[b]:.6g}: something in it is random, such as "
        "dropout called as a function or a noise layer. Influence needs one value per example: call model.eval(), or "
        "fix the randomness inside the loss."
    )
    raise NotDeterministic(message)


def _refuse_broken_graphs(objective: Objective, batch: Any) -> None:
    """A loss that does not depend on θ, or is differentiable only once, would pass for one without curvature."""
    try:
        value, gradient = calculus.first_derivatives(objective, take(calculus.ready(objective, batch), 0))
    except UpweightError:
        raise
    except Exception as error:
        message = (
            f"The loss has a value, and its derivative failed ({type(error).__name__}: {first_line(error)}). Use "
            "operations that torch differentiates, on the shapes that they are made for."
        )
        raise UnsupportedModel(message) from error
    if not gradient:
        message = (
            f"{objective.name} gives {float(value.detach()):.6g} whatever the parameters are, so nothing can move it. "
            "Compute it from `params` (not from the module's own weights), without detach() or no_grad()."
        )
        raise InvalidInput(message)
    waiting = [piece.grad_fn for piece in gradient]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            message = (
                "The loss cannot be differentiated twice: a part of it is differentiable only once. Use operations "
                "with a second derivative, or a smoothed loss such as losses.smooth_hinge(0.1)."
            )
            raise UnsupportedModel(message)
        fresh = {parent for parent, _ in node.next_functions} - seen
        seen |= fresh
        waiting.extend(fresh)


def _refuse_half_derivatives(objective: Objective, batch: Any, answers: tuple[Tensor, ...]) -> None:
    """Second derivatives must be the slope of the first: a backward pass of one's own may leave a part of them out.

    At a kink there is no such slope; what is left out is left out a little further, too. A parameter that no example
    has a gradient by, such as an embedding's padding, is a constant: θ does not move along it. Nor does it along a
    padding that the output layer has for its weight, too, where its gradient is that of the weight alone.

    Raises:
        UnsupportedModel: if the slope settles at something else, here and there.
    """
    if objective.reference.dtype != torch.float64:  # differences of float32 gradients are mostly rounding
        return
    _, G, _, products = answers
    direction, away = _directions(objective)
    moves = (G != 0).any(0)
    product = products[0] if bool(moves.all()) else None
    missing = _missing_near(objective, batch, direction * moves, away, product)
    if missing and bool((held := _read_as_constants(objective, batch)).any()):
        missing = _missing_near(objective, batch, direction * (moves & ~held), away)
    if not missing:
        return
    message = (
        f"The second derivatives of {objective.name} are not the slope of its first: they differ by {missing:.0%} of "
        "it along a random direction. Usual reasons: detach() inside the loss; or an autograd Function, or code "
        "outside of torch, whose backward() is differentiable only once, so that its part is left out without a word; "
        "or rows padded on the left whose first token has a label, read off a padding that sees no token. "
        "Write backward() with operations of torch on saved tensors, or use operations that torch knows; give that "
        "token the label -100."
    )
    raise UnsupportedModel(message)


def _missing_near(
    objective: Objective, batch: Any, direction: Tensor, away: Tensor, product: Tensor | None = None
) -> float:
    """The same share at θ̂ and a little further, the smaller of the two."""
    missing = _missing_share(objective, batch, direction, product)
    if missing:
        theta = objective.theta
        moved = objective.at(theta + _AWAY * (float(theta.abs().max()) + 1) * away)
        missing = _missing_share(moved, batch, direction)
    return missing


def _read_as_constants(objective: Objective, batch: Any) -> Tensor:
    """The entries that an embedding reads without a gradient, its padding: another layer may have them as weights."""
    params = calculus.leaves_of(objective)
    with _Paddings() as seen:
        (objective.outputs or objective.loss)(params, take(calculus.ready(objective, batch), 0))
    parts = []
    for block in params.values() if isinstance(params, dict) else [params]:
        part = torch.zeros(block.shape, dtype=torch.bool)
        for row in seen.found.get(id(block), ()):
            part[row] = True
        parts.append(part.reshape(-1))
    return torch.cat(parts)


class _Paddings(TorchFunctionMode):
    """Inside, the paddings of embeddings are kept, by the id of their table."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, set[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = {
            functional.embedding: ("input", "weight", "padding_idx"),
            torch.embedding: ("weight", "indices", "padding_idx"),
        }
        if func in names:
            given = {**dict(zip(names[func], args, strict=False)), **kwargs}
            padding = given.get("padding_idx")
            if padding is not None and (func is functional.embedding or padding >= 0):  # torch.embedding has none at −1
                self.found.setdefault(id(given["weight"]), set()).add(padding)
        return func(*args, **kwargs)


def _missing_share(objective: Objective, batch: Any, direction: Tensor, product: Tensor | None = None) -> float:
    """What second derivatives lack of the slope of the first, as a share of it; 0 if nothing, or if none settles."""
    theta = objective.theta
    product = calculus.hvp(objective, batch, direction[None])[0] if product is None else product
    size, ones = float(theta.abs().max()) + 1.0, theta.new_ones(1, batch_length(batch))
    before: Tensor | None = None
    for step in _STEPS:
        ahead, behind = (
            calculus.pull(objective.at(theta + sign * step * size * direction), batch, ones)[0] for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step * size)
        if not bool(torch.isfinite(slope).all()):
            return 0.0  # θ + v is outside of what the loss is defined for
        largest = float(slope.abs().max())
        allowed = _SLOPE * largest + 1e-13 * float(ahead.abs().max() + 1) / step
        missing = float((slope - product).abs().max())
        if missing <= allowed:
            return 0.0
        if before is not None and float((slope - before).abs().max()) <= allowed:
            return missing / largest
        before = slope
    return 0.0


def _directions(objective: Objective) -> Tensor:
    """Two random vectors on which routes are compared."""
    return torch.randn(2, objective.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _answers(objective: Objective, batch: Any, *, shortly: bool = False) -> tuple[Tensor, ...]:
    """Losses, gradients, their products with two vectors, and the Hessian's.

    Shortly, the products with gradients take no second backward pass, and the Hessian's are one, of the vectors' sum.
    """
    V = _directions(objective).to(objective.reference)
    try:
        G = calculus.gradients(objective, batch)
        along = G @ V.T if shortly else calculus.dots(objective, batch, V)
        bent = calculus.hvp(objective, batch, V.sum(0, keepdim=True) if shortly else V)
        return calculus.losses(objective, batch), G, along, bent
    except UpweightError:
        raise
    except Exception as error:
        if objective.route != Route("loop", "loop"):
            raise
        bag = "embedding_bag" in str(error)
        instead = (
            "nn.Embedding and a mean over its positions instead of nn.EmbeddingBag"
            if bag
            else ("operations with a second derivative, or a smoothed loss such as losses.smooth_hinge(0.1)")
        )
        message = f"The loss cannot be differentiated twice ({first_line(error)}). Use {instead}."
        raise UnsupportedModel(message) from error


def _agree(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], rtol: float) -> bool:
    ours, truth = ((*first, products.sum(0)) for *first, products in (ours, truth))
    return all(agree(a, b, rtol) for a, b in zip(ours, truth, strict=True))
