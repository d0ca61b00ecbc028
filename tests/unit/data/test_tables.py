"""Tables as X: which columns are features, targets and names, and what their rows are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn
from torch.nn.functional import mse_loss

import upweight as uw
from stored import KINDS, columns, opened, small_blocks, values  # noqa: F401 a fixture
from upweight.data.stored import Stored
from upweight.errors import InvalidInput
from upweight.operators import Identity

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
from pyarrow import dataset, parquet  # noqa: E402 once it is known to be there

N, D = 200, 4
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, D)).astype(np.float32)
Z = X @ DRAW.normal(size=D) + DRAW.normal(size=N)
NAMES = [f"row {number}" for number in DRAW.permutation(N)]

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_numbers_and_names(tmp_path, kind):
    table = opened(kind, columns(X, id=NAMES, target=Z), tmp_path)
    examples = uw.Examples(table, "target")
    assert isinstance(examples.x, Stored)
    assert examples.x.block_rows < N
    assert examples.ids.tolist() == NAMES
    for rows in ([N - 1, 0, 40, 40], slice(35, 120), np.arange(N)[::-7], slice(None), [5]):
        x, y = examples.batch(rows)
        assert np.array_equal(x.numpy(), X[rows])
        assert x.dtype.itemsize == 4
        assert np.array_equal(y.numpy(), Z[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_knows_its_columns_by_name(tmp_path, kind):
    """In its own order, whatever else the table holds; queries may lie in a table, too."""
    frame = pd.DataFrame(X, columns=[f"x{j}" for j in range(D)])[["x2", "x0"]]
    model = Ridge().fit(frame, Z)
    table = columns(X, words=["a"] * N, target=Z, key=NAMES)
    expected = uw.explain(model, frame, Z, ids=NAMES).on_loss(frame[:3], Z[:3])
    influence = uw.explain(model, opened(kind, table, tmp_path), "target", ids="key")
    found = influence.on_loss(opened(kind, table[:3], tmp_path), "target")
    assert np.array_equal(found.values, expected.values)
    assert found.ids.tolist() == NAMES


def test_columns_of_several_kinds_have_a_common_one():
    table = pa.table({"a": pa.array([1, 2], pa.int8()), "b": pa.array([0.5, 2], pa.float32()), "c": [True, False]})
    x = uw.Examples(table, np.zeros(2)).x
    assert x.dtype == np.float32
    assert np.array_equal(np.asarray(x), [[1, 0.5, 1], [2, 2, 0]])
    assert uw.Examples(table.append_column("d", [[7, 8]]), np.zeros(2)).x.dtype == np.float64


def test_lists_of_one_length_are_as_many_features(tmp_path):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), D)
    table = pa.table({"embedding": lists, "more": X[:, 1], "target": Z})
    for kind in ("Table", "Dataset", "ParquetFile"):
        examples = uw.Examples(opened(kind, table, tmp_path), "target")
        assert np.array_equal(np.asarray(examples.x), np.hstack([X, X[:, 1:2]]))


def test_targets_may_be_words_categories_or_lists(tmp_path):
    words = np.where(X[:, 0] > 0, "high", "low")
    model = LogisticRegression(tol=1e-8).fit(X, words)
    expected = values(model, X, words, (X[:2], words[:2]))
    for target in (pa.array(words), pa.array(words).dictionary_encode()):
        table = opened("Dataset", columns(X, target=target), tmp_path)
        assert np.array_equal(values(model, table, "target", (X[:2], words[:2])), expected)
    two = np.stack([Z, -Z], 1)
    table = columns(X, target=pa.FixedSizeListArray.from_arrays(pa.array(two.ravel()), 2))
    model = Ridge().fit(X, two)
    assert np.array_equal(values(model, table, "target", (X[:2], two[:2])), values(model, X, two, (X[:2], two[:2])))


def test_a_pipeline_encodes_a_block_at_a_time(tmp_path):
    frame = pd.DataFrame(X, columns=[f"x{j}" for j in range(D)]).assign(city=np.where(X[:, 1] > 0, "Ulm", "Bonn"))
    encode = ColumnTransformer([("city", OneHotEncoder(), ["city"]), ("rest", StandardScaler(), ["x3", "x0"])])
    model = make_pipeline(encode, Ridge()).fit(frame, Z)
    table = pa.Table.from_pandas(frame.assign(target=Z), preserve_index=False)
    expected = values(model, frame, Z, (frame[:2], Z[:2]))
    for kind in ("Table", "datasets.Dataset", "Dataset"):
        influence = uw.explain(model, opened(kind, table, tmp_path), "target")
        assert np.allclose(influence.on_loss(table[:2], "target").values, expected, rtol=1e-10)


def test_a_module_reads_columns():
    module = nn.Linear(D, 1).double()
    asked = {"loss": lambda out, y: mse_loss(out[:, 0], y), "curvature": Identity()}
    found = values(module, columns(X, target=Z), "target", (X[:2], Z[:2]), **asked)
    assert np.array_equal(found, values(module, X, Z, (X[:2], Z[:2]), **asked))


def test_row_groups_are_read_in_order_and_none_is_read_for_nothing(tmp_path, monkeypatch):
    """An empty one among them, and files of a folder one behind the other."""
    table, file = columns(X), tmp_path / "rows.parquet"
    with parquet.ParquetWriter(file, table.schema) as writer:
        for part in (table[:50], table[50:50], table[50:170], table[170:]):
            writer.write_table(part)
    given = parquet.ParquetFile(file)
    assert [given.metadata.row_group(g).num_rows for g in range(4)] == [50, 0, 120, 30]
    whole = uw.Examples(given)
    asked = []
    read = given.iter_batches
    watched = lambda **settings: (asked.append(settings["row_groups"]), read(**settings))[1]  # noqa: E731
    monkeypatch.setattr(given, "iter_batches", watched)
    assert np.array_equal(np.concatenate([whole.x[at : at + 3] for at in range(0, N, 3)]), X)
    assert asked == [[0], [1], [2], [3]]
    asked.clear()
    assert np.array_equal(whole.batch([199, 180]).numpy(), X[[199, 180]])
    assert asked == []  # the last block is still there
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, at in enumerate((0, 60, 60)):
        parquet.write_table(table[at : (60, 60, N)[number]], folder / f"{number}.parquet", row_group_size=40)
    assert np.array_equal(np.asarray(uw.Examples(dataset.dataset(folder)).x), X)


def test_a_dataset_of_files_of_another_format(tmp_path):
    from pyarrow import feather

    feather.write_feather(columns(X), tmp_path / "rows.feather")
    there = dataset.dataset(tmp_path / "rows.feather", format="feather")
    assert np.array_equal(np.asarray(uw.Examples(there).x), X)


@pytest.mark.parametrize(
    ("kind", "value"), [(pa.string(), "a"), (pa.date32(), 3), (pa.list_(pa.float32()), [1.0]), (pa.decimal128(3), 1)]
)
def test_what_is_no_number_is_no_feature(kind, value):
    table = pa.table({"a": [1.0], "wrong": pa.array([value], kind)})
    with pytest.raises(InvalidInput, match=re.escape(f"'wrong' holds {kind}")):
        uw.Examples(table, [0.0])
    assert np.array_equal(np.asarray(uw.Examples(table.drop_columns(["wrong"]), [0.0]).x), [[1.0]])


def test_a_table_of_whole_examples_is_left_to_who_reads_them():
    datasets = pytest.importorskip("datasets")
    items = datasets.Dataset.from_dict({"x": [1.0, 2.0]}).with_format("torch")
    assert uw.Examples(items).dataset is items
