"""The tables of the kernel report, as aligned text or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.tuning.search_space import EXP_SHARE

if TYPE_CHECKING:
    from bra_triton.bench.kernel_report import Row

# Columns of the instruction mix; the rest of the loop's instructions are summed up as "other".
_MIX = {"exp": "exponentials", "matrix": "matrix", "fp32": "fp32", "int": "integer", "loads": "global_loads"}

_SMALL_MIX = {"loads": "global_loads", "stores": "global_stores", "fp32": "fp32", "int": "integer"}

_NOTES = """\
Compiled and counted, or predicted from the counts; nothing is measured. Issue slots: warp instructions x 32.
slots/score: of the loop over whole tiles. dense: plain dense attention in the same tile, slots and tile.
ratio: slots/score over dense. A star: ptxas has serialised the matrix instructions of the loop (each waits).
slots/useful: whole kernel, padding of tiles, list tail, prologue and epilogue included, over the scores that
count; every loop as often as the problem runs it.
Bounds are microseconds a launch at peak rates, each as if nothing else took time; ps/score: the largest, over
the useful scores. ideal: what the useful scores alone would take on exponential unit, matrix unit or memory
with the whole GPU busy, as a share of that. exp slots/score: issue slots that pass while the exponential unit
evaluates the loop's exponentials; it and the issue slots bind as if nothing else took time.
Other kernels: the mix is that of the largest loop (of all code where there is none); turns are a program's,
by loop; rows of the inverse graph are taken to be uncut, cells of a pooling to be alike, programs to run to
their end. memory: for the bytes moved, each once. ideal: that over the binding unit."""


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
        small = [row for row in here if row.small is not None]
        name = f"{arch} ({HARDWARE[arch].gpu})"
        parts += [
            titled(f"{name}: attention kernels, loops", [_loop_cells(row) for row in attention], markdown),
            titled(
                f"{name}: attention kernels, launches", [_launch_cells(row) for row in attention], markdown
            ),
            titled(
                f"{name}: where the exponential unit binds, 1/{EXP_SHARE} of its work by multiply-adds",
                [_shared_cells(row) for row in attention if row.shared],
                markdown,
            ),
            titled(f"{name}: other kernels", [_small_cells(row) for row in small], markdown),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _resources(row: Row) -> dict[str, str]:
    assert row.analysis is not None
    usage = row.analysis.usage
    hardware = HARDWARE[row.arch]
    warps = hardware.resident_warps(usage.registers, usage.shared_bytes, row.analysis.num_warps)
    return {
        "registers": str(usage.registers),
        "shared": f"{usage.shared_bytes / 1024:.1f} K",
        "spills": str(usage.spills),
        "warps/SM": str(warps),
    }


def _loop_cells(row: Row) -> dict[str, str]:
    assert row.analysis is not None
    assert row.analysis.loop is not None
    counts = row.analysis.loop.counts
    other = row.analysis.loop.total - sum(counts[name] for name in _MIX.values())
    dense = (
        f"{row.floor.slots_per_score:.2f}{_star(row.floor.analysis.serialised)}" if row.floor else "spills"
    )
    return {
        "preset": row.preset,
        "kernel": row.kernel,
        "M x N, warps": f"{row.analysis.block_m}x{row.analysis.block_n}, {row.analysis.num_warps}",
        **_resources(row),
        **{title: str(counts[name]) for title, name in _MIX.items()},
        "other": str(other),
        "slots/score": f"{row.analysis.slots_per_score:.2f}{_star(row.analysis.serialised)}",
        "dense": dense,
        "dense tile": str(row.floor.tile) if row.floor else "",
        "ratio": f"{row.ratio:.3f}" if row.ratio else "",
        "target": f"{row.target} {'met' if not row.failures else 'MISSED'}" if row.target else "",
    }


def _launch_cells(row: Row) -> dict[str, str]:
    assert row.cost is not None
    cost = row.cost
    return {
        "preset": row.preset,
        "kernel": row.kernel,
        "slots/useful": f"{cost.slots_per_useful_score:.2f}",
        "MB moved": f"{cost.bytes_moved / 1e6:.2f}",
        "MB requested": f"{cost.bytes_requested / 1e6:.2f}",
        **{f"{unit} us": f"{1e6 * seconds:.2f}" for unit, seconds in cost.bounds.items()},
        "binds": cost.binding,
        "ps/score": f"{1e12 * cost.seconds_per_useful_score:.4f}",
        "ideal": f"{cost.share_of_ideal:.0%}",
    }


def _shared_cells(row: Row) -> dict[str, str]:
    assert row.analysis is not None
    assert row.cost is not None
    assert row.shared is not None
    hardware = HARDWARE[row.arch]
    cells = {"preset": row.preset, "kernel": row.kernel, "spills": str(row.shared.analysis.usage.spills)}
    for title, analysis, cost in (
        ("", row.analysis, row.cost),
        (" shared", row.shared.analysis, row.shared.cost),
    ):
        assert analysis.loop is not None
        share = analysis.loop.counts["exponentials"] / analysis.loop.total
        busy = analysis.slots_per_score * share * hardware.issue_slots / hardware.exponentials
        cells |= {
            f"slots/score{title}": f"{analysis.slots_per_score:.2f}",
            f"exp slots/score{title}": f"{busy:.2f}",
            f"launch us{title}": f"{1e6 * cost.seconds:.2f}",
        }
    return {
        **cells,
        "binds then": row.shared.cost.binding,
        "gain": f"{row.cost.seconds / row.shared.cost.seconds:.3f}",
    }


def _small_cells(row: Row) -> dict[str, str]:
    assert row.analysis is not None
    assert row.small is not None
    work, bounds = row.small.work, row.small.bounds
    code = row.analysis.straight if not row.analysis.loops else max(row.analysis.loops, key=lambda x: x.total)
    assert code is not None
    counts = {title: code.counts[name] for title, name in _SMALL_MIX.items()}
    counts["other"] = code.total - sum(counts.values())
    return {
        "preset": row.preset,
        "kernel": row.kernel,
        **_resources(row),
        **{title: str(count) for title, count in counts.items()},
        "programs": str(row.small.programs),
        "turns": ", ".join(map(str, work.turns)),
        "MB moved": f"{work.bytes_moved / 1e6:.3f}",
        "MB requested": f"{work.bytes_requested / 1e6:.3f}",
        "issue us": f"{1e6 * bounds['issue']:.3f}" if "issue" in bounds else "?",
        "memory us": f"{1e6 * bounds['memory']:.3f}",
        "binds": row.small.binding,
        "ideal": f"{row.small.share_of_ideal:.0%}",
    }


def _star(flag: bool) -> str:
    return "*" if flag else ""


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
