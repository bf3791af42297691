"""Who may ask, and how much: checked before a request's body is parsed.

A page that a browser shows may send requests to any address that the browser reaches, this
server's loopback address included. So a request without a key must name a loopback host (a name
that somebody points at 127.0.0.1 is none), and a body must be declared as JSON, which another
origin's page may not send unless this server allowed it, and it does not.
"""

import asyncio
import contextlib
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
# A body that is too large is still read up to this many limits, or its sender, who only then looks
# for an answer, would find a closed connection.
_DRAINED = 8


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
        try:
            self._check_sender(scope["path"], headers)
            if scope["method"] == "POST":
                await self._check_body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _check_sender(self, path: str, headers: dict[bytes, str]) -> None:
        if self.api_key is None:
            if _host(headers.get(b"host", "")) not in _LOOPBACK:
                raise ApiError(
                    403, "without an API key this server answers to a loopback host alone"
                )
        elif path not in OPEN:
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            # Digests, so that not even the key's length shows in the time that this takes.
            same = hmac.compare_digest(_digest(given.strip()), _digest(self.api_key))
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "no valid API key: expected the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                )

    async def _check_body(self, headers: dict[bytes, str], receive: Receive) -> None:
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type: expected application/json, got {kind or 'none'}")
        length = headers.get(b"content-length", "0")
        most = self.limits.body_bytes
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ApiError(400, f"content-length: expected a number, got {describe(length)}")
        if int(length) > most:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.body_seconds):
                    await _drain(receive, most * _DRAINED)
            raise ApiError(413, f"the body: expected at most {most} bytes, got {length}")

    def _counted_answers(self, path: str, send: Send) -> Send:
        known = path if path in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count("requests", path=known, status=str(message["status"]))
            await send(message)

        return counted

    def _counted(self, receive: Receive) -> Receive:
        """`receive` that refuses a body beyond the limits. HTTPException: what FastAPI lets
        through while it reads."""
        read, complete = 0, False

        async def counted() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), self.limits.body_seconds)
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.limits.body_bytes:
                most = self.limits.body_bytes
                raise HTTPException(413, f"the body: expected at most {most} bytes")
            return message

        return counted


async def _drain(receive: Receive, most: int) -> None:
    """Read and drop a body up to `most` bytes."""
    read, more = 0, True
    while more and read < most:
        message = await receive()
        read += len(message.get("body", b""))
        more = message.get("more_body", False)


def _host(header: str) -> str:
    """A Host header without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def describe(value: Any) -> str:
    """A value from a request, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
