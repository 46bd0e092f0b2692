"""Runs replicas on Ray Serve until a signal: starts Ray on this machine if there is none, and stops what it started."""

from __future__ import annotations

import logging
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

from medusa_runtime import MedusaError, OptionError
from medusa_serve.ray_app import NAME, app
from medusa_serve.ray_settings import RaySettings
from medusa_serve.run import address, listening
from medusa_serve.settings import ServerSettings

POLL_SECONDS = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PROXY_SECONDS = 30.0  # for the proxy to answer at its address


def serve_on_ray(settings: RaySettings, door: ServerSettings, tell: Callable[[str], None]) -> None:
    """Serve a bundle by replicas until SIGTERM or SIGINT.

    After the first signal, no request is taken, and those under way have `grace` seconds. The second signal ends them now.

    Args:
        settings: the operator's.
        door: where Ray's proxy listens: its host and port.
        tell: gets a line when requests are taken.

    Raises:
        OptionError: the address cannot be used, or the replicas do not fit into the cluster.
        MedusaError: the replicas cannot be started.
    """
    application = app(settings)
    with _interrupts(), _ray(door):
        try:
            check_room(settings, ray.nodes())  # type: ignore[no-untyped-call]
            with _proxy(door) as url, _deployed(application):
                _check_address(url)
                tell(f"listening on {url}")
                while True:
                    signal.pause()
        except KeyboardInterrupt:
            tell("shut down")


def check_room(settings: RaySettings, nodes: list[dict[str, Any]]) -> None:
    """Check that the replicas fit into a cluster; Ray would wait for more machines for ever.

    Args:
        settings: the operator's.
        nodes: the machines, as Ray tells them.

    Raises:
        OptionError: they do not fit.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    if settings.gpus:
        room, what = sum(int(one.get("GPU", 0)) for one in machines), "a replica has a GPU"
    elif settings.threads:
        room = sum(int(one.get("CPU", 0) / settings.threads) for one in machines)
        what = f"a replica has {settings.threads} cores of a machine (--threads)"
    else:
        room, what = len(machines), "a replica has a machine to itself, unless --threads says how many cores it has"
    if settings.least_replicas > room:
        raise OptionError(f"{settings.least_replicas} replicas do not fit, there is room for {room}: {what}")


@contextmanager
def _interrupts() -> Iterator[None]:
    """SIGTERM does what SIGINT does: it raises KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _take_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


@contextmanager
def _ray(door: ServerSettings) -> Iterator[None]:
    """Connect to the Ray cluster of RAY_ADDRESS or of this machine. If there is none, start one, and stop it afterwards."""
    where = os.environ.get("RAY_ADDRESS", "auto")
    try:
        try:
            if where != "local":
                ray.init(address=where, namespace="serve", logging_level=logging.WARNING)
        except ConnectionError:
            if where != "auto":
                raise
        if not ray.is_initialized():
            with listening(door):  # Ray's proxy would try for half a minute to get a port that is in use
                pass
            ray.init(address="local", namespace="serve", include_dashboard=False, logging_level=logging.WARNING)
        _take_signals()  # Ray has set handlers of its own
        yield
    finally:
        ray.shutdown()


@contextmanager
def _proxy(door: ServerSettings) -> Iterator[str]:
    """Have Serve listen at an address. Gives the URL. Serve is stopped afterwards, unless it ran before."""
    ran_before = bool(serve.status().proxies)
    port, url = door.port, f"http://{door.host}:{door.port}"
    if not ran_before:
        with listening(door) as listener:
            port, url = listener.getsockname()[1], address(door, listener)
    try:
        serve.start(http_options={"host": door.host, "port": port})
        yield url
    finally:
        if not ran_before:
            serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _deployed(application: serve.Application) -> Iterator[None]:
    """Start the replicas. They are stopped afterwards, once their requests have ended."""
    if NAME in serve.status().applications:
        raise OptionError(f"this Ray cluster runs the application {NAME!r} already; stop that one first")
    try:
        try:
            serve.run(application, name=NAME)
        except RuntimeError as error:
            told = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise MedusaError(f"the replicas could not be started: {told[-1] if told else error}") from error
        yield
    finally:
        serve.delete(NAME, _blocking=False)
        while NAME in serve.status().applications:
            time.sleep(POLL_SECONDS)


def _check_address(url: str) -> None:
    """If Serve ran before, its proxy may listen elsewhere."""
    deadline = time.monotonic() + PROXY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/-/healthz", timeout=PROXY_SECONDS):  # noqa: S310 - http
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise MedusaError(f"Ray's proxy does not answer on {url}; does it listen elsewhere? {error}") from error
            time.sleep(POLL_SECONDS)
