"""Where Gauss–Newton cuts a model from its criterion: where the loss bends, wherever the user cut.

    C = (1/n) Σᵢ wᵢ Jᵢᵀ (∂²ℓ/∂f²) Jᵢ + ∇²r

depends on what is called the output f. `nll_loss` is linear in the log-probabilities that a LogSoftmax gives, so with
them as f nothing of the data would be left in C; with the logits before it, C is that of `cross_entropy`. The rule here
does not look at names of criteria:

    f is the first point, of the activations that end the module or begin the criterion, in which the rest is convex

found by watching the module's last and the criterion's first functions, and tried on rows of the data, at their outputs
and around them. Where the rest is convex nowhere, f stays what the module returns. A criterion without any curvature is
refused: there is no second derivative to take, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.data.trees import batch_length, leaves, take
from upweight.errors import UnsupportedModel
from upweight.model import calculus
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.model.transforms import refuse_inference_mode, undisturbed

_ACTIVATIONS = frozenset({
    "log_softmax", "softmax", "softmin", "sigmoid", "log_sigmoid", "logsigmoid", "logit", "softplus", "tanh",
    "special_log_softmax", "special_softmax", "special_expit", "special_logit",
    "log", "log1p", "log2", "log10", "exp", "exp2", "expm1", "clamp", "clamp_min", "clamp_max", "clip", "reciprocal",
})  # fmt: skip
_SHAPES = frozenset({
    "squeeze", "unsqueeze", "flatten", "view", "reshape", "transpose", "permute", "movedim", "contiguous", "clone",
    "__getitem__", "select", "narrow", "to", "double", "float", "neg", "__neg__",
})  # fmt: skip
_ROWS = 48  # of the data, on which convexity is tried
_AROUND = (0.0, 1.0, 3.0)  # how far around their outputs
_FAR = 1e12  # around them: beyond every kink
_DIRECTIONS = 4  # of either kind: one coordinate, and all of them; 1 where outputs are many
_NUMBERS = 2**21  # held by directions at once
_NOISE = {torch.float64: 1e-7}  # of the largest second derivative; 1e-3 in lower precision
_FLAT = 1e-9  # of the slope: a second derivative that is rounding


@dataclass(frozen=True)
class _Step:
    """One function of one tensor, whose place among its arguments is held."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, tensor: Tensor) -> Tensor:
        args = [tensor if arg is _HELD else arg for arg in self.args]
        return self.function(*args, **{key: tensor if arg is _HELD else arg for key, arg in self.kwargs.items()})

    @property
    def bends(self) -> bool:
        """Whether it is an activation, rather than another shape of the same numbers."""
        return self.function.__name__ in _ACTIVATIONS


_HELD = object()


class Watch(TorchFunctionMode):
    """Keeps who gave and who took every tensor, as far as activations and changes of shape go.

    Args:
        instead: the number of a step after `start`, and what is to be given in place of what it gives.
    """

    def __init__(self, start: Tensor | None = None, instead: tuple[int, Tensor] | None = None) -> None:
        super().__init__()
        self.given_by: dict[int, tuple[Tensor, Tensor, _Step]] = {}
        self.others: set[int] = set()  # tensors that something else took
        self.kept: list[Tensor] = []  # so that an id stays its own
        self.current, self.instead = start, instead
        self.forth: list[_Step] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        taken = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = getattr(func, "__name__", "") in _ACTIVATIONS | _SHAPES and len(taken) == 1
        if not known:
            if self.current is not None:  # only then is it asked who else takes a tensor
                self.others.update(map(id, taken))
                self.kept += taken
            return out
        if out is taken[0]:  # nothing was to be done, as for `contiguous`: what is given is another tensor all the same
            out = out.view_as(out)
        place = {id(taken[0]): _HELD}
        step = _Step(
            func, tuple(place.get(id(arg), arg) for arg in args), {k: place.get(id(v), v) for k, v in kwargs.items()}
        )
        if not any(arg is _HELD for arg in (*step.args, *step.kwargs.values())):
            return out  # inside a list: no function of one tensor
        if taken[0] is self.current:
            self.forth.append(step)
            if self.instead is not None and len(self.forth) == self.instead[0]:
                out = self.instead[1]
            self.current = out
            self.kept.append(taken[0])
        elif self.current is not None:
            self.others.add(id(taken[0]))
            self.kept.append(taken[0])
        self.given_by[id(out)] = (out, taken[0], step)
        return out

    def back(self, output: Tensor) -> list[tuple[Tensor, _Step]]:
        """From the output backwards: what each step took, and the step, up to the first one that is not known."""
        chain = []
        while id(output) in self.given_by:
            _, output, step = self.given_by[id(output)]
            chain.append((output, step))
        return chain


