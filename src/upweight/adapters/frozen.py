"""A frozen feature extractor with a trained head: features are computed once, and the head is explained on them.

    f(x) = head(h(x)),      θ̂ = the head's parameters,      everything before it is fixed

When the parameters to differentiate are those of one submodule, and the model's output is that submodule's, the
objective is a function of h(x). Features of the training rows are computed once and kept; queries go through the
network; equation 5 is chained back through it: ∂/∂x = (∂h/∂x)ᵀ ∂/∂h. A linear head with a loss of a linear predictor
gets the closed forms, hence the exact Hessian, direct solvers, Newton steps of removals and Newton's method to retrain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from upweight.data.arrays import as_tensor
from upweight.data.examples import Examples
from upweight.data.trees import batch_length, leaves, like, tree_map
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.model import calculus, losses
from upweight.model.encoders import Encoder, Movable
from upweight.model.modules import forward, refuse_training_mode
from upweight.model.objective import Linear, Objective
from upweight.model.sweep import Sweep
from upweight.runs.machine import budget_of

_PROBED = 2  # examples on which the model is compared with its head on features
_SIZES = (0.1, 1.0, 10.0)  # of the random outputs on which a criterion is recognised
_TARGETS = 64  # different targets on which it is
_IMAGE_BYTES = 2**25  # what one example's activations take at least: a guess that only sets the batch size
_BYTES_PER_NUMBER = 400  # and per number of the input


@dataclass(frozen=True)
class Extractor:
    """The part of a module before one of its submodules, as a function; the module is never changed.

    Its parameters and buffers are those of the day it was made: features that are kept stay those of new queries when
    the module is trained further.

    Args:
        model: the whole module.
        path: where its head is, the submodule whose input is taken.
        state: its parameters and buffers.
    """

    model: torch.nn.Module
    path: str
    state: Mapping[str, Tensor] = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: torch.nn.Module, path: str) -> Extractor:
        """The extractor of the module as it is now.  Memory: a copy of its parameters and buffers."""
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        kept = {name: tensor.detach().clone() for name, tensor in named.items()}
        coarse = {torch.float16, torch.bfloat16}  # of which activations would keep two or three digits only
        raised = {name: tensor.float() if tensor.dtype in coarse else tensor for name, tensor in kept.items()}
        return cls(model, path, raised)

    def depends_on_head(self, x: Any) -> bool:
        """Whether the head's parameters act before it too, in a call that shares a tensor without a module."""
        inside = f"{self.path}."
        moved = {
            name: t * 1.5 + 0.25 if name.startswith(inside) and t.is_floating_point() else t
            for name, t in self.state.items()
        }
        return not torch.equal(self(x), replace(self, state=moved)(x))

    @property
    def reference(self) -> Tensor:
        """A parameter, for its dtype and device."""
        return self.state[next(name for name, _ in self.model.named_parameters())]

    @property
    def head(self) -> torch.nn.Module:
        """The submodule."""
        return self.model.get_submodule(self.path)

    def checked(self, x: Any) -> Float[Tensor, "b ..."]:
        """The head's input for a batch, without a graph, after a look whether the head's output is the model's.

        Raises:
            UnsupportedModel: if it is not.
        """
        with torch.no_grad():
            features, output = self.both(x)
            own = {name[len(self.path) + 1 :]: t for name, t in self.state.items() if name.startswith(f"{self.path}.")}
            again = forward(self.head, own, features) if len(features) == len(output) else None
            again = None if again is None else again.reshape(output.shape)
        if again is None or not torch.allclose(again, output, rtol=1e-4, atol=1e-5 * float(output.abs().max())):
            message = (
                f"{type(self.model).__name__} does something behind '{self.path}' for some inputs, so it is no head on "
                "features. Differentiate it as a whole: explain(…, parameters=[…]) with one parameter more."
            )
            raise UnsupportedModel(message)
        return features

    def __call__(self, x: Any) -> Float[Tensor, "b ..."]:
        """The head's input for a batch of the model's inputs, and what autograd needs if it is recording."""
        return self.both(x)[0]

    def both(self, x: Any) -> tuple[Tensor, Tensor]:
        """The head's input and the model's output for a batch.

        Raises:
            UnsupportedModel: if the head is not called once with one tensor.
        """
        refuse_training_mode(self.model)
        reference = self.reference
        with _inputs_of(self.head) as seen:
            output = forward(self.model, self.state, like(tree_map(_as_floats(x, reference), x), reference))
        if len(seen) != 1 or len(seen[0]) != 1 or not isinstance(seen[0][0], Tensor):
            message = (
                f"The head '{self.path}' is called {len(seen)} times in one pass of {type(self.model).__name__} for "
                "some inputs, so it is no head on features. Differentiate it as a whole: explain(…, parameters=[…]) "
                "with one parameter more."
            )
            raise UnsupportedModel(message)
        return seen[0][0], output


