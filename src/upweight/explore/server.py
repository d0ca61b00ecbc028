"""The web application: pages, their twins in JSON, pictures and static files; and the server, on this machine only."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from upweight.errors import Damaged, InvalidInput, UpweightError
from upweight.explore import pages, showing
from upweight.explore.explorer import SLOWEST, Explorer
from upweight.explore.guard import App, Keys, guarded
from upweight.explore.page import LARGEST, Action, Asked, Download, Page
from upweight.explore.parted import overlay
from upweight.explore.pictures import png_of
from upweight.show import svg

HERE = Path(__file__).parent
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
Endpoint = Callable[[Request], Awaitable[Response]]


def application(explorer: Explorer, hosts: Iterable[str], keys: Keys) -> App:
    """All pages of a run, behind the guards.

    Args:
        explorer: the run.
        hosts: Host headers that are ours, such as "127.0.0.1:8123".
        keys: what opens it.
    """
    return _application(_View(explorer), hosts, keys)


def _application(view: _View, hosts: Iterable[str], keys: Keys) -> App:
    routes = [route for page in pages.PAGES for route in view.routes(page)]
    routes += [Route(action.path, view.action(action), methods=["POST"]) for action in pages.ACTIONS]
    routes += [Route(one.path, view.download(one), methods=["GET"]) for one in pages.DOWNLOADS]
    routes += [
        Route("/rows/{number:int}/picture.png", view.picture("rows"), methods=["GET"]),
        Route("/queries/{number:int}/picture.png", view.picture("queries"), methods=["GET"]),
        Route("/queries/{query:int}/rows/{row:int}/parts.png", view.parts, methods=["GET"]),
        Route("/static/{name}", view.static, methods=["GET"]),
    ]
    handlers: Any = {HTTPException: view.refused, TimeoutError: view.too_slow, Damaged: view.damaged}
    return guarded(Starlette(routes=routes, exception_handlers=handlers), hosts, keys)


class _View:
    """Pages as answers."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        files = sorted(path for path in (HERE / "static").iterdir() if path.suffix in KINDS)
        self.files = {path.name: (path.read_bytes(), KINDS[path.suffix]) for path in files}
        self.files["charts.css"] = (svg.STYLE.encode(), KINDS[".css"])
        self.version = hashlib.sha256(b"".join(content for content, _ in self.files.values())).hexdigest()[:12]
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.globals |= {
            "tabs": [(page.name, page.path, page.tab) for page in pages.PAGES if page.tab],
            "version": self.version,
            "work": explorer.work,
            "run_name": showing.shortened(str(explorer.run.path.absolute().name), 80),
            **showing.GLOBALS,
        }
        self.templates.filters |= showing.FILTERS

    def prepare(self) -> None:
        """What the first page of its kind would wait for: templates, what is told of the run, the labels of its rows.

        Raises nothing: whoever asks for what cannot be had is told then.
        """
        for page in pages.PAGES:
            self.templates.get_template(f"{page.name}.html")
        with suppress(UpweightError, OSError):
            self.explorer.prepare()

    def routes(self, page: Page) -> list[Route]:
        """The page and its twin."""
        twin = "/index.json" if page.path == "/" else f"{page.path}.json"
        return [Route(twin, self.twin(page), methods=["GET"]), Route(page.path, self.page(page), methods=["GET"])]

    def page(self, page: Page) -> Endpoint:
        """What answers with the page."""

        async def endpoint(request: Request) -> Response:
            def made() -> bytes:
                found = page.make(self.explorer, _asked(request))
                twin = "/index.json" if page.path == "/" else f"{request.url.path}.json"
                query = f"?{request.url.query}" if request.url.query else ""
                told = {"page": found, "here": page.name, "twin": twin + query, "address": request.url.path}
                text = self.templates.get_template(f"{page.name}.html").render(told)
                return text.encode("utf-8", "replace")  # a text of the user's may hold half a character

            return Response(await run_in_threadpool(made), media_type="text/html")

        return endpoint

    def twin(self, page: Page) -> Endpoint:
        """What answers with the same as JSON."""

        async def endpoint(request: Request) -> Response:
            return _json(await run_in_threadpool(page.make, self.explorer, _asked(request)))

        return endpoint

    def action(self, action: Action) -> Endpoint:
        """What does it, and answers with what it found."""

        async def endpoint(request: Request) -> Response:
            try:
                told = json.loads(await request.body())
            except (ValueError, RecursionError) as error:
                raise HTTPException(400, "The body is no JSON.") from error
            if not isinstance(told, dict):
                raise HTTPException(400, "The body is no JSON object.")
            return _json(await run_in_threadpool(action.do, self.explorer, _asked(request), told))

        return endpoint

    def download(self, download: Download) -> Endpoint:
        """What answers with a file."""

        async def endpoint(request: Request) -> Response:
            name, kind, content = await run_in_threadpool(download.make, self.explorer, _asked(request))
            return Response(content, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})

        return endpoint

    def picture(self, side: Any) -> Endpoint:
        """What answers with the picture of a row or a query."""

        async def endpoint(request: Request) -> Response:
            number = request.path_params["number"]
            content = await run_in_threadpool(png_of, self.explorer, side, number)
            if content is None:
                raise HTTPException(404, f"There is no picture of {side} {number}.")
            return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

        return endpoint

    async def parts(self, request: Request) -> Response:
        """What answers with the pixels of a row that matter to a query."""
        query, row = (request.path_params[name] for name in ("query", "row"))
        if query > LARGEST or row > LARGEST:
            raise HTTPException(404, f"There is no such picture of row {row}.")
        content = await run_in_threadpool(overlay, self.explorer, query, row)
        if content is None:
            raise HTTPException(404, f"The run does not keep which pixels of row {row} matter to query {query}.")
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    async def static(self, request: Request) -> Response:
        """One of our own files, which were read when the server started."""
        name = request.path_params["name"]
        if name not in self.files:
            raise HTTPException(404, "There is no such file.")
        content, kind = self.files[name]
        return Response(content, media_type=kind, headers={"cache-control": "private, max-age=3600"})

    async def refused(self, request: Request, error: HTTPException) -> Response:
        """What is said of an address that has no page."""
        if request.url.path.endswith(".json") or request.method == "POST":
            return _json({"error": error.detail}, error.status_code)
        told = {"page": {"status": error.status_code, "why": error.detail}, "here": "", "twin": "", "address": ""}
        text = self.templates.get_template("refused.html").render(told)
        return Response(text, error.status_code, media_type="text/html")

    async def damaged(self, request: Request, error: Exception) -> Response:
        """What is said of numbers that are not what was written."""
        return await self.refused(request, HTTPException(500, str(error)))

    async def too_slow(self, request: Request, _: Exception) -> Response:
        """What is said of a question that took too long."""
        why = f"This took longer than {SLOWEST:g} seconds, and was stopped. Ask for less: more words, or a class."
        return await self.refused(request, HTTPException(503, why))


