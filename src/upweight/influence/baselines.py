"""What a score has to beat: rankings of the training rows that cost little and predict no retraining.

Every function is `(influence, Xq, yq) → Scores`. The counterfactual of such scores begins with "none", so `agreement`
refuses them (they have no unit to compare) and `lds`, which only ranks, takes them. A positive value always says that
the row helps the query; each docstring says in which sense. g_q = ∇L(z_q, θ̂) and gᵢ = ∇L(zᵢ, θ̂), without penalty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.data.records import MASK, TOKENS
from upweight.data.trees import batch_length, leaves
from upweight.errors import InvalidInput, checked_count, first_line
from upweight.influence import removal
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores, naming
from upweight.influence.system import Explained, System, solved
from upweight.model import layers, per_row
from upweight.solvers import Quadratic

__all__ = [
    "bm25",
    "gradient_cosine",
    "gradient_dot",
    "loss_relative_influence",
    "nearest_neighbours",
    "random",
    "relative_influence",
    "training_loss",
]

_BLOCK_NUMBERS = 2**24  # of the queries' gradients at once: 128 MB
_PROBE_ROWS = 1024


def gradient_dot(influence: Explained, Xq: Any, yq: Any = None) -> Scores:
    """wᵢ g_q · gᵢ: positive if a small step on row i lowers the query's loss (TracIn with one checkpoint and rate 1).

    Cost: one sweep of a forward and a backward pass; no n × p numbers.

    Args:
        influence: whose model and training rows.
        Xq: the queries' inputs.
        yq: the queries' targets.

    References: Charpiat et al. (2019); Pruthi et al. (2020).
    """
    system = influence.system
    queries = system.queries((Xq, yq))
    return _scores(system, queries, dots(system, queries), "dot product of gradients")


def gradient_cosine(influence: Explained, Xq: Any, yq: Any = None) -> Scores:
    """g_q · gᵢ / (‖g_q‖ ‖gᵢ‖): positive if small steps on row i and on the query agree; 0 where a gradient is 0.

    Cost: two sweeps of a forward and a backward pass; no n × p numbers.

    Args:
        influence: whose model and training rows.
        Xq: the queries' inputs.
        yq: the queries' targets.

    References: Charpiat et al. (2019).
    """
    system = influence.system
    queries = system.queries((Xq, yq))
    objective = system.objective

    def block(G: Tensor) -> NDArray[np.float64]:
        directions = torch.nn.functional.normalize(G, dim=1, eps=1e-300)

        def cosines(batch: Any, _: Tensor) -> Tensor:
            lengths = layers.squares(objective, batch).cpu().sqrt()[:, None]
            along = layers.dots(objective, batch, directions).double().cpu()
            return torch.where(lengths > 0, along / lengths, torch.zeros_like(along))

        return system.sweep.emit(cosines, vectors=_width(system, len(G)), label="gradient cosines").T

    return _scores(system, queries, _in_blocks(system, queries, block), "cosine of gradients")


def relative_influence(influence: Explained, Xq: Any, yq: Any = None) -> Scores:
    """The θ-relative influence: `on_loss` over the length by which the row's removal moves θ.

        values[q, i] = g_qᵀ (C + λI)⁻¹ gᵢ / ‖(C + λI)⁻¹ gᵢ‖

    Positive if the row helps; rows that move everything, outliers, no longer lead every list. The unit is change of the
    query's loss per length of parameters moved; a row that moves nothing gets 0.

    Cost: `on_loss`, and one linear system per training row, a batch at a time: p² flops each with a factorised solver,
    a whole solve each with CG.

    Args:
        influence: whose model, training rows, curvature and solver.
        Xq: the queries' inputs.
        yq: the queries' targets.

    References: Barshan, Brunet and Dziugaite (2020), θ-RelatIF.
    """
    system = influence.system.for_many(influence.system.n)

    def lengths(G: Tensor) -> Tensor:
        return solved(system.prepared, G, repr(system.solver)).x.norm(dim=1)

    return _relative(system, Xq, yq, lengths, "influence over the length of the row's move of θ")


def loss_relative_influence(influence: Explained, Xq: Any, yq: Any = None) -> Scores:
    """The ℓ-relative influence: `on_loss` over the size of the row's removal in the curvature's own norm.

        values[q, i] = g_qᵀ (C + λI)⁻¹ gᵢ / √(gᵢᵀ (C + λI)⁻¹ gᵢ)

    Positive if the row helps. If C is the Fisher matrix the root is the change of the model's own predictions, so that
    rows count by what they do to the query rather than to everything; a row that moves nothing gets 0.

    Cost: `on_loss` and `of_self`: quadratic forms with a factorised solver, one linear system per row otherwise.

    Args:
        influence: whose model, training rows, curvature and solver.
        Xq: the queries' inputs.
        yq: the queries' targets.

    >>> import numpy as np, upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.array([[-2.0], [-1.0], [1.0], [2.0], [9.0]]), np.array([-2.0, -1.0, 1.0, 2.0, 3.0])
    >>> influence = uw.explain(Ridge().fit(X, y), X, y)
    >>> influence.on_loss([[2.0]], [2.0]).values.round(3)
    array([[-0.508, -0.219,  0.382,  0.695, -0.347]])
    >>> uw.baselines.loss_relative_influence(influence, [[2.0]], [2.0]).values.round(2)
    array([[-1.27, -1.46,  1.8 ,  1.86, -0.97]])

    References: Barshan, Brunet and Dziugaite (2020), ℓ-RelatIF.
    """
    system = influence.system.for_many(influence.system.n)

    def sizes(G: Tensor) -> Tensor:
        prepared = system.prepared
        if isinstance(prepared, Quadratic):
            return prepared.forms(G).clamp(min=0).sqrt()
        return (solved(prepared, G, repr(system.solver)).x * G).sum(1).clamp(min=0).sqrt()

    return _relative(system, Xq, yq, sizes, "influence over the size of the row's move in the curvature's norm")


def training_loss(influence: Explained, Xq: Any, yq: Any = None) -> Scores:
    """−L(zᵢ), the same for every query: rows that the model fits badly are said to harm all.

    Cost: one forward pass over the rows.

    Args:
        influence: whose model and training rows.
        Xq: the queries' inputs; only their number counts.
        yq: the queries' targets.
    """
    system = influence.system
    queries = system.queries((Xq, yq))
    losses = per_row.measures(system.sweep)
    return _scores(system, queries, np.tile(-losses, (len(queries), 1)), "training loss of the row, negative")


def nearest_neighbours(
    influence: Explained, Xq: Any, yq: Any = None, *, embed: Callable[[Any], Tensor] | None = None
) -> Scores:
    """± 1 / (1 + d²/d̄²), with d the distance of query and row and d̄² the query's mean d² over the rows.

    Positive if the row has the query's label, negative if it has another: near rows of the same label are said to help
    most, near rows of another to harm most. Where targets are no labels (not all whole numbers, or none at all) every
    row counts as of the same label.

    Cost: one pass over the rows, and a forward pass of `embed`.

    Args:
        influence: whose training rows; the model itself is not used.
        Xq: the queries' inputs.
        yq: the queries' targets.
        embed: from a batch of inputs, as `influence` was given them, to a (b, …) tensor, such as the layers before the
            last: `embed=model[:-1]`. None takes the inputs themselves, flattened.

    Raises:
        InvalidInput: if `embed` returns no tensor with one line per input.
    """
    system = influence.system
    queries = system.queries((Xq, yq))
    asked, labels = _parts(queries.batch(slice(None)))
    E = _embedded(asked, embed)
    centre = E.mean(0)  # distances do not change, and large offsets cancel no digits
    E = E - centre
    sweep = system.sweep
    _, probed = _parts(system.examples.batch(system.examples.spread(_PROBE_ROWS)))
    labelled = labels is not None and probed is not None and bool((probed == probed.round()).all())

    def squares_and_signs(batch: Any, _: Tensor) -> Tensor:
        x, y = _parts(batch)
        F = _embedded(x, embed) - centre
        squares = ((F**2).sum(1)[:, None] + (E**2).sum(1) - 2 * F @ E.T).clamp(min=0)
        same = torch.ones_like(squares)
        if labelled and y is not None and labels is not None:
            equal = (y.flatten(1)[:, None] if y.ndim > 1 else y[:, None, None]) == labels.reshape(1, len(labels), -1)
            same = torch.where(equal.all(-1), 1.0, -1.0)
        return torch.stack([squares, same.double()], 1)

    found = sweep.emit(squares_and_signs, vectors=1 + len(E) // 8, label="neighbours").transpose(1, 2, 0)
    squares, signs = found
    mean = squares.mean(1, keepdims=True)
    values = signs / (1 + squares / np.where(mean > 0, mean, 1))
    where = "inputs" if embed is None else "embeddings"
    return _scores(system, queries, values, f"nearness of {where}, negative for another label")


def bm25(influence: Explained, Xq: Any, yq: Any = None, *, k1: float = 1.2, b: float = 0.75) -> Scores:
    """Okapi BM25 between the tokens of a query and of a row: what a search engine would find.

    Σ_t idf_t · f(k1 + 1)/(f + k1(1 − b + b |row|/mean |row|)) over the query's tokens t, f how often the row holds t,
    and idf_t = ln(1 + (n − n_t + ½)/(n_t + ½)), n_t how many rows hold it.

    Cost: one pass over the rows.

    Args:
        influence: whose training rows; the model itself is not used.
        Xq: the queries: rows of named parts with `input_ids`, or whole numbers, (q, length).
        yq: the queries' targets.
        k1: how soon more of the same token says no more.
        b: how far long rows are held to be long by chance, 0 … 1.

    Raises:
        InvalidInput: if inputs are no tokens, or k1 or b lie outside of their range.

    >>> import upweight as uw
    >>> rows = torch.tensor([[1, 2, 3], [1, 4, 5], [1, 2, 2]])  # three texts of three tokens
    >>> objective = uw.Objective(lambda theta, example: (theta - example[1]) ** 2, torch.tensor(0.0))
    >>> influence = uw.Influence(objective, (rows, torch.zeros(3)))
    >>> bm25(influence, rows[:1], torch.zeros(1)).values.round(2)  # token 1 is in every text and tells little
    array([[1.58, 0.13, 0.78]])

    References: Robertson and Zaragoza (2009).
    """
    if not (k1 >= 0 and 0 <= b <= 1):
        message = f"k1={k1}, b={b}. Pass k1 ≥ 0 and b from 0 to 1, such as bm25(influence, Xq, k1=1.2, b=0.75)."
        raise InvalidInput(message)
    system = influence.system
    queries = system.queries((Xq, yq))
    every = [_tokens(system.examples), _tokens(queries)]
    size = 1 + max(int(tokens.max()) for part in every for tokens in part if len(tokens))
    rows, asked = (_counts(part, size) for part in every)
    holding = np.bincount(rows.indices, minlength=size)
    idf = np.log1p((system.n - holding + 0.5) / (holding + 0.5))
    lengths = np.asarray(rows.sum(1)).ravel()
    shares = k1 * (1 - b + b * lengths / max(float(lengths.mean()), 1e-300))
    found = rows.tocoo()
    found.data = found.data * (k1 + 1) / (found.data + shares[found.row])
    values = (asked @ scipy.sparse.diags_array(idf) @ found.T).toarray()
    return _scores(system, queries, values, "BM25 of tokens")


def random(influence: Explained, Xq: Any, yq: Any = None, *, seed: int = 0) -> Scores:
    """Independent standard normal numbers: what any score must beat.

    Args:
        influence: whose training rows.
        Xq: the queries' inputs; only their number counts.
        yq: the queries' targets.
        seed: of the numbers.
    """
    system = influence.system
    queries = system.queries((Xq, yq))
    draw = np.random.default_rng(checked_count(seed, "seed", least=0))
    return _scores(system, queries, draw.standard_normal((len(queries), system.n)), f"random numbers, seed {seed}")


def dots(system: System, queries: Examples) -> Float[NDArray[np.float64], "q n"]:
    """wᵢ g_q · gᵢ for every query and training row, without curvature.  Cost: one sweep."""
    objective = system.objective

    def block(G: Tensor) -> NDArray[np.float64]:
        def products(batch: Any, weights: Tensor) -> Tensor:
            return layers.dots(objective, batch, G).double().cpu() * weights[:, None]

        return system.sweep.emit(products, vectors=_width(system, len(G)), label="gradient products").T

    return _in_blocks(system, queries, block)


def _width(system: System, vectors: int) -> int:
    return layers.vectors(system.objective, system.sweep.example_bytes, vectors)


def _in_blocks(
    system: System, queries: Examples, block: Callable[[Tensor], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """What `block` makes of the queries' gradients, so many at a time that they fit."""
    size = max(1, _BLOCK_NUMBERS // system.objective.size)
    sweep = system.sweep
    return np.concatenate(
        [block(per_row.gradients(sweep.over(sweep.objective, part))) for part in queries.blocks(size)]
    )


def _relative(system: System, Xq: Any, yq: Any, size: Callable[[Tensor], Tensor], what: str) -> Scores:
    """`on_loss` divided by wᵢ/n times the size of each row's gradient."""
    scores = removal.on_loss(system, Xq, yq)
    return system.ask(lambda: _divided(system, scores, size, what))


def _divided(system: System, scores: Scores, size: Callable[[Tensor], Tensor], what: str) -> Scores:
    objective, share = system.objective, system.penalty_share
    with system.by_itself():
        moves = system.sweep.emit(
            lambda batch, weights: size(layers.gradients(objective, batch).double().cpu() + share) * weights,
            vectors=per_row.width(system.sweep),
            label="sizes of the rows",
        )
    factor = np.divide(system.n, moves, out=np.zeros_like(moves), where=moves > 0)
    error = None if scores.standard_error is None else scores.standard_error * factor
    return replace(
        scores, values=scores.values * factor, counterfactual=f"none: {what}", scale=None, standard_error=error
    )


def _scores(system: System, queries: Examples, values: NDArray[np.float64], what: str) -> Scores:
    return Scores(
        values,
        f"none: {what}",
        np.arange(system.n),
        system.n,
        Certificate.unsolved(len(queries), system.objective.coverage, what),
        measure=system.objective.measure,
        query_values=per_row.measures(system.sweep.over(system.objective, queries)),
        **naming(system.examples.names, queries.names),
    )


def _tokens(examples: Examples) -> list[NDArray[np.int64]]:
    """The tokens of each example, padding left out.

    Raises:
        InvalidInput: if inputs are no tokens.
    """
    found: list[NDArray[np.int64]] = []
    for row in range(len(examples)):
        batch = examples.batch([row])
        x = batch[0] if isinstance(batch, tuple | list) else batch
        tokens = x.get(TOKENS) if isinstance(x, dict) else x
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            message = (
                f"Row {row} is {kind}, and BM25 compares tokens. Pass rows of named parts with input_ids, or whole "
                "numbers; for other inputs use nearest_neighbours(influence, Xq, yq)."
            )
            raise InvalidInput(message)
        kept = x[MASK] > 0 if isinstance(x, dict) and MASK in x else torch.ones_like(tokens, dtype=torch.bool)
        found.append(tokens[kept].reshape(-1).numpy())
    return found


def _counts(tokens: list[NDArray[np.int64]], size: int) -> scipy.sparse.csr_array:
    """How often each example holds each token."""
    line = np.repeat(np.arange(len(tokens)), [len(part) for part in tokens])
    column = np.concatenate(tokens)
    counts = scipy.sparse.coo_array((np.ones(len(column)), (line, column)), shape=(len(tokens), size)).tocsr()
    counts.sum_duplicates()
    return counts


def _parts(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and targets of a batch; None if it has no targets."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1].double()
    return batch, None


def _embedded(x: Any, embed: Callable[[Any], Tensor] | None) -> Float[Tensor, "b e"]:
    """One float64 line per input.

    Raises:
        InvalidInput: if `embed` fails, or returns something else.
    """
    if embed is None:
        dense = [torch.from_numpy(leaf.toarray()) if scipy.sparse.issparse(leaf) else leaf for leaf in leaves(x)]
        return torch.cat([leaf.detach().cpu().double().reshape(len(leaf), -1) for leaf in dense], 1)
    size = batch_length(x)
    try:
        with torch.no_grad():
            found: Any = embed(x)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        failure = (
            f"embed failed on a batch of {size} inputs ({type(error).__name__}: {first_line(error)}). It is called "
            "with a batch of inputs as they were given; cast them inside, as in embed=lambda x: model[:-1](x.float())."
        )
        raise InvalidInput(failure) from error
    if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != size:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        message = (
            f"embed returned {shape} for a batch of {size} inputs. It must return one line per input; pass a function "
            "such as embed=model[:-1]."
        )
        raise InvalidInput(message)
    return found.detach().cpu().double().reshape(size, -1)