class Headed(torch.nn.Module):
    """The head alone, under the same parameter names as in the model, with the model's output shape.

    Args:
        path: where the head is in the model, such as "classifier.1".
        head: the submodule.
        shape: of the model's output for one example.
    """

    def __init__(self, path: str, head: torch.nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.path, self.shape = path, shape
        place: torch.nn.Module = self
        *outer, last = path.split(".")
        for name in outer:
            inner = torch.nn.Module()
            place.add_module(name, inner)
            place = inner
        place.add_module(last, head)

    def forward(self, features: Tensor) -> Tensor:
        """The model's output from features."""
        return self.get_submodule(self.path)(features).reshape(len(features), *self.shape)


def split(model: torch.nn.Module, parameters: Iterable[str] | Callable[[str], bool] | None) -> str | None:
    """Where the head is: the smallest submodule whose parameters are the differentiated ones, all of them; or None."""
    named = dict(model.named_parameters())
    if parameters is None:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
    elif callable(parameters):
        chosen = {name for name in named if parameters(name)}
    else:
        chosen = {parameters} if isinstance(parameters, str) else set(parameters)
    if not chosen or len(chosen) == len(named) or not chosen <= set(named):
        return None
    places = [name for name, module in model.named_modules() if name and _parameter_names(name, module) == chosen]
    place = max(places, key=len, default=None)
    if place is None:
        return None
    own = {id(named[name]) for name in chosen}
    everywhere = [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own]
    return place if len(everywhere) == len(own) else None  # tied to what comes before the head: no frozen features


def headed(model: torch.nn.Module, path: str, probe: Any) -> tuple[Extractor, Headed] | None:
    """The extractor and the head, if the model's output for the probed inputs is the head's of their features.

    Raises:
        UnsupportedModel: if an example's features depend on the others in its batch.
    """
    extractor = Extractor.of(model, path)
    few = tree_map(lambda leaf: leaf[:_PROBED], probe)
    try:
        with torch.no_grad():
            features, output = extractor.both(few)
            alone = [extractor(tree_map(lambda leaf, b=b: leaf[b : b + 1], few)) for b in range(batch_length(few))]
            extractor.checked(few)
            if extractor.depends_on_head(few):
                return None
            whole = Headed(path, extractor.head, tuple(output.shape[1:]))
    except (UnsupportedModel, RuntimeError, TypeError, ValueError, IndexError):
        return None  # explained as a whole, where the reason shows
    gap = float((torch.cat(alone) - features).abs().max())
    if gap > 1e-3 * (1 + float(features.abs().max())):
        message = (
            f"{type(model).__name__} gives other features before '{path}' for a batch than for its examples one by "
            f"one: the largest difference is {gap:.3g}. Something in it mixes the examples of a batch (batch "
            "statistics, a mean over axis 0), so no example has a loss of its own. Call model.eval(), which ends batch "
            "statistics, or take the mean over axes of one example."
        )
        raise UnsupportedModel(message)
    return extractor, whole


def extracted(
    extractor: Extractor,
    examples: Examples,
    batch_size: int | None,
    progress: bool | None,
    budget: int | None = None,
) -> Tensor:
    """(n, …) features of every example, in the module's precision.  Cost: one forward pass of the network.

    Raises:
        UnsupportedModel: if the head's output is not the model's for one of them.
    """
    first = [leaf for leaf in leaves(examples.batch([0])) if isinstance(leaf, Tensor)]
    memory = max([_IMAGE_BYTES] + [_BYTES_PER_NUMBER * leaf.numel() for leaf in first])
    sweep = Sweep(_NOTHING, examples, batch_size, progress, example_bytes=memory, budget=budget)

    def features(batch: Any, _: Tensor) -> Tensor:
        return extractor.checked(batch[0] if isinstance(batch, tuple | list) else batch)

    return torch.from_numpy(sweep.emit(features, label="features"))


def features_of(extractor: Extractor, examples: Examples, settings: Mapping[str, Any]) -> Tensor | None:
    """`extracted` for training rows; None if something behind the head acts on one of them, so that it is no head."""
    try:
        budget = budget_of(settings.get("memory_budget"))
        return extracted(extractor, examples, settings.get("batch_size"), settings.get("progress"), budget)
    except UnsupportedModel:
        return None


def closed_form(objective: Objective, headed: Headed, features: Tensor, y: Tensor) -> Objective:
    """The objective with the structure of a linear predictor, if the head is linear and the loss is one that is known.

    The criterion is recognised by its values for random outputs: those of cross-entropy, of the logistic loss or of
    the squared error, on every target that occurs (at most 64 of a regression's).
    """
    head = headed.get_submodule(headed.path)
    if type(head) is not torch.nn.Linear or features.ndim != 2 or objective.output_loss is None:
        return objective
    K = head.out_features
    known = [losses.cross_entropy] if K > 1 else [losses.logistic, losses.squared]
    found = next((loss for loss in known if _same_loss(objective, headed, loss, y)), None)
    if found is None:
        return objective
    return replace(objective, linear=Linear(found, K, head.in_features, head.bias is not None))


@dataclass(frozen=True)
class FrozenEncoder:
    """Queries go through the network to the head's input; equation 5 goes back through it.

    Args:
        inner: how features and labels are read.
        extractor: from inputs to features.
        original: the training rows as they were given.
        changed: inputs of the rows that were edited since.
        batch_size: examples in a batch; None fits the memory.
        progress: whether a bar is shown.
        budget: bytes, as for `Sweep`.
    """

    inner: Encoder
    extractor: Extractor
    original: Examples
    changed: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    batch_size: int | None = None
    progress: bool | None = None
    budget: int | None = None

    @property
    def refit(self) -> None:
        """None: how the module was trained is not known."""

    @property
    def feature_names(self) -> None:
        """None: a module's inputs have no names."""

    def unselected(self) -> FrozenEncoder:
        """Itself."""
        return self

    def examples(self, X: Any, y: Any = None) -> Examples:
        """Features of X, and y."""
        if isinstance(X, Examples) and X.encoded_by is self.extractor:
            return X
        whole = X if isinstance(X, Examples) else Examples(X, y)
        features = extracted(self.extractor, whole, self.batch_size, self.progress, self.budget)
        made = self.inner.examples(Examples(features, whole.targets(), sample_weight=whole.sample_weight))
        made.encoded_by, made.names = self.extractor, whole.names
        return made

    def targets(self, y: Any) -> Tensor:
        """Labels as the training targets were made."""
        return self.inner.targets(y)

    def class_weights(self, y: Tensor) -> NDArray[np.float64]:
        """Ones."""
        return self.inner.class_weights(y)

    def movable(self, rows: NDArray[np.int64]) -> Movable:
        """Through the network at these rows' inputs."""
        return _Through(self, rows)

    def reweighted(self, share: float) -> FrozenEncoder:  # noqa: ARG002
        """Itself."""
        return self

    def check_new(self, X: Any) -> None:
        """Nothing to say."""

    def edited(self, rows: NDArray[np.int64], X: Any, y: Any) -> FrozenEncoder:  # noqa: ARG002
        """The same with other inputs for these rows."""
        if X is None:
            return self
        inputs = as_tensor(X)
        return replace(self, changed={**self.changed, **{int(row): inputs[k] for k, row in enumerate(rows)}})

    def inputs(self, row: int) -> Any:
        """The input of one training row, as a batch of one, in floats.

        Raises:
            InvalidInput: if it is not an array of numbers.
        """
        if row in self.changed:
            x: Any = self.changed[row][None]
        else:
            batch = self.original.batch([row])
            x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            message = f"The input of row {row} is {kind}, which cannot be moved by a small amount. Explain a model of "
            raise InvalidInput(message + "the embedded inputs instead.")
        reference = self.extractor.reference
        return x.to(device=reference.device, dtype=reference.dtype)


class _Through(Movable):
    """Derivatives by features, chained back to derivatives by inputs; one row at a time."""

    def __init__(self, encoder: FrozenEncoder, rows: NDArray[np.int64]) -> None:
        self.encoder = encoder
        self.rows = rows

    def widened(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """(q, r, *features) → (q, r, *x).  Cost: a forward pass and q backward passes of the network for each row."""
        moved = [
            calculus.pulled_back(
                self.encoder.extractor, self.encoder.inputs(int(row)), torch.from_numpy(gradients[:, k])
            )
            for k, row in enumerate(self.rows)
        ]
        return torch.stack(moved, 1).numpy()

    def narrowed(self, deltas: Tensor) -> Tensor:
        """(r, *x) → (r, *features), the derivative of the features along each change."""
        if len(deltas) != len(self.rows):
            return deltas  # whose shape is then refused
        along = [
            calculus.pushed_forward(self.encoder.extractor, self.encoder.inputs(int(row)), deltas[k])
            for k, row in enumerate(self.rows)
        ]
        return torch.stack(along)


@contextmanager
def _inputs_of(head: torch.nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """What one module is called with while this is open; nothing is hooked to the module itself."""
    seen: list[tuple[Any, ...]] = []
    handle = register_module_forward_pre_hook(lambda module, args: seen.append(args) if module is head else None)
    try:
        yield seen
    finally:
        handle.remove()


def _as_floats(x: Any, reference: Tensor) -> Callable[[Any], Any]:
    """Pictures are often stored as bytes; whole numbers of an input that is one array become floats."""
    single = isinstance(x, Tensor) and x.dtype == torch.uint8
    return lambda leaf: leaf.to(reference.dtype) if single else leaf


def _same_loss(objective: Objective, headed: Headed, loss: losses.Loss, y: Tensor) -> bool:
    """Whether the criterion has the values of `loss`, on outputs of several sizes and on the targets that occur."""
    K = int(headed.get_submodule(headed.path).out_features)  # type: ignore[arg-type]
    if y.ndim > 2 or (y.ndim == 2 and y.shape[1] != 1):
        return False
    targets = torch.unique(y, dim=0)
    if loss is losses.cross_entropy and (y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < K):
        return False
    if loss is losses.logistic and not bool(((y == 0) | (y == 1)).all()):
        return False
    targets = targets[:: max(1, len(targets) // _TARGETS)]
    generator = torch.Generator().manual_seed(0)
    for size in _SIZES:
        f = size * torch.randn(len(targets), K, generator=generator, dtype=torch.float64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a criterion that broadcasts warns; its values decide
                theirs = [
                    objective.output_loss(f[b].reshape(1, *headed.shape).to(objective.reference), (None, targets[b]))  # type: ignore[misc]
                    for b in range(len(targets))
                ]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        if not torch.allclose(torch.stack(theirs).double(), loss.value(f, targets), rtol=1e-5, atol=1e-9):
            return False
    return True


def _parameter_names(path: str, module: torch.nn.Module) -> set[str]:
    return {f"{path}.{name}" for name, _ in module.named_parameters()}


_NOTHING = Objective(lambda params, _: params.sum(), torch.zeros(1))  # a sweep that only runs the extractor needs none
