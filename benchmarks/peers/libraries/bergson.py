"""bergson: its EK-FAC pipeline with its own damping, and inner products of whole gradients."""

import os
from pathlib import Path

import numpy as np
from bergson import DataConfig, IndexConfig, PreprocessConfig, QuerySetConfig, ScoreConfig
from bergson.build import build_query
from bergson.config.config import HessianConfig, HessianPipelineConfig
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from bergson.score.score import score_dataset
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def files(work):
    """The model, a tokenizer that nothing is read with, and both parts as data sets of token numbers."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model = work.module().language_model
    model.save_pretrained("model")
    words = {f"<{k}>": k for k in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<0>").save_pretrained("model")
    for name, part in (("rows", work.arrays[0]), ("queries", work.arrays[2])):
        Dataset.from_dict({"input_ids": part.tolist()}).save_to_disk(name)
    index = IndexConfig("run", model="model", data=DataConfig(dataset="rows"), token_batch_size=48)
    return index, QuerySetConfig(dataset="queries")


def found(folder, count):
    return np.asarray(load_scores(Path(folder))[:], float).reshape(-1, count).T


def ekfac(work):
    index, queries = files(work)
    hessian = HessianConfig(method="kfac", ev_correction=True)
    hessian_pipeline(index, hessian, ScoreConfig(), PreprocessConfig(), HessianPipelineConfig(query=queries))
    return found("run/scores", len(work.arrays[2]))


def dot(work):
    index, queries = files(work)
    build_query(IndexConfig("query", model="model", token_batch_size=48), queries, PreprocessConfig())
    score_dataset(index, ScoreConfig(query_path="query"), PreprocessConfig())
    return found("run", len(work.arrays[2]))


METHODS = {"EK-FAC": ekfac, "gradient dot": dot}
