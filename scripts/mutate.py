"""Changes one line of a module at a time and runs tests: a change that no test sees is a survivor. For developers.

    python scripts/mutate.py runtime/medusa_runtime/drafting/budget.py --tests tests/unit/test_batching.py
    python scripts/mutate.py MODULE... --tests FILE --tests FILE --sample 40 --seed 0 > survivors.jsonl
    python scripts/mutate.py MODULE... --tests FILE --again survivors.jsonl

A change is one of: another comparison, another arithmetic or logical operator, a number one more or one less, True for False, a
condition negated, a statement left out, None returned, min for max. Constants of a module (`DECAY = 0.98`) stay: a test would
only repeat them. The working tree is not touched: the tests import a temporary copy of the packages. They run once without a
change, to learn which functions each of them calls. Then each change is tried in a forked process, with the tests that call the
changed function. It counts as seen if one of them fails, if the import fails, or if they take much longer than before.

Survivors are printed as JSON lines, and the score at the end on stderr. The changes in the file `--equivalents` alter
nothing that matters, each for its "reason"; they are not tried.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("exporter", "runtime", "heads", "serving")
EQUIVALENTS = ROOT / "scripts" / "equivalent_mutants.jsonl"
LEAST_SECONDS, PATIENCE = 20, 5  # a run may take so long, and PATIENCE times what its tests take without a change
MOST_BYTES = 6 << 30  # of memory that the tests may take

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.MatMult: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd,
}  # fmt: skip
SWAPPED = {"min": "max", "argmin": "argmax", "minimum": "maximum", "any": "all", "floor": "ceil"}
SWAPPED |= {name: other for other, name in SWAPPED.items()}
NOT_RUN = {"annotation", "returns", "decorator_list", "exc", "msg", "format_spec"}  # and messages of errors
LEFT_OUT = (ast.Expr, ast.AugAssign, ast.Raise, ast.Break, ast.Continue, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """A change of one line."""

    module: str  # its path in the repository
    place: str  # the class and function that hold the line
    line: int
    before: str
    after: str
    is_in_function: bool

    def row(self) -> dict[str, Any]:
        """As it is reported."""
        row = asdict(self)
        del row["is_in_function"]
        return row

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the change when other lines move."""
        return self.module, self.place, self.before, self.after


def edits(node: ast.AST) -> list[dict[str, Any]]:
    """The changes of one node: fields with other values."""
    return [*other_operators(node), *other_values(node), *shorter_blocks(node)]


def other_operators(node: ast.AST) -> list[dict[str, Any]]:
    """A node with another operator, or a condition that is negated."""
    match node:
        case ast.Compare(ops=ops):
            return [{"ops": [*ops[:at], COMPARISONS[type(op)](), *ops[at + 1 :]]} for at, op in enumerate(ops)]
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) | ast.UnaryOp(op=ast.USub() as op):
            return [{"op": OPERATORS[type(op)]()}]
        case ast.UnaryOp(op=ast.Not(), operand=test):
            return [{"operand": ast.UnaryOp(ast.Not(), test)}]
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            return [{"test": ast.UnaryOp(ast.Not(), test)}]
        case _:
            return []


def other_values(node: ast.AST) -> list[dict[str, Any]]:
    """A node with another number or name, or without its result."""
    match node:
        case ast.Constant(value=bool(value)):
            return [{"value": not value}]
        case ast.Constant(value=int(value) | float(value)):
            return [{"value": value + 1}, {"value": value - 1}]
        case ast.Name(id=name) if name in SWAPPED:
            return [{"id": SWAPPED[name]}]
        case ast.Attribute(attr=name) if name in SWAPPED:
            return [{"attr": SWAPPED[name]}]
        case ast.Return(value=ast.expr() as result) if ast.unparse(result) != "None":
            return [{"value": ast.Constant(None)}]
    return []


def shorter_blocks(node: ast.AST) -> Iterator[dict[str, Any]]:
    """A node with blocks in which one statement is left out."""
    for name in ("body", "orelse", "finalbody"):
        block: Any = getattr(node, name, None)
        for at, statement in enumerate(block if isinstance(block, list) else ()):
            if can_be_left_out(statement):
                yield {name: [*block[:at], ast.copy_location(ast.Pass(), statement), *block[at + 1 :]]}


def can_be_left_out(statement: ast.stmt) -> bool:
    """Whether a module runs without a statement. Without `name = …` it does not, so that would be no test of the tests."""
    if isinstance(statement, ast.Assign):
        return not any(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets)
    return isinstance(statement, LEFT_OUT) and not is_text(statement)


