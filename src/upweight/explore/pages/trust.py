"""How far the numbers can be trusted: the certificate, and predictions beside what trainings really gave."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.explore.explorer import Explorer
from upweight.explore.leading import spread
from upweight.explore.page import Asked, Page
from upweight.show.evidence import Dampings, Removals, SubsetSums, evidence

_DOTS = 600


def trust(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """What speaks for the numbers, and against them."""
    certificate, known = explorer.certificate, evidence(explorer.run)
    return {
        "health": explorer.health,
        "measure": explorer.measure,
        "folder": str(explorer.run.path),
        "n": explorer.n,
        "certificate": {
            "curvature": certificate.curvature,
            "solver": certificate.solver,
            "damping": certificate.damping,
            "converged": certificate.converged,
            "gradient_norm": certificate.gradient_norm,
            "min_curvature": certificate.min_curvature,
            "coverage": certificate.coverage,
            "products": certificate.sweeps,
            "residual": float(np.nanmax(certificate.residual)),
            "drift": None if np.isnan(certificate.drift).all() else float(np.nanmax(np.abs(certificate.drift))),
            "models": len(certificate.members) or 1,
        },
        "removals": None if known.removals is None else removals(known.removals),
        "subsets": None if known.subsets is None else subsets(known.subsets),
        "dampings": None if known.dampings is None else dampings(known.dampings, certificate.damping),
    }


def removals(found: Removals) -> dict[str, Any]:
    """Predicted against actual changes of every query without each row."""
    both = np.isfinite(found.predicted) & np.isfinite(found.actual)
    predicted, actual = found.predicted[both], found.actual[both]
    queries, places = np.nonzero(both)
    few = (
        np.unique(np.linspace(0, len(predicted) - 1, min(_DOTS, len(predicted))).astype(int)) if predicted.size else []
    )
    rows = found.rows[places]
    dots = [
        {
            "x": float(predicted[one]),
            "y": float(actual[one]),
            "row": int(rows[one]),
            "query": int(queries[one]),
            "kind": "helps" if actual[one] > 0 else "harms",
            "title": f"query {queries[one]} without row {rows[one]}",
        }
        for one in few
    ]
    slope, intercept = line_through(predicted, actual)
    errors = found.standard_error
    return {
        "rows": len(found.rows),
        "pairs": len(predicted),
        "lost": int((~both).sum()),
        "pearson": correlation(predicted, actual),
        "spearman": correlation(ranks(predicted), ranks(actual)),
        "slope": slope,
        "intercept": intercept,
        "control": float(np.nanmax(np.abs(found.control))),
        "standard_error": None if errors is None else float(np.sqrt(np.nanmean(errors**2))),
        "residuals": spread(actual - predicted),
        "worst": float(np.abs(actual - predicted).max(initial=0.0)),
        "dots": dots,
    }


def subsets(found: SubsetSums) -> dict[str, Any]:
    """The linear datamodeling score: the rank correlation over subsets, mean over queries."""
    pairs = zip(found.predicted, found.actual, strict=True)
    known = np.array([correlation(ranks(one), ranks(other)) or 0.0 for one, other in pairs])  # as in `lds`
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else None
    return {
        "subsets": found.actual.shape[1],
        "queries": len(known),
        "lds": float(known.mean()) if len(known) else None,
        "standard_error": error,
        "each": spread(known),
    }


def dampings(found: Dampings, own: float) -> list[dict[str, Any]]:
    """A line for each damping."""
    return [
        {
            "damping": float(damping),
            "own": bool(np.isclose(damping, own, rtol=1e-6, atol=0)),
            "residual": float(found.residual[place]),
            "size": float(found.size[place]),
            "correlation": float(found.correlation_with_next[place]),
        }
        for place, damping in enumerate(found.dampings)
    ]


def line_through(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Slope and intercept of the least squares of y on x; None where x has no spread."""
    if len(x) < 2 or np.ptp(x) == 0:
        return None, None
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Pearson's r; None where one has no spread."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


PAGE = Page("trust", "/trust", trust, "Trust")
