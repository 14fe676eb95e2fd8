"""Breaks a copy of the package by one-line changes, one at a time; lists the changes that no test notices.

    python -m tests.mutate --count 100
    python -m tests.mutate --only kernels/routing --count 20 --rest
    python -m tests.mutate --replaces "to(tl.int64)" --tests tests/kernels/test_large_maps.py

A mutant is a copy of the package with one randomly drawn change: of a comparison, an operator, a number, a
condition, or a cast to 64 bits. The files take turns. For each mutant, the tests that `TESTS` names for the
file run under the interpreter, the quickest first. If the file launches kernels, these tests then run
compiled. With `--rest` all other tests follow. A mutant dies if a test fails or takes too long. The mutants
that live are printed with their line: each needs a test, or an entry in `tests/equivalent_mutants.py` that
says why it computes the same.

Other mutation tools do not work well here: they rename functions or rewrite modules at import, but Triton
compiles kernels from their source.
"""

import argparse
import ast
import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from multiprocessing import get_context
from pathlib import Path

# The modules that are imported next read these variables.
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | os.environ
import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
import triton  # noqa: F401

from tests.equivalent_mutants import EQUIVALENT

ROOT = Path(__file__).resolve().parent.parent
# The tests for a file, by prefix of its path; the longest counts. Quick tests that see most come first.
TESTS = {
    "kernels/attention": "routed_attention extreme_scores exponential large_maps",
    "kernels/routing": "lists inverse_graph routing extreme_scores large_maps",
    "kernels/small_map": "small_map extreme_scores large_maps",
    "kernels/lepe": "lepe packed_attention large_maps",
    "kernels/pooling": "pooling downsampling large_maps",
    "kernels/lib": "extreme_scores exponential routed_attention large_maps",
    "kernels/tiles": "tiles tile_cache tile_sources",
    "kernels/grid": "region_grid arguments nchw",
    "kernels/": "plan plan_cache code_cache direct_launches packed_attention region_grid regional",
    "bra_triton/operators/linear": "linear",
    "bra_triton/operators": "operators transforms torch_compile",
    "bra_triton/backend/torch/lepe": "lepe_gradients half_on_cpu lepe torch_on_nvidia",
    "bra_triton/backend/torch": "routed_attention masked routing pooling lepe diverged torch_on_nvidia",
    "bra_triton/backend": "backends attention export",
    "bra_triton/modules": "layers nhwc nchw attributes in_place pooling_layers downsampling arguments",
    "bra_triton/biformer": "biformer",
    "bra_triton/visualize": "visualize",
    "bra_triton/cells": "downsampling pooling",
    "bra_triton/equivalent": "migration migration_refusals",
    "bra_triton/migration": "migration migration_refusals",
    "bra_triton/": "reference spec arguments attention migration",
    "yolo_integration/flops": "counted_flops model_trial",
    "yolo_integration/modules": "modules checkpoints_of_others",
    "yolo_integration/": "wrong_rows yaml_rows pretrained registration photo_dataset demo_objects",
}
LOG = "mutant.log"
SWAPS: dict[type, str] = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "//"},
    **{ast.BitAnd: "|", ast.BitOr: "&", ast.And: "or", ast.Or: "and"},
}


@dataclass(frozen=True)
class Mutant:
    """One change: `text` replaces the bytes of a line from column `start` to column `end`."""

    file: str
    line: int
    start: int
    end: int
    text: str

    def replaced(self, source: str) -> str:
        """The part of the source that the change replaces."""
        return source.splitlines()[self.line - 1].encode()[self.start : self.end].decode()

    def of(self, source: str) -> str:
        """The source after the change."""
        lines = source.splitlines(keepends=True)
        before = lines[self.line - 1].encode()
        lines[self.line - 1] = (before[: self.start] + self.text.encode() + before[self.end :]).decode()
        return "".join(lines)


