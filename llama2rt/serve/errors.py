"""What a client is told when its request is refused: OpenAI's error object, which its clients
turn into exceptions by the status."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A refusal with its HTTP `status`, the field of the request that it is about, and a code for
    programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON object that says so."""
        return {
            "error": {
                "message": str(self),
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def of_validation(problem: Mapping[str, Any]) -> ApiError:
    """The refusal for the first of pydantic's problems with a body: 400 where it is no JSON, else
    422."""
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", problem["msg"])
        return ApiError(400, f"the body is not JSON: {reason}")
    where = [str(part) for part in problem["loc"] if part != "body"]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        message = f"{name}: this server knows no such field"
    else:
        message = problem["msg"].removeprefix("Value error, ")
        message = f"{name}: {message}" if name else message
    return ApiError(422, message, param=where[0] if where else None)
