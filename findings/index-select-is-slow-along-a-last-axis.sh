#!/usr/bin/env bash
# torch.index_select along the last of three axes takes many times as long as torch.gather of the same numbers.
#
# Library: torch 2.13.0, on the CPU, one thread.
# Surprise: of a (5, 1, 45,994) tensor of float64, 29,500 columns taken by index_select cost as much as if every number
#   were looked for by itself; gather with the same indices, and x[..., indices], copy them far sooner. Contiguous
#   memory makes no difference.
# Expected: the function that is made for one list of indices is not the slowest of the three.
# Where upweight meets it: columns that are left of a sparse system are taken out of every residual
#   (operators/eliminated.py), which is done by gather.
#
# Seen: index_select over gather 18 to 25, over x[..., indices] 4 to 6.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(5, 1, 45_994, dtype=torch.float64)
columns = torch.randperm(x.shape[2])[:29_500].sort().values
ways = {
    "index_select": lambda: x.index_select(2, columns),
    "gather": lambda: torch.gather(x, 2, columns.expand(5, 1, -1)),
    "x[..., indices]": lambda: x[..., columns],
}
found = [way() for way in ways.values()]
assert all(torch.equal(found[0], other) for other in found[1:])
best = {}
for name, way in ways.items():
    times = []
    for _ in range(50):
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    best[name] = min(times)
ratio = best["index_select"] / best["gather"]
print({name: f"{1e6 * took:.0f} µs" for name, took in best.items()}, f"index_select over gather: {ratio:.0f}")
raise SystemExit(0 if ratio > 5 else "no longer as stated")
PYTHON
