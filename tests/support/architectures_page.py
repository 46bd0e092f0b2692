"""The page docs/architectures.md, made from what was found for each decoder type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = {  # check -> its heading
    "traced": "traced",
    "prompts": "prompts",
    "tree": "trees",
    "greedy": "greedy",
    "int8": "int8",
    "engines": "TensorRT-RTX",
    "webgpu": "WebGPU",
}
YES, NO, NOT_TRIED = "yes", "**no**", ""
HEAD = """# Architectures

Decoder types of Transformers {transformers}, each as a tiny random model that has all of the type's mechanisms
(experts, sliding windows, sinks, …), compared with PyTorch. No type has code of its own: what works goes by mechanism.
**{passing} of {all} pass**; the others are refused in one line, before any work.

This page is made by a program, on any machine with the `dev` extra:

<!-- not-run time: an hour; tests/integration/test_architectures.py runs it for some types -->
```console
$ python scripts/architectures.py --all --webgpu --json build/architectures.json --page docs/architectures.md
```

The columns: what is traced, run in PyTorch in chunks and with two branches, gives the model's logits (*traced*); logits
after every token of prompts, read whole and in chunks (*prompts*), and after every node of a candidate tree (*trees*),
differ from PyTorch's by rounding alone, for the portable graphs and those for the CPU; greedy decoding through the
runtime, with and without Medusa, gives PyTorch's tokens (*greedy*); a bundle rounded to 8 bits passes its own checks
(*int8*); engines are built from the graphs, which needs no GPU (*TensorRT-RTX*); and prompts, trees and greedy decoding
hold on WebGPU as well, on a Vulkan driver in software (*WebGPU*). An empty cell: not tried. CI repeats *traced* and the
refusals for every type, everything but WebGPU for one type of each mechanism, and WebGPU for eight types.

A checkpoint of such a type works like its tiny model unless its settings ask for something else; `medusa-export onnx`
compares each export with PyTorch. [Bring your own model](bring-your-own-model.md) says what a refusal means.

## Types that pass

"""


def page(rows: Iterable[dict[str, Any]], transformers: str) -> str:
    """The page, as Markdown."""
    ordered = sorted(rows, key=lambda row: row["model_type"])
    passing = [row for row in ordered if row["outcome"] == "passes"]
    text = HEAD.format(transformers=transformers, passing=len(passing), all=len(ordered))
    text += _line(["type", "class", *COLUMNS.values()]) + _line(["---"] * (2 + len(COLUMNS)))
    text += "".join(table_row(row) for row in passing)
    text += "\n## Types that are refused\n\n" + _line(["type", "class", "reason"]) + _line(["---"] * 3)
    return text + "".join(table_row(row) for row in ordered if row["outcome"] != "passes")


def table_row(row: dict[str, Any]) -> str:
    """A type's line in one of the page's tables."""
    cells = [f"`{row['model_type']}`", f"`{row['architecture']}`"]
    if row["outcome"] == "passes":
        return _line([*cells, *(_cell(row["checks"].get(check)) for check in COLUMNS)])
    return _line([*cells, reason(row)])


def reason(row: dict[str, Any]) -> str:
    """Why a type is refused, without the name of the class that the line begins with and the page that it points to."""
    text = row["reason"].removeprefix(f"{row['architecture']} is not supported: ")
    return text.replace(" (docs/architectures.md lists what is)", "").replace("|", "\\|")


def rows_of(text: str) -> dict[str, str]:
    """The lines of a page's tables, by type."""
    return {line.split("`")[1]: line + "\n" for line in text.splitlines() if line.startswith("| `")}


def agrees(line: str, row: dict[str, Any]) -> bool:
    """Whether a line of the page says what was found. Cells that are empty, here or there, say nothing."""
    said, found = line.split("|"), table_row(row).split("|")
    pairs = zip(found, said, strict=False)
    return len(said) == len(found) and all(mine == theirs for mine, theirs in pairs if mine.strip() and theirs.strip())


def _cell(found: str | None) -> str:
    return NOT_TRIED if found is None else YES if found == "passes" else NO


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"
