"""Inputs in every honest form give the numbers of the same computation on plain float64 arrays."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import upweight as uw
from small import (
    NAMES,
    NAMESQ,
    XQ,
    YQ,
    ZQ,
    D,
    Items,
    N,
    X,
    Y,
    Z,
    classifier,
    fitted,
    logistic,
    net,
    pairs,
    regressor,
    ridge,
    seeded,
)
from tolerances import FLOAT32

SAME = 1e-9
WHOLE = np.round(3 * X)  # values that every number type holds exactly


def close(ours, theirs, rtol=SAME):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


# ---- memory layouts and number types -----------------------------------------------------------------------------


def read_only(A):
    other = A.copy()
    other.setflags(write=False)
    return other


def strided(A):
    return np.repeat(A, 2, axis=0)[::2]


def reversed_twice(A):
    return A[::-1].copy()[::-1]


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "strided": strided,
    "negative stride": reversed_twice,
    "read-only": read_only,
    "big-endian": lambda A: A.astype(A.dtype.newbyteorder(">")),
    "long double": lambda A: A.astype(np.longdouble) if A.dtype.kind == "f" else A,
    "tensor": torch.tensor,
    "tensor with gradient": lambda A: torch.tensor(A, requires_grad=A.dtype.kind == "f"),
    "tensor in another order": lambda A: torch.tensor(A.T.copy()).T if A.ndim == 2 else torch.tensor(strided(A)),
    "list": lambda A: A.tolist(),
    "objects": lambda A: A.astype(object) if A.dtype.kind == "f" else A,
    "memory map": lambda A: A.view(np.memmap),
}
EXPLAINED = {
    "logistic": (lambda X, y: logistic(X, NAMES), NAMES, NAMESQ),
    "ridge": (ridge, Z, ZQ),
    "classifier": (lambda X, y: classifier(X=X, y=y), Y, YQ),
    "regressor": (lambda X, y: regressor(X=X, y=y), Z[:, None], ZQ[:, None]),
}


@pytest.fixture(params=EXPLAINED)
def explained(request):
    return EXPLAINED[request.param]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def in_layout(layout, labels):
    return labels if labels.dtype.kind == "U" else layout(labels)


def test_training_arrays_of_any_layout(explained, layout):
    explain, y, yq = explained
    close(explain(layout(X), in_layout(layout, y)).on_loss(XQ, yq).values, explain(X, y).on_loss(XQ, yq).values)


def test_queries_of_any_layout(explained, layout):
    explain, y, yq = explained
    influence = explain(X, y)
    close(influence.on_loss(layout(XQ), in_layout(layout, yq)).values, influence.on_loss(XQ, yq).values)


def test_new_rows_and_labels_of_any_layout(explained, layout):
    explain, y, yq = explained
    influence, rows, on = explain(X, y), [3, 5, 8], (XQ, yq)
    labels = y[[1, 0, 2]]
    other = in_layout(layout, labels)
    close(influence.of_relabeling(rows, other, on=on).values, influence.of_relabeling(rows, labels, on=on).values)
    replaced = influence.of_replacing(rows, X[:3], labels, on=on).values
    close(influence.of_replacing(rows, layout(X[:3]), other, on=on).values, replaced)
    moved = influence.on_params_of_perturbing(rows, X[:3])
    close(influence.on_params_of_perturbing(rows, layout(X[:3])), moved)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint16, np.uint64, np.float16, np.float32])
@pytest.mark.parametrize("explained", ["ridge", "classifier"], indirect=True)
def test_whole_inputs_of_any_number_type(explained, dtype):
    explain, y, yq = explained
    values = np.abs(WHOLE)
    if explain is ridge:
        model = Ridge(alpha=2.0).fit(values, Z)
        influences = [uw.explain(model, A, Z) for A in (values, values.astype(dtype))]
    else:
        influences = [explain(A, y) for A in (values, values.astype(dtype))]
    plain, other = influences
    close(other.on_loss(values[:4].astype(dtype), yq).values, plain.on_loss(values[:4], yq).values)


@pytest.mark.parametrize("single", ["X", "y", "both", "queries"])
def test_float32_and_float64_mixed(explained, single):
    explain, y, yq = explained
    expected = explain(X, y).on_loss(XQ, yq).values

    def low(A, names):
        return A.astype(np.float32) if single in names and A.dtype.kind == "f" else A

    influence = explain(low(X, ("X", "both")), low(y, ("y", "both")))
    close(influence.on_loss(low(XQ, ("queries",)), low(yq, ("queries",))).values, expected, FLOAT32)


@pytest.mark.parametrize("data", [np.float32, np.float64])
def test_a_float32_module_is_the_float64_module_of_the_same_weights(data):
    rounded = net(dtype=torch.float32)
    exact = net(dtype=torch.float32).double()
    expected = classifier(exact).on_loss(XQ, YQ).values
    close(classifier(rounded, X=X.astype(data)).on_loss(XQ, YQ).values, expected, FLOAT32)


# ---- labels ------------------------------------------------------------------------------------------------------

CLASS_LABELS = {
    "whole floats": np.float64,
    "float32": np.float32,
    "int32": np.int32,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": bool,
    "big-endian": ">i4",
}


@pytest.mark.parametrize("where", ["training", "queries", "new labels", "dataset", "dataset queries"])
@pytest.mark.parametrize("dtype", CLASS_LABELS.values(), ids=CLASS_LABELS)
def test_class_numbers_of_any_type_for_a_module(dtype, where):
    plain, on = classifier(), (XQ, YQ)
    expected = plain.on_loss(*on).values
    native = np.dtype(dtype).newbyteorder("=")
    if where == "training":
        found = classifier(y=Y.astype(dtype)).on_loss(*on).values
    elif where == "queries":
        found = plain.on_loss(XQ, YQ.astype(dtype)).values
    elif where == "dataset":
        found = classifier(X=pairs(X, Y.astype(native)), y=None).on_loss(*on).values
    elif where == "dataset queries":
        found = plain.on_loss(pairs(XQ, YQ.astype(native))).values
    else:
        found = plain.of_relabeling([0, 1, 2], (1 - Y[:3]).astype(dtype), on=on).values
        expected = plain.of_relabeling([0, 1, 2], 1 - Y[:3], on=on).values
    close(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, bool, object])
def test_class_numbers_of_any_type_for_an_estimator(dtype):
    model = LogisticRegression(tol=1e-10, max_iter=5000).fit(X, Y)
    expected = uw.explain(model, X, Y).on_loss(XQ, YQ).values
    close(uw.explain(model, X, Y.astype(dtype)).on_loss(XQ, YQ.astype(dtype)).values, expected)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, bool, np.float32])
def test_whole_targets_of_any_type_for_float_criteria(dtype):
    targets, queries = Y[:, None], YQ[:, None]
    for loss in (mse_loss, binary_cross_entropy_with_logits):
        expected = regressor(y=targets * 1.0, loss=loss).on_loss(XQ, queries * 1.0).values
        found = regressor(y=targets.astype(dtype), loss=loss).on_loss(XQ, queries.astype(dtype)).values
        close(found, expected)


def test_estimators_take_whole_targets():
    whole = np.round(Z).astype(int)
    model = Ridge(alpha=2.0).fit(X, whole)
    close(
        uw.explain(model, X, whole).on_loss(XQ, whole[:4]).values,
        uw.explain(model, X, whole * 1.0).on_loss(XQ, whole[:4] * 1.0).values,
    )


@pytest.mark.parametrize(
    "shape", [lambda y: y[:, None], lambda y: y.tolist(), tuple, pd.Series, pd.Index, pd.Categorical]
)
def test_labels_as_columns_lists_and_series(shape):
    close(logistic(y=shape(NAMES)).on_loss(XQ, shape(NAMESQ)).values, logistic().on_loss(XQ, NAMESQ).values)


# ---- few of anything ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logistic", "classifier", "regressor"])
def test_a_single_query_is_its_line_among_many(kind):
    explain, y, yq = EXPLAINED[kind]
    influence = explain(X, y)
    together = influence.on_loss(XQ, yq)
    for q in range(4):
        alone = influence.on_loss(XQ[q : q + 1], yq[q : q + 1])
        close(alone.values, together.values[q : q + 1])
        close(alone.query_values, together.query_values[q : q + 1])


@pytest.mark.parametrize("label", [0, 1])
def test_queries_of_a_single_class(label):
    only = np.flatnonzero(label == Y)[:3]
    close(logistic().on_loss(X[only], NAMES[only]).values, logistic().on_loss(X, NAMES).values[only])
    close(classifier().on_loss(X[only], Y[only]).values, classifier().on_loss(X, Y).values[only])


def test_a_training_set_of_a_single_class_for_a_module():
    only = np.flatnonzero(Y == 1)
    values = classifier(X=X[only], y=Y[only]).on_loss(XQ, YQ).values
    close(classifier(X=X[only], y=Y[only] * 1.0).on_loss(XQ, YQ).values, values)


def test_one_feature_by_hand():
    """Ridge through the origin: values = (2/n) g_q gᵢ / (2(Σx² + α)/n) with g = (xw − y) x."""
    x = X[:, :1]
    model = Ridge(alpha=1.0, fit_intercept=False).fit(x, Z)
    gradients, of_queries = (2 * (model.predict(A) - t) * A[:, 0] for A, t in ((x, Z), (XQ[:, :1], ZQ)))
    expected = np.outer(of_queries, gradients) / (2 * ((x**2).sum() + 1))
    close(uw.explain(model, x, Z).on_loss(XQ[:, :1], ZQ).values, expected)


def test_one_feature_of_a_module_is_the_estimator():
    x, xq = X[:, :1], XQ[:, :1]
    model = Ridge(alpha=1.0, fit_intercept=False).fit(x, Z)
    layer = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(model.coef_[None]))
    stays = {"penalty_per_example": False}  # as beside Ridge's sum
    module = regressor(layer, X=x, penalty=2 / N, **stays).on_loss(xq, ZQ[:, None])
    close(module.values, uw.explain(model, x, Z).on_loss(xq, ZQ).values)


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_rows(n):
    model = Ridge(alpha=1.0, fit_intercept=False).fit(X[:n], Z[:n])
    H = 2 * (X[:n].T @ X[:n] + np.eye(D)) / n
    gradients, of_queries = (2 * (model.predict(A) - t)[:, None] * A for A, t in ((X[:n], Z[:n]), (XQ, ZQ)))
    expected = of_queries @ np.linalg.solve(H, gradients.T) / n
    influence = uw.explain(model, X[:n], Z[:n])
    close(influence.on_loss(XQ, ZQ).values, expected)
    layer = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(model.coef_[None]))
    module = regressor(layer, X=X[:n], y=Z[:n, None], penalty=2 / n, penalty_per_example=False)
    close(module.on_loss(XQ, ZQ[:, None]).values, expected)
    assert len(influence.of_self().values) == n
    assert influence.of_groups([list(range(n))], on=(XQ, ZQ)).values.shape == (4, 1)


# ---- tables and sparse matrices ----------------------------------------------------------------------------------


def test_frames_and_series():
    frame = pd.DataFrame(X, columns=list("abc"), index=np.arange(N)[::-1])
    model = LogisticRegression(tol=1e-10, max_iter=5000).fit(frame, pd.Series(NAMES, index=frame.index))
    influence = uw.explain(model, frame, pd.Series(NAMES, index=frame.index))
    queries = pd.DataFrame(XQ, columns=list("abc"))
    close(influence.on_loss(queries, pd.Series(NAMESQ)).values, logistic().on_loss(XQ, NAMESQ).values, 1e-6)
    exact = uw.explain(model, X, NAMES)
    close(influence.on_loss(queries, pd.Series(NAMESQ)).values, exact.on_loss(XQ, NAMESQ).values)
    close(
        influence.of_relabeling([2, 3], pd.Series(NAMESQ[:2], index=[9, 8]), on=(queries, NAMESQ)).values,
        exact.of_relabeling([2, 3], NAMESQ[:2], on=(XQ, NAMESQ)).values,
    )


def test_frames_and_series_for_a_module():
    influence = classifier(X=pd.DataFrame(X), y=pd.Series(Y))
    close(influence.on_loss(pd.DataFrame(XQ), pd.Series(YQ)).values, classifier().on_loss(XQ, YQ).values)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "coo_matrix", "csr_array", "csc_array"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32])
def test_sparse_rows(kind, dtype):
    make = getattr(scipy.sparse, kind)
    values = WHOLE * (np.abs(WHOLE) > 1)
    model = Ridge(alpha=2.0).fit(values, Z)
    plain = uw.explain(model, values, Z)
    sparse = uw.explain(model, make(values.astype(dtype)), Z)
    queries = make(values[:4].astype(dtype))
    close(sparse.on_loss(queries, ZQ).values, plain.on_loss(values[:4], ZQ).values)
    close(sparse.of_self().values, plain.of_self().values)
    close(sparse.on_params([3, 1]), plain.on_params([3, 1]))
    close(
        sparse.of_replacing(
            [1, 2], queries[:2] if kind != "coo_matrix" else make(values[:2]), ZQ[:2], on=(queries, ZQ)
        ).values,
        plain.of_replacing([1, 2], values[:2], ZQ[:2], on=(values[:4], ZQ)).values,
    )


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array"])
def test_sparse_rows_for_a_loss_and_for_a_module(kind):
    make = getattr(scipy.sparse, kind)
    objective = uw.Objective(lambda p, z: (p @ z[0] - z[1]) ** 2, torch.full((D,), 0.5).double(), penalty=0.1)
    with pytest.warns(uw.errors.TheoryWarning):
        plain = uw.Influence(objective, (X, Z)).on_loss(XQ, ZQ).values
    with pytest.warns(uw.errors.TheoryWarning):
        close(uw.Influence(objective, (make(X), Z)).on_loss(make(XQ), ZQ).values, plain)
    module = regressor(X=make(X)).on_loss(make(XQ), ZQ[:, None])
    close(module.values, regressor().on_loss(XQ, ZQ[:, None]).values)


# ---- datasets ----------------------------------------------------------------------------------------------------


def test_a_dataset_is_the_arrays_it_gives():
    plain, mapped = classifier(), classifier(X=pairs(), y=None)
    close(mapped.on_loss(pairs(XQ, YQ)).values, plain.on_loss(XQ, YQ).values)
    close(mapped.of_self([5, 2]).values, plain.of_self([5, 2]).values)
    close(mapped.of_perturbing([5], on=(XQ, YQ)), plain.of_perturbing([5], on=(XQ, YQ)))
    close(
        mapped.of_relabeling([5], [1 - Y[5]], on=(XQ, YQ)).values,
        plain.of_relabeling([5], [1 - Y[5]], on=(XQ, YQ)).values,
    )
    on = (pairs(XQ, YQ),)
    close(mapped.of_groups([[1, 2]], on=on).values, plain.of_groups([[1, 2]], on=(XQ, YQ)).values)


def test_torchs_own_datasets():
    tensors = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    close(classifier(X=tensors, y=None).on_loss(XQ, YQ).values, classifier().on_loss(XQ, YQ).values)
    half = torch.utils.data.Subset(tensors, range(0, N, 2))
    close(classifier(X=half, y=None).on_loss(XQ, YQ).values, classifier(X=X[::2], y=Y[::2]).on_loss(XQ, YQ).values)


def test_datasets_of_numpy_items():
    items = Items((x.astype(np.float32), int(label)) for x, label in zip(X, Y, strict=True))
    close(classifier(X=items, y=None).on_loss(XQ, YQ).values, classifier().on_loss(XQ, YQ).values, FLOAT32)


class Two(nn.Module):
    """A module of two named inputs."""

    def __init__(self):
        nn.Module.__init__(self)
        self.inner = net()

    def forward(self, left, right):
        return self.inner(torch.cat([left, right], 1))


@pytest.mark.parametrize("parts", [lambda x: {"right": x[2:], "left": x[:2]}, lambda x: (x[:2], x[2:])])
def test_inputs_of_several_parts(parts):
    def split(X, y):
        return Items((parts(torch.tensor(x)), int(label)) for x, label in zip(X, y, strict=True))

    found = uw.explain(Two().double().eval(), split(X, Y), loss=cross_entropy, penalty=0.1).on_loss(split(XQ, YQ))
    close(found.values, classifier().on_loss(XQ, YQ).values)


def test_examples_without_targets():
    def loss(theta, x):
        return (theta @ x - 1) ** 2

    objective = uw.Objective(loss, torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64), penalty=0.1)
    pair = uw.Objective(lambda t, z: loss(t, z[0]), objective.params, penalty=0.1)
    with pytest.warns(uw.errors.TheoryWarning, match="not at a minimum"):
        alone = uw.Influence(objective, (X,)).on_loss(XQ).values
    with pytest.warns(uw.errors.TheoryWarning, match="not at a minimum"):
        close(uw.Influence(pair, (X, Z)).on_loss(XQ, ZQ).values, alone)


# ---- modules -----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        self.cell = seeded(lambda: nn.LSTM(1, 2, batch_first=True))
        self.head = seeded(lambda: nn.Linear(2, 2))

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class WrittenOut(Recurrent):
    """The same by its formulas, which vmap can follow."""

    def forward(self, x):
        h = c = torch.zeros(len(x), 2, dtype=x.dtype)
        for t in range(x.shape[1]):
            gates = x[:, t] @ self.cell.weight_ih_l0.T + self.cell.bias_ih_l0
            i, f, g, o = (gates + h @ self.cell.weight_hh_l0.T + self.cell.bias_hh_l0).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        nn.Module.__init__(self)
        self.inner = net()

    def forward(self, x):
        if x.sum() > 0:
            return self.inner(x) * 2
        return self.inner(x)


class Choosing(Branching):
    def forward(self, x):
        out = self.inner(x)
        return torch.where(x.sum(1, keepdim=True) > 0, 2 * out, out)


class OneByOne(Branching):
    def forward(self, x):
        return torch.cat([Branching.forward(self, one[None]) for one in x])


@pytest.mark.parametrize("curvature", [uw.operators.GaussNewton(), uw.operators.Hessian()], ids=repr)
def test_recurrent_layers_are_batched_as_their_formulas_are(curvature):
    settings = {"X": X[:, :, None], "curvature": curvature, "damping": 5.0}
    layer, formulas = (classifier(kind().double().eval(), **settings) for kind in (Recurrent, WrittenOut))
    queries = XQ[:, :, None]
    with pytest.warns(uw.errors.TheoryWarning) if curvature == uw.operators.Hessian() else nullcontext():
        close(layer.on_loss(queries, YQ).values, formulas.on_loss(queries, YQ).values)
    close(layer.of_perturbing([3, 4], on=(queries, YQ)), formulas.of_perturbing([3, 4], on=(queries, YQ)))
    assert layer.check().autograd == formulas.check().autograd


SLOWER = {"branches": (OneByOne, Choosing, X, XQ)}


@pytest.mark.parametrize("curvature", [uw.operators.GaussNewton(), uw.operators.Hessian()], ids=repr)
@pytest.mark.parametrize("name", SLOWER)
def test_modules_that_vmap_cannot_follow_take_a_slower_way_that_shows(name, curvature):
    kind, plain, inputs, queries = SLOWER[name]
    settings = {"X": inputs, "curvature": curvature, "damping": 5.0}
    slow, fast = classifier(kind().double().eval(), **settings), classifier(plain().double().eval(), **settings)
    with pytest.warns(uw.errors.TheoryWarning) if curvature == uw.operators.Hessian() else nullcontext():
        close(slow.on_loss(queries, YQ).values, fast.on_loss(queries, YQ).values)
    close(slow.of_perturbing([3, 4], on=(queries, YQ)), fast.of_perturbing([3, 4], on=(queries, YQ)))
    close(slow.on_params_of_perturbing([3], queries[:1]), fast.on_params_of_perturbing([3], queries[:1]))
    route = slow.check().autograd
    assert "loop" in route
    assert "vmap" in route  # the reason, or the half that still works
    assert fast.check().autograd.startswith("vmap over examples, batched over vectors")


def test_batch_norm_in_eval_mode_is_an_affine_map():
    normed = seeded(lambda: nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).double()
    normed(torch.tensor(X))  # moves the running statistics
    normed.eval()

    class Affine(nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            self.layers = normed

        def forward(self, x):
            first, norm, last = self.layers
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            return last((first(x) - norm.running_mean) * scale + norm.bias)

    close(classifier(normed).on_loss(XQ, YQ).values, classifier(Affine().eval()).on_loss(XQ, YQ).values)


def test_inactive_dropout_changes_nothing():
    dropping = seeded(lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)))
    plain = nn.Sequential(dropping[0], dropping[1], dropping[3])
    off = nn.Sequential(dropping[0], dropping[1], nn.Dropout(0.0), dropping[3])
    expected = classifier(plain.eval()).on_loss(XQ, YQ).values
    close(classifier(dropping.eval()).on_loss(XQ, YQ).values, expected)
    close(classifier(off.train()).on_loss(XQ, YQ).values, expected)


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            self.first = seeded(lambda: nn.Linear(D, D, bias=False))
            self.second = nn.Linear(D, D, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))[:, :2]

    class Twice(Tied):
        def __init__(self):
            nn.Module.__init__(self)
            self.first = seeded(lambda: nn.Linear(D, D, bias=False))

        def forward(self, x):
            return self.first(torch.tanh(self.first(x)))[:, :2]

    tied, twice = classifier(Tied().double().eval()), classifier(Twice().double().eval())
    assert tied.objective.size == D * D
    close(tied.on_loss(XQ, YQ).values, twice.on_loss(XQ, YQ).values)
    assert tied.check().coverage == 1.0


@pytest.mark.parametrize("choice", [["2.weight", "2.bias"], lambda name: name.startswith("2"), "frozen"])
def test_the_last_layer_alone_is_a_model_of_its_features(choice):
    model = net()
    if choice == "frozen":
        model[0].requires_grad_(False)
        choice = None
    influence = classifier(model, parameters=choice)
    with torch.no_grad():
        features, of_queries = (model[:2](torch.tensor(A)).numpy() for A in (X, XQ))
    close(influence.on_loss(XQ, YQ).values, classifier(model[2], X=features).on_loss(of_queries, YQ).values)
    assert influence.objective.coverage == pytest.approx(10 / 26)


def test_a_criterion_that_sums_is_one_that_averages():
    summed = classifier(loss=nn.CrossEntropyLoss(reduction="sum"), penalty=N * 0.1)
    averaged = classifier(penalty_per_example=False)
    close(summed.on_loss(XQ, YQ).values, averaged.on_loss(XQ, YQ).values)


def test_explaining_changes_nothing():
    model = net()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, state = torch.tensor(X, requires_grad=True), torch.get_rng_state()
    influence = classifier(model, X=inputs)
    influence.on_loss(XQ, YQ)
    influence.of_perturbing([1], on=(XQ, YQ))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.equal(torch.get_rng_state(), state)
    assert inputs.grad is None


def test_training_on_does_not_move_what_is_explained():
    model = net()
    influence = classifier(model)
    expected = influence.on_loss(XQ, YQ).values
    with torch.no_grad():
        model[0].weight.zero_()
    assert np.array_equal(influence.on_loss(XQ, YQ).values, expected)


@pytest.mark.parametrize("kind", [LinearRegression, Ridge])
def test_estimators_fitted_on_float32_are_explained_in_float64(kind):
    model = kind().fit(X.astype(np.float32), Z.astype(np.float32))
    expected = uw.explain(kind().fit(X, Z), X, Z).on_loss(XQ, ZQ).values
    close(uw.explain(model, X.astype(np.float32), Z).on_loss(XQ, ZQ).values, expected, FLOAT32)


def test_the_shared_estimators_are_at_their_minimum():
    for influence in (logistic(), ridge(), uw.explain(fitted("linear"), X, Z)):
        assert influence.check().rows_from_minimum < 1e-3
