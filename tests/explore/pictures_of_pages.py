"""The pictures of pages in docs/explorer, at 1,280 and 390 pixels: pictures_of_pages.py FOLDER [NAME …].

Runs are made in FOLDER, or gone on with: those of `upweight demo --explore --data …`, and one of digits with wrong
labels that a script reviews and `upweight prove` proves. Their data come from $UPWEIGHT_DATA, or are downloaded.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from window import chromium, now, served, until, window

import upweight as uw
from upweight.cli import commands, demo
from upweight.cli.studies import STUDIES

PLACE = Path(__file__).parents[2] / "docs" / "explorer"
WIDE, NARROW = (1280, 860), (390, 844)
ROWS = 900
QUALITIES, LARGEST = (60, 50, 40, 30, 20), 40_000  # bytes of a picture
_PRIVATE = re.compile(r"\b(my|phone|personal|home|sex\w*|pill\w*|drug\w*|girl\w*|adult|\d{3} ?[-.) ]+ ?\d{3,4})\b")
CUT = {"words": 420, "columns": 620}  # pixels of a wide picture that is mostly text
PAGES = {  # name of the picture: run, page, sizes
    "queries": ("digits", "queries?truth=wrong&sort=loss&down=1", (NARROW,)),
    "why": ("digits", "queries/{wrong}", (WIDE, NARROW)),
    "pictures": ("mnist", "queries/{wrong}", (WIDE, NARROW)),
    "words": ("enron1", "queries/{calm}", (WIDE, NARROW)),
    "columns": ("hospital", "queries/{wrong}", (WIDE, NARROW)),
    "row": ("digits", "rows/{row}", (WIDE, NARROW)),
    "overview": ("digits", "", (WIDE, NARROW)),
    "review": ("judged", "review?budget=100", (WIDE, NARROW)),
    "proof": ("judged", "proof", (WIDE, NARROW)),
    "slices": ("hospital", "slices?rows=0&queries=3", (WIDE, NARROW)),
    "trust": ("digits", "trust", (WIDE, NARROW)),
}


@dataclass(frozen=True)
class Named:
    """What addresses of a run name: its worst query, one whose words are harmless, and a row that leads."""

    wrong: int
    calm: int
    row: int

    @classmethod
    def of(cls, run: uw.Run) -> Named:
        """Read off the run."""
        queries = run.queries
        losses = np.where(queries.labels != queries.predictions, queries.losses, -np.inf)
        wrong = int(losses.argmax())
        shown = np.concatenate([run.scores.helpful(3).rows, run.scores.harmful(3).rows], 1)
        calm = [query for query in np.argsort(-losses).tolist() if _calm(run, query, shown[query].tolist())]
        return cls(wrong, (calm or [wrong])[0], int(run.scores.harmful(1).rows[wrong, 0]))


def _calm(run: uw.Run, query: int, rows: list[int]) -> bool:
    """Whether a query and the rows that lead it are about nobody."""
    texts = [str(run.queries.cards[query]), *(str(run.rows.cards[row]) for row in rows)]
    return not any(_PRIVATE.search(text.lower()) for text in texts)


def made(name: str, folder: Path) -> Path:
    """The run of a name."""
    if name != "judged":
        return demo.write_run(STUDIES[name](), folder / name)
    one = study()
    shown = {"card": one.card, "query_card": one.query_card}
    return uw.write_run(one.influence, folder / name, *one.queries, **shown).path


def study() -> uw.Study:
    """The digits of docs/recipes/review.md: a tenth of 900 labels is wrong."""
    X, truth = load_digits(return_X_y=True)
    X, y = X / 16, spoilt()
    pictures = np.uint8(255 - 255 * X.reshape(-1, 8, 8))
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=3000).fit(X[:ROWS], y[:ROWS])
    shown = {"card": lambda row: pictures[row], "query_card": lambda query: pictures[ROWS + query]}
    return uw.Study(uw.explain(model, X[:ROWS], y[:ROWS]), (X[ROWS:], truth[ROWS:]), **shown)


def spoilt() -> Any:
    """Its labels."""
    draw, y = np.random.default_rng(0), load_digits().target.copy()
    rows = draw.choice(ROWS, size=ROWS // 10, replace=False)
    y[rows] = (y[rows] + draw.integers(1, 10, size=ROWS // 10)) % 10
    return y


def judged(path: Path, page: Any, base: str) -> None:
    """A review of eighty rows, and its proof."""
    truth = load_digits().target
    page.goto(f"{base}/{PAGES['review'][1]}")
    while (at := page.evaluate("document.querySelector('#progress progress').value")) < 80:
        row, label = now(page)
        page.keyboard.press("k" if str(truth[row]) == label else str(truth[row]))
        until(page, f"document.querySelector('#progress progress').value > {at}")
    if not list(path.glob("proof-*.json")):
        commands.run(["prove", f"{__file__}:study", "--run", str(path)])


def pictures(names: list[str], browser: Any) -> Iterator[tuple[Path, bytes]]:
    """Every picture, and where it belongs."""
    wanted = {name: page for name, page in PAGES.items() if name in names or not names}
    for name in dict.fromkeys(run for run, _, _ in wanted.values()):
        path = made(name, Path())
        named = vars(Named.of(uw.Run.open(path)))
        with served(path) as link:
            for size in (WIDE, NARROW):
                with window(browser, link, *size, color_scheme="light") as page:
                    base = page.url.split("?")[0].rstrip("/")
                    if name == "judged" and size == WIDE:
                        judged(path, page, base)
                    for file, (run, address, sizes) in wanted.items():
                        if run == name and size in sizes:
                            page.goto(f"{base}/{address.format(**named)}")
                            page.wait_for_load_state("load")
                            narrow = "-390" if size == NARROW and len(sizes) > 1 else ""
                            height = size[1] if narrow else CUT.get(file, size[1])
                            cut = {"x": 0, "y": 0, "width": size[0], "height": height}
                            yield PLACE / f"{file}{narrow}.webp", page.screenshot(clip=cut)
                    assert page.troubles == []


def packed(content: bytes, file: Path) -> int:
    """The size of a picture, written as well as its limit allows."""
    for quality in QUALITIES:
        Image.open(io.BytesIO(content)).convert("RGB").save(file, quality=quality, method=6)
        if file.stat().st_size <= LARGEST:
            break
    return file.stat().st_size


def main(folder: Path, names: list[str]) -> None:
    """Write them."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # pages show where a run lies
    with chromium() as browser:
        for file, content in pictures(names, browser):
            size = packed(content, file)
            print(f"{file.name} {size:,} bytes")
            assert size <= LARGEST, file


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
