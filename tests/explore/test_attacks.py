"""What others might try against the explorer, each tried: not answered, not read, and shown as nothing but text."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import upweight as uw
from explored import HOST, browser, digits, post
from upweight.errors import Damaged, InvalidInput
from upweight.explore import guard, pages, pictures
from upweight.explore.explorer import Explorer
from upweight.explore.guard import Keys
from upweight.explore.page import Action
from upweight.explore.server import application, bound, names_of


@pytest.fixture
def keys():
    return Keys(8123)


@pytest.fixture
def stranger(made, keys):
    """A client without a cookie."""
    return TestClient(application(Explorer.open(made), [HOST], keys), base_url=f"http://{HOST}", follow_redirects=False)


# ---- who asks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:9999", f"{HOST}.evil.example", "[::1]:8123", ""]
)
def test_another_host_is_refused_before_anything_else(stranger, keys, host):
    """DNS rebinding: the name is the attacker's, the address ours. Also with the token."""
    for path in ("/", f"/?token={keys.token}", "/static/explorer.css"):
        answer = stranger.get(path, headers={"host": host})
        assert answer.status_code == 421
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "path", ["/", "/index.json", "/queries", "/rows/1", "/rows/1/picture.png", "/static/explorer.js"]
)
def test_nothing_is_answered_without_a_token(stranger, path):
    assert stranger.get(path).status_code == 403
    assert stranger.get(path, headers={"cookie": "upweight-8123=guess"}).status_code == 403


def test_a_wrong_token_opens_nothing(stranger, keys):
    for token in ("", "guess", keys.token[:-1], keys.cookie, "é"):
        answer = stranger.get("/", params={"token": token})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    assert stranger.get(f"/?token={keys.token}&token=x").status_code == 403


