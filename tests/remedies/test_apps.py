"""What is said to type by upweight/apps, typed."""

from __future__ import annotations

import csv
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import nn

import upweight as uw
from refusals import refused, warned
from small import NAMES, XQ, YQ, ZQ, X, Y, Z, changed, classifier, fitted, logistic, pairs, ridge
from upweight import apps
from upweight.apps import pictures
from upweight.apps.planted import planted

TIGHT = {"tol": 1e-10, "max_iter": 5000}
RIGHT = fitted().predict(XQ)
WRONG = np.where(RIGHT == "no", "yes", "no")
ON = (XQ, RIGHT)
NEAR = X[np.argsort(np.abs(fitted().decision_function(X)))[:2]]
TURNED = np.where(fitted().predict(NEAR) == "no", "yes", "no")


def attacked(influence, **settings):
    """One row moved, and what it must have done."""
    made = apps.attack(influence, (XQ[:1], RIGHT[:1]), **{"rows": [3], "level": 0.1, "iterations": 1} | settings)
    assert np.abs(made.after - made.before).max() < 0.05
    assert made.loss[1] > made.loss[0]
    return made


# attack.py


def test_rows_by_name_or_by_number_of_them():
    with refused("were both given", "Name the rows, or say how many of the most "):
        attacked(logistic(), rows=[3], count=2)
    assert attacked(logistic(), rows=[3]).rows.tolist() == [3]
    most = apps.vulnerability(logistic(), (XQ[:1], RIGHT[:1])).top(2)
    assert attacked(logistic(), rows=None, count=2).rows.tolist() == most.tolist()


def test_rows_of_a_dataset_are_attacked_as_arrays():
    on = (torch.from_numpy(XQ[:1]), torch.from_numpy(YQ[:1]))
    settings = {"rows": [3], "level": 0.1, "iterations": 1, "retrain": uw.Newton()}
    network = nn.Linear(3, 2).double().eval()
    with refused("The training rows are a Dataset", "Explain the "):
        apps.attack(classifier(network, pairs(), None), on, **settings)
    made = apps.attack(classifier(network, X, Y), on, **settings)
    assert made.before.tolist() == [X[3].tolist()]
    assert 0 < made.largest < 0.5


def test_sparse_inputs_are_attacked_as_a_dense_array_or_by_their_labels():
    sparse = scipy.sparse.csr_matrix(X)
    with refused("and only dense arrays of numbers", "Explain the model on such an array; for discrete data use "):
        attacked(logistic(sparse))
    assert attacked(logistic(sparse.toarray())).loss[0] == pytest.approx(
        logistic().on_loss(XQ[:1], RIGHT[:1]).query_values[0], rel=1e-6
    )
    found = apps.flip_labels(logistic(sparse), ON, 1)
    assert found.losses[1] > found.losses[0]


def test_bounds_that_hold_all_inputs():
    with refused("and the rows' inputs reach from", "Pass bounds=(smallest, largest) that hold all inputs"):
        attacked(logistic(), bounds=(0.0, 0.5))
    attacked(logistic(), bounds=(X.min(), X.max()))


class Scaled(nn.Module):
    """A linear classifier of standardized inputs."""

    def __init__(self, scaler):
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(scaler.mean_))
        self.register_buffer("scale", torch.from_numpy(scaler.scale_))
        self.line = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.line((x - self.mean) / self.scale)


def test_the_last_step_of_a_pipeline_is_attacked_or_a_network_that_holds_the_others():
    pipe = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(5 * X, NAMES)
    on = (5 * XQ[:1], RIGHT[:1])
    with refused("a small step changes the loss by", "Explain the final estimator on transformed inputs, or a network"):
        apps.attack(uw.explain(pipe, 5 * X, NAMES), on, rows=[3])
    inner = uw.explain(pipe[-1], pipe[:-1].transform(5 * X), NAMES)
    made = apps.attack(inner, (pipe[:-1].transform(on[0]), on[1]), rows=[3], level=0.1, iterations=1)
    assert made.loss[1] > made.loss[0]
    network = uw.retrained(classifier(Scaled(pipe[0]).eval(), 5 * X, Y), retrain=uw.Newton())
    settings = {"rows": [3], "level": 0.5, "iterations": 1, "retrain": uw.Newton()}
    made = apps.attack(network, (5 * XQ[:1], (RIGHT[:1] == "yes").astype(int)), **settings)
    assert made.loss[1] > made.loss[0]
    np.testing.assert_allclose(np.diff(made.losses), made.predicted, rtol=0.1)


