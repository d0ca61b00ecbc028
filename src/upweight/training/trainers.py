"""A Trainer of transformers as the source of a recording: whose rows a batch holds, and what its loss is multiplied by.

Row numbers travel with the rows, as one more column through the collator, so that samplers, workers and accumulation
stay as they are; they are taken out again before the model sees the batch. A batch's mean loss was multiplied by

    counted labels of the batch / num_items_in_batch     where the model's loss is a sum that this divides
    1 / batches that are accumulated                     where Trainer divides a mean
    1                                                    where nobody divides: the model takes the number, unused

and which of them it is, is read off the loss of the first batch, with the number and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight.errors import InvalidInput, UnsupportedModel

ROW = "upweight_row"  # the column of row numbers
_AGREES = 1e-3  # of a count of labels that is read off a loss
_HALF = (torch.float16, torch.bfloat16)


def arguments_of(trainer: Any) -> dict[str, Any]:
    """What a Recording is told about the training that a Trainer is about to make.

    Raises:
        InvalidInput: if it is no Trainer, or its rows are no mappings that are known by number.
        UnsupportedModel: if its training cannot be made again.
    """
    for name in ("training_step", "get_train_dataloader", "create_optimizer", "train_dataset", "data_collator", "args"):
        if not hasattr(trainer, name):
            message = (
                f"{type(trainer).__name__} is no Trainer of transformers: it has no {name}. Record a loop of your own "
                "with uw.Recording(model, optimizer, X, y, loss=…)."
            )
            raise InvalidInput(message)
    rows = trainer.train_dataset
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or not isinstance(rows[0], Mapping):
        message = (
            f"The train_dataset is {type(rows).__name__}, whose rows are not mappings known by their number. Pass a "
            "Dataset with a length whose rows are dicts, such as datasets.Dataset.from_list(rows)."
        )
        raise InvalidInput(message)
    _refuse(trainer)
    trainer.create_optimizer()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    most = trainer.args.max_grad_norm
    return {
        "model": trainer.model,
        "optimizer": optimizer,
        "X": _Rows(trainer),
        "clip": float(most) if most and most > 0 else None,
        "settings": {"collate_fn": trainer.data_collator},
    }


def _refuse(trainer: Any) -> None:
    """Raises where a training has parts that are not recorded.

    Raises:
        UnsupportedModel: with their names.
    """
    args, model = trainer.args, trainer.model
    half = sorted({str(one.dtype)[6:] for one in model.parameters() if one.requires_grad and one.dtype in _HALF})
    noisy = next(_random_parts(model), None)
    found = [
        (args.fp16 or args.bf16, "mixed precision (fp16 or bf16)", "TrainingArguments(fp16=False, bf16=False)"),
        (half, f"weights in {' and '.join(half)}", "from_pretrained(…, dtype=torch.float32)"),
        (args.world_size > 1, f"{args.world_size} processes", "one process"),
        (args.n_gpu > 1, f"{args.n_gpu} devices side by side", "CUDA_VISIBLE_DEVICES=0"),
        (noisy, f"dropout, in {noisy}", "dropouts of 0 in the model's config, and lora_dropout=0"),
        (args.neftune_noise_alpha, "noise on the embeddings", "TrainingArguments(neftune_noise_alpha=None)"),
        (args.label_smoothing_factor, "label smoothing", "TrainingArguments(label_smoothing_factor=0)"),
        (trainer.compute_loss_func, "a compute_loss_func", "the model's own loss"),
        (args.auto_find_batch_size, "a batch size that is looked for", "TrainingArguments(auto_find_batch_size=False)"),
        (
            args.load_best_model_at_end,
            "another end than its last step",
            "TrainingArguments(load_best_model_at_end=False)",
        ),
        (trainer.model_init, "a model_init (train() makes another model by it)", "Trainer(model, …)"),
        (args.resume_from_checkpoint, "a start from a checkpoint", "TrainingArguments(resume_from_checkpoint=None)"),
        (_changes(trainer), "a collator that makes other batches of the same rows", "one without chance"),
    ]
    for is_so, what, instead in found:
        if is_so:
            message = (
                f"A training with {what} is not recorded: its steps could not be made again. Train with {instead}; "
                "scores at the end of any training are uw.explain(model, …)."
            )
            raise UnsupportedModel(message)


def _random_parts(model: nn.Module) -> Iterator[str]:
    """Modules that drop something, whether as modules or by a number of their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"'{name}' (p={module.p})"
        for own, value in vars(module).items():
            if "drop" in own and isinstance(value, float) and value > 0:
                yield f"'{name}' ({own}={value})"


def _changes(trainer: Any) -> bool:
    """Whether the collator makes something else of the same rows the second time."""
    rows = _Rows(trainer)
    few = [rows[row] for row in range(min(4, len(rows)))]
    first, second = (trainer.data_collator([dict(row) for row in few]) for _ in range(2))
    return any(
        isinstance(value, Tensor) and not torch.equal(value, second[name]) for name, value in dict(first).items()
    )


