#!/usr/bin/env bash
# A Transformer encoder in eval() gives other outputs under no_grad() than where it is differentiated.
#
# Library: torch 2.13.0.
# Surprise: torch.nn.TransformerEncoder with src_key_padding_mask takes its fast path where no gradient is asked for, and
#   that sets the outputs of padded positions to 0; with gradients they are whatever the layers make of them. A classifier
#   that averages over positions is therefore trained as one function and predicts as another, in the same eval() mode.
#   enable_nested_tensor=False, which its warning speaks of, has to be given when the encoder is built; only
#   torch.backends.mha.set_fastpath_enabled(False) makes the two one afterwards.
# Expected: no_grad() changes what is recorded, not what is computed beyond rounding.
# Where upweight meets it: model/modules.py evaluates without the fast path, and adapters/one_by_one.py compares with the
#   module as its user calls it, and warns.
#
# Seen: outputs of a padded position 0 without gradients and up to 1.9 with them; the mean's logits differ by 0.22, and by
#   nothing with the fast path off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
encoder, head = nn.TransformerEncoder(layer, 1).eval(), nn.Linear(8, 2)
x = torch.randn(4, 5, 8)
padded = torch.arange(5)[None] >= torch.tensor([5, 3, 4, 3])[:, None]


def both():
    """What the encoder makes of a padded position, and the logits of a mean over positions."""
    out = encoder(x, src_key_padding_mask=padded)
    return out[1, 4].detach(), head(out.mean(1)).detach()


trained = both()
with torch.no_grad():
    predicted = both()
    torch.backends.mha.set_fastpath_enabled(False)
    slow = both()
print("a padded position: with gradients up to", float(trained[0].abs().max()), "without", float(predicted[0].abs().max()))
off, left = (float((trained[1] - other[1]).abs().max()) for other in (predicted, slow))
print("logits differ by", off, "and without the fast path by", left)
sys.exit(not (float(predicted[0].abs().max()) == 0 and off > 0.05 and left < 1e-5))
PYTHON