def test_a_pipeline_that_makes_columns_is_attacked_from_behind_them():
    pipe = make_pipeline(PolynomialFeatures(2), LogisticRegression(**TIGHT)).fit(X, NAMES)
    with refused("the rows' inputs are refused as new ones (", "Explain the final estimator on transformed inputs"):
        attacked(uw.explain(pipe, X, NAMES))
    inner = uw.explain(pipe[-1], pipe[:-1].transform(X), NAMES)
    made = apps.attack(inner, (pipe[:-1].transform(XQ[:1]), RIGHT[:1]), rows=[3], level=0.1, iterations=1)
    assert made.loss[1] > made.loss[0]


def test_a_lasso_is_attacked_on_the_columns_that_it_uses():
    def lasso(wide):
        return uw.explain(Lasso(alpha=0.3, tol=1e-12).fit(wide, Z), wide, Z)

    wide, settings = (
        np.hstack([X, X[:, ::-1] ** 2]),
        {"rows": [3], "level": 0.1, "iterations": 1, "retrain": uw.Newton()},
    )
    used = lasso(wide).encoder.estimator.coef_ != 0
    with refused("it has shape", "Fit it on those columns"):
        apps.attack(lasso(wide), (wide[:1], Z[:1]), **settings)
    made = apps.attack(lasso(wide[:, used]), (wide[:1, used], Z[:1]), **settings)
    assert 0 < used.sum() < 6
    assert made.loss[1] > made.loss[0]


# columns.py


def test_a_name_for_every_column():
    with refused("X has shape", "Pass one name per column"):
        apps.one_hot_groups(np.eye(3), ["a", "b"])
    assert apps.one_hot_groups(np.eye(3), ["a_x", "a_y", "b"]) == {"a": [0, 1], "b": [2]}


def features_by(names, groups):
    """The columns of every feature, of queries that are wrong."""
    found = apps.mismatch(logistic(), (XQ, WRONG), feature_names=names, feature_groups=groups).features
    return dict(zip(found.names, [own.tolist() for own in found.columns], strict=True))


def test_columns_by_their_names_or_their_numbers():
    with refused("names columns that do not exist", "Use their names or their numbers"):
        features_by(["a", "b", "c"], {"both": ["a", "d"]})
    assert features_by(["a", "b", "c"], {"both": ["a", "c"]}) == {"both": [0, 2], "b": [1]}
    assert features_by(["a", "b", "c"], {"both": [0, 2]}) == {"both": [0, 2], "b": [1]}


def test_a_column_in_one_group_only():
    with refused("feature_groups holds column '", "A column belongs to one feature; leave one of them out"):
        features_by(["a", "b", "c"], {"one": [0, 1], "two": [1, 2]})
    assert features_by(["a", "b", "c"], {"one": [0, 1], "two": [2]}) == {"one": [0, 1], "two": [2]}


def test_a_group_with_the_name_of_another_column():
    with refused("is also the name of column", "Give the group another name, or put the column into it"):
        features_by(["a", "a_x", "a_y"], {"a": [1, 2]})
    assert features_by(["a", "a_x", "a_y"], {"kind": [1, 2]}) == {"kind": [1, 2], "a": [0]}
    assert features_by(["a", "a_x", "a_y"], {"a": [0, 1, 2]}) == {"a": [0, 1, 2]}


def test_every_group_has_a_name_of_its_own():
    with refused("In feature_groups two groups are called '", "Give every group a name of its own"):
        features_by(["a", "b", "c"], {1: ["a"], "1": ["b"]})
    assert features_by(["a", "b", "c"], {1: ["a"], "2": ["b"]}) == {"1": [0], "2": [1], "c": [2]}


def test_a_column_whose_name_another_has_too_goes_by_its_number():
    with refused("' is the name of ", "Use the column's number"):
        features_by(["a", "b", "a"], {"first": ["a"]})
    assert features_by(["a", "b", "a"], {"first": [0]}) == {"first": [0], "b": [1], "a (column 2)": [2]}


# contrast.py


