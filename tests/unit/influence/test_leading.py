"""Answers of queries × rows that are never held, against NumPy on the whole matrix of values."""

from __future__ import annotations

import signal
import tracemalloc
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings, strategies as st
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch.nn.functional import cross_entropy

import upweight as uw
from small import net
from upweight.influence import streaming
from upweight.influence.running import EDGES, Belonging, Largest, Running, Spread
from upweight.model.chunks import CHUNK
from upweight.model.sweep import Sweep
from upweight.runs.stopping import Stopped

n, q, k = 3 * CHUNK + 200, 13, 40
DRAW = np.random.default_rng(5)
X = DRAW.normal(size=(n, 3))
X[2000:2100] = X[100:200]  # rows that are the same, so that values tie
WHOLE = X[:, 0] + DRAW.normal(size=n)
WHOLE[2000:2100] = WHOLE[100:200]
Y = np.where(WHOLE > 0.7, 2, (WHOLE > 0).astype(int))
XQ, YQ = DRAW.normal(size=(q, 3)), DRAW.integers(0, 3, size=q)
LABELS = np.array(["low", "middle", "high"])
WEIGHTS = np.where(np.arange(n) % 3 > 0, 0.0, 1.0)  # two thirds of the values are 0, and tie
GROUPS = {"early": np.arange(900), "across": np.arange(500, 2500), ("one", 1): [n - 1]}
IDS = [f"row {row}" for row in DRAW.permutation(n)]


def logistic(kind=np.asarray, **given):
    model = LogisticRegression(tol=1e-8).fit(X, LABELS[Y], given.get("sample_weight"))
    return uw.explain(model, kind(X), LABELS[Y], **given), kind(XQ), LABELS[YQ]


def least_squares():
    """Two queries lean on what no row determines: their values are NaN."""
    twice, asked = np.c_[X, X[:, 0]], np.c_[XQ, XQ[:, 0]]
    asked[[0, 5], 3] += 1
    return uw.explain(LinearRegression().fit(twice, WHOLE), twice, WHOLE), asked, YQ.astype(float)


@cache
def module():
    """Shared, so never to be changed."""
    data = (X[: 2 * CHUNK + 10], Y[: 2 * CHUNK + 10])
    made = uw.explain(net(3), *map(torch.from_numpy, data), loss=cross_entropy, penalty=0.1, damping=0.1)
    made.check()  # after which every sweep takes the same way
    return made, torch.from_numpy(XQ), torch.from_numpy(YQ)


def kernel():
    few = X[: CHUNK + 30]
    return uw.explain(KernelRidge(alpha=0.5, kernel="rbf").fit(few, WHOLE[: len(few)]), few, WHOLE[: len(few)]), XQ, YQ


CASES = {
    "logistic": logistic,
    "rows without weight": lambda: logistic(sample_weight=WEIGHTS),
    "names": lambda: logistic(ids=IDS),
    "sparse": lambda: logistic(scipy.sparse.csr_matrix),
    "by CG": lambda: logistic(solver=uw.solvers.CG(rtol=1e-8)),
    "without a value": least_squares,
    "module": module,
    "kernel": kernel,
}
pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")


def ordered(keys, count):
    """The smallest keys of every line; equal ones in the order of rows, NaN last."""
    return np.argsort(keys, axis=1, kind="stable")[:, :count]


