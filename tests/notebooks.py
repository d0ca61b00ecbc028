"""What every answer of a notebook must be: escaped, short, without scripts, told in tables whose elements close."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = "</td><script>alert('x')</script>\"&<img src=x onerror=alert(1)>"
VOID = {"br", "img", "meta"}


class Balanced(HTMLParser):
    """Every element that opens is closed in order; which there are is kept."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), set()
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(result):
    """Whether a result shows itself as a notebook may: `_repr_html_`."""
    page = result._repr_html_()
    found = Balanced(page)
    assert not found.seen & {"script", "iframe", "link", "object"}, type(result)
    assert "img" not in found.seen
    assert not {name for name in found.attributes if name.startswith("on")}, type(result)
    assert {"table", "caption", "th", "style"} <= found.seen, type(result)
    assert "scope" in found.attributes
    assert len(page) < 14_000, (type(result), len(page))
    assert "http" not in page
    return page
