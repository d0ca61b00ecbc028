"""transformers models by the front door: rows as people have them, the loss asked of the model, no loop over rows.

The oracle is the model itself on one unpadded row, differentiated by autograd.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import upweight as uw
from refusals import refused
from upweight.model import calculus

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "num_hidden_layers": 1, "max_position_embeddings": 32}
LENGTHS = (4, 7, 5, 9, 6, 4)
DRAW = np.random.default_rng(0)
TOKENS = [DRAW.integers(5, 50, length).tolist() for length in LENGTHS]


@cache
def built(kind):
    """A tiny model with random parameters, in float64 as it is explained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
        if kind == "gpt2":
            settings = transformers.GPT2Config(
                vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
            )
            model = transformers.GPT2LMHeadModel(settings)
        elif kind == "llama":
            settings = transformers.LlamaConfig(**SMALL, **size, num_key_value_heads=1, tie_word_embeddings=True)
            model = transformers.LlamaForCausalLM(settings)
        elif kind == "t5":
            settings = transformers.T5Config(
                vocab_size=50, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
            model = transformers.T5ForConditionalGeneration(settings)
        elif kind == "masked":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **size))
        else:
            settings = transformers.BertConfig(**SMALL, **size, num_labels=1 if kind == "bert score" else 3)
            classes = {"bert": "BertForSequenceClassification", "bert score": "BertForSequenceClassification"}
            model = getattr(transformers, classes.get(kind, "BertForTokenClassification"))(settings)
    return model.eval()


def rows(kind):
    """Rows of unequal length, as a tokenizer gives them, with labels as the kind of model has them."""
    found = [{"input_ids": tokens, "id": f"text {k}", "text": "words"} for k, tokens in enumerate(TOKENS)]
    for k, row in enumerate(found):
        length = len(row["input_ids"])
        if kind == "bert":
            row["label"] = k % 3
        elif kind == "bert score":
            row["label"] = k / 4 + 0.5
        elif kind == "t5":
            row["labels"] = TOKENS[(k + 1) % len(TOKENS)][: 2 + k % 3]
        elif kind == "masked":
            row["labels"] = [token if place % 2 else -100 for place, token in enumerate(row["input_ids"])]
        elif kind == "tags":
            row["labels"] = [place % 3 for place in range(length)]
    return found


def alone(model, row, kind):
    """The loss that the model computes for one row, unpadded, and how many of its labels count in a mean."""
    inputs = {"input_ids": torch.tensor([row["input_ids"]])}
    labels = row.get("labels", row.get("label", row["input_ids"]))
    target = torch.tensor([labels])
    shift = 1 if kind in {"gpt2", "llama"} else 0
    counted = 1 if target.ndim == 1 else int((target[:, shift:] != -100).sum())
    return model(**inputs, labels=target).loss, counted


KINDS = ["gpt2", "llama", "t5", "masked", "tags", "bert", "bert score"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_model_itself_on_a_row_alone(kind):
    model, data = built(kind), rows(kind)
    influence = uw.explain(model, data, damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG())
    assert influence.objective.route.examples == "vmap", "no loop over rows"
    assert influence.examples.ids.tolist() == [row["id"] for row in data]
    ours = calculus.gradients(influence.objective, influence.examples.batch(range(len(data))))
    parameters = list(model.parameters())
    counts = np.zeros(len(data))
    for k, row in enumerate(data):
        loss, counts[k] = alone(model, row, kind)
        expected = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, expected, strict=True)]
        )
        torch.testing.assert_close(ours[k].float(), flat, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(influence.examples.weights, counts / counts.mean(), rtol=1e-12)


def test_the_risk_is_the_mean_over_tokens_of_a_padded_batch():
    model, data = built("llama"), rows("llama")
    influence = uw.explain(model, data, damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG())
    longest = max(LENGTHS)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in TOKENS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in TOKENS])
    loss = model(input_ids=ids, attention_mask=mask, labels=torch.where(mask > 0, ids, -100)).loss
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(influence.system.risk_gradient.float(), expected, rtol=1e-4, atol=1e-6)


