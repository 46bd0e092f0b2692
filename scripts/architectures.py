"""Find out what works for each decoder type of Transformers, on tiny random models, and write it as JSON.

python scripts/architectures.py --all --json build/architectures.json
python scripts/architectures.py llama mixtral --only-float
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.architectures import check_apart, warm_up
from tests.support.architectures_page import page
from tests.support.zoo import TYPES


def main() -> None:
    """Check the types, one after another, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="decoder types, such as mixtral")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--json", type=Path, help="where to write what was found; other rows and checks are kept")
    parser.add_argument("--page", type=Path, help="where to write the page with the rows of the JSON file")
    parser.add_argument("--only-traced", action="store_true", help="compare what would be traced; no export. A second a type")
    parser.add_argument("--only-float", action="store_true", help="export and validate; no int8, no TensorRT-RTX engines")
    parser.add_argument("--webgpu", action="store_true", help="also compare on WebGPU, by a driver in software if there is one")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one type")
    options = parser.parse_args()
    if unknown := sorted({*options.types} - {*TYPES}):
        parser.error(f"unknown type {unknown[0]}; known: {', '.join(TYPES)}")
    rows = json.loads(options.json.read_text(encoding="utf-8")) if options.json is not None and options.json.is_file() else {}
    types = TYPES if options.all else options.types
    if types:
        warm_up()
    for model_type in types:
        with TemporaryDirectory() as scratch:
            export, further = not options.only_traced, not options.only_float
            parts = {"export": export, "quantize": further, "engines": further, "webgpu": options.webgpu}
            row = check_apart(model_type, Path(scratch) / "type", options.timeout, **parts)
        seconds = sum(row.seconds.values())
        print(f"{model_type:22} {row.outcome:8} {row.work:7} {seconds:6.1f} s  {row.reason}", flush=True)
        before = rows.get(model_type, {}).get("checks", {}) if row.outcome == "passes" else {}
        rows[model_type] = row.to_json() | {"checks": before | row.checks}
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.page is not None:
        options.page.write_text(page(rows.values(), transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
