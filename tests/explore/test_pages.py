"""Every page is there, and says in JSON what it shows."""

from __future__ import annotations

from upweight.explore import pages


def test_every_tab_opens_and_has_a_twin(client):
    for page in pages.PAGES:
        if page.tab:
            found = client.get(page.path)
            assert found.status_code == 200
            assert found.headers["content-type"].startswith("text/html")
            twin = client.get("/index.json" if page.path == "/" else f"{page.path}.json")
            assert isinstance(twin.json(), dict)
