"""Who may ask, and how much: checked before a request's body is parsed.

A page that a browser shows may send requests to any address that the browser reaches, this
server's loopback address included. So a request without a key must name a loopback host (a name
that somebody points at 127.0.0.1 is none), and a body must be declared as JSON, which another
origin's page may not send unless this server allowed it, and it does not.
"""

import hmac
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2rt.serve.bodies import BodyLimits
from llama2rt.serve.digest import digest
from llama2rt.serve.errors import ApiError
from llama2rt.serve.metrics import Metrics
from llama2rt.serve.options import Limits

# What says nothing of any conversation: the page that asks for the key, and whether all is well.
OPEN = ("/", "/health", "/page.css", "/page.js")
PATHS = {
    *OPEN,
    "/metrics",
    "/update_weights_from_disk",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Guard:
    """ASGI middleware: the API key or else a loopback host, JSON, and the body's size and time."""

    app: ASGIApp
    limits: Limits
    api_key: str | None
    metrics: Metrics = field(default_factory=Metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._counted_answers(scope["path"], send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        bodies = BodyLimits("application/json", self.limits.body_bytes, self.limits.body_seconds)
        try:
            self._check_sender(scope["path"], headers)
            if scope["method"] == "POST":
                await bodies.check(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, bodies.counted(receive), send)

    def _check_sender(self, path: str, headers: dict[bytes, str]) -> None:
        if self.api_key is None:
            if _host(headers.get(b"host", "")) not in _LOOPBACK:
                raise ApiError(
                    403, "without an API key this server answers to a loopback host alone"
                )
        elif path not in OPEN:
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            # Digests, so that not even the key's length shows in the time that this takes.
            same = hmac.compare_digest(digest(given.strip()), digest(self.api_key))
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "no valid API key: expected the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                )

    def _counted_answers(self, path: str, send: Send) -> Send:
        known = path if path in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count("requests", path=known, status=str(message["status"]))
            await send(message)

        return counted


def _host(header: str) -> str:
    """A Host header without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()
