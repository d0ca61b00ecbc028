"""The tiny Llama of these benchmarks: its weights, its sequences, and the one way in which it is fine-tuned.

The folder llama_stories260k under UPWEIGHT_DATA (karpathy/tinyllamas, stories260K): 260,032 parameters, embeddings
tied; 1,000 sequences of 64 to 80 tokens and 20 queries. AdamW 1e-3 without decay, 3 epochs in batches of 16, linear to
0, gradients clipped at 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import upweight as uw

EPOCHS, BATCH, LR = 3, 16, 1e-3


def folder() -> Path:
    """Where the model and its sequences lie."""
    return Path(os.environ["UPWEIGHT_DATA"]) / "llama_stories260k"


def sequences() -> dict[str, NDArray[Any]]:
    """`train`, `query` (padded with 0), their lengths, sources and facts."""
    with np.load(folder() / "sequences.npz") as file:
        return dict(file)


def rows(part: str, count: int | None = None) -> list[dict[str, list[int]]]:
    """The sequences of a part, "train" or "query", without their padding."""
    found = sequences()
    pairs = zip(found[part][:count], found[f"{part}_len"][:count], strict=True)
    return [{"input_ids": ids[:length].tolist()} for ids, length in pairs]


def fresh() -> torch.nn.Module:
    """The published weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder() / "hf").eval()


def _padded(part: str) -> tuple[Tensor, Tensor, Tensor]:
    found = sequences()
    ids = torch.from_numpy(found[part].astype(np.int64))
    mask = torch.arange(ids.shape[1])[None] < torch.from_numpy(found[f"{part}_len"].astype(np.int64))[:, None]
    return ids, mask.long(), torch.where(mask, ids, -100)


def tuned(keep: NDArray[np.int64], seed: int) -> torch.nn.Module:
    """The model fine-tuned on some of the rows; the seed shuffles."""
    model = fresh()
    _fit(model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0), keep, seed, lambda _: None)
    return model


def recorded(seed: int) -> uw.Recording:
    """The fine-tuning on all rows, as `tuned` does it, recorded."""
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    train = rows("train")
    with uw.Recording(model, optimizer, train, clip=1.0) as recording:
        _fit(model, optimizer, np.arange(len(train)), seed, recording.batch)
    return recording


def _fit(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: NDArray[np.int64],
    seed: int,
    tell: Callable[[Tensor], None],
) -> None:
    ids, mask, labels = _padded("train")
    draw = torch.Generator().manual_seed(seed)
    model.train()
    steps = EPOCHS * -(-len(keep) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        order = torch.from_numpy(keep)[torch.randperm(len(keep), generator=draw)]
        for some in order.split(BATCH):
            optimizer.zero_grad()
            model(input_ids=ids[some], attention_mask=mask[some], labels=labels[some]).loss.backward()
            tell(some)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def query_losses(model: torch.nn.Module) -> NDArray[np.float64]:
    """Of every query the mean loss of its tokens."""
    ids, mask, labels = _padded("query")
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] >= 0).sum(1)).numpy()
