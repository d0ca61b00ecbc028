"""Families of transformers that compute otherwise than GPT-2 or BERT, by the front door.

The oracle is the model itself on one unpadded row, differentiated by autograd.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import upweight as uw
from upweight.model import calculus, layers

transformers = pytest.importorskip("transformers")

DRAW = np.random.default_rng(0)
ROWS = [{"input_ids": DRAW.integers(5, 50, length).tolist()} for length in (4, 7, 5, 9, 12, 3)]
SPECIAL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
GEMMA = {**COMMON, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {  # name: what is peculiar, the class, its settings
    "OPT": ("logits.contiguous() at its end", "OPTForCausalLM", {**COMMON, "ffn_dim": 12, "word_embed_proj_dim": 16}),
    "Gemma": ("norms in float32, which round otherwise in a batch", "GemmaForCausalLM", GEMMA),
    "Gemma2": (
        "soft caps, and paddings whose window shows paddings only",
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 3, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5},
    ),
}


def built(name, seed):
    kind, settings = FAMILIES[name][1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**SPECIAL, **settings)
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(("name", "seed"), [("OPT", 0), *(("Gemma", seed) for seed in range(4)), ("Gemma2", 0)])
def test_gradients_are_those_of_the_model_itself_on_a_row_alone(name, seed):
    model = built(name, seed)
    curvature, solver = uw.operators.GaussNewton(), uw.solvers.CG()
    influence = uw.explain(model, ROWS, damping=1.0, curvature=curvature, solver=solver)
    assert influence.objective.route.examples == "vmap", influence.objective.route
    assert influence.objective.route.plan.structured
    batch = influence.examples.batch(range(len(ROWS)))
    plain = copy.deepcopy(model).double()
    parameters = list(plain.parameters())
    expected = []
    for row in ROWS:
        tokens = torch.tensor([row["input_ids"]])
        found = torch.autograd.grad(plain(input_ids=tokens, labels=tokens).loss, parameters)
        expected.append(torch.cat([piece.reshape(-1) for piece in found]))
    for ours in (calculus.gradients, layers.gradients):
        torch.testing.assert_close(ours(influence.objective, batch), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert np.isfinite(influence.on_loss(ROWS[:1]).values).all()
