"""Answers on their way to a client: whole or as they come, and ended when the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qft.serve.errors import ApiError
from qft.serve.turns import Stopped, Ticket


@asynccontextmanager
async def until_gone(request: Request, ticket: Ticket) -> AsyncIterator[None]:
    """While the block runs, a client that goes takes its ticket with it; so does an error."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except Stopped:
        raise ApiError(499, "the client has gone") if ticket.cancelled else Stopped from None
    except BaseException:
        ticket.cancel()
        raise
    finally:
        watching.cancel()


async def collected(request: Request, ticket: Ticket) -> list[Any]:
    """All of an answer's events."""
    async with until_gone(request, ticket):
        return [one async for one in ticket.events()]


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, nobody writes on."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()
