"""One small server for all tests of this folder, and OpenAI's own client of it."""

import pytest
from served import KEY, served, small_engine


@pytest.fixture(scope="session")
def server(small_tokenizer):
    with served(small_engine(small_tokenizer, cache_bytes=64 * 2**20)) as found:
        yield found


@pytest.fixture(scope="session")
def client(server):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def http(server):
    """`http.post(path, json=...)` with the key, for what no client would send."""
    httpx2 = pytest.importorskip("httpx2", reason="httpx2 is not installed")
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=30) as found:
        yield found