def test_contrast_takes_a_pair():
    with refused("on is a ", "Pass the pair (Xq, yq) with the labels that are wanted"):
        apps.contrast(logistic(), NEAR[:1])
    assert apps.contrast(logistic(), (NEAR[:1], TURNED[:1])).answers[0].corrected


def test_contrast_takes_a_classifier():
    with refused("so no prediction is wrong or right", "Pass the "):
        apps.contrast(ridge(), (XQ, ZQ))
    answer = apps.contrast(logistic(), (NEAR[:1], TURNED[:1])).answers[0]
    assert answer.corrected
    other = changed(NAMES, answer.rows, TURNED[0])
    assert LogisticRegression(**TIGHT).fit(X, other).predict(NEAR[:1]) == TURNED[:1]


def test_labels_that_are_wanted_are_classes_of_the_model():
    with refused("is no class of the model", "Pass one label for each query, of the classes "):
        apps.contrast(logistic(), (NEAR[:1], [1]))
    assert apps.contrast(logistic(), (NEAR[:1], [TURNED[0]])).answers[0].wanted == TURNED[0]
    with refused("yq has shape ", "Pass one label for each query, of the classes "):
        apps.contrast(logistic(), (NEAR, TURNED[:1]))
    assert len(apps.contrast(logistic(), (NEAR, TURNED)).answers) == 2


def test_queries_that_the_model_gets_wrong():
    influence, Xq, yq = logistic(), np.concatenate([XQ, NEAR]), np.append(RIGHT, TURNED)
    wrong = uw.predict(influence, Xq).labels != yq
    with refused("predictions have the labels that are wanted already", "Pass queries that the model gets wrong: "):
        apps.contrast(influence, (Xq[~wrong], yq[~wrong]))
    found = apps.contrast(influence, (Xq[wrong], yq[wrong]))
    assert len(found.answers) == wrong.sum() == 2


# corrections.py

SOURCE = """
import upweight as uw
from small import NAMESQ, XQ, logistic


def study():
    return uw.Study(logistic(), (XQ, NAMESQ))
"""


OTHER = {"no": "yes", "yes": "no"}


@cache
def inspected():
    return apps.repair(logistic(), inspect=5, by="loss")


def reviewed(file, **cells):
    """A review of five rows with these cells in its first line, and the correction that this line may get."""
    apps.write_review(inspected(), file, overwrite=True)
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    lines[0].update(cells)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    row = int(inspected().rows[0])
    return {row: OTHER[NAMES[row]]}


def filled(file):
    """A review with a correction in its first line, and that correction."""
    (other,) = reviewed(file).values()
    return reviewed(file, correction=other)


@pytest.fixture
def review(tmp_path):
    return tmp_path / "review.csv"


def test_labels_are_corrected_where_there_are_classes():
    with refused("are no classes, so there is no label to correct", "Pass the "):
        apps.corrected(ridge(), {3: 1.0})
    assert (
        apps.corrected(logistic(), {3: OTHER[NAMES[3]]}).labels.tolist() == changed(NAMES, 3, OTHER[NAMES[3]]).tolist()
    )
    moved = uw.retrained(uw.edited(ridge(), [3], y_new=np.array([1.0])))
    again = Ridge(alpha=2.0).fit(X, np.append(np.append(Z[:3], 1.0), Z[4:]))
    np.testing.assert_allclose(uw.predict(moved, XQ).outputs[:, 0], again.predict(XQ), rtol=1e-6)


def test_corrections_are_a_dict():
    with refused("corrections is a ", "Pass a dict of row → right label, such as {3: "):
        apps.corrected(logistic(), [3])
    assert apps.corrected(logistic(), {3: OTHER[NAMES[3]]}).patch == {3: (NAMES[3], OTHER[NAMES[3]])}


def test_a_correction_is_one_of_the_classes():
    with refused("is to become ", "Write one of them"):
        apps.corrected(logistic(), {3: "odd"})
    assert apps.corrected(logistic(), {3: OTHER[NAMES[3]]}).labels[3] == OTHER[NAMES[3]]


