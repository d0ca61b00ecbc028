"""What is said to type by upweight/training/trainers.py, typed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import upweight as uw
from refusals import refused
from upweight.errors import UnsupportedModel

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

DRAW = torch.Generator().manual_seed(0)
ROWS = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in torch.randint(1, 20, (8, 5), generator=DRAW)]


def small(*, dropout=0.0, kind=transformers.GPT2LMHeadModel):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=8,
        resid_pdrop=dropout,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return kind(config)


def trainer(folder, model=None, rows=None, collate=transformers.default_data_collator, more=None, **settings):
    known = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    known |= {"per_device_train_batch_size": 4, "max_steps": 2}
    arguments = transformers.TrainingArguments(str(folder), **{**known, **settings})
    return transformers.Trainer(
        small() if model is None else model,
        arguments,
        train_dataset=ROWS if rows is None else rows,
        data_collator=collate,
        **(more or {}),
    )


def trained(one):
    with uw.Recording.of_trainer(one) as recording:
        one.train()
    return uw.through(recording, since=0).on_loss(ROWS[:1], check=False).values


def test_what_is_no_trainer(tmp_path):
    model = small()
    with refused("is no Trainer of transformers", "uw.Recording(model, optimizer, X, y, loss=…)"):
        uw.Recording.of_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert uw.Recording(model, optimizer, ROWS).steps == []
    assert trained(trainer(tmp_path)).shape == (1, len(ROWS))


def test_rows_of_a_trainer_are_mappings(tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = [(row["input_ids"], row["labels"]) for row in ROWS]
    with refused("whose rows are not mappings known by their number", "datasets.Dataset.from_list(rows)"):
        uw.Recording.of_trainer(trainer(tmp_path, rows=pairs))
    assert trained(trainer(tmp_path, rows=datasets.Dataset.from_list(ROWS))).shape == (1, len(ROWS))


class Masking:
    """A collator that hides a token by chance."""

    def __call__(self, rows):
        batch = transformers.default_data_collator(rows)
        batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 0, batch["input_ids"])
        return batch


CHANCES = {
    "mixed precision": {"bf16": True},
    "dropout, in": {"model": {"dropout": 0.1}},
    "noise on the embeddings": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a compute_loss_func": {
        "more": {"compute_loss_func": lambda out, y, **_: cross_entropy(out.logits[:, 0], y[:, 0])}
    },
    "a batch size that is looked for": {"auto_find_batch_size": True},
    "another end than its last step": {
        **dict.fromkeys(("eval_strategy", "save_strategy"), "epoch"),
        "load_best_model_at_end": True,
        "more": {"eval_dataset": ROWS},
    },
    "a start from a checkpoint": {"resume_from_checkpoint": "there"},
    "a collator that makes other batches": {"collate": Masking()},
}


@pytest.mark.parametrize("what", CHANCES)
def test_a_training_that_cannot_be_made_again(what, tmp_path):
    settings = dict(CHANCES[what])
    model = small(**settings.pop("model", {}))
    with pytest.raises(UnsupportedModel, match=f"{what}.*Train with"):
        uw.Recording.of_trainer(trainer(tmp_path, model, **settings))


def test_a_trainer_of_what_can_be_made_again(tmp_path):
    with refused("is not recorded: its steps could not be made again", "Train with"):
        uw.Recording.of_trainer(trainer(tmp_path, small(dropout=0.1)))
    assert trained(trainer(tmp_path, small(dropout=0.0))).shape == (1, len(ROWS))
    with pytest.raises(UnsupportedModel, match=r"weights in bfloat16.*dtype=torch\.float32"):
        uw.Recording.of_trainer(trainer(tmp_path, small().bfloat16()))
    with pytest.raises(UnsupportedModel, match="Adafactor is not among the optimisers"):
        uw.Recording.of_trainer(trainer(tmp_path, optim="adafactor"))


def test_a_model_that_train_makes(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True)
    one = transformers.Trainer(args=arguments, train_dataset=ROWS, model_init=lambda: small())
    with refused("is not recorded: its steps could not be made again", "Train with ") as caught:
        uw.Recording.of_trainer(one)
    assert "Train with Trainer(model, …)" in str(caught.value)
    assert trained(trainer(tmp_path, small())).shape == (1, len(ROWS))


def test_a_trainer_that_goes_on_at_a_checkpoint(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    one = trainer(tmp_path, max_steps=3)
    recording = uw.Recording.of_trainer(one)
    with refused("has made steps already, which nobody recorded", "from its first step on"), recording:
        one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trained(trainer(tmp_path)).shape == (1, len(ROWS))


def padded(rows):
    """A batch of rows of several lengths."""
    parts = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    fill = {"input_ids": 0, "labels": -100}
    return {name: torch.nn.utils.rnn.pad_sequence(part, True, fill[name]) for name, part in parts.items()}


def test_how_labels_are_counted_is_seen_on_long_rows_too(tmp_path):
    rows = [{"input_ids": [3] * length, "labels": [3] * length} for length in (1200, 3)]
    model = small()
    model.transformer.wpe = torch.nn.Embedding(1200, 8)
    settings = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    one = trainer(tmp_path, model, rows, padded, **settings)
    with uw.Recording.of_trainer(one) as recording:
        one.train()
    assert [step.parts[0].scale for step in recording.steps] == pytest.approx([1199 / 1200, 2 / 3])


class Additional(transformers.GPT2LMHeadModel):
    """A model with a part of its loss that is no mean over labels."""

    def forward(self, input_ids=None, labels=None, output_router_logits=True, **named):
        out = super().forward(input_ids=input_ids, labels=labels, **named)
        if output_router_logits and out.loss is not None:
            out.loss = out.loss + 1.0
        return out


class Plain(Additional):
    """The same with that part switched off."""

    def forward(self, input_ids=None, labels=None, **named):
        return super().forward(input_ids, labels, output_router_logits=False, **named)


def test_a_loss_with_further_parts(tmp_path):
    with refused("where its num_items_in_batch divides it", "output_router_logits=False"):
        trained(trainer(tmp_path, small(kind=Additional)))
    assert trained(trainer(tmp_path, small(kind=Plain))).shape == (1, len(ROWS))
