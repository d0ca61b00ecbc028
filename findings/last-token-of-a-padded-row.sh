#!/usr/bin/env bash
# A transformers sequence classifier without pad_token_id reads a padded row's answer off its padding, mask or no mask.
#
# Library: transformers 5.23.0, torch 2.13.0.
# Surprise: LlamaForSequenceClassification takes the answer from the last token that is no padding, and finds padding by
#   config.pad_token_id alone. Without one it refuses batches of several rows, and for a batch of one it takes the last
#   position, although attention_mask says 0 there. Whoever differentiates row by row, as per-example gradients do,
#   gets other logits for a padded row than for the same row unpadded, and no word.
# Expected: the mask decides, or a batch of one is refused as a batch of two is.
# Where upweight meets it: src/upweight/adapters/own_loss.py compares a short row alone with the same row beside a longer
#   one and refuses what padding changes.
#
# Seen: padded and unpadded logits of one row differ by 0.1969; with pad_token_id set by 0.0000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3
)
model = LlamaForSequenceClassification(config).eval()
row = torch.tensor([[7, 11, 13]])
padded, mask = torch.tensor([[7, 11, 13, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])


def gap():
    with torch.no_grad():
        return float((model(padded, attention_mask=mask).logits - model(row).logits).abs().max())


without = gap()
try:
    model(torch.cat([padded, padded]), attention_mask=torch.cat([mask, mask]))
    two = "taken"
except ValueError:
    two = "refused"
model.config.pad_token_id = 0
named = gap()
print(f"padded and unpadded logits of one row differ by {without:.4f}; with pad_token_id set by {named:.4f}")
print(f"a batch of two is {two}")
sys.exit(not (without > 1e-3 and named < 1e-6 and two == "refused"))
PYTHON
