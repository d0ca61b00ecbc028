"""What was run, whether it can be trusted, and how its numbers are spread."""

from __future__ import annotations

from typing import Any

from upweight.explore.explorer import Explorer
from upweight.explore.page import Asked, Page


def overview(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """The first page."""
    work = explorer.run.manifest["fingerprint"]
    outline, certificate = explorer.run.outline, explorer.certificate
    return {
        "health": explorer.health,
        "certificate": str(certificate),
        "run": {
            "folder": str(explorer.run.path),
            "model": str(work.get("objective", "")),
            "measure": explorer.measure,
            "counterfactual": outline.counterfactual,
            "curvature": certificate.curvature,
            "solver": certificate.solver,
            "damping": certificate.damping,
            "versions": str(work.get("versions", "")),
            "rows": explorer.n,
            "queries": explorer.q,
        },
        "rows": dict(explorer.facts["rows"]),
        "queries": dict(explorer.facts["queries"]),
        "classes": explorer.classes,
        "events": explorer.run.last_events(8),
    }


PAGE = Page("overview", "/", overview, "Overview")
