"""Claim: EKFAC of all parameters takes no longer than kronfluence's of some; and who predicts retraining.

The tiny Llama of `llama`, fine-tuned on its 1,000 sequences. In one process on one core: kronfluence's EK-FAC factors
and pairwise scores by its documented calls, and `explain(…).on_loss(…)`. Then the scores of each method against really
fine-tuning on halves (`retrained`): LDS is the Spearman correlation over the halves, for each query; its ceiling is
that of one training's losses with another's of the same halves, by Spearman and Brown for their mean.

    pip install --no-deps kronfluence==1.0.1 einops einconv opt-einsum; pip install accelerate
    UPWEIGHT_DATA=… python benchmarks/tiny_llama/methods.py [rows]
"""

from __future__ import annotations

import copy
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import query_losses, rows, sequences, tuned
from numpy.typing import NDArray
from retrained import RESULTS, subset
from scipy.stats import spearmanr
from torch import Tensor

import upweight as uw
from upweight.operators import EKFAC

FRACTIONS = (0.1, 1.0, 10.0)  # of the mean eigenvalue: dampings


def cpu(function: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what the function returns."""
    start = time.process_time()
    value = function()
    return round(time.process_time() - start, 1), value


def padded(part: list[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    """Rows of one length, as kronfluence's loaders stack them."""
    longest = max(len(row["input_ids"]) for row in part)
    out = []
    for row in part:
        ids = torch.tensor(row["input_ids"] + [0] * (longest - len(row["input_ids"])))
        mask = (torch.arange(longest) < len(row["input_ids"])).long()
        out.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)})
    return out


def kronfluence(model: torch.nn.Module, train: list[Any], queries: list[Any], damping: float) -> NDArray[np.float64]:
    """EK-FAC scores, (q, n), of the linear layers that it tracks, by its documented calls."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            if sample:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).reshape(labels.shape)
                    labels = torch.where(labels >= 0, drawn, labels)
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]

        def get_attention_mask(self, batch: Any) -> Any:
            return batch["attention_mask"]

    task = Language()
    analyzer = Analyzer(
        "llama",
        prepare_model(model, task),
        task,
        cpu=True,
        output_dir=tempfile.mkdtemp(),
        disable_tqdm=True,
        disable_model_save=True,
        log_level=logging.ERROR,
    )
    settings = {"per_device_batch_size": 16, "overwrite_output_dir": True}
    analyzer.fit_all_factors("ekfac", train, factor_args=FactorArguments(strategy="ekfac"), **settings)
    analyzer.compute_pairwise_scores(
        "scores",
        "ekfac",
        queries,
        train,
        per_device_query_batch_size=20,
        per_device_train_batch_size=16,
        score_args=ScoreArguments(damping_factor=damping),
        overwrite_output_dir=True,
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].double().numpy()


def tf_idf(train: list[Any], queries: list[Any]) -> NDArray[np.float64]:
    """Cosines of token counts, each divided by how many rows hold the token."""
    size = 512
    counts = [np.stack([np.bincount(row["input_ids"], minlength=size) for row in part]) for part in (train, queries)]
    idf = np.log(len(train) / (1 + (counts[0] > 0).sum(0)))
    X, Q = (part * idf for part in counts)
    return (Q / np.linalg.norm(Q, axis=1, keepdims=True)) @ (X / np.linalg.norm(X, axis=1, keepdims=True)).T


def spearman(predicted: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """One correlation over the halves for each query; both (halves, q)."""
    return np.array([spearmanr(predicted[:, q], actual[:, q]).statistic for q in range(actual.shape[1])])


def truth(seeds: int = 2) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The halves that so many seeds have run, the mean losses (halves, q), and each seed's."""
    found = json.loads((RESULTS / "retrained.json").read_text())["losses"]
    numbers = [k for k in range(1000) if all(f"{k}/{seed}" in found for seed in range(seeds))]
    each = np.array([[found[f"{k}/{seed}"] for k in numbers] for seed in range(seeds)])
    return np.array(numbers), each.mean(0), each


