"""Makes the README's table of decoding speeds from bench/results/bench.json, so that it says what was measured.

python bench/readme_table.py            # print the table
python bench/readme_table.py --write    # put it into README.md, in the place of the one that is there
"""

from __future__ import annotations

import json
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
RESULT, README = ROOT / "bench/results/bench.json", ROOT / "README.md"
COLUMNS = ("engine", "int8", "int8, `--activation-bits 8`", "int8-blocks", "int8-blocks, `--rotate`", "fp32")
BUNDLES = ("int8", "int8-fast", "int8-blocks", "int8-blocks-rotated", "fp32")
ROWS: dict[str, tuple[str | None, ...]] = {  # an engine -> its contestants, by column
    "medusa-export with heads, n-grams and prompt lookup": tuple(f"{bundle} lookup" for bundle in BUNDLES),
    "medusa-export with heads and n-grams": tuple(f"{bundle} heads" for bundle in BUNDLES),
    "medusa-export, plain decoding": tuple(f"{bundle} plain" for bundle in BUNDLES),
    "ONNX Runtime GenAI": (None, None, "onnxruntime-genai-int8", None, "onnxruntime-genai-fp32"),
    "llama.cpp": (None, None, "llama.cpp-q8_0", None, None),
}


def table() -> str:
    """The table, as Markdown. Tokens per second are medians over the answers."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    speeds = {one["name"]: one["tokens_per_second"] for one in result["contestants"]}
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for engine, names in ROWS.items():
        lines.append((engine, *("" if name is None else f"{speeds[name]:.0f}" for name in names)))
    return "".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|\n" for line in lines).replace("| --- ", "|---")


def present(text: str) -> str:
    """The table that a text has: its lines from the heading on."""
    start = text.index(f"| {COLUMNS[0]} | {COLUMNS[1]} |")
    return text[start : text.index("\n\n", start) + 1]


@click.command()
@click.option("--write", is_flag=True, help="Put it into README.md.")
def main(*, write: bool) -> None:
    """Print the table of decoding speeds."""
    if write:
        text = README.read_text(encoding="utf-8")
        README.write_text(text.replace(present(text), table()), encoding="utf-8")
    else:
        click.echo(table(), nl=False)


if __name__ == "__main__":
    main()