def mutants(file: str, source: str) -> list[Mutant]:
    """Every one-line change of a file, except of docstrings, annotations and error messages."""
    found = []
    for node in _code(ast.parse(source)):
        if node.lineno == node.end_lineno:
            line = source.splitlines()[node.lineno - 1].encode()
            found += [Mutant(file, node.lineno, *change) for change in _changes(node, line)]
    return sorted(set(found), key=lambda mutant: (mutant.line, mutant.start, mutant.text))


def _code(node: ast.AST) -> Iterator[ast.expr]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise | ast.Assert):
            continue
        if isinstance(node, ast.keyword) and node.arg in ("num_warps", "num_stages"):
            continue  # they change only how long a kernel takes
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                if isinstance(child, ast.expr):
                    yield child
                yield from _code(child)


def _changes(node: ast.expr, line: bytes) -> Iterator[tuple[int, int, str]]:
    start, end = node.col_offset, node.end_col_offset or 0

    def text(part: ast.expr) -> str:
        return line[part.col_offset : part.end_col_offset].decode()

    def swap(left: ast.expr, operator: ast.AST, right: ast.expr) -> Iterator[tuple[int, int, str]]:
        if type(operator) in SWAPS:
            a, b = left.end_col_offset or 0, right.col_offset
            between = line[a:b].decode()
            symbol = between.strip(" ()")
            yield a, b, between.replace(symbol, SWAPS[type(operator)])

    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from swap(node.left, node.ops[0], node.comparators[0])
    elif isinstance(node, ast.BinOp):
        yield from swap(node.left, node.op, node.right)
    elif isinstance(node, ast.BoolOp):
        yield from swap(node.values[0], node.op, node.values[1])
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield start, end, repr(value)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield start, end, text(node.operand)
    elif isinstance(node, ast.IfExp):
        yield node.test.col_offset, node.test.end_col_offset or 0, f"not ({text(node.test)})"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "to" and "int64" in text(node):
            yield start, end, text(node.func.value)
        elif node.func.attr == "where" and len(node.args) == 3:
            condition, yes, no = map(text, node.args)
            yield start, end, f"{text(node.func)}({condition}, {no}, {yes})"


def replacements(file: str, source: str, text: str, by: str) -> list[Mutant]:
    """One mutant for every place in the source where `text` stands; `by` replaces it there."""
    return [
        Mutant(file, number, found.start(), found.end(), by)
        for number, line in enumerate(source.splitlines(), 1)
        for found in re.finditer(re.escape(text.encode()), line.encode())
    ]


def draw(only: str, text: str, by: str | None, count: int, seed: int) -> list[Mutant]:
    """Draws `count` mutants from files whose path begins with `only`; the files take turns.

    They change code that contains `text` or, with `by`, replace `text` by it.
    """
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    chance = random.Random(seed)
    piles = []
    for file in listed.stdout.split():
        if file.startswith(("kernels/", "bra_triton/", "yolo_integration/")) and file.startswith(only):
            source = (ROOT / file).read_text()
            if by is None:
                pile = [mutant for mutant in mutants(file, source) if text in mutant.replaced(source)]
            else:
                pile = replacements(file, source, text, by)
            chance.shuffle(pile)
            piles.append(pile)
    chance.shuffle(piles)
    dealt = (mutant for hand in zip_longest(*piles) for mutant in hand if mutant is not None)
    return list(islice(dealt, count))


def tests_of(file: str) -> list[str]:
    """Paths of the test files that `TESTS` names for a file."""
    prefix = max((prefix for prefix in TESTS if file.startswith(prefix)), key=len)
    files = [path for name in TESTS[prefix].split() for path in (ROOT / "tests").glob(f"*/test_{name}.py")]
    return [str(path.relative_to(ROOT)) for path in files]


