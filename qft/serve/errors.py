"""What goes wrong, in the form that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse

from qft.errors import QftError
from qft.serve.turns import Full, Stopped

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1


class ApiError(Exception):
    """An HTTP status with a message; param: the field it is about; code: OpenAI's short word, where there is one."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """With Retry-After where asking again helps."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of a defect of ours only that it is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QftError):
        problems = [
            replace(p, where="") if p.where.startswith("--") else p for p in error.problems
        ]  # options of commands
        return ApiError(400, "; ".join(str(p).replace("\n  ", "; ") for p in problems), param=problems[0].where or None)
    if isinstance(error, Full):
        return ApiError(429, "too many requests wait already; try again later", code="rate_limit_exceeded")
    if isinstance(error, Stopped):
        return ApiError(503, "the server is stopping")
    return ApiError(500, "the server failed on this request; its own log says how")
