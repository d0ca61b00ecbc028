"""Claim: for adapters the derivative through their training predicts retraining as well as EKFAC with a tuned damping.

A small BERT that reads reviews and a small GPT-2, each trained from random weights on SST-2, then fine-tuned by LoRA
(AdamW, 4 epochs in batches of 16, linear to 0, clipped at 1) on 240 rows of other texts, and recorded twice with other
shuffles. 20 queries; 30 halves of the rows, fine-tuned with two seeds each, say what is right. Where each derivative
begins is chosen by `uw.through` itself, and later where its check refuses the queries; EKFAC and the certified solve
have a path of dampings, shares of EKFAC's mean eigenvalue, and each query takes the one that suits the other queries
best; TracIn takes six of the states that the recording kept.

    UPWEIGHT_DATA=… python benchmarks/through_lora.py WORK    # WORK keeps the table of each model
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from numpy.typing import NDArray
from torch import Tensor, nn

import upweight as uw

ROWS, QUERIES, HALVES, SEEDS, RUNS = 240, 20, 30, 2, 2
WORDS, EPOCHS, BATCH, LR = 1000, 4, 16, 5e-3
DAMPINGS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # as shares of EKFAC's mean eigenvalue
CHECKPOINTS = 6
PAD, UNKNOWN = 0, 1

Row = dict[str, Any]


def lines(name: str) -> list[str]:
    """A file of the folder `text`."""
    with gzip.open(Path(os.environ["UPWEIGHT_DATA"]) / "text" / name, "rt", encoding="latin-1") as file:
        return file.read().split("\n")


def texts() -> dict[str, list[tuple[list[str], int]]]:
    """Words and a label of each text, of 8 to 24 words: SST-2, reviews, and Shakespeare (label 0)."""
    sst = [line.rsplit("\t", 1) for line in lines("sst2_train.tsv.gz")[1:] if "\t" in line]
    reviews = [(line, label) for label, kind in enumerate(("neg", "pos")) for line in lines(f"rt-polarity.{kind}.gz")]
    plays = [(line.lower(), 0) for line in lines("tinyshakespeare.txt.gz")]
    parts = {"SST-2": [(text, int(label)) for text, label in sst], "reviews": reviews, "plays": plays}
    split = {name: [(text.split(), label) for text, label in part] for name, part in parts.items()}
    return {name: [(words, label) for words, label in part if 8 <= len(words) <= 24] for name, part in split.items()}


@dataclass(frozen=True)
class Study:
    """One model, what it was trained on first, and what it is fine-tuned on."""

    name: str
    build: Callable[[], nn.Module]
    adapted: Callable[[nn.Module], nn.Module]
    first: list[Row]
    train: list[Row]
    queries: list[Row]


def bert() -> nn.Module:
    """A classifier of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gpt2() -> nn.Module:
    """A language model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def with_lora(targets: list[str], task: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    """What puts adapters of rank 4 into a model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task, **settings)
    return lambda model: get_peft_model(model, config)


def studies() -> list[Study]:
    """Both."""
    found = texts()
    known = Counter(word for words, _ in found["SST-2"] + found["plays"][:4000] for word in words)
    number = {word: k + 2 for k, (word, _) in enumerate(known.most_common(WORDS - 2))}
    draw = np.random.default_rng(0)

    def some(part: str, count: int, labels: bool) -> list[Row]:
        chosen = draw.choice(len(found[part]), count, replace=False)
        rows = []
        for words, label in (found[part][k] for k in chosen):
            ids = [number.get(word, UNKNOWN) for word in words]
            rows.append({"input_ids": ids, "labels": label if labels else ids})
        return rows

    half, few = ROWS // 2, QUERIES // 2
    reader = Study(
        "BERT, a classifier",
        bert,
        with_lora(["query", "value"], "SEQ_CLS"),
        some("SST-2", 4000, True),
        some("reviews", ROWS, True),
        some("reviews", QUERIES, True),
    )
    writer = Study(
        "GPT-2, a language model",
        gpt2,
        with_lora(["c_attn", "c_proj"], "CAUSAL_LM", fan_in_fan_out=True),
        some("SST-2", 4000, False),
        some("plays", half, False) + some("reviews", half, False),
        some("plays", few, False) + some("reviews", few, False),
    )
    return [reader, writer]


