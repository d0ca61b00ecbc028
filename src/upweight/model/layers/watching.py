"""Sees every use of a parameter while a loss runs, and adds the offsets that its gradients are read from.

A torch function that is given a parameter, or a view of one, is a `Use`. Where the function multiplies, a rule says
what its arguments mean and the offset goes on its output; otherwise the offset goes on the parameter. See `layers`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from upweight.model.objective import Objective


@dataclass(frozen=True)
class Use:
    """One use of parameters by one torch function.

    Args:
        rule: the function, in words; "autograd: …" where no structure is known.
        block: the parameter's name.
        bias: the name of the bias that is added in the same call, and `bias_where` its used entries in the flat block.
        where: places of the used entries in the flat block, None for all in order.
        shape: the block's shape.
        settings: the function's other arguments.
        offset: shape of the offset of zeros, of one example.
    """

    rule: str
    block: str
    where: Tensor | None
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    bias: str | None = None
    bias_where: Tensor | None = None
    bias_shape: tuple[int, ...] = ()

    def like(self, other: Use) -> bool:
        """Whether it is the same use of the same parameters, be it at another size."""
        places = ((self.where, other.where), (self.bias_where, other.bias_where))
        same = (self.rule, self.block, self.shape, self.settings, self.bias) == (
            *(other.rule, other.block, other.shape, other.settings, other.bias),
        )
        return same and all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in places)  # pyright: ignore


@dataclass
class _Held:
    """A parameter or a view of one: its block, and for each of its entries the place in the flat block."""

    tensor: Tensor  # kept, so that its id stays its own
    block: str
    places: Tensor | None  # None: all, in order


@dataclass
class Watch(TorchFunctionMode):
    """Sees every torch function; without offsets it lists the uses of parameters, with them it adds the offsets."""

    objective: Objective
    params: Any
    offsets: tuple[Tensor, ...] | None = None
    uses: list[Use] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    bytes: int = 1024

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)
        names = list(self.objective.blocks)
        tensors: list[Tensor] = list(self.params.values()) if isinstance(self.params, dict) else [self.params]
        self.held = {id(block): _Held(block, name, None) for name, block in zip(names, tensors, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _holds(args, self.held) and not (kwargs and _holds(kwargs.values(), self.held)):
            return func(*args, **kwargs)
        if func in _VIEWS and len(_tensors((args, kwargs))) == 1:
            return self._view(func, args, kwargs)
        read = _RULES.get(func)
        call = None if read is None else read(self, args, kwargs)
        if call is not None:
            return self._structured(func, args, kwargs, call)
        if hasattr(func, "__code__") and any(name.startswith("has_torch_function") for name in func.__code__.co_names):
            with self:
                return _opened(func)(*args, **kwargs)
        return self._direct(func, args, kwargs)

    def holds(self, parts: Iterable[Any]) -> bool:
        """Whether one of them is a parameter, or a view of one."""
        return _holds(parts, self.held)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A view of a parameter stays known as its part."""
        out = func(*args, **kwargs)
        (tensor,) = _tensors((args, kwargs))
        source = self.held[id(tensor)]
        changed, changed_kwargs = _replaced((args, kwargs), {id(tensor): _places(source)})
        moved = func(*changed, **changed_kwargs)
        views = out if isinstance(out, tuple | list) else [out]
        parts = moved if isinstance(moved, tuple | list) else [moved]
        for view, part in zip(views, parts, strict=True):
            self.held[id(view)] = _Held(view, source.block, part)
        return out

    def _structured(self, func: Any, args: Any, kwargs: Any, call: _Call) -> Tensor:
        known = {id(leaf): leaf.detach() for leaf in (call.weight, call.bias) if leaf is not None}
        args, kwargs = _replaced((args, kwargs), known)  # detached: what still depends on a parameter was not seen
        out = func(*args, **kwargs)
        weight = self.held[id(call.weight)]
        places = None if weight.places is None else weight.places.reshape(-1)
        order = places if call.order is None else (call.order if places is None else places[call.order])
        use = Use(call.rule, weight.block, order, self._shape(weight), tuple(out.shape), call.settings)
        if call.bias is not None:
            held = self.held[id(call.bias)]
            part = None if held.places is None else held.places.reshape(-1)
            use = replace(use, bias=held.block, bias_where=part, bias_shape=self._shape(held))
        return self._offset(use, out, call.x)

    def _direct(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The offset on every parameter that is used; a question about its shape or the like is no use."""
        if not _tensors(out := func(*args, **kwargs)):
            return out
        changed: dict[int, Tensor] = {}
        for leaf in _tensors((args, kwargs)):
            held = self.held.get(id(leaf))
            if held is None or id(leaf) in changed:
                continue
            name = getattr(func, "__name__", str(func))
            places = None if held.places is None else held.places.reshape(-1)
            use = Use(f"autograd: {name}", held.block, places, self._shape(held), tuple(leaf.shape))
            changed[id(leaf)] = self._offset(use, leaf.detach(), leaf.new_zeros(()))
        new_args, new_kwargs = _replaced((args, kwargs), changed)
        return func(*new_args, **new_kwargs)

    def _shape(self, held: _Held) -> tuple[int, ...]:
        return tuple(self.objective.blocks[held.block].shape)

    def _offset(self, use: Use, tensor: Tensor, x: Tensor) -> Tensor:
        number = len(self.inputs)
        self.inputs.append(x)
        if self.offsets is None:
            self.uses.append(use)
            positions = math.prod(use.settings.get("kernel", (1,)))
            self.bytes += 4 * (x.numel() * positions + 2 * tensor.numel())
            return tensor
        return tensor + self.offsets[number]


def _holds(parts: Iterable[Any], held: dict[int, _Held]) -> bool:
    """Whether one of the tensors is held; asked of every call, so it makes no list."""
    for part in parts:
        if isinstance(part, Tensor):
            if id(part) in held:
                return True
        elif isinstance(part, tuple | list):
            if _holds(part, held):
                return True
        elif isinstance(part, dict) and _holds(part.values(), held):
            return True
    return False


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in _tensors(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _tensors(part)]
    return []


def _replaced(tree: Any, changed: dict[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return changed.get(id(tree), tree)
    if isinstance(tree, tuple | list):
        return type(tree)(_replaced(part, changed) for part in tree)
    if isinstance(tree, dict):
        return {key: _replaced(part, changed) for key, part in tree.items()}
    return tree


def _places(held: _Held) -> Tensor:
    if held.places is not None:
        return held.places
    return torch.arange(held.tensor.numel(), device=held.tensor.device).reshape(held.tensor.shape)


def _opened(func: Any) -> Any:
    """A private copy of a function that torch wrote in Python, which goes straight to its body: there it is watched."""
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# ---- rules: what a function's arguments mean -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call that multiplies by a parameter.

    Args:
        rule: its name.
        weight, bias: the parameters; the bias may be missing.
        x: the other factor.
        order: for each entry of the (g, o, i) matrices its place in the flat weight; None for the same order.
        settings: strides and the like.
    """

    rule: str
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    order: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def _linear(watch: Watch, args: Any, kwargs: Any) -> _Call | None:
    x, weight, bias = _bound(args, kwargs, ("input", "weight", "bias"))
    if not _is_held(watch, weight) or _is_held(watch, x) or not _fits(watch, bias, len(weight)) or weight.ndim != 2:
        return None
    return _Call("linear", weight, bias, x)


def _matmul(watch: Watch, args: Any, kwargs: Any) -> _Call | None:
    left, right = (*args, *kwargs.values())
    if _is_held(watch, left) and _is_held(watch, right):
        return None
    if _is_held(watch, right) and right.ndim == 2 and left.ndim >= 1:
        i, o = right.shape
        return _Call("matmul", right, None, left, _counting(right).reshape(i, o).T.reshape(-1))
    if _is_held(watch, left) and left.ndim == 2 and right.ndim in {1, 2}:
        return _Call("matmul", left, None, right, settings={"columns": right.ndim == 2})
    return None


def _addmm(watch: Watch, args: Any, kwargs: Any) -> _Call | None:
    bias, x, weight = _bound(args, kwargs, ("input", "mat1", "mat2"))
    scaled = any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if not _is_held(watch, weight) or _is_held(watch, x) or scaled:
        return None
    if not _is_held(watch, bias) or not _fits(watch, bias, weight.shape[1]):
        return None
    i, o = weight.shape
    return _Call("addmm", weight, bias, x, _counting(weight).reshape(i, o).T.reshape(-1))


def _convolution(axes: int) -> Callable[[Watch, Any, Any], _Call | None]:
    def read(watch: Watch, args: Any, kwargs: Any) -> _Call | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, weight, bias, stride, padding, dilation, groups = _bound(args, kwargs, names)
        if not _is_held(watch, weight) or _is_held(watch, x) or not _fits(watch, bias, len(weight)):
            return None
        settings = {
            "kernel": tuple(weight.shape[2:]),
            "stride": _each(stride, axes, 1),
            "padding": padding if isinstance(padding, str) else _each(padding, axes, 0),
            "dilation": _each(dilation, axes, 1),
            "groups": groups or 1,
        }
        return _Call(f"conv{axes}d", weight, bias, x, settings=settings)

    return read


def _transposed(axes: int) -> Callable[[Watch, Any, Any], _Call | None]:
    def read(watch: Watch, args: Any, kwargs: Any) -> _Call | None:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        x, weight, bias, stride, padding, _, groups, dilation = _bound(args, kwargs, names)
        groups = groups or 1
        if not _is_held(watch, weight) or _is_held(watch, x) or not _fits(watch, bias, groups * weight.shape[1]):
            return None
        settings = {
            "kernel": tuple(weight.shape[2:]),
            "stride": _each(stride, axes, 1),
            "padding": _each(padding, axes, 0),
            "dilation": _each(dilation, axes, 1),
            "groups": groups,
        }
        order = _counting(weight).reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2).reshape(-1)
        return _Call(f"conv_transpose{axes}d", weight, bias, x, order, settings)

    return read


