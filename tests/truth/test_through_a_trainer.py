"""The derivative through a Trainer's own training is what real Trainers with other weights of a row do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import upweight as uw

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROUGH = {"Llama": (1e-3, 5e-4)}  # its norms compute in float32, whatever its weights are


def made(seed, count):
    """Rows of a language model, and of a classifier: some labels are not counted."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        length = 4 + int(torch.randint(0, 4, (1,), generator=draw))
        ids = torch.randint(1, 20, (length,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]] if k % 3 else ids, "weight": 1.0, "text": "…"})
    return found


class Padding:
    """A collator, with the weights of the rows where they have any."""

    def __init__(self, classes=False):
        self.classes = classes

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def stacked(name, fill):
            return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

        batch = {"input_ids": stacked("input_ids", 0)}
        batch["attention_mask"] = (batch["input_ids"] > 0).long()
        batch["labels"] = torch.tensor([row["labels"] for row in rows]) if self.classes else stacked("labels", -100)
        if "weight" in rows[0]:
            batch["weight"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
        return batch


NONE = {"bos_token_id": None, "eos_token_id": None}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **NONE
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        **NONE,
    )
    return transformers.LlamaForCausalLM(config)


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(gpt2(), config)


def bert():
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


MODELS = {"GPT-2": gpt2, "Llama": llama, "LoRA": lora, "BERT": bert}


def rows_for(name, seed=0, count=14):
    rows = made(seed, count)
    return [{**row, "labels": sum(row["input_ids"]) % 3} for row in rows] if name == "BERT" else rows


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def arguments(folder, **more):
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    return transformers.TrainingArguments(str(folder), **settings)


class Weighing(transformers.Trainer):
    """A Trainer whose rows have weights: the only difference to the plain one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        weights, labels = inputs.pop("weight"), inputs.pop("labels")
        logits = model(**inputs).logits
        if labels.ndim == 1:
            return (weights * cross_entropy(logits, labels, reduction="none")).mean()
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return (weights[:, None] * losses).sum() / num_items_in_batch


def losses_after(name, folder, queries, row, move, settings):
    """Query losses after a real training in which one row weighs 1 + move."""
    rows = rows_for(name)
    rows[row] = {**rows[row], "weight": 1 + move}
    model = built(name)
    trainer = Weighing(
        model,
        arguments(folder, remove_unused_columns=False, **settings),
        train_dataset=rows,
        data_collator=Padding(name == "BERT"),
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        return np.array([float(own_loss(model, query, name)) for query in queries])


def own_loss(model, query, name):
    batch = Padding(name == "BERT")([{part: query[part] for part in ("input_ids", "labels")}])
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if name == "BERT":
        return cross_entropy(logits, labels)
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def recorded(name, folder, rows=None, **settings):
    model = built(name)
    rows = rows_for(name) if rows is None else rows
    trainer = transformers.Trainer(
        model, arguments(folder, **settings), train_dataset=rows, data_collator=Padding(name == "BERT")
    )
    recording = uw.Recording.of_trainer(trainer)
    with recording:
        trainer.train()
    return recording


# peft 0.21 reads a name of transformers 5.23 that this warns about
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CASES = [
    ("GPT-2", {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}),
    ("Llama", {"gradient_accumulation_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0}),
    ("LoRA", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
    ("BERT", {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])
def test_it_is_the_derivative_of_real_trainers(name, settings, tmp_path):
    recording = recorded(name, tmp_path, **settings)
    queries = rows_for(name, seed=5, count=2)
    through = uw.through(recording, since=0, second_moment="through")
    values = through.on_loss(queries, check=False).values
    rows, (size, error) = [0, 4, 11], ROUGH.get(name, (1e-4, 1e-4))
    sides = [[losses_after(name, tmp_path, queries, row, move, settings) for move in (-size, size)] for row in rows]
    expected = np.stack([(below - above) / (2 * size) for below, above in sides], 1)
    np.testing.assert_allclose(values[:, rows], expected, atol=error * np.abs(expected).max(), rtol=1e-3)


@pytest.mark.parametrize("name", ["GPT-2", "LoRA"])
def test_steps_made_again_end_at_the_same_parameters(name, tmp_path):
    recording = recorded(name, tmp_path, gradient_accumulation_steps=3, num_train_epochs=1)
    through = uw.through(recording, since=0)
    first, _ = through.way.begun(0)
    last, _ = through.way.begun(len(recording.steps))
    made = through.way.ended(torch.ones(through.influence.n, dtype=torch.float64), 0)
    assert float((made - last).norm()) < 1e-4 * float((last - first).norm())


def test_a_trainer_that_was_recorded_in_a_folder_is_gone_through_later(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows_for("LoRA")]
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    trainer = transformers.Trainer(
        built("LoRA"), arguments(tmp_path, **settings), train_dataset=rows, data_collator=Padding()
    )
    with uw.Recording.of_trainer(trainer, store=tmp_path / "training") as recording:
        trainer.train()
    queries = rows[:2]
    later = uw.Recording.open(tmp_path / "training", built("LoRA"), rows, collate_fn=Padding())
    assert later.digest == recording.trajectory.digest
    expected = uw.through(recorded("LoRA", tmp_path, rows, **settings), since=0).on_loss(queries, check=False).values
    np.testing.assert_array_equal(uw.through(later, since=0).on_loss(queries, check=False).values, expected)


def transformed(rows):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows).with_transform(
        lambda some: {name: some[name] for name in ("input_ids", "labels")}
    )


@pytest.mark.parametrize("kind", [lambda rows: torch.utils.data.Subset(rows, range(len(rows))), transformed])
def test_rows_that_are_asked_for_in_batches_or_made_on_the_way_have_numbers(kind, tmp_path):
    rows, settings = rows_for("GPT-2"), {"optim": "sgd", "num_train_epochs": 1}
    queries = rows_for("GPT-2", seed=5, count=1)
    known, found = (
        uw.through(recorded("GPT-2", tmp_path, one, **settings)).on_loss(queries, check=False).values
        for one in (rows, kind(rows))
    )
    np.testing.assert_array_equal(found, known)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl 1.16 sets the old name itself
def test_a_trainer_of_trl(tmp_path):
    """Whose forward is another function, and whose steps are the same when they are made again."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{k}": k for k in range(20)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1")),
        pad_token="w0",
        eos_token="w2",
        unk_token="w1",
    )
    rows = [{part: row[part] for part in ("input_ids", "labels")} for row in made(0, 14)]
    arguments = trl.SFTConfig(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        llama(), arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    recording = uw.Recording.of_trainer(trainer)
    with recording:
        trainer.train()
    values = uw.through(recording).on_loss(made(5, 2), check=False).values
    assert values.shape == (2, 14)
    assert np.abs(values).max() > 0
