"""What the commands share: options, JSON files, exit status, tables and a line of progress."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def parser_of(
    command: str, module_doc: str, repeats: int = 0, has_json: bool = True
) -> argparse.ArgumentParser:
    """A command's parser, described by the first paragraph of `module_doc`.

    `repeats` is the default of `--repeats`; 0 leaves this option out.
    """
    purpose = module_doc.split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(f"bra-bench {command}", description=purpose)
    if repeats:
        parser.add_argument("--repeats", type=count, default=repeats, help=f"timed calls (default {repeats})")
    if has_json:
        parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the numbers to FILE")
    return parser


def refuse_unused(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str], reason: str
) -> None:
    """Exits with a message if an option of `names` has another value than its default: it has no effect."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {reason}")


def count(text: str) -> int:
    """Converts the text of an option to an integer of at least 1; for the option's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def new_file(text: str) -> Path:
    """Converts the text of an option to the path of a file in an existing folder; for the option's `type`."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text}")
    return file


def write_json(file: Path | None, data: object) -> None:
    """Writes `data` to `file` as JSON, unless `file` is None."""
    if file:
        file.write_text(json.dumps(data, indent=1) + "\n")


def conclude(failures: Sequence[str], word: str = "MISSED") -> int:
    """Prints each failure on a line; returns the exit status, 1 if there are any."""
    for failure in failures:
        print(f"{word}: {failure}")
    return int(bool(failures))


def table(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table under its title; an empty string if there are no rows.

    A row maps columns to values, all rows in the same order. None makes an empty cell.
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
