"""Many small models trained at once: their parameters are stacked, and every step is one batched product for all.

A retraining of a small network is too small for a machine's linear algebra, and hundreds are needed to know what
removing rows really does. `StackedTraining` runs m of them side by side, each with its own example weights, its own
seed for the first parameters, the order of the rows and dropout; the result is that of training one by one, to
rounding. What each step minimises is the batch's share of R:

    (1/b) Σ_{i in batch} mᵢ wᵢ L(zᵢ, θ) + c r(θ)          b: places in the batch, c as in `retrainers`
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.data.trees import like, take, tree_map
from upweight.errors import InvalidInput, NotConverged, UnsupportedModel, checked_count, first_line
from upweight.influence.face import Influence
from upweight.model import calculus
from upweight.model.modules import called, forward
from upweight.model.objective import Objective
from upweight.model.transforms import grad, vmap
from upweight.runs import identity
from upweight.training.minibatch import SGD, Adam, Batches

Stack = dict[str, Tensor]
Watch = Callable[[Stack, dict[str, list[Tensor]], Tensor, Tensor], None]  # θ, memory, rows and their weights in a step
_PROBED = 4  # examples whose outputs together and alone are compared
_SAME = 1e-4  # by how much they may differ, in float32
_COMPARED = 8  # examples on which the factory's module is compared with the explained one


@dataclass(frozen=True)
class StackedTraining:
    """A training procedure by minibatches that trains many models at once; a `retrain=` for every evaluation.

    Every model has a seed. It decides the first parameters (`factory` is called after torch.manual_seed(seed)), the
    order of the rows, and dropout; the caller's random state is left alone. Equal seeds share all three, so the
    difference of two models is due to their rows.

    Args:
        optimizer: `minibatch.SGD(lr=…)` or `minibatch.Adam(…)`.
        batches: `minibatch.Shuffled(64)` or `minibatch.Placed(64)`.
        epochs: passes over the rows.
        factory: builds the module, freshly initialised, in the mode that training used (train mode keeps dropout). None
            starts every model at θ̂ and trains it through the objective, in the mode that is explained.
        start: parameters that all models start at, as `params` or a flat vector; None means the factory's own.
        together: models whose parameters are stacked. More share the cost of a step's calls, fewer stay in the cache.

    Cost: epochs × rows forward and backward passes per model. Memory: `together` × p × (2 to 4), and all rows once.

    References: the measured subsets of datamodels are Ilyas et al. (2022); the stacked parameters are those of
    torch.func.stack_module_state.
    """

    optimizer: SGD | Adam
    batches: Batches
    epochs: int
    factory: Callable[[], torch.nn.Module] | None = None
    start: Any = None
    together: int = 8

    def __post_init__(self) -> None:
        checked_count(self.epochs, "epochs")
        checked_count(self.together, "together")
        if not isinstance(self.optimizer, SGD | Adam):
            message = f"optimizer={self.optimizer!r}. Pass minibatch.SGD(lr=…) or minibatch.Adam(…)."
            raise InvalidInput(message)
        if isinstance(self.batches, type) or not isinstance(self.batches, Batches):
            message = f"batches={self.batches!r}. Pass minibatch.Shuffled(batch_size) or minibatch.Placed(batch_size)."
            raise InvalidInput(message)
        if self.factory is not None and (isinstance(self.factory, torch.nn.Module) or not callable(self.factory)):
            message = (
                f"factory is a {type(self.factory).__name__}. Pass a function without arguments that builds the module."
            )
            raise InvalidInput(message)

    def __repr__(self) -> str:
        named = getattr(self.factory, "__name__", "factory")
        origin = "θ̂" if self.factory is None else f"{named}()"
        return (
            f"StackedTraining({self.optimizer}, {self.batches}, epochs={self.epochs}, from {origin}"
            f"{'' if self.start is None else ' at given parameters'})"
        )

    def bind(self, influence: Influence) -> BoundStackedTraining:
        """The retrainer of this objective on these examples.

        Raises:
            UnsupportedModel: if the module cannot be trained in a stack.
            InvalidInput: if the factory's module has other parameters than the objective.
        """
        return BoundStackedTraining(self, influence)


class BoundStackedTraining:
    """A stacked trainer with its data at hand."""

    def __init__(self, spec: StackedTraining, influence: Influence) -> None:
        self.spec, self.objective = spec, influence.objective
        self.together = spec.together
        self.own = np.asarray(influence.examples.weights)
        if spec.factory is not None and hasattr(influence.encoder, "extractor"):
            message = (
                f"The examples of {self.objective.name} are features, which the factory's module does not take. Leave "
                "factory out: every model then starts at θ̂, or at start=."
            )
            raise UnsupportedModel(message)
        read = getattr(influence.encoder, "read", None)
        self.module = None if spec.factory is None else _module(spec.factory, self.objective, read)
        reference = self.objective.reference if self.module is None else next(self.module.parameters()).detach()
        self.reference = reference
        self.data = like(influence.examples.batch(slice(None)), reference)
        self.start = None if spec.start is None else _given(spec.start, self.objective)
        self.shape = None if self.module is None else _output_shape(self.objective, self.data)
        self.masks = [] if self.module is None else self._probe()
        if self.module is not None:
            self._refuse_another(self.module)

    @property
    def origin(self) -> str:
        """Where training starts and through which code, as a digest: what `repr` does not say of two factories."""
        first = torch.cat([block.reshape(-1).double() for block in self._first([0]).values()])
        code = identity.digest([self.module, self.spec.factory])
        told = hashlib.sha256(code.encode() + first.cpu().numpy().tobytes()).hexdigest()[:16]
        return f" #{told}"

    def __call__(self, weights: Float[NDArray[np.float64], " n"], seed: int = 0) -> Float[Tensor, " p"]:
        """θ after training with these weights."""
        return self.many(np.asarray(weights)[None], [seed])[0]

    def many(self, weights: Float[NDArray[np.float64], "m n"], seeds: Sequence[int]) -> list[Float[Tensor, " p"]]:
        """θ of m models, each trained with its own weights and seed.

        Raises:
            InvalidInput: if there is not one seed for each line of weights, or no row has weight.
            NotConverged: if a model diverged.
        """
        return [path[-1] for path in self.checkpoints(weights, seeds, [self.spec.epochs])]

    def checkpoints(
        self, weights: Float[NDArray[np.float64], "m n"], seeds: Sequence[int], epochs: Sequence[int]
    ) -> list[list[Float[Tensor, " p"]]]:
        """θ of m models after each of these epochs (ascending; 0 is the start); for each model a list of them.

        Raises:
            InvalidInput: if there is not one seed for each line of weights, or no row has weight, or an epoch is no
                number from 0 to `epochs`.
            NotConverged: if a model diverged.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if not isinstance(seeds, Sequence | np.ndarray):
            message = f"seeds={seeds!r}. Pass a list with one seed for each model, such as {list(range(len(weights)))}."
            raise InvalidInput(message)
        if weights.ndim != 2 or weights.shape[1] != len(self.own) or len(weights) != len(seeds):
            message = (
                f"weights has shape {weights.shape} with {len(seeds)} seeds, and there are {len(self.own)} rows. Pass "
                "one line of n weights and one seed for each model."
            )
            raise InvalidInput(message)
        if not (weights * self.own).any(1).all():
            message = "A model has no row with weight to train on. Leave it at least one."
            raise InvalidInput(message)
        epochs = _checked_epochs(epochs, self.spec.epochs)
        paths: list[list[Tensor]] = [[] for _ in seeds]
        for members in self._alike(weights):
            for kept in self._train(weights[members], [int(seeds[k]) for k in members], epochs):
                for place, theta in zip(members, kept, strict=True):
                    paths[place].append(theta)
        return paths

    def watched(self, weights: Float[NDArray[np.float64], "m n"], seeds: Sequence[int], watch: Watch) -> None:
        """Train m models side by side with an onlooker.

        Raises:
            NotConverged: if a model diverged.
        """
        list(self._train(weights, [int(seed) for seed in seeds], [self.spec.epochs], watch))

    def _alike(self, weights: NDArray[np.float64]) -> Iterator[list[int]]:
        """Models that take the same number of steps, `together` at a time."""
        steps: dict[int, list[int]] = {}
        for k, line in enumerate(weights):
            steps.setdefault(len(self.spec.batches.epoch(line, np.random.default_rng(0))[0]), []).append(k)
        for members in steps.values():
            yield from (members[i : i + self.together] for i in range(0, len(members), self.together))

    def _train(
        self, weights: NDArray[np.float64], seeds: list[int], keep: list[int], watch: Watch | None = None
    ) -> Iterator[list[Tensor]]:
        """The models' flat parameters after each of the epochs to keep."""
        spec, theta = self.spec, self._first(seeds)
        memory = {name: [torch.zeros_like(t) for _ in range(spec.optimizer.slots())] for name, t in theta.items()}
        orders = [np.random.default_rng([seed, 1]) for seed in seeds]
        chance = [torch.Generator().manual_seed(seed) for seed in seeds]
        effective = torch.from_numpy(weights * self.own).to(self.reference)
        share = torch.ones(len(seeds)).to(self.reference)
        if self.objective.folded:
            share = spec.batches.share(weights, self.own).to(self.reference)
        derivative = vmap(grad(self._batch_loss))
        if keep[0] == 0:
            yield self._flat(theta)
        step = 0
        for epoch in range(1, keep[-1] + 1):
            drawn = [spec.batches.epoch(line, order) for line, order in zip(weights, orders, strict=True)]
            rows = torch.from_numpy(np.stack([r for r, _ in drawn], 1))  # (t, m, b)
            divisors = torch.from_numpy(np.stack([d for _, d in drawn], 1)).to(self.reference)  # (t, m)
            for places, divisor in zip(rows, divisors, strict=True):
                step += 1
                inside = places.clamp(min=0)
                w = effective.gather(1, inside) * (places >= 0) / divisor[:, None]
                if watch is not None:
                    watch(theta, memory, inside, w)
                batch = tree_map(lambda leaf, inside=inside: leaf[inside], self.data)
                gradient = derivative(theta, batch, w, self._draws(chance), share)
                for name, g in gradient.items():
                    if spec.optimizer.weight_decay:
                        g = g.add(theta[name], alpha=spec.optimizer.weight_decay)
                    spec.optimizer.move(theta[name], g, memory[name], step)
            if epoch in keep:
                yield self._flat(theta)

    def _batch_loss(self, params: Stack, batch: Any, w: Tensor, masks: list[Tensor], share: Tensor) -> Tensor:
        """What a step descends, for one model of the stack."""
        objective = self.objective
        if self.module is None:
            values = vmap(objective.loss, in_dims=(None, 0))(_like_params(objective, params), batch)
        else:
            with _Masks(masks):
                f = forward(self.module, params, batch[0])
            f = f[:, None] if self.shape is None else f.reshape(-1, *self.shape)
            values = vmap(_criterion(objective))(f, batch)
        total = (values * w).sum()
        if objective.penalty is not None and self.spec.optimizer.weight_decay is None:
            total = total + share * objective.penalty(_like_params(objective, params))  # type: ignore[operator]
        return total

    def _first(self, seeds: list[int]) -> Stack:
        """The parameters that training starts at, stacked."""
        if self.start is not None or self.module is None:
            given = self.objective.blocks if self.start is None else self.start
            return {
                name: block.to(self.reference)
                .expand(len(seeds), *block.shape)
                .clone(memory_format=torch.contiguous_format)
                for name, block in given.items()
            }
        models = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                models.append(dict(self.spec.factory().named_parameters()))  # type: ignore[misc]
        return {name: torch.stack([model[name].detach() for model in models]) for name in self.objective.blocks}

    def _flat(self, theta: Stack) -> list[Tensor]:
        together = torch.cat([theta[name].flatten(1) for name in self.objective.blocks], 1)
        wrong = torch.nonzero(~torch.isfinite(together).all(1)).flatten().tolist()
        if wrong:
            message = (
                f"{len(wrong)} of {len(together)} models diverged: their parameters are NaN or infinite. Use a smaller "
                f"step than lr={self.spec.optimizer.lr:g}."
            )
            raise NotConverged(message)
        return list(together.clone())

    def _draws(self, chance: list[torch.Generator]) -> list[Tensor]:
        """For every dropout of the module the factors of a step, (m, b, …): 0, or 1/(1 − p)."""
        drawn = []
        for shape, p in self.masks:
            kept = torch.stack([torch.rand(shape, generator=generator) for generator in chance]) >= p
            drawn.append(kept.to(self.reference) / (1 - p))
        return drawn

    def _refuse_another(self, module: torch.nn.Module) -> None:
        """Raises unless the factory's module, at θ̂, is the explained one.

        Raises:
            InvalidInput: if its buffers, its frozen parameters or its code give other outputs.
        """
        objective = self.objective
        if objective.outputs is None:
            return
        few = tree_map(lambda leaf: leaf[:_COMPARED], self.data)
        blocks = {name: block.to(self.reference) for name, block in objective.blocks.items()}
        with torch.no_grad():
            ours = forward(copy.deepcopy(module).eval(), blocks, few[0])
        theirs = calculus.outputs(objective, few).to(ours).reshape(ours.shape)
        off = float((ours - theirs).abs().max())
        if off > 1e-2 * float(theirs.abs().max()) + 1e-6:
            fixed = [name for name, _ in module.named_buffers()]
            fixed += [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
            names = f" ({', '.join(fixed[:5])})" if fixed else ""
            message = (
                f"With the explained parameters the factory's module gives outputs that differ by {off:.2g} from those "
                f"of {objective.name}. What is not trained{names} is probably drawn anew, or the forward pass is "
                "another. Let the factory build the same module: module.load_state_dict(model.state_dict()), then draw "
                "what is trained."
            )
            raise InvalidInput(message)

    def _probe(self) -> list[tuple[tuple[int, ...], float]]:
        """Shape and probability of every dropout, in the order of the forward pass, found on one batch.

        Raises:
            UnsupportedModel: if the module has other randomness, or cannot be vectorised over models.
        """
        self._refuse_mixing()
        recorder = _Masks(None)
        rows = torch.zeros(self.spec.batches.batch_size, dtype=torch.int64)
        batch = tree_map(lambda leaf: leaf[rows], self.data)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), recorder:
            forward(self.module, {}, batch[0])  # type: ignore[arg-type]
        self.masks = recorder.seen
        stack = self._first([0, 1])
        w = torch.ones(2, len(rows)).to(self.reference)
        masks = [torch.ones(2, *shape).to(self.reference) for shape, _ in recorder.seen]
        twice = tree_map(lambda leaf: leaf[rows.expand(2, -1)], self.data)
        try:
            vmap(grad(self._batch_loss))(stack, twice, w, masks, w[:, 0])
        except RuntimeError as error:
            message = (
                f"{type(self.module).__name__} cannot be trained in a stack: {first_line(error)}. Usual reasons: "
                "another randomness than dropout, or control flow that depends on data. Pass your own "
                "retrain=(weights, seed) → θ."
            )
            raise UnsupportedModel(message) from error
        return recorder.seen

    def _refuse_mixing(self) -> None:
        """An example's output must not change with the examples beside it, or leaving a row out would leave it in.

        Raises:
            UnsupportedModel: if it does.
        """
        few = tree_map(lambda leaf: leaf[:_PROBED], self.data)[0]
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _Masks(None):
            together, again = (forward(self.module, {}, few) for _ in range(2))  # type: ignore[arg-type]
            alone = [forward(self.module, {}, tree_map(lambda leaf, b=b: leaf[b : b + 1], few)) for b in range(2)]  # type: ignore[arg-type]
        gap = float((torch.cat(alone) - together[:2]).abs().max()) if len(together) > 1 else 0.0
        if torch.equal(together, again) and gap > _SAME * (1 + float(together.abs().max())):
            message = (
                f"{type(self.module).__name__} mixes the examples of a batch in training mode: an output moves by "
                f"{gap:.3g} with the examples beside it. A row of weight 0 would still act on the others. Use a "
                "GroupNorm, or pass your own retrain=(weights, seed) → θ."
            )
            raise UnsupportedModel(message)


