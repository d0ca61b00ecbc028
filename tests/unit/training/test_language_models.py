"""Checkpoints, TracIn, ensembles and stacked training of transformers, as their users write them.

The oracles are the model itself, differentiated row by row and trained by a plain loop.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import upweight as uw

transformers = pytest.importorskip("transformers")

DRAW = np.random.default_rng(0)
LENGTHS = (4, 7, 5, 6, 4, 7)
ROWS = [{"input_ids": DRAW.integers(5, 30, length).tolist(), "label": k % 3} for k, length in enumerate(LENGTHS)]


def built(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "causal":
            sizes = {"vocab_size": 30, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        else:
            sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 1}
            settings = transformers.BertConfig(**sizes, vocab_size=30, max_position_embeddings=16, num_labels=3)
            model = transformers.BertForSequenceClassification(settings)
    return model.double().eval()


def rows(kind):
    return ROWS if kind == "classifier" else [{"input_ids": row["input_ids"]} for row in ROWS]


def loss(model, row):
    """Of one row, and how many labels it counts."""
    ids = torch.tensor([row["input_ids"]])
    if "label" in row:
        return model(input_ids=ids, labels=torch.tensor([row["label"]])).loss, 1
    return model(input_ids=ids, labels=ids).loss, ids.shape[1] - 1


def weights(kind):
    counted = np.array([1 if kind == "classifier" else length - 1 for length in LENGTHS])
    return counted / counted.mean()


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_checkpoints_of_a_run_by_tracin_and_as_an_ensemble(kind):
    model, states = built(kind), [built(kind, seed).state_dict() for seed in (1, 2)]
    members = uw.checkpoints(model, states, rows(kind), damping=1.0)
    expected = np.zeros((2, len(ROWS)))
    for state, rate in zip(states, (0.1, 0.02), strict=True):
        one = built(kind)
        one.load_state_dict(state)
        parameters = list(one.parameters())
        G = [torch.autograd.grad(loss(one, row)[0], parameters, allow_unused=True) for row in rows(kind)]
        G = torch.stack(
            [
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for g, p in zip(own, parameters, strict=True)
                    ]
                )
                for own in G
            ]
        ).numpy()
        expected += rate * G[:2] @ G.T * weights(kind)
    found = uw.TracIn(members, [0.1, 0.02]).on_loss(rows(kind)[:2])
    np.testing.assert_allclose(found.values, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    mean = (members[0].on_loss(rows(kind)[:2]).values + members[1].on_loss(rows(kind)[:2]).values) / 2
    np.testing.assert_allclose(uw.ensemble(members).on_loss(rows(kind)[:2]).values, mean, rtol=1e-9)


def trained_by_hand(kind, without, *, lr, epochs):
    """Full batches in which the rows that are out leave their places empty, as `Placed` has it: (1/n) Σ wᵢ Lᵢ."""
    model, own = built(kind, 3), weights(kind).copy()
    own[without] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        optimizer.zero_grad()
        losses = torch.stack([loss(model, row)[0] for row in rows(kind)])
        (losses * torch.from_numpy(own / len(own))).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return [float(loss(model, row)[0]) for row in rows(kind)[:2]]


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_stacked_training_of_a_factory_s_model(kind):
    influence = uw.explain(built(kind), rows(kind), damping=1.0)
    trainer = uw.StackedTraining(
        uw.minibatch.SGD(lr=0.1), uw.minibatch.Placed(len(ROWS)), epochs=3, factory=lambda: built(kind, 3)
    )
    found = uw.leave_one_out(influence, rows(kind)[:2], [1, 4], trainer)
    base = trained_by_hand(kind, [], lr=0.1, epochs=3)
    for column, row in enumerate((1, 4)):
        expected = np.subtract(trained_by_hand(kind, [row], lr=0.1, epochs=3), base)
        np.testing.assert_allclose(found.actual[:, column], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("way", [uw.minibatch.Placed, uw.minibatch.Shuffled])
def test_stacked_training_in_small_batches_whose_padding_differs(kind, way):
    """Every batch is padded to its own longest row by whoever trains by hand, and to the longest of all in here."""
    without, seed, size = [1], 5, 2
    influence = uw.explain(built(kind), rows(kind), damping=1.0)
    spec = uw.StackedTraining(uw.minibatch.SGD(lr=0.1), way(size), epochs=2, factory=lambda: built(kind, 3))
    left = np.ones(len(ROWS))
    left[without] = 0
    (found,) = spec.bind(influence).many(left[None], [seed])
    model, own, draw = built(kind, 3), weights(kind) * left, np.random.default_rng([seed, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        order = draw.permutation(len(ROWS))
        if way is uw.minibatch.Shuffled:
            order = order[left[order] != 0]
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            optimizer.zero_grad()
            total = sum(own[k] * loss(model, rows(kind)[k])[0] for k in batch)
            (total / len(batch)).backward()
            optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    moved = expected - torch.cat([p.detach().reshape(-1) for p in built(kind, 3).parameters()])
    assert float((found - expected).abs().max()) < 1e-4 * float(moved.abs().max())