def test_a_row_that_is_left_out_takes_its_tokens_along():
    """−dL/dε of the paper's ε at wᵢ: the same as moving the objective's own weights, by a dense solve."""
    model, data = built("bert"), rows("bert")
    head = uw.explain(model, data, parameters=["classifier.weight", "classifier.bias"], damping=0.1)
    assert head.objective.size == 27
    values = head.on_loss(data[:2]).values
    batch = head.examples.batch(range(len(data)))
    G = calculus.gradients(head.objective, batch)
    curvature = head.system.operator.dense() if hasattr(head.system.operator, "dense") else None
    hessian = torch.stack([calculus.hvp(head.objective, batch, one[None])[0] for one in torch.eye(27).double()])
    C = curvature if curvature is not None else hessian / len(data)
    expected = (G[:2] @ torch.linalg.solve(C + 0.1 * torch.eye(27).double(), G.T)) / len(data)
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5, atol=1e-9)


def test_the_same_rows_in_every_form():
    model, data = built("bert"), rows("bert")
    settings = {"damping": 1.0, "parameters": ["classifier.weight"]}
    expected = uw.explain(model, data, **settings).on_loss(data[:2]).values
    longest = max(LENGTHS)
    columns = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in TOKENS]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in TOKENS]),
    }
    labels = [row["label"] for row in data]

    def collate(items):
        ids = [torch.tensor(item["input_ids"]) for item in items]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=7)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([item["label"] for item in items])}

    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
    for X, y in (({**columns, "labels": labels}, None), (columns, labels), (loader, None)):
        influence = uw.explain(model, X, y, **settings)
        np.testing.assert_allclose(influence.on_loss(data[:2]).values, expected, rtol=1e-9, atol=1e-12)
        query = {name: column[:2] for name, column in columns.items()}
        np.testing.assert_allclose(influence.on_loss(query, labels[:2]).values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", "columns", "transform"])
def test_a_dataset_in_every_format(kind):
    stored = pytest.importorskip("datasets").Dataset.from_list(rows("bert"))
    if kind == "columns":
        data = stored.with_format("torch", columns=["input_ids", "label"])
    elif kind == "transform":
        data = stored.with_transform(lambda batch: {"input_ids": batch["input_ids"], "labels": batch["label"]})
    else:
        data = stored.with_format(kind)
    settings = {"damping": 1.0, "parameters": ["classifier.weight"]}
    ours, expected = (uw.explain(built("bert"), one, **settings) for one in (data, rows("bert")))
    assert ours.examples.ids.tolist() == expected.examples.ids.tolist()
    np.testing.assert_array_equal(ours.on_loss(data.select([0, 1])).values, expected.on_loss(rows("bert")[:2]).values)


def test_padding_on_the_left_is_the_users_and_is_kept():
    model = built("llama")
    longest = max(LENGTHS)
    left = [
        {
            "input_ids": [0] * (longest - len(tokens)) + tokens,
            "attention_mask": [0] * (longest - len(tokens)) + [1] * len(tokens),
            "position_ids": [0] * (longest - len(tokens)) + list(range(len(tokens))),
            "labels": [-100] * (longest - len(tokens) + 1) + tokens[1:],
        }
        for tokens in TOKENS
    ]
    settings = {"damping": 1.0, "curvature": uw.operators.Hessian(), "solver": uw.solvers.CG()}
    first, second = (uw.explain(model, data, **settings) for data in (left, rows("llama")))
    ours, theirs = (
        calculus.gradients(one.objective, one.examples.batch(range(len(TOKENS)))) for one in (first, second)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(first.examples.weights, second.examples.weights)


def test_the_users_model_is_as_it_was():
    import transformers.masking_utils as masking

    model, before = built("gpt2"), masking.is_tracing
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    uw.explain(model, rows("gpt2"), damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG())
    assert masking.is_tracing is before
    assert model.config._attn_implementation == attention
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loss_of_ones_own_takes_the_logits():
    model, data = built("bert"), rows("bert")
    settings = {"damping": 1.0, "parameters": ["classifier.weight"]}
    expected = uw.explain(model, data, **settings).on_loss(data[:2]).values
    for loss in (cross_entropy, lambda output, y: cross_entropy(output.logits, y)):
        found = uw.explain(model, data, loss=loss, **settings).on_loss(data[:2]).values
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_loss_with_more_in_it_is_refused_by_its_value():
    class Scaled(transformers.BertForSequenceClassification):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.loss = None if output.loss is None else 2 * output.loss
            return output

    model = Scaled(built("bert").config).eval()
    with refused("computes a loss of", "loss=lambda output, y: mse_loss(output.logits, y)"):
        uw.explain(model, rows("bert"), damping=1.0)
    influence = uw.explain(
        model,
        rows("bert"),
        loss=lambda o, y: 2 * cross_entropy(o.logits, y),
        damping=1.0,
        parameters=["classifier.bias"],
    )
    assert np.isfinite(influence.on_loss(rows("bert")[:1]).values).all()


@pytest.mark.parametrize("kind", ["gpt2", "t5", "masked", "tags"])
def test_a_criterion_of_classes_finds_the_labels_of_tokens_where_the_model_does(kind):
    model, data = built(kind), rows(kind)
    settings = {"damping": 1.0, "curvature": uw.operators.Hessian(), "solver": uw.solvers.CG()}
    own, plain = (uw.explain(model, data, loss=loss, **settings) for loss in (None, torch.nn.CrossEntropyLoss()))
    batch = own.examples.batch(range(len(data)))
    torch.testing.assert_close(*(calculus.gradients(one.objective, batch) for one in (own, plain)), rtol=0, atol=0)
    np.testing.assert_array_equal(own.examples.weights, plain.examples.weights)
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    influence = uw.explain(model, data, loss=smoothed, **settings)
    ours = calculus.gradients(influence.objective, batch)
    shift = 1 if kind == "gpt2" else 0
    for k, row in enumerate(data):
        labels = torch.tensor(row.get("labels", row["input_ids"]))
        logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels[None]).logits[0]
        loss = smoothed(logits[: len(logits) - shift], labels[shift:])
        theirs = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), theirs, strict=True)]
        flat = torch.cat([one.reshape(-1) for one in flat])
        torch.testing.assert_close(ours[k].float(), flat, rtol=1e-4, atol=1e-6)


