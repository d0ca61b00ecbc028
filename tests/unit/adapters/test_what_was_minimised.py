"""∇R of the objective is the gradient that transformers' Trainer and trl's SFTTrainer step by, factor included.

The oracle is one step of the trainer itself with SGD of learning rate 1: θ before minus θ after.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import upweight as uw

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PAD = 0
LENGTHS = (4, 7, 5, 9, 6, 4)
DRAW = np.random.default_rng(0)
ROWS = [{"input_ids": DRAW.integers(5, 50, length).tolist()} for length in LENGTHS]
FACTOR = sum(length - 1 for length in LENGTHS) / sum(LENGTHS)


class Plain(transformers.GPT2LMHeadModel):
    """One whose forward takes no further keywords, so that the Trainer takes means of means."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def gpt2(kind=transformers.GPT2LMHeadModel):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
        return kind(transformers.GPT2Config(**sizes, **none, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)).eval()


def llama():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=50, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
        return transformers.LlamaForCausalLM(config).eval()


def settings(folder, batch=6, steps=1):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def collate(rows):
    """Padded at the right, with −100 for what is no token."""
    longest = max(len(row["input_ids"]) for row in rows)
    behind = [longest - len(row["input_ids"]) for row in rows]
    own = [row.get("labels", row["input_ids"]) for row in rows]
    parts = {
        "input_ids": [row["input_ids"] + [PAD] * k for row, k in zip(rows, behind, strict=True)],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * k for row, k in zip(rows, behind, strict=True)],
        "labels": [labels + [-100] * k for labels, k in zip(own, behind, strict=True)],
    }
    return {name: torch.tensor(part) for name, part in parts.items()}


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def stepped(trainer):
    """θ before a step of learning rate 1, minus θ after: the gradient that the trainer steps by."""
    before = flat(trainer.model).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return before - flat(trainer.model)


def trained(model, folder, rows=ROWS, kind=transformers.Trainer, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(**settings(folder, **how), remove_unused_columns=False)
        return stepped(kind(model=model, args=arguments, train_dataset=rows, data_collator=collate))


def risk_gradient(model, rows=ROWS, **asked):
    influence = uw.explain(model, rows, damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG(), **asked)
    return influence.system.risk_gradient.float()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"batch": 2, "steps": 3}, {"batch": 1, "steps": 6}], ids=str)
def test_a_trainer_steps_by_the_objective_s_gradient(tmp_path, how):
    close(risk_gradient(llama()), trained(llama(), tmp_path, **how))


@pytest.mark.parametrize("how", [{}, {"batch": 2, "steps": 3}, {"batch": 1, "steps": 6}], ids=str)
def test_a_trainer_that_knows_no_causal_model_by_its_name_divides_by_the_labels_before_the_shift(tmp_path, how):
    expected = risk_gradient(gpt2())
    close(FACTOR * expected, trained(gpt2(), tmp_path, **how))


@pytest.mark.parametrize("how", [{}, {"batch": 2, "steps": 3}], ids=str)
def test_it_divides_by_the_same_where_the_first_label_is_not_counted(tmp_path, how):
    rows = [{**row, "labels": [-100] * (1 + k % 3) + row["input_ids"][1 + k % 3 :]} for k, row in enumerate(ROWS)]
    close(risk_gradient(gpt2(), rows), trained(gpt2(), tmp_path, rows, **how))


def test_a_model_that_takes_no_keywords_is_trained_on_means_of_means(tmp_path):
    rows = risk_gradient(gpt2(Plain), reduction="rows")
    close(rows, trained(gpt2(Plain), tmp_path, batch=1, steps=6))
    tokens = risk_gradient(gpt2(Plain))
    close(tokens, trained(gpt2(Plain), tmp_path, batch=6))
    assert float((rows - tokens).norm() / tokens.norm()) > 0.1


def test_a_loss_that_ignores_the_number_of_items_is_multiplied_by_the_steps(tmp_path):
    class Ignoring(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return cross_entropy(logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:])

    close(6 * risk_gradient(gpt2(), reduction="rows"), trained(gpt2(), tmp_path, kind=Ignoring, batch=1, steps=6))
    close(risk_gradient(gpt2()), trained(gpt2(), tmp_path, kind=Ignoring))


def test_values_of_a_scaled_risk():
    """c·R has the values of R where damping is C's own, and those of λ/c where it is named: what the page says."""
    draw = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 3, generator=draw, dtype=torch.float64), torch.randint(0, 3, (30,), generator=draw)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    c = 0.8

    def values(factor, **asked):
        influence = uw.explain(net, X, y, loss=lambda f, t: factor * cross_entropy(f, t), **asked)
        return influence.on_loss(X[:2], y[:2]).values / factor  # in the unit of the query's own loss

    np.testing.assert_allclose(values(c), values(1.0), rtol=1e-8)
    np.testing.assert_allclose(values(c, damping=0.1), values(1.0, damping=0.1 / c), rtol=1e-8)
    folded = {"penalty_per_example": False, "damping": 0.0}
    np.testing.assert_allclose(values(c, penalty=0.1, **folded), values(1.0, penalty=0.1 / c, **folded), rtol=1e-8)


def tokenizer():
    """Words w0 … w49 of a vocabulary of 50, without a model hub."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {**{"<pad>": PAD, "<bos>": 1, "<eos>": 2, "<unk>": 3}, **{f"w{k}": k for k in range(4, 50)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("how", [{}, {"batch": 2, "steps": 2}], ids=str)
def test_supervised_fine_tuning_counts_completions(tmp_path, how):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    draw = np.random.default_rng(1)

    def words(count):
        return " ".join(f"w{k}" for k in draw.integers(4, 50, count))

    lengths = [(3, 4), (5, 2), (14, 3), (2, 6), (4, 3)]  # the third has no room for its completion
    texts = [{"prompt": words(a), "completion": " " + words(b), "id": f"text {k}"} for k, (a, b) in enumerate(lengths)]
    model = gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = trl.SFTConfig(**{**settings(tmp_path, **{"batch": 4, **how}), "max_length": 12, "bf16": False})
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(texts), processing_class=tokenizer()
        )
    rows = trainer.train_dataset
    gradient = stepped(trainer)
    influence = uw.explain(gpt2(), rows, damping=1.0, curvature=uw.operators.Hessian(), solver=uw.solvers.CG())
    assert influence.examples.ids.tolist() == ["text 0", "text 1", "text 3", "text 4"]
    counted = np.array([b + 1 for k, (_, b) in enumerate(lengths) if k != 2])  # the end of the text is one, too
    np.testing.assert_allclose(influence.examples.weights, counted / counted.mean())
    close(influence.system.risk_gradient.float(), gradient)
