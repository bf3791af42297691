"""What a request's body may be: its declared kind, its size, and the time that it may take."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from starlette.types import Message, Receive

from llama2rt.serve.errors import ApiError

# A body that is too large is still read up to this many limits, or its sender, who only then looks
# for an answer, would find a closed connection.
_DRAINED = 8


@dataclass(frozen=True)
class BodyLimits:
    """What is taken of one body."""

    kind: str
    """the media type that it must be declared as"""
    most_bytes: int
    seconds: int
    """longest wait for its next part"""

    async def check(self, headers: Mapping[bytes, str], receive: Receive) -> None:
        """ApiError for another kind, or for a declared length beyond the limit."""
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if kind != self.kind:
            raise ApiError(415, f"content-type: expected {self.kind}, got {kind or 'none'}")
        length = headers.get(b"content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ApiError(400, f"content-length: expected a number, got {describe(length)}")
        if int(length) > self.most_bytes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await _drain(receive, self.most_bytes * _DRAINED)
            raise ApiError(413, f"the body: expected at most {self.most_bytes} bytes, got {length}")

    def counted(self, receive: Receive) -> Receive:
        """`receive` that refuses a body beyond the limits. HTTPException: what FastAPI lets
        through while it reads."""
        read, complete = 0, False

        async def counted() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), self.seconds)
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.most_bytes:
                raise HTTPException(413, f"the body: expected at most {self.most_bytes} bytes")
            return message

        return counted


async def _drain(receive: Receive, most: int) -> None:
    """Read and drop a body up to `most` bytes."""
    read, more = 0, True
    while more and read < most:
        message = await receive()
        read += len(message.get("body", b""))
        more = message.get("more_body", False)


def describe(value: Any) -> str:
    """A value from a request, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
