#!/usr/bin/env bash
# A task on a Dask worker that seeds Python's random, works and draws, finds other numbers than it has seeded.
#
# Library: distributed 2026.8.0, dask 2026.8.0.
# Surprise: the event loop of a worker estimates the size of every message that it sends, heartbeats as well, by
#   dask.sizeof, which calls random.sample for lists of more than ten items: on the global state that a task has seeded
#   in another thread of the same process. One thread a worker does not help; no warning says it.
# Expected: random.seed(0), some work and random.random() give the same number in every task.
# Where upweight meets it: a training's chance is its own, and outcomes are equal bit for bit under every backend of
#   joblib; on Dask that does not hold for what is drawn from Python's random. docs/recipes/many-trainings.md says so,
#   and what to draw from instead; tests/contracts/training/test_on_workers.py sets the variable below.
#
# Seen: of 400 tasks of 50 ms, 296 drew other numbers; with DASK_DISTRIBUTED__COMM__OFFLOAD=False none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "dask==2026.8.0" "distributed==2026.8.0"
cat > "$folder/draws.py" <<'PYTHON'
import random
import time

import distributed


def draw(number):
    random.seed(0)
    time.sleep(0.05)  # the work
    return random.random()


def others():
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            found = client.gather(client.map(draw, range(400), pure=False))
    random.seed(0)
    wanted = random.random()
    return sum(one != wanted for one in found)


if __name__ == "__main__":
    print(others())
PYTHON
cd "$folder"
default=$("$folder/venv/bin/python" draws.py 2>/dev/null)
without=$(DASK_DISTRIBUTED__COMM__OFFLOAD=False "$folder/venv/bin/python" draws.py 2>/dev/null)
echo "of 400 tasks that seed and draw, other numbers in $default; without estimates of sizes in $without"
[ "$default" -gt 0 ] && [ "$without" -eq 0 ] || { echo "no longer as stated"; exit 1; }
