"""Running the application: listen, and on Ctrl-C or SIGTERM let the running requests finish before the engine ends."""

import asyncio
import contextlib
import logging
import socket
from typing import Any

import uvicorn

from semiopen.host.serving.engine import Engine

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # uvicorn's 5 often end a connection at the moment a client takes it up again
CLOSING_SECONDS = 10.0  # for the last answers, once the engine is closed


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds the address, taken before the engine's slow start.

    Raises:
        OSError: the address is not to be had.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"Cannot listen at {host}:{port} ({error.strerror}); give another --port.") from None
    return listener


class Server(uvicorn.Server):
    """A uvicorn server that closes its engine when the last request is done, or after a grace period."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._grace = grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, wait for running requests, then close the engine, which ends those that are left."""

        async def end() -> None:
            await asyncio.sleep(self._grace)
            await self._engine.close()

        ending = asyncio.create_task(end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ending
            await self._engine.close()


def make_server(app: Any, engine: Engine, grace_seconds: float) -> Server:
    """A server of the application, still to be run."""
    # Its own log names clients and paths for each request; errors come through our logger, without prompts.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(grace_seconds + CLOSING_SECONDS),  # type: ignore[arg-type] - seconds
    )
    return Server(config, engine, grace_seconds)


def serve(listener: socket.socket, app: Any, engine: Engine, grace_seconds: float) -> None:
    """Serve an engine until a signal ends this process, and close the engine.

    Args:
        listener: where to listen, from `listen`.
        app: of `create_app`.
        engine: what the application serves.
        grace_seconds: how long running requests may go on after the signal.
    """

    async def run() -> None:
        try:
            await make_server(app, engine, grace_seconds).serve([listener])
        finally:
            await engine.close()

    with listener, asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        runner.run(run())
