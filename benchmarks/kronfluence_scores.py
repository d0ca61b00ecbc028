"""What the benchmarks beside kronfluence share: its EK-FAC factors and pairwise scores, by its documented calls."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def ekfac_scores(
    model: nn.Module,
    loss: Callable[[nn.Module, Any, bool], Tensor],
    train: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    batch: int,
    damping: float,
) -> Callable[[], NDArray[np.float64]]:
    """What computes factors and scores, (q, n), with all queries at once.

    Args:
        model: the trained network.
        loss: of a model on a batch, as a sum; of targets that are drawn from the model, if it is asked for a sample.
        train: the training rows and their targets.
        queries: likewise, whose loss is measured.
        batch: training rows at once.
        damping: what kronfluence calls its damping factor.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Measured(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return loss(model, batch, sample)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return loss(model, batch, False)

    task, rows, asked = Measured(), TensorDataset(*train), TensorDataset(*queries)
    analyzer = Analyzer(
        "beside",
        prepare_model(model, task),
        task,
        cpu=True,
        output_dir=tempfile.mkdtemp(),
        disable_tqdm=True,
        disable_model_save=True,
        log_level=logging.ERROR,
    )

    def run() -> NDArray[np.float64]:
        analyzer.fit_all_factors(
            "ekfac",
            rows,
            per_device_batch_size=batch,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            "pairs",
            "ekfac",
            asked,
            rows,
            per_device_query_batch_size=len(asked),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("pairs")["all_modules"].double().numpy()

    return run
