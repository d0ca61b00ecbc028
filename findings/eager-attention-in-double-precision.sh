#!/usr/bin/env bash
# In float64 the eager attention of transformers makes all logits of a left-padded row NaN; in float32 they are right.
#
# Library: transformers 5.23.0 with torch 2.13.0, on the CPU.
# Surprise: the mask of the places that may not be seen is the least number of the model's precision, and the softmax
#   is taken in float32 whatever that is. The least float64 is −∞ there; a padding on the left sees no place but such
#   ones, so its line is NaN, and NaN times a weight of 0 is NaN for every other token of its row from the next layer
#   on. Attention by sdpa, and eager attention in float32, give the same numbers as each other.
# Expected: the same logits in float64, as sdpa gives them.
# Where upweight meets it: small models are explained in float64. A softmax that is asked for float32 of a float64 stays
#   in float64 while a module is differentiated (model/modules.py).
#
# Seen: eager in float64 has no finite logit in the padded row; the other three agree to 1e-7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
)
rows = {
    "input_ids": torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
logits = {}
for kind in ("sdpa", "eager"):
    for precision in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, attn_implementation=kind).to(precision).eval()
        with torch.no_grad():
            logits[kind, precision] = model(**rows).logits[:, 2:].double()  # of real tokens
        print(kind, precision, "finite:", logits[kind, precision].isfinite().flatten(1).float().mean(1).tolist())
*right, wrong = logits.values()
alike = max(float((found - right[0]).abs().max()) for found in right)
print(f"the first three apart by {alike:.1g}")
as_stated = alike < 1e-5 and not bool(wrong[0].isfinite().any()) and bool(wrong[1].isfinite().all())
raise SystemExit(0 if as_stated else "no longer as stated")
PYTHON