class _Masks(TorchFunctionMode):
    """Dropout by given factors instead of the global random numbers; without factors it notes what is asked for."""

    def __init__(self, given: list[Tensor] | None) -> None:
        TorchFunctionMode.__init__(self)
        self.given = given
        self.seen: list[tuple[tuple[int, ...], float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function inside the mode."""
        named = kwargs or {}
        if getattr(func, "__name__", "") == "dropout" and func is torch.nn.functional.dropout:
            x = args[0] if args else named["input"]
            p = float(args[1] if len(args) > 1 else named.get("p", 0.5))
            training = bool(args[2] if len(args) > 2 else named.get("training", True))
            if not training or p == 0:
                return x
            self.seen.append((tuple(x.shape), p))
            return x if self.given is None else x * self.given[len(self.seen) - 1]
        return func(*args, **named)


def _checked_epochs(epochs: Any, last: int) -> list[int]:
    """Ascending numbers from 0 to `last`.

    Raises:
        InvalidInput: if they are anything else.
    """
    listed = list(epochs) if isinstance(epochs, Sequence | np.ndarray) else []
    whole = all(hasattr(epoch, "__index__") for epoch in listed)
    if not listed or not whole or listed != sorted(set(listed)) or listed[0] < 0 or listed[-1] > last:
        message = (
            f"epochs={epochs!r}. Pass a list of different whole numbers from 0 to {last}, ascending, such as [{last}] "
            "for the end alone."
        )
        raise InvalidInput(message)
    return [int(epoch) for epoch in listed]


def _criterion(objective: Objective) -> Callable[[Tensor, Any], Tensor]:
    if objective.output_loss is None:
        message = (
            f"{objective.name} is one function, and a factory's outputs need the loss apart from the model. Use "
            "explain(module, X, y, loss=…) or Objective(…, outputs=…, output_loss=…), or leave the factory out."
        )
        raise UnsupportedModel(message)
    return objective.output_loss


def _output_shape(objective: Objective, data: Any) -> torch.Size | None:
    """The shape in which the objective's own outputs of one example are given to its loss."""
    if objective.outputs is None:
        return None
    return objective.outputs(objective.params, take(calculus.ready(objective, data), 0)).shape


def _like_params(objective: Objective, params: Stack) -> Any:
    return params if isinstance(objective.params, dict) else next(iter(params.values()))


def _module(
    factory: Callable[[], torch.nn.Module], objective: Objective, read: Callable[[Any], Tensor] | None
) -> torch.nn.Module:
    """One of the factory's modules, for its structure, with what was read off the output of the explained one.

    Raises:
        InvalidInput: if it is no module, or has other parameters than the objective.
        UnsupportedModel: if it changes its buffers while it trains.
    """
    with torch.random.fork_rng(devices=[]):
        module = factory()
    if not isinstance(module, torch.nn.Module):
        message = f"factory() returned a {type(module).__name__}. It must build a torch module."
        raise InvalidInput(message)
    _criterion(objective)
    found = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    wanted = {name: tuple(block.shape) for name, block in objective.blocks.items()}
    if found != wanted:
        message = (
            f"factory() builds a module that trains {found}, and the objective explains {wanted}. Build the same "
            "architecture, and explain all that was trained."
        )
        raise InvalidInput(message)
    for name, part in module.named_modules():
        kind = type(part).__name__
        if part.training and ("BatchNorm" in kind or ("Dropout" in kind and kind != "Dropout")):
            message = (
                f"'{name}' ({kind}) is in training mode: its running statistics or its randomness cannot be kept apart "
                "for stacked models. Use a GroupNorm or plain Dropout, or pass your own retrain=(weights, seed) → θ."
            )
            raise UnsupportedModel(message)
    return module if read is None else called(module, read)


def _given(start: Any, objective: Objective) -> Stack:
    """`start` as blocks.

    Raises:
        InvalidInput: if it does not fit the objective.
    """
    blocks = objective.blocks
    if isinstance(start, dict) and set(blocks) <= set(start):
        start = {name: start[name] for name in blocks}  # a state_dict holds buffers and frozen parameters too
    if isinstance(start, dict) and {n: tuple(torch.as_tensor(t).shape) for n, t in start.items()} == {
        n: tuple(t.shape) for n, t in blocks.items()
    }:
        return {name: torch.as_tensor(start[name]).detach() for name in blocks}
    try:
        vector = None if isinstance(start, dict) else torch.as_tensor(start).detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        vector = None
    if vector is None or len(vector) != objective.size:
        message = (
            f"start does not have the parameters of the objective ({', '.join(blocks)}; {objective.size} numbers). "
            "Pass model.state_dict() of the same architecture, or one flat vector."
        )
        raise InvalidInput(message)
    pieces = vector.split([block.numel() for block in blocks.values()])
    return {name: piece.reshape(block.shape) for (name, block), piece in zip(blocks.items(), pieces, strict=True)}
