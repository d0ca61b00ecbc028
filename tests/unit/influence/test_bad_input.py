"""Each bad input gets a typed error that names the number or the thing that is wrong, never a score."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.ensemble import AdaBoostClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import NuSVC
from sklearn.tree import DecisionTreeRegressor
from torch import nn
from torch.nn.functional import cross_entropy, dropout, mse_loss

import upweight as uw
from small import (
    ELASTIC,
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
    changed,
    classifier,
    fitted,
    logistic,
    net,
    pairs,
    refuses,
    regressor,
    ridge,
    row,
    seeded,
)
from upweight.operators import EmpiricalFisher, Hessian, Identity
from upweight.solvers import LiSSA

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:.*has not settled:upweight.errors.TheoryWarning")  # a short LiSSA
ON = (XQ, NAMESQ)


def check(*rows):
    """A test of every line of a table."""

    @pytest.mark.parametrize(("deed", "kind", "text"), rows)
    def refused(deed, kind, text):
        refuses(deed, kind, text)

    return refused


def theta(value=0.5):
    return torch.tensor([0.5, value, 0.5], dtype=torch.float64)


def squared_error(params, example):
    return (params @ example[0] - example[1]) ** 2


def plain(params=None, loss=squared_error, X=X, y=Z, **settings):
    return uw.Influence(uw.Objective(loss, theta() if params is None else params, **settings), (X, y))


# ---- values ------------------------------------------------------------------------------------------------------

test_nan_and_infinity_are_named_with_their_row = check(
    row("X", ValueError, "X holds 1 NaN .* first in row 3", lambda: logistic(X=changed(X, (3, 1), NAN))),
    row("X inf", ValueError, "X holds 1 NaN or infinite .* row 7", lambda: ridge(X=changed(X, (7, 0), -INF))),
    row("X of a module", ValueError, "X holds 1 .* row 39", lambda: classifier(X=changed(X, (39, 0), NAN))),
    row("X as a tensor", ValueError, "row 5", lambda: classifier(X=torch.tensor(changed(X, (5, 2), INF)))),
    row("X as a frame", ValueError, "row 2", lambda: logistic(X=pd.DataFrame(changed(X, (2, 2), NAN)).astype(object))),
    row("y", ValueError, "y holds 1 NaN .* row 9", lambda: ridge(y=changed(Z, 9, NAN))),
    row("y of a module", ValueError, "y holds 1 .* row 9", lambda: regressor(y=changed(Z, 9, INF)[:, None])),
    row("y of classes", ValueError, "y holds 1 NaN .* row 4", lambda: logistic(y=changed(Y, 4, NAN))),
    row("sample_weight", ValueError, "sample_weight holds 1 .* row 0", lambda: ridge(sample_weight=[NAN] + [1] * 39)),
    row("queries", ValueError, "X holds 1 NaN .* row 2", lambda: logistic().on_loss(changed(XQ, (2, 0), NAN), NAMESQ)),
    row("query inf", ValueError, "row 1", lambda: classifier().on_loss(changed(XQ, (1, 0), INF), YQ)),
    row("query label", ValueError, "y holds 1 NaN .* row 3", lambda: ridge().on_loss(XQ, changed(ZQ, 3, NAN))),
    row("new row", ValueError, "row 0", lambda: ridge().of_adding([[NAN, 0, 0]], [1.0], on=(XQ, ZQ))),
    row("new label", ValueError, "NaN", lambda: ridge().of_relabeling([2], [NAN], on=(XQ, ZQ))),
    row("class label", ValueError, "NaN|never saw", lambda: logistic().of_relabeling([2], [NAN], on=ON)),
    row("module label", ValueError, "NaN", lambda: regressor().of_relabeling([2], [[NAN]], on=(XQ, ZQ[:, None]))),
    row("deltas", ValueError, "deltas holds 1 .* row 1", lambda: ridge().on_params_of_perturbing([0, 1], _deltas(NAN))),
    row("dataset item", ValueError, "Item 20 .* NaN", lambda: _scored(pairs(changed(X, (20, 0), NAN)))),
    row("dataset label", ValueError, "Item 39 .* NaN", lambda: regressor(X=pairs(X, changed(Z, 39, NAN)), y=None)),
    row("params", ValueError, "'params' holds 1 NaN", lambda: plain(theta(NAN))),
    row("params block", ValueError, "'b' holds 1 NaN", lambda: uw.Objective(squared_error, {"b": theta(INF)})),
    row("coef_", ValueError, "'coef' holds 1 NaN", lambda: uw.explain(_with(coef_=[[1.0, NAN, 0.0]]), X, NAMES)),
    row("intercept_", ValueError, "'intercept' holds 1", lambda: uw.explain(_with(intercept_=[INF]), X, NAMES)),
    row("module weight", ValueError, "'0.weight' holds 1 NaN", lambda: classifier(_poisoned(net()))),
)


def _deltas(last):
    return changed(np.zeros((2, D)), (1, 0), last)


def _with(**fields):
    model = LogisticRegression().fit(X, NAMES)
    vars(model).update({name: np.array(value) for name, value in fields.items()})
    return model


def _poisoned(model):
    with torch.no_grad():
        model[0].weight[0, 0] = NAN
    return model


test_a_loss_that_is_not_a_number_is_named = check(
    row(
        "log of a negative number",
        ValueError,
        "loss of an example is nan",
        lambda: plain(loss=lambda p, z: (p @ z[0] * 0 - 1).log()),
    ),
    row(
        "infinite at one row only",
        ValueError,
        "row 10 gives NaN or infinite",
        lambda: plain(loss=_log_of_input, X=changed(np.abs(X) + 1, (10, 0), -1.0)).on_params(),
    ),
    row("overflow in a query", ValueError, "row 1|query 1", lambda: ridge().on_loss(changed(XQ, (1, 0), 1e200), ZQ)),
)


def _log_of_input(params, example):
    return (params @ example[0]) ** 2 * example[0][0].log()


# ---- shapes ------------------------------------------------------------------------------------------------------

test_wrong_shapes_are_named = check(
    row("X of one axis", ValueError, r"X has shape \(40,\); it needs two axes", lambda: logistic(X=X[:, 0])),
    row("X of three axes", ValueError, r"shape \(40, 3, 1\)", lambda: logistic(X=X[:, :, None])),
    row("y too short", ValueError, "X has 40 rows and y has 39", lambda: logistic(y=NAMES[:-1])),
    row("y too short, numbers", ValueError, "X has 40 rows and y has 39", lambda: ridge(y=Z[:-1])),
    row("y too short, module", ValueError, "X has 40 rows and y has 39", lambda: classifier(y=Y[:-1])),
    row("y of two columns", ValueError, r"y has shape \(40, 2\)", lambda: logistic(y=np.stack([NAMES] * 2, 1))),
    row("y of two outputs", ValueError, r"y has shape \(40, 2\).* 1 output", lambda: ridge(y=np.stack([Z] * 2, 1))),
    row("features", ValueError, "X has 2 features, and the model was fitted on 3", lambda: logistic(X=X[:, :2])),
    row("module features", ValueError, "loss failed", lambda: classifier(X=X[:, :2])),
    row("query features", ValueError, "4 features.* on 3", lambda: logistic().on_loss(np.ones((4, 4)), NAMESQ)),
    row("module query features", ValueError, "rows 0 to 3", lambda: classifier().on_loss(np.ones((4, 4)), YQ)),
    row("single query", ValueError, r"shape \(3,\).*reshape", lambda: logistic().on_loss(XQ[0], NAMESQ[:1])),
    row("queries without labels", ValueError, "no y", lambda: logistic().on_loss(XQ)),
    row("module queries without labels", ValueError, "rows 0 to 3|no y", lambda: classifier().on_loss(XQ)),
    row("query labels too few", ValueError, "4 rows and y has 3", lambda: logistic().on_loss(XQ, NAMESQ[:3])),
    row("y omitted", ValueError, "pass both", lambda: uw.explain(fitted(), X)),
    row("y omitted, module", ValueError, r"\(x, y\)", lambda: uw.explain(net(), X, loss=cross_entropy)),
    row("weights too few", ValueError, r"shape \(39,\), and there are 40", lambda: logistic(sample_weight=np.ones(39))),
    row("weights of two axes", ValueError, r"shape \(40, 1\)", lambda: ridge(sample_weight=np.ones((N, 1)))),
    row("negative weight", ValueError, "from -1 to 1", lambda: ridge(sample_weight=[-1.0] + [1.0] * 39)),
    row("no weight at all", ValueError, "from 0 to 0", lambda: ridge(sample_weight=np.zeros(N))),
    row(
        "new rows", ValueError, "2 rows .* by 1 new", lambda: ridge().of_replacing([0, 1], XQ[:1], ZQ[:1], on=(XQ, ZQ))
    ),
    row("new labels", ValueError, r"\(3, 1\).* 2 rows", lambda: ridge().of_relabeling([0, 1], [1, 2, 3], on=(XQ, ZQ))),
    row("deltas", ValueError, r"deltas has shape \(2, 2\)", lambda: ridge().on_params_of_perturbing([0, 1], X[:2, :2])),
    row("one delta for two", ValueError, r"\(1, 3\)", lambda: ridge().on_params_of_perturbing([0, 1], X[:1])),
)

test_shapes_that_torch_only_warns_of_are_refused = pytest.mark.filterwarnings("ignore:Using a target size")(
    check(
        row("broadcast", ValueError, r"outputs \(\d+, 1\) against targets \[\(\d+,\)\]", lambda: regressor(y=Z)),
        row("output squeezed", ValueError, r"squeeze\(-1\)", lambda: regressor(_squeezed(), y=Z)),
    )
)


def test_a_language_model_asked_without_targets_is_refused():
    """Its token rows could be misread as (x, y) pairs."""
    model = seeded(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))).double()
    tokens = np.arange(60).reshape(12, 5) % 5

    def loss(output, target):
        return cross_entropy(output.reshape(-1, 5), target.reshape(-1))

    influence = uw.explain(model, tokens, (tokens + 1) % 5, loss=loss, penalty=0.1)
    refuses(lambda: influence.on_loss(tokens[:2]), ValueError, r"no y|\(x, y\)")


test_emptiness_is_refused = check(
    row("data", ValueError, "X has 0 rows", lambda: uw.Examples(X[:0], Y[:0])),
    row("data of an estimator", ValueError, "0 rows", lambda: logistic(X=X[:0], y=NAMES[:0])),
    row("data of a module", ValueError, "0 rows", lambda: classifier(X=X[:0], y=Y[:0])),
    row("dataset", ValueError, "0 rows", lambda: classifier(X=Items([]), y=None)),
    row("queries", ValueError, "0 rows", lambda: logistic().on_loss(XQ[:0], NAMESQ[:0])),
    row("module queries", ValueError, "0 rows", lambda: classifier().on_loss(XQ[:0], YQ[:0])),
    row("new rows", ValueError, "0 rows", lambda: logistic().of_adding(XQ[:0], NAMESQ[:0], on=ON)),
    row("features", ValueError, "0 features", lambda: logistic(X=X[:, :0])),
    row("params", ValueError, "params is empty", lambda: uw.Objective(squared_error, {})),
    row("params tensor", ValueError, "no elements", lambda: uw.Objective(squared_error, torch.zeros(0))),
    row("groups", ValueError, "groups is empty", lambda: logistic().of_groups([], on=ON)),
    row("a group", ValueError, r"shape \(0,\)", lambda: logistic().of_groups([[0], []], on=ON)),
)


# ---- labels ------------------------------------------------------------------------------------------------------


def _numbered():
    return uw.explain(LogisticRegression().fit(X, Y), X, Y).on_loss(XQ[:1], ["1"])


test_labels_never_seen_are_refused = check(
    row(
        "string query",
        ValueError,
        "never saw: 'maybe'.* knows 'no', 'yes'",
        lambda: logistic().on_loss(XQ[:1], ["maybe"]),
    ),
    row(
        "string in training",
        ValueError,
        "never saw: 'maybe'",
        lambda: logistic(y=changed(NAMES.astype("<U5"), 0, "maybe")),
    ),
    row("number for a name", ValueError, "never saw: 1", lambda: logistic().on_loss(XQ[:1], [1])),
    row("new label", ValueError, "never saw: 'maybe'", lambda: logistic().of_relabeling([0], ["maybe"], on=ON)),
    row(
        "text for a number",
        ValueError,
        r"saw: '1'\. The model knows 0, 1",
        _numbered,
    ),
    row("ridge classifier", ValueError, "never saw: 7", lambda: uw.explain(_rows(), X, Y).on_loss(XQ[:1], [7])),
    row("99 in a query", ValueError, "rows 0 to 0", lambda: classifier().on_loss(XQ[:1], [99])),
    row(
        "−100 in a query",
        ValueError,
        "Row 0 has no label.*ignore_index=-100",
        lambda: classifier().on_loss(XQ[:1], [-100]),
    ),
    row("−100 among queries", ValueError, "Row 2 has no label", lambda: classifier().on_loss(XQ, changed(YQ, 2, -100))),
    row("99 in training", ValueError, "99|loss failed|batch of", lambda: classifier(y=changed(Y, 10, 99))),
    row(
        "−100 in a function",
        ValueError,
        "ignore_index.*CrossEntropyLoss",
        lambda: classifier(y=changed(Y, 0, -100), loss=_own),
    ),
    row("half a class", ValueError, "1.5", lambda: classifier().of_relabeling([0], [1.5], on=(XQ, YQ))),
    row("half a class on floats", ValueError, "1.5", lambda: classifier(y=Y * 1.0).of_relabeling([0], [1.5], on=ON)),
    row("half a class, sklearn", ValueError, "1.5", lambda: uw.explain(_rows(), X, Y).of_relabeling([0], [1.5], on=ON)),
    row("half a class in a query", ValueError, "1.5|rows 0 to 0", lambda: classifier().on_loss(XQ[:1], [1.5])),
    row("no label to change", ValueError, "no label", lambda: _without_targets().of_relabeling([0], [1], on=(XQ,))),
)


def _rows():
    return RidgeClassifier().fit(X, Y)


def _own(output, target):
    return cross_entropy(output, target)


def _without_targets():
    objective = uw.Objective(lambda params, x: (params @ x) ** 2, theta(), penalty=0.1)
    return uw.Influence(objective, (X,))


# ---- kinds of data -----------------------------------------------------------------------------------------------

test_what_is_no_array_is_refused = check(
    row("dict", ValueError, "X is a dict", lambda: uw.Examples({"a": [1]}, [1])),
    row("str", ValueError, "X is a str", lambda: uw.Examples("abc", [1])),
    row("bytes", ValueError, "X is a bytes", lambda: uw.Examples(b"abc", [1])),
    row("None", ValueError, "X", lambda: uw.Examples(None, [1])),
    row("number", ValueError, "X is a single int", lambda: uw.Examples(3, [1])),
    row("tensor of no axis", ValueError, "X is a tensor that is a single number", lambda: uw.Examples(torch.ones(()))),
    row("y of no axis", ValueError, "y is a single", lambda: uw.Examples(X, 1)),
    row("complex tensor", ValueError, "complex", lambda: uw.Examples(torch.ones(3, 2, dtype=torch.complex64))),
    row("complex array", ValueError, "complex", lambda: uw.Examples(X * 1j)),
    row("sparse tensor", ValueError, "sparse", lambda: uw.Examples(torch.eye(3).to_sparse(), [1, 2, 3])),
    row("ragged", ValueError, "does not form an array", lambda: uw.Examples([[1, 2], [3]], [0, 1])),
    row("strings", ValueError, "not a number", lambda: uw.Examples([["a"], ["b"]])),
    row("objects", ValueError, "not numbers", lambda: uw.Examples(np.array([["a", 1.0]], dtype=object))),
    row("dates", ValueError, "datetime64", lambda: uw.Examples(np.array(["2020-01-01"], dtype="datetime64[D]"))),
    row("words for a module", ValueError, "y has dtype <U3", lambda: classifier(y=NAMES)),
    row("set", ValueError, "X is a", lambda: uw.Examples({1, 2})),
    row("generator", ValueError, "X is a", lambda: uw.Examples(x for x in X)),
    row("columns", ValueError, r"columns \['c', 'b', 'a'\]", lambda: uw.explain(*_frames())),
    row("a column more", ValueError, "4 columns.* 3: X adds 'd'", lambda: uw.explain(*_frames("abcd"))),
    row("other columns", ValueError, "X lacks 'c' and adds 'd'", lambda: uw.explain(*_frames("abd"))),
    row("dataset for an estimator", ValueError, "pass both", lambda: uw.explain(fitted(), pairs())),
    row("dataset of queries", ValueError, "takes arrays|form an array", lambda: logistic().on_loss(pairs())),
    row("integer inputs moved", ValueError, "int64", lambda: _counting().of_perturbing([0], on=(_bits()[:1], YQ[:1]))),
)


def _frames(given="cba"):
    frame = pd.DataFrame(X, columns=list("abc"))
    return LogisticRegression().fit(frame, NAMES), frame.assign(d=1.0)[list(given)], NAMES


def _counting():
    model = seeded(lambda: nn.Sequential(nn.Embedding(2, 2), nn.Flatten(), nn.Linear(2 * D, 2))).double()
    return classifier(model, X=_bits())


def _bits():
    return (X > 0).astype(np.int64)


class Augmented(Items):
    def __getitem__(self, row):
        x, y = self.items[row]
        return x + torch.rand(()), y


test_datasets_that_cannot_be_used_are_refused = check(
    row("random items", RuntimeError, "two different items for row 0", lambda: _scored(Augmented(pairs().items))),
    row("strings", ValueError, "items hold str", lambda: _scored(Items([("a", 1), ("b", 0)]))),
    row("complex", ValueError, "items hold torch.complex", lambda: _scored(Items([(torch.ones(3) * 1j, 1)] * 5))),
    row("shapes", ValueError, "cannot be stacked", lambda: _scored(Items([(torch.ones(k), 1) for k in (3, 3, 2)]))),
    row("no pairs", ValueError, r"\(x, y\)", lambda: _scored(Items(torch.ones(5, 3)))),
    row("None", ValueError, "cannot be stacked|hold NoneType", lambda: _scored(Items([(torch.ones(3), None)] * 3))),
    row("y given too", ValueError, "y was given too", lambda: classifier(X=pairs(), y=Y)),
    row("Examples and y", ValueError, "y was given too", lambda: classifier(X=uw.Examples(X, Y), y=Y)),
    row("Examples and weights", ValueError, "sample_weight was given too", lambda: _doubly_weighted(classifier)),
    row("Examples and weights, sklearn", ValueError, "sample_weight was given", lambda: _doubly_weighted(ridge)),
    row("queries and y", ValueError, "y was given too", lambda: classifier().on_loss(uw.Examples(XQ, YQ), YQ)),
    row("sklearn queries and y", ValueError, "y was given", lambda: ridge().on_loss(uw.Examples(XQ, ZQ), ZQ)),
)


def _scored(dataset):
    return classifier(X=dataset, y=None).on_loss(XQ, YQ)


def _doubly_weighted(explained):
    return explained(X=uw.Examples(X, Y), y=None, sample_weight=np.ones(N))


# ---- estimators --------------------------------------------------------------------------------------------------

THREE = np.arange(N) % 3


class Mine(LogisticRegression):
    pass


def _l1(**settings):
    return LogisticRegression(solver="saga", tol=1e-3, max_iter=5000, **ELASTIC, **settings).fit(X, Y)


POINTER = "Supported estimators: LinearRegression, LogisticRegression"
test_unsupported_estimators_are_refused_with_a_pointer = check(
    row("tree", TypeError, f"Tree.*{POINTER}", lambda: uw.explain(DecisionTreeRegressor().fit(X, Z), X, Z)),
    row("forest", TypeError, f"smooth.*{POINTER}", lambda: uw.explain(RandomForestClassifier(3).fit(X, Y), X, Y)),
    row(
        "boosting", TypeError, "smooth", lambda: uw.explain(GradientBoostingClassifier(n_estimators=2).fit(X, Y), X, Y)
    ),
    row("ada boost", TypeError, "smooth", lambda: uw.explain(AdaBoostClassifier(n_estimators=2).fit(X, Y), X, Y)),
    row("neighbours", TypeError, "smooth", lambda: uw.explain(KNeighborsClassifier().fit(X, Y), X, Y)),
    row("nu support vectors", TypeError, f"NuSVC.*{POINTER}", lambda: uw.explain(NuSVC(nu=0.3).fit(X, Y), X, Y)),
    row("l1", TypeError, "l1 share of 1", lambda: uw.explain(_l1(l1_ratio=1.0), X, Y)),
    row("elastic net", TypeError, "l1 share of 0.3", lambda: uw.explain(_l1(l1_ratio=0.3), X, Y)),
    row("one-vs-rest", TypeError, "OneVsRest", lambda: uw.explain(_one_vs_rest(), X, THREE)),
    row("positive", TypeError, "positive=True", lambda: uw.explain(LinearRegression(positive=True).fit(X, Z), X, Z)),
    row("class", TypeError, "LogisticRegression is a class", lambda: uw.explain(LogisticRegression, X, Y)),
    row("module class", TypeError, "type|class", lambda: uw.explain(nn.Linear, X, Y, loss=cross_entropy)),
    row("subclass", TypeError, f"Mine is not supported.*{POINTER}", lambda: uw.explain(Mine().fit(X, Y), X, Y)),
    row("number", TypeError, "int is neither", lambda: uw.explain(3, X, Y)),
    row("function", TypeError, "neither a scikit-learn", lambda: uw.explain(squared_error, X, Y)),
    row("empty pipeline", TypeError, "no steps", lambda: uw.explain(Pipeline([]), X, Y)),
    row("pipeline inside", TypeError, "outer Pipeline", lambda: uw.explain(_nested(), X, Y)),
    row("pipeline of a forest", TypeError, POINTER, lambda: uw.explain(_forest(), X, Y)),
    row("changed coefficients", TypeError, "differ by", lambda: uw.explain(_lying(), X, Y)),
)


def _one_vs_rest():
    return OneVsRestClassifier(LogisticRegression()).fit(X, THREE)


def _nested():
    return make_pipeline(StandardScaler(), make_pipeline(StandardScaler(), LogisticRegression())).fit(X, Y)


def _forest():
    return make_pipeline(StandardScaler(), RandomForestClassifier(3)).fit(X, Y)


def _lying():
    model = LogisticRegression().fit(X, Y)
    model.decision_function = lambda X: np.zeros(len(X))
    return model


test_estimators_that_are_not_ready_are_refused = check(
    row(
        "unfitted", ValueError, "LogisticRegression is not fitted.*fit", lambda: uw.explain(LogisticRegression(), X, Y)
    ),
    row("unfitted ridge", ValueError, "Ridge is not fitted", lambda: uw.explain(Ridge(), X, Z)),
    row("unfitted pipeline", ValueError, "not fitted", lambda: uw.explain(_unfitted_pipeline(), X, Y)),
    row("module without loss", ValueError, "Sequential is a torch module.*loss=", lambda: uw.explain(net(), X, Y)),
    row("estimator with loss", ValueError, "loss was given", lambda: logistic(loss=mse_loss)),
    row("estimator with penalty", ValueError, "penalty was given", lambda: logistic(penalty=0.1)),
    row("transformer refuses", ValueError, "transformers refused X", lambda: uw.explain(_one_hot(), X + 1, Y)),
)


def _unfitted_pipeline():
    return make_pipeline(StandardScaler(), LogisticRegression())


def _one_hot():
    return make_pipeline(OneHotEncoder(), LogisticRegression()).fit(X, Y)


def test_unfitted_has_its_own_type():
    with pytest.raises(uw.errors.NotFitted):
        uw.explain(Ridge(), X, Z)


# ---- modules -----------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A linear layer, then a function."""

    def __init__(self, function):
        nn.Module.__init__(self)
        self.layer = seeded(lambda: nn.Linear(D, 2))
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def _dropping(p=0.5):
    return seeded(lambda: nn.Sequential(nn.Linear(D, 4), nn.Dropout(p), nn.Linear(4, 2)))


