"""What pages say is what the run says, computed here by other means; each has its twin in JSON."""

from __future__ import annotations

import html
import re
import shlex
import shutil

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

import upweight as uw
from explored import TRAIN, WRONG, browser, digits, influence, queries
from upweight.explore import pages
from upweight.explore.comparing import alike
from upweight.explore.explorer import Explorer
from upweight.show.evidence import Dampings


@pytest.fixture(scope="module")
def run(made):
    return uw.Run.open(made)


def twin(client, path):
    """A page's JSON, once the page itself has been shown."""
    name, _, asked = path.partition("?")
    shown = client.get(path)
    assert shown.status_code == 200
    assert shown.headers["content-type"] == "text/html; charset=utf-8"
    found = client.get(("/index.json" if name == "/" else f"{name}.json") + (f"?{asked}" if asked else ""))
    assert found.status_code == 200
    return found.json()


def test_every_page_opens_and_links_to_pages_that_are_there(client):
    """What the overview and the first pages behind it link to, two steps deep."""
    seen, waiting = set(), ["/"]
    for _ in range(3):
        found = []
        for path in waiting:
            answer = client.get(path)
            assert answer.status_code == 200, path
            if answer.headers["content-type"].startswith("text/html"):
                links = re.findall(r'(?:href|src)="(/[^"]*)"', answer.text)
                found += [link.replace("&amp;", "&") for link in links]
        seen |= set(waiting)
        waiting = sorted(set(found) - seen)[:60]
    assert {page.path for page in pages.PAGES if page.tab} <= seen


def test_commands_on_pages_can_be_typed_as_they_stand(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "my digits; run")
    client = browser(folder)
    for path in ("/export", "/proof", "/compare", "/review?by=loss&budget=1"):
        commands = re.findall(r"upweight (?:apply|reviews|prove|explore) [^<]*", html.unescape(client.get(path).text))
        assert commands, path
        assert all(str(folder) in shlex.split(command) for command in commands), commands


def test_the_overview_counts(client, run):
    told = twin(client, "/")
    assert (told["run"]["rows"], told["run"]["queries"]) == (TRAIN, len(queries()[1]))
    assert told["queries"]["wrong"] == int((run.queries.labels != run.queries.predictions).sum())
    assert told["health"]["good"] is True
    assert sum(told["rows"]["histograms"]["loss"]["counts"]) == TRAIN
    ends = told["rows"]["histograms"]["loss"]["edges"]
    beyond = int(((run.rows.losses < ends[0]) | (run.rows.losses > ends[-1])).sum())
    assert beyond == told["rows"]["histograms"]["loss"]["beyond"] > 0
    assert "farther out stand in the outermost bars" in client.get("/").text
    np.testing.assert_allclose(told["rows"]["means"]["self_influence"], run.rows.self_influence.mean())


@pytest.mark.parametrize("query", [0, 7, 59])
def test_why_names_the_rows_that_scores_name(client, run, query):
    told = twin(client, f"/queries/{query}")
    up, down = run.scores.helpful(8), run.scores.harmful(8)
    for side, most in (("helpful", up), ("harmful", down)):
        assert [row["id"] for row in told[side]] == most.rows[query].tolist()
        assert [row["value"] for row in told[side]] == most.values[query].tolist()
        assert [row["label"] for row in told[side]] == run.rows.labels[most.rows[query]].tolist()
    values = run.scores.values[query]
    np.testing.assert_allclose(told["total"], values.sum(), rtol=1e-9)
    assert sum(told["histogram"]["counts"]) == TRAIN
    ends = told["histogram"]["edges"]
    beyond = int(((values < ends[0]) | (values > ends[-1])).sum())
    assert beyond == told["histogram"]["beyond"] > 0
    assert f"{beyond} farther out stand in the outermost bars." in client.get(f"/queries/{query}").text
    sums = {one["name"]: one["value"] for one in told["by_class"]}
    for label in range(10):
        np.testing.assert_allclose(sums[str(label)], values[run.rows.labels == label].sum(), rtol=1e-9)
    pictures = digits()[2].astype(float)
    for point in told["distances"][:5]:
        apart = np.sqrt(np.mean((pictures[point["row"]] - pictures[TRAIN + query]) ** 2)) / 255
        np.testing.assert_allclose([point["x"], point["y"]], [apart, values[point["row"]]], rtol=1e-9)


