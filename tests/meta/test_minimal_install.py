"""Without the extras the core works, and what needs one says which."""

from __future__ import annotations

import subprocess
import sys
import textwrap

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