def test_corrections_that_change_a_label(review):
    reviewed(review)
    with refused("corrections changes a label", "Fill in the column `correction` of a review, "):
        apps.corrected(logistic(), apps.read_review(logistic(), review))
    expected = filled(review)
    made = apps.corrected(logistic(), apps.read_review(logistic(), review))
    assert list(made.patch) == list(expected)
    assert apps.corrected(logistic(), expected).labels.tolist() == made.labels.tolist()


def test_a_cell_of_a_review_holds_a_class_or_nothing(review):
    reviewed(review, correction="odd")
    with refused("' is no class of this study; there are ", "Write one of them, or leave the cell empty"):
        apps.read_review(logistic(), review)
    assert filled(review) == apps.read_review(logistic(), review)
    reviewed(review, correction="")
    assert apps.read_review(logistic(), review) == {}


def trained(labels, X=X):
    return uw.explain(LogisticRegression(**TIGHT).fit(X, labels), X, labels)


def test_a_patch_is_read_with_the_study_that_it_was_made_for(tmp_path):
    labels = changed(NAMES, [0, 1], "odd")
    made = apps.corrected(trained(labels), {3: "odd"})
    file = apps.write_patch(made.patch, tmp_path / "patch.csv")
    with refused("', which is no class of this study: ", "Read it with that one"):
        apps.read_patch(logistic(), file)
    assert apps.read_patch(trained(labels), file) == {3: "odd"}


def test_a_folder_is_no_file(tmp_path):
    found = inspected()
    with refused("is a folder", "Name a file, such as "):
        apps.write_review(found, tmp_path)
    assert apps.read_review(logistic(), apps.write_review(found, tmp_path / "review.csv")) == {}


def test_a_file_is_no_folder(tmp_path, review):
    review.write_text("mine")
    with refused("is no folder", "Name another folder"):
        apps.write_labels(NAMES, review / "labels.csv")
    assert apps.write_labels(NAMES, tmp_path / "new" / "labels.csv").read_text().split()[1:3] == [
        f"{row},{NAMES[row]}" for row in range(2)
    ]
    assert review.read_text() == "mine"


def test_a_file_that_is_there(upweight, tmp_path, review):
    found = inspected()
    review.write_text("mine")
    with refused("is there already, perhaps with corrections in it", "Name another place, or overwrite it: "):
        apps.write_review(found, review)
    assert apps.read_review(logistic(), apps.write_review(found, tmp_path / "other.csv")) == {}
    assert review.read_text() == "mine"
    apps.write_review(found, review, overwrite=True)
    assert apps.read_review(logistic(), review) == {}
    review.write_text("mine")
    call = ("repair", "cli_studies:study", "--inspect", 5, "--by", "loss", "--out", "review.csv")
    assert upweight(*call)[0] == 3
    assert upweight(*call, "--overwrite")[0] == 0
    assert apps.read_review(logistic(), review) == {}


def test_each_row_of_a_file_once(review):
    reviewed(review, correction="no", row="999")
    with refused(" does not exist: there are ", "Keep each row once, as it was written"):
        apps.read_review(logistic(), review)
    lines = review.read_text().splitlines()
    review.write_text("\n".join([lines[0], lines[2], lines[2]]))
    with refused("comes twice", "Keep each row once, as it was written"):
        apps.read_review(logistic(), review)
    assert filled(review) == apps.read_review(logistic(), review)


def test_a_review_is_made_again_where_labels_changed(review):
    ((row, other),) = reviewed(review).items()
    now = trained(changed(NAMES, row, other))
    with refused("in the file. ", "The study's labels changed since, or it is another study: make the file again"):
        apps.read_review(now, review)
    apps.write_review(apps.repair(now, inspect=5, by="loss"), review, overwrite=True)
    assert apps.read_review(now, review) == {}


def test_a_patch_is_taken_back_where_its_labels_are(tmp_path):
    other = OTHER[NAMES[3]]
    file = apps.write_patch(apps.corrected(logistic(), {3: other}).patch, tmp_path / "patch.csv")
    with refused("in the file. ", "A patch is taken back where the study has its new labels: name that study"):
        apps.read_patch(logistic(), file, revert=True)
    new = trained(changed(NAMES, 3, other))
    assert apps.read_patch(new, file, revert=True) == {3: NAMES[3]}
    assert apps.corrected(new, apps.read_patch(new, file, revert=True)).labels.tolist() == NAMES.tolist()


