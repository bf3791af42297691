"""Annotators who speak HTTP to the page of `llama2rt people serve`, as its forms do."""

import http.client
import re
import time
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

_HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')
_FORM = re.compile(r'<form method="post" action="(/\w+)".*?</form>', re.DOTALL)
_GONE = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Reply:
    status: int
    text: str
    headers: dict[str, str]

    def form(self, action: str) -> dict[str, str]:
        """Hidden fields of the form that posts to `action`; KeyError where the page has none."""
        for match in _FORM.finditer(self.text):
            if match[1] == action:
                return dict(_HIDDEN.findall(match[0]))
        raise KeyError(action)


@dataclass
class Annotator:
    """One browser: its cookie, and one connection that lasts. Where the server is gone, a request
    is sent again until `patience_s` is over."""

    url: str
    patience_s: float = 0.0
    cookie: str = ""
    seconds: list[float] = field(default_factory=list)
    """of each answered request, waiting for a server that is gone left out"""
    _connection: http.client.HTTPConnection | None = None

    def log_in(self, token: str) -> Reply:
        reply = self.post("/log_in", {"token": token})
        self.cookie = reply.headers.get("set-cookie", "").partition(";")[0]
        return reply

    def get(self, path: str = "/", **headers: str) -> Reply:
        return self._send("GET", path, None, headers)

    def post(self, path: str, form: dict[str, str] | bytes, **headers: str) -> Reply:
        """As a form of this page does; headers replace those of a browser (`content_type`), and
        leave them out where they are empty."""
        body = form if isinstance(form, bytes) else urlencode(form).encode()
        kind = {"content_type": "application/x-www-form-urlencoded", "origin": self.url}
        return self._send("POST", path, body, kind | headers)

    def _send(self, method: str, path: str, body: bytes | None, given: dict[str, str]) -> Reply:
        headers = {"cookie": self.cookie} | {k.replace("_", "-"): v for k, v in given.items()}
        headers = {name: value for name, value in headers.items() if value}
        end = time.monotonic() + self.patience_s
        while True:
            try:
                began = time.perf_counter()
                reply = self._once(method, path, body, headers)
                self.seconds.append(time.perf_counter() - began)
                return reply
            except _GONE:
                self.close()
                if time.monotonic() >= end:
                    raise
                time.sleep(0.05)

    def _once(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        if self._connection is None:
            netloc = urlsplit(self.url).netloc
            self._connection = http.client.HTTPConnection(netloc, timeout=20)
        self._connection.request(method, path, body, headers)
        found = self._connection.getresponse()
        text = found.read().decode()
        return Reply(found.status, text, {k.lower(): v for k, v in found.getheaders()})

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