def batch(rows: list[Row]) -> dict[str, Tensor]:
    """Rows, padded."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    ids = padded("input_ids", PAD)
    whole = isinstance(rows[0]["labels"], list)
    labels = padded("labels", -100) if whole else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    keep: NDArray[np.int64],
    seed: int,
    epochs: int,
    tell: Callable[[Tensor], None] = lambda _: None,
) -> None:
    """The loop of every training here."""
    draw = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(keep) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for some in torch.from_numpy(keep)[torch.randperm(len(keep), generator=draw)].split(BATCH):
            optimizer.zero_grad()
            model(**batch([rows[k] for k in some.tolist()])).loss.backward()
            tell(some)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def moving(model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a fine-tuning."""
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=LR, weight_decay=0.0)


def losses(model: nn.Module, rows: list[Row]) -> NDArray[np.float64]:
    """Of every query, alone."""
    with torch.no_grad():
        return np.array([float(model(**batch([row])).loss) for row in rows])


class Trained:
    """A study's model after its first training: it makes adapted copies that are all alike."""

    def __init__(self, study: Study) -> None:
        self.study = study
        torch.manual_seed(0)
        base = study.build()
        everything = np.arange(len(study.first))
        fit(base, torch.optim.AdamW(base.parameters(), lr=1e-3), study.first, everything, 0, 2)
        self.state = base.state_dict()

    def fresh(self) -> nn.Module:
        """A copy with adapters that change nothing yet."""
        model = self.study.build()
        model.load_state_dict(self.state)
        torch.manual_seed(1)
        return self.study.adapted(model).eval()

    def recorded(self, seed: int) -> uw.Recording:
        """The fine-tuning on all rows, recorded."""
        model = self.fresh()
        optimizer = moving(model)
        with uw.Recording(model, optimizer, self.study.train, clip=1.0) as recording:
            fit(model, optimizer, self.study.train, np.arange(ROWS), seed, EPOCHS, recording.batch)
        return recording

    def outcomes(self) -> uw.SubsetOutcomes:
        """What fine-tuning on halves did to the queries."""
        masks = uw.random_subsets(ROWS, HALVES)
        found = np.zeros((QUERIES, HALVES, SEEDS))
        for line, mask in enumerate(masks):
            for seed in range(SEEDS):
                model = self.fresh()
                fit(model, moving(model), self.study.train, np.flatnonzero(mask), 100 + seed, EPOCHS)
                found[:, line, seed] = losses(model, self.study.queries)
        return uw.SubsetOutcomes(found, masks, tuple(range(SEEDS)))


def scored(recording: uw.Recording, study: Study) -> dict[str, tuple[NDArray[np.float64], float, str]]:
    """Of every method the values, (q, n) at each of its dampings, processor seconds, and what its certificate tells."""
    train, queries = study.train, study.queries
    ekfac = uw.operators.EKFAC(samples=1)
    first = uw.explain(recording.model, train, curvature=ekfac, damping=1e-3)
    dampings = [share * float(first.operator.eigenvalues.mean()) for share in DAMPINGS]
    solver = uw.solvers.CG(rtol=1e-2, preconditioner=uw.solvers.Preconditioned(ekfac))
    refused: list[str] = []

    def path(**settings: Any) -> list[uw.Scores]:
        influence = uw.explain(recording.model, train, damping=dampings[0], **settings)
        return list(influence.damping_path(queries, dampings=dampings).every)

    made: dict[str, Callable[[], list[uw.Scores]]] = {
        "through the training": lambda: [through(recording, queries, refused)],
        "EKFAC": lambda: path(curvature=ekfac),
        "certified Gauss–Newton": lambda: path(curvature=uw.operators.GaussNewton(), solver=solver),
        f"TracIn, {CHECKPOINTS} checkpoints": lambda: [tracin(recording, study)],
    }
    found = {}
    for name, make in made.items():
        refused.clear()
        start = time.process_time()
        scores = make()
        told = "; ".join([str(one.certificate) for one in scores] + refused)
        found[name] = (np.stack([one.values for one in scores]), round(time.process_time() - start, 1), told)
        print(study.name, name, found[name][1:], file=sys.stderr, flush=True)
    return found


