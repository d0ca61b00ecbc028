"""In a real browser: the demo's run is opened, a wrong query found, and its helpful rows read; with nothing else asked.

Debian's chromium is driven by Playwright; without it these tests are skipped, and `.ci/run` installs it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from upweight.explore import server
from upweight.explore.comparing import together
from upweight.explore.guard import Keys

CHROMIUM = os.environ.get("UPWEIGHT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no chromium here: apt-get install chromium, or UPWEIGHT_CHROMIUM=…"
)
WIDTHS = {"wide": (1280, 900), "narrow": (390, 844)}


@contextmanager
def served(path, other=None):
    """The address of a server of a run, and its token."""
    listening = server.bound("127.0.0.1", 0, beyond=False)
    keys = Keys(listening.getsockname()[1])
    hosts = server.names_of(listening)
    config = uvicorn.Config(
        server.application(together(path, other), hosts, keys), lifespan="off", ws="none", log_level="warning"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://{hosts[0]}", keys.token
    finally:
        running.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="module")
def address(made):
    with served(made) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install 'upweight[dev]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, chromium, address):
    """A page that has opened the link; what its console says and asks of other hosts fails the test."""
    width, height = WIDTHS[request.param]
    context = chromium.new_context(viewport={"width": width, "height": height})
    page, trouble = context.new_page(), []
    page.set_default_timeout(30_000)  # on a busy machine
    page.on("console", lambda message: trouble.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(address[0]) else trouble.append(asked.url))
    page.goto(f"{address[0]}/?token={address[1]}")
    yield page
    context.close()
    assert trouble == []


def test_from_the_link_to_the_rows_behind_a_wrong_query(page, address):
    assert "token" not in page.url
    page.get_by_role("link", name="queries that the model gets wrong").click()
    page.wait_for_url("**truth=wrong*")
    first = page.locator("tbody tr").first
    assert "wrong" in first.inner_text()
    first.get_by_role("link").click()
    page.get_by_role("heading", name="Why?").wait_for()
    helpful = page.get_by_role("region", name="Most helpful").get_by_role("listitem")
    assert helpful.count() == 8
    values = [float(text) for text in helpful.locator(".value").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0
    page.wait_for_load_state("load")
    assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0)"))
    page.get_by_role("region", name="Most harmful").get_by_role("link").first.click()
    page.get_by_role("heading", name="Training row").wait_for()


def test_keys_step_search_and_open(page, address):
    page.goto(f"{address[0]}/queries")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") == "1"
    page.keyboard.press("Enter")
    page.wait_for_url("**/queries/1")
    page.keyboard.press("n")
    page.wait_for_url("**/queries/2")
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys").wait_for()
    page.keyboard.press("Escape")
    page.goto(f"{address[0]}/rows")
    page.keyboard.press("/")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.wait_for_url("**/rows?*search=7*")
    assert "of 500 rows" in page.get_by_role("status").inner_text()


def test_filters_answer_at_once(page, address):
    page.goto(f"{address[0]}/queries")
    page.get_by_label("Model is").select_option("wrong")
    page.wait_for_url("**truth=wrong*")
    assert "page" not in page.url


def test_pages_fit_the_width_and_work_without_a_mouse(page, address):
    for path in ("/", "/queries", "/queries/3", "/rows/3", "/slices", "/trust", "/compare"):
        page.goto(address[0] + path)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, address, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.emulate_media(color_scheme=scheme)
    for path in ("/", "/queries?sort=loss", "/queries/3", "/rows", "/rows/3", "/slices", "/trust", "/compare"):
        page.goto(address[0] + path)
        found = axe.run(page).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in {"serious", "critical"}]
        assert serious == [], path


def test_pages_read_without_javascript(chromium, address):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address[0]}/?token={address[1]}")
    page.goto(f"{address[0]}/queries")
    page.get_by_label("Model is").select_option("wrong")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**truth=wrong*")
    page.locator("tbody tr").first.get_by_role("link").click()
    page.get_by_role("heading", name="Most helpful").wait_for()
    context.close()


def test_a_page_of_another_site_can_neither_read_nor_write(chromium, address):
    """A page served from another origin on this machine: its requests carry no cookie, and are refused."""
    import http.server

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>evil</title>")

        def log_message(self, *_):
            pass

    evil = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{address[0]}/?token={address[1]}")
    assert page.title().startswith("Overview")
    page.goto(f"http://localhost:{evil.server_port}/")
    tried = """async (address) => {
      const asked = [];
      const write = {method: "POST", body: "{}", credentials: "include", mode: "no-cors"};
      for (const init of [{credentials: "include"}, write]) {
        try { const r = await fetch(address + "/index.json", init); asked.push([r.type, r.status, await r.text()]); }
        catch (error) { asked.push(["refused", 0, ""]); }
      }
      const frame = document.createElement("iframe");
      frame.src = address + "/";
      document.body.append(frame);
      await new Promise((done) => { frame.onload = done; setTimeout(done, 2000); });
      let inside = null;
      try { inside = frame.contentDocument?.title ?? null; } catch { inside = null; }
      return { asked, inside };
    }"""
    found = page.evaluate(tried, address[0])
    assert all(text == "" for _, _, text in found["asked"])
    assert not (found["inside"] or "").startswith("Overview")
    context.close()
    evil.shutdown()
    evil.server_close()