def _indexed(watch: Watch, args: Any, kwargs: Any) -> _Call | None:  # noqa: ARG001
    """table[indices], for whole numbers."""
    table, indices = args
    whole = _is_held(watch, table) and watch.held[id(table)].places is None and table.ndim == 2
    numbers = isinstance(indices, Tensor) and indices.dtype == torch.int64
    if not whole or not numbers or _is_held(watch, indices):
        return None
    return _Call("embedding", table, None, indices % len(table), settings={"padding": -1})


def _embedding(watch: Watch, args: Any, kwargs: Any) -> _Call | None:
    names = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
    weight, indices, padding, scaled, _ = _bound(args, kwargs, names)
    if not _is_held(watch, weight) or scaled or watch.held[id(weight)].places is not None:
        return None
    return _Call("embedding", weight, None, indices, settings={"padding": -1 if padding is None else padding})


_RULES: dict[Any, Callable[[Watch, Any, Any], _Call | None]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.mv: _matmul,
    Tensor.mv: _matmul,
    torch.addmm: _addmm,
    torch.embedding: _embedding,
    Tensor.__getitem__: _indexed,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed(1),
    torch.conv_transpose2d: _transposed(2),
    torch.conv_transpose3d: _transposed(3),
}
_VIEW_NAMES = (
    *("t", "transpose", "permute", "swapaxes", "movedim", "reshape", "view", "flatten", "unsqueeze", "squeeze"),
    *("chunk", "split", "unbind", "select", "narrow"),
)
_VIEWS = {getattr(owner, name) for owner in (torch, Tensor) for name in _VIEW_NAMES if hasattr(owner, name)}
_VIEWS |= {Tensor.T.__get__, Tensor.mT.__get__, Tensor.__getitem__}  # type: ignore[attr-defined]  # pyright: ignore


def _bound(args: Any, kwargs: Any, names: tuple[str, ...]) -> list[Any]:
    return [*args, *(kwargs.get(name) for name in names[len(args) :])]


def _is_held(watch: Watch, tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and id(tensor) in watch.held


def _fits(watch: Watch, bias: Any, outputs: int) -> bool:
    """Whether a bias is a parameter or a part of one with a number per output, or nothing; others need autograd."""
    return bias is None or (_is_held(watch, bias) and tuple(bias.shape) == (outputs,))


def _counting(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device=tensor.device)


def _each(value: Any, axes: int, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * axes
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers
