"""Each exit code is provoked and is the documented one; an error of the study is told in a line, with its place."""

from __future__ import annotations

import operator
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from upweight.cli.endings import CODES
from upweight.errors import InvalidInput
from upweight.influence.face import Influence

ROOT = Path(__file__).parents[3]
ENTRY = "import signal; signal.signal(2, signal.default_int_handler); from upweight.cli import main; main()"
SOURCE = """
import os
import signal
import sys
import time

import numpy as np
import torch
import upweight as uw
from small import X, XQ, Y, YQ, Z, ZQ, classifier, ridge


def good():
    return uw.Study(ridge(), (XQ, ZQ))


def untrained():
    return uw.Study(classifier(), (XQ, YQ))


def own():
    return 1 / 0  # own


def of_a_library():
    matrix = np.zeros((2, 2))
    return np.linalg.inv(matrix)  # of_a_library


def of_a_helper():
    return own()


def refused():
    return uw.explain(object(), X, Y)  # refused


def mute():
    assert not X.size  # mute


def lines():
    raise KeyError("two\\nlines, the second of which is " + 2000 * "long ")  # lines


def leaves():
    sys.exit(0)  # leaves


def package():
    import no_such_package  # package


def neighbour():
    import broken_neighbour


def syntax():
    import wrong_syntax


def interrupted():
    raise KeyboardInterrupt


def described():
    return uw.Study(ridge(), (XQ, ZQ), describe=lambda row: {}[row])  # described


def trained():
    def retrain(weights, seed):
        raise SystemExit("no more")  # trained

    return uw.Study(ridge(), (XQ, ZQ), retrain=retrain)


def terminated():
    def loss(params, example):
        if ready and not os.path.exists("run/chunk-000000.safetensors"):
            ready.clear()
            signal.raise_signal(signal.SIGTERM)
        return (example[0] @ params - example[1]) ** 2

    ready = []
    identity = uw.operators.Identity()
    influence = uw.Influence(uw.Objective(loss, torch.zeros(3).double()), (X, Z), curvature=identity, damping=0.1)
    ready.append(True)
    return uw.Study(influence, (XQ, ZQ))


def lossy():
    def loss(params, example):
        if ready:
            act()
        return (example[0] @ params - example[1]) ** 2

    def act():
        raise TypeError("not this time")  # lossy

    ready = []
    influence = uw.Influence(uw.Objective(loss, torch.zeros(3).double()), (X, Z), progress=True)
    ready.append(True)
    return uw.Study(influence, (XQ, ZQ))
"""
WAITING = SOURCE.replace(
    'raise TypeError("not this time")  # lossy', 'print("ready", file=sys.stderr, flush=True); time.sleep(120)'
)


def line_of(mark, source=SOURCE):
    """The number of the line that ends with a mark."""
    return next(number for number, line in enumerate(source.splitlines(), 1) if line.endswith(f"# {mark}"))


def process(folder, *arguments, **options):
    """The command line as a process."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "", "NO_COLOR": "1", "COLUMNS": "100"}
    settings = {"cwd": folder, "env": environment}
    return subprocess.Popen([sys.executable, "-c", ENTRY, *arguments], **settings, **options)


def with_a_closed_pipe(folder, *arguments, **options):
    """Exit code and stderr of a command whose reader is gone before it starts."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process(folder, *arguments, stdout=writer, **{"stderr": subprocess.PIPE} | options)
    os.close(writer)
    _, err = done.communicate(timeout=120)
    return done.returncode, err


PROVOKED = {
    0: ["check", "cli_studies.py:good"],
    1: ["check", "cli_studies.py:good"],
    2: ["check"],
    3: ["check", "cli_studies.py:nothing"],
    4: ["check", "cli_studies.py:untrained"],
    5: ["check", "cli_studies.py:own"],
    130: ["check", "cli_studies.py:interrupted"],
    141: ["--help"],
    143: ["score", "cli_studies.py:terminated", "--out", "scores", "--store", "run"],
}


def documented():
    """Exit codes and their meanings, as docs/cli.md has them."""
    page = (ROOT / "docs/cli.md").read_text()
    return {int(code): text for code, text in re.findall(r"^ +(\d+)  (.+)$", page.split("╭")[0], re.M)}


def test_what_the_docs_list_is_what_the_code_lists_and_what_is_provoked():
    assert documented() == CODES
    assert documented().keys() == PROVOKED.keys()


@pytest.mark.parametrize("code", PROVOKED)
def test_an_exit_code_is_provoked(upweight, tmp_path, monkeypatch, code):
    if code == 141:
        assert with_a_closed_pipe(tmp_path, *PROVOKED[code])[0] == code
        return
    if code == 1:
        monkeypatch.setattr(Influence, "check", operator.truediv)  # fails in our code, by no code of the user
    assert upweight(*PROVOKED[code])[0] == code


