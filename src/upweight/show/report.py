"""Self-contained HTML pages: text, tables, and pictures inside the file; nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.errors import require
from upweight.evaluation.leave_one_out import Outcomes
from upweight.influence.scores import Scores
from upweight.runs.files import write_file
from upweight.show import plots

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 5.6rem; font-size: .78rem; line-height: 1.3; }
figure img { width: 5.6rem; height: 5.6rem; image-rendering: pixelated; border: 1px solid #8884; border-radius: 4px; }
figcaption b { font-variant-numeric: tabular-nums; display: block; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
pre { background: #8881; padding: 1rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }
.plot { max-width: 100%; background: white; }
"""


class Page:
    """A page that grows from top to bottom."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def add(self, markup: str) -> None:
        """Markup that is already HTML."""
        self.parts.append(markup)

    def heading(self, text: str) -> None:
        """A section title."""
        self.add(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.add(f"<p>{html.escape(text)}</p>")

    def preformatted(self, text: str) -> None:
        """Text in columns."""
        self.add(f"<pre>{html.escape(text)}</pre>")

    def render(self) -> str:
        """The whole page."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
        )
        return (
            "<!doctype html><html "
            f'lang="en"><head>{head}</head><body><h1>{html.escape(self.title)}</h1>{"".join(self.parts)}</body></html>\n'
        )

    def write(self, path: Path) -> Path:
        """Write the page atomically; returns its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.render().encode())
        return path


def line_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of text cells."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{top}</tr>{body}</table>"


def picture(pixels: Float[NDArray[np.float64], "h w"]) -> str:
    """A grey image, 0 black on white 1 inverted as ink on paper, as a data address."""
    image = require("PIL.Image", "demo").fromarray(np.uint8(255 * (1 - np.clip(pixels, 0, 1))))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _data_address(buffer.getvalue())


def picture_row(cells: Sequence[tuple[str, str, str]]) -> str:
    """Pictures side by side; each has an address, a caption and a number below it."""
    figures = "".join(
        f'<figure><img src="{address}" '
        f'alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}<b>{html.escape(number)}</b></figcaption></figure>'
        for address, caption, number in cells
    )
    return f'<div class="pictures">{figures}</div>'


def scatter(series: Sequence[tuple[Scores, str]], outcomes: Outcomes) -> str:
    """Predicted against actual, one panel per series."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=(4.4 * len(series), 4.4), layout="constrained")
    for ax, (scores, name) in zip(np.atleast_1d(figure.subplots(1, len(series))), series, strict=True):
        plots.agreement(scores, outcomes, ax).set_title(name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return (
        f'<img class="plot" src="{_data_address(buffer.getvalue())}" alt="actual against predicted change of the loss">'
    )


def _data_address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
