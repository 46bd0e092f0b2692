"""Running the application: sockets, signals, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import resource
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
LAST_SECONDS = 5  # for what is left in buffers to reach its clients, once all requests have ended
AT_ONCE_SECONDS = 1  # after a second signal, for the last events
OTHER_FILES = 256  # that the process has open, beside one for each connection
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
    allow_connections(settings.max_connections)
    with listening(settings) as listener:
        tell(f"listening on {address(settings, listener)}")
        server.run(sockets=[listener])
    if server.is_loading:  # nothing can stop the thread that loads the model, and at the usual end it could crash
        logging.shutdown()
        os._exit(0)
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
            GuardedProtocol,
            header_seconds=settings.header_seconds,
            idle_seconds=settings.idle_seconds,
            max_connections=settings.max_connections,
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=settings.root_path.rstrip("/"),
        backlog=BACKLOG,
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

    @property
    def is_loading(self) -> bool:
        """Whether the server has ended, and the model is still being loaded."""
        return bool(self.config.app.state.is_loading)  # type: ignore[union-attr] # it is ours

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
        self.state.stop_all()  # then `_drained` goes on
        asyncio.get_running_loop().call_later(AT_ONCE_SECONDS, self.stop)


def allow_connections(count: int) -> None:
    """Let the process have a file open for each connection, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    if allowed < wanted:
        log.warning("the system lets this process open %d files, which are too few for %d connections", allowed, count)


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
        told = error.strerror if isinstance(error, socket.gaierror) or not error.errno else os.strerror(error.errno)
        raise OptionError(f"cannot listen on {where}: {told or error}") from error
    made = settings.uds.stat().st_ino if settings.uds is not None else None
    try:
        yield listener
    finally:
        if settings.uds is not None and settings.uds.exists() and settings.uds.stat().st_ino == made:
            settings.uds.unlink()  # before it is closed, because another server may then take its place
        listener.close()


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
        probe.setblocking(False)
        return probe.connect_ex(str(path)) != errno.ECONNREFUSED


def address(settings: ServerSettings, listener: socket.socket) -> str:
    """Where the server can be reached, for people."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path.rstrip('/')}"