def cut(sweep: Sweep) -> Sweep:
    """The same work with outputs in which the loss bends; refused if it bends nowhere.

    Cost: losses, and second derivatives in the outputs, of up to 48 rows.

    Raises:
        UnsupportedModel: if the criterion's second derivative is zero at all these rows.
        InvalidInput: inside of torch.inference_mode().
    """
    objective = sweep.objective
    if _one_function(objective):
        return sweep
    refuse_inference_mode(objective.name)
    with undisturbed():
        batch = _probed(sweep)
        found = _first_convex(objective, batch)
        _refuse_flat(found, batch)
    return sweep if found is objective else replace(sweep, objective=found)


def refuse_kinks(sweep: Sweep) -> None:
    """Raises where second derivatives miss what the minimum follows: a criterion that bends at its kinks only.

    A criterion that is linear in what the module returns is none of these: then the module bends.

    Cost: as for `cut`.

    Raises:
        UnsupportedModel: if the criterion has kinks and no second derivative.
        InvalidInput: inside of torch.inference_mode().
    """
    objective = sweep.objective
    if _one_function(objective):
        return
    refuse_inference_mode(objective.name)
    with undisturbed():
        batch = _probed(sweep)
        try:
            found = _first_convex(objective, batch)
        except UnsupportedModel:  # it cannot be cut, and need not be
            found = objective
        slope = _flat_slope(found, batch)
        if slope and not _straight(found, batch, slope):
            raise _kinked(found, batch, slope)


def _one_function(objective: Objective) -> bool:
    return objective.linear is not None or objective.outputs is None or objective.output_loss is None


