"""Whether a run's numbers can be trusted, in one sentence, from its certificate."""

from __future__ import annotations

from typing import Any

import numpy as np

from upweight.explore.explorer import Explorer

_SOLVED = 1e-3  # a residual above this moves the third digit
_DRIFTS = 0.1  # of a query's loss, if training went on


def health(explorer: Explorer) -> dict[str, Any]:
    """`good`, and `sentence`: what stands against the numbers, or that nothing does."""
    certificate, outline = explorer.certificate, explorer.run.outline
    against = []
    residual = float(np.nanmax(certificate.residual)) if len(certificate.residual) else float("nan")
    if not certificate.converged or residual > _SOLVED:
        against.append(f"some linear systems were not solved (residual up to {residual:.1g})")
    lowest = certificate.min_curvature + certificate.damping
    if lowest <= 0:
        against.append(f"the curvature is not positive (its smallest value with damping is {lowest:.2g})")
    drift = np.abs(certificate.drift)
    losses = None if outline.query_values is None else np.abs(outline.query_values)
    if losses is not None and np.isfinite(drift).any():
        share = float(np.nanmedian(drift / np.maximum(losses, 1e-12)))
        if share > _DRIFTS:
            against.append(
                f"the model is not at a minimum: trained on, a typical query's {explorer.measure} would move by "
                f"{share:.0%} whatever row is removed"
            )
    if certificate.truncation > _DRIFTS:
        against.append(f"a recursion was stopped early (bias up to {certificate.truncation:.0%})")
    if not certificate.solver:
        against.append("no linear system was solved: these are not influence functions")
    if against:
        return {"good": False, "sentence": "Read with care: " + "; ".join(against) + "."}
    held = (
        "" if certificate.coverage > 0.999 else f", for the {certificate.coverage:.1%} of parameters that are explained"
    )
    return {
        "good": True,
        "sentence": (
            f"Sound: the model is at a minimum (‖∇R‖ = {certificate.gradient_norm:.1g}), the curvature is positive, "
            f"and every linear system is solved to a residual of {residual:.1g}{held}."
        ),
    }
