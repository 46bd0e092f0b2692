"""Prints a benchmark's result as tables, and writes a CSV file with one row per contestant."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.table import Table

from medusa_export.console import stdout_console
from medusa_export.measure.bench.result import slower_than_plain
from medusa_runtime.bundle.files import write_whole

COLUMNS = (
    "name", "kind", "bundle", "mode", "precision", "num_answers", "tokens_per_second", "tokens_per_second_p10",
    "tokens_per_second_p90", "tokens_per_second_with_prompt", "first_token_ms", "ms_per_token_p50", "ms_per_token_p95",
    "tokens_per_step", "ms_per_step",
)  # fmt: skip
FILE_WIDTH = 140  # columns, if stdout is not a terminal
PARTS = ("step", "propose", "commit", "other", "text")


def print_result(result: dict[str, Any]) -> None:
    """Print tables to stdout, and warnings below them."""
    console = stdout_console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    prompts, settings = result["prompts"], result["settings"]
    console.print(
        f"{prompts['count']} prompts, {settings['max_new_tokens']} new tokens each, greedy, rounds: {settings['rounds']}, "
        f"threads: {settings['threads']}",
        markup=False,
    )
    tables = (_contestants(result), _parts(result), _ratios(result), _steps(result), _context(result), _lengths(result))
    for table in tables:
        if table.row_count:
            console.print(table)
    for line in _lines(result):
        console.print(line, markup=False, soft_wrap=True)


def write_csv(result: dict[str, Any], path: Path) -> None:
    """Write one row per contestant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, *(f"{part}_ms_per_step" for part in PARTS), "peak_mb", "num_equal"))
    for one in result["contestants"]:
        parts, memory, agreement = one["ms_per_step_parts"] or {}, one["memory_mb"] or {}, one["agreement"] or {}
        shares = (parts.get(part) for part in PARTS)
        writer.writerow((*(one[name] for name in COLUMNS), *shares, memory.get("peak_mb"), agreement.get("num_equal")))
    write_whole(path, text.getvalue())


def _contestants(result: dict[str, Any]) -> Table:
    table = Table(
        "contestant", "tokens/s", "p10 to p90", "first token ms", "ms/token", "p95", "tokens/step", "ms/step", "peak MB",
        "equal answers",
    )  # fmt: skip
    for one in sorted(result["contestants"], key=lambda entry: -(entry["tokens_per_second"] or 0)):
        agreement, memory = one["agreement"], one["memory_mb"]
        table.add_row(
            one["name"],
            _number(one["tokens_per_second"]),
            f"{_number(one['tokens_per_second_p10'])} to {_number(one['tokens_per_second_p90'])}",
            _number(one["first_token_ms"], 0),
            _number(one["ms_per_token_p50"]),
            _number(one["ms_per_token_p95"]),
            _number(one["tokens_per_step"], 2),
            _number(one["ms_per_step"]),
            _number(memory and memory["peak_mb"], 0),
            f"{agreement['num_equal']} of {agreement['num_answers']}" if agreement else "",
        )
    return table


def _parts(result: dict[str, Any]) -> Table:
    table = Table("ms per step", "forward pass", "heads", "commit", "other", "text (not counted)")
    for one in result["contestants"]:
        if parts := one["ms_per_step_parts"]:
            table.add_row(one["name"], *(_number(parts[part], 2) for part in PARTS))
    return table


def _ratios(result: dict[str, Any]) -> Table:
    table = Table("contestant", "compared with", "median speed-up", "95% interval")
    for pair in result["ratios"]:
        table.add_row(pair["above"], pair["below"], f"{pair['ratio']:.3f}", f"{pair['low']:.3f} to {pair['high']:.3f}")
    return table


def _steps(result: dict[str, Any]) -> Table:
    section = result.get("steps", {"by_bundle": {}})
    widths = list(next(iter(section["by_bundle"].values()), {"step_ms": {}})["step_ms"])
    table = Table("ms per step, by tokens in it", *widths, "heads")
    for bundle, costs in section["by_bundle"].items():
        table.add_row(bundle, *(_number(costs["step_ms"][width]) for width in widths), _number(costs["heads_ms"], 2))
    return table


def _context(result: dict[str, Any]) -> Table:
    section = result.get("context", {"used": {}, "unused": {}, "widths": []})
    lengths = list(next(iter(section["used"].values()), {}))
    table = Table("ms per step, by context", *lengths)
    for kind in ("used", "unused"):
        for bundle, by_length in section[kind].items():
            for width in map(str, section["widths"]):
                row = (_number(by_length[length][width]) if length in by_length else "" for length in lengths)
                table.add_row(f"{bundle}, T={width}, {kind}", *row)
    return table


def _lengths(result: dict[str, Any]) -> Table:
    section = result.get("lengths", {"first_token_ms": {}, "ms_per_token": {}})
    lengths = sorted({length for found in section["first_token_ms"].values() for length in found}, key=int)
    table = Table("by prompt tokens", *lengths)
    for title, kind in (("first token ms", "first_token_ms"), ("then ms/token", "ms_per_token")):
        for name, found in section[kind].items():
            table.add_row(f"{name}, {title}", *(_number(found.get(length)) for length in lengths))
    return table


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"floor of {name}: {floor['weight_mb']:.0f} MB of weights at {floor['bandwidth_gb_per_s']:.1f} GB/s, "
        f"{floor['ms']:.1f} ms per step"
        for name, floor in result["floors"].items()
    ]
    lines += [f"not measured: {name}: {why}" for kind in ("absent", "failed") for name, why in result[kind].items()]
    if slower := slower_than_plain(result):
        lines.append(slower)
    if not result["complete"]:
        lines.append("incomplete: the benchmark was interrupted")
    return lines


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
