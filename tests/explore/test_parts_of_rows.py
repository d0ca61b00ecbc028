"""What a run keeps of the parts of the rows that lead: equation 5, as small changes really say, and tokens."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import labels
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import upweight as uw
from explored import browser
from upweight.errors import Damaged, InvalidInput
from upweight.explore import exports
from upweight.explore.explorer import Explorer
from upweight.explore.page import Asked
from upweight.explore.pages.why import why
from upweight.explore.parted import overlay
from upweight.show import folds
from upweight.show.parts import COLUMNS, PIXELS, TOKENS, WORDS, of_columns, of_pixels, packed_in, parts, unpacked

COUNT = 60


def _table():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(COUNT, 4)) + 3
    y = np.where(X[:, 0] - X[:, 2] + draw.normal(size=COUNT) > 0, "yes", "no")
    return uw.explain(LogisticRegression(tol=1e-10).fit(X, y), X, y), X, y


def loss_after(X, y, row, changed, Xq, yq):
    """scikit-learn's own loss of a query after training on a changed row."""
    moved = X.copy()
    moved[row] = changed
    model = LogisticRegression(tol=1e-12, max_iter=10_000).fit(moved, y)
    return -model.predict_log_proba(Xq)[0, list(model.classes_).index(yq[0])]


def test_columns_are_what_training_on_a_row_that_is_moved_to_the_mean_does(tmp_path):
    influence, X, y = _table()
    run = uw.write_run(influence, tmp_path / "run", X[:3] + 0.1, y[:3], parts=2)
    pairs = packed_in(run)
    assert len(pairs) == 12
    values = run.scores.values[1]
    order = np.argsort(values, kind="stable")
    assert {row for query, row in pairs if query == 1} == {*order[:2], *order[-2:]}
    row, small = int(order[-1]), 1e-3
    found = parts(run, 1, row)
    assert found.kind == COLUMNS
    told = dict(zip(found.names, found.values, strict=True))
    for column in range(4):
        changed = X[row].copy()
        changed[column] += small * (X[:, column].mean() - X[row, column])
        ends = [loss_after(X, y, row, one, X[1:2] + 0.1, y[1:2]) for one in (changed, X[row])]
        assert told[f"{column}"] == pytest.approx((ends[0] - ends[1]) / small, rel=2e-2, abs=1e-6)
    explorer = Explorer.open(run.path)
    page = why(explorer, Asked({"query": 1}, {"k": "2"}))
    first = page["helpful"][0]
    assert (first["id"], first["parts"]["kind"], page["parts"]) == (row, "columns", "columns")
    assert first["parts"]["lines"][0] == {"name": found.names[0], "value": found.values[0]}
    assert [line["name"] for line in first["parts"]["lines"]] == sorted(told, key=lambda name: -abs(told[name]))
    assert why(explorer, Asked({"query": 1}, {"k": "3"}))["helpful"][2]["parts"] is None  # not kept, not made up


def test_words_are_those_of_the_text_and_the_sum_is_the_derivative_along_the_row(tmp_path):
    first = ["the cat sat", "the dog ran", "a Cat ran fast", "dogs sat down", "cat and dog", "the fast dog"]
    texts = [f"{text} {word}" for text in first for word in ("here", "there", "again", "now and then")]
    y = [text.lower().count("cat") > 0 for text in texts]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(tol=1e-10)).fit(texts, y)
    influence = uw.explain(model, texts, y)
    run = uw.write_run(influence, tmp_path / "run", ["a cat"], [True], card=lambda row: texts[row], parts=3)
    explorer = Explorer.open(run.path)
    page = why(explorer, Asked({"query": 0}, {"k": "3"}))
    for one in (*page["helpful"], *page["harmful"]):
        told = one["parts"]
        words = {piece["text"].lower() for piece in told["pieces"] if piece["value"] is not None}
        assert words == set(re.findall(r"\w\w+", texts[one["id"]].lower()))
        assert "".join(piece["text"] for piece in told["pieces"]) == texts[one["id"]]
        x = influence.examples.x[[one["id"]]].toarray()[0]
        slope = influence.of_perturbing([one["id"]], on=(["a cat"], [True]))[0, 0]
        assert told["total"] == pytest.approx(-x @ slope, rel=1e-3)
        assert parts(run, 0, one["id"]).kind == WORDS