def through(recording: uw.Recording, queries: list[Row], refused: list[str]) -> uw.Scores:
    """Scores from the step that is chosen on, or from later ones as long as the check refuses these queries."""
    made = uw.through(recording, progress=False)
    while True:
        try:
            return made.on_loss(queries)
        except uw.errors.NotLocal as error:
            why = str(error).split(": ", 1)[1].split(". The steps")[0]
            refused.append(f"refused for these queries from step {made.since} on, {why}")
            made = uw.through(recording, since=(made.since + len(recording.steps)) // 2, progress=False)


def tracin(recording: uw.Recording, study: Study) -> uw.Scores:
    """Gradient products at states that the recording kept, each times the rate of its step."""
    steps = sorted(recording.states)[:-1]
    chosen = [steps[k] for k in np.linspace(0, len(steps) - 1, CHECKPOINTS).astype(int)]
    whole = recording.model.state_dict()
    states = [{**whole, **recording.states[step].parameters} for step in chosen]
    members = uw.checkpoints(recording.model, states, study.train, curvature=uw.operators.Identity(), damping=0.0)
    return uw.TracIn(members, [recording.steps[step].groups[0]["lr"] for step in chosen]).on_loss(study.queries)


def chosen(path: NDArray[np.float64], outcomes: uw.SubsetOutcomes) -> tuple[NDArray[np.float64], list[int]]:
    """For each query the values at the damping that suits the others best, and how often each damping was taken."""
    each = np.stack([np.nan_to_num(judged(values, "path", outcomes).per_query) for values in path])
    best = (each.sum(1, keepdims=True) - each).argmax(0)
    return path[best, np.arange(len(best))], np.bincount(best, minlength=len(path)).tolist()


def judged(values: NDArray[np.float64], name: str, outcomes: uw.SubsetOutcomes) -> uw.LDS:
    """LDS with its interval."""
    card = uw.Certificate.unsolved(QUERIES, 1.0, name)
    return uw.lds(uw.Scores(values, f"none: {name}", np.arange(ROWS), ROWS, card), outcomes)


def path_of(
    mean: NDArray[np.float64], taken: list[list[int]], name: str, outcomes: uw.SubsetOutcomes
) -> dict[str, Any]:
    """LDS of the mean of the runs at each damping, and by how many queries it was taken in each run and in the mean."""
    found = {share: judged(values, name, outcomes) for share, values in zip(DAMPINGS, mean, strict=True)}
    return {
        "LDS of their mean by damping": {
            share: [round(one.value, 3), round(one.low, 3), round(one.high, 3)] for share, one in found.items()
        },
        "queries by damping, of each run and of their mean": taken,
    }


def told(study: Study) -> dict[str, Any]:
    """The table of one model."""
    start = time.process_time()
    trained = Trained(study)
    outcomes = trained.outcomes()
    spent = round(time.process_time() - start, 1)
    print(study.name, "retrained in", spent, "s", file=sys.stderr, flush=True)
    runs = [scored(trained.recorded(seed), study) for seed in range(RUNS)]
    table = {}
    for name in runs[0]:
        picked = [chosen(run[name][0], outcomes) for run in runs]
        each = [judged(values, name, outcomes) for values, _ in picked]
        mean = np.mean([run[name][0] for run in runs], 0)
        together, taken = chosen(mean, outcomes)
        both = judged(together, name, outcomes)
        table[name] = {
            "LDS of each run": [round(one.value, 3) for one in each],
            "95 % of each run": [[round(one.low, 3), round(one.high, 3)] for one in each],
            "LDS of their mean": round(both.value, 3),
            "95 % of their mean": [round(both.low, 3), round(both.high, 3)],
            **(path_of(mean, [*(counts for _, counts in picked), taken], name, outcomes) if len(mean) > 1 else {}),
            "processor seconds": [run[name][1] for run in runs],
            "certificate": [run[name][2] for run in runs],
        }
    return {
        "ceiling": round(both.ceiling, 3),
        "parameters that are trained": sum(p.numel() for p in trained.fresh().parameters() if p.requires_grad),
        "processor seconds of all retrainings": spent,
        "methods": table,
    }


def kept(study: Study, folder: Path) -> dict[str, Any]:
    """The table of one model, from the folder if it was made before."""
    file = folder / f"{study.build.__name__}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told(study)))
    return json.loads(file.read_text())


def main(work: str) -> None:
    """Both models, one table each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = {"rows": ROWS, "queries": QUERIES, "halves": HALVES, "trainings of each half": SEEDS, "runs": RUNS}
    settings |= {"epochs": EPOCHS, "batch": BATCH, "lr": LR, "dampings": DAMPINGS}
    report(__file__, settings, {study.name: kept(study, Path(work)) for study in studies()})


if __name__ == "__main__":
    main(sys.argv[1])
