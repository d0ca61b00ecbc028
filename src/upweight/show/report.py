"""Self-contained HTML pages: text, tables, pictures and charts inside the file; nothing is loaded, nothing runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.data import markup
from upweight.influence.scores import Scores
from upweight.runs.files import write_file
from upweight.show import svg
from upweight.show.png import address

if TYPE_CHECKING:
    from upweight.evaluation.leave_one_out import Outcomes

_STYLE = (
    """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#56606e;--page:#fff;--raised:#f4f6f9;--rule:#cfd6df;
 --help:#1f5f8b;--harm:#a63a12}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#a9b2bf;--page:#14181e;--raised:#1d232b;--rule:#39414d;
 --help:#7fc0ea;--harm:#f2a07a}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
 background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.2rem;margin:2.4rem 0 .6rem}h3{font-size:1rem;margin:0 0 .4rem}
p{max-width:46rem}.soft{color:var(--soft);font-size:.9rem}
.health{border-left:.3rem solid var(--help);padding:.4rem .9rem;background:var(--raised)}
.health.care{border-left-style:double;border-left-color:var(--harm)}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums;font-size:.9rem}
caption{text-align:left;font-weight:600;padding:.2rem 0}
th{overflow-wrap:normal}
th,td{text-align:left;vertical-align:top;padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--rule)}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem}
.query{border:1px solid var(--rule);border-radius:.5rem;padding:1rem;margin:1rem 0}
.query>.card{width:fit-content;max-width:100%;margin-bottom:1rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.7rem;margin:.4rem 0;padding:0;
 list-style:none}
.cards.wordy{grid-template-columns:1fr}
.card{background:var(--raised);border-radius:.4rem;padding:.6rem;font-size:.85rem;min-width:0}
.card p{margin:.2rem 0}
.card img{height:5.6rem}
img{image-rendering:pixelated;border:1px solid var(--rule);border-radius:.25rem;max-width:100%;background:#fff}
.text{white-space:pre-wrap;display:-webkit-box;-webkit-line-clamp:10;-webkit-box-orient:vertical;overflow:hidden}
.columns{font-size:.8rem;margin:.2rem 0}.columns th{font-weight:400;color:var(--soft)}
.help{color:var(--help)}.harm{color:var(--harm)}.value{font-weight:650;font-variant-numeric:tabular-nums}
pre{background:var(--raised);padding:1rem;overflow-x:auto;font-size:.8rem;white-space:pre-wrap}
.pictures{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0;width:5.6rem;font-size:.78rem;line-height:1.3}figure img{width:5.6rem;height:5.6rem}
figcaption b{font-variant-numeric:tabular-nums;display:block}
@media print{body{max-width:none;margin:0;font-size:11px}.query,.card,.charts>*{break-inside:avoid}h2{break-after:avoid}
 .card{border:1px solid var(--rule)}:root{--ink:#000;--soft:#333;--page:#fff;--raised:#fff;--rule:#999;--help:#1f5f8b;
 --harm:#a63a12}}
"""
    + svg.STYLE
)


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
        self.add(f"<h2>{markup.text(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph."""
        self.add(f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{markup.text(text, _LONG)}</p>")

    def preformatted(self, text: str) -> None:
        """Text in columns."""
        self.add(f"<pre>{markup.text(text, _LONG)}</pre>")

    @property
    def size(self) -> int:
        """Bytes of what is there."""
        return sum(len(part.encode()) for part in self.parts)

    def render(self) -> str:
        """The whole page, which forbids itself scripts, other styles, and to load anything."""
        digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        title = markup.text(self.title)
        head = (
            f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style>"
        )
        body = f"<main><h1>{title}</h1>{''.join(self.parts)}</main>"
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'

    def write(self, path: Path) -> Path:
        """Write the page atomically; returns its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.render().encode("utf-8", "replace"))
        return path


def line_table(head: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of text cells."""
    cells = [[markup.text(cell) for cell in line] for line in lines]
    return f'<div class="wide">{markup.table(caption, head, cells)}</div>'


def picture(pixels: Float[NDArray[np.float64], "h w"]) -> str:
    """A grey image, 0 black on white 1 inverted as ink on paper, as a data address."""
    return address(np.uint8(255 * (1 - np.clip(pixels, 0, 1))))  # type: ignore[arg-type]


def picture_row(cells: Sequence[tuple[str, str, str]]) -> str:
    """Pictures side by side; each has an address, a caption and a number below it."""
    figures = "".join(
        f'<figure><img src="{address}" '
        f'alt="{markup.text(caption)}"><figcaption>{markup.text(caption)}<b>{markup.text(number)}</b></figcaption></figure>'
        for address, caption, number in cells
    )
    return f'<div class="pictures">{figures}</div>'


def scatter(series: Sequence[tuple[Scores, str]], outcomes: Outcomes) -> str:
    """Predicted against actual, one chart per series."""
    drawn = []
    for scores, name in series:
        places = {int(row): place for place, row in enumerate(scores.rows)}
        predicted = scores.values[:, [places[int(row)] for row in outcomes.rows]]
        x = f"predicted change of {scores.measure}"
        drawn.append(
            (name, svg.scatter(predicted, outcomes.actual, title=name, diagonal=True, x_name=x, y_name="actual change"))
        )
    return charts(drawn)


def charts(drawn: Sequence[tuple[str, str]]) -> str:
    """Charts side by side, each under its name."""
    parts = [f"<div><h3>{markup.text(name)}</h3>{chart}</div>" for name, chart in drawn]
    return f'<div class="charts">{"".join(parts)}</div>'


_LONG = 100_000  # letters of a paragraph
