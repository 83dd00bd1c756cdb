"""The server process: binds, tells where it is, and stops cleanly."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from qft.bundle.manifest import Bundle
from qft.errors import InputError
from qft.serve.app import Service, make_app

_SECONDS_TO_STOP = 5  # for answers on their way: each ends after the step it is in


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._on_ready = service, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.turns.stop()
        super().handle_exit(sig, frame)


def serve(
    bundle: Bundle,
    *,
    host: str,
    port: int,
    key: str | None,
    waiting: int,
    most_tokens: int,
    on_ready: Callable[[str, Service], None],
) -> None:
    """Answer until interrupted. port 0: any that is free. on_ready: is told the address and what is served.

    Raises InputError for a host that others can reach without a key, or an address that cannot be had.
    """
    if not key and not _is_loopback(host):
        raise InputError(
            f"{host} can be reached by others, so a key is needed",
            where="--host",
            hint="set QFT_KEY, or --key; clients send it as their API key",
        )
    with _bound(host, port) as listening:
        service = Service(bundle, waiting=waiting, most_tokens=most_tokens)
        name, number = listening.getsockname()[:2]
        url = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
        config = uvicorn.Config(
            make_app(service, key=key),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_SECONDS_TO_STOP,
            server_header=False,
        )
        try:
            _Server(config, service, lambda: on_ready(url, service)).run(sockets=[listening])
        except KeyboardInterrupt:
            pass  # uvicorn has stopped, and passes the signal on
        finally:
            service.turns.stop()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> Any:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host}:{port}: {error}", where="--host, --port", hint="--port 0 takes any that is free"
        ) from None