def test_a_review_and_a_patch_are_written_first(upweight, tmp_path, review):
    with refused("There is no file ", "Write it with `upweight repair STUDY ") as said:
        apps.read_review(logistic(), review)
    assert f"STUDY --inspect 10% --out {review}` first." in str(said.value)
    assert upweight("repair", "cli_studies:study", "--inspect", "10%", "--out", review)[0] == 0
    assert apps.read_review(logistic(), review) == {}
    expected = filled(review)
    with refused("There is no file ", "Write it with `upweight repair STUDY ") as said:
        apps.read_patch(logistic(), tmp_path / "patch.csv")
    assert f"STUDY --corrections REVIEW --out {tmp_path}` first." in str(said.value)
    assert upweight("repair", "cli_studies:study", "--corrections", review, "--out", tmp_path)[0] == 0
    assert apps.read_patch(logistic(), tmp_path / "patch.csv") == expected


def test_the_first_line_of_a_review_stays(review):
    expected, whole = filled(review), review.read_text()
    review.write_text(whole.replace("correction", "answer", 1))
    with refused("has no column ", "Keep the first line as it was written"):
        apps.read_review(logistic(), review)
    review.write_text(whole)
    assert apps.read_review(logistic(), review) == expected


def test_a_review_with_a_cell_too_many_is_saved_again(review):
    expected, whole = filled(review), review.read_text()
    review.write_text(whole.rstrip() + ",one more\n")
    with refused("has another number of cells than the first", "Save it as CSV again"):
        apps.read_review(logistic(), review)
    review.write_text(whole)
    assert apps.read_review(logistic(), review) == expected


# distances.py


def test_queries_and_rows_in_one_form():
    with refused("numbers and a training row ", "Pass both in the same form"):
        apps.understand(logistic(), ON, X=X[:, :2])
    found = apps.understand(logistic(), ON, X=X[:, :2], Xq=XQ[:, :2])
    np.testing.assert_allclose(found.distances[1, 5], np.linalg.norm(XQ[1, :2] - X[5, :2]))


def test_distances_of_texts_are_between_their_features():
    texts = np.array(["ash", "elm ash", "oak"] * 10, dtype=object)
    labels = np.arange(30) % 2
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(**TIGHT)).fit(texts, labels)
    influence, on = uw.explain(model, texts, labels), (texts[:2], labels[:2])
    with refused("has shape ", "Distances need rows of numbers; without X= "):
        apps.understand(influence, on, X=texts)
    found = apps.understand(influence, on)
    features = model[0].transform(texts).toarray()
    np.testing.assert_allclose(found.distances, np.linalg.norm(features[:2, None] - features[None], axis=2), atol=1e-9)


# effects.py


def effects():
    return apps.mismatch(logistic(), (XQ, WRONG), feature_names=["a", "b", "c"]).features


def test_rows_whose_features_were_computed():
    found = effects()
    with refused("and features were computed for rows ", "Name those"):
        found.of([row for row in range(40) if row not in found.rows][:1])
    np.testing.assert_allclose(found.of(found.rows).signed, found.signed)
    np.testing.assert_allclose(found.of(found.rows[:1]).signed, found.by_row[0])


def test_features_by_their_names():
    with refused("There is no feature '", "See .names"):
        effects().places("d")
    assert effects().names == ["a", "b", "c"]
    assert sorted(effects().places(name).absolute for name in effects().names) == [1, 2, 3]


# label_attacks.py


def test_what_has_no_labels_is_attacked_by_its_inputs():
    with refused("are no classes, so no label can be flipped", "Use `attack`, "):
        apps.flip_labels(ridge(), (XQ[:1], ZQ[:1]), 1)
    made = apps.attack(ridge(), (XQ[:1], ZQ[:1]), rows=[3], level=0.1, iterations=1)
    assert made.loss[1] > made.loss[0]
    moved = ridge().of_replacing([3], X[4:5], Z[4:5], on=(XQ[:1], ZQ[:1])).values
    assert moved.shape == (1, 1)
    assert abs(moved[0, 0]) > 0