def test_pixels_are_summed_over_channels_and_laid_over_the_picture(tmp_path):
    torch.manual_seed(0)
    X, y = torch.randn(COUNT, 3, 6, 4), torch.randint(0, 2, (COUNT,))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 2))
    influence = uw.explain(module, X, y, loss=torch.nn.functional.cross_entropy, damping=1.0)
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], parts=1)
    (query, row), _ = next(iter(packed_in(run).items()))
    found = parts(run, query, row)
    slope = influence.of_perturbing([row], on=(X[[query]], y[[query]]))[0, 0]
    expected = ((X.double().mean(0) - X[row].double()).numpy() * slope).sum(0)
    assert found.kind == PIXELS
    np.testing.assert_allclose(found.values, expected, atol=np.abs(expected).max() / 200)
    explorer = Explorer.open(run.path)
    picture = np.asarray(Image.open(_written(tmp_path / "a.png", overlay(explorer, query, row))))
    assert picture.shape == (6, 4, 3)
    place = np.unravel_index(np.abs(found.values).argmax(), found.values.shape)
    blue, red = int(picture[*place, 2]), int(picture[*place, 0])
    assert (blue > red) == (found.values[place] > 0)
    assert overlay(explorer, query, 59 if row != 59 else 58) is None


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def test_rows_of_an_estimator_whose_cards_are_pictures_have_pixels(tmp_path):
    influence, X, y = _table()
    card = [np.uint8(20 * line.reshape(2, 2)) for line in X]
    run = uw.write_run(influence, tmp_path / "run", X[:1], y[:1], card=card.__getitem__, parts=1)
    assert {one.kind for one in packed_in(run).values()} == {PIXELS}


def test_a_pixel_that_does_not_matter_keeps_its_shade(tmp_path):
    draw = np.random.default_rng(0)
    X = np.column_stack([draw.normal(size=(COUNT, 2)), np.zeros((COUNT, 2))])  # two pixels are always blank
    y = np.where(X[:, 0] > 0, "yes", "no")
    influence = uw.explain(LogisticRegression(tol=1e-10).fit(X, y), X, y)
    looks = np.array([[255, 255], [255, 0]], np.uint8)
    run = uw.write_run(influence, tmp_path / "run", X[:1], y[:1], card=lambda _: looks, parts=1)
    query, row = next(iter(packed_in(run)))
    picture = np.asarray(Image.open(_written(tmp_path / "a.png", overlay(Explorer.open(run.path), query, row))))
    assert picture[1].tolist() == [[255] * 3, [128] * 3]  # white, and black paler


def test_what_is_kept_is_bounded():
    draw = np.random.default_rng(0)
    many = draw.normal(size=10_000)
    kept = unpacked(*vars(of_columns(WORDS, [f"{'w' * 500}{j}" for j in range(10_000)], many)).values())
    assert len(kept.names) == 64
    assert sorted(np.abs(kept.values)) == pytest.approx(sorted(np.abs(many))[-64:], rel=1e-3)
    assert max(map(len, kept.names)) == 200
    packed = of_pixels(draw.normal(size=(1000, 500)))
    assert len(packed.content) == packed.shape[0] * packed.shape[1] <= 96 * 96
    flat = of_pixels(np.zeros((3, 3)))
    assert not unpacked(*vars(flat).values()).values.any()


def test_the_same_call_keeps_what_is_there_and_a_damaged_file_is_said(tmp_path):
    influence, X, y = _table()
    call = (influence, tmp_path / "run", X[:2], y[:2])
    run = uw.write_run(*call, parts=1)
    file = run.path / "parts.safetensors"
    before = file.stat().st_mtime_ns
    uw.write_run(*call, parts=1)
    assert file.stat().st_mtime_ns == before
    assert len(packed_in(uw.write_run(*call, parts=2))) == 8
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"parts\.safetensors"):
        packed_in(run)


