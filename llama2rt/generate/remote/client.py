"""JSON over HTTP with retries: a server that is busy, starting or gone for a moment is asked again.

The standard library's client: one connection a request costs nothing beside sampling an answer.
"""

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from llama2rt.errors import InputError

# Busy, or not there for a moment; anything else is not better at the next try.
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0
_FIRST_WAIT_S = 0.5


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the API key to somebody else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Client:
    """Speaks to the server at `url` (with or without `/v1` at its end)."""

    def __init__(
        self, url: str, *, api_key: str | None = None, attempts: int = 6, timeout_s: float = 600.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
            raise InputError(f"server: expected a URL such as http://127.0.0.1:8000, got {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._attempts, self._timeout_s = attempts, timeout_s
        self.requests = 0
        """that were sent, those that failed and were sent again too"""
        self._counting = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def get(self, path: str) -> Any:
        """The JSON at `path`; errors as `post`."""
        return self._ask(f"{self.url}{path}", None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to `body`. `path` may be a whole URL. InputError where the server refuses
        it, OSError where none came after all attempts."""
        url = path if "://" in path else f"{self.url}{path}"
        return self._ask(url, json.dumps(body).encode())

    def _ask(self, url: str, body: bytes | None) -> Any:
        reason, wait = "", 0.0
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(wait)
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
            request = urllib.request.Request(url, body, self._headers)
            with self._counting:
                self.requests += 1
            try:
                with self._opener.open(request, timeout=self._timeout_s) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {_said(error)}"
                if error.code not in _AGAIN:
                    raise InputError(f"{url}: {reason}") from None
                after = error.headers.get("Retry-After", "")
                if after.isascii() and after.isdigit():
                    wait = min(_LONGEST_WAIT_S, float(after)) * random.uniform(1.0, 1.2)
            except json.JSONDecodeError as error:
                raise InputError(f"{url}: the answer is not JSON: {error}") from None
            except (OSError, EOFError) as error:  # refused, reset, timed out, cut off
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ConnectionError(f"{url}: no answer in {self._attempts} attempts: {reason}")


def _said(error: urllib.error.HTTPError) -> str:
    """The reason that a server gives, in OpenAI's shape, FastAPI's or as text."""
    text = error.read(10_000).decode("utf-8", "replace")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        return text.strip()[:500] or error.reason
    if isinstance(parsed, dict):
        inner = parsed.get("error", parsed.get("detail", parsed))
        if isinstance(inner, dict):
            inner = inner.get("message", inner)
        return str(inner)[:500]
    return text[:500]