def test_a_pool_is_a_pair_of_equally_many_inputs_and_labels():
    with refused("pool is a ", "Pass the pair pool=(Xp, yp) of arrays"):
        apps.replace_rows(logistic(), XQ, ON, 1)
    with refused("The pool has ", "Pass one label for each, at least one"):
        apps.replace_rows(logistic(), (XQ, WRONG[:2]), ON, 1)
    found = apps.replace_rows(logistic(), pool=(XQ, WRONG), on=ON, budget=1)
    other, labels = X.copy(), NAMES.copy()
    other[found.rows], labels[found.rows] = XQ[found.pool_rows], WRONG[found.pool_rows]
    again = trained(labels, other).on_loss(*ON).query_values.mean()
    assert found.losses[1] == pytest.approx(again, rel=1e-6)
    assert found.losses[1] > found.losses[0]


# mismatch.py


def test_a_feature_name_for_every_column():
    with refused("feature names, and an input has ", "Pass one name per column"):
        apps.mismatch(logistic(), (XQ, WRONG), feature_names=["a", "b"])
    assert apps.mismatch(logistic(), (XQ, WRONG), feature_names=["a", "b", "c"]).features.names == ["a", "b", "c"]


def test_a_source_for_every_row():
    with refused("groups has shape ", "Pass one label for each row (the "):
        apps.mismatch(logistic(), (XQ, WRONG), groups=["old", "new"])
    groups = apps.mismatch(logistic(), (XQ, WRONG), groups=["old"] * 10 + ["new"] * 30).groups
    assert dict(zip(groups.names, groups.sizes, strict=True)) == {"old": 10, "new": 30}
    named = apps.mismatch(logistic(), (XQ, WRONG), groups={"old": range(10), "new": range(10, 40)}).groups
    assert dict(zip(named.names, named.newton, strict=True)) == dict(zip(groups.names, groups.newton, strict=True))


# outcome.py


def test_training_that_sees_changed_rows():
    def retrain(weights, seed=0):
        return logistic().objective.theta

    with refused(
        "which does not see which rows have changed", "Pass an object that is bound to the changed data, such "
    ):
        attacked(logistic(), retrain=retrain)
    made = attacked(logistic(), retrain=None).losses
    for other in (uw.Newton(), uw.LBFGS(), uw.Refit()):
        np.testing.assert_allclose(attacked(logistic(), retrain=other).losses, made, rtol=1e-4)


def test_test_rows_are_a_pair():
    with refused("test is a ", "Pass the pair test=(Xt, yt) of inputs and labels"):
        apps.flip_labels(logistic(), ON, 1, test=X)
    assert apps.flip_labels(logistic(), ON, 1, test=(X, NAMES)).accuracy[0] == fitted().score(X, NAMES)


def test_test_rows_of_a_regression_are_left_out():
    on, settings = (XQ[:1], ZQ[:1]), {"rows": [3], "level": 0.1, "iterations": 1}
    with refused("so test rows have no accuracy", "Leave test out"):
        apps.attack(ridge(), on, test=(X, Z), **settings)
    made = apps.attack(ridge(), on, **settings)
    assert made.accuracy is None
    assert made.loss[1] > made.loss[0]


# pictures.py


def test_a_picture_of_a_known_kind(tmp_path):
    ax = pictures.responsible(apps.mismatch(logistic(), (XQ, WRONG)))
    with refused("No picture was written to ", "End the name in .png, .svg or .pdf"):
        pictures.save(ax, tmp_path / "rows.picture")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        pictures.save(ax, tmp_path / f"rows{suffix}")
        assert (tmp_path / f"rows{suffix}").read_bytes().startswith(start)
    plt.close(ax.figure)


def test_a_picture_of_rows_where_there_are_no_features():
    kernel = uw.explain(KernelRidge(kernel="rbf").fit(X, Z), X, Z)
    nothing = apps.mismatch(ridge(), (XQ, fitted("ridge").predict(XQ)))
    for found, bars in ((apps.mismatch(kernel, (XQ, ZQ), k=3), 6), (nothing, 0)):
        with refused("These results have no features: ", "Use "):
            pictures.feature_effects(found)
        ax = pictures.responsible(found)
        assert len(ax.patches) == bars
        plt.close(ax.figure)


# planted.py


