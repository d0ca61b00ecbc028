"""job.toml: what was told comes back, whatever it was; what is no job is an error."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, strategies as st

from upweight.errors import Damaged
from upweight.runs import job
from upweight.runs.store import JOB, Store

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SETTING = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
FULL = job.Job("attack", "st.py:f", "ab" * 32, "..", {"level": 1 / 255, "flip": 2}, {"out": "a b.csv"}, {"python": "3"})


@given(st.builds(job.Job, TEXT, TEXT, TEXT, TEXT, st.dictionaries(st.sampled_from(["top", "by"]), SETTING)))
def test_what_was_told_comes_back(tmp_path_factory, told):
    folder = tmp_path_factory.mktemp("job")
    job.write(folder, told)
    assert job.read(folder) == told
    kinds = {name: type(value) for name, value in told.settings.items()}
    assert {name: type(value) for name, value in job.read(folder).settings.items()} == kinds


def test_the_folder_is_where_the_command_was_typed(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert job.from_here(tmp_path / "runs" / "one") == "../../work"


def test_a_name_that_is_no_text_does_not_hinder_the_work(tmp_path):
    job.write(tmp_path, job.Job("score", "st\udc80.py:f", "", "."))
    assert job.read(tmp_path).study == "st?.py:f"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("format = 1", "format 2, not 1"),
        ('command = "attack"', "is no text"),
        ('sha256 = "', "is no text"),
        ("[settings]", "is no table"),
        ("[versions]", "is no table"),
        ("flip = 2", "neither a text nor a number"),
        ('python = "3"', "no text"),
    ],
)
def test_what_has_another_shape_is_refused(tmp_path, line, says):
    job.write(tmp_path, FULL)
    text = (tmp_path / JOB).read_text()
    (found,) = [one for one in text.splitlines() if one.startswith(line)]
    other = {"format = 1": "format = 2"}.get(
        line, found.replace("[", "[other.") if "[" in line else f"{found.split()[0]} = [1]"
    )
    (tmp_path / JOB).write_text(text.replace(found, other))
    with pytest.raises(Damaged, match=says):
        job.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"format = ", b"a = " + b"[" * 60_000, b"#" * 70_000, b"format = 1\nformat = 1", b"\0" * 10],
    ids=["empty", "bytes", "cut", "nested", "large", "twice", "zeros"],
)
def test_hostile_bytes_are_refused(tmp_path, content):
    (tmp_path / JOB).write_bytes(content)
    with pytest.raises(Damaged):
        job.read(tmp_path)


def test_a_flipped_bit_is_a_job_or_an_error(tmp_path):
    job.write(tmp_path, FULL)
    whole = (tmp_path / JOB).read_bytes()
    for place in range(len(whole)):
        (tmp_path / JOB).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            job.read(tmp_path)
        except Damaged:
            continue
        tomllib.loads((tmp_path / JOB).read_text())


def test_a_store_takes_a_folder_that_holds_a_job_only(tmp_path):
    job.write(tmp_path, FULL)
    assert job.is_fresh(tmp_path)
    Store(tmp_path, {"n": 1})
    assert not job.is_fresh(tmp_path)
    assert job.is_fresh(tmp_path / "new")
    assert not job.is_fresh(tmp_path / JOB)