def test_why_of_one_label(client, run):
    told = twin(client, "/queries/7?label=3&k=5")
    rows = np.flatnonzero(run.rows.labels == 3)
    values = run.scores.values[7, rows]
    assert [row["id"] for row in told["helpful"]] == rows[np.argsort(-values, kind="stable")[:5]].tolist()
    assert told["rows"] == len(rows)
    np.testing.assert_allclose(told["total"], values.sum(), rtol=1e-9)
    assert sum(told["histogram"]["counts"]) == len(rows)
    assert f"All {len(rows)} rows with label 3" in client.get("/queries/7?label=3").text


def test_a_row_tells_whom_it_helps_and_harms(client, run):
    told = twin(client, "/rows/3")
    column = run.scores.values[:, 3]
    assert [query["id"] for query in told["helps"]] == np.argsort(-column, kind="stable")[:8].tolist()
    assert [query["id"] for query in told["harms"]] == np.argsort(column, kind="stable")[:8].tolist()
    assert (told["helped"], told["harmed"]) == (int((column > 0).sum()), int((column < 0).sum()))
    assert told["rank"] == 1 + int((run.rows.self_influence > run.rows.self_influence[3]).sum())


def test_near_duplicates_are_found_and_other_labels_told(folder, tmp_path):
    texts = ["Buy now, cheap!", "buy now cheap", "something else", "Buy  NOW: cheap", "a", "b"] * 84
    path = tmp_path / "texts"
    uw.write_run(influence(), path, *queries(), card=lambda row: texts[row] if row < 6 else None)
    told = twin(browser(path), "/rows/0")
    assert [twin["id"] for twin in told["twins"]] == [1, 3]
    labels = digits()[1]
    assert [twin["same_label"] for twin in told["twins"]] == [labels[0] == labels[1], labels[0] == labels[3]]