def same(found, expected):
    rows, values = expected
    assert np.array_equal(found.rows, rows)
    assert found.values.tobytes() == np.ascontiguousarray(values).tobytes()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_everything_is_what_numpy_says_of_the_whole_matrix(case):
    influence, *on = case()
    scores = influence.on_loss(*on)
    leading = influence.leading(*on, k=k, groups=GROUPS if influence.n == n else [[0, 3], [5]])
    values = scores.values
    for count in (1, 7, k):
        for found, keys in ((leading.helpful(count), -values), (leading.harmful(count), values)):
            rows = ordered(keys, count)
            same(found, (rows, np.take_along_axis(values, rows, 1)))
    strongest = ordered(-np.abs(values), k)
    assert leading.top(k).reset_index().equals(scores.top(k).reset_index())
    assert leading.top(k)["value"].tolist() == pytest.approx(
        np.take_along_axis(values, strongest, 1).ravel().tolist(), rel=0, nan_ok=True
    )
    np.testing.assert_allclose(leading.total, values.sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(leading.mean, values.mean(1), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(leading.squares, (values**2).sum(1), rtol=1e-12)
    assert (leading.n, leading.measure, leading.axes) == (influence.n, scores.measure, scores.axes)
    assert np.array_equal(leading.query_values, scores.query_values)
    assert str(leading.certificate) == str(scores.certificate)


def test_rows_have_their_names():
    influence, *on = logistic(ids=IDS)
    leading, scores = influence.leading(*on, k=5), influence.on_loss(*on)
    assert np.array_equal(leading.helpful(3).ids, scores.helpful(3).ids)
    assert leading.to_pandas().index[:5].tolist() == scores.helpful(5).ids[0].tolist()
    assert leading.to_pandas()["side"].value_counts().to_dict() == {"helpful": 5 * q, "harmful": 5 * q}
    data = pd.DataFrame({"first": X[:, 0]}, index=IDS)
    assert leading.top(2, data).equals(scores.top(2, data))


@pytest.mark.parametrize("groups", [GROUPS, list(GROUPS.values())], ids=["names", "numbers"])
def test_sums_over_groups_are_those_of_their_columns(groups):
    influence, *on = logistic()
    values = influence.on_loss(*on).values
    found = influence.leading(*on, groups=groups).by_group
    expected = np.stack([values[:, np.asarray(rows)].sum(1) for rows in GROUPS.values()], 1)
    np.testing.assert_allclose(found.values, expected, rtol=1e-10, atol=1e-13)
    whole = influence.of_groups(groups, on=tuple(on))
    np.testing.assert_allclose(found.derivative, whole.derivative, rtol=1e-9, atol=1e-9)
    assert (found.axes, found.counterfactual, str(found)[:60]) == (whole.axes, whole.counterfactual, str(whole)[:60])
    assert found.to_pandas().columns.equals(whole.to_pandas().columns)
    assert influence.leading(*on).by_group is None


def test_sums_over_classes_have_the_names_of_the_classes():
    influence, *on = logistic()
    values = influence.on_loss(*on).values
    found = influence.leading(*on).by_class.to_pandas()
    assert found.columns.tolist() == ["high", "low", "middle"]
    for name in LABELS:
        np.testing.assert_allclose(found[name], values[:, LABELS[Y] == name].sum(1), rtol=1e-10, atol=1e-13)
    assert influence.leading(*on).by_class.axes == ("query", "class")
    assert least_squares()[0].leading(*least_squares()[1:]).by_class is None
    assert module()[0].leading(*module()[1:]).by_class.ids.tolist() == [0, 1, 2]


def test_the_histogram_counts_exactly():
    influence, *on = least_squares()
    counts, edges = influence.leading(*on).histogram
    values = influence.on_loss(*on).values
    nothing = np.isnan(values).any(1)
    assert nothing.tolist() == [query in (0, 5) for query in range(q)]
    assert counts[nothing].sum() == 0
    assert counts[~nothing].sum(1).tolist() == [n] * (q - 2)
    for line, own in zip(counts[~nothing], values[~nothing], strict=True):
        assert not np.isin(own, edges).any()
        assert np.array_equal(line, np.histogram(own, edges)[0])
    assert counts[:, 0].any()
    assert counts[:, -1].any()
    outer, inner = np.maximum(*np.abs([edges[1:], edges[:-1]])), np.minimum(*np.abs([edges[1:], edges[:-1]]))
    beyond = inner >= 2.0**-64
    assert (outer[beyond] <= 1.25 * inner[beyond]).all()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([*EDGES[1:-1], 0.0, -0.0, 5e-324])))
