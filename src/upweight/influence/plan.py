"""What a question will cost, said before it is asked: `Influence.plan`.

Every step of `on_loss` is taken for real on a few rows (`rehearsal`) and extrapolated to all of them:

    seconds(n) = a + b n      from two numbers of rows; for Dual, which works through pairs of rows, a + b n²
    memory(n)  = what few rows took + what every further row keeps

What is too large to try, a factorisation of more than 500 parameters, comes from `defaults.costs` and the rate of a
factorisation on this machine. How many products an iteration needs is known only when it has ended: what few rows
needed is a forecast, and is called one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from upweight.data import markup
from upweight.influence import defaults
from upweight.influence.rehearsal import (
    CURVATURE,
    DAMPING,
    GRADIENTS,
    MATRIX,
    MOST,
    SCORES,
    SOLVER,
    STEPS,
    SYSTEMS,
    Rehearsal,
    Rehearsed,
    has_operator,
    is_tried,
    rehearse,
)
from upweight.influence.removal import block
from upweight.influence.system import System
from upweight.model.chunks import CHUNK
from upweight.operators import EKFAC, KFAC, DenseOperator, eliminated
from upweight.operators.layered import LayeredGaussNewton, kept_bytes
from upweight.operators.linear import LinearHessian
from upweight.runs import machine
from upweight.runs.machine import in_bytes
from upweight.runs.meter import Meter
from upweight.runs.progress import LONG, in_words
from upweight.solvers import CG, Cholesky, Dual, LiSSA

_RANGE = 2.0  # by which a forecast of products may be wrong, either way
_MUCH = 0.5  # of the memory that is free
_TRIED = 1000  # parameters of the matrix whose factorisation tells the rate
_EACH_BLOCK = (GRADIENTS, SYSTEMS, SCORES)
_Sampling = KFAC | EKFAC
_FLOPS = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3), ("FLOP", 1.0))
_HEAD = ("step", "time", "passes", "flops", "memory")


@dataclass(frozen=True)
class Step:
    """A part of the work.

    Args:
        name: what it does.
        seconds: on the wall, on this machine as it was during the rehearsal.
        processor_seconds: of all threads.
        passes: how often the training rows are read.
        flops: floating-point operations.
        memory: bytes at most while it runs, with what earlier steps keep, beside data and model.
    """

    name: str
    seconds: float
    processor_seconds: float
    passes: float
    flops: float
    memory: float


@dataclass(frozen=True)
class Plan:
    """What `on_loss` of some queries will cost. `str(plan)` is a table.

    Args:
        n: training rows.
        p: parameters that are differentiated.
        coverage: the share of the model's parameters that they are.
        queries: how many.
        blocks: parts in which the queries are solved and scored, one after the other.
        curvature: in words.
        solver: in words.
        batch_size: examples a batch, None where it is fitted to the memory.
        steps: what is done, in order; what was prepared by earlier questions is left out.
        disk: bytes that `store=` keeps of scores; `leading` keeps less.
        products: how many times an iteration applies C, None where nothing iterates.
        forecast: whether that is extrapolated from fewer, made on a few rows.
        rehearsed: training rows that were tried.
        advice: what to lower, if it is much.
    """

    n: int
    p: int
    coverage: float
    queries: int
    blocks: int
    curvature: str
    solver: str
    batch_size: int | None
    steps: tuple[Step, ...] = field(repr=False)
    disk: float
    products: float | None
    forecast: bool
    rehearsed: int
    advice: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """On the wall, all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def processor_seconds(self) -> float:
        """Of all threads, all steps."""
        return sum(step.processor_seconds for step in self.steps)

    @property
    def seconds_between(self) -> tuple[float, float]:
        """The same, with half and twice as many products as were forecast."""
        if not self.forecast:
            return self.seconds, self.seconds
        iterated = sum(step.seconds for step in self.steps if step.name == SYSTEMS)
        rest = self.seconds - iterated
        return rest + iterated / _RANGE, rest + iterated * _RANGE

    @property
    def passes(self) -> float:
        """How often the training rows are read."""
        return sum(step.passes for step in self.steps)

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return sum(step.flops for step in self.steps)

    @property
    def memory(self) -> float:
        """Bytes at most, beside data and model; NaN where the system does not tell what a process holds."""
        return max((step.memory for step in self.steps), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        names = ("seconds", "processor_seconds", "seconds_between", "passes", "flops", "memory")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        cells = [_HEAD, *(_cells(step) for step in self.steps), self._total]
        widths = [max(len(line[k]) for line in cells) for k in range(len(_HEAD))]
        table = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in cells
        ]
        return "\n".join([*(f"{name:<21}{value}" for name, value in self._words), "", *table, *self._behind])

    @property
    def _words(self) -> list[tuple[str, str]]:
        blocks = "" if self.blocks == 1 else f", in {self.blocks:,} blocks"
        words = [
            ("rows", f"{self.n:,}"),
            ("parameters", f"{self.p:,} ({self.coverage:.1%} of the model)"),
            ("queries", f"{self.queries:,}{blocks}"),
            ("curvature", self.curvature),
            ("solver", self.solver),
        ]
        if self.products is not None:
            made = f"; a forecast from {self.rehearsed:,} rows, known when it has ended" if self.forecast else ""
            words.append(("products with C", f"about {self.products:.0f}{made}"))
        return words

    @property
    def _total(self) -> tuple[str, ...]:
        low, high = self.seconds_between
        time = in_words(self.seconds) if not self.forecast else f"{in_words(low)} to {in_words(high)}"
        return ("all", time, f"{self.passes:.1f}", _flops(self.flops), in_bytes(self.memory))

    @property
    def _behind(self) -> list[str]:
        kept = f"{'on disk':<21}{in_bytes(self.disk)} with store="
        return ["", kept, *(f"{'to lower' if not k else '':<21}{line}" for k, line in enumerate(self.advice))]

    def _repr_html_(self) -> str:
        steps = [[markup.text(cell) for cell in cells] for cells in (*map(_cells, self.steps), self._total)]
        facts = markup.facts("What on_loss of these queries will cost", self._words)
        return facts + markup.frame(markup.table("", _HEAD, steps), *map(markup.remark, filter(None, self._behind)))


