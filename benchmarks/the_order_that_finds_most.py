"""The order that planted flips choose finds as many wrong labels as the best, and a CSV of 20,000 rows takes a minute.

    UPWEIGHT_DATA=… python benchmarks/the_order_that_finds_most.py

The first 20,000 rows of Adult as the CSV file that somebody has, 5 % of the labels flipped: any row's, or only rows of
the larger class, or only of the smaller. 5 % of the rows are inspected. The command is timed as a process of its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import report

import upweight as uw
from upweight.cli import labelled, table

N, SHARE, SEEDS = 20_000, 0.05, (1, 2, 3)
KINDS = {"any row": None, "larger class": "<=50K", "smaller class": ">50K"}
FILE = Path(os.environ["UPWEIGHT_DATA"]) / "tabular" / "adult.data.gz"


def spoilt(adult: pd.DataFrame, of: str | None, seed: int) -> pd.DataFrame:
    """The table with flipped labels."""
    draw = np.random.default_rng(seed)
    pool = np.arange(N) if of is None else np.flatnonzero(adult["income"] == of)
    rows = draw.choice(pool, round(SHARE * N), replace=False)
    wrong = adult.copy()
    wrong.loc[rows, "income"] = adult.loc[rows, "income"].map({"<=50K": ">50K", ">50K": "<=50K"})
    return wrong


def inspected(file: Path, truth: np.ndarray) -> dict[str, object]:
    """What every order finds, which is chosen, and how that was estimated."""
    rows = labelled.of_table(table.read(file, "income"))
    found = uw.apps.repair(rows.influence, inspect=SHARE, scores=rows.scores)
    told, planted = found.found(truth), found.planted
    assert planted is not None
    estimated = {name: planted.share(name) for name in planted.hits}
    best = max(count for name, count in told.by.items() if name != "random")
    line = {"chosen": found.chosen, "wrong": told.wrong, "found": dict(told.by), "planted_flips_found": estimated}
    return line | {"behind_the_best": (best - told.by[found.chosen]) / told.wrong}


def timed(file: Path) -> dict[str, float]:
    """Seconds of `upweight repair FILE --label income`, by the clock and of processors."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    script = "import sys; from upweight.cli import main; main(sys.argv[1:])"
    arguments = ["repair", str(file), "--label", "income", "--inspect", "5%", "--out", str(file.parent / "review.csv")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main() -> None:
    """All kinds of flips and seeds, then the clock."""
    adult = pd.read_csv(FILE, skipinitialspace=True).iloc[:N].rename(columns={"Y": "income"})
    truth, numbers = adult["income"].to_numpy(dtype=str), {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adult.csv"
        for kind, of in KINDS.items():
            for seed in SEEDS:
                spoilt(adult, of, seed).to_csv(file, index=False)
                numbers[f"{kind}, seed {seed}"] = line = inspected(file, truth)
                print(kind, seed, line["chosen"], line["found"], flush=True)
        spoilt(adult, None, 1).to_csv(file, index=False)
        clock = timed(file)
    worst = max(line["behind_the_best"] for line in numbers.values())
    settings = {"rows": N, "flipped": SHARE, "inspected": SHARE, "threads": os.environ.get("OMP_NUM_THREADS")}
    report(__file__, settings, {"furthest_behind_the_best": worst, "command_seconds": clock, "runs": numbers})


if __name__ == "__main__":
    main()