@settings(max_examples=60)
def test_a_bin_holds_its_edge_nearer_to_zero(values):
    spread = Spread(1)
    spread.add(np.array(values, dtype=float)[:, None])
    counts, edges = spread.found()
    expected = [
        sum((low <= v < high) if low > 0 else (low < v <= high) if high < 0 else (low < v < high) for v in values)
        for low, high in pairwise(edges)
    ]
    assert counts.sum() == len(values)
    assert counts[0].tolist() == expected


@given(
    st.integers(1, 50).flatmap(
        lambda count: st.tuples(st.just(count), st.lists(st.integers(1, CHUNK), min_size=1, max_size=4))
    ),
    st.integers(0, 2**32),
    st.sampled_from([2, 10**6]),
)
@settings(max_examples=40)
def test_the_largest_keys_of_any_chunks_with_many_ties(shape, seed, most):
    count, sizes = shape
    total = sum(sizes)
    keys = np.random.default_rng(seed).integers(0, most, size=(total, 3)).astype(float)
    keys[:, 2].sort()  # every row leads when it comes
    best, start = Largest(3, min(count, total)), 0
    for size in sizes:
        best.add(start, keys[start : start + size])
        start += size
    rows, found = best.found()
    expected = ordered(-keys.T, min(count, total))
    assert np.array_equal(rows, expected)
    assert np.array_equal(found, np.take_along_axis(keys.T, expected, 1))


def test_every_row_can_be_kept_and_no_more():
    influence, *on = kernel()
    whole, leading = influence.on_loss(*on), influence.leading(*on, k=influence.n)
    same(leading.helpful(influence.n), tuple(whole.helpful(influence.n)))
    assert leading.top(influence.n).equals(whole.top(influence.n))
    for more in (influence.n + 1, 0, True):
        with pytest.raises(uw.errors.InvalidInput) as refusal:
            influence.leading(*on, k=more)
        with pytest.raises(uw.errors.InvalidInput) as elsewhere:
            whole.helpful(more)
        assert str(refusal.value) == str(elsewhere.value)


def test_blocks_of_queries_are_the_whole_in_pieces(monkeypatch, tmp_path):
    influence, *on = least_squares()
    whole = influence.leading(*on, k=k, groups=GROUPS)
    monkeypatch.setattr(streaming, "_QUERIES", 5)
    found = influence.leading(*on, k=k, groups=GROUPS, store=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        f"queries-{first:08d}" for first in (0, 5, 10)
    ]
    assert np.array_equal(found.helpful(k).rows, whole.helpful(k).rows)
    np.testing.assert_allclose(found.harmful(k).values, whole.harmful(k).values, rtol=1e-9)
    np.testing.assert_allclose(found.by_group.values, whole.by_group.values, rtol=1e-9, atol=1e-12)
    assert np.array_equal(found.edges, whole.edges)
    assert np.array_equal(found.counts, whole.counts)
    assert found.certificate.residual.shape == (q,)
    again = influence.leading(*on, k=k, groups=GROUPS, store=tmp_path / "run")
    assert again.helpful(k).values.tobytes() == found.helpful(k).values.tobytes()


def test_any_measure():
    influence, xq, _ = logistic()

    def margin(params, x):
        return params["coef"][0] @ x

    scores, leading = influence.on_measure(margin, xq), influence.leading(xq, k=9, measure=margin)
    same(leading.helpful(9), tuple(scores.helpful(9)))
    assert leading.measure == scores.measure == "margin"


def test_a_file_keeps_everything(tmp_path):
    influence, *on = logistic(ids=[("row", row) for row in range(n)])
    leading = influence.leading(*on, k=6, groups=GROUPS)
    leading.save(tmp_path / "leading")
    loaded = uw.Leading.load(tmp_path / "leading")
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "leading").read_bytes()
    assert (str(loaded), loaded._repr_html_()) == (str(leading), leading._repr_html_())
    assert loaded.top(6).equals(leading.top(6))
    assert loaded.by_group.to_pandas().equals(leading.by_group.to_pandas())
    assert loaded.by_class.ids.tolist() == leading.by_class.ids.tolist()


