"""A torch module as a function of its parameters: its output, which of them are explained, and what it may not do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.errors import InvalidInput, UnsupportedModel
from upweight.model import weight_norm
from upweight.model.attention import ShortAttention
from upweight.model.recurrent import written_out
from upweight.model.transforms import functional_call

_SOFTMAX = (functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax)


def forward(model: torch.nn.Module, state: Mapping[str, Tensor], x: Any) -> Tensor:
    """The module's output for a batch, with other parameters and buffers than its own; the module is not changed.

    A dict of inputs is passed by keywords, a tuple by position. Attention runs in its plain form, for the fused kernels
    can be differentiated once or not at all; masks are written out, for their short forms depend on the data,
    recurrent layers, for vmap cannot batch theirs, and norms of weights, for torch's second derivative is wrong.
    """
    if isinstance(model, Called):
        return model.read(forward(model.module, state, x))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _whole_masks(), written_out(), _Written():
            return plainly(model, state, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def plainly(model: torch.nn.Module, state: Mapping[str, Tensor], x: Any) -> Any:
    """The same by whatever kernels torch takes for it: the module as its user calls it."""
    if isinstance(model, Called):
        return model.read(plainly(model.module, state, x))
    if isinstance(x, Mapping):
        return functional_call(model, dict(state), (), dict(x))
    return functional_call(model, dict(state), tuple(x) if isinstance(x, tuple | list) else (x,))


class _Written(ShortAttention):
    """Inside, attention and norms of weights are made of operations that can be differentiated twice.

    A softmax that is asked for float32 stays in float64: a mask of the least float64 would be −∞ there, and rows of it
    NaN.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is weight_norm.OWN:
            return weight_norm.normed(*args, **kwargs)
        if func in _SOFTMAX and kwargs.get("dtype") is torch.float32:
            x = args[0] if args else kwargs["input"]
            kwargs = {**kwargs, "dtype": torch.float64} if x.dtype == torch.float64 else kwargs
        return super().__torch_function__(func, types, args, kwargs)


class Called(torch.nn.Module):
    """A module together with what is read off its output, as one module: of the same parameters by the same names.

    Args:
        module: whose output is no tensor, or not the one that the loss takes.
        read: from its output to a tensor with a batch axis.
    """

    module: torch.nn.Module

    def __init__(self, module: torch.nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.__dict__["module"] = module  # which makes it no child, so that names stay
        self.read = read

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What is read off the module's output."""
        return self.read(self.module(*args, **kwargs))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those of the module."""
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Those of the module."""
        return self.module.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """Those of the module."""
        return self.module.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Those of the module."""
        return self.module.named_children()


def called(module: torch.nn.Module, read: Callable[[Any], Tensor]) -> Called:
    """`Called` under the name of the module's own class, which messages tell."""
    return type(type(module).__name__, (Called,), {})(module, read)


@contextmanager
def _whole_masks() -> Iterator[None]:
    """transformers leave a mask out where all of it is 1, which vmap cannot ask; while they trace they write it out."""
    masking = sys.modules.get("transformers.masking_utils")
    before = getattr(masking, "is_tracing", None)
    if masking is None or before is None:
        yield
        return
    masking.is_tracing = lambda *_: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking.is_tracing = before  # type: ignore[attr-defined]


def refuse_training_mode(model: torch.nn.Module) -> None:
    """Raises when a module of `model` would make an example's loss random or dependent on its batch.

    Raises:
        UnsupportedModel: if dropout is active, batch statistics are being used, or an embedding scales its gradients,
            has sparse ones, or shortens its rows.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if getattr(module, "scale_grad_by_freq", False):
            message = (
                f"'{name}' ({kind}, scale_grad_by_freq=True) divides gradients by how often a word is in the batch, so "
                "they are not those of any loss of single examples. Build it with scale_grad_by_freq=False, and train "
                "it again."
            )
            raise UnsupportedModel(message)
        if getattr(module, "max_norm", None) is not None:
            message = (
                f"'{name}' ({kind}, max_norm={module.max_norm}) shortens its rows in every forward pass, so θ̂ would "
                "move while it is explained. Run the model once on its training inputs, which shortens the rows that "
                "they use, then set its max_norm to None."
            )
            raise UnsupportedModel(message)
        if isinstance(module, torch.nn.Embedding) and module.sparse:
            message = (
                f"'{name}' ({kind}, sparse=True) gives its gradients as sparse tensors, which cannot be differentiated "
                f"again. Write model.get_submodule({name!r}).sparse = False: its outputs stay what they are."
            )
            raise UnsupportedModel(message)
        if "BatchNorm" in kind and not getattr(module, "track_running_stats", True):
            message = (
                f"'{name}' ({kind}) keeps no running statistics, so even in eval mode the loss of one example depends "
                "on the others in its batch. Use track_running_stats=True, or a GroupNorm."
            )
            raise UnsupportedModel(message)
        if not module.training:
            continue
        if "Dropout" in kind and getattr(module, "p", 1) > 0:
            message = (
                f"Dropout is active in '{name}' ({kind}, p={getattr(module, 'p', '?')}), so the loss of an example "
                "is random. Call model.eval() first."
            )
            raise UnsupportedModel(message)
        if "BatchNorm" in kind:
            message = (
                f"'{name}' ({kind}) is in training mode, so the loss of one example depends on the others in its "
                "batch and there is no per-example loss to differentiate. Call model.eval() first: it then uses its "
                "running statistics."
            )
            raise UnsupportedModel(message)


def moving_buffers(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the buffers that a forward pass in training mode changes: running statistics, power iterations."""
    found = []
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            running = name.startswith("running_") or "moving" in name or name in {"_u", "_v", "weight_u", "weight_v"}
            if running and buffer is not None and getattr(module, "track_running_stats", True):
                found.append(f"{path}.{name}" if path else name)
    return tuple(found)


def chosen_parameters(
    model: torch.nn.Module, parameters: Iterable[str] | Callable[[str], bool] | None
) -> dict[str, Tensor]:
    """The parameters that are explained, in the module's order: those named, or all that are not frozen.

    Raises:
        UnsupportedModel: if there are none, or all are frozen.
        InvalidInput: if a name is none of the module's, or nothing is selected.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    if not named:
        message = (
            f"{type(model).__name__} has no parameters, so nothing was learned from data and there is no influence "
            "to compute. Pass the module that was trained; one that keeps its layers in a list keeps them in an "
            "nn.ModuleList."
        )
        raise UnsupportedModel(message)
    if parameters is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if not chosen:
            message = (
                f"All {len(named)} parameters of {type(model).__name__} are frozen (requires_grad=False), so there "
                "is nothing to differentiate. "
                "Call requires_grad_(True) on what was trained, or name it: parameters=[...]."
            )
            raise UnsupportedModel(message)
        return chosen
    if callable(parameters):
        wanted = [name for name in named if parameters(name)]
    else:
        wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    unknown = [name for name in wanted if name not in named]
    if unknown or not wanted:
        problem = (
            f"parameters names {unknown}, which the model does not have"
            if unknown
            else "parameters selects nothing of the model"
        )
        message = f"{problem}. Name some of what it has: {', '.join(named)}."
        raise InvalidInput(message)
    return {name: parameter for name, parameter in named.items() if name in set(wanted)}
