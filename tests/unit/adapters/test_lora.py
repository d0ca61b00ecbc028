"""Adapters of peft as they are: their gradients, the flat directions of every pair, and what has no meaning.

The oracle is the model itself on one row, differentiated by autograd.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

import upweight as uw
from refusals import refused, warned
from upweight.model import calculus

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

DRAW = np.random.default_rng(0)
TOKENS = [DRAW.integers(5, 50, length).tolist() for length in (4, 7, 5, 9, 6, 4)]
WHERE = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
RANK = 2


def base(kind):
    size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    size |= {"vocab_size": 50, "num_hidden_layers": 1, "max_position_embeddings": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":
            sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
            settings = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
            return transformers.GPT2LMHeadModel(settings)
        if kind == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=1))
        return transformers.BertForSequenceClassification(transformers.BertConfig(**size, num_labels=3))


def adapted(kind, *, trained=True, **settings):
    """A tiny model with adapters; `trained` gives A and B random values."""
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of a Conv1D, which peft sets itself
        torch.manual_seed(1)
        model = peft.get_peft_model(
            base(kind), peft.LoraConfig(r=RANK, target_modules=WHERE[kind], task_type=task, **settings)
        )
        for name, parameter in model.named_parameters():
            if trained and ("lora_A" in name or "lora_B" in name):
                parameter.data.normal_(std=0.3)
    return model.eval()


def rows(kind):
    named = [{"input_ids": tokens, "id": f"text {k}"} for k, tokens in enumerate(TOKENS)]
    return [{**row, "label": k % 3} for k, row in enumerate(named)] if kind == "bert" else named


def alone(model, row):
    ids = torch.tensor([row["input_ids"]])
    return model(input_ids=ids, labels=torch.tensor([row["label"]]) if "label" in row else ids).loss


def gradients(influence):
    return calculus.gradients(influence.objective, influence.examples.batch(range(len(TOKENS))))


@pytest.mark.parametrize("kind", WHERE)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 4}], ids=["lora", "rslora"])
def test_gradients_are_those_of_the_model_itself(kind, settings):
    model, data = adapted(kind, **settings), rows(kind)
    influence = uw.explain(model, data)
    assert influence.objective.route.examples == "vmap", "no loop over rows"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert influence.objective.size == sum(parameter.numel() for parameter in parameters)
    ours = gradients(influence).float()
    for k, row in enumerate(data):
        theirs = torch.cat([g.reshape(-1) for g in torch.autograd.grad(alone(model, row), parameters)])
        torch.testing.assert_close(ours[k], theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def turned(influence, E):
    """The direction A → EA, B → −BE of every pair, as one flat vector each."""
    blocks = influence.objective.blocks
    directions = []
    for name in blocks:
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        moved = {name: E @ blocks[name], other: -blocks[other] @ E}
        directions.append(torch.cat([moved.get(n, torch.zeros_like(b)).reshape(-1) for n, b in blocks.items()]))
    return torch.stack(directions)


@pytest.mark.parametrize("kind", WHERE)
def test_flat_directions_are_told_and_hold_nothing_of_a_value(kind):
    model, data = adapted(kind), rows(kind)
    influence = uw.explain(model, data)
    layers = sum("lora_A" in name for name in influence.objective.blocks)
    assert f"LoRA: {layers * RANK**2} flat directions" in repr(influence)
    E = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = turned(influence, E)
    flat = flat / flat.norm(dim=1, keepdim=True)
    C, G = influence.operator.matrix(), gradients(influence)
    assert float((G @ flat.T).abs().max()) < 1e-10 * float(G.norm())
    assert float((flat @ C @ flat.T).abs().max()) < 1e-12 * float(C.norm())
    values = influence.on_loss(data[:2]).values
    eigenvalues, Q = torch.linalg.eigh(C)
    kept = eigenvalues > 1e-10 * eigenvalues[-1]
    projected = Q[:, kept] / (eigenvalues[kept] + influence.damping) @ Q[:, kept].T
    lost = G - G @ Q[:, kept] @ Q[:, kept].T  # of gradients outside of what C sees
    expected = G[:2] @ (projected @ G.T + lost.T / influence.damping)
    weights = torch.tensor(influence.examples.weights)
    np.testing.assert_allclose(values, (expected * weights / len(data)).numpy(), rtol=1e-6, atol=1e-12)


def test_scores_through_the_certified_solve():
    model, data = adapted("gpt2"), rows("gpt2")
    direct = uw.explain(model, data)
    expected = direct.on_loss(data[:2]).values
    solver = uw.solvers.CG(rtol=1e-8, preconditioner=uw.solvers.Preconditioned(uw.operators.EKFAC(samples=1)))
    found = uw.explain(model, data, solver=solver, curvature=uw.operators.GaussNewton(), damping=direct.damping)
    np.testing.assert_allclose(found.on_loss(data[:2]).values, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_preconditioner_takes_the_head_for_a_layer(monkeypatch):
    """Whose curvature as part of the criterion has no closed root; small ones are formed, which hides it."""
    monkeypatch.setattr("upweight.operators.cotangents.MOST", 1)
    model, data = adapted("gpt2"), rows("gpt2")
    solver = uw.solvers.CG(rtol=1e-6, preconditioner=uw.solvers.Preconditioned(uw.operators.EKFAC(samples=1)))
    settings = {"curvature": uw.operators.GaussNewton(), "damping": 1e-3}
    scores = uw.explain(model, data, solver=solver, **settings).on_loss(data[:2])
    expected = uw.explain(model, data, solver=uw.solvers.Cholesky(), **settings).on_loss(data[:2])
    largest = np.abs(expected.values).max()
    np.testing.assert_allclose(scores.values, expected.values, rtol=1e-3, atol=1e-4 * largest)


def test_adapters_as_they_were_created_say_so():
    model = adapted("gpt2", trained=False)
    with warned("are not trained yet", "Train them first, or load those that were"):
        influence = uw.explain(model, rows("gpt2"))
    G, start = gradients(influence), 0
    for name, block in influence.objective.blocks.items():
        part = G[:, start : start + block.numel()]
        assert bool(part.any()) is ("lora_B" in name)
        start += block.numel()


def test_a_model_that_was_loaded_frozen_is_its_adapters(tmp_path):
    model = adapted("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = uw.explain(model, rows("llama")).on_loss(rows("llama")[:1]).values
    found = uw.explain(loaded, rows("llama"))
    np.testing.assert_allclose(found.on_loss(rows("llama")[:1]).values, expected, rtol=1e-6)


def test_what_is_out_of_the_graph_is_refused():
    model = adapted("gpt2")
    expected = uw.explain(model, rows("gpt2")).on_loss(rows("gpt2")[:1]).values
    model.merge_adapter()
    with refused("so nothing that the model computes depends on it", "Call model.unmerge_adapter() first"):
        uw.explain(model, rows("gpt2"))
    model.unmerge_adapter()
    np.testing.assert_allclose(uw.explain(model, rows("gpt2")).on_loss(rows("gpt2")[:1]).values, expected, rtol=1e-4)
    model.base_model.disable_adapter_layers()
    with refused("so nothing that the model computes depends on it", "Call model.enable_adapter_layers() first"):
        uw.explain(model, rows("gpt2"), parameters=lambda name: "lora_" in name)
    model.enable_adapter_layers()
    assert uw.explain(model, rows("gpt2")).objective.size > 0


def test_norms_that_are_held():
    model = adapted("llama", use_dora=True)
    with refused("whose norm of W + BA is detached", "Explain the magnitudes alone"):
        uw.explain(model, rows("llama"))
    influence = uw.explain(model, rows("llama"), parameters=lambda name: "lora_magnitude" in name)
    names = list(influence.objective.blocks)
    parameters = [dict(model.named_parameters())[name] for name in names]
    theirs = torch.autograd.grad(alone(model, rows("llama")[0]), parameters)
    expected = torch.cat([g.reshape(-1) for g in theirs])
    torch.testing.assert_close(gradients(influence)[0].float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("part", "whole"), [("lora_magnitude", True), ("lora_A", False), ("lora_B", False)])
def test_only_the_magnitudes_of_a_dora_have_the_gradient_of_its_loss(part, whole):
    model, row = adapted("gpt2", use_dora=True).double(), rows("gpt2")[0]
    parameters = [p for name, p in model.named_parameters() if part in name]
    torch.manual_seed(0)
    way = [torch.randn_like(p) for p in parameters]
    slope = sum((g * w).sum() for g, w in zip(torch.autograd.grad(alone(model, row), parameters), way, strict=True))
    at = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            for p, w in zip(parameters, way, strict=True):
                p.add_(w, alpha=step)
            at.append(alone(model, row))
    found = (at[0] - at[1]) / 2e-2
    assert bool(abs(found - slope) < 0.02 * abs(found)) is whole, (found, slope)


class Quantised(nn.Module):
    """A frozen base of whole numbers, with an adapter beside it."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        whole = torch.randint(-128, 128, (3, 6), generator=draw, dtype=torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 6, generator=draw))
        self.lora_B = nn.Parameter(torch.randn(3, 2, generator=draw))

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) / 64) + linear(linear(x, self.lora_A), self.lora_B)


