"""torch-influence: AutogradInfluenceModule and CGInfluenceModule; the penalty is its damping."""

import torch
from torch.utils.data import DataLoader
from torch_influence import AutogradInfluenceModule, BaseObjective, CGInfluenceModule


class Loss(BaseObjective):
    def __init__(self, criterion):
        self.criterion = criterion

    def train_outputs(self, model, batch):
        return model(batch[0])

    def train_loss_on_outputs(self, outputs, batch):
        return self.criterion(outputs, batch[1])

    def train_regularization(self, params):
        return 0.0

    def test_loss(self, model, params, batch):
        return self.criterion(model(batch[0]), batch[1])


def scores(work, Module, **settings):
    module = Module(
        model=work.module(),
        objective=Loss(work.criterion()),
        train_loader=DataLoader(work.rows, batch_size=len(work.rows)),
        test_loader=DataLoader(work.queries, batch_size=len(work.queries)),
        device=torch.device("cpu"),
        damp=work.λ,
        **settings,
    )
    rows = list(range(len(work.rows)))
    return torch.stack([module.influences(rows, [query]) for query in range(len(work.queries))])


METHODS = {
    "autograd": lambda work: scores(work, AutogradInfluenceModule),
    "CG": lambda work: scores(work, CGInfluenceModule),
}
