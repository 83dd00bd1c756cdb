"""What stands before every request: the key, other web sites kept out, the size of a body, and counting."""

from __future__ import annotations

import hmac
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qft.serve.errors import ApiError
from qft.serve.metrics import Metrics

MOST_BYTES = 1 << 20
MOST_SOUND_BYTES = 25 << 20  # as OpenAI allows
_OPEN = ("/", "/health")  # without a key: neither asks the model
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Around the application. Without a key only this machine's own programs and pages may ask."""

    def __init__(self, app: ASGIApp, *, key: str | None, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        headers = dict(scope["headers"])
        path = scope["path"]

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(path, headers)
            most = MOST_SOUND_BYTES if path.startswith("/v1/audio/") else MOST_BYTES
            await self._app(scope, _limited(receive, headers, most), counted)
        except ApiError as error:
            await error.response(scope, receive, counted)
        finally:
            self._metrics.requests.labels(path if path in self._paths else "other", str(status)).inc()
            self._metrics.seconds.observe(time.monotonic() - began)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._key is not None:
            given = headers.get(b"authorization", b"")
            if path not in _OPEN and not hmac.compare_digest(given, b"Bearer " + self._key):
                raise ApiError(401, "the key is missing or wrong", code="invalid_api_key")
            return
        # A web page elsewhere can make a browser ask 127.0.0.1, under that name or one of its own: neither is let in.
        host = headers.get(b"host", b"").decode("latin-1")
        if _split(f"//{host}").hostname not in _LOCAL:
            raise ApiError(403, "without a key this server answers to 127.0.0.1 and localhost alone")
        origin = headers.get(b"origin")
        if origin is not None and _split(origin.decode("latin-1")).netloc != host:
            raise ApiError(403, "without a key this server answers no other site's pages")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        raise ApiError(400, "Host or Origin is no address") from None


def _limited(receive: Receive, headers: dict[bytes, bytes], most: int) -> Receive:
    """Raises ApiError for a body that is, or becomes, too long."""
    too_long = ApiError(413, f"the request is longer than {most:,} bytes")
    length: Any = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > most:
        raise too_long
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise too_long
        return message

    return limited
