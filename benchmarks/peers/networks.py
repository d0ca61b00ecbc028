"""The models of the workloads and their losses, in torch, for every interpreter of the comparison.

The harness trains them in float64; a library gets the same weights in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, PIXELS, WORDS, CHARACTERS = 10, 14, 2000, 40


class Tokens(nn.Module):
    """A causal language model as a function of token numbers alone: logits (rows, tokens, characters)."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, ids: Tensor) -> Tensor:
        return self.language_model(input_ids=ids, use_cache=False).logits


def llama() -> nn.Module:
    """Two layers of a Llama over characters, embeddings not tied, attention in its plain form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def build(name: str) -> nn.Module:
    """The untrained model of a workload; a linear one is inside a Sequential too, for libraries find layers by name."""
    if name == "softmax":
        return nn.Sequential(nn.Linear(PIXELS**2, CLASSES, bias=False))
    if name == "softmax-784":
        return nn.Sequential(nn.Linear(28**2, CLASSES, bias=False))
    if name == "text":
        return nn.Sequential(nn.Linear(WORDS, 1, bias=False))
    if name == "least-squares":
        return nn.Sequential(nn.Linear(8, 1))
    if name == "mlp-concrete":
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    if name == "mlp-mnist":
        return nn.Sequential(nn.Linear(PIXELS**2, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    if name == "cnn-mnist":
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 12, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, CLASSES),
        )
    if name == "llama":
        return Tokens(llama())
    message = f"There is no workload {name!r}."
    raise SystemExit(message)


def loss_of(name: str) -> Any:
    """The criterion(output, target) of a workload: the mean of the rows' losses, as torch has it."""
    if name in {"least-squares", "mlp-concrete"}:
        return nn.functional.mse_loss
    if name == "text":
        return nn.functional.binary_cross_entropy_with_logits
    if name == "llama":
        return token_loss
    return nn.functional.cross_entropy


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean over all predicted tokens; rows have the same length, so it is the mean of the rows' means."""
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained model of a workload, for evaluation."""
    import numpy as np

    model = build(name).to(dtype)
    with np.load(folder / "weights.npz") as weights:
        model.load_state_dict({key: torch.from_numpy(weights[key]).to(dtype) for key in weights})
    return model.eval()
