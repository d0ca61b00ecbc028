"""Curvature as Kronecker products, one per layer: KFAC, and EKFAC with its eigenvalues corrected.

For one layer with inputs a (a 1 behind them for the bias) and output gradients d at t positions, an example's gradient
is G = Σ_t d aᵀ, and the block of the Gauss–Newton matrix is (1/n) Σᵢ wᵢ E[vec G vec Gᵀ], the expectation over output
gradients u whose second moment is ∂²ℓ/∂f². KFAC takes inputs and output gradients, and different positions, as
independent ("expand" in Eschenhagen et al.):

    C ≈ B ⊗ A        A = Σᵢ wᵢ Σ_t a aᵀ / Σᵢ wᵢ t        B = (1/n) Σᵢ wᵢ Σ_t E[d dᵀ]

EKFAC keeps the eigenvectors of A and B and measures the curvature along each pair of them, positions together:

    Λ = (1/n) Σᵢ wᵢ E[(Q_Bᵀ G Q_A)²]

so that its diagonal in that basis is the block's own. Positions that the loss does not reach, such as padding, are left
out of both sums over t. Parameters of different layers are taken as uncorrelated.
References: Martens and Grosse (2015); George et al. (2018); Grosse et al. (2023); Eschenhagen et al. (2023).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel, checked_count
from upweight.model import penalties
from upweight.model.layers.convolution import Seen
from upweight.model.layers.pieces import Direct, rows
from upweight.model.objective import L2, Objective
from upweight.model.sweep import Sweep
from upweight.operators.ahead import ROOM, Ahead
from upweight.operators.base import Curvature
from upweight.operators.basis import Basis
from upweight.operators.blocks import layers_of
from upweight.operators.cotangents import Exact, Observed, Signs, Source, of_each
from upweight.operators.cut import cut
from upweight.operators.factors import DENSE, Layer, Whole
from upweight.operators.held import Held, kept_bytes, needed, rounds, shared_out, summed_bytes
from upweight.operators.implicit import EmpiricalFisher, GaussNewton
from upweight.operators.uses import Uses
from upweight.runs import ranks
from upweight.runs.machine import in_bytes

_MUCH = 0.1  # of the parameters: what may be left on a mere diagonal without a word


@dataclass(frozen=True)
class _Factors:
    """What KFAC and EKFAC are told."""

    of: Curvature = field(default_factory=GaussNewton)
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.of, GaussNewton | EmpiricalFisher):
            message = (
                f"{name}(of={self.of!r}). Kronecker factors are known for means of outer products of gradients only: "
                "pass of=GaussNewton() or of=EmpiricalFisher()."
            )
            raise InvalidInput(message)
        if self.samples is None:
            return
        checked_count(self.samples, "samples", hint="None takes the expectation exactly")
        if isinstance(self.of, EmpiricalFisher):
            message = (
                f"{name}(of=EmpiricalFisher(), samples={self.samples}). The empirical Fisher uses the observed "
                "targets, so nothing is drawn. Leave samples out, or take of=GaussNewton()."
            )
            raise InvalidInput(message)

    def cut(self, sweep: Sweep) -> Sweep:
        """The same work with outputs in which the loss bends, if their second derivative is what is taken."""
        return sweep if isinstance(self.of, EmpiricalFisher) else cut(sweep)

    def source(self, stream: int = 0) -> Source:
        """Whose second moment in the outputs is taken; every stream draws others."""
        if isinstance(self.of, EmpiricalFisher):
            return Observed()
        return Exact() if self.samples is None else Signs(self.samples, self.seed, stream)


@dataclass(frozen=True)
class KFAC(_Factors):
    """Kronecker factors of the Gauss–Newton matrix, one pair per layer: C ≈ B ⊗ A on each, and ∇²r.

    With A = Σᵢ wᵢ Σ_t a aᵀ / Σᵢ wᵢ t of the inputs a, and B = (1/n) Σᵢ wᵢ Σ_t E[d dᵀ] of the output gradients d. Exact
    for one linear layer whose loss curves equally at every example (least squares). Convolutions have a pair per group;
    a table that is looked up has token frequencies for A; parameters without structure keep their own block up to 512,
    and its diagonal beyond. An L2 penalty is exact where it is the same for a whole layer, else its diagonal in the
    layer's eigenbasis is taken.

    Cost: one sweep of a forward pass and as many backward passes as `samples` (or outputs), and i³ + o³ per layer.
    References: Martens and Grosse (2015), equation 1; for positions Eschenhagen et al. (2023), "expand".

    Args:
        of: what is approximated: GaussNewton(), or EmpiricalFisher() for gradients at the observed targets.
        samples: random output gradients per example, unbiased; None takes the expectation exactly, by one output
            gradient for every output of the model (at most 1,000).
        seed: of the draws.

    Raises:
        InvalidInput: if `of` is another curvature, or samples no whole number ≥ 1.

    >>> import upweight as uw
    >>> model = torch.nn.Linear(2, 1).double()
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> inf = uw.explain(model, X, X[:, :1], loss=torch.nn.functional.mse_loss, curvature=KFAC())
    >>> exact = uw.explain(model, X, X[:, :1], loss=torch.nn.functional.mse_loss, curvature=GaussNewton())
    >>> inf.operator.matrix().allclose(exact.operator.matrix())
    True
    """

    def bind(self, sweep: Sweep) -> Kronecker:
        """The operator of this objective on these examples.

        Raises:
            UnsupportedModel: if the objective does not know its outputs, has too many for an exact expectation, or is
                not convex in them; or its penalty is not separable.
        """
        return _factored(self.cut(sweep), self.source())


@dataclass(frozen=True)
class EKFAC(_Factors):
    """KFAC's eigenvectors with the curvature measured along each: Λ = (1/n) Σᵢ wᵢ E[(Q_Bᵀ Gᵢ Q_A)²].

    The best diagonal in that basis: its error in Frobenius norm is never larger than KFAC's. Exact where KFAC is, and
    its diagonal in the eigenbasis is that of the layer's true block, positions included.

    Cost: KFAC's, and a second sweep like the first, which shares its forward passes for as many rows as 2 GB of
    activations and output gradients allow.
    References: George et al. (2018); Grosse et al. (2023), section 2.2.

    Args:
        of: what is approximated: GaussNewton(), or EmpiricalFisher() for gradients at the observed targets.
        samples: random output gradients per example and sweep, unbiased; None takes the expectation exactly, by one
            output gradient for every output of the model (at most 1,000).
        seed: of the draws; the two sweeps draw different ones.

    Raises:
        InvalidInput: if `of` is another curvature, or samples no whole number ≥ 1.

    >>> EKFAC(samples=1)
    EKFAC(of=GaussNewton(), samples=1, seed=0)
    """

    def bind(self, sweep: Sweep) -> Kronecker:
        """The operator of this objective on these examples.

        Raises:
            UnsupportedModel: if the objective does not know its outputs, has too many for an exact expectation, or is
                not convex in them; or its penalty is not separable.
        """
        ahead = Ahead(self.source(stream=1))
        return _corrected(_factored(self.cut(sweep), self.source(), ahead), ahead)


class Kronecker:
    """A block-diagonal curvature whose blocks have eigenvectors Q_B ⊗ Q_A.

    Of several ranks each holds the eigenvectors of its own blocks and multiplies by them; all get the result, so that
    products, like sweeps, are made on all ranks alike.

    Cost: f(C) v takes 4·p·(i + o) flops per vector, no sweep. Memory: 32·p bytes, and 8·(i² + o²) per layer.

    Args:
        sweep: the objective and the rows it averages over.
        uses: how the objective uses its parameters.
        layers: the blocks, in the order of their bases.
        held: their eigenvectors and eigenvalues.

    >>> import upweight as uw
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> model = torch.nn.Linear(2, 1).double()
    >>> operator = uw.explain(model, X, X[:, :1], loss=torch.nn.functional.mse_loss, curvature=KFAC()).operator
    >>> operator.size, len(operator.layers), operator.eigenvalues.numpy().round(2)
    (3, 1, array([0.04, 1.39, 5.23]))
    >>> V = torch.eye(3, dtype=torch.float64)
    >>> operator.map(torch.reciprocal, operator.apply(V)).allclose(V)  # C⁻¹Cv
    True
    """

    def __init__(self, sweep: Sweep, uses: Uses, blocks: Sequence[Layer], held: Held) -> None:
        self.sweep = sweep
        self.uses = uses
        self.layers = tuple(blocks)
        self.held = held
        self._parts: dict[tuple[Any, ...], tuple[Basis, Tensor, Tensor]] = {}

    @staticmethod
    def blocks_of(sweep: Sweep) -> tuple[Uses, list[Layer], Int[Tensor, " rest"]]:
        """How the objective uses its parameters, the blocks that these uses make, and the places that none reaches."""
        uses = Uses.of(sweep)
        sizes = {name: block.numel() for name, block in sweep.objective.blocks.items()}
        blocks, rest = layers_of(uses.first, sizes)
        return uses, blocks, rest

    @property
    def bases(self) -> tuple[Basis, ...]:
        """Eigenvectors and eigenvalues of all blocks, where they are all in this process."""
        return self.held.bases()

    @property
    def size(self) -> int:
        """p."""
        return self.sweep.objective.size

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " p"]:
        """The eigenvalues, ascending."""
        return self.held.eigenvalues().sort().values

    def apply(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C v for every row v."""
        return self.map(lambda eigenvalues: eigenvalues, V)

    def map(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(C) v for every row v, with f applied to the eigenvalues; of several ranks all come here alike."""
        return self.held.mapped(function, V)

    def matrix(self) -> Float[Tensor, "p p"]:
        """C as a dense float64 matrix."""
        full = self.apply(torch.eye(self.size, dtype=torch.float64))
        return (full + full.T) / 2

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without the objective's gauge directions."""
        return self.sweep.objective.project(V)

    def pieces(self, batch: Any) -> list[Seen]:
        """The gradients of the loss of every example of a batch, in the form that `weigh` reads.

        Raises:
            UnsupportedModel: if they are made in another way than those of the training rows.
        """
        return self.uses.pieces(self.sweep.objective, batch)

    def rounds(self) -> list[range]:
        """The blocks, as many at a time as a rank has room for beside its own: all at once in one process."""
        within = len(self.layers)
        found = self.held.rounds(self.sweep, self.sweep.objective.reference.element_size())
        return [range(one.start, min(one.stop, within)) for one in found if one.start < within]

    @contextmanager
    def here(self, numbers: Sequence[int] | None = None, reference: Tensor | None = None) -> Iterator[None]:
        """Inside, some blocks, or all, are on every rank, as they were made or as a tensor is kept."""
        wanted = range(len(self.held.at)) if numbers is None else numbers
        with self.held.brought(wanted, torch.empty(0, dtype=torch.float64) if reference is None else reference):
            yield

    def weigh(self, pieces: Sequence[Seen], function: Callable[[Tensor], Tensor]) -> Float[Tensor, " b"]:
        """gᵀ f(C) g for the gradient g of every example, summed over m cotangents where pieces have several.

        `pieces` are those of `layers.capture`. Cost: for layers with one position 2·(i² + o² + i·o) flops per example
        and b·(i + o) numbers, no matrices; with t positions 2·t·i·o more, and the matrices of a few examples.
        """
        return in_order(self.weigh_blocks(pieces, function, range(len(self.layers))))

    def weigh_blocks(
        self, pieces: Sequence[Seen], function: Callable[[Tensor], Tensor], numbers: Sequence[int]
    ) -> Float[Tensor, "b blocks"]:
        """What some blocks, which are here, add to that."""
        reference = _reference(pieces)
        parts = [
            self.layers[number].weighed(pieces, function(basis.eigenvalues).to(reference), moved).double().cpu()
            for number, basis, moved in zip(
                numbers, self.held.bases(numbers), self.held.like(reference, numbers), strict=True
            )
        ]
        return torch.stack(parts, 1)

    def coordinates(self, batch: Any, chosen: Sequence[Tensor]) -> Float[Tensor, "b k"]:
        """The loss's gradient of every example along some eigenvectors, without writing the gradients out.

        Args:
            batch: b examples.
            chosen: for every basis the flat numbers in its (g, o, i) of the eigenvectors, in ascending order.
        """
        found = self.uses.found(self.sweep.objective, batch)
        pieces = self.uses.aligned(found)
        if pieces is None:  # gradients made in another way than those of the training rows
            return self._written(found, chosen)
        reference = _reference(pieces)
        parts = []
        for layer, basis, at in zip(self.layers, self.bases, chosen, strict=False):
            if len(at):
                smaller, places = self._chosen(basis, at, reference)
                parts.append(torch.cat([block[:, places] for block in layer.rotated(pieces, smaller)]))
        return torch.cat(parts, 1)

    def _written(self, pieces: Sequence[Seen], chosen: Sequence[Tensor]) -> Float[Tensor, "b k"]:
        """The coordinates of gradients that are written out."""
        sizes = {name: block.numel() for name, block in self.sweep.objective.blocks.items()}
        G = rows(pieces, sizes)[:, 0]
        parts = []
        for basis, at in zip(self.held.like(G), chosen, strict=False):
            if len(at):
                parts.append(basis.rotated(G[:, basis.at.to(G.device)]).flatten(1)[:, at.to(G.device)])
        return torch.cat(parts, 1)

    def _chosen(self, basis: Basis, at: Tensor, reference: Tensor) -> tuple[Basis, Tensor]:
        """The part of a basis that these eigenvectors need, kept for the next batch."""
        key = (basis.name, at.data_ptr(), reference.dtype, reference.device)
        if key not in self._parts:
            smaller, places = basis.only(at)
            self._parts[key] = (smaller.like(reference), places.to(reference.device), at)  # at stays, and so its place
        return self._parts[key][:2]


def in_order(columns: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """The sum of columns, added from the first to the last."""
    total = columns[:, 0].clone()
    for column in columns.T[1:]:
        total += column
    return total


# ---- inner steps -----------------------------------------------------------------------------------------------------


Read = tuple[str, Callable[..., list[Tensor]]]  # a layer's name, and what it reads from (pieces, weights)


def _factored(sweep: Sweep, source: Source, ahead: Ahead | None = None) -> Kronecker:
    """KFAC: the factors in one sweep, and their eigenvectors, each on the rank whose they are."""
    objective = sweep.objective
    uses, blocks, rest = Kronecker.blocks_of(sweep)
    among = ranks.sharing()
    _refuse_larger(blocks, sweep, among)
    _warn_of_diagonals(blocks, objective.size)
    at = [layer.at for layer in blocks] + ([rest[None, None]] if len(rest) else [])
    sizes = [*(kept_bytes(layer) for layer in blocks), *(24 * len(rest) for _ in at[len(blocks) :])]
    owners = shared_out(sizes, among) if among > 1 else None
    strengths = _penalty_diagonal(objective)
    if ahead is not None:
        room = (ROOM if sweep.budget is None else min(ROOM, sweep.budget // 4 * 3)) - needed(blocks, sweep, 1)
        ahead.make_room(uses.first, source.count(objective, sweep.examples.batch([0])), room)
    own: dict[int, Basis] = {}
    for numbers in rounds([summed_bytes(layer) for layer in blocks], sweep) if owners else [range(len(blocks))]:
        some = blocks[numbers.start : numbers.stop]
        read: list[Read] = [(layer.name, layer.sums) for layer in some]
        first = None if numbers.start else ahead
        factors = _swept(sweep, uses, source, lambda _, read=read: read, "Kronecker factors", owners, numbers, first)
        for number, sums in zip(numbers, factors, strict=True):
            if sums is not None:
                own[number] = blocks[number].basis(sums, sweep.n, strengths)
    if len(rest) and (owners is None or owners[-1] == ranks.own_rank()):  # parameters that the loss does not use
        nothing = torch.zeros(at[-1].shape, dtype=torch.float64)
        own[len(blocks)] = Basis("unused", at[-1], None, None, nothing, strengths[at[-1]])
    return Kronecker(sweep, uses, blocks, Held.of(own, at, owners))


def _refuse_larger(blocks: Sequence[Layer], sweep: Sweep, among: int) -> None:
    """Raises for factors that exceed a budget of bytes.

    Raises:
        InvalidInput: if they do.
    """
    size, budget, taken = sweep.objective.size, sweep.budget, needed(blocks, sweep, among)
    if budget is None or taken <= budget:
        return
    widest = max((*block.at.shape, block.name) for block in blocks)
    rank = budget // (32 * size)
    shared, more = ("", "") if among == 1 else (f" on one of {among} ranks", "more ranks, or ")
    instead = f"curvature=operators.Nystroem({min(rank, 100)}), or " if rank else ""
    message = (
        f"The Kronecker factors of {size:,} parameters take {in_bytes(taken)}{shared} while they are made (widest: "
        f"{widest[-1]}), and memory_budget is {in_bytes(budget)}. "
        f"Use {instead}{more}memory_budget={in_bytes(1.1 * taken)!r}."
    )
    raise InvalidInput(message)


def _warn_of_diagonals(blocks: Sequence[Layer], size: int) -> None:
    """A TheoryWarning where much of the model has no structure and is too large for a block of its own."""
    bare = [layer for layer in blocks if isinstance(layer, Whole) and layer.at.numel() > DENSE]
    count = sum(layer.at.numel() for layer in bare)
    if count > _MUCH * size:
        message = (
            f"{count:,} of {size:,} parameters ({', '.join(layer.name for layer in bare[:3])}"
            f"{' …' if len(bare) > 3 else ''}) act in no layer that has Kronecker factors, so only the diagonal of "
            "their curvature is kept (compiled functions, weights with unlike uses). Use GaussNewton() with CG(), or "
            "Nystroem(rank)."
        )
        warnings.warn(message, TheoryWarning, stacklevel=6)


def _corrected(operator: Kronecker, ahead: Ahead) -> Kronecker:
    """EKFAC: the same eigenvectors, with the curvature along each pair measured in a second sweep."""
    values: dict[int, Tensor] = {}
    for some in operator.rounds():
        numbers = [number for number in some if not isinstance(operator.layers[number], Whole)]
        if not numbers:
            continue

        def reading(pieces: Sequence[Seen], numbers: list[int] = numbers) -> list[Read]:
            bases = operator.held.like(_reference(pieces), numbers)
            return [
                (operator.layers[number].name, partial(operator.layers[number].squares, basis=basis))
                for number, basis in zip(numbers, bases, strict=True)
            ]

        with operator.here(numbers, operator.sweep.objective.reference):
            known = (operator.sweep, operator.uses, ahead.source, reading, "Kronecker eigenvalues")
            totals = _swept(*known, operator.held.owners, numbers, taken=ahead)
        for number, total in zip(numbers, totals, strict=True):
            if total is not None:
                values[number] = total[0] / operator.sweep.n
    return Kronecker(operator.sweep, operator.uses, operator.layers, operator.held.with_values(values))


def _swept(
    sweep: Sweep,
    uses: Uses,
    source: Source,
    reading: Callable[[Sequence[Seen]], list[Read]],
    label: str,
    owners: Sequence[int] | None,
    numbers: Sequence[int],
    ahead: Ahead | None = None,
    taken: Ahead | None = None,
) -> list[list[Tensor] | None]:
    """For some layers the sums over all rows of what each reads from the pieces of a batch, in one sweep.

    Of several ranks each gets those of its own layers. On its way it keeps what a sweep `ahead` will ask for, or takes
    what one before it kept.
    """

    def made(batch: Any, numbers: Any) -> list[Seen]:
        kept = None if taken is None else taken.take(numbers)
        if kept is not None:
            return kept
        sources = [source] if ahead is None else ahead.sources(source, numbers)
        every = uses.several(sweep.objective, batch, of_each(sources, sweep.objective, batch, numbers))
        if ahead is not None:
            ahead.keep(every[-1], numbers)
        return every[0]

    def read(batch: Any, weights: Tensor, numbers: Any) -> list[list[Tensor]]:
        pieces = made(batch, numbers)
        found = [(name, read(pieces, weights.to(_reference(pieces)))) for name, read in reading(pieces)]
        if not bool(torch.stack([torch.isfinite(part).all() for _, parts in found for part in parts]).all()):
            raise _not_finite(label, found)
        return [parts for _, parts in found]

    probe = sweep.examples.batch([0])
    bytes_each = 8 * sweep.objective.size if uses.plan is None else uses.plan.bytes
    vectors = source.count(sweep.objective, probe) * max(1, math.ceil(2 * bytes_each / sweep.example_bytes))
    whose = [0 if owners is None else owners[number] for number in numbers]
    name = f"{label.replace(' ', '-')}-{source.name}"
    return sweep.fold_parts(read, whose, vectors=vectors, label=label, kept=name)


def _not_finite(label: str, found: list[tuple[str, list[Tensor]]]) -> InvalidInput:
    bad = [(name, int((~torch.isfinite(part)).sum()), part.numel()) for name, parts in found for part in parts]
    name, count, size = next(entry for entry in bad if entry[1])
    message = (
        f"{label}: {count:,} of {size:,} numbers of layer '{name}' are NaN or infinite. Usual reasons: weights that "
        "diverged in training, or gradients that overflow the model's precision when they are squared. Look at that "
        "layer's weights and inputs, or evaluate in float64: Objective.from_module(..., dtype=torch.float64)."
    )
    return InvalidInput(message)


def _reference(pieces: Sequence[Seen]) -> Tensor:
    """A tensor in the precision and on the device of the pieces."""
    first = pieces[0]
    return first.values if isinstance(first, Direct) else first.slopes


def _penalty_diagonal(objective: Objective) -> Float[Tensor, " p"]:
    """The diagonal of ∇²r, which must be all of it.

    Raises:
        UnsupportedModel: if the penalty couples parameters.
    """
    if objective.penalty is None or isinstance(objective.penalty, L2):
        return penalties.diagonal(objective)
    draw = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (2, objective.size), generator=draw, dtype=torch.float64) - 1
    first, second = penalties.hvp(objective, signs)
    diagonal = first * signs[0]
    rtol = 1e-8 if objective.reference.dtype == torch.float64 else 1e-4
    if torch.allclose(diagonal * signs[1], second, rtol=rtol, atol=rtol * float(diagonal.abs().max())):
        return diagonal
    message = (
        f"The penalty of {objective.name} couples parameters: its second derivative is off a diagonal by "
        f"{float((diagonal * signs[1] - second).abs().max()):.3g}, and Kronecker blocks hold a penalty of every "
        "parameter by itself only. Use a float, L2(...), or GaussNewton() with an iterative solver."
    )
    raise UnsupportedModel(message)