def _normed(**settings):
    return seeded(lambda: nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4, **settings), nn.Linear(4, 2)))


def _after_train():
    model = _dropping().eval()
    influence = classifier(model)
    model.train()
    return influence.on_loss(XQ, YQ)


def _norm_after_train():
    model = _normed().eval()
    influence = classifier(model)
    model.train()
    return influence.on_loss(XQ, YQ)


def _frozen():
    return net().requires_grad_(False)


def _weighing_classes(dtype):
    order = np.argsort(Y, kind="stable")
    weight = torch.tensor([1.0, 5.0], dtype=dtype)

    def inside(output, target):
        return cross_entropy(output, target, weight=weight.to(output))

    return classifier(net(dtype=dtype), X=X[order], y=Y[order], loss=inside)


test_modules_without_a_loss_of_each_example_are_refused = check(
    row("frozen", TypeError, r"All 4 parameters of Sequential are frozen", lambda: classifier(_frozen())),
    row("no parameters", TypeError, "no parameters", lambda: classifier(nn.Tanh())),
    row("unknown parameter", ValueError, r"\['nose'\], which.* has: 0.weight", lambda: classifier(parameters=["nose"])),
    row("no parameter chosen", ValueError, "selects nothing", lambda: classifier(parameters=[])),
    row("dropout", TypeError, r"Dropout is active in '1' \(Dropout, p=0.5\)", lambda: classifier(_dropping().train())),
    row("dropout after explain", TypeError, "Dropout is active", _after_train),
    row("batch norm", TypeError, r"'1' \(BatchNorm1d\) is in training mode", lambda: classifier(_normed().train())),
    row("batch norm after explain", TypeError, "training mode", _norm_after_train),
    row("no statistics", TypeError, "no running statistics", lambda: classifier(_normed(track_running_stats=False))),
    row("centred batch", TypeError, "mixes the examples", lambda: classifier(Functional(lambda x: x - x.mean(0)))),
    row("functional dropout", RuntimeError, "random", lambda: classifier(Functional(lambda x: dropout(x, 0.5)))),
    row("noise", RuntimeError, "random", lambda: classifier(Functional(lambda x: x * torch.rand(())))),
    row("vector loss", ValueError, "loss of one example is a tensor", lambda: classifier(loss=_unreduced)),
    row("number loss", ValueError, "is a float", lambda: classifier(loss=lambda f, y: float(cross_entropy(f, y)))),
    row("detached loss", ValueError, "whatever the param", lambda: classifier(loss=lambda f, y: f.detach().sum())),
    row("class weights", ValueError, "unequally.*CrossEntropyLoss", lambda: _weighing_classes(torch.float64)),
    row("class weights, float32", ValueError, "unequally", lambda: _weighing_classes(torch.float32)),
    row("no second derivative", TypeError, "differentiated twice", lambda: classifier(Functional(Once.apply))),
    row("vector objective", ValueError, r"shape \(3,\)", lambda: plain(loss=lambda p, z: p * z[1])),
    row("objective of nothing", ValueError, "whatever the param", lambda: plain(loss=lambda p, z: z[0].sum())),
    row("failing objective", ValueError, "KeyError: 'nose'", lambda: plain({"a": theta()}, lambda p, z: p["nose"])),
    row("integer params", ValueError, "torch.int64", lambda: uw.Objective(squared_error, torch.ones(3).long())),
    row("params of words", ValueError, "'a' is a str", lambda: uw.Objective(squared_error, {"a": "b"})),
)