def is_text(node: ast.AST) -> bool:
    """Whether a node is a docstring, an ellipsis or a log entry."""
    match node:
        case ast.Expr(value=ast.Constant() | ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
            return True
    return False


def is_choice(node: ast.AST) -> bool:
    """Whether a node gives a number a name, as `DECAY = 0.98` does. Such a number was chosen: a test would only repeat it."""
    return isinstance(node, ast.Assign) and all(
        name.id.isupper() for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
    )


def mutants(module: str, source: str) -> Iterator[tuple[Mutant, str]]:
    """All changes of a module, each with the changed source."""
    tree = ast.parse(source)

    def visit(node: ast.AST, place: str, statement: Any, function: ast.AST) -> Iterator[tuple[Mutant, str]]:
        statement = node if isinstance(node, ast.stmt) else statement
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            place, function = f"{place}.{node.name}".lstrip("."), node
        for edit in edits(node):
            [(name, new)] = edit.items()
            old = getattr(node, name)
            is_block = isinstance(new, list) and name != "ops"
            changed = next(one for one, other in zip(old, new, strict=True) if one is not other) if is_block else statement
            before = as_line(changed)
            setattr(node, name, new)
            after = "pass" if is_block else as_line(changed)
            inside = isinstance(function, ast.FunctionDef)
            yield Mutant(module, place, changed.lineno, before, after, inside), ast.unparse(ast.fix_missing_locations(tree))
            setattr(node, name, old)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if name not in NOT_RUN and isinstance(child, ast.AST) and not is_text(child) and not is_choice(child):
                    yield from visit(child, place, statement, function)

    yield from visit(tree, "", tree, tree)


def as_line(statement: ast.AST) -> str:
    """A statement as one line; of a compound one, its head."""
    text = ast.unparse(ast.fix_missing_locations(statement))
    lines = [line.strip() for line in text.splitlines()]
    return next(line for line in lines if not line.startswith("@")) if hasattr(statement, "body") else " ".join(lines)


class Calls:
    """A pytest plugin that notes which tests call which functions of the packages, or runs only some tests.

    Args:
        folder: of the packages.
        chosen: the tests to run, and the seconds that each takes: the fastest runs first. None for all tests, with notes.
    """

    def __init__(self, folder: Path, chosen: dict[str, float] | None) -> None:
        self.tests_of: dict[str, set[str]] = defaultdict(set)  # by file and function
        self.seconds: dict[str, float] = {}  # by test
        self._folder, self._chosen, self._test = str(folder), chosen, ""
        self._names: dict[CodeType, str] = {}  # of functions of the packages; empty for all others

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the other tests."""
        if (order := self._chosen) is not None:
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note the calls of a test, in all its threads."""
        self._test = item.nodeid
        for module in [module for module in list(sys.modules.values()) if _is_of(module, (self._folder,))]:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):  # else only the first test would call such a function
                    value.cache_clear()
        tell = self._note if self._chosen is None else None
        sys.settrace(tell)
        threading.settrace(tell)
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[self._test] = time.perf_counter() - started

    def _note(self, frame: FrameType, *_: object) -> None:
        code = frame.f_code
        if code not in self._names:
            is_ours = code.co_filename.startswith(self._folder)
            place = code.co_qualname.replace(".<locals>", "")
            self._names[code] = f"{code.co_filename[len(self._folder) + 1 :]} {place}" if is_ours else ""
        if name := self._names[code]:
            self.tests_of[name].add(self._test)