def test_a_criterion_that_fails_on_logits_is_told_what_failed():
    with refused("and the criterion does not take it (Expected target size", "Pass a criterion of the whole output"):
        uw.explain(built("llama"), rows("llama"), loss=lambda output, y: cross_entropy(output.logits, y))
    plain = torch.nn.Linear(3, 2)
    for loss in (lambda output, y: output.logits[y], lambda _, y: {}[int(y[0])]):
        with refused("The loss failed on one example", "that of a module as loss(output, target) of a batch"):
            uw.explain(plain, torch.ones(4, 3), torch.ones(4).long(), loss=loss)


def test_rows_without_labels():
    model = built("bert")
    plain = [{"input_ids": tokens} for tokens in TOKENS]
    with refused("has no labels", "Pass rows with the column 'labels'"):
        uw.explain(model, plain, damping=1.0)
    labelled = [{**row, "labels": k % 3} for k, row in enumerate(plain)]
    assert uw.explain(model, labelled, damping=1.0, parameters=["classifier.bias"]).n == len(TOKENS)


def classifier_of_last_tokens(pad):
    settings = transformers.LlamaConfig(
        **SMALL, hidden_size=8, num_attention_heads=2, intermediate_size=12, num_labels=3, pad_token_id=pad
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(settings).eval()


def test_an_answer_read_off_the_last_token_needs_to_know_which_that_is():
    data = [{"input_ids": tokens, "labels": k % 3} for k, tokens in enumerate(TOKENS)]
    model = classifier_of_last_tokens(None)
    with refused("and not beside the longer row", "Set model.config.pad_token_id to the tokenizer's pad_token_id"):
        uw.explain(model, data, damping=1.0)
    model.config.pad_token_id = 1
    influence = uw.explain(model, data, damping=1.0, parameters=["score.weight"])
    ours = calculus.gradients(influence.objective, influence.examples.batch(range(len(data))))
    for row, item in enumerate(data):
        loss = model(input_ids=torch.tensor([item["input_ids"]]), labels=torch.tensor([item["labels"]])).loss
        (theirs,) = torch.autograd.grad(loss, [model.score.weight])
        torch.testing.assert_close(ours[row].float(), theirs.reshape(-1), rtol=1e-4, atol=1e-6)


def packed(rows):
    """Rows as a flattening collator stores them: one after another, with places that begin again."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
        "labels": [label for row in rows for label in [-100, *row["input_ids"][1:]]],
    }


def test_packed_rows_are_their_sequences():
    model = built("llama")
    plain = [{"input_ids": tokens} for tokens in TOKENS]
    together = [packed(plain[:2]), packed(plain[2:5]), packed(plain[5:])]
    lengths = [len(tokens) for tokens in TOKENS]
    listed = [
        {"input_ids": one["input_ids"], "seq_lengths": some, "id": name}
        for one, some, name in zip(together, (lengths[:2], lengths[2:5], lengths[5:]), "abc", strict=True)
    ]
    settings = {"damping": 1.0, "curvature": uw.operators.Hessian(), "solver": uw.solvers.CG()}
    expected = uw.explain(model, plain, **settings)
    G = calculus.gradients(expected.objective, expected.examples.batch(range(len(plain))))
    for rows, names in ((together, (0, 1, 2)), (listed, "abc")):
        found = uw.explain(model, rows, **settings)
        assert found.examples.ids.tolist() == [
            (names[row], k) for row, k in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
        ]
        ours = calculus.gradients(found.objective, found.examples.batch(range(len(plain))))
        torch.testing.assert_close(ours, G, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.examples.weights, expected.examples.weights)
    queries = found.encoder.examples([together[0]])
    assert queries.ids.tolist() == [(0, 0), (0, 1)]


def test_a_flattening_collator_gives_rows_back():
    model = built("llama")
    loader = DataLoader(
        [{"input_ids": tokens} for tokens in TOKENS],
        batch_size=3,
        collate_fn=transformers.DataCollatorWithFlattening(return_tensors="pt"),
    )
    settings = {"damping": 1.0, "curvature": uw.operators.Hessian(), "solver": uw.solvers.CG()}
    ours, theirs = (uw.explain(model, rows, **settings) for rows in (loader, rows("llama")))
    torch.testing.assert_close(ours.system.risk_gradient, theirs.system.risk_gradient, rtol=1e-9, atol=1e-12)


def test_gpt2_padded_on_the_left_is_explained_as_it_was_trained():
    """Without position_ids padding moves the places of the tokens, and so the loss: rows are kept as they are."""
    model, longest = built("gpt2"), max(LENGTHS)
    left = [
        {
            "input_ids": [0] * (longest - len(tokens)) + tokens,
            "attention_mask": [0] * (longest - len(tokens)) + [1] * len(tokens),
            "labels": [-100] * (longest - len(tokens) + 1) + tokens[1:],
        }
        for tokens in TOKENS
    ]
    influence = uw.explain(model, left, damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG())
    ours = calculus.gradients(influence.objective, influence.examples.batch(range(len(left))))
    moved = 0.0
    for k, row in enumerate(left):
        inputs = {name: torch.tensor([value]) for name, value in row.items()}
        theirs = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
        torch.testing.assert_close(ours[k].float(), torch.cat([g.reshape(-1) for g in theirs]), rtol=1e-4, atol=1e-6)
        unpadded = alone(model, {"input_ids": TOKENS[k]}, "gpt2")[0]
        moved = max(moved, abs(float(model(**inputs).loss.detach() - unpadded.detach())))
    assert moved > 1e-3


def test_pictures():
    draw = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    settings = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(settings).eval()
    pixels = torch.rand(8, 3, 8, 8, generator=draw)
    data = [{"pixel_values": one, "labels": k % 3} for k, one in enumerate(pixels)]
    influence = uw.explain(model, data)
    ours = calculus.gradients(influence.objective, influence.examples.batch(range(8)))
    for k, row in enumerate(data):
        loss = model(pixel_values=row["pixel_values"][None], labels=torch.tensor([row["labels"]])).loss
        theirs = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(ours[k].float(), torch.cat([g.reshape(-1) for g in theirs]), rtol=1e-4, atol=1e-6)
    scores = influence.on_loss(data[:2])
    assert scores.values.shape == (2, 8)
    C, lam = influence.operator.matrix(), influence.damping
    expected = ours[:2] @ torch.linalg.solve(C + lam * torch.eye(len(C), dtype=C.dtype), ours.T.double()) / 8
    np.testing.assert_allclose(scores.values, expected.numpy(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_probed_row_runs_once_alone_and_once_among_others():
    """What `explain` runs before anything is asked: few rows are differentiated, the others only compared."""
    model, data = built("gpt2"), [{"input_ids": DRAW.integers(5, 50, 9).tolist()} for _ in range(60)]
    runs, vmapped = dict.fromkeys((tuple(row["input_ids"]) for row in data), 0), 0

    def note(module, args, named):
        nonlocal vmapped
        if torch._C._functorch.is_batchedtensor(named["input_ids"]):
            vmapped += 1
            return
        for tokens in named["input_ids"].tolist():
            runs[tuple(tokens)] += 1

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        uw.explain(model, data)
    finally:
        handle.remove()
    counts = sorted(runs.values(), reverse=True)
    compared = counts[4 + 3 :]  # not those whose loss or derivatives are looked at
    assert set(compared) == {0, 2}, counts
    assert sum(counts) <= 115, "passes of single rows"
    assert vmapped <= 8, "routes are tried once"