def test_the_token_is_exchanged_for_a_cookie_and_leaves_the_address(stranger, keys):
    answer = stranger.get(f"/queries?token={keys.token}&truth=wrong")
    assert (answer.status_code, answer.headers["location"]) == (303, "/queries?truth=wrong")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("upweight-8123=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert keys.token not in cookie
    assert stranger.get("/queries").status_code == 200


def test_the_exchange_never_leads_to_another_host(stranger, keys):
    for path in ("//evil.example/", "/%2F/evil.example", "/\\evil.example"):
        place = stranger.get(f"{path}?token={keys.token}").headers["location"]
        assert place.startswith("/")
        assert not place.startswith(("//", "/\\"))


def test_secrets_are_new_each_time_and_in_no_repr():
    one, other = Keys(1), Keys(1)
    assert len({one.token, one.cookie, other.token, other.cookie}) == 4
    assert len(one.token) >= 43
    assert one.token not in repr(one)
    assert one.cookie not in repr(one)


# ---- who writes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def writable(made, monkeypatch):
    """A client of an application with one action, which answers with what it was told."""
    monkeypatch.setattr(pages, "ACTIONS", (*pages.ACTIONS, Action("/echo", lambda _explorer, _asked, told: told)))
    return browser(made)


def test_our_own_pages_may_write(writable):
    assert post(writable, "/echo", {"a": 1}).json() == {"a": 1}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8124"}, 403),
        ({"origin": f"https://{HOST}"}, 403),
        ({"origin": f"http://{HOST}", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": f"http://{HOST}", "sec-fetch-site": "same-site"}, 403),
        ({"origin": f"http://{HOST}", "content-type": "text/plain"}, 415),
        ({"origin": f"http://{HOST}", "content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_a_post_of_another_site_is_refused(writable, headers, status):
    told = {"content-type": "application/json", **headers}
    assert writable.post("/echo", content=b"{}", headers=told).status_code == status


def test_only_get_head_and_post_are_known(writable):
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        answer = writable.request(method, "/echo", headers={"origin": f"http://{HOST}"})
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b"{", b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"])
def test_a_body_that_is_no_object_is_refused(writable, body):
    told = {"origin": f"http://{HOST}", "content-type": "application/json"}
    assert writable.post("/echo", content=body, headers=told).status_code == 400


def test_large_bodies_are_not_read_also_without_a_length(writable):
    told = {"origin": f"http://{HOST}", "content-type": "application/json"}
    whole = json.dumps({"a": "x" * guard.LARGEST_BODY}).encode()
    assert writable.post("/echo", content=whole, headers=told).status_code == 413
    parts = (whole[start : start + 1000] for start in range(0, len(whole), 1000))
    assert writable.post("/echo", content=parts, headers=told).status_code == 413
    lying = {**told, "content-length": "2, 99999"}
    assert writable.post("/echo", content=b"{}", headers=lying).status_code == 413


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static/..%5cserver.py",
        "/static//etc/passwd",
        "/static/explorer.css%00.js",
        "/../../etc/passwd",
        "/rows/..%2f..%2fmanifest.json",
        "/rows/-1",
        "/rows/1e3",
        "/rows/1%27--",
        "/rows/0x1",
        "/rows/99999999999999999999999999",
        "/queries/60",
        "/rows/500/picture.png",
        "/manifest.json",
        "/explorer/index.json",
    ],
)
def test_paths_lead_to_pages_only(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "fingerprint" not in answer.text


@pytest.mark.parametrize(
    "query",
    [
        "label=-1",
        "label=99",
        "label=1%20or%201",
        "group=x",
        "sort=loss;drop",
        "page=-1",
        "page=1e9",
        "down=2",
        "truth=maybe",
    ],
)
def test_filters_are_numbers_and_known_words(client, query):
    assert client.get(f"/queries?{query}").status_code == 400


@pytest.mark.parametrize(
    "words",
    ["' or 1=1 --", 'a" OR b', "words: x", "*", "NEAR(a b)", "^a", "a AND", "\x00", "%", "日本", "((((", "ꙮ" * 200],
)
def test_a_search_is_words_and_never_a_query(client, words):
    found = client.get("/rows.json", params={"search": words})
    assert found.status_code == 200
    assert found.json()["total"] == 0


def test_long_addresses_and_searches_are_refused(client):
    assert client.get("/queries?search=" + "a" * 201).status_code == 400
    assert client.get("/queries?search=" + "a" * guard.LONGEST_ADDRESS).status_code == 414


def test_a_question_that_takes_too_long_is_stopped(made, monkeypatch):
    monkeypatch.setattr("upweight.explore.explorer.SLOWEST", -1.0)
    monkeypatch.setattr("upweight.explore.explorer._STEPS", 1)
    answer = browser_without_check(made).get("/queries?search=a")
    assert answer.status_code == 503
    assert "Ask for less" in answer.text


def browser_without_check(path):
    keys = Keys(8123)
    client = TestClient(application(Explorer.open(path), [HOST], keys), base_url=f"http://{HOST}")
    client.cookies.set(keys.name, keys.cookie, domain="127.0.0.1")
    return client


# ---- what is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/index.json", "/nothing", "/static/explorer.css", "/rows/1/picture.png", "/queries?page=x"]
)
def test_every_answer_carries_the_headers(client, path):
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control")]


def test_pages_are_not_kept_and_hold_no_inline_script_or_style(client):
    for page in pages.PAGES:
        path = page.path.replace("{query:int}", "1").replace("{row:int}", "1")
        answer = client.get(path)
        assert answer.headers["cache-control"] == "no-store"
        assert " style=" not in answer.text
        assert "<style" not in answer.text
        assert " onclick" not in answer.text
        assert answer.text.count("<script") == answer.text.count('<script type="module" src="/static/')


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}{% x %}\x00\x1b[31m\u202e\ud800=cmd|' /C calc'!A0"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose texts, labels, ids, columns and folder are all hostile."""
    X, y, _ = digits()
    n, names = 60, np.array([f"{HOSTILE[:-80]} {label}" for label in range(10)])
    labels = names[y[:n]]
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000).fit(X[:n], labels)
    influence = uw.explain(model, X[:n], labels, ids=[f"{HOSTILE[:-1]}{row}".replace("\ud800", "") for row in range(n)])
    path = tmp_path_factory.mktemp("hostile") / "<b onmouseover=alert(1)>run"
    cards = [HOSTILE, {HOSTILE: HOSTILE, "number": 1.0}, HOSTILE * 10, "x" * (10 * 2**20), {"long": "y" * (10 * 2**20)}]
    uw.write_run(
        influence, path, X[n : n + 5], labels[:5], card=lambda row: cards[row % 5], query_card=lambda q: cards[q % 5]
    )
    return path


def test_hostile_text_is_shown_as_text_everywhere(hostile):
    client = browser(hostile)
    for path in (
        "/",
        "/queries",
        "/rows",
        "/queries/0",
        "/queries/1",
        "/rows/0",
        "/rows/1",
        "/rows/2",
        "/slices",
        "/trust",
    ):
        answer = client.get(path)
        assert answer.status_code == 200, path
        for tag in ("<script>alert", "<img src=x", "<b onmouseover", "49}}"):
            assert tag not in answer.text, path
    assert "&lt;script&gt;alert(1)" in client.get("/rows").text
    assert client.get("/rows/0.json").json()["row"]["card"]["parts"][0]["text"].startswith("<script>")
    assert client.get("/rows/0.json").headers["content-type"] == "application/json"


def test_a_field_of_ten_megabytes_is_cut_and_told(hostile):
    client = browser(hostile)
    for number in (3, 4):
        answer = client.get(f"/rows/{number}")
        assert answer.status_code == 200
        assert len(answer.content) < 200_000
    assert "of 10,485,760 characters" in client.get("/rows/3").text
    assert len(client.get("/rows").content) < 200_000


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["items.sqlite", "values.f64", "codes.i32", "index.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    file = folder / "explorer" / name
    elsewhere = tmp_path / "secret"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(InvalidInput, match="leads out of"):
        Explorer.open(folder)


def test_an_index_that_is_a_link_is_not_followed(folder, tmp_path):
    (folder / "explorer").rename(tmp_path / "elsewhere")
    (folder / "explorer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="leads out of"):
        Explorer.open(folder)


@pytest.mark.parametrize("name", ["items-000000.safetensors", "queries.safetensors", "scores.safetensors", "new.txt"])
def test_a_file_of_the_run_that_is_a_link_is_not_followed(folder, tmp_path, name):
    elsewhere = tmp_path / "secret"
    elsewhere.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(InvalidInput, match="leads out of"):
        Explorer.open(folder)
    (folder / name).unlink()
    (folder / "copy").write_bytes(elsewhere.read_bytes())
    (folder / name).symlink_to("copy")  # within the folder
    assert Explorer.open(folder).n == 500


def test_a_picture_is_as_large_as_its_bytes_say(folder):
    """A card that claims a gigantic shape over few bytes is an error; nothing is ever decompressed."""
    from upweight.runs.files import read_tensors, write_tensors

    file = folder / "items-000000.safetensors"
    arrays, card = read_tensors(file)
    shapes = arrays["card_shapes"].copy()
    shapes[3] = [100_000, 100_000, 3]
    write_tensors(file, {**arrays, "card_shapes": shapes}, card)
    with pytest.raises(Damaged, match="items-000000"):
        Explorer.open(folder)


def test_a_picture_over_the_limit_is_not_encoded(made, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 8 * 8 - 1)
    assert browser(made).get("/rows/1/picture.png").status_code == 404


def test_pictures_are_encoded_again_from_their_pixels(client):
    answer = client.get("/rows/1/picture.png")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")


# ---- where it listens ------------------------------------------------------------------------------------------------


def test_the_port_is_random_and_the_address_this_machine():
    one, other = bound("127.0.0.1", 0, beyond=False), bound("localhost", 0, beyond=False)
    ports = {listening.getsockname()[1] for listening in (one, other)}
    assert len(ports) == 2
    assert names_of(one)[0] == f"127.0.0.1:{one.getsockname()[1]}"
    assert all(listening.getsockname()[0] == "127.0.0.1" for listening in (one, other))
    one.close()
    other.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_addresses_need_a_flag_and_a_name(host):
    with pytest.raises(InvalidInput, match="would show the run to other machines"):
        bound(host, 0, beyond=False)
    if host != "192.0.2.1":
        with pytest.raises(InvalidInput, match="would show the run"):
            bound(host, 0, beyond=True)


def test_nothing_but_http_is_answered(made):
    """A web socket is closed before it opens; uvicorn speaks none either."""
    with (
        pytest.raises(WebSocketDisconnect),
        TestClient(application(Explorer.open(made), [HOST], Keys(1))).websocket_connect("/"),
    ):
        pass


def test_the_server_never_imports_torch_or_matplotlib(made):
    """In a process of its own that opens the run and shows every page."""
    import subprocess
    import sys

    code = f"""
import sys
from pathlib import Path
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from upweight.explore import pages, server
from upweight.explore.explorer import Explorer
from upweight.explore.guard import Keys
keys = Keys(8123)
client = TestClient(server.application(Explorer.open(Path({str(made)!r})), ["{HOST}"], keys), base_url="http://{HOST}")
client.get("/?token=" + keys.token)
for page in pages.PAGES:
    assert client.get(page.path.replace("{{query:int}}", "1").replace("{{row:int}}", "1")).status_code == 200, page
print(sorted({{"torch", "sklearn", "matplotlib", "pandas", "scipy", "pyarrow"}} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
