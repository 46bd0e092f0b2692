"""The edge guide's memory table is what its formulas give."""

from __future__ import annotations

from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "edge-guide.md"
BYTES, HEADS, NODES, PREFILL, CAPACITY = 2, 4, 64, 512, 2048 + 64


def rows() -> list[list[str]]:
    lines = GUIDE.read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| model | L |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_memory_table_is_what_its_formulas_give() -> None:
    assert [row[0] for row in rows()] == ["SmolLM2-135M", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"]
    for name, *cells in rows():
        layers, kv_heads, head_dim, hidden, inner, vocabulary = map(int, cells[:6])
        parts = [
            BYTES * float(cells[6]) * 1e6,
            BYTES * (HEADS * hidden * (2 * hidden + 1) + vocabulary * hidden),
            2 * layers * kv_heads * head_dim * BYTES * CAPACITY,
            NODES * vocabulary * BYTES,
            max(18 * NODES * vocabulary, PREFILL * (2 * inner + 4 * hidden) * BYTES),
        ]
        told = [int(cell) for cell in cells[7:]]
        assert all(abs(part / 1e6 - cell) <= 0.55 for part, cell in zip([*parts, sum(parts)], told, strict=True)), name
