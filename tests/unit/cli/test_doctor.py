"""`upweight doctor`: what is in it, what must not be in it, and how it ends where a machine does not compute alike."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest
import torch

from upweight.cli import doctor
from upweight.cli.endings import ASSUMPTIONS_FAIL
from upweight.runs import machine

SOURCE = ""


@pytest.fixture
def quick(monkeypatch):
    """Rates are measured by one call."""
    monkeypatch.setattr(doctor, "_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "_COPIED", 2**20)
    monkeypatch.setattr(doctor, "_SIDE", 64)
    monkeypatch.setattr(doctor, "_LINEAR", (200, 10))
    monkeypatch.setattr(doctor, "_WIDE", (100, 16))


def test_everything_is_there_and_nothing_private(quick, upweight, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    code, out, err = upweight("doctor", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert set(told) == {
        *("ok", "versions", "processor", "threads", "memory", "disk", "torch", "gpu", "alike", "rates"),
    }
    assert told["versions"]["torch"] == torch.__version__
    assert told["threads"]["OMP_NUM_THREADS"] == "1"
    assert 0 < told["memory"]["available"] <= told["memory"]["total"]
    assert told["disk"] | {"free": 0} == {"free": 0, "fsync": "works", "flock": "works"}
    assert all(rate > 0 for rate in told["rates"].values())
    assert torch.get_num_threads() == threads
    text = str(doctor.examine())
    assert text.splitlines()[-1] == "verdict              ok"
    assert max(map(len, text.splitlines())) <= 120
    for private in (str(Path.home()), str(Path.cwd()), f"/{getpass.getuser()}", socket.gethostname() + "."):
        assert private not in out + text


def test_gradients_are_alike_to_rounding_and_the_network_is_not_trivial(quick):
    checks = list(doctor._checks())
    assert {check.name.split(",")[0] for check in checks} == {"float32", "float64"}
    assert all(check.ok for check in checks)
    assert all(check.bitwise for check in checks if "asked again" in check.name)
    gradients = doctor._gradients(torch.float64)
    assert gradients.shape == (doctor._ROWS, 4 * 2 * 9 + 4 + 3 * 144 + 3)
    assert len(torch.unique(gradients, dim=0)) == doctor._ROWS


def test_a_machine_that_computes_otherwise_in_batches_is_told(quick, upweight, monkeypatch):
    right = doctor._gradients

    def wrong(dtype, batch_size=None, device="cpu"):
        found = right(dtype, batch_size, device)
        return found if batch_size != 7 else found + 1e-3 * found.abs().max()

    monkeypatch.setattr(doctor, "_gradients", wrong)
    code, out, _ = upweight("doctor")
    assert code == ASSUMPTIONS_FAIL
    assert "float32, batches of 1, 7, 32: differ by 1.0e-03, NOT rounding, which explains 1e-04" in out
    assert out.splitlines()[-1] == "verdict              NOT ok"


def test_a_difference_within_rounding_is_called_that():
    assert str(doctor.Check("float32, x", 5e-6, False, 1e-4)) == "float32, x: differ by 5.0e-06, rounding"
    assert not doctor.Check("x", float("nan"), False, 1e-4).ok


def test_a_disk_without_locks_is_not_safe(monkeypatch):
    def refuse(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(machine, "_lock", refuse)
    found = machine.disk()
    assert found["flock"] == "fails (Operation not supported)"
    assert machine.unsafe(found) == ["flock"]
    assert not doctor.Health({"disk": found}, (), {}).ok
    assert machine.unsafe({"writing": "fails (Permission denied)"}) == []


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    files = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "_LIMITS", (files,))
    assert machine.container_bytes() == (float("inf"), 0.0)
    for file, text in zip(files, ("3000000", "1000000"), strict=True):
        file.write_text(text + "\n")
    assert machine.container_bytes() == (3e6, 1e6)
    assert machine.available_bytes() == 2e6
    files[0].write_text("max\n")
    assert machine.container_bytes() == (float("inf"), 0.0)
