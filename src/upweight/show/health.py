"""Whether a run's numbers can be trusted, in one sentence, from its certificate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from upweight.influence.certificate import Certificate

SOLVED = 1e-3  # a residual above this moves the third digit
DRIFTS = 0.1  # of a query's loss, if training went on


def health(
    certificate: Certificate, query_values: NDArray[np.float64] | None = None, measure: str = "loss"
) -> tuple[bool, str]:
    """Whether nothing stands against the numbers, and a sentence that says so or what does.

    Args:
        certificate: of all queries.
        query_values: (q,) their measure now, beside which a drift is large or small; None if unknown.
        measure: what is measured, in words.
    """
    known = certificate.residual[np.isfinite(certificate.residual)]
    residual = float(known.max()) if known.size else float("nan")
    against = []
    if not certificate.solver:
        against.append("no linear system was solved: these are not influence functions")
    if not certificate.converged or residual > SOLVED:
        against.append(f"some linear systems were not solved (residual up to {residual:.1g})")
    lowest = certificate.min_curvature + certificate.damping
    if lowest <= 0:
        against.append(f"the curvature is not positive (its smallest value with damping is {lowest:.2g})")
    drift = np.abs(certificate.drift)
    if query_values is not None and np.isfinite(drift).any():
        share = float(np.nanmedian(drift / np.maximum(np.abs(query_values), 1e-12)))
        if share > DRIFTS:
            against.append(
                f"the model is not at a minimum: trained on, a typical query's {measure} would move by {share:.0%} "
                "whatever row is removed"
            )
    if certificate.truncation > DRIFTS:
        against.append(f"a recursion was stopped early (bias up to {certificate.truncation:.0%})")
    if against:
        return False, f"Read with care: {'; '.join(against)}."
    part = "" if certificate.coverage > 0.999 else f", for the {certificate.coverage:.1%} of parameters explained"
    return True, (
        f"Sound: the model is at a minimum (‖∇R‖ = {certificate.gradient_norm:.1g}), the curvature is positive, and "
        f"every linear system is solved to a residual of {residual:.1g}{part}."
    )