@pytest.mark.parametrize(
    ("asked", "keep"),
    [
        ("truth=wrong", lambda items: items.labels != items.predictions),
        ("truth=right", lambda items: items.labels == items.predictions),
        ("label=4", lambda items: items.labels == 4),
        ("said=8&truth=wrong", lambda items: (items.predictions == 8) & (items.labels != 8)),
        ("uncertain=1", lambda items: np.abs(items.margins) <= np.quantile(np.abs(items.margins), 0.1)),
        ("search=3", lambda items: items.labels == 3),
    ],
)
@pytest.mark.parametrize(("sort", "field"), [("loss", "losses"), ("margin", "margins")])
@pytest.mark.parametrize("side", ["rows", "queries"])
def test_filters_and_sorting(client, run, side, asked, keep, sort, field):
    items = getattr(run, side)
    wanted = np.flatnonzero(keep(items))
    for down, sign in ((0, 1), (1, -1)):
        order = wanted[np.argsort(sign * getattr(items, field)[wanted], kind="stable")]
        told = twin(client, f"/{side}?{asked}&sort={sort}&down={down}&page=1")
        page = min(1, max(0, -(-len(wanted) // 25) - 1))
        assert told["total"] == len(wanted)
        assert [item["id"] for item in told["items"]] == order[page * 25 :][:25].tolist()


def test_slices_are_sums_over_rows_and_means_over_queries(client, run):
    told = twin(client, "/slices")
    for line in told["matrix"]:
        mine = run.queries.labels == line["level"]
        assert line["count"] == mine.sum()
        np.testing.assert_allclose(line["loss"], run.queries.losses[mine].mean())
        for column, value in zip(told["columns"], line["values"], strict=True):
            rows = run.rows.labels == column["level"]
            wanted = run.scores.values[np.ix_(mine, rows)].sum(1).mean()
            np.testing.assert_allclose(value, wanted, rtol=1e-8, atol=1e-15)
            assert column["count"] == rows.sum()


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """A run whose cards are columns: a number, a site, and one with many numbers."""
    path = tmp_path_factory.mktemp("columns") / "run"
    losses = np.arange(TRAIN) % 97 / 7

    def card(row, beds=4):
        return {
            "site": "north" if row % 3 else "south",
            "beds": row % beds,
            "cost": float(losses[row]),
            "note": f"n{row}",
        }

    uw.write_run(influence(), path, *queries(), card=card, query_card=lambda query: card(query, 7))
    return path


def test_slices_by_a_column(columns):
    client, run = browser(columns), uw.Run.open(columns)
    told = twin(client, "/slices?rows=1&queries=2")
    assert [way["name"] for way in told["ways"]] == ["label", "site", "beds", "cost"]
    rows = np.arange(TRAIN)
    for line in told["matrix"]:
        mine = np.arange(60) % 7 == int(line["name"])
        for column, value in zip(told["columns"], line["values"], strict=True):
            chosen = (rows % 3 > 0) == (column["name"] == "north")
            np.testing.assert_allclose(value, run.scores.values[np.ix_(mine, chosen)].sum(1).mean(), rtol=1e-8)
    assert twin(client, told["columns"][0]["address"])["total"] == told["columns"][0]["count"]


def test_of_many_slices_those_with_most_items_are_shown(tmp_path):
    kinds = np.sqrt(np.arange(TRAIN) * 1.6).astype(int)  # of 29 kinds the later ones are larger
    cards = {
        "card": lambda row: {"kind": f"{kinds[row]:02}"},
        "query_card": lambda query: {"kind": f"{kinds[query * 8]:02}"},
    }
    uw.write_run(influence(), tmp_path / "run", *queries(), **cards)
    told = twin(browser(tmp_path / "run"), "/slices?rows=1&queries=1")
    for items, own in ((told["columns"], kinds), (told["matrix"], kinds[np.arange(60) * 8])):
        levels, counts = np.unique(own, return_counts=True)
        assert len(levels) > 20
        wanted = sorted(levels[np.argsort(-counts, kind="stable")[:20]].tolist())
        assert [int(item["name"]) for item in items] == wanted
        assert [item["count"] for item in items] == [int((own == level).sum()) for level in wanted]


def test_columns_are_told_beside_the_querys(columns):
    told = twin(browser(columns), "/queries/1")["helpful"][0]
    spread = (np.arange(TRAIN) % 4).std()
    for line in told["card"]["lines"]:
        if line["name"] == "beds":
            np.testing.assert_allclose(line["apart"], (told["id"] % 4 - 1) / spread)
            assert line["beside"] == 1
    apart = [abs(line["apart"] or 0) for line in told["card"]["lines"]]
    assert apart == sorted(apart, reverse=True)


def test_the_queries_of_a_row_are_told_beside_the_row(columns):
    client = browser(columns)
    told = twin(client, "/rows/5")["helps"][0]
    assert told["card"]["beside_is"] == "row"
    for line in told["card"]["lines"]:
        if line["name"] == "beds":
            assert (line["value"], line["beside"]) == (told["id"] % 7, 5 % 4)
    page = client.get("/rows/5").text
    assert '<th scope="col">query</th><th scope="col">this row</th>' in page
    assert '<th scope="col">row</th><th scope="col">query</th>' in client.get("/queries/1").text


def test_words_of_the_other_text_are_said_to_be_its(tmp_path):
    uw.write_run(
        influence(),
        tmp_path / "run",
        *queries(),
        card=lambda row: f"row{row} both",
        query_card=lambda q: f"query{q} both",
    )
    client = browser(tmp_path / "run")
    assert "Only in this row: row5" in client.get("/rows/5").text
    assert "Only in the query: query1" in client.get("/queries/1").text
    assert "Only in the query" not in client.get("/rows/5").text


def test_trust_shows_what_was_kept(folder):
    run, on = uw.Run.open(folder), queries()
    assert twin(browser(folder), "/trust")["removals"] is None
    outcomes = uw.leave_one_out(influence(), on, range(12))
    subsets = uw.subset_retraining(influence(), on, uw.random_subsets(TRAIN, 6))
    path = influence().damping_path(*on, dampings=[1e-3, 1e-2])
    uw.keep_evidence(run, outcomes, subsets, path)
    told = twin(browser(folder), "/trust")
    agreement = uw.agreement(run.scores, outcomes)
    for name in ("pearson", "spearman", "slope", "intercept", "pairs"):
        np.testing.assert_allclose(told["removals"][name], getattr(agreement, name), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(told["removals"]["control"], np.abs(outcomes.control).max())
    predicted, actual = run.scores.values[:, outcomes.rows].ravel(), outcomes.actual.ravel()
    np.testing.assert_allclose(told["removals"]["worst"], np.abs(predicted - actual).max())
    np.testing.assert_allclose(told["removals"]["pearson"], pearsonr(predicted, actual)[0])
    np.testing.assert_allclose(told["subsets"]["lds"], uw.lds(run.scores, subsets).value, rtol=1e-9)
    assert [one["damping"] for one in told["dampings"]] == [1e-3, 1e-2]


def test_a_damping_is_the_runs_own_or_another_however_small():
    many = np.array([1e-12, 1e-10, 1e-9])
    path = Dampings(many, many, many, many)
    for own, wanted in ((0.0, [False] * 3), (1e-10, [False, True, False]), (1e-10 + 1e-22, [False, True, False])):
        assert [one["own"] for one in pages.trust.dampings(path, own)] == wanted


def test_two_runs_are_compared(made, tmp_path):
    other = tmp_path / "other"
    uw.write_run(influence(curvature=uw.operators.EmpiricalFisher(), damping=0.01), other, *queries())
    client = browser(made, other)
    here, there = uw.Run.open(made).scores.values, uw.Run.open(other).scores.values
    told = twin(client, "/compare")
    for item in told["items"]:
        query = item["query"]
        np.testing.assert_allclose(item["pearson"], pearsonr(here[query], there[query])[0])
        tops = [set(np.argsort(-values[query], kind="stable")[:20].tolist()) for values in (here, there)]
        assert item["helpful"] == len(tops[0] & tops[1]) / 20
    moved = twin(client, "/compare/5")["items"]
    assert [one["id"] for one in moved] == np.argsort(-np.abs(here[5] - there[5]), kind="stable")[:20].tolist()
    for one in moved:
        assert (one["here"], one["there"]) == (here[5, one["id"]], there[5, one["id"]])


def test_what_no_row_leads_is_no_overlap_of_nothing():
    harms = -np.arange(1.0, 31.0)
    told = alike(0, harms, harms[::-1])
    assert (told["helpful"], told["harmful"]) == (None, 10 / 20)
    assert alike(0, harms, -harms)["helpful"] == 0


def test_ranks_are_those_of_spearman():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 5, 50).astype(float), draw.normal(size=50)
    np.testing.assert_allclose(pages.trust.correlation(pages.trust.ranks(x), pages.trust.ranks(y)), spearmanr(x, y)[0])


def test_wrong_labels_are_among_the_rows_worth_a_look(client):
    """The flipped ones are in the training rows' first 25 by self-influence far more often than by chance (1.25)."""
    first = twin(client, "/rows?sort=self-influence&down=1")["items"]
    assert sum(item["id"] < WRONG for item in first) >= 15


def test_a_query_without_a_value_is_told(tmp_path):
    X, y, _ = digits()
    from sklearn.linear_model import LinearRegression

    from upweight.errors import TheoryWarning

    columns = np.column_stack([X[:TRAIN, 2:5], np.zeros(TRAIN)])
    asked = np.column_stack([X[:3, 2:5], [0, 1, 0]])
    explained = uw.explain(LinearRegression().fit(columns, y[:TRAIN]), columns, y[:TRAIN].astype(float))
    with pytest.warns(TheoryWarning):
        uw.write_run(explained, tmp_path / "run", asked, y[:3].astype(float))
    client = browser(tmp_path / "run")
    assert twin(client, "/queries/1")["determined"] is False
    assert "do not determine" in client.get("/queries/1").text
    assert twin(client, "/queries/0")["determined"] is True
    for path in ("/", "/queries", "/rows", "/rows/1", "/slices", "/trust"):
        twin(client, path)


def test_scores_are_the_same_bytes(made, run):
    explorer = Explorer.open(made)
    for query in range(explorer.q):
        assert explorer.line(query).tobytes() == run.scores.values[query].tobytes()
    assert np.array_equal(explorer.column(9), run.scores.values[:, 9])
    assert np.array_equal(explorer.codes(0), run.rows.labels)