def judged(scores: NDArray[np.float64], numbers: NDArray[np.int64], actual: NDArray[np.float64]) -> dict[str, Any]:
    """LDS with its interval over queries, and how many of the leading 20 rows are of the query's source."""
    out = np.ones((len(numbers), scores.shape[1]))
    for line, number in enumerate(numbers):
        out[line, subset(int(number))] = 0
    lds = spearman(out @ scores.T, actual)
    found, n = sequences(), scores.shape[1]
    leading = np.argsort(-scores, 1)[:, :20]
    own = (found["source"][:n][leading] == found["query_source"][:, None]).mean()
    facts = np.flatnonzero(found["query_fact"] >= 0)
    five = [
        int((found["fact"][:n][np.argsort(-scores[q])[:10]] == found["query_fact"][q]).sum()) for q in facts.tolist()
    ]
    half = 1.96 * lds.std(ddof=1) / np.sqrt(len(lds))
    return {
        "LDS": round(float(lds.mean()), 3),
        "± (95 %, over queries)": round(float(half), 3),
        "right source in the top 20": round(float(own), 3),
        "of a fact's 5 texts in the top 10": five,
    }


def main(count: int = 1000) -> None:
    """Time EKFAC beside kronfluence, and judge all methods."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train, queries = rows("train", count), rows("query")
    model = tuned(np.arange(count), 0)
    numbers, actual, each = truth()
    times: dict[str, float] = {}
    scores: dict[str, NDArray[np.float64]] = {}
    times["explain"], influence = cpu(lambda: uw.explain(model, train, curvature=EKFAC(samples=1), damping=1e-3))
    times["EKFAC: factors"], operator = cpu(lambda: influence.operator)
    times["EKFAC: 20 queries × rows"], first = cpu(lambda: influence.on_loss(queries))
    mean = float(operator.eigenvalues.mean())
    certificate = str(first.certificate)
    for fraction in FRACTIONS:
        at = uw.explain(model, train, curvature=EKFAC(samples=1), damping=fraction * mean)
        at.system.__dict__["operator"] = operator
        scores[f"EKFAC, λ = {fraction:g} × mean eigenvalue"] = at.on_loss(queries).values
    try:
        sets = padded(train), padded(queries)
        times["kronfluence: factors and scores"], theirs = cpu(
            lambda: kronfluence(copy.deepcopy(model), *sets, 0.1 * mean)
        )
        scores["kronfluence EK-FAC, λ = 0.1 × ours"] = theirs
    except ImportError:
        print("kronfluence is not installed; without it")
    gradients = uw.explain(model, train, curvature=EKFAC(samples=1), damping=1e-3)
    times["gradient dot"], found = cpu(lambda: uw.baselines.gradient_dot(gradients, queries))
    scores["gradient dot"] = found.values
    scores["gradient cosine"] = uw.baselines.gradient_cosine(gradients, queries).values
    scores["tf-idf"] = tf_idf(train, queries)
    scores["BM25"] = uw.baselines.bm25(gradients, queries).values
    scores["random"] = np.random.default_rng(0).normal(size=(len(queries), count))
    folder = tempfile.mkdtemp()
    times["index (beside the factors)"], index = cpu(lambda: influence.index(folder))
    times["index: coordinates of 20 queries"], asked = cpu(lambda: index.coordinates(influence, queries))
    times["index: 20 queries × rows from disk"], kept = cpu(lambda: index.on_loss(asked))
    many = uw.Coordinates(np.tile(asked.values, (50, 1)), np.tile(asked.query_values, 50))
    times["index: 1,000 queries × rows from disk"], _ = cpu(lambda: index.on_loss(many))
    ceiling = spearman(each[0], each[1])
    ceiling = np.sqrt(np.clip(2 * ceiling / (1 + ceiling), 0, 1))
    report = {
        "settings": {"rows": count, "halves": len(numbers), "trainings of each half": 2, "mean eigenvalue": mean},
        "processor seconds": times,
        "peak memory in MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "certificate": certificate,
        "index": {
            "text": str(index),
            "bytes over those of float32 gradients": round(index.bytes / (4 * count * influence.objective.size), 3),
            "correlation with the scores it stands for": round(
                float(np.corrcoef(kept.values.ravel(), first.values.ravel())[0, 1]), 4
            ),
        },
        "LDS ceiling of the mean of two trainings": round(float(ceiling.mean()), 3),
        "methods": {name: judged(values, numbers, actual) for name, values in scores.items()},
        "losses now": [round(float(x), 4) for x in query_losses(model)],
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (RESULTS / "methods.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*map(int, sys.argv[1:]))
