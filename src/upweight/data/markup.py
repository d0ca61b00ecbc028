"""Escaped pieces of HTML: plain text in, markup out; `frame` makes pieces one answer of a notebook.

The one place where what users name becomes markup, for notebooks and for pages.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

CUT = 300  # letters of one text in a notebook
_HALVES = re.compile("[\ud800-\udfff]")  # of letters, alone: no file of a notebook can hold them

_STYLE = """<style>
.uw{--uw-help:#1f5f8b;--uw-harm:#a63a12;--uw-line:rgba(128,128,128,.38);max-width:64rem;line-height:1.45;overflow-x:auto;
 color:var(--jp-content-font-color1,var(--vscode-editor-foreground,inherit))}
.uw table{border-collapse:collapse;margin:.3em 0;font-variant-numeric:tabular-nums;font-size:.92em}
.uw caption{caption-side:top;text-align:left;font-weight:600;padding:.2em 0;color:inherit}
.uw th,.uw td{text-align:left;vertical-align:top;padding:.2em .7em;border-bottom:1px solid var(--uw-line);
 white-space:normal;background:none}
.uw td.uw-number{text-align:right;white-space:nowrap}
.uw p{margin:.3em 0}.uw p.uw-note{font-size:.85em;opacity:.85}
.uw pre{white-space:pre-wrap;background:none;color:inherit;margin:.3em 0}
.uw .uw-cells{display:flex;flex-wrap:wrap;gap:.3em .9em}
.uw .uw-cell{max-width:16em;overflow-wrap:anywhere}
.uw .uw-help{color:var(--uw-help)}.uw .uw-harm{color:var(--uw-harm)}
.uw img{image-rendering:pixelated;height:3em;border:1px solid var(--uw-line);border-radius:3px;display:block}
.uw .uw-text,.uw .uw-tokens{white-space:pre-wrap}.uw .uw-tokens{line-height:1.9}
.uw .uw-quiet{opacity:.6}.uw .uw-tokens [title]{border-radius:3px;text-decoration:underline 1px}
.uw .uw-tokens [title^="-"]{text-decoration-style:dotted}
@media (prefers-color-scheme:dark){.uw{--uw-help:#7fc0ea;--uw-harm:#f2a07a}}
[data-jp-theme-light=true] .uw,body.vscode-light .uw{--uw-help:#1f5f8b;--uw-harm:#a63a12}
[data-jp-theme-light=false] .uw,body.vscode-dark .uw,html[theme=dark] .uw{--uw-help:#7fc0ea;--uw-harm:#f2a07a}
</style>"""


def text(value: object, most: int = CUT) -> str:
    """Whatever users name, as text that is no markup, cut where it is long.

    >>> text("<b>"), text("abcdef", 4)
    ('&lt;b&gt;', 'abc…')
    """
    told = str(value)
    return html.escape(_HALVES.sub("\ufffd", told if len(told) <= most else told[: most - 1] + "…"))


def frame(*parts: str) -> str:
    """Pieces as one answer of a notebook, light and dark.

    >>> frame("<p>one</p>", "<p>two</p>").endswith('<div class="uw"><p>one</p><p>two</p></div>')
    True
    """
    return f'{_STYLE}<div class="uw">{"".join(parts)}</div>'


def facts(caption: str, pairs: Iterable[tuple[str, object]], *, note: str = "") -> str:
    """Names and what they are, a line each; without a name it goes on with the one above.

    >>> facts("A run", [("rows", 150)]).endswith('<tr><th scope="row">rows</th><td>150</td></tr></table></div>')
    True
    """
    lines = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value, 2000)}</td></tr>'
        if name
        else f"<tr><td></td><td>{text(value, 2000)}</td></tr>"
        for name, value in pairs
    )
    return frame(f"<table><caption>{text(caption)}</caption>{lines}</table>", remark(note))


def table(caption: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of markup; the first cell of a line is its header.

    Args:
        caption: plain text.
        head: plain texts.
        lines: cells that are markup already.

    >>> table("", ["row"], [[text("7 < 8")]]).removeprefix('<table><thead><tr><th scope="col">row</th></tr></thead>')
    '<tbody><tr><th scope="row">7 &lt; 8</th></tr></tbody></table>'
    """
    top = "".join(f'<th scope="col">{text(name)}</th>' if name else "<td></td>" for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in lines
    )
    above = f"<caption>{text(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def remark(words: str) -> str:
    """A small line below, or nothing.

    >>> remark("p < 0.05"), remark("")
    ('<p class="uw-note">p &lt; 0.05</p>', '')
    """
    return f'<p class="uw-note">{text(words, 2000)}</p>' if words else ""


def signed(value: float) -> str:
    """A number with its sign, blue where it helps and red where it harms: the sign says it without the colour.

    >>> signed(0.25), signed(0.0)
    ('<b class="uw-help">+0.25</b>', '+0')
    """
    kind = "uw-help" if value > 0 else "uw-harm"
    return f'<b class="{kind}">{text(f"{value:+.3g}")}</b>' if value == value and value else text(f"{value:+.3g}")


def shaded(markup: str, value: float, largest: float) -> str:
    """Markup on a background that is the stronger, the larger the value: blue above 0, red below, both see-through.

    >>> shaded("word", -0.5, 1.0)
    '<span title="-0.5" style="background:rgba(220,38,38,0.300)">word</span>'
    """
    colour = "37,99,235" if value > 0 else "220,38,38"
    strength = 0.6 * abs(value) / largest
    return f'<span title="{value:+.3g}" style="background:rgba({colour},{strength:.3f})">{markup}</span>'
