"""The index is made of the run's files: whole or not at all, and again when they are others."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import upweight as uw
from explored import browser, influence, queries
from upweight.errors import Damaged, InvalidInput
from upweight.explore import index
from upweight.explore.columns import Seen
from upweight.explore.explorer import Explorer
from upweight.explore.pages.row import rank
from upweight.explore.tables import match_of, pack, twin_of, unpack
from upweight.runs.files import read_tensors, write_tensors


def test_it_is_made_once(folder):
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "explorer").iterdir()}
    Explorer.open(folder)
    assert {file.name: file.stat().st_mtime_ns for file in (folder / "explorer").iterdir()} == before


def test_it_is_made_again_when_the_run_is_another(folder):
    made = json.loads((folder / "explorer" / "index.json").read_text())["made_of"]
    file = folder / "items-000000.safetensors"
    arrays, card = read_tensors(file)
    write_tensors(file, {**arrays, "losses": arrays["losses"] + 1}, card)
    loss = Explorer.open(folder).item("rows", 0)["loss"]
    assert loss == arrays["losses"][0] + 1
    assert json.loads((folder / "explorer" / "index.json").read_text())["made_of"] != made


@pytest.mark.parametrize("name", [index.ITEMS_FILE, index.VALUES, index.CODES, index.SUMS])
def test_it_is_made_again_when_a_file_of_it_is_cut_or_missing(folder, name):
    file = folder / "explorer" / name
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    Explorer.open(folder)
    assert file.stat().st_size == len(content)
    file.unlink()
    Explorer.open(folder)
    assert file.stat().st_size == len(content)


@pytest.mark.parametrize("name", ["items.sqlite", "sums.f64", "marks.u32", "index.json"])
def test_a_flipped_bit_of_a_file_that_is_read_whole_makes_the_index_again(folder, name):
    Explorer.open(folder)
    file = folder / "explorer" / name
    right = file.read_bytes()
    for place in (len(right) // 3, len(right) - 2):
        file.write_bytes(flipped(right, place))
        Explorer.open(folder)
        assert file.read_bytes() == right or name == "items.sqlite"
        assert Explorer.open(folder).line(0).shape == (500,)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_flipped_bit_of_a_line_is_an_error_and_never_a_number(folder):
    explorer = Explorer.open(folder)
    values, codes = folder / "explorer" / "values.f64", folder / "explorer" / "codes.i32"
    right = values.read_bytes()
    values.write_bytes(flipped(right, 8 * (explorer.n + 7)))  # query 1, row 7
    assert explorer.line(0).shape == (500,)
    for ask in (lambda: explorer.line(1), lambda: explorer.column(7)):
        with pytest.raises(Damaged, match="is not what was written: some of its bits"):
            ask()
    assert "bits are others" in browser(folder).get("/queries/1").text
    assert browser(folder).get("/queries/1.json").status_code == 500
    values.write_bytes(right)
    assert explorer.column(7)[1] == explorer.line(1)[7]
    codes.write_bytes(flipped(codes.read_bytes(), 4 * 3))
    with pytest.raises(Damaged, match="codes"):
        explorer.codes(0)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"format": 1}'])
def test_facts_that_are_none_are_made_again(folder, content):
    (folder / "explorer" / "index.json").write_text(content)
    assert Explorer.open(folder).n == 500


def test_what_fails_half_way_leaves_nothing(folder, monkeypatch):
    shutil.rmtree(folder / "explorer")

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "_keep_values", fails)
    with pytest.raises(KeyboardInterrupt):
        Explorer.open(folder)
    assert not [file for file in folder.iterdir() if "explorer" in file.name]


def test_the_run_goes_on_beside_its_index(folder):
    """A folder with an index is still a store: the same call reads it."""
    run = uw.write_run(influence(), folder, *queries(), card=lambda row: f"row {row}")
    assert browser(folder).get("/rows/7.json").json()["row"]["card"]["parts"] == [{"text": "row 7", "both": False}]
    assert run.finished


def test_scores_alone_are_refused(tmp_path):
    influence().on_loss(*queries(), store=tmp_path / "run")
    with pytest.raises(InvalidInput, match="holds scores only"):
        Explorer.open(tmp_path / "run")


@pytest.mark.parametrize(
    "card", ["a text", "", {"a": 1, "b": "x", "c": None, "d": 1.5}, np.arange(12, dtype=np.uint8).reshape(3, 4), None]
)
def test_cards_are_kept_as_they_are(card):
    kind, height, width, depth, _, content = pack(card)
    found = unpack(kind, height, width, depth, content)
    assert type(found) is type(card)
    assert np.array_equal(found, card) if isinstance(card, np.ndarray) else found == card


def test_twins_differ_in_what_hardly_counts():
    picture = np.arange(24 * 24, dtype=np.uint8).reshape(24, 24) // 64 * 64
    assert twin_of("Buy now!") == twin_of("buy  NOW") != twin_of("buy nothing")
    assert twin_of({"a": 1.2341}) == twin_of({"a": 1.2342}) != twin_of({"a": 1.25})
    assert twin_of(picture) == twin_of(picture + np.uint8(1)) != twin_of(255 - picture)
    assert twin_of(None) is None


def test_words_are_quoted():
    assert match_of("cheap watch") == '"cheap" "watch"*'
    assert match_of('a" OR b*') == '"a" "OR" "b"*'
    assert match_of("!?*") is None


def test_ranks_are_counted_from_some_of_the_values_also_where_many_are_equal(folder, monkeypatch):
    monkeypatch.setattr(index, "_RANKED", 7)
    values = uw.Run.open(folder).rows.self_influence.round(4)
    assert len(np.unique(values)) < len(values)
    known = index.ranks(values)
    assert known == [(value, int((values > value).sum())) for value in np.sort(values)[::-1][6::7].tolist()]
    file = folder / "items-000000.safetensors"
    arrays, card = read_tensors(file)
    write_tensors(file, {**arrays, "self_influence": values}, card)
    explorer = Explorer.open(folder)
    for row in range(0, 500, 3):
        assert rank(explorer, explorer.item("rows", row)) == 1 + (values > values[row]).sum()


def test_the_last_events_are_those_of_all(folder):
    run = uw.Run.open(folder)
    assert run.last_events(3) == run.events[-3:]
    assert run.last_events(10**6) == run.events
    (folder / "events.jsonl").write_text("\n".join(json.dumps({"event": "é" * 900, "name": k}) for k in range(50)))
    assert run.last_events(5) == run.events[-5:]
    (folder / "events.jsonl").unlink()
    assert run.last_events(5) == []


def test_the_spread_of_a_column_is_that_of_the_rows_numbers_however_far_from_zero():
    draw, seen = np.random.default_rng(0), Seen()
    rows = 1e9 + draw.normal(size=300)
    cards = [
        {"date": value, "huge": 10**400, "text": "a", "mixed": place or "none"} for place, value in enumerate(rows)
    ]
    seen.add([{"date": -7.0, "alone": 2.5}] * 9, rows=False)  # of queries
    seen.add(cards)
    found = {column.name: column for column in seen.columns()}
    assert found["date"].mean == pytest.approx(rows.mean(), rel=1e-12)
    assert found["date"].spread == pytest.approx(rows.std(), rel=1e-6)
    for name in ("huge", "text", "mixed", "alone"):
        assert (found[name].mean, found[name].spread) == (None, None), name
    assert [found["huge"].code(card) for card in cards[:2]] == [-1, -1]


@pytest.mark.parametrize("far", [1e200, -1e308, 10**200])
def test_numbers_whose_squares_are_too_large_leave_a_column_without_spread(far):
    seen = Seen()
    seen.add([{"a": 1.0, "b": 1.0}, {"a": far, "b": 3.0}])
    a, b = seen.columns()
    assert (a.mean, a.spread, b.mean, b.spread) == (None, None, 2.0, 1.0)


def test_a_number_of_hundreds_of_digits_is_shown_as_it_is(tmp_path):
    uw.write_run(influence(), tmp_path / "run", *queries(), card=lambda row: {"a": 10**400 + row, "b": row})
    client = browser(tmp_path / "run")
    assert client.get("/rows/3.json").json()["row"]["card"]["lines"][0]["value"] == 10**400 + 3
    for path in ("/rows", "/rows/3", "/queries/0", "/slices"):
        assert client.get(path).status_code == 200, path
