"""A page to talk to the model by, at `/`: three files, nothing from elsewhere, nothing to build.

What the model says is inserted as text, never as markup, and the policy below forbids the browser
every script and address but this server's own.
"""

import html
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

_FOLDER = Path(__file__).with_name("page")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


FILES = {"page.js": "text/javascript", "page.css": "text/css"}


def add_routes(app: FastAPI, name: str, context: int, *, needs_key: bool) -> None:
    """The page of the model `name`, whose context is `context` tokens, and its files."""
    page = _sender(shown(name, context, needs_key=needs_key), "text/html")
    app.add_api_route("/", page, response_model=None, include_in_schema=False)
    for file, kind in FILES.items():
        send = _sender(_read(file), kind)
        app.add_api_route(f"/{file}", send, response_model=None, include_in_schema=False)


def shown(name: str, context: int, *, needs_key: bool) -> str:
    """The page's HTML; with a field for the API key where one is needed."""
    values = {
        "model": html.escape(name),
        "context": str(context),
        "key": "" if needs_key else "hidden",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _read("index.html"))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _sender(content: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return send
