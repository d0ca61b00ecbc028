"""Claim: over a million training rows and 64 queries the explorer answers before one notices.

A logistic regression on 1,000,000 synthetic rows of 6 named columns; the run is written by `write_run`, and its pages
are opened in a real browser (chromium, by Playwright). A page's time is that from the request to its last byte, as the
browser measures it, and beside it the time of a processor that the server used for it, which other programs hardly
change; top-k with histogram is the whole page of a query. Memory is the resident set of the server's own
process, at its largest.

    python benchmarks/explorer.py        # about five minutes on 2 cores; 1.5 GB of disk
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import report, seconds
from sklearn.linear_model import LogisticRegression

import upweight as uw

N, Q, REPEATS = int(os.environ.get("UPWEIGHT_ROWS", "1000000")), 64, 15
NAMES = ("age", "visits", "dose", "pressure", "glucose", "weight")
SITES = ("north", "south", "east", "west")
CHROMIUM = shutil.which("chromium") or "chromium"


def written(folder: Path) -> dict[str, float]:
    """A run of a million rows, whose labels are wrong here and there; how long its parts took."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(N, len(NAMES)))
    y = (X @ draw.normal(size=len(NAMES)) + draw.logistic(size=N) > 0).astype(int)
    labels = np.array(["home", "ward", "clinic"])[y + (X[:, 0] > 1.5)]
    sites = draw.integers(0, len(SITES), N)
    fitting, model = seconds(lambda: LogisticRegression(tol=1e-8, max_iter=500).fit(X, labels))
    Xq, yq = X[:Q] + 0.1, labels[:Q]

    def card(row: int) -> dict[str, Any]:
        told = dict(zip(NAMES, np.round(X[row], 3).tolist(), strict=True))
        return {"site": SITES[sites[row]], **told, "note": f"case {row} of {SITES[sites[row]]}"}

    influence = uw.explain(model, X, labels)
    making, _ = seconds(lambda: uw.write_run(influence, folder, Xq, yq, card=card, query_card=card))
    return {"fit_seconds": fitting, "write_run_seconds": making}


class Server:
    """`upweight explore` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        start = time.perf_counter()
        code = "from upweight.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "explore", str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = ""
        while "http://" not in line:
            line = self.process.stdout.readline()
        self.seconds = time.perf_counter() - start
        self.link = line.strip()
        self.address = self.link.partition("/?")[0]

    def memory(self) -> float:
        """The largest resident set so far, in MB."""
        told = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", told)[1]) / 1e3  # type: ignore[index]

    def processor(self) -> float:
        """Milliseconds of a processor that it has used: what waiting for other programs does not change."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


PAGES = {
    "page_of_overview": ["/"],
    "page_of_queries": [f"/queries?page={page}" for page in range(3)],
    "page_of_rows": [f"/rows?page={page}" for page in (0, 7, 20_000, 39_999)],
    "page_of_rows_sorted": [f"/rows?sort=self-influence&down=1&page={page}" for page in range(5)],
    "page_of_a_row": [f"/rows/{row}" for row in (3, 77_777, 222_222, 500_000, 999_999)],
    "page_of_review": ["/review", "/review?at=40", "/review?by=loss&budget=1000", "/review?by=margin&at=90"],
    "page_of_slices": ["/slices", "/slices?rows=1&queries=0"],
    "filter": [
        "/rows?truth=wrong",
        "/rows?label=1&sort=loss&down=1",
        "/rows?truth=wrong&label=2&sort=self-influence&down=1",
        "/rows?group=2",
        "/rows?group=1&truth=wrong&sort=loss",
        "/rows?uncertain=1",
        "/rows?search=case+77777",
        "/rows?search=west&sort=loss&down=1",
        "/rows?search=no",
    ],
    "top_k_with_histogram": [f"/queries/{query}" for query in range(0, Q, 4)],
    "top_k_of_one_label": [f"/queries/{query}?label=1" for query in range(0, Q, 8)],
}
TOOK = "(([t]) => t.responseEnd - t.requestStart)(performance.getEntriesByType('navigation'))"
WHEN = """new Promise((done) => {
  const look = () => (window.pressed === null ? requestAnimationFrame(look) : done(window.pressed));
  look();
})"""
PRESSED = """window.pressed = null;
addEventListener("keydown", () => {
  const start = performance.now();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.pressed = performance.now() - start; }));
}, { once: true });"""


def times(page: Any, address: str, paths: list[str]) -> list[float]:
    """Milliseconds from the request of each page to its last byte, several times."""
    found = []
    for path in paths * max(1, REPEATS // len(paths)):
        page.goto(address + path)
        found.append(page.evaluate(TOOK))
    return found


def keys(page: Any, address: str) -> list[float]:
    """Milliseconds from a key to the next painted frame, in which another item is marked."""
    page.goto(f"{address}/rows?sort=loss&down=1")
    found = []
    for _ in range(20):
        page.evaluate(PRESSED)
        page.keyboard.press("j")
        found.append(page.evaluate(WHEN))
    return found


def measured(server: Server) -> dict[str, Any]:
    """Median and 95th percentile of every kind of page, in milliseconds."""
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(server.link)
        for name, paths in PAGES.items():
            some = [path for path in paths if N == 1_000_000 or "page" not in path]
            before = server.processor()
            taken = times(page, server.address, some)
            found[name] = summary(taken)
            found[name]["processor_ms_each"] = round((server.processor() - before) / len(taken), 1)
        found["key_to_next_item"] = summary(keys(page, server.address))
        browser.close()
    return found


def summary(milliseconds: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(float(np.median(milliseconds)), 1),
        "p95_ms": round(float(np.quantile(milliseconds, 0.95)), 1),
        "largest_ms": round(max(milliseconds), 1),
    }


def main() -> None:
    folder = Path(os.environ.get("UPWEIGHT_RUN") or tempfile.mkdtemp()) / "run"
    numbers: dict[str, Any] = {} if (folder / "scores.safetensors").exists() else written(folder)
    first = Server(folder)  # makes the index
    first.stop()
    server = Server(folder)
    try:
        index = sum(file.stat().st_size for file in (folder / "explorer").iterdir()) / 1e9
        numbers |= {"first_start_seconds": first.seconds, "start_seconds": server.seconds, "index_gigabytes": index}
        numbers |= measured(server)
        numbers["memory_of_the_server_megabytes"] = server.memory()
    finally:
        server.stop()
    load = {"load_average": [round(one, 1) for one in os.getloadavg()], "niceness": os.nice(0)}
    settings = {"rows": N, "queries": Q, "repeats": REPEATS, **load}
    report(__file__, settings, numbers)
    if "UPWEIGHT_RUN" not in os.environ:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