# ---- tokens ----------------------------------------------------------------------------------------------------------

WORDS_OF = ["<pad>", "anna", "lives", "in", "rome", "oslo", "boris", "likes"]
ROWS = [[1, 2, 3, 4], [6, 2, 3, 5], [1, 7, 4], [6, 7, 5], [1, 7, 5]]


class Small(torch.nn.Module):
    """Next tokens from the present one: a model of token sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Linear(len(WORDS_OF), len(WORDS_OF)).double()

    def forward(self, input_ids, attention_mask=None):
        return self.table(torch.nn.functional.one_hot(input_ids, len(WORDS_OF)).double()).movedim(-1, 1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    def rows(lists):
        return [{"input_ids": one, "labels": [*one[1:], -100]} for one in lists]

    influence = uw.explain(Small(), rows(ROWS), loss=torch.nn.functional.cross_entropy, damping=0.1)
    folder = tmp_path_factory.mktemp("tokens") / "run"
    query = rows([[1, 2, 3, 5]])
    run = uw.write_run(influence, folder, query, tokenizer=WORDS_OF.__getitem__, parts=2)
    return influence, query, run


def test_token_sequences_have_cards_of_their_tokens(tokens, tmp_path):
    influence, query, run = tokens
    assert run.rows.cards[2] == ["anna", "likes", "rome"]
    assert run.queries.cards == [["anna", "lives", "in", "oslo"]]
    numbers = uw.write_run(influence, tmp_path / "run", query)
    assert numbers.rows.cards[2] == ["1", "7", "4"]
    own = uw.write_run(influence, tmp_path / "own", query, card=lambda row: [" a", f" {row}"])
    assert own.rows.cards[1] == [" a", " 1"]
    explorer = Explorer.open(run.path)
    card = next(one for one in why(explorer, Asked({"query": 0}, {}))["helpful"] if one["id"] == 0)["card"]
    assert card["kind"] == "tokens"
    assert [part["text"].strip() for part in card["parts"] if part["both"]] == ["anna", "lives", "in"]
    assert card["only_beside"] == ["oslo"]


def test_tokens_are_those_of_by_token(tokens):
    influence, query, run = tokens
    explorer = Explorer.open(run.path)
    page = why(explorer, Asked({"query": 0}, {"k": "2"}))
    assert page["parts"] == "tokens"
    for one in (*page["helpful"], *page["harmful"]):
        exact = influence.by_token(one["id"], on=query)
        assert one["parts"]["total"] == pytest.approx(exact.of_row.sum(), rel=1e-3)
        assert one["parts"]["total"] == pytest.approx(one["value"], rel=1e-3)
        names = [piece["text"].strip() for piece in one["parts"]["pieces"]]
        assert names == [WORDS_OF[int(token.text)] for token in exact.row]
        values = [piece["value"] for piece in one["parts"]["query"] if piece["value"] is not None]
        assert values == pytest.approx(exact.of_query.tolist(), rel=1e-3)
        assert parts(run, 0, one["id"]).kind == TOKENS
    assert json.dumps(page, allow_nan=False)


HOSTILE = "<script>alert(1)</script>"


def test_pages_tell_parts_as_text_and_a_picture(tokens, made, client, tmp_path):
    influence, query, _ = tokens
    run = uw.write_run(influence, tmp_path / "run", query, tokenizer=lambda _: HOSTILE, parts=2)
    page = browser(run.path).get("/queries/0").text
    assert "<script>alert" not in page
    assert page.count('<span class="piece helps-') > 2
    assert 'title="+' in page
    assert "What it does to each token of the query" in page
    query, row = next(iter(packed_in(uw.Run.open(made))))
    picture = client.get(f"/queries/{query}/rows/{row}/parts.png")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert f"/queries/{query}/rows/{row}/parts.png" in client.get(f"/queries/{query}").text
    for nowhere in ("/queries/0/rows/499999/parts.png", f"/queries/{2**60}/rows/0/parts.png"):
        assert client.get(nowhere).status_code == 404


def test_the_review_says_whose_its_suggestions_are(tmp_path):
    influence, X, y = _table()
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=np.where(y == "yes", "no", "yes"))
    page = browser(run.path).get("/review").text
    assert "Suggested labels are out of fold" in page
    assert "Trained without this row, they say" in page
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2])
    page = browser(run.path).get("/review").text
    assert "Suggested labels are the model's own" in page or "Suggested labels are the model&#39;s own" in page


# ---- what models say that have not seen the row ----------------------------------------------------------------------


def test_labels_out_of_fold_are_those_of_models_that_were_trained_without_the_row(tmp_path):
    draw = np.random.default_rng(3)
    count = 24
    X = draw.normal(size=(count, 10))
    y = np.where(X[:, 0] + 2 * draw.normal(size=count) > 0, "yes", "no")
    influence = uw.explain(LogisticRegression(tol=1e-10).fit(X, y), X, y)
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=count)  # one row a fold
    for row in range(0, count, 4):
        rest = np.arange(count) != row
        model = LogisticRegression(tol=1e-10, C=1.0).fit(X[rest], y[rest])
        assert run.rows.out_of_fold[row] == model.predict(X[[row]])[0]
    assert (run.rows.out_of_fold != run.rows.predictions).any()
    five = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=5)
    assert (five.rows.out_of_fold == run.rows.out_of_fold).mean() > 0.7
    assert uw.write_run(influence, tmp_path / "run", X[:2], y[:2]).rows.out_of_fold is None


def test_models_of_folds_are_trained_once(tmp_path, monkeypatch):
    influence, X, y = _table()
    trained = []
    real = folds.retrained
    monkeypatch.setattr(folds, "retrained", lambda *of, **told: trained.append(1) or real(*of, **told))
    first = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=3).rows.out_of_fold
    assert len(trained) == 3
    again = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=3).rows.out_of_fold
    assert len(trained) == 3
    assert again.tolist() == first.tolist()
    assert uw.write_run(influence, tmp_path / "run", X[:2], y[:2]).rows.out_of_fold is None
    back = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=3).rows.out_of_fold
    assert (len(trained), back.tolist()) == (3, first.tolist())
    uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=4)
    assert len(trained) == 7


def test_a_class_of_one_row_is_refused_by_its_name_and_number(tmp_path):
    X, y = _three_classes()
    y[7] = "=owl"
    influence = uw.explain(LogisticRegression().fit(X, y), X, y)
    with pytest.raises(InvalidInput, match=r"Class '=owl' has one row, number 7: of the 4 models of out_of_fold=4"):
        uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=4)
    assert not (tmp_path / "run").exists()
    y[9] = "=owl"  # two rows lie in two folds
    influence = uw.explain(LogisticRegression().fit(X, y), X, y)
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=4)
    assert set(run.rows.out_of_fold) <= set(y)


def test_rows_without_weight_do_not_stand_for_their_class(tmp_path):
    X, y = _three_classes()
    y[5:9] = "=owl"
    weights = np.ones(len(y))
    weights[5:7] = 0
    influence = uw.explain(LogisticRegression().fit(X, y, weights), X, y, sample_weight=weights)
    for seed in range(12):
        dealt = folds.asked(influence, 3, seed=seed)
        assert dealt.of[7] != dealt.of[8]
        for label in ("a", "b"):
            assert np.ptp(np.bincount(dealt.of[y == label], minlength=3)) <= 1


def _three_classes():
    draw = np.random.default_rng(5)
    X = draw.normal(size=(40, 3))
    return X, np.where(X[:, 0] > 0, "a", "b").astype("<U4")


def test_parts_that_nobody_asks_for_any_more_leave(tmp_path):
    influence, X, y = _table()
    assert packed_in(uw.write_run(influence, tmp_path / "run", X[:2], y[:2], parts=1))
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2])
    assert packed_in(run) == {}
    assert "what matters" not in browser(run.path).get("/queries/0").text


@pytest.mark.parametrize("count", [-1, 1.5, True, "4", None])
def test_parts_that_are_no_count_are_refused_before_the_work(tmp_path, count):
    influence, X, y = _table()
    with pytest.raises(InvalidInput, match=r"parts=.*It must be a whole number ≥ 0; 4 keeps those of 4 rows"):
        uw.write_run(influence, tmp_path / "run", X[:2], y[:2], parts=count)
    assert not (tmp_path / "run").exists()


def test_a_card_that_is_none_is_refused_before_the_work(tmp_path):
    influence, X, y = _table()
    for cards in ({"card": lambda _: 3}, {"query_card": lambda _: np.zeros((2, 2))}):
        with pytest.raises(InvalidInput, match=r"card\(0\) is a "):
            uw.write_run(influence, tmp_path / "run", X[:2], y[:2], **cards)
    assert not (tmp_path / "run").exists()


def test_labels_out_of_fold_may_be_given(tmp_path):
    influence, X, y = _table()
    draw = np.random.default_rng(1)
    chances = draw.dirichlet([1, 1], size=COUNT)
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=chances)
    assert run.rows.out_of_fold.tolist() == np.where(chances[:, 1] > 0.5, "yes", "no").tolist()
    labels = draw.choice(["no", "yes"], size=COUNT)
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=labels)
    assert run.rows.out_of_fold.tolist() == labels.tolist()
    explorer = Explorer.open(run.path)
    for known in (explorer.desk.labels, uw.Run.open(run.path) and _from_files(run)):
        assert [known.suggested(row) for row in range(COUNT)] == [(label, "out of fold") for label in labels.tolist()]
        assert [known.predicted(row) for row in range(COUNT)] == run.rows.predictions.tolist()


def test_exports_take_them_along_and_tell_tokens_as_text(tokens):
    told = labels(8)
    outside = replace(told, held_out=np.array([0, 1, -1, 0, 0, 0, 0, 0], np.int32))  # the model says class 1 of all
    lines = exports.exported("cleanlab", outside, {}).content.decode().splitlines()[1:]
    assert [line.split(",")[-1] for line in lines] == list("01100000")
    cards = {0: tokens[2].rows.cards[2]}
    tasks = json.loads(exports.exported("label-studio", outside, {}, queue=[0], cards=lambda _: cards).content)
    assert tasks[0]["data"]["text"] == "anna likes rome"
    assert tasks[0]["predictions"][0]["result"][0]["value"]["choices"] == ["3"]


def _from_files(run):
    from upweight.explore.labels import labels_of

    return labels_of(run)


def test_without_them_the_suggestion_is_the_models_own(tmp_path):
    influence, X, y = _table()
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2])
    known = Explorer.open(run.path).desk.labels
    assert known.suggested(3) == (run.rows.predictions[3], "the model")


@pytest.mark.parametrize("said", [np.ones((COUNT, 3)), ["maybe"] * COUNT, ["yes"], 1, COUNT + 1, True])
def test_what_cannot_be_out_of_fold_is_refused(tmp_path, said):
    influence, X, y = _table()
    with pytest.raises(InvalidInput, match="out_of_fold"):
        uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=said)
    assert not (tmp_path / "run").exists()  # before hours of work


def test_rows_of_parts_and_measurements_have_neither(tmp_path):
    draw = np.random.default_rng(0)
    X = draw.normal(size=(20, 2))
    from sklearn.linear_model import Ridge

    influence = uw.explain(Ridge().fit(X, X[:, 0]), X, X[:, 0])
    with pytest.raises(InvalidInput, match="are no classes"):
        uw.write_run(influence, tmp_path / "run", X[:2], X[:2, 0], out_of_fold=5)
