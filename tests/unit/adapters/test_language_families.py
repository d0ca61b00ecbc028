"""Families of transformers that compute otherwise than GPT-2 or BERT, by the front door.

The oracle is the model itself on one unpadded row, differentiated by autograd.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import upweight as uw
from refusals import refused
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
    "GPTNeo": (
        "eager attention",
        "GPTNeoForCausalLM",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "Marian": (
        "a decoder that begins with the padding",
        "MarianMTModel",
        {
            **{"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 0},
        },
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


def flat(pieces, parameters):
    pairs = zip(pieces, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if piece is None else piece).reshape(-1) for piece, p in pairs])


@pytest.mark.parametrize("name", ["OPT", "Gemma", "Marian"])
def test_a_padding_that_is_read_and_is_a_weight_of_the_output_layer(name):
    """Its embedding has no gradient, its weight has one, and second derivatives are of the same."""
    model = built(name, 0)
    rows = ROWS
    if name == "Marian":  # whose decoder begins with the padding
        rows = [{**row, "labels": row["input_ids"][:3]} for row in ROWS]
    else:  # whose first token is told from the padding before it
        missing = [12 - len(row["input_ids"]) for row in ROWS]
        rows = [
            {
                "input_ids": [0] * k + row["input_ids"],
                "attention_mask": [0] * k + [1] * len(row["input_ids"]),
                "labels": [-100] * k + row["input_ids"],
            }
            for k, row in zip(missing, ROWS, strict=True)
        ]
    influence = uw.explain(model, rows, damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG())
    batch = influence.examples.batch(range(len(rows)))
    plain = copy.deepcopy(model).double()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    gradients = []
    for row in rows:
        with sdpa_kernel(SDPBackend.MATH):  # whose derivative has a derivative
            found = plain(**{part: torch.tensor([numbers]) for part, numbers in row.items()})
        gradients.append(flat(torch.autograd.grad(found.loss, parameters, create_graph=True), parameters))
    G = torch.stack(gradients)
    torch.testing.assert_close(layers.gradients(influence.objective, batch), G.detach(), rtol=1e-4, atol=1e-5)
    v = torch.randn(G.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = flat(torch.autograd.grad(G.sum(0) @ v, parameters, allow_unused=True), parameters)
    torch.testing.assert_close(
        calculus.hvp(influence.objective, batch, v[None])[0],
        expected,
        rtol=1e-4,
        atol=1e-5 * float(expected.abs().max()),
    )


def test_a_token_read_off_a_padding_that_sees_nothing():
    """In eager attention the least number takes the scores of such a padding away, and their derivative stays."""
    model = built("GPTNeo", 0)
    rows = [
        {
            "input_ids": [0] * (12 - len(row["input_ids"])) + row["input_ids"],
            "attention_mask": [0] * (12 - len(row["input_ids"])) + [1] * len(row["input_ids"]),
            "labels": [-100] * (12 - len(row["input_ids"])) + row["input_ids"],
        }
        for row in ROWS
    ]
    with refused("are not the slope of its first", "give that token the label -100"):
        uw.explain(model, rows, damping=1.0)
    for row in rows:
        row["labels"][row["attention_mask"].index(1)] = -100
    assert np.isfinite(uw.explain(model, rows, damping=1.0).on_loss(rows[:1]).values).all()


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
