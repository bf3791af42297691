"""`llama2rt serve` as a process, and what it refuses before it reads a model."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from llama2rt.errors import InputError
from llama2rt.serve import commands
from llama2rt.serve.options import Limits


@pytest.mark.parametrize(
    ("host", "key", "words"),
    [
        ("0.0.0.0", None, "host: 0.0.0.0.*--api-key"),
        ("::", None, "host: ::"),
        ("example.org", None, "host: example.org"),
        ("127.0.0.1", "", "api-key"),
        ("127.0.0.1", "k\u00e9y", "api-key"),
        ("127.0.0.1", " key", "api-key"),
    ],
)
def test_who_may_reach_it(host, key, words, tmp_path) -> None:
    with pytest.raises(InputError, match=words):
        commands.serve(tmp_path, host=host, api_key=key)


def test_hosts_that_need_no_key() -> None:
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        commands.check_sender(host, None)
    commands.check_sender("0.0.0.0", "key")


def test_other_bad_options(tmp_path, monkeypatch) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra serve)")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    with pytest.raises(InputError, match="max-choices"):
        commands.serve(tmp_path, Limits(max_choices=0))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match=r"port: .*in use"),
    ):
        commands.serve(tmp_path, port=taken.getsockname()[1])
    with pytest.raises(InputError, match=str(tmp_path)):  # no model in it
        commands.serve(tmp_path, port=0)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("llama2rt.serve.")]:
        if name not in ("llama2rt.serve.commands", "llama2rt.serve.options"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"needs fastapi: pip install 'llama2rt\[serve\]'"):
        commands.serve(tmp_path, port=0)


def test_sigterm_lets_an_answer_end(small_tokenizer, tmp_path) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra serve)")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    httpx2 = pytest.importorskip("httpx2", reason="httpx2 is not installed")
    from small_models import far_from_flat

    from llama2rt.checkpoint import native

    folder = tmp_path / "pocket model"
    native.save(far_from_flat(vocab_size=small_tokenizer.vocab_size), small_tokenizer, folder)
    command = ["-m", "llama2rt.cli", "serve", folder, "--port", "0", "--cache-bytes", str(2**24)]
    process = subprocess.Popen(
        [sys.executable, "-P", *map(str, command)],
        env={**os.environ, "LLAMA2RT_API_KEY": "k"},
        stderr=subprocess.PIPE,
        text=True,
    )
    # It ends by itself, whatever happens here.
    watch = threading.Timer(180, process.kill)
    watch.start()
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("pocket model at http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[3]
        headers = {"Authorization": "Bearer k"}
        with httpx2.Client(base_url=url, headers=headers, timeout=30) as http:
            body = {"prompt": "the", "max_tokens": 80, "n": 4, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert first.startswith("data: {") and rest[-1] == "data: [DONE]"
        assert sum('"finish_reason":"' in line for line in rest) == 4
        assert process.wait(20) == 0, process.stderr.read()
        assert "Traceback" not in process.stderr.read()
    finally:
        watch.cancel()
        process.kill()
        process.wait()
