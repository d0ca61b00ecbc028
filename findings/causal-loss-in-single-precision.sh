#!/usr/bin/env bash
# A causal language model in float64 has logits in float64 and a loss in float32.
#
# Library: transformers 5.23.0, torch 2.13.0.
# Surprise: the loss that a …ForCausalLM and GPT2LMHeadModel returns is computed from logits.float(), whatever the model's
#   precision. That raises half precision, and lowers a model that was made .double() on purpose: its loss has seven digits,
#   so that a central difference with a small step is 0 or noise, though model and inputs are exact to sixteen.
# Expected: a loss in the precision of the logits, or better.
# Where upweight meets it: adapters/own_loss.py knows a model's loss again to 1e-4 only, and computes it from the logits, in
#   their precision, from then on.
#
# Seen: logits float64, loss float32. Slope of the loss by autograd 0.0019, by a central difference with a step of 1e-7: 0;
#   of the same loss from the same logits in float64 0.0019.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).double().eval()
ids = torch.tensor([[3, 5, 7, 11, 13]])
weight = model.transformer.ln_f.bias


def both():
    """The model's own loss, and the same from its logits."""
    found = model(input_ids=ids, labels=ids)
    return found.loss, cross_entropy(found.logits[0, :-1], ids[0, 1:]), found.logits.dtype


own, exact, logits = both()
slope = float(torch.autograd.grad(own, weight)[0][0])
sides = []
for move in (1e-7, -2e-7):
    with torch.no_grad():
        weight[0] += move
        sides.append([float(loss) for loss in both()[:2]])
by_own, by_exact = ((above - below) / 2e-7 for above, below in zip(*sides))
print(f"logits {logits}, loss {own.dtype}")
print(f"slope by autograd {slope:.3g}, by differences of the loss {by_own:.3g}, of the same loss in float64 {by_exact:.3g}")
good = logits == torch.float64 and own.dtype == torch.float32 and abs(by_exact / slope - 1) < 1e-3
sys.exit(not (good and abs(by_own / slope - 1) > 0.1))
PYTHON