def _probed(sweep: Sweep) -> Any:
    """The rows on which a criterion is tried."""
    objective = sweep.objective
    K = calculus.outputs(objective, sweep.examples.batch([0])).shape[1]
    rows = sweep.examples.spread(max(2, min(_ROWS, _NUMBERS // (2 * _DIRECTIONS * K))))
    return calculus.ready(objective, sweep.examples.batch(rows))


def _first_convex(objective: Objective, batch: Any) -> Objective:
    """The objective, cut at the first activation in which the rest is convex; as it is if there is none."""
    for earlier in _earlier(objective, take(batch, 0)):
        if same(objective, earlier, batch) and _convex(earlier, batch):
            return earlier
    if _convex(objective, batch):
        return objective
    for later in _later(objective, take(batch, 0)):
        if same(objective, later, batch) and _convex(later, batch):
            return later
    return objective


def _earlier(objective: Objective, example: Any) -> list[Objective]:
    """The objective cut before the activations that end the module, the earliest first."""
    whole, criterion = calculus.structure(objective)
    with torch.no_grad(), Watch() as seen:
        output = whole(objective.params, example)
    chain = seen.back(output) if isinstance(output, Tensor) else []
    steps = [step for _, step in chain]

    def before(count: int) -> Objective:
        def outputs(params: Any, example: Any) -> Tensor:
            with Watch() as seen:
                output = whole(params, example)
            found = seen.back(output)
            if [step.function for _, step in found[:count]] != [step.function for step in steps[:count]]:
                message = (
                    f"{objective.name} ends in other functions for other examples, so it has no outputs before them. "
                    "Use curvature=Hessian() or EmpiricalFisher()."
                )
                raise UnsupportedModel(message)
            return found[count - 1][0]

        def output_loss(output: Tensor, example: Any) -> Tensor:
            for step in reversed(steps[:count]):
                output = step(output)
            return criterion(output, example)

        return replace(objective, outputs=outputs, output_loss=output_loss)

    return [before(place + 1) for place in reversed(range(len(steps))) if steps[place].bends]


def _later(objective: Objective, example: Any) -> list[Objective]:
    """The objective cut after the activations that begin the criterion, the earliest first."""
    whole, criterion = calculus.structure(objective)
    with torch.no_grad():
        output = whole(objective.params, example)
        if not isinstance(output, Tensor):
            return []
        with Watch(output) as seen:
            criterion(output, example)
    steps = seen.forth
    if id(output) in seen.others:
        return []

    def after(count: int) -> Objective:
        def outputs(params: Any, example: Any) -> Tensor:
            output = whole(params, example)
            for step in steps[:count]:
                output = step(output)
            return output

        def output_loss(late: Tensor, example: Any) -> Tensor:
            start = late.new_zeros(output.shape)
            with Watch(start, (count, late)):
                return criterion(start, example)

        return replace(objective, outputs=outputs, output_loss=output_loss)

    return [after(place + 1) for place in range(len(steps)) if steps[place].bends]


def same(objective: Objective, other: Objective, batch: Any) -> bool:
    """Whether both give the same losses, in two steps each."""

    def losses(one: Objective) -> Tensor:
        outputs, criterion = calculus.structure(one)
        few = (take(batch, b) for b in range(min(4, batch_length(batch))))
        return torch.stack([criterion(outputs(one.params, example), example) for example in few])

    with torch.no_grad():
        ours, theirs = losses(objective), losses(other)
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


def _outputs(objective: Objective, batch: Any) -> Tensor:
    """(b, *shape): what the objective is cut at."""
    with torch.no_grad():
        whole, _ = calculus.structure(objective)
        shape = whole(objective.params, take(batch, 0)).shape
        f = calculus.outputs(objective, batch)
    return f.reshape(len(f), *shape)


def _moved(f: Tensor, around: float) -> Tensor:
    """The outputs f, or outputs around them."""
    draw = torch.Generator().manual_seed(0)
    return f + around * torch.randn(f.shape[1:], generator=draw, dtype=torch.float64).to(f)


def _forms(objective: Objective, batch: Any, f: Tensor) -> Tensor:
    """uᵀHu for directions u of length 1, at outputs f."""
    draw = torch.Generator().manual_seed(1)
    b, K = len(f), f[0].numel()
    count = _DIRECTIONS if 2 * _DIRECTIONS * b * K <= _NUMBERS else 1
    coordinates = torch.randint(0, K, (count, b), generator=draw)
    U = torch.cat(
        [
            torch.nn.functional.one_hot(coordinates, K).double(),
            torch.nn.functional.normalize(torch.randn(count, b, K, generator=draw, dtype=torch.float64), dim=2),
        ]
    ).to(f)
    return (calculus.output_products(objective, batch, U, f) * U).sum(2).double()


def _convex(objective: Objective, batch: Any) -> bool:
    """Whether no direction was found in which the loss bends down; where it is not finite, nothing is said."""
    noise, f = _NOISE.get(objective.reference.dtype, 1e-3), _outputs(objective, batch)
    for around in _AROUND:
        forms = _forms(objective, batch, _moved(f, around))
        forms = forms[torch.isfinite(forms)]
        if len(forms) and float(forms.min()) < -noise * float(forms.abs().max()):
            return False
    return True


def _refuse_flat(objective: Objective, batch: Any) -> None:
    slope = _flat_slope(objective, batch)
    if not slope:
        return
    if not _straight(objective, batch, slope):
        raise _kinked(objective, batch, slope)
    message = (
        f"The criterion of {objective.name} is linear in what the module returns, so nothing of the data would be left "
        "in C: what bends is inside the module, such as a softmax whose logarithm it returns. Let it return what goes "
        "into that, with torch.nn.functional.cross_entropy as the criterion, or use "
        "curvature=uw.operators.Hessian() or uw.operators.EmpiricalFisher()."
    )
    raise UnsupportedModel(message)


def _flat_slope(objective: Objective, batch: Any) -> float:
    """The largest slope of a criterion without second derivative; 0 if it has one, or is fitted exactly everywhere."""
    slope, f = 0.0, _outputs(objective, batch)
    for around in _AROUND:
        moved = _moved(f, around)
        forms, slopes = _forms(objective, batch, moved), calculus.output_slopes(objective, batch, moved)
        slope = max(slope, float(slopes.abs().nan_to_num(0).max()))
        if float(forms.abs().nan_to_num(torch.inf).max()) > _FLAT * slope:
            return 0.0
    return slope


def _straight(objective: Objective, batch: Any, slope: float) -> bool:
    """Whether the slopes of a flat criterion are the same far away: it has no kinks."""
    f = _outputs(objective, batch)
    here, there = (calculus.output_slopes(objective, batch, _moved(f, around)).double() for around in (0.0, _FAR))
    return float((here - there).abs().max()) <= _FLAT * slope


def _kinked(objective: Objective, batch: Any, slope: float) -> UnsupportedModel:
    message = (
        f"The criterion of {objective.name} has no curvature: its second derivative in the model's output is 0 at and "
        f"around {batch_length(batch)} probed rows, while its slope reaches "
        f"{slope:.3g}. Nothing of the data would be left in C. This is so for absolute errors, pinball and hinge "
        "losses, whose fits sit on their kinks. Train and explain with a loss that bends: "
        "torch.nn.functional.huber_loss or smooth_l1_loss for an absolute error; t * torch.nn.functional.softplus"
        "(u / t) in place of max(0, u) in a hinge or pinball loss. Or name curvature=uw.operators.EmpiricalFisher(), "
        "which uses slopes only."
    )
    return UnsupportedModel(message)
