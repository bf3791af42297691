"""A chat server on loopback whose answers and failures a test decides."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], str]


class ChatServer:
    """`url`; every request's body in `asked`; `fail`: whether the request of this number fails."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[dict[str, Any]] = []
        self.sent = 0
        self.fail: Callable[[int], bool] = lambda number: False
        self.reply = reply
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "stand-in"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.sent += 1
                    failing = server.fail(server.sent)
                if failing:
                    self._send(503, {"error": {"message": "busy"}})
                    return
                with server._lock:
                    server.asked.append(body)
                text = server.reply(body)
                self._send(200, _completion(text, body))

            def _send(self, status: int, value: Any) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(content)

        return Handler

    @contextmanager
    def running(self) -> Iterator["ChatServer"]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join(10)


def _completion(text: str, body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    if body.get("logprobs"):
        top = [{"token": "A", "logprob": -0.5}, {"token": " B", "logprob": -1.5}]
        top.append({"token": "the", "logprob": -3.0})
        choice["logprobs"] = {"content": [{"token": "A", "logprob": -0.5, "top_logprobs": top}]}
    words = sum(len(m["content"].split()) for m in body["messages"])
    return {"choices": [choice], "usage": {"prompt_tokens": words, "completion_tokens": 1}}
