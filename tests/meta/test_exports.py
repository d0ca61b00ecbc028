"""`__all__` is alphabetical, complete, and loaded when first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import upweight


def test_every_name_of_all_is_there_once():
    assert len(upweight.__all__) == len(set(upweight.__all__))
    for name in upweight.__all__:
        assert getattr(upweight, name) is not None
    assert set(upweight.__all__) <= set(dir(upweight))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        upweight.explian  # noqa: B018


def loaded_after(code: str) -> set[str]:
    report = f"import sys\n{code}\nprint(' '.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_upweight_stays_light():
    heavy = {"sklearn", "pandas", "matplotlib", "starlette", "PIL", "torch"}
    assert not heavy & loaded_after("import upweight")


def test_the_library_itself_needs_no_extra():
    names = ", ".join(
        f"upweight.{name}" for name in ("explain", "Influence", "Scores", "leave_one_out", "plots", "solvers")
    )
    assert not {"sklearn", "pandas", "matplotlib", "starlette", "PIL"} & loaded_after(f"import upweight\n{names}")


def test_help_does_not_import_torch():
    code = "from upweight.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass"
    assert not {"torch", "sklearn"} & loaded_after(code)
