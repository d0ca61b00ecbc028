"""A factor's sums, its eigenvectors and their copies are not all in memory at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from upweight.model.chunks import added
from upweight.operators import basis

SCRIPT = """
import ctypes, gc, sys, torch
import upweight as uw
from upweight.operators import EKFAC, held

def told(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

torch.manual_seed(0)
dtype = getattr(torch, sys.argv[1])
wide = [one for _ in range(4) for one in (torch.nn.Linear(700, 4), torch.nn.Linear(4, 700), torch.nn.Tanh())]
model = torch.nn.Sequential(*wide, torch.nn.Linear(700, 3)).to(dtype)
X, y = torch.randn(48, 700, dtype=dtype), torch.randint(0, 3, (48,))
objective = uw.Objective.from_module(model, torch.nn.functional.cross_entropy, dtype=dtype)
influence = uw.Influence(objective, (X, y), curvature=EKFAC(samples=1), damping=1e-3, batch_size=12, progress=False)
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = told("VmRSS")
operator = influence.operator
entries = sum(Q.numel() for basis in operator.bases for Q in (basis.left, basis.right) if Q is not None)
print((told("VmHWM") - before) / entries, held.needed(operator.layers, operator.sweep, 1) / entries)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("precision", "most"), [("float32", 20), ("float64", 22)])
def test_bytes_of_an_entry_at_the_peak(precision, most, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, precision], check=True, capture_output=True, text=True
    ).stdout.split()
    taken, promised = map(float, told)
    assert taken < most  # 21 and 33 when sums, batches and eigenvectors each had a place of their own
    assert taken < 1.05 * promised


def test_eigenvectors_take_the_place_of_their_factor():
    half = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = half @ half.mT
    kept = factor.clone()
    values, Q = basis.eigen(factor.triu())
    place = factor.clone()
    values, Q = basis.eigen(place)
    assert Q.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()
    assert Q.mT.is_contiguous()  # as LAPACK leaves them: products with them are the same bits on every rank
    torch.testing.assert_close((Q * values[:, None]) @ Q.mT, kept)


def test_parts_of_any_precision_and_order_are_added():
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 5, generator=draw), torch.randn(5, 3, generator=draw, dtype=torch.float64).T]
    torch.testing.assert_close(added(iter(parts)), parts[0].double() + parts[1])
    torch.testing.assert_close(added(iter(parts[::-1])), parts[0].double() + parts[1])
