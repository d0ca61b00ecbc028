"""The site as a browser shows it: `scripts/docs look` shoots pages, wide and narrow, light and dark, into build/look.

What it shoots of `KEPT` stays in docs/site/seen, as small pictures, so that a change of the site is seen as one.
"""

from __future__ import annotations

import http.server
import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = (
    "docs/index",
    "docs/start/scikit-learn",
    "docs/read-a-score",
    "docs/trust",
    "docs/how-to-choose",
    "docs/costs",
    "docs/coming-from",
    "docs/peers",
    "docs/math",
    "docs/gallery",
    "docs/errors",
    "docs/api",
    "docs/cli",
    "docs/recipes/language-models",
    "docs/tutorials/which-sentences",
    "docs/tutorials/why-this-prediction",
    "docs/reference/classes/upweight.Influence",
    "docs/reference/classes/upweight.solvers.CG",
    "docs/reference/functions/upweight.losses.logistic",
    "paper/README",
    "genindex",
)
KEPT = ("docs/index", "docs/trust", "docs/tutorials/which-sentences", "docs/reference/classes/upweight.solvers.CG")
SEEN = (("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390))
SERIOUS = {"serious", "critical"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def browsed(site: Path) -> Iterator[tuple[Any, str]]:
    """chromium, and the address of the site on this machine."""
    from playwright.sync_api import sync_playwright

    handler = partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as started:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser, f"http://127.0.0.1:{server.server_port}"
        browser.close()
        server.shutdown()


def faults(page: Any) -> list[tuple[str, str]]:
    """What axe-core calls serious or critical on a page, with the first place."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in SERIOUS]


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def main() -> None:
    """Shoot the pages that are named, or all of `PAGES`; say what axe and the width find."""
    from PIL import Image

    out, kept = ROOT / "build" / "look", ROOT / "docs" / "site" / "seen"
    out.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)
    with browsed(ROOT / "build" / "site") as (browser, address):
        for scheme, width in SEEN:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            for name in sys.argv[1:] or PAGES:
                page.goto(f"{address}/{name}.html")
                shot = page.screenshot()
                file = f"{name.replace('/', '-')}-{width}-{scheme}"
                (out / f"{file}.png").write_bytes(shot)
                if name in KEPT and (scheme, width) in SEEN[::3]:
                    Image.open(io.BytesIO(shot)).save(kept / f"{file}.webp", quality=40, method=6)
                for fault in faults(page):
                    print(f"{name} {width} {scheme}: {fault}")
                if (wide := overflow(page)) > 0:
                    print(f"{name} {width} {scheme}: {wide} pixels too wide")


if __name__ == "__main__":
    main()