def test_a_network_is_compared_by_what_trains_it():
    influence = classifier(damping=1.0)

    def orders(after):
        return {"loss": after.on_loss(X[:1], Y[:1]).values[0]}

    with refused("nothing says how ", "Pass retrain=, an object with bind(influence) such as "):
        planted(influence, 4, orders, [], plantings=1, retrain=None, seed=0)
    stacked = uw.StackedTraining(uw.minibatch.SGD(lr=0.01), uw.minibatch.Shuffled(8), epochs=2)
    for retrain in (uw.LBFGS(), stacked):
        found = apps.repair(influence, inspect=4, plantings=1, retrain=retrain)
        assert found.planted.flips == 1
        assert found.chosen == found.planted.best


def test_an_order_is_named_where_no_label_can_be_flipped():
    rows = [int(np.flatnonzero(name == NAMES)[0]) for name in ("no", "yes")]
    influence = trained(NAMES[rows], X[rows])
    with refused("rows can be flipped so that every class keeps a row", "Name an order, such "):
        planted(influence, 1, lambda after: {}, [], plantings=1, retrain=None, seed=0)
    assert "Name an order, such as by='self-influence'" in apps.repair(influence, inspect=1).why
    found = apps.repair(influence, inspect=1, by="self-influence")
    assert found.rows.tolist() == [influence.of_self().values.argmax()]
    assert found.why == "It was asked for."


# repair.py


def test_scores_by_their_names():
    with refused("There is no score '", "Name one of "):
        inspected().order("luck")
    for name in ("self-influence", "loss", "margin", "mean-rank", "random"):
        assert sorted(inspected().order(name)) == list(range(40))
    assert inspected().order("loss")[:5].tolist() == inspected().rows.tolist()


def test_the_least_gain_is_a_number():
    with refused("least=", "It is the smallest gain that counts, a number ≥ 0 in units of the loss, like 1"):
        inspected().suggestions(least="much")
    found = inspected()
    assert set(found.suggestions(least=1)) == {
        row for row, gain in zip(found.rows.tolist(), found.gain, strict=True) if gain >= 1
    }


def test_the_truth_about_every_row_by_the_same_names():
    truth = changed(NAMES, [0, 1], [OTHER[name] for name in NAMES[:2]])
    with refused("truth has shape ", "Pass one label for each"):
        inspected().found(truth[:3])
    with refused("and they have none in common", "Pass true labels by the same names"):
        inspected().found(truth == "yes")
    assert inspected().found(truth).wrong == 2
    assert inspected().found(np.array(["no", "yes"])[(truth == "yes").astype(int)]).wrong == 2


def test_labels_before_they_were_spoilt():
    spoilt = changed(NAMES, 3, OTHER[NAMES[3]])
    found = apps.repair(trained(spoilt), inspect=5, by="loss")
    with refused("All labels equal the truth, so there is nothing to find", "Pass the labels before they were spoilt"):
        found.found(spoilt)
    assert found.found(NAMES).wrong == 1


def test_labels_of_a_classifier_are_repaired_and_a_regression_looks_at_its_rows():
    with refused("so no label is wrong or right", "Pass the "):
        apps.repair(ridge())
    found = apps.repair(logistic(), inspect=5, by="self-influence")
    assert found.rows.tolist() == np.argsort(-logistic().of_self().values)[:5].tolist()
    odd = changed(Z, 3, 50.0)
    assert uw.explain(Ridge().fit(X, odd), X, odd).of_self().values.argmax() == 3


def test_added_scores_have_a_new_name_and_a_number_for_each_row():
    for name, values in (("loss", np.zeros(40)), ("mine", np.zeros(3)), ("mine", np.full(40, np.nan))):
        with refused("that are no numbers", "Give each a name that is not "):
            apps.repair(logistic(), scores=lambda _, name=name, values=values: {name: values})
        found = apps.repair(logistic(), inspect=2, by="mine", scores=lambda _: {"mine": np.arange(40)})
        assert found.rows.tolist() == [39, 38]


def test_an_order_by_its_name_or_none():
    with refused(" is no order of inspection; there are ", "Name one, or leave it out: "):
        apps.repair(logistic(), by="luck")
    assert apps.repair(logistic(), inspect=5, by="margin").chosen == "margin"
    found = apps.repair(logistic(), inspect=5, plantings=1)
    assert found.chosen == found.planted.best


