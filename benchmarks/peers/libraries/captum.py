"""captum: TracInCP at the one checkpoint there is, and ArnoldiInfluenceFunction with its defaults."""

import torch
from captum.influence import TracInCP
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from torch import nn
from torch.nn import functional as F


def loss(kind):
    if kind == "tokens":
        return lambda out, ids: F.cross_entropy(out[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    kinds = {"numbers": nn.MSELoss, "two classes": nn.BCEWithLogitsLoss, "classes": nn.CrossEntropyLoss}
    return kinds[kind](reduction="none")


def load(model, path):
    model.load_state_dict(torch.load(path))
    return 1.0


def tracin(work):
    model = work.module()
    torch.save(model.state_dict(), "checkpoint.pt")
    explainer = TracInCP(model, work.rows, ["checkpoint.pt"], load, loss_fn=loss(work.kind), batch_size=len(work.rows))
    return explainer.influence(tuple(work.tensors[2:]))


def arnoldi(work):
    model = work.module()
    torch.save(model.state_dict(), "checkpoint.pt")
    explainer = ArnoldiInfluenceFunction(
        model, work.rows, "checkpoint.pt", load, loss_fn=loss(work.kind), batch_size=len(work.rows), seed=0
    )
    return explainer.influence(tuple(work.tensors[2:]))


METHODS = {"TracInCP": tracin, "Arnoldi": arnoldi}
