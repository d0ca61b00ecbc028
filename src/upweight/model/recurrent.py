"""Recurrent layers written out step by step, in operations that can be batched, and differentiated more than once.

torch's own kernels have no batching rule for vmap, and nothing looks into them; where neither is asked they run as they
are, as far as they can be differentiated twice: on a CPU, an LSTM's in float64. With gates over time t, σ the logistic
function,

    RNN    h_t = φ(W x_t + b + U h_{t−1} + c)                     φ = tanh or relu
    LSTM   i, f, g, o = σ, σ, tanh, σ of W x_t + b + U h_{t−1} + c;  s_t = f s_{t−1} + i g;  h_t = o tanh(s_t)
    GRU    r, z = σ of the same;  n = tanh(W x_t + b + r (U h_{t−1} + c));  h_t = (1 − z) n + z h_{t−1}

W x is computed for all t at once. Source: the documentation of torch.nn.LSTM, GRU and RNN, whose outputs these are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upweight.model.transforms import transformed

_VF: Any = torch._VF

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Tensor | None]], State]


@contextmanager
def written_out() -> Iterator[None]:
    """nn.RNN, nn.LSTM and nn.GRU run as written here; packed sequences as torch has them."""
    own = {name: getattr(_VF, name) for name in _CELLS}
    already = [name for name in _CELLS if name in vars(_VF)]
    if already:  # a call inside a call
        yield
        return
    for name, cell in _CELLS.items():
        setattr(_VF, name, _layer(name, own[name], cell))
    try:
        yield
    finally:
        for name in _CELLS:
            delattr(_VF, name)


def _layer(name: str, fused: Callable[..., Any], cell: Cell) -> Callable[..., Any]:
    """A recurrent layer in the signature of torch's fused one."""

    def run(x: Tensor, hx: Any, weights: Any, *settings: Any) -> tuple[Tensor, ...]:
        if not isinstance(weights, Sequence) or (isinstance(hx, Tensor) and hx.ndim == 1):  # packed: data, sizes, state
            return fused(x, hx, weights, *settings)
        if not transformed() and (not torch.is_grad_enabled() or _serves(name, x)):
            return fused(x, hx, weights, *settings)
        biased, layers, dropout, train, both, batch_first = settings
        states: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        directions = 2 if both else 1
        count = len(weights) // (layers * directions)  # 2 matrices, 2 biases, a projection
        x = x.transpose(0, 1) if batch_first else x
        last: list[State] = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                own = list(weights[k * count : (k + 1) * count])
                parts = [*own[:4], *own[4:]] if biased else [*own[:2], None, None, *own[2:]]
                steps, state = _direction(x, tuple(part[k] for part in states), parts, cell, backwards=direction == 1)
                outputs.append(steps)
                last.append(state)
            x = torch.cat(outputs, -1)
            if dropout and train and layer + 1 < layers:
                x = F.dropout(x, dropout, train)
        ends = tuple(torch.stack([state[j] for state in last]) for j in range(len(states)))
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return run


def _serves(name: str, x: Tensor) -> bool:
    """Whether torch's own layer has second derivatives, and nobody watches what is done inside."""
    watchers = getattr(torch._C, "_len_torch_function_stack", None)
    smooth = x.device.type == "cpu" and (name != "lstm" or x.dtype == torch.float64)  # else oneDNN's, or cuDNN's
    return smooth and watchers is not None and watchers() == 0


def _direction(
    x: Tensor, state: State, parts: Sequence[Tensor | None], cell: Cell, *, backwards: bool
) -> tuple[Tensor, State]:
    """The outputs of one direction of one layer at every step, in the order of the steps, and its last state."""
    inputs = F.linear(x, parts[0], parts[2]).unbind(0)  # type: ignore[arg-type]  # a slice's derivative is of full size
    steps = []
    for step in inputs[::-1] if backwards else inputs:
        state = cell(step, state, parts)
        steps.append(state[0])
    return torch.stack(steps[::-1] if backwards else steps), state


def _gates(state: State, parts: Sequence[Tensor | None]) -> Tensor:
    return F.linear(state[0], parts[1], parts[3])  # type: ignore[arg-type]


def _lstm(inputs: Tensor, state: State, parts: Sequence[Tensor | None]) -> State:
    gates = inputs + _gates(state, parts)
    i, f, _, o = gates.sigmoid().chunk(4, -1)  # of g too, for one call costs less than three
    inner = f * state[1] + i * gates.chunk(4, -1)[2].tanh()
    h = o * inner.tanh()
    projection = parts[4] if len(parts) > 4 else None
    return (h if projection is None else F.linear(h, projection), inner)


def _gru(inputs: Tensor, state: State, parts: Sequence[Tensor | None]) -> State:
    width = state[0].shape[-1]
    (outer, new), (inner, kept) = (part.split((2 * width, width), -1) for part in (inputs, _gates(state, parts)))
    r, z = (outer + inner).sigmoid().chunk(2, -1)
    n = torch.addcmul(new, r, kept).tanh()
    return (torch.lerp(n, state[0], z),)


def _tanh(inputs: Tensor, state: State, parts: Sequence[Tensor | None]) -> State:
    return ((inputs + _gates(state, parts)).tanh(),)


def _relu(inputs: Tensor, state: State, parts: Sequence[Tensor | None]) -> State:
    return ((inputs + _gates(state, parts)).relu(),)


_CELLS: dict[str, Cell] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
