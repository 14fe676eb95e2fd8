"""The results of `bra-bench check` as markdown."""

import re
from typing import Any

from bra_triton.bench.jobs import FAILED, NOT_FINISHED, PASSED, SKIPPED
from bra_triton.bench.peer_times import table

STATUSES = (PASSED, FAILED, SKIPPED, NOT_FINISHED)


def markdown(results: dict[str, Any]) -> str:
    """What was run, on and with what, what failed and why, and the tables."""
    checks = sorted(results["checks"], key=lambda check: check["name"])
    bad = [check for check in checks if check["status"] != PASSED]
    lines = ["# GPU check", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in results["versions"].items() if value]
    lines += ["", f"{len(checks) - len(bad)} of {len(checks)} checks passed."]
    lines += [f"- {note}" for note in results["notes"]]
    if checks:
        lines += [
            "",
            "## Checks",
            "",
            f"| check | | {' | '.join(STATUSES)} | s |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
    for check in checks:
        counts = [sum(status == s for status in check["tests"].values()) for s in STATUSES]
        cells = (check["name"], check["status"], *counts, round(check["seconds"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if any(check["failures"] for check in bad):
        lines += ["", "## Failures", ""]
        lines += [
            f"- {name}: `{_on_one_line(why)}`" for check in bad for name, why in check["failures"].items()
        ]
    if results["rows"]:
        lines += ["", "## Beside the peers", "", *WHAT_THE_COLUMNS_SAY, "", table(results["rows"])]
    return "\n".join(lines).rstrip() + "\n"


WHAT_THE_COLUMNS_SAY = (
    "Medians, in ms. `work`: how long the GPU works, with a cold cache and launches hidden; `x`: that time",
    "over the fused row's; `call`: what a caller waits who waits for every call; `peak`: memory beyond the",
    "inputs. `dense` does not route.",
)


def _on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("`", "'")[-500:]