class _QuickFirst:
    """Plugin of pytest: orders tests by their CPU time in earlier runs, the quickest first; new ones lead.

    Attributes:
        is_stopped: whether the time was up before all tests had run.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.seconds, self.is_stopped = file, seconds, False
        self.took: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.took.get(item.nodeid, 0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = time.process_time()
        result = yield
        self.took[item.nodeid] = time.process_time() - start
        self.file.write_text(json.dumps(self.took))
        if time.process_time() > self.seconds:
            self.is_stopped, item.session.shouldstop = True, "enough"
        return result


def _run_tests(tree: Path, tests: list[str], seconds: float, timeout: int) -> None:
    """Runs tests of the tree in this child process, which has not imported the package yet."""
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout))
    os.chdir(tree)
    with (tree / LOG).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(tree / "bench"))
    importlib.import_module("in_tree").install(tree)
    quick_first = _QuickFirst(tree / "took.json", seconds)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [quick_first])
    nothing_to_run = status == pytest.ExitCode.NO_TESTS_COLLECTED  # none of the file's tests is compiled
    stopped = quick_first.is_stopped and status == pytest.ExitCode.INTERRUPTED
    sys.exit(0 if nothing_to_run or stopped else status)


def _is_launcher(file: str) -> bool:
    """Whether a file decides how kernels are launched; the interpreter runs only a part of that code."""
    return max((prefix for prefix in TESTS if file.startswith(prefix)), key=len) == "kernels/"


def verdict(tree: Path, mutant: Mutant, options: argparse.Namespace) -> str:
    """Runs the tests on a mutant; returns what killed it, why it is equivalent, or "lives"."""
    path = tree / mutant.file
    source, named = path.read_text(), options.tests or tests_of(mutant.file)
    # Interpreted tests run in a fork of this process, which has imported PyTorch and Triton already; the
    # imports take longer than many tests. To compile, Triton must be imported anew, in a spawned process.
    runs = [("fork", named)] + [("spawn", named)] * _is_launcher(mutant.file)
    if options.rest:
        runs.append(("fork", ["tests", *(f"--ignore={test}" for test in named)]))
    try:
        path.write_text(mutant.of(source))
        for how, tests in runs:
            os.environ["TRITON_INTERPRET"] = "0" if how == "spawn" else "1"
            arguments = (tree, tests, options.seconds, options.timeout)
            child = get_context(how).Process(target=_run_tests, args=arguments)
            child.start()
            child.join()
            if child.exitcode == -signal.SIGKILL:
                return "killed: took too long"
            if child.exitcode:
                log = (tree / LOG).read_text().splitlines()
                failed = [line for line in log if line.startswith(("FAILED", "ERROR"))]
                return f"killed: {failed[0][:100] if failed else f'exit status {child.exitcode}'}"
        changed = mutant.file, path.read_text().splitlines()[mutant.line - 1].strip()
        return f"equivalent: {EQUIVALENT[changed]}" if changed in EQUIVALENT else "lives"
    finally:
        path.write_text(source)


def main() -> int:
    """Prints a line for every mutant, then those that live; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.mutate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="only files whose path begins with this")
    parser.add_argument(
        "--replaces", default="", metavar="TEXT", help="only changes of code that contains this text"
    )
    by_help = "replace the text of --replaces by this one; make no other change"
    parser.add_argument("--by", metavar="TEXT", help=by_help)
    parser.add_argument(
        "--tests", nargs="+", metavar="FILE", help="test files to run instead of those in TESTS"
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rest", action="store_true", help="for mutants that live, also run all other tests")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="CPU seconds after which a run starts no further test",
    )
    parser.add_argument(
        "--timeout", type=int, default=600, metavar="SECONDS", help="CPU seconds after which a run is killed"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append one JSON line per mutant to this file"
    )
    options = parser.parse_args()
    drawn = draw(options.only, options.replaces, options.by, options.count, options.seed)
    ends, survivors = Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        for mutant in drawn:
            outcome = verdict(Path(folder), mutant, options)
            ends[outcome.partition(":")[0]] += 1
            line = (Path(folder) / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
            print(f"{mutant.file}:{mutant.line}:{mutant.start}: {mutant.text!r}: {outcome}", flush=True)
            if outcome == "lives":
                survivors.append(f"{mutant.file}:{mutant.line}:{mutant.start}: {mutant.text!r} in: {line}")
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps({**asdict(mutant), "outcome": outcome}) + "\n")
    print(f"\n{dict(ends)} of {len(drawn)} mutants. These live:", *survivors, sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
