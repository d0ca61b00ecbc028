"""dattri: IFAttributorExplicit, IFAttributorCG and IFAttributorEKFAC on one batch of all rows, as its docs advise."""

import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC, IFAttributorExplicit
from dattri.task import AttributionTask
from torch.utils.data import DataLoader


def scores(work, Attributor, **settings):
    model, criterion = work.module(), work.criterion()

    def loss(params, data):
        return criterion(torch.func.functional_call(model, params, data[0]), data[1])

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = Attributor(task=task, **settings)
    rows = DataLoader(work.rows, batch_size=len(work.rows))
    attributor.cache(rows)
    return attributor.attribute(rows, DataLoader(work.queries, batch_size=len(work.queries))).T.detach()


METHODS = {
    "explicit": lambda work: scores(work, IFAttributorExplicit, regularization=work.λ),
    "CG": lambda work: scores(work, IFAttributorCG, regularization=work.λ),
    "EK-FAC": lambda work: scores(work, IFAttributorEKFAC, damping=work.λ),
}
