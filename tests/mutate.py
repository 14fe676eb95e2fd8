"""Breaks a copy of the package in many single-line ways, one at a time, and lists what no test notices.

    python -m tests.mutate --count 100
    python -m tests.mutate --only kernels/routing --count 20 --rest

Of every file in turn a drawn place is changed: a comparison, an operator, a number, a condition, a cast to 64
bits. Then the tests that `TESTS` names for the file run, with `--rest` all others after them. A mutant dies
if a test fails or takes too long. Those that live are printed with their line: each needs a test, or an
argument why it computes the same.

Mutation tools of others serve badly here: they rename functions or rewrite modules when they are imported,
and kernels are compiled from their source.
"""

import argparse
import ast
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read by what is imported next
import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
import triton  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
# The tests of a file: those of the longest prefix of its path. First what is quick and sees most.
TESTS = {
    "kernels/attention": "routed_attention extreme_scores exponential",
    "kernels/routing": "lists routing extreme_scores",
    "kernels/small_map": "small_map extreme_scores",
    "kernels/lepe": "lepe packed_attention",
    "kernels/pooling": "pooling downsampling",
    "kernels/lib": "extreme_scores exponential routed_attention",
    "kernels/tiles": "tiles tile_cache tile_sources",
    "kernels/grid": "region_grid arguments",
    "kernels/": "plan plan_cache packed_attention region_grid regional",
    "bra_triton/operators": "operators transforms torch_compile",
    "bra_triton/backend/torch": "routed_attention routing pooling lepe diverged",
    "bra_triton/backend": "backends attention export",
    "bra_triton/modules": "nhwc nchw downsampling arguments migration",
    "bra_triton/": "arguments reference attention spec migration",
}
# Offsets past 32 bits are a matter of every kernel.
LAST = "large_maps"
SWAPS: dict[type, str] = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "//"},
    **{ast.BitAnd: "|", ast.BitOr: "&", ast.And: "or", ast.Or: "and"},
}


@dataclass(frozen=True)
class Mutant:
    """One change: what stands in a line, from a column to another, and what replaces it."""

    file: str
    line: int
    start: int
    end: int
    text: str

    def of(self, source: str) -> str:
        """The source with the change."""
        lines = source.splitlines(keepends=True)
        before = lines[self.line - 1].encode()
        lines[self.line - 1] = (before[: self.start] + self.text.encode() + before[self.end :]).decode()
        return "".join(lines)


def mutants(file: str, source: str) -> list[Mutant]:
    """Every change of a file that stays in one line; none of docstrings, annotations and error messages."""
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
            continue  # which change how long a kernel takes
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


def draw(only: str, count: int, seed: int) -> list[Mutant]:
    """So many mutants of the files under `only`: of every file one, then of every file another."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    chance = random.Random(seed)
    piles = []
    for file in listed.stdout.split():
        if file.startswith(("kernels/", "bra_triton/")) and file.startswith(only):
            pile = mutants(file, (ROOT / file).read_text())
            chance.shuffle(pile)
            piles.append(pile)
    chance.shuffle(piles)
    dealt = (mutant for hand in zip_longest(*piles) for mutant in hand if mutant is not None)
    return list(islice(dealt, count))


def tests_of(file: str) -> list[str]:
    """Paths of the tests that are to see what breaks a file."""
    prefix = max((prefix for prefix in TESTS if file.startswith(prefix)), key=len)
    names = TESTS[prefix].split() + ([LAST] if file.startswith("kernels/") else [])
    return [
        str(path.relative_to(ROOT)) for name in names for path in (ROOT / "tests").glob(f"*/test_{name}.py")
    ]


def _run_tests(tree: Path, tests: list[str], log: Path, timeout: int) -> None:
    """Runs tests of the tree in this process, a child in which nothing of the package is imported yet."""
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout))
    os.chdir(tree)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(tree / "bench"))
    importlib.import_module("in_tree").install(tree)
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def verdict(tree: Path, mutant: Mutant, rest: bool, timeout: int) -> str:
    """What killed the mutant, or "lives"."""
    path, log = tree / mutant.file, tree / "mutant.log"
    source, named = path.read_text(), tests_of(mutant.file)
    runs = [named, ["tests", *(f"--ignore={test}" for test in named)]][: 2 if rest else 1]
    try:
        path.write_text(mutant.of(source))
        for tests in runs:
            # Forked from a process that has imported PyTorch and Triton, which takes longer than many tests.
            arguments = (tree, tests, log, timeout)
            child = get_context("fork").Process(target=_run_tests, args=arguments)
            child.start()
            child.join()
            if child.exitcode == -signal.SIGKILL:
                return "killed: took too long"
            if child.exitcode:
                failed = [x for x in log.read_text().splitlines() if x.startswith(("FAILED", "ERROR"))]
                return f"killed: {failed[0][:100] if failed else f'exit status {child.exitcode}'}"
        return "lives"
    finally:
        path.write_text(source)


def main() -> int:
    """Prints a line a mutant, then the survivors; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.mutate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="files that begin so")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rest", action="store_true", help="then all other tests, for what lives")
    parser.add_argument(
        "--timeout", type=int, default=600, metavar="SECONDS", help="CPU time of a run of tests"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line a mutant is added there")
    options = parser.parse_args()
    survivors, drawn = [], draw(options.only, options.count, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        for mutant in drawn:
            outcome = verdict(Path(folder), mutant, options.rest, options.timeout)
            line = (Path(folder) / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
            print(f"{mutant.file}:{mutant.line}:{mutant.start}: {mutant.text!r}: {outcome}", flush=True)
            if outcome == "lives":
                survivors.append(f"{mutant.file}:{mutant.line}:{mutant.start}: {mutant.text!r} in: {line}")
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps({**asdict(mutant), "outcome": outcome}) + "\n")
    print(
        f"\n{len(drawn) - len(survivors)} of {len(drawn)} mutants are killed. These live:",
        *survivors,
        sep="\n",
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