def _unreduced(output, target):
    return cross_entropy(output, target, reduction="none")


def _squeezed():
    return nn.Sequential(net(1), Squeeze())


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze()


class Once(torch.autograd.Function):
    """A function whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


# ---- rows and questions ------------------------------------------------------------------------------------------

ROWS = [
    ("too large", [0, 40], IndexError, "Row 40 does not exist: there are 40 rows, numbered 0 to 39"),
    ("negative", [-1], IndexError, "Row -1 does not exist"),
    ("ragged", [[0, 1], [2]], ValueError, "different lengths"),
    ("nested", [[0, 1], [2, 3]], ValueError, r"shape \(2, 2\)"),
    ("float", [0.0], ValueError, "float64"),
    ("half", 1.5, ValueError, "float64"),
    ("empty", [], ValueError, r"shape \(0,\)"),
    ("word", "abc", ValueError, "<U1"),
    ("short mask", [True, False], ValueError, "bool"),
    ("nothing masked", np.zeros(N, bool), ValueError, r"shape \(0,\)"),
]
QUESTIONS = {
    "on_params": lambda rows: ridge().on_params(rows),
    "of_self": lambda rows: ridge().of_self(rows),
    "of_perturbing": lambda rows: ridge().of_perturbing(rows, on=(XQ, ZQ)),
    "of_replacing": lambda rows: ridge().of_replacing(rows, XQ[:2], ZQ[:2], on=(XQ, ZQ)),
    "of_relabeling": lambda rows: ridge().of_relabeling(rows, ZQ[:2], on=(XQ, ZQ)),
    "of_groups": lambda rows: ridge().of_groups([rows], on=(XQ, ZQ)),
    "of_removing": lambda rows: ridge().of_removing([rows], on=(XQ, ZQ)),
    "leave_one_out": lambda rows: uw.leave_one_out(ridge(), (XQ, ZQ), rows),
    "module on_params": lambda rows: classifier().on_params(rows),
}


@pytest.mark.parametrize(("rows", "kind", "text"), [line[1:] for line in ROWS], ids=[line[0] for line in ROWS])
@pytest.mark.parametrize("question", QUESTIONS)
def test_rows_that_do_not_exist_are_refused(question, rows, kind, text):
    refuses(lambda: QUESTIONS[question](rows), kind, text)


SETTINGS = {
    "damping": [-0.1, NAN, INF, "0.1", True, [0.1]],
    "batch_size": [0, -3, 2.0, "a", True],
    "curvature": ["hessian", Hessian, 3],
    "solver": ["cg", LiSSA, 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in SETTINGS for value in SETTINGS[name]], ids=repr)
@pytest.mark.parametrize("explained", [ridge, classifier])
def test_settings_that_make_no_sense_are_refused(explained, name, value):
    refused = refuses(lambda: explained(**{name: value}), ValueError, f"{name}=")
    assert repr(value) in str(refused)


@pytest.mark.parametrize("value", ["no", "yes", 2])
def test_penalty_per_example_is_true_or_false(value):
    refuses(lambda: classifier(penalty_per_example=value), ValueError, f"penalty_per_example={value!r}")


test_penalties_that_make_no_sense_are_refused = check(
    row("negative", ValueError, r"penalty=-0.1", lambda: classifier(penalty=-0.1)),
    row("nan", ValueError, "penalty=nan", lambda: classifier(penalty=NAN)),
    row("inf", ValueError, "penalty=inf", lambda: classifier(penalty=INF)),
    row("word", ValueError, "penalty is a str", lambda: classifier(penalty="l2")),
    row("failing", ValueError, "penalty failed: KeyError: 'nose'", lambda: _penalised(lambda p: p["nose"].sum())),
    row("vector", ValueError, r"penalty returned \(2,\)", lambda: _penalised(lambda p: p["2.bias"])),
    row("number", ValueError, "penalty returned float", lambda: _penalised(lambda p: 0.3)),
    row("NaN", ValueError, "penalty", lambda: _penalised(lambda p: p["2.bias"].sum() * NAN)),
    row("unknown block", ValueError, "'nose', and the parameters are 0.weight", lambda: _penalised(uw.L2({"nose": 1}))),
    row("negative strength", ValueError, "strength -1 for '2.bias'", lambda: _penalised(uw.L2({"2.bias": -1.0}))),
    row("infinite strength", ValueError, "strength inf", lambda: _penalised(uw.L2({"2.bias": INF}))),
    row("strength word", ValueError, "'2.bias'", lambda: _penalised(uw.L2({"2.bias": "much"}))),
    row("strength shape", ValueError, "'2.bias'", lambda: _penalised(uw.L2({"2.bias": torch.ones(7)}))),
)


def _penalised(penalty):
    return classifier(penalty=penalty).on_loss(XQ, YQ)


@pytest.mark.parametrize("k", [0, -1, 41, 2.5, "3", True, None])
@pytest.mark.parametrize("ask", ["helpful", "harmful", "top"])
def test_a_top_k_that_cannot_be_is_refused(ask, k):
    scores = ridge().of_self() if ask == "top" else ridge().on_loss(XQ, ZQ)
    refused = refuses(lambda: getattr(scores, ask)(k), ValueError, "40 columns")
    assert f"k={k}" in str(refused)


ASKED = {
    "of_groups": lambda on: ridge().of_groups([[0]], on=on),
    "of_removing": lambda on: ridge().of_removing([0], on=on),
    "of_perturbing": lambda on: ridge().of_perturbing([0], on=on),
    "of_adding": lambda on: ridge().of_adding(XQ, ZQ, on=on),
    "leave_one_out": lambda on: uw.leave_one_out(ridge(), on, [0]),
    "check": lambda on: ridge().check(on),
}


@pytest.mark.parametrize(
    ("on", "text"),
    [(XQ, "a ndarray"), ([XQ, ZQ], "a list"), ((XQ, ZQ, ZQ), "3 things"), ((), "0 things"), ("q", "a str")],
    ids=["array", "list", "three", "none", "word"],
)
@pytest.mark.parametrize("question", ASKED)
def test_queries_that_are_no_pair_are_refused(question, on, text):
    refuses(lambda: ASKED[question](on), ValueError, f"on is {text}.*pair")


test_groups_that_cannot_be_removed_are_refused = check(
    row("twice", ValueError, "Group 1 names a row twice", lambda: ridge().of_removing([[0], [2, 2]], on=(XQ, ZQ))),
    row("None", ValueError, "groups is None", lambda: ridge().of_groups(None, on=(XQ, ZQ))),
    row("word", ValueError, "<U1", lambda: ridge().of_groups("ab", on=(XQ, ZQ))),
)


def _removing(**settings):
    return uw.explain(fitted("ridge"), X, Z, **settings).of_removing([0], on=(XQ, ZQ))


test_of_removing_says_what_it_cannot_update = check(
    row("module", TypeError, "of_removing updates.*Sequential", lambda: classifier().of_removing([0], on=(XQ, YQ))),
    row("fisher", TypeError, "EmpiricalFisher", lambda: _removing(curvature=EmpiricalFisher(), damping=0.1)),
    row("identity", TypeError, "Identity", lambda: _removing(curvature=Identity())),
    row("LiSSA", TypeError, "of_removing needs exact", lambda: _removing(solver=LiSSA(depth=200, repeats=2))),
    row(
        "leverage 1",
        ArithmeticError,
        r"rows \[5\] leaves no curvature",
        lambda: _alone().of_removing([5], on=_on_alone()),
    ),
)


def _alone():
    only = np.c_[X, X[:, 0] + 1e-9 * np.sin(np.arange(N)) + (np.arange(N) == 5)]  # the others nearly repeat x0
    return uw.explain(LinearRegression().fit(only, Z), only, Z)


def _on_alone():
    return np.c_[XQ, XQ[:, 0]], ZQ


# ---- validation --------------------------------------------------------------------------------------------------


def _outcomes(q=4, rows=(0, 1, 2), measure="loss"):
    rows = np.array(rows)
    return uw.Outcomes(np.arange(q * len(rows)).reshape(q, -1) * 1.0, np.zeros(q), rows, measure)


def _retrained(retrain):
    return uw.leave_one_out(ridge(), (XQ, ZQ), [0], retrain)


test_retrainers_that_return_no_parameters_are_refused = check(
    row("class", ValueError, "retrain is <class .*Newton", lambda: _retrained(uw.Newton)),
    row("word", ValueError, "retrain is 'newton'", lambda: _retrained("newton")),
    row("None", ValueError, "returned a NoneType", lambda: _retrained(lambda weights, seed: None)),
    row("NaN", ValueError, "returned NaN", lambda: _retrained(lambda weights, seed: np.full(4, NAN))),
    row("size", ValueError, "returned 7 numbers, and the objective has 4", lambda: _retrained(lambda w, s: np.ones(7))),
    row("missing block", ValueError, "without 'intercept'", lambda: _retrained(lambda w, s: {"coef": np.ones((1, 3))})),
    row("word returned", ValueError, "returned a str", lambda: _retrained(lambda w, s: "theta")),
    row("words in a block", ValueError, "returned", lambda: _retrained(lambda w, s: {"coef": "a", "intercept": 1})),
)

test_agreement_compares_like_with_like_only = check(
    row("swapped", ValueError, "got Outcomes, Scores", lambda: uw.agreement(_outcomes(), _scores())),
    row("relabelled", ValueError, "row relabelled", lambda: uw.agreement(_relabelled(), _outcomes())),
    row("groups", ValueError, "group removed", lambda: uw.agreement(_grouped(), _outcomes())),
    row("measure", ValueError, "margin", lambda: uw.agreement(_scores(), _outcomes(measure="margin"))),
    row("queries", ValueError, "4 queries and 40 rows.* 3 queries", lambda: uw.agreement(_scores(), _outcomes(3))),
    row("rows", ValueError, "rows such as 77", lambda: uw.agreement(_scores(), _outcomes(rows=(0, 77)))),
    row("one pair", ValueError, "1 pair", lambda: uw.agreement(_one_score(), _outcomes(1, (0,)))),
)


def _scores():
    return ridge().on_loss(XQ, ZQ)


def _one_score():
    return ridge().on_loss(XQ[:1], ZQ[:1])


def _relabelled():
    return ridge().of_relabeling([0, 1, 2], ZQ[:3], on=(XQ, ZQ))


def _grouped():
    return ridge().of_groups([[0, 1], [2, 3], [4, 5]], on=(XQ, ZQ))


# ---- files -------------------------------------------------------------------------------------------------------


def test_saving_into_a_missing_folder_names_it(tmp_path):
    refuses(lambda: _scores().save(tmp_path / "nowhere" / "s.safetensors"), FileNotFoundError, "no folder .*nowhere")


def test_saving_onto_a_folder_names_it(tmp_path):
    refuses(lambda: _scores().save(tmp_path), ValueError, "cannot be written")
    assert not list(tmp_path.iterdir())


def test_files_without_scores_are_refused(tmp_path):
    text, foreign, other = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    text.write_text("no tensors here")
    save_file({"values": np.ones(3)}, foreign)
    save_file({"values": np.ones(3)}, other, metadata={"upweight": "{}"})
    refuses(lambda: uw.Scores.load(tmp_path / "none"), FileNotFoundError, "no file at .*none")
    refuses(lambda: uw.Scores.load(text), ValueError, "not a safetensors file")
    refuses(lambda: uw.Scores.load(foreign), ValueError, "without upweight scores")
    refuses(lambda: uw.Scores.load(other), ValueError, "without upweight scores")


@pytest.mark.parametrize("metadata", ["not json", "[1]", '{"kind": "scores"}'])
def test_damaged_metadata_is_refused(tmp_path, metadata):
    save_file({"values": np.ones((1, 3))}, tmp_path / "s", metadata={"upweight": metadata})
    refuses(lambda: uw.Scores.load(tmp_path / "s"), ValueError, "scores|damaged")


def test_a_cut_file_is_refused(tmp_path):
    _scores().save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-8])
    refuses(lambda: uw.Scores.load(tmp_path / "cut"), ValueError, "damaged")


def test_stores_that_are_no_folder_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refuses(lambda: ridge().on_loss(XQ, ZQ, store=file), ValueError, "is a file, and a store is a folder")
    refuses(lambda: ridge().on_loss(XQ, ZQ, store=tmp_path), ValueError, r"not empty \(file")
    refuses(lambda: ridge().on_loss(XQ, ZQ, store=3), ValueError, "store=3")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"fingerprint": 3}', json.dumps({"format": 1}), "\x00"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(content)
    refuses(lambda: ridge().on_loss(XQ, ZQ, store=tmp_path / "run"), ValueError, "manifest|other work")


def test_a_damaged_chunk_is_refused(tmp_path):
    ridge().on_loss(XQ, ZQ, store=tmp_path / "run")
    (tmp_path / "run" / "chunk-000000.safetensors").write_bytes(b"\x08\x00")
    refuses(lambda: ridge().on_loss(XQ, ZQ, store=tmp_path / "run"), ValueError, "chunk-000000.* damaged")
