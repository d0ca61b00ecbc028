"""kronfluence: EK-FAC factors and pairwise scores, sums over a batch as its docs ask for, whole batches."""

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn import functional as F


class Sums(Task):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def compute_train_loss(self, batch, model, sample=False):
        outputs, y = model(batch[0]), batch[1]
        if self.kind == "numbers":
            y = torch.normal(outputs.detach(), 0.5**0.5) if sample else y
            return F.mse_loss(outputs, y, reduction="sum")
        if self.kind == "two classes":
            y = torch.bernoulli(outputs.detach().sigmoid()) if sample else y
            return F.binary_cross_entropy_with_logits(outputs, y, reduction="sum")
        if self.kind == "tokens":
            outputs, y = outputs[:, :-1].flatten(0, 1), y[:, 1:].flatten()
        y = torch.multinomial(outputs.detach().softmax(-1), 1)[:, 0] if sample else y
        return F.cross_entropy(outputs, y, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def scores(work, damping):
    torch.manual_seed(0)
    task = Sums(work.kind)
    analyzer = Analyzer("run", prepare_model(work.module(), task), task, cpu=True, disable_tqdm=True)
    factors = FactorArguments(strategy="ekfac")
    analyzer.fit_all_factors("factors", work.rows, factor_args=factors, per_device_batch_size=len(work.rows))
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        work.queries,
        work.rows,
        per_device_query_batch_size=len(work.queries),
        per_device_train_batch_size=len(work.rows),
        score_args=ScoreArguments(damping_factor=damping),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


METHODS = {
    "EK-FAC": lambda work: scores(work, work.λ),
    "EK-FAC, its default damping": lambda work: scores(work, ScoreArguments().damping_factor),
}
