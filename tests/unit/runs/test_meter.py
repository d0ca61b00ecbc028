"""The meter of calls: memory at most while one runs, whatever is freed in the end, and time of the processor."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from upweight.runs import meter
from upweight.runs.meter import Meter

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory")
SIZE = 40_000_000


def fresh(code):
    """What a process prints that has freed nothing yet: memory that other tests have left counts for none."""
    start = "import numpy as np, torch\nfrom upweight.runs.meter import Meter\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


@linux
@pytest.mark.parametrize("ones", [f"np.ones({SIZE // 8})", f"torch.ones({SIZE // 8}, dtype=torch.float64)"])
def test_memory_is_the_most_at_once(ones):
    value, peak = fresh(f"""
def twice():
    kept, other = {ones}, {ones}
    return float((kept + other).sum())  # three arrays at once

value, taken = Meter().lap(twice)
print(value, taken.peak)
""")
    assert value == 2 * SIZE / 8
    assert peak == pytest.approx(3 * SIZE, rel=0.1)


@linux
def test_what_is_kept_counts_in_later_laps_and_not_after_a_new_start():
    later, anew = fresh(f"""
measure = Meter()
kept, _ = measure.lap(lambda: np.ones({SIZE // 8}))
print(measure.lap(lambda: None)[1].peak)
measure.start()
print(measure.lap(lambda: None)[1].peak)
assert kept.sum() == {SIZE // 8}
""")
    assert later == pytest.approx(SIZE, rel=0.1)
    assert anew < SIZE / 10


def test_sleeping_takes_no_processor():
    _, taken = Meter().lap(lambda: time.sleep(0.05))
    assert taken.seconds >= 0.05 > taken.processor_seconds


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(meter, "_RESET", Path("/nowhere/clear_refs"))
    monkeypatch.setattr(meter, "_STATUS", Path("/nowhere/status"))
    value, taken = Meter().lap(lambda: 3)
    assert value == 3
    assert np.isnan(taken.peak)
