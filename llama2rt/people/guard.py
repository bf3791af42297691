"""What reaches the page at all: checked before anything of a request is used.

Somebody else's page that an annotator's browser shows can send requests to this server. So the Host
header must be an address of its own (a name that somebody points at 127.0.0.1 is none), and a post
must say in Origin that it comes from there. Forms carry a token of their session besides (`app`).
Answers forbid the browser every script and address but this server's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2rt.serve.bodies import BodyLimits
from llama2rt.serve.errors import ApiError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Under no-referrer browsers would say "null" in Origin, to this server too (Fetch, "append a
    # request Origin header").
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FORM = "application/x-www-form-urlencoded"
_BODY_SECONDS = 30
_METHODS = ("GET", "HEAD", "POST")


def origins(host: str, port: int, public_url: str | None) -> frozenset[str]:
    """The addresses at which browsers reach a server that listens at `host`."""
    names = {"127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    colon = "" if port == 80 else f":{port}"
    found = {f"http://{name.lower()}{colon}" for name in names}
    return frozenset(found | ({public_url.rstrip("/").lower()} if public_url else set()))


@dataclass(frozen=True)
class Guard:
    """ASGI middleware: Host, Origin, the body's kind, size and time; security headers."""

    app: ASGIApp
    origins: frozenset[str]
    body_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _secured(send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        bodies = BodyLimits(_FORM, self.body_bytes, _BODY_SECONDS)
        try:
            self._check(scope["method"], headers)
            if scope["method"] == "POST":
                await bodies.check(headers, receive)
        except ApiError as error:
            await PlainTextResponse(str(error), error.status)(scope, receive, send)
            return
        await self.app(scope, bodies.counted(receive), send)

    def _check(self, method: str, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "").lower()
        if host not in {urlsplit(origin).netloc for origin in self.origins}:
            raise ApiError(403, "this server does not answer to that name")
        if method not in _METHODS:
            raise ApiError(405, f"expected one of {', '.join(_METHODS)}")
        if method == "POST":
            origin = headers.get(b"origin", "").lower()
            # What Origin cannot say of a page at the same address under another scheme or port,
            # Sec-Fetch-Site does; older browsers do not send it.
            site = headers.get(b"sec-fetch-site", "same-origin")
            if origin not in self.origins or site != "same-origin":
                raise ApiError(403, "this post comes from another page")


def _secured(send: Send) -> Send:
    added: Iterable[tuple[bytes, bytes]] = [
        (name.lower().encode(), value.encode()) for name, value in HEADERS.items()
    ]

    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return secured