class Runner:
    """Runs tests in forked processes, on a copy of the packages.

    Args:
        scratch: an empty folder for the copy and for what the tests write.
        tests: files of tests, relative to the repository.
        most: for each change, only the fastest tests that together take so many seconds are run.
    """

    def __init__(self, scratch: Path, tests: Sequence[str], most: float) -> None:
        self._scratch, self._tests, self._most = scratch, tests, most
        self._tests_of: dict[str, set[str]] = {}
        self._seconds: dict[str, float] = {}
        for name in PACKAGES:
            shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        folders = [str(scratch / name) for name in PACKAGES]
        sys.path[:0] = [*folders, str(ROOT)]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # of programs that tests start
        os.environ |= {"CI": "true", "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "examples")}  # the same examples each time

    def begin(self, modules: Sequence[str]) -> None:
        """Run the tests without a change, twice: to learn what they import, and how long they take.

        Raises:
            click.ClickException: they fail.
        """
        if self.run(None):
            raise click.ClickException(f"the tests fail without any change:\n{self._log.read_text(encoding='utf-8')[-3000:]}")
        found = json.loads((self._scratch / "found").read_text(encoding="utf-8"))
        self._seconds = found["seconds"]
        self._tests_of = {name: set(tests) for name, tests in found["tests_of"].items()}
        for name in found["imported"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        sys.dont_write_bytecode = True  # a stale file would hide a change
        for module in modules:
            for compiled in (self._scratch / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
                compiled.unlink()

    def changed(self, mutant: Mutant, source: str) -> int | None:
        """Run the tests that call a changed function. Returns pytest's exit code; None if they took too long."""
        path = self._scratch / mutant.module
        original = path.read_text(encoding="utf-8")
        path.write_text(source, encoding="utf-8")
        called = self._tests_of.get(f"{mutant.module} {mutant.place}", set()) if mutant.is_in_function else self._seconds
        fastest, total = sorted(called, key=lambda test: self._seconds[test]), 0.0
        chosen: dict[str, float] = {}
        for test in fastest:
            total += self._seconds[test]
            if total <= self._most or not chosen:
                chosen[test] = self._seconds[test]
        try:
            return self.run(chosen) if chosen else 0
        finally:
            path.write_text(original, encoding="utf-8")

    def run(self, chosen: dict[str, float] | None) -> int | None:
        """Run some tests, or all, in a forked process. Returns pytest's exit code; None if they took too long."""
        if (child := os.fork()) == 0:
            self._in_child(chosen)
        limit = LEAST_SECONDS + PATIENCE * sum(chosen.values()) if chosen else float("inf")
        until = time.monotonic() + limit
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return abs(os.waitstatus_to_exitcode(status))
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None

    @property
    def _log(self) -> Path:
        return self._scratch / "log"

    def _in_child(self, chosen: dict[str, float] | None) -> NoReturn:
        code = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))  # a loop without end may fill the memory
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(ROOT)
            calls = Calls(self._scratch, chosen)
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            code = int(pytest.main([*arguments, "--basetemp", str(self._scratch / "tmp"), *self._tests], plugins=[calls]))
            if chosen is None:
                ours = (str(self._scratch), str(ROOT))
                others = {name.partition(".")[0] for name, module in list(sys.modules.items()) if not _is_of(module, ours)}
                tests_of = {name: sorted(tests) for name, tests in calls.tests_of.items()}
                told = {"imported": sorted(others), "tests_of": tests_of, "seconds": calls.seconds}
                (self._scratch / "found").write_text(json.dumps(told), encoding="utf-8")
        except BaseException:  # noqa: BLE001 - nothing may pass the fork
            traceback.print_exc()
        finally:
            os._exit(code)


def _is_of(module: object, folders: tuple[str, ...]) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(folders)


def read_keys(path: Path) -> set[tuple[str, str, str, str]]:
    """The changes that a file of JSON lines names."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["module"], row["place"], row["before"], row["after"]) for row in rows}


@click.command(help=(__doc__ or "").partition("\n\n    python")[0])
@click.argument("modules", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--tests", multiple=True, required=True, help="a file of tests to run, or one test as pytest names it")
@click.option("--sample", type=click.IntRange(min=1), help="try this many changes, drawn from all modules")
@click.option("--seed", default=0, help="of the draw")
@click.option("--most", default=float("inf"), help="run only the fastest tests of each change, of so many seconds together")
@click.option("--again", type=click.Path(path_type=Path, exists=True), help="try only the changes in this file of survivors")
@click.option(
    "--equivalents", type=click.Path(path_type=Path, exists=True), default=EQUIVALENTS, help="changes that cannot be seen"
)
def main(
    modules: Sequence[str],
    tests: Sequence[str],
    sample: int | None,
    seed: int,
    most: float,
    again: Path | None,
    equivalents: Path,
) -> None:
    """See the module's documentation."""
    modules = [str(Path(module).resolve().relative_to(ROOT)) for module in modules]
    known = read_keys(equivalents)
    found = [one for module in modules for one in mutants(module, (ROOT / module).read_text(encoding="utf-8"))]
    tried = [one for one in found if one[0].key not in known]
    num_known = len(found) - len(tried)
    if again is not None:
        wanted = read_keys(again)
        tried = [one for one in tried if one[0].key in wanted]
    if sample is not None and sample < len(tried):
        tried = random.Random(seed).sample(tried, sample)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        runner = Runner(Path(scratch), tests, most)
        runner.begin(modules)
        for number, (mutant, source) in enumerate(tried, start=1):
            code = runner.changed(mutant, source)
            counts["late" if code is None else "seen" if code else "survived"] += 1
            if code == 0:
                click.echo(json.dumps(mutant.row(), ensure_ascii=False))
            if number % 5 == 0 or number == len(tried):
                click.echo(f"{number} of {len(tried)}: {dict(counts)}", err=True)
    click.echo(
        f"{len(tried)} of {len(found)} changes tried, {num_known} are known to change nothing: "
        f"{counts['seen']} seen, {counts['late']} ended late, {counts['survived']} survived",
        err=True,
    )
    sys.exit(bool(counts["survived"]))


if __name__ == "__main__":
    main()
