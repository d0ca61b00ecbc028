"""upweight: its defaults; EKFAC in place of them; and the exact system until values settle."""

import torch  # noqa: F401  (upweight itself imports it when first used)

import upweight as uw


def scores(work, **settings):
    X, y, Xq, yq = work.tensors
    settings |= {"penalty": work.l2 or None, "penalty_per_example": False, "damping": work.λ - work.l2}
    if work.kind == "tokens":
        rows, queries = ([{"input_ids": row.tolist()} for row in part] for part in (X, Xq))
        return uw.explain(work.module().language_model, rows, **settings).on_loss(queries).values
    return uw.explain(work.module(), X, y, loss=work.criterion(), **settings).on_loss(Xq, yq).values


METHODS = {
    "default": scores,
    "EKFAC": lambda work: scores(work, curvature=uw.operators.EKFAC()),
    "CG until settled": lambda work: scores(
        work, curvature=uw.operators.GaussNewton(), solver=uw.solvers.CG(settled=0.05)
    ),
}
