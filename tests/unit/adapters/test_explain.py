"""The public function keeps its name whatever was imported before it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "first", ["upweight.adapters", "upweight.cli.demo", "upweight.cli.study", "upweight.evaluation.leave_one_out"]
)
def test_explain_is_the_function_whatever_was_imported_before(first):
    code = f"import {first}, upweight; assert callable(upweight.explain), upweight.explain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
