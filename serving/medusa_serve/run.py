"""Running the application: sockets, signals, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from medusa_runtime import MedusaError, OptionError
from medusa_serve.app import create_app
from medusa_serve.guards.connection import GuardedProtocol
from medusa_serve.settings import ServerSettings
from medusa_serve.state import ServedBundle, ServerState

BACKLOG = 2048
LAST_SECONDS = 5  # for the last events to reach their clients, once all requests have ended
log = logging.getLogger(__name__)


def serve(settings: ServerSettings, served: ServedBundle, tell: Callable[[str], None]) -> None:
    """Serve a bundle until SIGTERM or SIGINT.

    The first signal drains: no request is taken any more, and those under way have `grace` seconds. The second ends them now.

    Args:
        settings: the operator's.
        served: the bundle.
        tell: gets a line when the server listens.

    Raises:
        OptionError: the address cannot be used, or another setting.
        MedusaError: the model cannot be loaded.
    """
    server = make_server(settings, served)
    with listening(settings) as listener:
        tell(f"listening on {address(settings, listener)}")
        server.run(sockets=[listener])
    failure = server.state.failure
    if isinstance(failure, MedusaError):
        raise failure
    if failure is not None:
        raise MedusaError(f"the model could not be loaded: {type(failure).__name__}: {failure}") from failure


def make_server(settings: ServerSettings, served: ServedBundle) -> Server:
    """The server of a bundle, ready to run. Errors as those of `create_app`."""

    def give_up() -> None:
        server.stop()

    app = create_app(settings, served, on_failure=give_up)
    config = uvicorn.Config(
        app,
        http=functools.partial(  # type: ignore[arg-type] # it is called as a class is
            GuardedProtocol, header_seconds=settings.header_seconds, idle_seconds=settings.idle_seconds
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=settings.root_path.rstrip("/"),
        backlog=BACKLOG,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=max(1, round(settings.idle_seconds)),
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    server = Server(config, app.state.server)
    return server


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it ends."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def stop(self) -> None:
        """End without waiting for requests."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT has come. Any thread may call it."""
        del frame
        self._num_signals += 1
        if self._num_signals > 2:
            os._exit(128 + sig)
        if self._loop is None:
            self.stop()
        else:
            self._loop.call_soon_threadsafe(self._drain if self._num_signals == 1 else self._end_now)

    def _drain(self) -> None:
        self._draining = asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        await self.state.drain(self.state.settings.grace)
        self.stop()

    def _end_now(self) -> None:
        self.state.stop_all()
        self.stop()


@contextlib.contextmanager
def listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket that listens at the address of the settings. A Unix socket is deleted afterwards.

    Raises:
        OptionError: the address cannot be used.
    """
    try:
        listener = _unix_socket(settings.uds) if settings.uds is not None else _tcp_socket(settings.host, settings.port)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        raise OptionError(f"cannot listen on {where}: {os.strerror(error.errno) if error.errno else error}") from error
    try:
        yield listener
    finally:
        listener.close()
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _tcp_socket(host: str, port: int) -> socket.socket:
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(where[:2], family=family, backlog=BACKLOG)


def _unix_socket(path: Path) -> socket.socket:
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _is_in_use(path):
        path.unlink()  # left by a server that was killed
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _is_in_use(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def address(settings: ServerSettings, listener: socket.socket) -> str:
    """Where the server can be reached, for people."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path.rstrip('/')}"
