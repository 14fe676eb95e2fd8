"""What the commands share: options, tables, JSON, and how far a long one is."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def parser_of(
    command: str, module_doc: str, repeats: int = 0, has_json: bool = True
) -> argparse.ArgumentParser:
    """A parser described by the module's first paragraph; `--repeats` has that default, 0 leaves it out."""
    purpose = module_doc.split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(f"bra-bench {command}", description=purpose)
    if repeats:
        parser.add_argument("--repeats", type=count, default=repeats, help=f"timed calls (default {repeats})")
    if has_json:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser


def count(text: str) -> int:
    """A number of at least 1, for `type` of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def write_json(file: Path | None, data: object) -> None:
    """Writes to a file, if there is one."""
    if file:
        file.write_text(json.dumps(data, indent=1) + "\n")


def conclude(failures: Sequence[str], word: str = "MISSED") -> int:
    """Prints the failures, a line each; the exit status is 1 if there are any."""
    for failure in failures:
        print(f"{word}: {failure}")
    return int(bool(failures))


def table(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A table in Markdown under its title, from what each row has by column; empty without rows.

    Columns are those of the first row. None is an empty cell.
    """
    if not rows:
        return ""
    cells = [list(rows[0]), *(["" if x is None else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"## {title}", "", head, rule, *body])


def progress(done: int, total: int, what: str) -> None:
    """Rewrites the last line of stderr, and ends it when all is done."""
    print(f"\r[{done}/{total}] {what:<90.90}", end="\n" if done == total else "", file=sys.stderr, flush=True)
