"""Row ids, batches, weights and fingerprints; refusals are in test_bad_input."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

import upweight as uw
from small import Items, N, X, Y, changed, pairs, refuses
from upweight.data.arrays import checked_rows
from upweight.data.examples import PROBE_ROWS
from upweight.data.trees import batch_length, leaves, like, take, tree_map


def test_rows_keep_their_numbers_in_any_batch():
    examples = uw.Examples(X, Y)
    for rows in ([3], [7, 2, 2, 39], np.arange(N)[::-1], slice(5, 9), slice(None)):
        x, y = examples.batch(rows)
        assert np.array_equal(x.numpy(), X[rows])
        assert np.array_equal(y.numpy(), Y[rows])


def test_a_batch_of_a_dataset_is_a_batch_of_its_arrays():
    for rows in ([7, 2, 2], slice(5, 9)):
        for ours, theirs in zip(uw.Examples(pairs()).batch(rows), uw.Examples(X, Y).batch(rows), strict=True):
            assert torch.equal(ours, theirs)


def test_arrays_are_views():
    examples = uw.Examples(X, Y)
    assert np.shares_memory(examples.x, X)
    assert np.shares_memory(examples.batch(slice(0, 5))[0].numpy(), X)
    tensor = torch.tensor(X)
    assert uw.Examples(tensor).x.data_ptr() == tensor.data_ptr()


def test_sparse_rows_stay_sparse():
    examples = uw.Examples(scipy.sparse.csc_matrix(X), Y)
    x, _ = examples.batch([3, 1])
    assert scipy.sparse.issparse(x)
    assert np.array_equal(x.toarray(), X[[3, 1]])


def test_an_example_without_target_is_its_input():
    assert torch.equal(uw.Examples(X).batch([2]), torch.tensor(X[[2]]))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (None, range(5)),
        (3, [3]),
        (np.int32(3), [3]),
        ([4, 0, 4], [4, 0, 4]),
        ((1, 2), [1, 2]),
        (range(1, 4), [1, 2, 3]),
        ({2}, [2]),
        (map(int, "01"), [0, 1]),
        (np.array([1, 2], dtype=np.uint8), [1, 2]),
        (torch.tensor([2, 3]), [2, 3]),
        ([True, False, True, False, False], [0, 2]),
        (np.array([0, 0, 0, 0, 1], dtype=bool), [4]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_in_any_form(rows, expected):
    found = checked_rows(rows, 5)
    assert found.dtype == np.int64
    assert found.tolist() == list(expected)


def test_weights_are_copies():
    given = np.linspace(0.5, 2, N)
    examples = uw.Examples(X, Y, sample_weight=given)
    given[0] = 99
    assert examples.weights[0] == 0.5
    assert np.array_equal(uw.Examples(X).weights, np.ones(N))


def test_the_weight_of_all_rows_is_not_that_of_one():
    examples = uw.Examples(X)
    with pytest.raises(ValueError, match="read-only"):
        examples.weights[0] = 0.0
    assert uw.Examples(X[:1]).weights.sum() == 1


def test_inputs_in_bfloat16_have_a_fingerprint():
    x = torch.arange(2.0 * N, dtype=torch.bfloat16).reshape(N, 2)
    assert uw.Examples(x, Y).fingerprint() != uw.Examples(x + x, Y).fingerprint()


@pytest.mark.parametrize("examples", [uw.Examples(X, Y), uw.Examples(pairs()), uw.Examples(X)], ids=repr)
def test_only_is_one_row(examples):
    one = examples.only(7)
    assert len(one) == 1
    for ours, theirs in zip(leaves(one.batch([0])), leaves(examples.batch([7])), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [lambda: uw.Examples(X, Y), lambda: uw.Examples(pairs())], ids=["arrays", "dataset"])
def test_relabelled_rows_keep_their_inputs_and_their_label_type(make):
    new = make().relabelled(np.array([4, 2]), torch.tensor([1.0, 0.0]))
    x, y = new.batch(slice(None))
    assert np.array_equal(x.numpy(), X[[4, 2]])
    assert y.dtype == torch.int64
    assert y.tolist() == [1, 0]


def test_the_same_data_have_the_same_fingerprint():
    prints = {uw.Examples(A, Y).fingerprint() for A in (X, X.copy(), np.asfortranarray(X), torch.tensor(X))}
    assert len(prints) == 1
    assert len(prints.pop()) == 16


@pytest.mark.parametrize(
    "other",
    [
        lambda: uw.Examples(changed(X, (17, 1), 0.0), Y),
        lambda: uw.Examples(X, changed(Y, 17, 1 - Y[17])),
        lambda: uw.Examples(X[:-1], Y[:-1]),
        lambda: uw.Examples(X, Y, sample_weight=changed(np.ones(N), 17, 2.0)),
        lambda: uw.Examples(X[::-1], Y[::-1]),
        lambda: uw.Examples(X),
    ],
    ids=["input", "label", "length", "weight", "order", "no target"],
)
def test_other_data_have_another_fingerprint(other):
    assert other().fingerprint() != uw.Examples(X, Y).fingerprint()


def test_two_equal_rows_swapped_between_labels_have_another_fingerprint():
    assert uw.Examples(X, Y).fingerprint() != uw.Examples(X[np.r_[1, 0, 2:N]], Y).fingerprint()


def test_two_rows_swapped_far_from_the_probed_ones_have_another_fingerprint():
    """The sum over all inputs and a few probed rows do not see an exchange of two others; the scores do."""
    many = np.arange(4000.0).reshape(2000, 2)
    examples = uw.Examples(many)
    free = np.setdiff1d(np.arange(2000), examples.spread(PROBE_ROWS))[:2]
    other = many.copy()
    other[free] = many[free[::-1]]
    assert uw.Examples(other).fingerprint() != examples.fingerprint()


def test_rows_are_spread_from_the_first_to_the_last():
    assert uw.Examples(X).spread(3).tolist() == [0, 19, 39]
    assert uw.Examples(X[:2]).spread(8).tolist() == [0, 1]


def test_a_dataset_that_fails_says_so_itself():
    class Failing(Items):
        def __getitem__(self, row):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        uw.Examples(Failing(pairs().items))


def test_trees_keep_their_nesting():
    tree = {"a": (torch.ones(2), [torch.zeros(2, dtype=torch.int64)])}
    doubled = tree_map(lambda leaf: 2 * leaf, tree)
    assert doubled["a"][0].tolist() == [2, 2]
    assert isinstance(doubled["a"][1], list)
    assert batch_length(tree) == 2
    assert take(tree, 1)["a"][0].item() == 1
    cast = like(tree, torch.ones((), dtype=torch.float64))
    assert [leaf.dtype for leaf in leaves(cast)] == [torch.float64, torch.int64]


def test_the_text_tells_the_shape():
    assert repr(uw.Examples(X, Y)) == "Examples(n=40, X (40, 3))"
    assert repr(uw.Examples(pairs())) == "Examples(n=40, Items)"


def test_no_weight_for_a_missing_row():
    refuses(lambda: uw.Examples(X, sample_weight=np.ones(N + 1)), ValueError, r"\(41,\), and there are 40")


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(2), torch.tensor(0)), (torch.zeros(2), torch.tensor(1))])


def test_a_loader_and_a_stream_are_refused_with_what_to_pass():
    data = torch.utils.data.TensorDataset(torch.randn(6, 2), torch.arange(6) % 2)
    loader = torch.utils.data.DataLoader(data, 2, shuffle=True)
    for bad, text in ((loader, r"DataLoader.*loader\.dataset"), (_Stream(), r"_Stream.*map\(torch\.stack")):
        with pytest.raises(uw.errors.InvalidInput, match=text):
            uw.Examples(bad)
    settings = {"loss": torch.nn.functional.cross_entropy, "damping": 0.1}
    model = torch.nn.Linear(2, 2).eval()
    assert uw.explain(model, loader.dataset, **settings).n == 6  # what the messages say to type
    inputs, labels = map(torch.stack, zip(*_Stream(), strict=True))
    assert uw.explain(model, inputs, labels, **settings).n == 2
