"""Tables as aligned text or Markdown."""

from collections.abc import Mapping, Sequence


def table(title: str, rows: Sequence[Mapping[str, object]], markdown: bool = False) -> str:
    """A table under its title, from what each row has by column; empty without rows.

    Columns are those of the first row. None is an empty cell.
    """
    if not rows:
        return ""
    cells = [list(rows[0]), *(["" if x is None else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    if not markdown:
        return "\n".join([title, *("  ".join(line).rstrip() for line in lines)])
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"## {title}", "", head, rule, *body])
