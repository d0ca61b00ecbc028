"""Where results are to go is checked before the study is touched, and what is said to be writable is."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from upweight.cli.outputs import check_file, check_folder, check_picture, checked_part
from upweight.errors import InvalidInput

SOURCE = """
from pathlib import Path

from small import XQ, ZQ, ridge
from upweight import Study

Path("touched").touch()


def good():
    return Study(ridge(), (XQ, ZQ))
"""
READ_ONLY = "/proc/nowhere"  # also for root
no_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write into")


@pytest.fixture
def refused(upweight):
    """What stderr says of a command, which never touched the study."""

    def told(*arguments):
        (Path("folder") / "index.html").mkdir(parents=True, exist_ok=True)
        Path("file").touch()
        code, out, err = upweight(*arguments)
        assert (code, out, len(err.splitlines())) == (3, "", 1)
        assert not Path("touched").exists()
        return err

    return told


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--out", "folder"], "--out folder is a folder, and a file is wanted. Name one, such as folder/results."),
        (["--out", ""], r"--out \. is a folder"),
        (["--out", "file/s"], "--out needs the folder file, and file is a file"),
        (["--out", "file/new/s"], "--out needs the folder file/new, and .*/file is a file"),
        pytest.param(["--out", f"{READ_ONLY}/s"], "--out needs to write into /proc, and cannot", marks=no_proc),
        (["--out", "s", "--store", "file"], "--store needs the folder file, and file is a file"),
    ],
)
def test_scores_that_could_not_be_saved_are_not_computed(refused, options, text):
    assert re.search(text, refused("score", "cli_studies.py:good", *options))


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("file", "--out needs the folder file, and file is a file"),
        ("folder", "--out folder/index.html is a folder, and a file is wanted"),
        pytest.param(READ_ONLY, "--out needs to write into /proc", marks=no_proc),
    ],
)
def test_a_demo_that_could_not_be_written_is_not_run(refused, monkeypatch, out, text):
    monkeypatch.setattr("upweight.cli.demo.run", lambda rows: Path("touched").touch())
    assert re.search(text, refused("demo", "--out", out))


@pytest.mark.parametrize("command", ["understand", "mismatch"])
@pytest.mark.parametrize(
    ("plot", "text"),
    [
        ("folder", "--plot folder is a folder"),
        ("file/a.png", "--plot needs the folder file"),
        ("new/a.jpgg", "--plot new/a.jpgg does not end in a format of pictures, .*pdf.*svg.* Name new/a.png,"),
        ("a", "Name a.png,"),
        ("a.", "does not end in a format"),
    ],
)
def test_a_picture_that_could_not_be_drawn_is_not_computed(refused, command, plot, text):
    assert re.search(text, refused(command, "cli_studies.py:good", "--plot", plot))


@pytest.mark.parametrize(
    ("command", "option", "path"), [("score", "--out", "folder"), ("understand", "--plot", "new.d/picture.jpgg")]
)
def test_the_name_that_is_proposed_works(refused, upweight, command, option, path):
    err = refused(command, "cli_studies.py:good", option, path)
    proposed = re.search(r"Name (?:one, such as )?(\S+)(?:\.|, for example\.)$", err).group(1)
    assert upweight(command, "cli_studies.py:good", option, proposed)[0] == 0
    assert Path(proposed).stat().st_size > 1000


def test_a_missing_file_of_groups_is_said_before_the_study_is_touched(refused):
    assert "There is no file at nowhere" in refused("mismatch", "cli_studies.py:good", "--groups", "nowhere")


@pytest.mark.parametrize("path", ["s", "new/folder/s", "./s", "../s", "{}/new/s"])
def test_checking_a_good_place_changes_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    file = Path(path.format(tmp_path))
    check_file(file, "--out")
    check_folder(file, "--out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_may_be_written_again(tmp_path):
    (tmp_path / "s").write_text("before")
    check_file(tmp_path / "s", "--out")
    assert (tmp_path / "s").read_text() == "before"


@pytest.mark.parametrize("suffix", [*FigureCanvasBase.get_supported_filetypes(), "PNG", "bmp", "txt", "csv", "x"])
def test_a_suffix_is_refused_when_matplotlib_refuses_it(tmp_path, suffix):
    try:
        Figure().savefig(io.BytesIO(), format=suffix.lower())
        drawn = True
    except ValueError:
        drawn = False
    try:
        check_picture(tmp_path / f"a.{suffix}", "--plot")
        passed = True
    except InvalidInput:
        passed = False
    assert drawn == passed


@pytest.mark.parametrize("shard", ["2/2", "first", "1", "-1/2", "0/0", "1/2/3"])
def test_a_part_is_one_of_so_many(shard):
    with pytest.raises(InvalidInput, match=f"--shard {shard} is no part"):
        checked_part(None, Path("D"), shard)
    assert checked_part(None, Path("D"), "1/2") == (1, 2)
    with pytest.raises(InvalidInput, match="without --out or --top"):
        checked_part(None, Path("D"), "1/2", 3)
