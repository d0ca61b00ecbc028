#!/usr/bin/env bash
# A Trainer divides the loss of GPT2LMHeadModel by one label a row too many, and that of models named …ForCausalLM not.
#
# Library: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0.
# Surprise: model(input_ids, labels) is the mean over the labels that are left after the shift by one. Trainer counts
#   num_items_in_batch behind the shift only where it knows the model's loss_type, which comes from the name of the class:
#   …ForCausalLM. GPT2LMHeadModel is a causal model by another name, so its loss, and the step taken, are (L − 1)/L of the
#   mean for rows of L labelled tokens: a third less for rows of three tokens. A learning rate, a penalty or a clipping
#   threshold that is carried from one model to the other means something else. With the first label of every row at −100,
#   as behind a prompt, both agree.
# Expected: for every model the loss that it reports itself for the batch.
# Where upweight meets it: docs/math.md, "What was minimised", states the factor; tests/unit/adapters/
#   test_what_was_minimised.py compares Trainer's steps with ∇R for both models.
#
# Seen: steps of the Trainer over those of the model's own loss, rows of 3 tokens: GPT2LMHeadModel 0.6667, with first
#   labels −100 1.0000; LlamaForCausalLM 1.0000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import copy
import os
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, **none))
sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, bos_token_id=None, eos_token_id=None))
ids = torch.randint(1, 20, (4, 3), generator=torch.Generator().manual_seed(1))
masked = ids.clone()
masked[:, 0] = -100


def ratio(start, labels):
    """One step of plain gradient descent by a Trainer, over that by the model's own loss."""
    rows = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y} for x, y in zip(ids, labels)]
    model = copy.deepcopy(start)
    arguments = TrainingArguments(
        output_dir=os.environ["FOLDER"] + "/out", per_device_train_batch_size=4, max_steps=1, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    own = copy.deepcopy(start).train()
    own(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    step = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), start.parameters())])
    expected = torch.cat([-0.1 * p.grad.flatten() for p in own.parameters()])
    return float(step @ expected / (expected @ expected))


first, second, third = ratio(gpt2, ids), ratio(gpt2, masked), ratio(llama, ids)
print(f"rows of 3 tokens: GPT2LMHeadModel {first:.4f}, with first labels -100 {second:.4f}; LlamaForCausalLM {third:.4f}")
sys.exit(not (abs(first - 2 / 3) < 1e-3 and abs(second - 1) < 1e-3 and abs(third - 1) < 1e-3))
PYTHON