class _Rows:
    """The rows as a Trainer hands them to its collator: without the columns that the model does not take."""

    def __init__(self, trainer: Any) -> None:
        self.rows = trainer.train_dataset
        trainer._set_signature_columns_if_needed()
        self.names = [name for name in trainer._signature_columns if name != ROW]
        self.whole = not trainer.args.remove_unused_columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value for name, value in self.rows[row].items() if self.whole or name in self.names}

    @property
    def ids(self) -> Any:
        """The column `id` or `idx` of the rows; None if they have none."""
        names = [name for name in ("id", "idx") if name in self.rows[0]]
        return [self.rows[row][names[0]] for row in range(len(self))] if names else None


class _Numbered(torch.utils.data.Dataset[Any]):
    """Rows that carry their number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], ROW: int(row)}

    def __getattr__(self, name: str) -> Any:
        if name == "rows" or name.startswith("__"):  # asked for by copying before it is there; or rows without numbers
            raise AttributeError(name)
        return getattr(self.rows, name)


class _Collating:
    """A collator that passes row numbers by another."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator([{name: value for name, value in row.items() if name != ROW} for row in rows])
        batch[ROW] = torch.tensor([int(row[ROW]) for row in rows])
        return batch


def _numbered(rows: Any) -> Any:
    plain = hasattr(rows, "add_column") and rows.format["type"] is None and rows.format["columns"] == rows.column_names
    if plain:  # a Dataset of Hugging Face stays one, but for formats and transforms, which may leave a column out
        return rows.add_column(ROW, list(range(len(rows))))
    return _Numbered(rows)


@contextmanager
def watched(trainer: Any, recording: Any) -> Iterator[None]:
    """While the Trainer trains, the recording is told the rows and the scale of every batch.

    Raises:
        UnsupportedModel: if the loss is no mean or sum over labels.
    """
    make, train = trainer.get_train_dataloader, trainer.training_step
    reader = _Scale(trainer)

    def get_train_dataloader() -> Any:
        trainer._set_signature_columns_if_needed()
        kept = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
        trainer.train_dataset, trainer.data_collator = _numbered(kept[0]), _Collating(kept[1])
        trainer._signature_columns = [*kept[2], ROW]
        try:
            return make()
        finally:
            trainer.train_dataset, trainer.data_collator, trainer._signature_columns = kept

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        rows = inputs.pop(ROW)
        scale = reader(model, inputs, num_items_in_batch)
        loss = train(model, inputs, num_items_in_batch)
        recording.batch(rows, scale)
        return loss

    trainer.get_train_dataloader, trainer.training_step = get_train_dataloader, training_step
    try:
        yield
    finally:
        del trainer.get_train_dataloader, trainer.training_step


class _Scale:
    """What the mean loss of each batch is multiplied by, in a Trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.shift: int | None = None  # of the labels that are counted; None where no number divides the loss
        self.known = False

    def __call__(self, model: Any, inputs: Any, items: Any) -> float:
        if not self.known:
            self.shift = None if items is None else self._read(model, inputs)
            self.known = True
        if self.shift is not None and items is not None:
            return float(_counted(inputs["labels"], self.shift) / float(items))
        told = self.trainer.loss_is_scaled_for_ga
        whole = (self.trainer.model_accepts_loss_kwargs and items is not None) if told is None else told
        return 1.0 if whole else 1.0 / self.trainer.current_gradient_accumulation_steps

    def _read(self, model: Any, inputs: Any) -> int | None:
        """How far the counted labels are shifted; None if the loss is a mean whatever the number is."""
        model.train()
        ready = self.trainer._prepare_inputs(inputs)
        probe = 2 * ready["labels"].numel() + 7  # a number of labels that the batch has not
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            mean, divided = (
                float(self.trainer.compute_loss(model, dict(ready), num_items_in_batch=number))
                for number in (None, torch.tensor(probe))
            )
        count = divided * probe / mean if mean else float("nan")
        if abs(count / probe - 1) < _AGREES:
            return None
        missed = [abs(count / max(_counted(ready["labels"], shift), 1) - 1) for shift in (0, 1)]
        if min(missed) < _AGREES:
            return int(np.argmin(missed))  # of long rows both are near
        message = (
            f"The loss of the first batch is {mean:.4g} as a mean and stands for {count:.4g} labels where its "
            f"num_items_in_batch divides it; {_counted(ready['labels'], 0)} are not -100. A loss with further parts, "
            "such as those of experts, is not recorded: switch them off (output_router_logits=False)."
        )
        raise UnsupportedModel(message)


def _counted(labels: Tensor, shift: int) -> int:
    return int(np.prod(labels.shape)) if labels.is_floating_point() else int(labels[..., shift:].ne(-100).sum())