def _asked(request: Request) -> Asked:
    return Asked(dict(request.path_params), dict(request.query_params))


def _json(value: Any, status: int = 200) -> Response:
    text = json.dumps(finite(value), allow_nan=False)
    return Response(text, status, media_type="application/json")


def finite(value: Any) -> Any:
    """The same nesting with null for numbers that do not exist: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the server ------------------------------------------------------------------------------------------------------


def bound(host: str, port: int, *, beyond: bool) -> socket.socket:
    """A socket that listens at an address of this machine.

    Args:
        host: its address; a loopback one, unless `beyond` says otherwise.
        port: 0 for any that is free.
        beyond: whether other machines may reach it, at an address that must be named.

    Raises:
        InvalidInput: if the address is none, is reached from elsewhere unasked, or is taken.
    """
    try:
        address = ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        message = f"--host {host} is no address. Name one of this machine, such as 127.0.0.1."
        raise InvalidInput(message) from error
    if not address.is_loopback and (not beyond or address.is_unspecified):
        message = (
            f"--host {host} would show the run to other machines"
            + (", at every address of this one" if address.is_unspecified else "")
            + ". Leave it out and use `ssh -L PORT:127.0.0.1:PORT`; or name one address of this machine and add "
            "--beyond-this-machine: whoever has the link can then read everything, and the network can read along."
        )
        raise InvalidInput(message)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((str(address), port))
    except OSError as error:
        found.close()
        message = (
            f"{host}:{port} cannot be listened at ({error.strerror}). Leave out --port, and any free one is taken."
        )
        raise InvalidInput(message) from error
    return found


def names_of(listening: socket.socket) -> list[str]:
    """The Host headers that are ours."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return [f"{shown}:{port}", *([f"localhost:{port}"] if ip_address(host).is_loopback else [])]


def serve(explorer: Explorer, listening: socket.socket, told: Callable[[str], None]) -> None:
    """Answer until Ctrl-C.

    Args:
        explorer: the run.
        listening: as `bound` gives it.
        told: is given the link, once it can be opened.
    """
    keys = Keys(listening.getsockname()[1])
    hosts = names_of(listening)
    view = _View(explorer)
    config = uvicorn.Config(
        _application(view, hosts, keys),
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=16 * 1024,
        limit_concurrency=100,
        timeout_keep_alive=30,
    )
    listening.listen(128)
    told(f"http://{hosts[0]}/?token={keys.token}")
    threading.Thread(target=view.prepare, daemon=True).start()
    with suppress(KeyboardInterrupt):  # uvicorn has closed what was open, and passes it on
        uvicorn.Server(config).run([listening])