def test_a_bug_asks_to_be_reported(upweight, monkeypatch):
    monkeypatch.setattr(Influence, "check", operator.truediv)
    code, out, err = upweight("check", "cli_studies.py:good")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert re.match(r"TypeError: truediv expected .* \(A bug of upweight: .* --debug, and report", err)
    code, _, err = upweight("check", "cli_studies.py:good", "--debug")
    assert code == 1
    assert "Traceback (most recent call last)" in err


FAILS = {
    "own": "ZeroDivisionError: division by zero",
    "of_a_library": "LinAlgError: Singular matrix",
    "refused": "UnsupportedModel: ",
    "mute": "AssertionError: no message",
    "lines": "KeyError: 'two",
    "leaves": "SystemExit: 0",
    "package": "ModuleNotFoundError: No module named 'no_such_package'",
}


@pytest.mark.parametrize("name", FAILS)
@pytest.mark.parametrize("module", ["cli_studies", "./cli_studies.py"])
def test_an_error_of_the_study_is_a_line_and_its_place(upweight, name, module):
    code, out, err = upweight("check", f"{module}:{name}")
    told, place = err.splitlines()
    assert (code, out) == (5, "")
    assert told.startswith(FAILS[name])
    assert len(told) <= 1000
    assert place.startswith(f'  File "cli_studies.py", line {line_of(name)}, in {name}  (')


def test_the_place_is_the_innermost_of_the_users_own(upweight):
    _, _, err = upweight("check", "cli_studies:of_a_helper")
    assert f'File "cli_studies.py", line {line_of("own")}, in own' in err


@pytest.mark.parametrize(
    ("name", "file", "text", "told", "place"),
    [
        ("neighbour", "broken_neighbour.py", "\nraise OSError(1, 'so')", "PermissionError: ", "line 2, in <module>"),
        ("syntax", "wrong_syntax.py", "\n\nif:\n", "SyntaxError: invalid syntax", "line 3"),
    ],
)
def test_an_error_in_a_neighbour_has_its_place_there(upweight, name, file, text, told, place):
    Path(file).write_text(text)
    code, _, err = upweight("check", f"cli_studies.py:{name}")
    assert code == 5
    assert err.startswith(told)
    assert err.splitlines()[1].startswith(f'  File "{file}", {place}  (')


@pytest.mark.parametrize(
    ("text", "told", "place"),
    [
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'", "1, in <module>  ("),
        ("\ndef f(:\n", "SyntaxError: invalid syntax", "2  ("),
        ("import sys\nsys.exit('no data')\n", "SystemExit: no data", "2, in <module>  ("),
        ("x = [\n", "SyntaxError: '[' was never closed", "1  ("),
    ],
)
@pytest.mark.parametrize("module", ["failing_import", "failing_import.py"])
def test_a_study_that_cannot_be_imported(upweight, text, told, place, module):
    Path("failing_import.py").write_text(text)
    code, _, err = upweight("check", f"{module}:f")
    sys.modules.pop("failing_import", None)
    assert code == 5
    assert err.splitlines()[0] == told
    assert err.splitlines()[1].startswith(f'  File "failing_import.py", line {place}')


@pytest.mark.parametrize("body", ["return 1 / 0", "raise SystemExit(0)"])
def test_a_study_that_is_installed_has_its_name_for_a_place(upweight, monkeypatch, tmp_path, body):
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "installed_study.py").write_text(f"def f():\n    {body}\n")
    monkeypatch.syspath_prepend(installed)
    code, _, err = upweight("check", "installed_study:f")
    del sys.modules["installed_study"]
    assert (code, err.splitlines()[1][:24]) == (5, "  in installed_study:f  ")


