"""How θ̂ moves: equations 1, 3 and 4 of the paper, one line of p numbers for each row.

dθ̂/dε = −(C + λI)⁻¹ g        g = ∇L(z), ∇L(z_new) − ∇L(z), or [∇ₓ∇L(z)] δ
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.data.arrays import as_array, as_tensor, check_finite
from upweight.errors import InvalidInput
from upweight.influence.edits import new_examples
from upweight.influence.system import System
from upweight.model import calculus, per_row

Lines = Float[NDArray[np.float64], "k p"]


def of_weighting(system: System, rows: Any) -> Lines:
    """Equation 1: `Influence.on_params`."""
    G = per_row.gradients(system.sweep, system.examples.rows(rows))
    return -system.solve(G + system.penalty_share).x.numpy()


def of_replacing(system: System, rows: Any, X_new: Any, y_new: Any) -> Lines:
    """Equation 3: `Influence.on_params_of_replacing`."""
    rows = system.examples.rows(rows)
    new = new_examples(system, rows, X_new, y_new)
    difference = per_row.gradients(system.sweep.over(system.objective, new)) - per_row.gradients(system.sweep, rows)
    return -system.solve(difference).x.numpy()


def of_perturbing(system: System, rows: Any, deltas: Any) -> Lines:
    """Equation 4: `Influence.on_params_of_perturbing`.

    Raises:
        InvalidInput: if deltas do not have the shape of the rows' inputs.
    """
    rows = system.examples.rows(rows)
    movable = system.encoder.movable(rows)
    array = as_array(deltas, "deltas")
    moves = movable.narrowed(as_tensor(array.toarray() if hasattr(array, "toarray") else array).double())
    check_finite(moves, "deltas")
    batch = system.examples.batch(rows)
    x = batch[0] if isinstance(batch, tuple | list) else batch
    if tuple(moves.shape) != tuple(x.shape):
        message = f"deltas has shape {tuple(moves.shape)}, and the inputs of {len(rows)} rows have {tuple(x.shape)}."
        raise InvalidInput(message + " Pass one change of the whole input for each row.")
    return -system.solve(calculus.mixed_products(system.objective, batch, moves).double().cpu()).x.numpy()
