"""What stands in front of every page: who may ask, from where, with what, and what a browser may do with the answer.

In this order, each a pure ASGI middleware:

    Hosts     the Host header is one of ours, before anything else is looked at (DNS rebinding)
    Headers   what every answer says: a strict content security policy, no sniffing, no frames, no referrer, no cache
    Sizes     no long addresses, no large bodies
    Keys      the token in the link is exchanged for a cookie; without one nothing is answered
    Writes    whatever changes something comes from our own pages, and as JSON
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST_ADDRESS = 2_000  # characters of path and query
LARGEST_BODY = 64 * 1024  # bytes
TOKEN = "token"
READS = frozenset({"GET", "HEAD"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Keys:
    """What opens the explorer: a token that stands in the link, and a cookie for which it is exchanged.

    Args:
        port: of the server; cookies do not know ports, so its name does.
        token: in the link.
        cookie: what the browser keeps. It is no token, so that no page of ours can give the token away.
    """

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def name(self) -> str:
        """What the cookie is called."""
        return f"upweight-{self.port}"


def guarded(app: App, hosts: Iterable[str], keys: Keys) -> App:
    """An application behind all guards.

    Args:
        app: it.
        hosts: Host headers that are ours, with their port.
        keys: what opens it.
    """
    return Hosts(Headers(Sizes(Key(Writes(app), keys))), frozenset(hosts))


@dataclass(frozen=True)
class Hosts:
    """Only requests to a name of ours are looked at."""

    app: App
    hosts: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say that the host is none of ours."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return
        found = headers(scope, b"host")
        if len(found) == 1 and found[0].lower() in self.hosts:
            await self.app(scope, receive, send)
        else:
            await refuse(send, 421, "This host is not served here. Open the link that `upweight explore` printed.")


@dataclass(frozen=True)
class Headers:
    """Every answer carries the headers; pages are not kept by the browser unless they say so."""

    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, with all headers."""

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = {**HEADERS, "cache-control": "no-store"}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in more.items() if name.encode() not in given),
                ]
            await send(message)

        await self.app(scope, receive, told)


@dataclass(frozen=True)
class Sizes:
    """Addresses and bodies have an end, also where no header says how long they are."""

    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say that it is too much."""
        if len(scope["raw_path"] or b"") + len(scope["query_string"]) > LONGEST_ADDRESS:
            await refuse(send, 414, f"The address is longer than {LONGEST_ADDRESS:,} characters.")
            return
        told = headers(scope, b"content-length")
        if told and not (told[0].isdecimal() and int(told[0]) <= LARGEST_BODY):
            await refuse(send, 413, f"More than {LARGEST_BODY:,} bytes are not read.")
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > LARGEST_BODY:
                raise HTTPException(413, f"More than {LARGEST_BODY:,} bytes are not read.")
            return message

        await self.app(scope, counted, send)


@dataclass(frozen=True)
class Key:
    """Without the cookie nothing is answered; the token in a link is exchanged for it."""

    app: App
    keys: Keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, exchange a token, or say that a key is missing."""
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in asked if name == TOKEN]
        if tokens and scope["method"] in READS:
            if len(tokens) == 1 and _same(tokens[0], self.keys.token):
                await self._exchange(scope, [pair for pair in asked if pair[0] != TOKEN], send)
            else:
                await refuse(send, 403, NO_KEY)
        elif any(_same(value, self.keys.cookie) for value in cookies(scope, self.keys.name)):
            await self.app(scope, receive, send)
        else:
            await refuse(send, 403, NO_KEY)

    async def _exchange(self, scope: Scope, asked: list[tuple[str, str]], send: Send) -> None:
        """To the same page without the token, with a cookie."""
        path = "/" + quote(scope["path"].lstrip("/"))  # //elsewhere would be another host
        place = path + (f"?{urlencode(asked)}" if asked else "")
        cookie = f"{self.keys.name}={self.keys.cookie}; Path=/; HttpOnly; SameSite=Strict"
        await answer(send, 303, "", {"location": place, "set-cookie": cookie})


NO_KEY = "The explorer opens with the link that `upweight explore` printed: it holds a token. Open that link."


@dataclass(frozen=True)
class Writes:
    """What changes something comes from our own pages, as JSON; nothing else but GET and HEAD is known."""

    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say what is wrong with a change."""
        if scope["method"] not in READS:
            if scope["method"] != "POST":
                await refuse(send, 405, "There are GET, HEAD and POST only.")
                return
            ours = f"{scope['scheme']}://{headers(scope, b'host')[0].lower()}"
            sites = headers(scope, b"sec-fetch-site")
            if headers(scope, b"origin") != [ours] or sites not in ([], ["same-origin"]):
                await refuse(send, 403, "Only the explorer's own pages may change something.")
                return
            kinds = [kind.partition(";")[0].strip().lower() for kind in headers(scope, b"content-type")]
            if kinds != ["application/json"]:
                await refuse(send, 415, "Changes are sent as application/json.")
                return
        await self.app(scope, receive, send)


def headers(scope: Scope, name: bytes) -> list[str]:
    """What a request says under a name, once for each time it says it."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def cookies(scope: Scope, name: str) -> list[str]:
    """The cookies of a name."""
    found = []
    for line in headers(scope, b"cookie"):
        try:
            jar = SimpleCookie(line)
        except CookieError:
            continue
        if name in jar:
            found.append(jar[name].value)
    return found


async def refuse(send: Send, status: int, why: str) -> None:
    """A plain answer that says why not."""
    await answer(send, status, why + "\n", {})


async def answer(send: Send, status: int, text: str, more: dict[str, str]) -> None:
    """A plain answer, with all headers."""
    body = text.encode()
    told = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **HEADERS,
        **more,
    }
    lines = [(name.encode(), value.encode("latin-1")) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def _same(given: str, wanted: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), wanted.encode())
