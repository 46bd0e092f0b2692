"""Keeps the server busy for a while, then storms it, and checks that it loses nothing and holds on to nothing.

    python bench/http_soak.py BUNDLE [--minutes 10] [--streams 16] [-o bench/results/http_soak.json]
    python bench/http_soak.py BUNDLE --minutes 0 --clients 500        # the storm alone

The soak sends random requests. It counts what was answered, and watches the server's memory. The storm sends clients of four
kinds: killed in the middle of a stream, too slow to read, with bodies that are too large, and with malformed bodies. After
each kind, the server must be idle: no answer in a slot or in the queue, no open stream, no more threads and open files than
before. The load comes from a process of its own. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish
from http_servers import Server, medusa_server

from medusa_export.measure.bench.process import WORKERS, WorkerProcess
from serving import PROMPTS

MAX_BYTES = 1 << 20
IDLE_SECONDS = 5.0  # after which the server cuts off clients that do not read; the storm's wait longer
SETTLE_SECONDS = 60.0
SAMPLE_SECONDS = 5.0
FILLING_ROUNDS = 40
SLOW_SHARE = 100  # one client of so many is slow: each must be sent megabytes before the system's buffers are full
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "medusa_open_streams")
EXPECTED = {  # outcomes of the storm's clients that are right
    "killed": {"cut", "status 429"},
    "slow": {"cut off by the server"},
    "oversized": {
        "status 413",
        "ClientOSError",
        "ServerDisconnectedError",
        "ClientConnectionResetError",
    },  # not read to its end
    "malformed": {"status 400"},
}


def soaked(server: Server, load: WorkerProcess, minutes: float, streams: int) -> dict[str, Any]:
    """Warm the server up, keep it busy, and tell what became of the requests and of the memory."""
    warm = max(10.0, min(60.0, 6 * minutes))
    words: dict[str, Any] = {"url": server.url, "prompts": list(PROMPTS), "streams": streams}
    warmed_up = load.ask("soak", **words, seconds=warm, seed=1)
    series: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load.ask, "soak", **words, seconds=60 * minutes, seed=2)
        while not running.done():
            series.append(round(server.memory_bytes() / 1e6, 1))
            time.sleep(SAMPLE_SECONDS)
        counts = running.result()
    part = max(1, len(series) // 10)
    first, last = (sum(some) / part for some in (series[:part], series[-part:]))
    return {
        "minutes": minutes,
        "streams": streams,
        "warm_up": {"seconds": warm} | warmed_up,
        "outcome": counts,
        "memory_megabytes": {"first_tenth": round(first, 1), "last_tenth": round(last, 1), "most": max(series)},
        "memory_change": round(last / first - 1, 4),
        "idle_after": idle(server),
    }


def fill_pools(server: Server, load: WorkerProcess, streams: int) -> None:
    """Storm the server until its pools of threads are as large as they get. They are bounded, but grow one by one."""
    same, before = 0, server.holds()["threads"]
    for _ in range(FILLING_ROUNDS):
        now = stormed(server, load, "killed", 4 * streams, streams)["after"]["threads"]
        same, before = same + 1 if now == before else 0, now
        if same == 3:
            return
    raise click.ClickException(f"the server's threads grow without end: {before} after {FILLING_ROUNDS} rounds")


def stormed(server: Server, load: WorkerProcess, kind: str, clients: int, streams: int) -> dict[str, Any]:
    """Send clients of one kind, and tell their outcomes and what the server holds afterwards."""
    before = server.holds()
    words: dict[str, Any] = {"url": server.url, "kind": kind, "prompts": list(PROMPTS), "seed": 3, "max_bytes": MAX_BYTES}
    outcome = load.ask("storm", **words, clients=clients, streams=streams)
    after, is_idle = settled(server, before)
    return {
        "clients": clients,
        "outcome": outcome,
        "unexpected": sum(count for name, count in outcome.items() if name not in EXPECTED[kind]),
        "before": before,
        "after": after,
        "idle_after": is_idle,
        "memory_megabytes_after": round(server.memory_bytes() / 1e6, 1),
    }


def settled(server: Server, before: dict[str, int]) -> tuple[dict[str, int], bool]:
    """Wait until the server is idle and holds no more than before, or for some time."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not (is_idle := idle(server)) or server.holds()["descriptors"] > before["descriptors"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return server.holds(), is_idle


def idle(server: Server) -> bool:
    """Whether the server has nothing under way."""
    return not any(server.metric(name) for name in BUSY)


def wrongs(result: dict[str, Any]) -> list[str]:
    """What is wrong, in words."""
    found = []
    if (soak := result.get("soak")) is not None:
        found += [f"soak: {name}" for name in soak["outcome"] if name.startswith("error")]
        found += [] if soak["idle_after"] else ["soak: something is under way at the end"]
    for kind, one in result.get("storm", {}).items():
        found += [f"{kind}: {one['unexpected']} unexpected outcomes"] if one["unexpected"] else []
        found += [] if one["idle_after"] else [f"{kind}: something is under way at the end"]
        leaks = [name for name in one["before"] if one["after"][name] > one["before"][name]]
        found += [f"{kind}: more {name} than before" for name in leaks]
    return found


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--minutes", default=10.0, show_default=True, type=click.FloatRange(0), help="How long to soak; 0 for not at all."
)
@click.option("--streams", default=16, show_default=True, type=click.IntRange(1), help="Requests at a time.")
@click.option("--clients", default=500, show_default=True, type=click.IntRange(0), help="Clients of the storm; 0 for none.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, minutes: float, streams: int, clients: int, output: Path | None) -> None:
    """Soak and storm a server on BUNDLE."""
    here = Path(__file__)
    path = {"PYTHONPATH": ":".join([str(WORKERS), *filter(None, sys.path)])}
    options = ("--idle-seconds", str(IDLE_SECONDS), "--max-body-bytes", str(MAX_BYTES), "--max-queue", "512")
    result = environment()
    with (
        WorkerProcess("load", [sys.executable, str(here.with_name("http_load.py"))], path) as load,
        medusa_server(bundle, streams, *options) as server,
    ):
        if minutes:
            result["soak"] = soaked(server, load, minutes, streams)
        if clients:
            fill_pools(server, load, 2 * streams)
            numbers = dict.fromkeys(EXPECTED, clients) | {"slow": max(1, clients // SLOW_SHARE)}
            result["storm"] = {kind: stormed(server, load, kind, number, 2 * streams) for kind, number in numbers.items()}
    result["wrong"] = wrongs(result)
    publish(result, output)
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
