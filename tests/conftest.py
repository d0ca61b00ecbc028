"""One thread per test process, and run-time checks of every annotated shape (jaxtyping + beartype)."""

from __future__ import annotations

import os
import sys

if os.environ.get("PYTEST_XDIST_WORKER"):  # workers share the cores: BLAS and OpenMP look here when they are loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)

install_import_hook(
    [
        "upweight.influence.face",
        "upweight.model.linear",
        "upweight.model.calculus",
        "upweight.operators",
        "upweight.solvers",
        "upweight.influence.removal",
    ],
    "beartype.beartype",
)

settings.register_profile(
    "default", max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _leave_randomness_alone():
    """No test, and no call into the library, may move torch's global random state without saying so."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


@pytest.fixture
def upweight(request, tmp_path, monkeypatch, capsys):
    """The command line in a folder that holds the test file's SOURCE as cli_studies.py: exit code, stdout, stderr."""
    from upweight.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code, *capsys.readouterr()

    (tmp_path / "cli_studies.py").write_text(request.module.SOURCE)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    yield run
    sys.modules.pop("cli_studies", None)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="gpu: torch finds no CUDA device on this machine"))
    if not config.getoption("-m"):
        skip = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
