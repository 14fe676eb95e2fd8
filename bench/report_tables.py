"""The tables of the kernel report, as aligned text or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bra_triton.bench.machine_code.hardware import HARDWARE

if TYPE_CHECKING:
    from bra_triton.bench.kernel_report import Row

# Columns of the instruction mix; the rest of the loop's instructions are summed up as "other".
_MIX = {"exp": "exponentials", "matrix": "matrix", "fp32": "fp32", "int": "integer", "loads": "global_loads"}

_NOTES = """\
Compiled and counted, or predicted from the counts; nothing is measured. Issue slots: warp instructions x 32.
slots/score: of the loop over whole tiles; a star: ptxas has serialised its matrix instructions (each waits).
slots/useful: whole kernel, padding of tiles, list tail, prologue and epilogue included, over the scores that
count; every loop as often as the problem runs it.
Bounds are microseconds a launch at peak rates, each as if nothing else took time.
Other kernels: code is all their instructions; MB what their tensor arguments hold, each once (a launch that
reads a part of a packed map moves less); memory us the time of those bytes."""


def render(rows: Sequence[Row], markdown: bool = False) -> str:
    """The whole report.

    Args:
        rows: of any number of architectures.
        markdown: headings and tables in Markdown.
    """
    parts = [_NOTES]
    for arch in dict.fromkeys(row.arch for row in rows):
        here = [row for row in rows if row.arch == arch and row.analysis is not None]
        attention = [row for row in here if row.cost is not None]
        name = f"{arch} ({HARDWARE[arch].gpu})"
        parts += [
            titled(f"{name}: attention kernels, loops", [_loop_cells(row) for row in attention], markdown),
            titled(
                f"{name}: attention kernels, launches", [_launch_cells(row) for row in attention], markdown
            ),
            titled(
                f"{name}: other kernels", [_other_cells(row) for row in here if row.cost is None], markdown
            ),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _resources(row: Row) -> dict[str, str]:
    assert row.analysis is not None
    usage = row.analysis.usage
    warps = HARDWARE[row.arch].resident_warps(usage.registers, usage.shared_bytes, row.analysis.num_warps)
    return {
        "registers": str(usage.registers),
        "shared": f"{usage.shared_bytes / 1024:.1f} K",
        "spills": str(usage.spills),
        "warps/SM": str(warps),
    }


def _loop_cells(row: Row) -> dict[str, str]:
    code = row.analysis
    assert code is not None
    assert code.loop is not None
    other = code.loop.total - sum(code.loop.counts[name] for name in _MIX.values())
    return {
        "problem": row.problem,
        "kernel": row.kernel,
        "M x N, warps": f"{code.block_m}x{code.block_n}, {code.num_warps}",
        **_resources(row),
        **{title: str(code.loop.counts[name]) for title, name in _MIX.items()},
        "other": str(other),
        "slots/score": f"{code.slots_per_score:.2f}{'*' if code.serialised else ''}",
        "target": f"{row.target} {'met' if not row.failures else 'MISSED'}" if row.target else "",
    }


def _launch_cells(row: Row) -> dict[str, str]:
    assert row.cost is not None
    return {
        "problem": row.problem,
        "kernel": row.kernel,
        "slots/useful": f"{row.cost.slots_per_useful_score:.2f}",
        "MB moved": f"{row.cost.bytes_moved / 1e6:.2f}",
        **{f"{unit} us": f"{1e6 * seconds:.2f}" for unit, seconds in row.cost.bounds.items()},
        "binds": row.cost.binding,
    }


def _other_cells(row: Row) -> dict[str, str]:
    assert row.analysis is not None
    code = [mix.total for mix in (row.analysis.taps, row.analysis.rest) if mix is not None]
    return {
        "problem": row.problem,
        "kernel": row.kernel,
        **_resources(row),
        "code": str(sum(code)),
        "programs": str(row.programs),
        "MB": f"{row.bytes_of_arguments / 1e6:.3f}",
        "memory us": f"{1e6 * row.bound[0]:.3f}",
    }


def titled(title: str, cells: list[dict[str, str]], markdown: bool) -> str:
    """A table under its title, from one dict of columns a row; empty without rows."""
    if not cells:
        return ""
    lines = [list(cells[0]), *(list(each.values()) for each in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if not markdown:
        return "\n".join([title, *("  ".join(line).rstrip() for line in padded)])
    table = ["| " + " | ".join(line) + " |" for line in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"## {title}", "", table[0], rule, *table[1:]])
