"""A real browser over a real server: Debian's chromium, driven by Playwright, and every request that it makes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upweight.explore.explorer import Explorer
from upweight.explore.server import bound, serve

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The link to a run, while a thread serves it."""
    listening, links, ready = bound("127.0.0.1", 0, beyond=False), [], threading.Event()

    def told(link: str) -> None:
        links.append(link)
        ready.set()

    threading.Thread(target=serve, args=(Explorer.open(path), listening, told), daemon=True).start()
    assert ready.wait(30)
    yield links[0]


@contextmanager
def chromium():
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def window(browser, link: str, width: int = 1280, height: int = 900, **more):
    """A window that has opened the link; it must make no request beyond loopback and no error in its console."""
    context = browser.new_context(viewport={"width": width, "height": height}, **more)
    page, troubles = context.new_page(), []
    page.on("console", lambda told: troubles.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("http://127.0.0.1:", "blob:", "data:")) else troubles.append(asked.url)
        ),
    )
    page.set_default_timeout(10_000)
    page.goto(link)
    page.troubles = troubles
    yield page
    context.close()


def until(page, script: str, seconds: float = 10.0):
    """Waits for something to be true; Playwright's own waiting evaluates texts in the page, and is forbidden to."""
    end = time.monotonic() + seconds
    while not page.evaluate(script):
        assert time.monotonic() < end, script
        page.wait_for_timeout(20)


def now(page):
    """The row on the page of the review, and its label."""
    page.wait_for_selector(".judge:not([hidden])")
    return page.evaluate(
        "(({ row, label }) => [Number(row), label])(document.querySelector('.judge:not([hidden])').dataset)"
    )


def saved(page, text="Saved."):
    """Waits until the page has said that a verdict is kept."""
    until(page, f"document.querySelector('#told').textContent.includes({json.dumps(text)})")


def judged(action: str) -> str:
    """The key of an action."""
    return {"keep": "k", "relabel": "r", "drop": "d", "skip": "s", "undo": "u"}[action]


def axe(page):
    """Serious findings of axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        (one["id"], [node["html"] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in {"serious", "critical"}
    ]
