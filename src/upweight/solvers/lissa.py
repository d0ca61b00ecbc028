"""LiSSA: stochastic estimation of (C + λI)⁻¹ v from minibatches of curvature, with its own standard error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.special
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import Diverged, InvalidInput, UnsupportedModel, checked_count
from upweight.model import penalties
from upweight.operators.base import Operator, Sampled
from upweight.runs import ranks
from upweight.runs.stopping import asked, stop_here
from upweight.solvers import pacing
from upweight.solvers.base import Solution, checked_damping, checked_sides, residuals
from upweight.solvers.lanczos import rounded_up

_PROBED_BATCHES = 8
_POWER_STEPS = 15
_MARGIN = 1.5
_SETTLED = 0.05
_REPEATS_THAT_TELL = 5


@dataclass(frozen=True)
class LiSSA:
    """The recursion x ← x + (v − (C_b + λI) x) / s over random minibatches b, from x = v/s.

    Its fixed point is (C + λI)⁻¹ v: λ means λ here, and the scale s never multiplies it. (Written as in the paper, with
    h = s·x, it is h ← v + (I − (C_b + λI)/s) h.) The recursion settles when s exceeds the largest curvature of every
    minibatch, not only of their mean; that is how the default is chosen: exactly for single rows of a linear predictor,
    else 1.5 times the largest found on sampled minibatches. Stopping after `depth` steps leaves a relative bias of at
    most (1 − λmin/s)^depth, which the standard error does not contain.
    Cost: repeats × depth minibatch products, shared by all queries, and one or two sweeps.

    Args:
        depth: steps of one recursion (the paper's t).
        repeats: independent recursions that are averaged (the paper's r); their spread gives the standard error.
        batch_size: rows drawn, uniformly and with replacement, for each step.
        scale: s; None chooses it as described.
        seed: of the draws.

    Raises:
        InvalidInput: if a count is below one, or the scale is not positive.

    References: Agarwal, Bullins and Hazan (2016); paper, section 3.
    """

    depth: int = 1000
    repeats: int = 10
    batch_size: int = 32
    scale: float | int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "repeats", "batch_size"):
            checked_count(getattr(self, name), name)
        checked_count(self.seed, "seed", least=0)
        if self.scale is not None and (not isinstance(self.scale, int | float) or not self.scale > 0):
            message = f"scale={self.scale}. It must exceed the largest curvature of a minibatch; None chooses it."
            raise InvalidInput(message)

    def prepare(self, operator: Operator, damping: float = 0.0) -> Recursion:
        """The recursion with its scale chosen.

        Raises:
            UnsupportedModel: if the operator is not a mean over rows.
        """
        if not isinstance(operator, Sampled):
            message = (
                f"LiSSA draws minibatches of curvature, and {type(operator).__name__} has none. Use Hessian(), "
                "GaussNewton() or EmpiricalFisher(); or Cholesky() for a matrix."
            )
            raise UnsupportedModel(message)
        damping = checked_damping(damping)
        return Recursion(self, operator, damping, self.scale or _scale(self, operator) + damping)


@dataclass(frozen=True)
class Recursion:
    """(C + λI)⁻¹ by averaged stochastic recursions of scale s."""

    spec: LiSSA
    operator: Sampled
    damping: float
    scale: float | int

    def solve(
        self, V: Float[Tensor, "k p"], *, state: Mapping[str, Tensor] | None = None, keep: pacing.Keep | None = None
    ) -> Solution:
        """x with (C + λI) x ≈ v for every row v, and the independent estimates that it averages.

        Args:
            V: right-hand sides.
            state: what `keep` was given of the same V: to the same bits it goes on from there, for the draws are those
                of the seed.
            keep: is given the finished estimates, where the next one has come to, and its steps, every half a minute
                and at the end.

        Raises:
            Diverged: if an estimate grows faster than a valid scale allows.
        """
        V = self.operator.project(checked_sides(V))
        streams = np.random.SeedSequence(self.spec.seed).spawn(self.spec.repeats)
        kept = _Keeping(keep, list(state["replicas"]) if state else [])
        x, taken = (state["x"], int(state["step"])) if state else (None, 0)
        for stream in streams[len(kept.replicas) :]:
            kept.replicas.append(self._recursion(V, stream, kept, x, taken))
            x, taken = None, 0
        kept.whole(V)
        replicas = torch.stack(kept.replicas)
        x = replicas.mean(0)
        missing = V - self._apply(replicas.flatten(0, 1)).reshape(replicas.shape)  # (r, k, p)
        residual = residuals(self.operator, self.damping, x, V)
        truncation = self._truncation()
        settled = truncation <= _SETTLED or self._only_noise(missing)
        steps = self.spec.depth * self.spec.repeats * self.spec.batch_size
        return Solution(
            x,
            residual,
            settled,
            sweeps=-(-steps // self.operator.sweep.n) + 2,
            replicas=replicas,
            truncation=truncation,
        )

    def _only_noise(self, missing: Tensor) -> bool:
        """Whether the mean residual (r, k, p) of every coordinate is within its own spread.

        What is within it is noise, which more repeats shrink; what is beyond it is bias, which only depth shrinks. The
        bound is Student's t at a false alarm rate of 1 % over all coordinates; fewer than five repeats cannot tell.
        """
        repeats = len(missing)
        if repeats < _REPEATS_THAT_TELL:
            return False
        noise = (missing.std(0) / repeats**0.5).clamp(min=1e-300)
        bound = scipy.special.stdtrit(repeats - 1, 1 - 0.005 / noise.numel())  # scipy.stats takes a second to import
        return bool((missing.mean(0).abs() <= bound * noise + 1e-12 * missing.abs().max()).all())

    def _recursion(
        self, V: Tensor, stream: np.random.SeedSequence, kept: _Keeping, x: Tensor | None, taken: int
    ) -> Tensor:
        """One estimate, from x after the first steps, if they were taken before."""
        draw = np.random.default_rng(stream)
        n = self.operator.sweep.n
        for _ in range(taken):
            draw.integers(n, size=self.spec.batch_size)
        x = V / self.scale if x is None else x
        size = V.norm(dim=1).clamp(min=1e-300)
        for step in range(taken + 1, self.spec.depth + 1):
            rows = draw.integers(n, size=self.spec.batch_size)
            x = x + (V - self.operator.project(self.operator.apply_rows(x, rows)) - self.damping * x) / self.scale
            if step % 50 == 0 or step == self.spec.depth:
                # with 0 ≤ C_b + λ ≤ 2s every step adds at most ‖v‖/s
                growth = float((x.norm(dim=1) / size).nan_to_num(nan=torch.inf).max()) * self.scale
                if growth > 2 * (step + 1):
                    raise self._divergence(x, V, step, growth / self.scale)
            kept.look(x, step)
        return x

    def _divergence(self, x: Tensor, V: Tensor, step: int, growth: float) -> Diverged:
        partial = Solution(x, torch.full((len(V),), torch.nan, dtype=torch.float64), False)
        enough = rounded_up(max(4 * self.scale, _scale(self.spec, self.operator) + self.damping))
        message = (
            f"LiSSA diverged: after {step} steps an estimate is {growth:.2g} times as long as its right-hand side "
            f"(scale {self.scale:g}, damping {self.damping:g}). "
            f"A minibatch of {self.spec.batch_size} has more curvature than the scale, or negative curvature. "
            f"Try scale={enough:g}, a larger batch_size, or solver=CG(); against negative curvature "
            "curvature=GaussNewton() or a larger damping."
        )
        return Diverged(message, partial)

    def _apply(self, X: Tensor) -> Tensor:
        return self.operator.project(self.operator.apply(X)) + self.damping * X

    def _truncation(self) -> float:
        """(1 − μ/s)^depth, μ the best lower bound of C + λI that is known: damping + the smallest penalty strength."""
        floor = self.damping + float(penalties.diagonal(self.operator.sweep.objective).min())
        return float(max(0.0, 1 - floor / self.scale) ** self.spec.depth)


class _Keeping:
    """The estimates that are finished, and when what is there was kept last."""

    def __init__(self, keep: pacing.Keep | None, replicas: list[Tensor]) -> None:
        self.keep, self.replicas = keep, replicas
        self._since, self._written = time.monotonic(), len(replicas)

    def look(self, x: Tensor, step: int) -> None:
        """Keep all if it is time.

        Raises:
            Stopped: if a signal has asked for it; several ranks go on, for all must stop alike.
        """
        stopping = asked() and not ranks.several()
        if self.keep is None or not (stopping or time.monotonic() - self._since >= pacing.SECONDS):
            return
        self._keep(self.keep, x, step)
        if stopping:
            stop_here(f"{step} steps of estimate {len(self.replicas) + 1}")

    def whole(self, V: Tensor) -> None:
        """All estimates are there; what was kept so is left."""
        if self.keep is not None and self._written < len(self.replicas):
            self._keep(self.keep, torch.zeros_like(V), 0)

    def _keep(self, keep: pacing.Keep, x: Tensor, step: int) -> None:
        replicas = torch.stack(self.replicas) if self.replicas else x.new_zeros(0, *x.shape)
        keep({"replicas": replicas, "x": x, "step": torch.tensor(step)})
        self._since, self._written = time.monotonic(), len(self.replicas)


def _scale(spec: LiSSA, operator: Sampled) -> float:
    """A bound of the minibatches' largest curvature: exact over single rows if known and tight, else sampled."""
    rigorous = operator.largest_row_curvature()
    if spec.batch_size == 1 and rigorous is not None:
        return rigorous
    draw = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(7,)))
    largest = 0.0
    for _ in range(_PROBED_BATCHES):
        rows = draw.integers(operator.sweep.n, size=spec.batch_size)
        vector = torch.from_numpy(draw.standard_normal((1, operator.size)))
        for _ in range(_POWER_STEPS):
            image = operator.apply_rows(vector, rows)
            size = float(image.norm())
            if size == 0:
                break
            vector = image / size
        largest = max(largest, size)
    sampled = max(_MARGIN * largest, 1e-12)
    return sampled if rigorous is None else min(sampled, rigorous)