def plan_of(system: System, Xq: Any, yq: Any = None) -> Plan:
    """What the scores of these queries will cost: `Influence.plan`."""
    queries = system.encoded(Xq, yq)
    if system.objective.linear is not None:
        system = system.planned_for(len(queries))
    n, p, count = system.n, system.objective.size, len(queries)
    size = block(system, count)
    tried = rehearse(system, next(iter(queries.blocks(size))))
    iterated = tried.iterated
    plan = Plan(
        n=n,
        p=p,
        coverage=system.objective.coverage,
        queries=count,
        blocks=-(-count // size),
        curvature=repr(system.curvature),
        solver=repr(system.solver),
        batch_size=system.sweep.batch_size,
        steps=_Extrapolation(system, tried, count, size).steps(),
        disk=8.0 * (n + p) * count + 16.0 * (n + p),
        products=None if iterated is None else iterated.needed * count / size,
        forecast=iterated is not None and (iterated.rows < n or iterated.needed > iterated.made),
        rehearsed=max((step.rows for step in tried.large.values()), default=0),
    )
    return replace(plan, advice=tuple(_advice(system, plan)))


@dataclass(frozen=True)
class _Extrapolation:
    """From the rehearsed steps of `size` queries to all rows and queries."""

    system: System
    tried: Rehearsal
    queries: int
    size: int

    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        found = {name: self._step(name) for name in self.tried.large}
        if not is_tried(self.system):
            found |= {step.name: step for step in self._untried()}
        return tuple(found[name] for name in STEPS if name in found)

    def _step(self, name: str) -> Step:
        few, more = self.tried.small[name], self.tried.large[name]
        often = self.queries / self.size if name in _EACH_BLOCK else 1.0
        depends = more.visits > 0 or self._on_kept_rows(name)

        def all_rows(read: Callable[[Rehearsed], float], times: tuple[float, float] = more.times) -> float:
            if not depends:
                return often * times[0] * read(more)
            return often * self._grown(name, (few.rows, read(few)), (more.rows, read(more)), times)

        together = isinstance(self.system.solver, LiSSA)  # its repeats are read for at once
        busy = all_rows(lambda one: one.taken.processor_seconds)
        return Step(
            name=name,
            seconds=busy * self._wall,
            processor_seconds=busy,
            passes=all_rows(lambda one: one.visits, (more.times[0], 1.0) if together else more.times) / self.system.n,
            flops=often * self._flops(name, more.times),
            memory=self._memory(name, few, more),
        )

    def _on_kept_rows(self, name: str) -> bool:
        """Whether a step works on every row without reading it: on activations that are kept."""
        return isinstance(self.system.__dict__.get("operator"), LayeredGaussNewton) and name != GRADIENTS

    @property
    def _wall(self) -> float:
        """Seconds on the wall for a second of the processors."""
        taken = [step.taken for step in self.tried.large.values()]
        return sum(one.seconds for one in taken) / max(1e-9, sum(one.processor_seconds for one in taken))

    def _grown(self, name: str, few: tuple[int, float], more: tuple[int, float], times: tuple[float, float]) -> float:
        """a + b n, or a + b n² where every pair of rows meets; neither part is negative."""
        power = 2 if self._by_pairs(name) else 1
        (r, small), (s, large) = ((rows**power, value) for rows, value in (few, more))
        if r == s:
            return max(times) * large * self.system.n / more[0]
        slope = min(max(large - small, 0.0) / (s - r), large / s)
        return times[0] * (large - slope * s) + times[1] * slope * self.system.n**power

    def _by_pairs(self, name: str) -> bool:
        return isinstance(self.system.solver, Dual) and name in (SOLVER, SCORES)

    def _flops(self, name: str, times: tuple[float, float]) -> float:
        """What torch counts; of linear predictors, which other libraries multiply too, what `defaults` counts."""
        structure, examples = self.system.objective.linear, self.system.examples
        if structure is None:
            few, more = ((one[name].rows, one[name].flops) for one in self.tried.counted)
            return self._grown(name, few, more, times)
        if name == SOLVER:
            return self._cost.flops
        iterated = self.tried.iterated
        made = {SYSTEMS: 1.0 if iterated is None else 2.0 * iterated.needed, SCORES: 1.0, DAMPING: 2.0}.get(name, 0.0)
        vectors = defaults.TRACE_VECTORS if name == DAMPING else self.size
        return made * vectors * 2.0 * defaults.entries_of(structure, examples) * structure.n_outputs

    def _memory(self, name: str, few: Rehearsed, more: Rehearsed) -> float:
        """What a few rows took, a batch of as many as fit, and what all further rows keep."""
        n, kept = self.system.n, self._kept(name)
        if self._by_pairs(name):  # the matrix, and products of all rows with those of a batch
            each = 8.0 * self.system.objective.linear.n_outputs**2  # type: ignore[union-attr]
            batch = max(1.0, min(n, CHUNK) / more.rows)
            rest = max(more.taken.peak - each * more.rows**2, 0.0) * batch * n / more.rows
            return each * n**2 + rest + 8.0 * self.queries * n
        each = max(0.0, (more.taken.peak - few.taken.peak) / max(1, more.rows - few.rows) - kept)
        longest = CHUNK if self.system.objective.linear is None or name == SCORES else MOST
        batch = min(each * max(0, min(n, longest) - more.rows), self.system.sweep.memory)
        return more.taken.peak + batch + kept * (n - more.rows)

    def _kept(self, name: str) -> float:
        """Bytes that every row keeps when a step has run: of its derivatives or activations, of products, of scores."""
        system, structure = self.system, self.system.objective.linear
        total = 0.0 if has_operator(system) else self._kept_by_the_curvature
        if structure is not None and STEPS.index(name) >= STEPS.index(SYSTEMS):
            known = type(system.operator) is LinearHessian and isinstance(system.solver, CG)
            total += self._kept_by_products / system.n if known else 0.0
        return total + (8.0 * self.queries if name == SCORES else 0.0)

    @property
    def _kept_by_products(self) -> float:
        """Bytes: what a linear predictor's products keep of all rows, and what CG copies of sparse ones."""
        operator: LinearHessian = self.system.operator  # type: ignore[assignment]
        copied = eliminated.kept_bytes(operator, self.system.known_damping or 0.0, self.size)
        return float(operator.kept_bytes(self.size) + copied)

    @property
    def _kept_by_the_curvature(self) -> float:
        structure, operator = self.system.objective.linear, self.system.__dict__.get("operator")
        if structure is not None:
            return 8.0 * structure.n_outputs * (2 if structure.loss.coupling is None else 3)
        if isinstance(operator, LayeredGaussNewton):
            objective, first = operator.sweep.objective, operator.sweep.examples.batch([0])
            return float(kept_bytes(objective, first, 1) or 0)
        return 0.0

    @cached_property
    def _cost(self) -> defaults.Cost:
        system = self.system
        return defaults.cost(system.solver, system.objective, system.examples, system.curvature, systems=self.queries)

    def _untried(self) -> Iterator[Step]:
        """A factorisation that is too large to try, and its substitutions, at the rate of a smaller one."""
        p = self._cost.order or self.system.objective.size
        tried = min(p, _TRIED)
        small = DenseOperator(torch.eye(tried, dtype=torch.float64) + 1e-3)
        _, taken = Meter().lap(lambda: Cholesky().prepare(small))
        share, substitutions = taken.processor_seconds / (tried**3 / 3), 4.0 * p**2 * self.queries
        memory = self._cost.memory
        matrix = self.tried.large.get(MATRIX)
        if "prepared" not in self.system.__dict__:
            flops = self._cost.flops - substitutions / 2 if matrix is None else p**3 / 3
            passes = 1.0 if matrix is None else 0.0
            held = memory if matrix is None else max(matrix.taken.peak, memory)
            yield Step(SOLVER, flops * share * self._wall, flops * share, passes, flops, held)
        busy = substitutions * share
        yield Step(SYSTEMS, busy * self._wall, busy, 0.0, substitutions, memory if self._cost.order else 8.0 * p**2)


def _advice(system: System, plan: Plan) -> Iterator[str]:
    """What to lower, where it takes longer than a minute or more than half of the memory that is free."""
    long, free = plan.seconds_between[1] > LONG, machine.available_bytes()
    slowest = max(plan.steps, key=lambda step: step.seconds, default=None)
    largest = max(plan.steps, key=lambda step: step.memory, default=None)
    if long and slowest is not None:
        yield from _faster(system, slowest)
    if largest is not None and plan.memory > _MUCH * free:
        yield from _smaller(system, plan, largest)


def _faster(system: System, slowest: Step) -> Iterator[str]:
    """What to type against the step that takes longest."""
    network = system.objective.linear is None
    if slowest.name == SYSTEMS and isinstance(system.solver, CG):
        yield "solver=CG(settled=0.01) stops when the values have settled, long before the residual is small"
        if network and system.objective.outputs is not None:
            yield "curvature=EKFAC() needs two passes and no iteration"
    elif slowest.name == SYSTEMS and isinstance(system.solver, LiSSA):
        yield "fewer steps: LiSSA(depth=…, repeats=…); CG() where products are cheap"
    elif slowest.name in (MATRIX, SOLVER) and isinstance(system.solver, Cholesky):
        yield "solver=CG() needs no matrix"
    elif slowest.name == CURVATURE and isinstance(system.curvature, _Sampling) and system.curvature.samples is None:
        yield f"curvature={type(system.curvature).__name__}(samples=1): one random output gradient an example, not all"
    elif slowest.name == SCORES and not network:
        yield "fewer queries"


def _smaller(system: System, plan: Plan, largest: Step) -> Iterator[str]:
    """What to type against the step that takes most memory."""
    if 8.0 * plan.n * plan.queries > largest.memory / 2:
        size = max(1, int(machine.available_bytes() * _MUCH / (32.0 * plan.n)))
        yield f"on_loss_in_blocks(…, size={size}): the scores of so many queries at a time"
    elif largest.name in (MATRIX, SOLVER) and isinstance(system.solver, Cholesky | Dual):
        yield "solver=CG() needs no matrix"
    elif system.objective.linear is None:
        yield "a smaller batch_size, or memory_budget='4 GB'"


def _cells(step: Step) -> tuple[str, ...]:
    passes = f"{step.passes:.1f}" if step.passes else "-"
    return (step.name, in_words(step.seconds), passes, _flops(step.flops), in_bytes(step.memory))


def _flops(flops: float) -> str:
    """950 MFLOP, 1.2 GFLOP, 3 TFLOP; a dash for none."""
    name, unit = next((pair for pair in _FLOPS if flops >= pair[1]), _FLOPS[-1])
    return f"{flops / unit:.3g} {name}" if flops else "-"
