"""A server at work: uvicorn, with limits that it does not have itself, until somebody stops it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from offload_triforce.errors import InputError
from offload_triforce.server.options import ServerOptions


class ImpatientProtocol(H11Protocol):
    """HTTP for clients that send a request's head within ``seconds``; others are cut off."""

    seconds = 30.0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Some bytes of it."""
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.seconds, self._cut)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _cut(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def check_port(options: ServerOptions) -> None:
    """Refuse an address that cannot be listened at, before a model is loaded for nothing.

    Raises:
        InputError: why not.
    """
    host = options.host.strip("[]")
    try:
        family = socket.getaddrinfo(host, options.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, options.port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{host} cannot be listened at on port {options.port}: {reason}; take another --port"
        ) from error


class Server(uvicorn.Server):
    """A server that ends in good order on SIGTERM and Ctrl-C, and leaves the rest to whoever runs it."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. uvicorn's own would be raised again at the end, before the engine is closed."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def make_server(app: FastAPI, options: ServerOptions, log_level: str = "info") -> Server:
    """A server that is ready to run: ``run()``, or ``await serve()``."""
    protocol = type("Protocol", (ImpatientProtocol,), {"seconds": options.read_seconds})
    config = uvicorn.Config(
        app,
        host=options.host.strip("[]"),
        port=options.port,
        http=protocol,
        ws="none",
        log_level=log_level,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(options.grace_seconds)),
    )
    return Server(config)


@contextlib.contextmanager
def in_background(app: FastAPI, options: ServerOptions) -> Iterator[str]:
    """The address of a server that runs in a thread of this process meanwhile.

    Raises:
        RuntimeError: it did not start, or did not end.
    """
    server = make_server(app, options, "warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
    if thread.is_alive():
        raise RuntimeError("the server did not end")
