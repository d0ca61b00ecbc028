"""What is said to type by upweight/data, typed."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zipfile
from functools import cache
from hashlib import md5, sha256

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, Dataset, IterableDataset

import upweight as uw
from refusals import refused
from small import (
    NAMES,
    NAMESQ,
    XQ,
    YQ,
    ZQ,
    Items,
    N,
    NextForCausalLM,
    Sentences,
    X,
    Y,
    Z,
    changed,
    classifier,
    logistic,
    net,
    pairs,
    ridge,
    seeded,
    sentences,
    sequences,
)
from upweight import datasets
from upweight.operators import Identity

WORDS = np.where(X > 0, "high", "low")
HOLED = changed(X, (3, 1), np.nan)
HOLE = np.arange(N) == 3


def network(model=None, **settings):
    """The influence of a small network, by gradients alone, which is fast."""
    return classifier(model, curvature=Identity(), **settings)


@cache
def plain():
    """The influences of the small classifier on two queries, from plain arrays."""
    return network().on_loss(XQ[:2], YQ[:2]).values


def same(influence, X=None):
    """Whether an influence is that of the same classifier on plain arrays, with other inputs where they are given."""
    expected = plain() if X is None else network(X=X).on_loss(XQ[:2], YQ[:2]).values
    return np.allclose(influence.on_loss(XQ[:2], YQ[:2]).values, expected, rtol=1e-6, atol=1e-12)


def without_the_hole(influence):
    """Whether an influence is that of the classifier on all rows but the one with a hole."""
    return np.allclose(influence.on_params(), network(X=X[~HOLE], y=Y[~HOLE]).on_params())


# ---- arrays.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [X, scipy.sparse.csr_matrix(X)], ids=["dense", "sparse"])
def test_a_row_becomes_one_of_the_same_form(inputs):
    influence = network(X=inputs)
    with refused(", and those of the training rows have ", "Pass new examples of the same form"):
        uw.edited(influence, [3], X_new=np.ones((1, 4)))
    assert same(uw.edited(influence, [3], X_new=np.ones((1, 3))), changed(X, 3, 1.0))


def test_a_loader_is_named_by_what_it_loads():
    loader = DataLoader(pairs(), 8, shuffle=True)
    with refused(" is a DataLoader, which batches", "Pass what it loads: loader.dataset"):
        network(X=loader, y=None)
    assert same(network(X=loader.dataset, y=None))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs().items)


def test_a_stream_is_read_once_or_has_its_items_numbered():
    dataset = Stream()
    with refused(" is an IterableDataset (", "Pass a map-style Dataset, with __getitem__ and __len__; or read it once"):
        network(X=dataset, y=None)
    assert same(network(X=Items(dataset), y=None))
    inputs, labels = map(torch.stack, zip(*dataset, strict=True))
    assert same(network(X=inputs, y=labels))


class OfTwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, left, right):
        return self.layer(torch.cat([left, right], -1))


def test_inputs_of_several_parts_are_a_dataset():
    model = seeded(OfTwoParts).double().eval()
    with refused(", not an array. For inputs", "For inputs of several parts pass a map-style Dataset whose items are"):
        uw.Examples({"left": X[:, :1], "right": X[:, 1:]}, Y)
    split = [(torch.tensor(x[:1]), torch.tensor(x[1:])) for x in X]
    dicts = Items(({"left": a, "right": b}, torch.tensor(y)) for (a, b), y in zip(split, Y, strict=True))
    tuples = Items((parts, torch.tensor(y)) for parts, y in zip(split, Y, strict=True))
    plain = network(nn.Sequential(model.layer).eval()).of_self().values
    for dataset in (dicts, tuples):
        assert np.allclose(network(model, X=dataset, y=None).of_self().values, plain)


def test_a_file_is_read_first(tmp_path):
    path = f"{tmp_path}/inputs.npy"
    np.save(path, X)
    with refused(", not an array. Pass the array", "Pass the array itself; if this names a file, what it holds"):
        network(X=path)
    assert same(network(X=np.load(path)))


def test_rows_with_masked_entries_are_imputed_or_dropped():
    masked = np.ma.masked_array(X, changed(np.zeros(X.shape, bool), (3, 1), True))
    with refused(" is a masked array with masked entries", "Impute or drop those rows first"):
        network(X=masked)
    assert same(network(X=masked.filled(0.0)), changed(X, (3, 1), 0.0))
    kept = ~masked.mask.any(1)
    assert without_the_hole(network(X=masked[kept], y=Y[kept]))


def test_rows_of_different_lengths_become_an_array():
    ragged = [list(x) if x[0] > 0 else list(x[:2]) for x in X]
    with refused(" that does not form an array (", "Pass an array with one row per example"):
        network(X=ragged)
    padded = np.array([[*x, 0.0][:3] for x in ragged])
    assert same(network(X=padded), np.where((X[:, :1] > 0) | [True, True, False], X, 0.0))


def test_a_generator_becomes_an_array():
    with refused(" is a single ", "Pass an array with one row per example"):
        network(X=(x for x in X))
    assert same(network(X=np.array([*X])))


def test_words_are_encoded_in_a_pipeline_and_labels_as_numbers():
    words = WORDS.astype(object)
    with refused(" holds values that are not numbers (", "Encode them as numbers first"):
        network(X=words)
    pipeline = make_pipeline(OneHotEncoder(), LogisticRegression(tol=1e-10)).fit(words, NAMES)
    values = uw.explain(pipeline, words, NAMES).on_loss(words[:4], NAMES[:4]).values
    columns = pipeline[0].transform(words).toarray()
    assert np.allclose(values, uw.explain(pipeline[-1], columns, NAMES).on_loss(columns[:4], NAMES[:4]).values)
    with refused(" holds values that are not numbers (", "Encode them as numbers first: labels as 0 … K−1"):
        network(y=NAMES.astype(object))
    assert same(network(y=np.unique(NAMES, return_inverse=True)[1]))


def test_two_parts_of_a_complex_number_are_two_columns():
    waves = X + 1j * X[::-1]
    with refused(", and an example is made of real numbers. Pass", "Pass the real and the imaginary parts as columns"):
        network(net(inputs=6), X=waves)
    columns = np.hstack([waves.real, waves.imag])
    values = network(net(inputs=6), X=columns).of_self().values
    assert np.allclose(values, network(net(inputs=6), X=np.hstack([X, X[::-1]])).of_self().values)


def test_words_and_days_are_encoded():
    with refused(
        ", which is not a number. Encode it first", "Encode it first: labels as 0 … K−1, categories as one-hot"
    ):
        network(y=NAMES)
    assert same(network(y=np.searchsorted(["no", "yes"], NAMES)))
    with refused(
        ", which is not a number. Encode it first", "Encode it first: labels as 0 … K−1, categories as one-hot"
    ):
        network(X=WORDS)
    one_hot = (WORDS[:, :, None] == ["high", "low"]).reshape(N, 6)
    assert np.isfinite(network(net(inputs=6), X=one_hot * 1.0).of_self().values).all()
    days = np.datetime64("2024-01-01") + np.arange(N)
    with refused(
        ", which is not a number. Encode it first", "Encode it first: labels as 0 … K−1, categories as one-hot"
    ):
        uw.explain(Ridge().fit(np.arange(N)[:, None], Z), days[:, None], Z)
    numbers = ((days - days[0]) / np.timedelta64(1, "D"))[:, None]
    assert np.isfinite(uw.explain(Ridge().fit(numbers, Z), numbers, Z).of_self().values).all()


def test_a_tensor_of_another_layout_is_made_dense():
    sparse = torch.tensor(X).to_sparse()
    with refused(" is a tensor that is ", "Pass a dense real tensor, or a SciPy sparse matrix, of n rows"):
        network(X=sparse)
    assert same(network(X=sparse.to_dense()))
    assert same(network(X=scipy.sparse.csr_matrix(X)))


def test_rows_with_holes_are_dropped_or_imputed():
    with refused(
        " NaN or infinite values, the first in row ", "Impute or drop those rows before fitting and explaining"
    ):
        logistic(X=HOLED)
    model = LogisticRegression(tol=1e-10).fit(HOLED[~HOLE], NAMES[~HOLE])
    values = uw.explain(model, HOLED[~HOLE], NAMES[~HOLE]).on_loss(XQ, NAMESQ).values
    assert np.allclose(values, uw.explain(model, X[~HOLE], NAMES[~HOLE]).on_loss(XQ, NAMESQ).values)
    pipeline = make_pipeline(SimpleImputer(), LogisticRegression(tol=1e-10)).fit(HOLED, NAMES)
    whole = changed(X, (3, 1), np.nanmean(HOLED[:, 1]))
    values = uw.explain(pipeline, HOLED, NAMES).on_loss(XQ, NAMESQ).values
    assert np.allclose(values, uw.explain(pipeline[-1], whole, NAMES).on_loss(XQ, NAMESQ).values)


def test_a_hole_in_a_sparse_matrix_is_imputed():
    holed = scipy.sparse.csr_matrix(HOLED)
    with refused(
        " NaN or infinite values, the first in row ", "Impute or drop those rows before fitting and explaining"
    ):
        network(X=holed)
    imputed = SimpleImputer(strategy="constant", fill_value=0.0).fit_transform(holed)
    assert same(network(X=imputed), changed(X, (3, 1), 0.0))


def test_a_weight_for_each_row():
    weights = np.arange(N) % 2 + 1
    with refused("sample_weight has shape ", "Pass one weight per training row"):
        ridge(sample_weight=weights[1:])
    values = uw.explain(Ridge(alpha=2.0).fit(X, Z, weights), X, Z, sample_weight=weights).on_loss(XQ, ZQ).values
    twice = np.repeat(np.arange(N), weights)
    copies = uw.explain(Ridge(alpha=2.0).fit(X[twice], Z[twice]), X[twice], Z[twice]).on_loss(XQ, ZQ).values
    assert np.allclose(values, np.add.reduceat(copies, np.searchsorted(twice, np.arange(N)), axis=1))


def test_weights_are_not_negative():
    weights = changed(np.ones(N), 3, -1.0)
    with refused("sample_weight reaches from ", "Weights must be ≥ 0 and not all zero, as in fit()"):
        ridge(sample_weight=weights)
    weights = weights.clip(0)
    model = Ridge(alpha=2.0).fit(X, Z, weights)
    values = uw.explain(model, X, Z, sample_weight=weights).on_loss(XQ, ZQ).values
    assert np.array_equal(values[:, 3], np.zeros(4))
    assert (values[:, 4] != 0).all()


def test_rows_are_a_flat_list():
    influence = ridge()
    with refused("rows has lines of different lengths (", "Pass a flat list of whole row numbers"):
        influence.on_params([[0, 1], [2]])
    assert np.array_equal(influence.on_params([0, 1, 2]), influence.on_params()[:3])


def test_rows_are_whole_numbers_or_a_mask():
    influence = ridge()
    with refused(" and dtype ", "Pass a non-empty list of whole row numbers (or a mask of "):
        influence.on_params([1.0, 3.0])
    assert np.array_equal(influence.on_params([1, 3]), influence.on_params()[[1, 3]])
    mask = np.arange(N) < 3
    with refused(" and dtype ", "Pass a non-empty list of whole row numbers (or a mask of "):
        influence.on_params(mask[:-1])
    assert np.array_equal(influence.on_params(mask), influence.on_params()[:3])


def test_rows_are_numbered_from_the_first():
    influence = ridge()
    with refused(" does not exist: there are ", "Pass such numbers; negative ones do not count from the end"):
        influence.on_params([-1])
    assert np.array_equal(influence.on_params([39]), influence.on_params()[-1:])


# ---- datasets.py -------------------------------------------------------------------------------------------------


def idx(*shape):
    """A small file in the format of MNIST's, of the numbers 0, 1, 2, …"""
    values = np.arange(np.prod(shape)) % 251
    head = bytes([0, 0, 8, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
    return head + values.astype(np.uint8).tobytes()


DIGITS = dict(zip(datasets._MNIST_SHA256, [idx(3, 28, 28), idx(3), idx(2, 28, 28), idx(2)], strict=True))
DIGITS_SHA256 = {name: sha256(content).hexdigest() for name, content in DIGITS.items()}
PACKED_DIGITS = {f"{name}.gz": gzip.compress(content) for name, content in DIGITS.items()}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """What the internet has by the ends of addresses; the cache is in tmp_path / "upweight"."""
    files = {}

    def answer(url, timeout):
        if url.rpartition("/")[2] not in files:
            raise OSError("Name or service not known")
        return io.BytesIO(files[url.rpartition("/")[2]])

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("UPWEIGHT_DATA", raising=False)
    monkeypatch.setattr(datasets, "_MNIST_SHA256", DIGITS_SHA256)
    return files


def unpacked_digits(folder=None):
    return datasets.mnist(folder).images.ravel().tolist() == list(DIGITS["train-images-idx3-ubyte"][16:])


def into(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tar(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zipped(name, content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


MAILS = {"ham/0001.a.ham.txt": b"Subject: meeting", "spam/0002.b.spam.txt": b"Subject: win"}
TABLE_COLUMNS = [*datasets._COUNTS, *datasets._PATIENT, datasets._FIRST_DRUG, "readmitted"]
TABLE = f"{','.join(TABLE_COLUMNS)}\n{'1,' * 15}<30\n{'2,' * 15}NO\n"


def test_mails_of_others_are_deleted(web, tmp_path, monkeypatch):
    web["enron1.tar.gz"] = tar(MAILS)
    file = tmp_path / "upweight" / "enron1" / "enron1.tar.gz"
    with refused(", not that of Enron1", "Delete it and load again"):
        datasets.enron1()
    monkeypatch.setattr(datasets, "_ENRON1_SHA256", datasets._mail(file)[1])
    file.write_bytes(tar({"ham/0001.a.ham.txt": b"Subject: other"}))
    with refused(", not that of Enron1", "Delete it and load again"):
        datasets.enron1()
    file.unlink()
    assert datasets.enron1().labels.tolist() == [0, 1]


def test_an_archive_of_mails_that_is_damaged_is_deleted(web, tmp_path, monkeypatch):
    web["enron1.tar.gz"] = b"an error page"
    file = tmp_path / "upweight" / "enron1" / "enron1.tar.gz"
    with refused(" is no tar archive, or is damaged (", "Delete it and load again"):
        datasets.enron1()
    file.unlink()
    web["enron1.tar.gz"] = tar(MAILS)
    monkeypatch.setattr(datasets, "_ENRON1_SHA256", datasets._mail(into_file(tmp_path / "good", tar(MAILS)))[1])
    assert datasets.enron1().texts == ["Subject: meeting", "Subject: win"]


def into_file(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture
def stays(web, tmp_path, monkeypatch):
    """A small table of hospital stays is the published one; where the cache keeps it."""
    monkeypatch.setattr(datasets, "_DIABETES_SHA256", sha256(TABLE.encode()).hexdigest())
    name = datasets._DIABETES_URL.rpartition("/")[2]
    web[name] = zipped("folder/diabetic_data.csv", TABLE)
    return into(tmp_path / "upweight" / "diabetes130", {}) / name


def test_another_table_of_stays_is_deleted(stays):
    stays.write_bytes(zipped("diabetic_data.csv", "a,b\n1,2\n"))
    with refused(", not that of UCI's", "Delete it and load again"):
        datasets.diabetes130()
    stays.unlink()
    assert datasets.diabetes130().readmitted.tolist() == [1, 0]


def test_an_archive_of_stays_that_is_damaged_is_deleted(stays):
    stays.write_bytes(b"an error page")
    with refused(" is no zip archive, or is damaged (", "Delete it and load again"):
        datasets.diabetes130()
    stays.unlink()
    assert datasets.diabetes130().readmitted.tolist() == [1, 0]


def test_an_archive_without_the_table_of_stays_is_deleted(stays):
    stays.write_bytes(zipped("other.csv", TABLE))
    with refused("There is no ", "Delete it and load again"):
        datasets.diabetes130()
    stays.unlink()
    assert datasets.diabetes130().readmitted.tolist() == [1, 0]


def test_a_file_that_is_not_there_is_looked_for_elsewhere(web, tmp_path):
    folder = into(tmp_path / "empty", {})
    with refused(
        "There is no ", "Name the folder that holds it, or leave folder out and unset UPWEIGHT_DATA to download"
    ):
        datasets.mnist(folder)
    assert unpacked_digits(into(tmp_path / "full", PACKED_DIGITS))
    web |= PACKED_DIGITS
    assert unpacked_digits()


def test_a_folder_of_the_variable_without_the_file(web, tmp_path, monkeypatch):
    monkeypatch.setenv("UPWEIGHT_DATA", str(into(tmp_path / "mine" / "mnist", {}).parent))
    web |= PACKED_DIGITS
    with refused(
        "There is no ", "Name the folder that holds it, or leave folder out and unset UPWEIGHT_DATA to download"
    ):
        datasets.mnist()
    monkeypatch.delenv("UPWEIGHT_DATA")
    assert unpacked_digits()


def test_without_a_network_files_are_put_into_a_folder(web, tmp_path, monkeypatch):
    with refused(" could not be fetched: ", "Without a network, put the file into "):
        datasets.mnist()
    into(tmp_path / "upweight" / "mnist", PACKED_DIGITS)
    assert unpacked_digits()
    shutil.rmtree(tmp_path / "upweight")
    with refused(" could not be fetched: ", "Without a network, put the file into "):
        datasets.mnist()
    monkeypatch.setenv("UPWEIGHT_DATA", str(into(tmp_path / "mine" / "mnist", PACKED_DIGITS).parent))
    assert unpacked_digits()


def test_other_photographs_are_deleted(web, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new("RGB", (8, 8), 90).save(stream, "JPEG")
    kinds = ("train/n02102040", "train/n01440764", "val/n02102040", "val/n01440764")
    good = tar({f"imagenette2-320/{kind}/a.JPEG": stream.getvalue() for kind in kinds})
    name = datasets._IMAGENETTE_URL.rpartition("/")[2]
    file = into(tmp_path / "upweight" / "dogfish_imagenette", {name: b"an error page"}) / name
    with refused(", not the published ", "Delete it and load again"):
        datasets.dogfish()
    file.unlink()
    web[name] = good
    monkeypatch.setattr(datasets, "_IMAGENETTE_MD5", md5(good).hexdigest())
    assert datasets.dogfish().test_labels.tolist() == [0, 1]


def test_a_file_of_digits_that_is_damaged_is_deleted(web, tmp_path):
    web |= PACKED_DIGITS
    folder = into(tmp_path / "upweight" / "mnist", {"train-labels-idx1-ubyte.gz": b"an error page"})
    with refused(" is no gzip archive, or is damaged (", "Delete it and load again"):
        datasets.mnist()
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    assert unpacked_digits()


def test_other_digits_are_deleted_from_the_cache_or_from_a_folder(web, tmp_path):
    web |= PACKED_DIGITS
    other = {"train-labels-idx1-ubyte.gz": gzip.compress(idx(4))}
    folder = into(tmp_path / "upweight" / "mnist", other)
    with refused(", not that of the published ", "Delete it and load again"):
        datasets.mnist()
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    assert unpacked_digits()
    named = into(tmp_path / "named", PACKED_DIGITS | other)
    with refused(", not that of the published ", "Delete it and load again"):
        datasets.mnist(named)
    (named / "train-labels-idx1-ubyte.gz").unlink()
    with refused(
        "There is no ", "Name the folder that holds it, or leave folder out and unset UPWEIGHT_DATA to download"
    ):
        datasets.mnist(named)
    assert unpacked_digits()


# ---- examples.py -------------------------------------------------------------------------------------------------


def test_a_dataset_has_its_targets():
    with refused("X is a Dataset that already yields whole examples", "Omit y, or pass two arrays"):
        network(X=pairs(), y=Y)
    assert same(network(X=pairs(), y=None))
    assert same(network(X=X, y=Y))


def test_a_filter_that_left_nothing():
    wanted = "NO"
    with refused("There are no examples: X has 0 rows", "check the filter that made X"):
        network(X=X[wanted == NAMES], y=Y[wanted == NAMES])
    with refused("There are no examples: X has 0 rows", "check the filter that made X"):
        uw.explain(Ridge().fit(X, Z), X, Z).on_loss(X[wanted == NAMES], Z[wanted == NAMES])
    wanted = "no"
    assert network(X=X[wanted == NAMES], y=Y[wanted == NAMES]).n == (NAMES == "no").sum()


def test_targets_are_dense():
    y = scipy.sparse.csr_matrix(Z[:, None])
    with refused("y is a sparse matrix of shape ", "Pass y.toarray()"):
        network(net(1), y=y, loss=nn.functional.mse_loss)
    dense, plain = (network(net(1), y=one, loss=nn.functional.mse_loss) for one in (y.toarray(), Z[:, None]))
    assert np.array_equal(dense.of_self().values, plain.of_self().values)


@pytest.mark.parametrize(
    "model", [Ridge(), LogisticRegression(), MLPRegressor(hidden_layer_sizes=(3,), max_iter=20, random_state=0)]
)
@pytest.mark.filterwarnings("ignore")  # a network that is not trained to the end
def test_targets_of_estimators_are_dense(model):
    target = Y if hasattr(model, "predict_proba") else Z
    y, model = scipy.sparse.csr_matrix(target[:, None]), model.fit(X, target)
    with refused("y is a sparse matrix of shape ", "Pass y.toarray(), and y.toarray().ravel() where a row has one"):
        uw.explain(model, X, y)
    influence = uw.explain(model, X, y.toarray().ravel(), damping=0.1)
    plain = uw.explain(model, X, target, damping=0.1).on_loss(X[:2], target[:2]).values
    for ask in (
        lambda few: influence.on_loss(X[:2], few),
        lambda few: influence.of_relabeling([3, 4], few, on=(X[:2], target[:2])),
        lambda few: uw.edited(influence, [3, 4], y_new=few),
    ):
        with refused("y is a sparse matrix of shape ", "Pass y.toarray(), and y.toarray().ravel() where a row has one"):
            ask(y[:2])
        ask(y[:2].toarray().ravel())
    assert np.array_equal(influence.on_loss(X[:2], y[:2].toarray().ravel()).values, plain)


def test_a_label_for_each_row():
    with refused(" rows and y has ", "They must describe the same examples in the same order: pass one label per row"):
        network(X=X, y=Y[1:])
    assert network(X=X[1:], y=Y[1:]).n == N - 1
    assert same(network(X=X, y=Y))


def test_a_group_is_a_list_of_rows():
    influence = ridge()
    single = influence.on_loss(XQ, ZQ).values
    with refused("groups is ", "Pass a list of rows, or a list of lists of rows"):
        influence.of_groups([], on=(XQ, ZQ))
    with refused("groups is ", "Pass a list of rows, or a list of lists of rows"):
        influence.of_groups([None], on=(XQ, ZQ))
    assert np.allclose(influence.of_groups([0, 5], on=(XQ, ZQ)).values, single[:, [0, 5]])
    groups = influence.of_groups([[0, 5], [7]], on=(XQ, ZQ)).values
    assert np.allclose(groups, np.stack([single[:, 0] + single[:, 5], single[:, 7]], 1))


def test_a_group_names_a_row_once():
    influence = ridge()
    group = [5, 0, 5]
    with refused(" names a row twice; a row can be removed only once", "Use np.unique on the group"):
        influence.of_groups([group], on=(XQ, ZQ))
    values = influence.of_groups([np.unique(group)], on=(XQ, ZQ)).values
    assert np.allclose(values[:, 0], influence.on_loss(XQ, ZQ).values[:, [0, 5]].sum(1))


def test_what_has_no_label_is_replaced_whole():
    theta = torch.tensor(np.linalg.lstsq(X, np.ones(N), rcond=None)[0])
    objective = uw.Objective(lambda params, x: (params @ x - 1) ** 2, theta)
    influence = uw.Influence(objective, (X,))
    with refused(
        "These examples are not (x, y) pairs, so there is no label", "Use of_replacing with whole new examples"
    ):
        influence.of_relabeling([0], [1.0], on=(XQ,))
    values = influence.of_replacing([0], XQ[:1], on=(XQ,)).values
    parts = influence.on_loss(XQ).values[:, [0]] + influence.of_adding(XQ[:1], on=(XQ,)).values
    assert np.allclose(values, parts)


def test_a_new_label_for_each_row():
    influence = network()
    with refused("y_new has shape ", "Pass one new label per row"):
        influence.of_relabeling([0, 1], [1, 0, 1], on=(XQ, YQ))
    values = influence.of_relabeling([0, 1], 1 - Y[:2], on=(XQ, YQ)).values
    assert np.allclose(values, influence.of_replacing([0, 1], X[:2], 1 - Y[:2], on=(XQ, YQ)).values)


class Augmented(Dataset):
    def __init__(self, items, transform=None):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        x, y = self.items[row]
        return x if self.transform is None else self.transform(x), y


def test_random_transforms_are_switched_off():
    with refused("The dataset gave two different items for row ", "pass a Dataset without random transforms"):
        network(X=Augmented(pairs(), lambda x: x + torch.rand(())), y=None)
    assert same(network(X=Augmented(pairs()), y=None))


def test_items_of_different_shapes_are_padded_in_the_dataset():
    short = Items((x[: 2 + row % 2], y) for row, (x, y) in enumerate(pairs().items))
    with refused("The dataset's items cannot be stacked", "convert, pad or crop them in the Dataset"):
        network(X=short, y=None).of_self()
    padded = Augmented(short, lambda x: pad(x, (0, 3 - len(x))))
    even = (np.arange(N) % 2 == 0)[:, None] & [False, False, True]
    assert same(network(X=padded, y=None), np.where(even, 0.0, X))
    cropped = Augmented(short, lambda x: x[:2])
    values = network(net(inputs=2), X=cropped, y=None).of_self().values
    assert np.allclose(values, network(net(inputs=2), X=X[:, :2]).of_self().values)


def test_items_that_are_no_tensors_are_converted_in_the_dataset():
    series = Items((pd.Series(x), y) for x, y in zip(X, Y, strict=True))
    with refused("The dataset's items cannot be stacked", "convert, pad or crop them in the Dataset"):
        network(X=series, y=None)
    assert same(network(X=Augmented(series, lambda x: torch.tensor(x.to_numpy(copy=True))), y=None))


@pytest.mark.parametrize("no", ["no", "", b"no"], ids=["words", "no words", "bytes"])
def test_items_hold_numbers(no):
    class Numbered(Items):
        def __getitem__(self, row):
            x, name = self.items[row]
            return x, int(name != no)

    items = [(x, no if label == 0 else 2 * no) for x, label in zip(X, Y, strict=True)]
    with refused("The dataset's items hold ", "return tensors, arrays or numbers from its __getitem__"):
        network(X=Items(items), y=None)
    labels = np.array([name != no for _, name in items]) * 1
    values = network(X=Numbered(items), y=None).of_self().values
    assert np.allclose(values, network(y=labels).of_self().values)


def test_an_item_with_a_hole_is_imputed_or_left_out():
    with refused(" of the dataset holds a NaN or infinite value", "Impute it, or leave the item out of training"):
        network(X=pairs(HOLED), y=None).of_self()
    assert same(network(X=Augmented(pairs(HOLED), torch.nan_to_num), y=None), changed(X, (3, 1), 0.0))
    items = [item for row, item in enumerate(pairs(HOLED).items) if row != 3]
    assert without_the_hole(network(X=Items(items), y=None))


# ---- ids.py ------------------------------------------------------------------------------------------------------

FRAME = pd.DataFrame({"id": [f"p{row}" for row in range(N)], "ward": ["a", "b"] * 20})


def test_a_name_for_each_row_in_a_list():
    frame = FRAME
    with refused(", which is no list of names", "Pass one name for each of the "):
        ridge(ids="id")
    assert ridge(ids=frame["id"]).on_loss(XQ, ZQ).ids.tolist() == frame["id"].tolist()


def test_as_many_names_as_rows():
    with refused("ids has ", "Pass one name for each row, in the order of X"):
        ridge(ids=FRAME["id"][:-1])
    with refused("ids has ", "Pass one name for each row, in the order of X"):
        ridge(ids=FRAME[["id"]])
    assert ridge(ids=FRAME["id"]).on_loss(XQ, ZQ).ids.tolist() == FRAME["id"].tolist()


@pytest.mark.parametrize(
    "ids", [FRAME["ward"], [None, *range(1, N)], [[row] for row in range(N)]], ids=["twice", "none", "lists"]
)
def test_every_row_has_a_name_of_its_own(ids):
    with refused("ids ", "Every row needs a name of its own: pass another column, or ids=None for none"):
        ridge(ids=ids)
    assert ridge(ids=FRAME["id"]).on_loss(XQ, ZQ).ids.tolist() == FRAME["id"].tolist()
    assert ridge(ids=None).on_loss(XQ, ZQ).ids is None


def test_targets_are_brought_into_the_order_of_the_inputs():
    frame = pd.DataFrame(X, index=FRAME["id"], columns=list("abc"))
    y = pd.Series(Z, index=FRAME["id"]).sort_index()
    with refused("X and y name the same ", "Pass y.loc[X.index], and refit if fit() was given the same"):
        uw.explain(Ridge(alpha=2.0).fit(frame, y), frame, y)
    right = y.loc[frame.index]
    values = uw.explain(Ridge(alpha=2.0).fit(frame, right), frame, right).on_loss(XQ, ZQ).values
    assert np.allclose(values, ridge().on_loss(XQ, ZQ).values)
    shuffled = uw.explain(Ridge(alpha=2.0).fit(frame, y), frame, y.to_numpy())
    plain = uw.explain(Ridge(alpha=2.0).fit(X, y), X, y.to_numpy())
    assert np.allclose(shuffled.on_loss(XQ, ZQ).values, plain.on_loss(XQ, ZQ).values)


def test_a_frame_is_not_shuffled_beside_its_targets():
    frame, y = pd.DataFrame(X, columns=list("abc")), pd.Series(Z)
    shuffled = frame.sample(frac=1, random_state=0)
    with refused("X and y name the same ", "Pass y.loc[X.index], and refit if fit() was given the same"):
        uw.explain(Ridge(alpha=2.0).fit(shuffled, y), shuffled, y)
    right = y.loc[shuffled.index]
    found = uw.explain(Ridge(alpha=2.0).fit(shuffled, right), shuffled, right)
    expected = ridge().on_loss(XQ, ZQ).values[:, shuffled.index]
    assert np.allclose(found.on_loss(XQ, ZQ).values, expected)
    asked, targets = pd.DataFrame(XQ, columns=list("abc")), pd.Series(ZQ)
    with refused("X and y name the same ", "Pass y.loc[X.index]"):
        found.on_loss(asked.iloc[::-1], targets)
    back = found.on_loss(asked.iloc[::-1], targets.loc[asked.index[::-1]]).values
    assert np.allclose(back, expected[::-1])
    assert np.allclose(found.on_loss(asked.iloc[::-1], ZQ[::-1]).values, expected[::-1])


def test_names_that_repeat_do_not_order_targets():
    frame = pd.DataFrame(X, columns=list("abc"), index=[0, *range(N - 1)]).assign(target=Z)
    y = frame["target"].iloc[::-1]
    with refused("X and y name the same ", "shuffle both as one frame, X = frame[columns] and y = frame[target]"):
        uw.explain(Ridge(alpha=2.0).fit(frame[list("abc")], y), frame[list("abc")], y)
    back = frame.iloc[::-1]
    found = uw.explain(Ridge(alpha=2.0).fit(back[list("abc")], back["target"]), back[list("abc")], back["target"])
    assert np.allclose(found.on_loss(XQ, ZQ).values, ridge().on_loss(XQ, ZQ).values[:, ::-1])


def named(rows, **settings):
    return uw.explain(seeded(Sentences), rows, curvature=Identity(), **settings)


def test_rows_of_one_form_are_dicts_of_the_same_names():
    rows = sentences()
    mixed = [*rows[:5], ([1, 2], 0), *rows[6:]]
    with refused("and row 0 is a mapping from names to numbers", "Make every row a dict of the same names"):
        named(mixed)
    mixed[5] = {"input_ids": [1, 2], "labels": 0}
    assert named(mixed).n == len(rows)


def test_rows_have_what_the_model_takes():
    texts = [{"text": "some words", "tokens": row["input_ids"], "label": row["labels"]} for row in sentences()]
    with refused(", and the model takes ", "Pass rows as the model takes them, such as a tokenizer's"):
        named(texts)
    taken = [{"input_ids": row["tokens"], **row} for row in texts]
    assert_allclose = np.testing.assert_allclose
    assert_allclose(named(taken).on_loss(taken[:2]).values, named(sentences()).on_loss(sentences()[:2]).values)


def told(rows):
    return uw.explain(seeded(NextForCausalLM), rows, curvature=Identity())


def same_without(rows, kept):
    expected = told([row for k, row in enumerate(sequences()) if k in kept]).on_loss(sequences()[:1]).values
    np.testing.assert_allclose(told(rows).on_loss(sequences()[:1]).values, expected)


def test_a_row_without_tokens_is_left_out():
    rows = sequences()
    rows[5] = {"input_ids": []}
    with refused(" has no tokens: its ", "Leave such rows out: [row for row in rows if len(row['"):
        told(rows)
    rows = [row for row in rows if len(row["input_ids"])]
    same_without(rows, {0, 1, 2, 3, 4, 6, 7})


def test_a_row_without_labels_is_left_out():
    rows = [{**row, "labels": row["input_ids"]} for row in sequences()]
    rows[5]["labels"] = []
    with refused(" has no labels: the list is empty", " it out: [row for row in rows if len(row['"):
        told(rows)
    influence = told(sequences())
    with refused(" has no labels: the list is empty", "Give it labels, "):
        influence.on_loss([{**sequences()[1], "labels": []}])
    assert np.isfinite(influence.on_loss(sequences()[1:2]).values).all()
    rows = [row for row in rows if len(row["labels"])]
    same_without(rows, {0, 1, 2, 3, 4, 6, 7})


def test_a_label_at_every_token():
    influence, row = told(sequences()), {"input_ids": [3, 1, 4, 1]}
    with refused(", and a language model is asked for one label at every token", "Pass labels of the length of "):
        influence.on_loss([{**row, "labels": [4, 1]}])
    found = influence.on_loss([{**row, "labels": [-100, -100, 4, 1]}])
    with torch.no_grad():
        logits = seeded(NextForCausalLM)(torch.tensor([row["input_ids"]]))["logits"][0]
    assert found.query_values[0] == pytest.approx(float(cross_entropy(logits[1:3], torch.tensor([4, 1]))), rel=1e-5)


def test_columns_have_one_value_for_each_row():
    columns = {name: [row[name] for row in sentences()] for name in ("input_ids", "labels")}
    with refused("The columns do not have one length", "Pass one value for each row in every column"):
        named({**columns, "labels": columns["labels"][:-1]})
    np.testing.assert_allclose(
        named(columns).on_loss(sentences()[:2]).values, named(sentences()).on_loss(sentences()[:2]).values
    )


def test_words_become_numbers_first():
    words = [{"input_ids": ["some", "words"], "labels": row["labels"]} for row in sentences()]
    with refused("is no array of numbers", "Turn texts into numbers first: tokenizer(text, truncation=True)"):
        named(words)

    def tokenizer(text, truncation):
        return {"input_ids": [len(word) for word in text.split()][: 10 if truncation else None]}

    numbers = [{**tokenizer("some words", truncation=True), "labels": row["labels"]} for row in words]
    assert np.isfinite(named(numbers).on_loss(numbers[:2]).values).all()


# ---- stored.py, tables.py ----------------------------------------------------------------------------------------


def in_a_file(path):
    np.save(path, X)
    return np.load(path, mmap_mode="r")


def same_ridge(influence):
    """Whether an influence is that of the ridge regression on the arrays."""
    return np.array_equal(influence.on_loss(XQ, ZQ).values, ridge().on_loss(XQ, ZQ).values)


@pytest.mark.parametrize("how", ["written", "longer", "gone"])
def test_a_file_that_is_complete_is_opened_again(tmp_path, how):
    path = tmp_path / "X.npy"
    influence = ridge(X=in_a_file(path))
    influence.examples.x._kept.clear()
    if how == "gone":
        path.unlink()
    elif how == "longer":
        np.save(path, np.vstack([X, X]))
    else:
        os.utime(path, ns=(0, 0))
    with refused(" since X was opened, so that rows read now", "Wait until it is complete"):
        influence.on_loss(XQ, ZQ)
    assert same_ridge(ridge(X=in_a_file(path)))


def test_a_mapped_file_that_one_writes_to_is_flushed_first(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", X.dtype, X.shape)
    influence = uw.Examples(rows)
    rows[:] = X
    rows.flush()
    influence.x._kept.clear()
    os.utime(tmp_path / "X.npy", ns=(1, 1))
    with refused(" since X was opened, so that rows read now", "Wait until it is complete"):
        influence.batch([3])
    rows.flush()
    assert same_ridge(ridge(X=rows))


def test_a_damaged_file_is_made_again(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, table = tmp_path / "X.parquet", pa.table({f"x{j}": X[:, j] for j in range(3)} | {"z": Z})
    parquet.write_table(table, path, use_dictionary=False, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"\x00" * 400 + whole[440:])
    with refused("Rows of X could not be read: ", "Make it again"):
        ridge(X=parquet.ParquetFile(path), y="z")
    path.write_bytes(whole)
    assert same_ridge(ridge(X=parquet.ParquetFile(path), y="z"))


def test_a_filtered_dataset_is_held_in_memory(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import dataset, parquet

    table = pa.table({f"x{j}": np.r_[X[:, j], 1.0] for j in range(3)} | {"z": np.r_[Z, np.nan]})
    parquet.write_table(table, tmp_path / "X.parquet")
    filtered = dataset.dataset(tmp_path / "X.parquet").filter(dataset.field("z") < np.inf)
    with refused("X is a pyarrow Dataset with a filter", "Write the rows out and open them again, or hold them in"):
        ridge(X=filtered, y="z")
    assert same_ridge(ridge(X=filtered.to_table(), y="z"))


def test_rows_with_a_null_are_imputed_or_dropped():
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"x0": pa.array(X[:, 0], mask=HOLE), "x1": X[:, 1], "x2": X[:, 2], "z": Z})
    with refused(" holds no value (null) in row ", "Impute or drop those rows") as caught:
        ridge(X=table, y="z")
    assert "'x0' holds no value (null) in row 3" in str(caught.value)
    model = Ridge().fit(X[~HOLE], Z[~HOLE])
    dropped = uw.explain(model, table.drop_null(), "z")
    assert np.array_equal(dropped.on_loss(XQ, ZQ).values, uw.explain(model, X[~HOLE], Z[~HOLE]).on_loss(XQ, ZQ).values)
    frame = table.to_pandas()
    imputed = make_pipeline(SimpleImputer(), Ridge()).fit(frame[["x0", "x1", "x2"]], Z)
    expected = uw.explain(imputed, frame[["x0", "x1", "x2"]], Z).on_loss(frame[["x0", "x1", "x2"]], Z).values
    assert np.allclose(uw.explain(imputed, table, "z").on_loss(table, "z").values, expected)


def test_a_column_is_named_as_it_is_called():
    pa = pytest.importorskip("pyarrow")
    table = pa.table({f"x{j}": X[:, j] for j in range(3)} | {"z": Z})
    with refused("X is a table of the columns ", "Name a column as it is called there"):
        ridge(X=table, y="target")
    assert same_ridge(ridge(X=table, y="z"))
    assert same_ridge(ridge(X=table.drop_columns(["z"]), y=Z))
    with refused("X is a table of the columns ", "pass an array of one value per row"):
        ridge(X=table, y="z", ids="key")
    assert same_ridge(ridge(X=table, y="z", ids=[f"row {row}" for row in range(N)]))


def test_words_in_a_table_are_encoded_or_left_out(tmp_path):
    pa = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    from pyarrow import dataset, parquet

    table = pa.table({f"x{j}": X[:, j] for j in range(3)} | {"word": WORDS[:, 0], "z": Z})
    parquet.write_table(table, tmp_path / "X.parquet")
    path = tmp_path / "X.parquet"
    for given in (table, dataset.dataset(path), parquet.ParquetFile(path), datasets.Dataset(table)):
        with refused("A feature is a number, and column ", "Encode it: fit and explain a Pipeline") as caught:
            ridge(X=given, y="z")
        advice = str(caught.value).rpartition("was not fitted on: ")[2].rstrip(".")
        known = {"X": given, "pyarrow": pa, "path": path}
        assert same_ridge(ridge(X=eval(advice, known), y="z"))
    frame = table.to_pandas()
    encode = ColumnTransformer([("word", OneHotEncoder(), ["word"])], remainder="passthrough")
    model = make_pipeline(encode, Ridge()).fit(frame.drop(columns="z"), Z)
    expected = uw.explain(model, frame.drop(columns="z"), Z).on_loss(frame[:2].drop(columns="z"), Z[:2]).values
    assert np.allclose(uw.explain(model, table, "z").on_loss(table[:2], "z").values, expected)


def test_a_corrected_copy_is_another_file_with_the_columns_labels(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from upweight.data import rewritten

    table, out = tmp_path / "a.csv", tmp_path / "b.csv"
    table.write_text("kind\n3\n")
    with refused(" is the file itself, which is never edited. ", "Name another one, such as corrected-"):
        rewritten.rewrite(table, "kind", {0: "7"}, (), table)
    rewritten.rewrite(table, "kind", {0: "7"}, (), tmp_path / "corrected-a.csv")
    with refused(" are of different kinds, and the copy has the file's. ", "Name it "):
        rewritten.rewrite(table, "kind", {}, (), tmp_path / "b.parquet")
    rewritten.rewrite(table, "kind", {}, (), out)
    with refused("; its columns are ", "Name the one of labels: --label COLUMN"):
        rewritten.labels_in(table, "sort")
    assert rewritten.labels_in(table, "kind") == ["3"]
    pq.write_table(pa.table({"kind": pa.array([3], pa.int8())}), tmp_path / "a.parquet")
    with refused(" does not fit (", "Correct it to labels that the column can hold"):
        rewritten.rewrite(tmp_path / "a.parquet", "kind", {0: "x"}, (), tmp_path / "b.parquet")
    rewritten.rewrite(tmp_path / "a.parquet", "kind", {0: 7}, (), tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").column(0).to_pylist() == [7]