@pytest.mark.parametrize(
    ("arguments", "mark", "told"),
    [
        (["top", "cli_studies.py:described"], "described", r"KeyError: \d+$"),
        (["validate", "cli_studies.py:trained"], "trained", "SystemExit: no more$"),
        (["check", "cli_studies.py:lossy"], "lossy", r"InvalidInput: .*\(TypeError: not this time\)"),
    ],
)
def test_code_of_the_study_that_fails_later_has_its_place_too(upweight, arguments, mark, told):
    code, out, err = upweight(*arguments)
    lines = seen(err)
    assert (code, out, len(lines)) == (5, "", 2)
    assert re.match(told, lines[0])
    assert f'File "cli_studies.py", line {line_of(mark)}, in ' in lines[1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_anywhere_on_the_line_shows_the_traceback(upweight, place):
    words = ["check", "cli_studies.py:of_a_library"]
    code, _, err = upweight(*words[:place], "--debug", *words[place:])
    assert code == 5
    assert err.startswith("Traceback (most recent call last)")
    assert "in inv" in err  # NumPy's own lines are shown
    assert err.splitlines()[-2] == upweight(*words)[2].splitlines()[0]


def test_debug_shows_where_a_refusal_comes_from(upweight):
    code, _, err = upweight("check", "cli_studies.py:nothing", "--debug")
    assert code == 3
    assert err.startswith("Traceback (most recent call last)")
    assert InvalidInput.__name__ in err.splitlines()[-1]


def test_a_command_that_is_ended_says_how_to_go_on(upweight):
    code, out, err = upweight(*PROVOKED[143])
    first, stopped, line = seen(err)
    assert (code, out) == (143, "")
    assert first == "SIGTERM: what is at hand is finished first; once more stops at once."
    assert stopped == "Stopped by SIGTERM after chunk 1 of 1. The same call goes on from there."
    words = shlex.split(line.removeprefix("Go on: "))
    assert words[0] == "upweight"
    code, out, _ = upweight(*words[1:])
    assert code == 0
    assert "Saved to" in out


def test_interrupted_is_a_line(upweight):
    assert upweight("check", "cli_studies.py:interrupted") == (130, "", "Interrupted by Ctrl-C.\n")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_machine_that_refuses_is_no_bug(upweight, monkeypatch, as_json):
    monkeypatch.setattr(Influence, "check", lambda self, queries: bytearray(sys.maxsize - 99))
    monkeypatch.setattr("upweight.cli.endings.where", lambda error: None)
    code, _, err = upweight("check", "cli_studies.py:good", *(["--json"] if as_json else []))
    assert (code, err) == (3, "MemoryError: \n")


def interrupted(folder, *arguments, **options):
    """Exit code and stderr after Ctrl-C, which is pressed when the command says that it is ready."""
    run = process(folder, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    said = b""
    with run:
        while b"ready\n" not in said:
            said += run.stderr.read1()
            assert run.poll() is None, said
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert not out
    return run.returncode, (said + err).decode()


def test_ctrl_c_closes_a_bar_of_the_study_first(tmp_path):
    body = "bar = tqdm(total=7)\n    print('ready', flush=True)\n    time.sleep(120)\n"
    (tmp_path / "slow.py").write_text(f"import time\nfrom tqdm import tqdm\n\n\ndef f():\n    {body}")
    code, err = interrupted(tmp_path, "check", "slow.py:f")
    assert code == 130
    assert "0/7" in err
    assert seen(err)[-1] == "Interrupted by Ctrl-C."


def test_ctrl_c_while_the_study_is_imported(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(120)\n")
    assert interrupted(tmp_path, "check", "slow.py:f") == (130, "ready\nInterrupted by Ctrl-C.\n")


def seen(text):
    """The lines that a terminal shows: after a carriage return the line is written over."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


def test_ctrl_c_in_the_middle_of_the_work_leaves_no_bar(tmp_path):
    (tmp_path / "cli_studies.py").write_text(WAITING)
    code, err = interrupted(tmp_path, "check", "cli_studies.py:lossy")
    assert "0.00/4.00" in err  # there was a bar
    assert code == 130
    assert seen(err)[-1] == "Interrupted by Ctrl-C."
    assert "0.00/4.00" not in "".join(seen(err.partition("ready")[2]))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["top", "cli_studies.py:good"], ["top", "cli_studies.py:many", "--json", "-k", "5000"]],
    ids=" ".join,
)
def test_a_closed_pipe_is_silent(tmp_path, arguments):
    many = "def many():\n    T = np.repeat(X, 100, 0)\n    return uw.Study(uw.explain(fit(T), T, T[:, 0]), (XQ, ZQ))\n"
    fit = "def fit(T):\n    from sklearn.linear_model import Ridge\n    return Ridge().fit(T, T[:, 0])\n"
    (tmp_path / "cli_studies.py").write_text(f"{SOURCE}\n\n{fit}\n\n{many}")
    assert with_a_closed_pipe(tmp_path, *arguments) == (141, b"")


def test_an_error_that_nobody_reads_is_silent(tmp_path):
    assert with_a_closed_pipe(tmp_path, "check", "nothing:f", stderr=subprocess.STDOUT) == (141, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_a_line(tmp_path):
    with open("/dev/full", "w") as full:
        run = process(tmp_path, "--help", stdout=full, stderr=subprocess.PIPE)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 3
    assert re.fullmatch(rb"OSError: .*No space left on device\n", err)
