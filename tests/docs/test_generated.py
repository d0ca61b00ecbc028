"""What stands in README and docs is what the commands say now."""

from __future__ import annotations

import re
from importlib.metadata import version

import generated
import messages
import pytest

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


WRITERS = {
    "docs/cli.md": generated.cli_page,
    "docs/api.md": generated.api_page,
    "docs/errors.md": messages.page,
}


@pytest.mark.parametrize(("page", "write"), WRITERS.items())
def test_a_generated_page_is_up_to_date(page, write):
    pinned = (generated.ROOT / "constraints.txt").read_text().split()
    if page == "docs/cli.md" and f"tyro=={version('tyro')}" not in pinned:
        pytest.skip("tyro lays the help texts out, and docs/cli.md shows that of constraints.txt")
    assert (generated.ROOT / page).read_text() == write(), "run scripts/docs"


def test_every_command_has_its_help():
    named = re.search(r"\{([a-z,]+)\}", generated.run("--help"))
    assert named
    assert set(named[1].split(",")) == set(generated.COMMANDS)


def test_the_readme_shows_what_the_demo_prints(tmp_path, monkeypatch):
    """The same words; the same numbers up to what another processor's rounding may change."""
    monkeypatch.chdir(tmp_path)
    readme = (generated.ROOT / "README.md").read_text()
    shown = readme[readme.index(generated.BEGIN) : readme.index(generated.END) + len(generated.END)]
    now = generated.demo_block()
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", now), "run scripts/docs"
    for old, new in zip(NUMBER.findall(shown), NUMBER.findall(now), strict=True):
        if abs(float(old)) > 1e-5:  # residuals and gradients at rounding size may differ
            assert float(new) == pytest.approx(float(old), rel=1e-2)


def test_the_demo_keeps_its_promises(tmp_path, monkeypatch):
    """r and slope that the README shows are those of a real retraining, not of a lucky format."""
    from upweight.cli import demo

    monkeypatch.chdir(tmp_path)
    found = demo.run(10)
    assert found.first_order.pearson > 0.999
    assert abs(found.newton.slope - 1) < abs(found.first_order.slope - 1)
    assert found.seconds < 60