def test_a_share_or_a_number_of_rows():
    with refused("inspect=", "It is a share of the rows, a float such as 0.1 and at most 1.0, or a number of rows, "):
        apps.repair(logistic(), inspect=41, by="loss")
    for inspect, count in ((0.1, 4), (1.0, 40), (1, 1), (40, 40)):
        assert len(apps.repair(logistic(), inspect=inspect, by="loss").rows) == count


# solving.py


def test_a_solver_that_does_not_keep_its_promise():
    on, few = (NEAR[:1], TURNED[:1]), uw.solvers.LiSSA(depth=3, repeats=2)
    with refused("The solver left a relative residual of ", "Raise the "):
        apps.contrast(logistic(solver=few), on)
    assert apps.contrast(logistic(solver=few, damping=1.0), on).answers[0].corrected
    exact = apps.contrast(logistic(solver=uw.solvers.Cholesky()), on).answers[0]
    assert exact.rows.tolist() == apps.contrast(logistic(), on).answers[0].rows.tolist()
    assert exact.corrected


def test_a_stochastic_solver_that_has_not_settled():
    def flipped(solver):
        return apps.flip_labels(logistic(solver=solver, damping=1.0), ON, 1)

    exact = flipped(uw.solvers.Cholesky())
    with warned("The solver has not settled (residual ", "Raise depth, or use CG()"):
        flipped(uw.solvers.LiSSA(depth=1, repeats=2))
    for solver, rtol in ((uw.solvers.LiSSA(depth=30, repeats=2), 0.1), (uw.solvers.CG(), 1e-5)):
        found = flipped(solver)
        assert found.rows.tolist() == exact.rows.tolist()
        np.testing.assert_allclose(found.predicted, exact.predicted, rtol=rtol)


# understand.py


def test_rows_of_a_regression_have_values_and_no_class():
    found = apps.understand(ridge(), (XQ, ZQ))
    with refused("so no row is of another class", "Look at helpful() and its values"):
        found.first_of_another_class()
    with refused("so rows have no class", "Look at helpful() and its values"):
        found.same_class()
    values = ridge().on_loss(XQ, ZQ).values[0]
    assert found.helpful().rows.tolist() == np.argsort(-values)[:5].tolist()
    np.testing.assert_allclose(found.helpful().values, -np.sort(-values)[:5])


def test_queries_are_numbered_from_0():
    found = apps.understand(logistic(), ON)
    for query in (-1, 4):
        with refused("Query ", "there are "):
            found.helpful(query)
        values = logistic().on_loss(*ON).values
        assert [found.helpful(query).rows[0] for query in range(4)] == values.argmax(1).tolist()


def test_distances_of_all_rows_and_queries():
    with refused("X and Xq hold ", "Pass all training rows, and the queries, in one form"):
        apps.understand(logistic(), ON, X=X[:20])
    found = apps.understand(logistic(), ON, X=2 * X, Xq=2 * XQ)
    np.testing.assert_allclose(found.distances, 2 * found.feature_distances, atol=1e-9)


def test_two_models_side_by_side():
    a, b = apps.understand(logistic(), ON), apps.understand(logistic(damping=1.0), ON)
    with refused("found holds ", "Pass two: side_by_side({'SVM': a, 'network': b})"):
        apps.side_by_side({"SVM": a})
    assert apps.side_by_side({"SVM": a, "network": b}).names == ("SVM", "network")
    few = apps.understand(logistic(), (XQ[:2], RIGHT[:2]))
    with refused(" values and ", "Ask both models the same "):
        apps.side_by_side({"SVM": a, "network": few})
    np.testing.assert_allclose(apps.side_by_side({"SVM": a, "network": a}).agreement, 1)


# vulnerability.py


@pytest.mark.parametrize("setting", ["level", "half"])
def test_sizes_are_positive(setting):
    with refused(" is ", "and must be a positive number"):
        apps.vulnerability(logistic(), ON, **{setting: 0.0})
    once, twice = (apps.vulnerability(logistic(), ON, **{setting: size}).values for size in (0.5, 1.0))
    np.testing.assert_allclose(twice, 2 * once)


def test_a_row_is_corrected_or_left_out():
    corrections = {3: OTHER[NAMES[3]]}
    with refused(" is to get another label and to be left out. ", "Take it out of corrections or of without"):
        apps.corrected(logistic(), corrections, without=[3, 5])
    assert apps.corrected(logistic(), corrections, without=[5]).dropped.tolist() == [5]
