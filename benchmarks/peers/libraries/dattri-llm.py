"""dattri-llm: EKFACAttributor and TracInAttributor on the fly, losses summed over all rows in one batch."""

import torch
from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, TracInAttributor
from torch.utils.data import Dataset


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "y": self.y[row]}


def scores(work, Attributor, **settings):
    X, y, Xq, yq = work.tensors
    criterion = work.criterion()

    def summed(model, batch):
        return criterion(model(batch["x"]), batch["y"]) * len(batch["x"])

    task = AttributionTask(loss_func=summed, model=work.module())
    sizes = {"per_device_train_batch_size": len(X), "per_device_eval_batch_size": len(Xq)}
    attributor = Attributor(AttributionArguments(output_dir="scores", **sizes), task=task)
    ids, matrix = attributor.attribute(Rows(X, y), Rows(Xq, yq), **settings).agnostic_matrix()
    if len(ids) < len(X):
        print(f"{len(ids)} rows of scores for {len(X)} rows of data: equal rows have one")
    return torch.as_tensor(matrix).T.float()


METHODS = {
    "EK-FAC": lambda work: scores(work, EKFACAttributor, damping=work.λ),
    "gradient dot": lambda work: scores(work, TracInAttributor),
}