# ---- interruptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(4))
def test_a_call_goes_on_at_the_chunk_where_it_was_interrupted(chunk, tmp_path, monkeypatch):
    influence, *on = logistic()
    influence.leading(*on, k=6, groups=GROUPS).save(tmp_path / "whole")
    monkeypatch.setattr(streaming, "KEPT_EVERY", 0.0)
    monkeypatch.setattr(streaming, "SELDOM", 0)
    add, seen = Running.add, []

    def interrupted(running, first, values):
        if first == chunk * CHUNK:
            raise KeyboardInterrupt
        add(running, first, values)

    def counted(running, first, values):
        seen.append(first // CHUNK)
        add(running, first, values)

    monkeypatch.setattr(Running, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        influence.leading(*on, k=6, groups=GROUPS, store=tmp_path / "run")
    monkeypatch.setattr(Running, "add", counted)
    monkeypatch.setattr(streaming, "KEPT_EVERY", 1e9)
    for _ in range(2):  # the second has nothing left to see
        logistic()[0].leading(*on, k=6, groups=GROUPS, store=tmp_path / "run").save(tmp_path / "resumed")
        assert seen == list(range(chunk, 4))
        assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list((tmp_path / "run").glob("chunk-*"))


def test_a_signal_keeps_what_has_passed_by(tmp_path, monkeypatch):
    influence, *on = logistic()
    influence.leading(*on, k=6).save(tmp_path / "whole")
    add = Running.add

    def signalled(running, first, values):
        add(running, first, values)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Running, "add", signalled)
        with pytest.raises(Stopped, match="after chunk 1 of 4"):
            influence.leading(*on, k=6, store=tmp_path / "run")
    again = influence.leading(*on, k=6, store=tmp_path / "run")
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_other_rows_to_keep_are_looked_for_anew(tmp_path):
    """The folder of one question may hold several k and groups; none is taken for another."""
    influence, *on = logistic()
    asked = [
        {"k": 6},
        {"k": 7},
        {"k": 6, "groups": GROUPS},
        {"k": 6, "groups": {"0": np.arange(3), "1": np.arange(3, 9)}},
    ]
    for number, how in enumerate(asked):
        influence.leading(*on, **how, store=tmp_path / "run").save(tmp_path / f"{number} kept")
        influence.leading(*on, **how).save(tmp_path / f"{number} plain")
        assert (tmp_path / f"{number} kept").read_bytes() == (tmp_path / f"{number} plain").read_bytes()
    assert len(list((tmp_path / "run").glob("passed-*"))) == len(asked)


def test_a_damaged_state_is_refused(tmp_path):
    influence, *on = logistic()
    influence.leading(*on, k=6, store=tmp_path / "run")
    (file,) = (tmp_path / "run").glob("passed-*")
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    with pytest.raises(uw.errors.Damaged, match=r"passed-.* is damaged"):
        influence.leading(*on, k=6, store=tmp_path / "run")


def test_scores_that_a_folder_holds_are_read_and_not_computed(tmp_path, monkeypatch):
    influence, *on = logistic()
    scores = influence.on_loss(*on, store=tmp_path / "run")
    of_chunk = Sweep._of_chunk

    def computed(sweep, function, place, number, vectors, label, sums):
        assert label != "scores"
        return of_chunk(sweep, function, place, number, vectors, label, sums)

    monkeypatch.setattr(Sweep, "_of_chunk", computed)
    same(influence.leading(*on, store=tmp_path / "run").helpful(4), tuple(scores.helpful(4)))
    monkeypatch.undo()
    with pytest.raises(uw.errors.StoreMismatch, match="other work"):
        influence.leading(on[0] + 1, on[1], store=tmp_path / "run")


def test_without_a_store_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    influence, *on = logistic()
    influence.leading(*on)
    assert not list(tmp_path.iterdir())


# ---- memory ------------------------------------------------------------------------------------------------------


def traced(question):
    tracemalloc.start()
    try:
        question()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def many():
    """Influences of so many chunks of rows, and 64 queries."""
    rows = DRAW.normal(size=(120 * CHUNK, 2))
    labels = (rows[:, 0] > 0).astype(int)
    model = LogisticRegression().fit(rows[:CHUNK], labels[:CHUNK])

    def made(chunks):
        influence = uw.Influence(
            uw.explain(model, rows[:CHUNK], labels[:CHUNK]).objective,
            uw.Examples(rows[: chunks * CHUNK], labels[: chunks * CHUNK]),
            damping=0.1,
        )
        influence.on_loss(rows[:1], labels[:1])
        return influence

    return made, (rows[:64], labels[:64])


def test_memory_does_not_grow_with_queries_times_rows(many):
    made, on = many
    small, large = (traced(partial(made(chunks).leading, *on, k=20)) for chunks in (40, 120))
    matrix = 8 * 64 * 80 * CHUNK  # what the difference would be
    assert large - small < matrix / 5
    assert large < 8 * 64 * 120 * CHUNK / 4


def test_a_block_of_scores_takes_what_is_documented(many):
    made, on = many
    influence = made(120)
    block = 8 * 32 * (influence.n + 4 * influence.objective.size)
    one = traced(lambda: next(influence.on_loss_in_blocks(*on, size=32)))
    assert 0.8 * block < one < 1.2 * block

    def loop():
        for scores in influence.on_loss_in_blocks(*on, size=32):
            assert len(scores.values) == 32

    assert 1.6 * block < traced(loop) < 2.4 * block
    assert traced(lambda: uw.extremes(influence.on_loss_in_blocks(*on, size=32), 5)) < 1.8 * block


def taken_in_a_file(rows, folder):
    """Bytes that `explain` and `leading` of rows in a file hold at the end, and at most; beside y."""
    file = np.lib.format.open_memmap(folder / f"{rows}.npy", "w+", np.float32, (rows, 4))
    file[:] = np.random.default_rng(0).standard_normal((rows, 4), dtype=np.float32)
    file.flush()
    y = (file[:, 0] + DRAW.logistic(size=rows) > 0).astype(int)
    model, asked = LogisticRegression(tol=1e-10).fit(np.array(file), y), np.array(file[:8])
    mapped = np.load(folder / f"{rows}.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        influence = uw.explain(model, mapped, y, progress=False)
        influence.leading(asked, y[:8], k=10)
        return np.array(tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()


def test_of_a_row_in_a_file_two_derivatives_are_kept(tmp_path, monkeypatch):
    """16 bytes a row, and 9 more in passing: no weights where none were given, no lists of rows, nothing of X."""
    monkeypatch.setattr("upweight.data.stored._BLOCK_BYTES", 2**16)
    taken_in_a_file(20_000, tmp_path)  # what is imported and prepared once
    few, more = (taken_in_a_file(rows, tmp_path) for rows in (60_000, 160_000))
    held, most = (more - few) / 100_000
    assert 15.5 < held < 16.5
    assert most < 26


def test_rows_belong_to_groups_whether_these_overlap_or_not():
    """Against a matrix of zeros and ones, written out."""
    rows = DRAW.permutation(50)
    for groups in (
        [rows[:20], rows[20:45]],
        [rows[:20], rows[20:]],
        [rows[:20], rows[10:30]],
        [],
        [rows[:0], rows[:3]],
    ):
        expected = np.zeros((50, len(groups)))
        for number, group in enumerate(groups):
            expected[group, number] = 1
        found = Belonging([np.asarray(group, dtype=np.int64) for group in groups], 50)
        if (expected.sum(1) == 1).all():
            numbered = Belonging.by_number(expected.argmax(1), len(groups))
            assert np.array_equal(numbered.rows(3, 40).toarray(), expected[3:40])
        assert np.array_equal(found.rows(0, 50).toarray(), expected)
        values = DRAW.normal(size=(7, 4))
        np.testing.assert_allclose(found.rows(5, 12).T @ values, expected[5:12].T @ values, rtol=1e-13, atol=1e-13)