def test_a_quantised_base_keeps_its_numbers():
    model = Quantised()
    draw = torch.Generator().manual_seed(1)
    X, y = torch.randn(12, 6, generator=draw), torch.randint(0, 3, (12,), generator=draw)
    before = model.weight.clone()
    influence = uw.explain(model, X, y, loss=cross_entropy)
    assert list(influence.objective.blocks) == ["lora_A", "lora_B"]
    loss = cross_entropy(model(X[:1]), y[:1])
    theirs = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [model.lora_A, model.lora_B])])
    ours = calculus.gradients(influence.objective, influence.examples.batch([0]))[0]
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)
    assert np.isfinite(influence.on_loss(X[:2], y[:2]).values).all()
    assert model.weight.dtype == torch.int8
    assert torch.equal(model.weight, before)


def at_the_logits(model, data):
    """(1/n) Σ wᵢ Jᵢᵀ Hᵢ Jᵢ of the next tokens' logits, a backward pass for each, in float64."""
    model = copy.deepcopy(model).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, counted = 0, sum(len(row["input_ids"]) - 1 for row in data)
    for row in data:
        f = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        pieces = [torch.autograd.grad(one, parameters, retain_graph=True) for one in f.flatten()]
        J = torch.stack([torch.cat([g.reshape(-1) for g in piece]) for piece in pieces]).reshape(*f.shape, -1)
        p = f.softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        total = total + torch.einsum("tip,tij,tjq->pq", J, H, J).detach()
    return total / counted


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_a_frozen_head_counts_to_the_criterion(head):
    model = adapted("gpt2", **({"modules_to_save": ["lm_head"]} if head == "trained" else {}))
    data = rows("gpt2")[:4]
    influence = uw.explain(model, data, curvature=uw.operators.GaussNewton())
    outputs = calculus.outputs(influence.operator.sweep.objective, influence.examples.batch([0, 1]))
    longest = 7  # tokens of the two rows
    assert outputs.shape[1] == (longest * 8 if head == "frozen" else (longest - 1) * 50)
    expected = at_the_logits(model, data)
    torch.testing.assert_close(influence.operator.matrix(), expected, rtol=1e-6, atol=1e-7 * float(expected.max()))
    V = torch.randn(2, len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(influence.operator.apply(V), V @ expected, rtol=1e-6, atol=1e-7 * float(expected.max()))


def test_a_loss_that_compares_places_is_bent_as_a_whole():
    """Squares of sums over places: no place has a second derivative of its own."""
    model, data = adapted("gpt2"), rows("gpt2")
    data = [{**data[k], "input_ids": data[k]["input_ids"][:6], "labels": [1.0]} for k in (1, 3)]

    def loss(output, y):
        return (output.logits.pow(2).sum((1, 2))[:, None] / 100 - y).pow(2).mean()

    influence = uw.explain(model, data, loss=loss, curvature=uw.operators.GaussNewton(), damping=1.0)
    whole = influence.operator.matrix()
    V = torch.eye(len(whole), dtype=torch.float64)[:5]
    torch.testing.assert_close(influence.operator.apply(V), whole[:5], rtol=1e-8, atol=1e-8 * float(whole.abs().max()))
    batch = influence.examples.batch([0, 1])
    objective = influence.operator.sweep.objective
    assert calculus.through_parameters(objective, calculus.outputs(objective, batch).shape[1])
    J = calculus.output_jacobians(objective, batch).double()
    H = calculus.output_hessians(objective, batch).double()
    torch.testing.assert_close(whole, torch.einsum("bip,bij,bjq->pq", J, H, J) / 2, rtol=1e-8, atol=1e-9)
