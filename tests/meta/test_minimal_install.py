"""Without the extras the core works, and what needs one says which."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BLOCK = """
import sys

for name in ("sklearn", "pandas", "matplotlib", "PIL", "starlette", "jinja2"):
    sys.modules[name] = None  # import raises ModuleNotFoundError, as if it were not installed

import torch
import upweight as uw

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
y = X[:, 0] * 2
module = torch.nn.Linear(3, 1)
influence = uw.explain(module, X, y[:, None], loss=torch.nn.functional.mse_loss, penalty=0.1)
scores = influence.on_loss(X[:2], y[:2, None])
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_modules_are_explained_without_any_extra():
    done = run("assert scores.values.shape == (2, 20); print('<table' in scores._repr_html_())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_a_missing_extra_is_named():
    asked = {
        "scores.to_pandas()": "pandas",
        "uw.plots.new_axes()": "plot",
        "import upweight.cli.demo as d; d.run()": "demo",
    }
    each = """
        from upweight.errors import MissingExtra

        for code in {}:
            try:
                exec(code)
            except MissingExtra as error:
                print(error)
    """
    done = run(each.format(list(asked)))
    assert done.returncode == 0, done.stderr
    for said, extra in zip(done.stdout.splitlines(), asked.values(), strict=True):
        assert f"pip install 'upweight[{extra}]'" in said


# ---- what an extra brings --------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def brought(lines: list[str]) -> set[str]:
    """The packages that are installed for these requirements, and for theirs, by their canonical names."""
    waiting, found = [Requirement(line) for line in lines], set()
    while waiting:
        wanted = waiting.pop()
        extras = wanted.extras or {""}
        if (canonicalize_name(wanted.name), frozenset(extras)) in found:
            continue
        found.add((canonicalize_name(wanted.name), frozenset(extras)))
        needs = [Requirement(line) for line in metadata.requires(wanted.name) or []]
        here = [one for one in needs if one.marker is None or any(one.marker.evaluate({"extra": x}) for x in extras)]
        waiting += here
    return {name for name, _ in found}


def megabytes(package: str) -> float:
    """What its files take on the disk."""
    files = [Path(metadata.distribution(package).locate_file(file)) for file in metadata.files(package) or []]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def test_the_explorer_brings_at_most_40_megabytes():
    """`upweight[explore]` beside the core, as this environment holds both."""
    core = brought(PROJECT["dependencies"])
    more = brought(PROJECT["optional-dependencies"]["explore"]) - core
    assert {"starlette", "uvicorn"} <= more
    assert "torch" in core
    sizes = {package: megabytes(package) for package in sorted(more)}
    assert min(sizes.values()) > 0, sizes
    assert sum(sizes.values()) <= 40, sizes
