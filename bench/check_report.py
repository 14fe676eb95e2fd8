"""The results of `bra-bench check` as markdown."""

import re
from typing import Any

from bra_triton.bench.jobs import FAILED, NOT_FINISHED, PASSED, SKIPPED
from bra_triton.bench.peer_times import table

DTYPES = ("fp32", "fp16", "bf16")


def markdown(results: dict[str, Any]) -> str:
    """What was run, on and with what, what failed and why, and the tables."""
    checks = sorted(results["checks"], key=lambda check: check["name"])
    bad = [check for check in checks if check["status"] != PASSED]
    lines = ["# GPU check", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in results["versions"].items() if value]
    lines += ["", f"{len(checks) - len(bad)} of {len(checks)} checks passed."]
    lines += [f"- {note}" for note in results["notes"]]
    modes = [check for check in checks if check["name"].startswith("mode ")]
    if modes:
        lines += ["", "## Modes, by dtype", "", f"| mode | {' | '.join(DTYPES)} |", "|---|---|---|---|"]
        lines += [
            f"| {check['name'][5:]} | {' | '.join(_of_dtype(check, d) for d in DTYPES)} |" for check in modes
        ]
    others = [check for check in checks if check not in modes]
    if others:
        lines += ["", "## Other checks", "", "| check | | s |", "|---|---|--:|"]
        lines += [f"| {c['name']} | {_summary(c)} | {c['seconds']:.0f} |" for c in others]
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


def _of_dtype(check: dict[str, Any], dtype: str) -> str:
    """How many tests of a mode passed in a dtype, and which did not."""
    tests = {name: status for name, status in check["tests"].items() if name.endswith(f"-{dtype}]")}
    failed = [re.sub(r"^test_|\[.*", "", name) for name, status in tests.items() if status == FAILED]
    counts = {s: sum(status == s for status in tests.values()) for s in (PASSED, SKIPPED, NOT_FINISHED)}
    texts = [f"{count} {status}" for status, count in counts.items() if count]
    return "; ".join([*texts, *(f"**failed: {name}**" for name in failed)]) or "-"


def _summary(check: dict[str, Any]) -> str:
    failed = sum(status == FAILED for status in check["tests"].values())
    counted = f", {failed} of {len(check['tests'])} tests failed" if failed else ""
    return check["status"] + counted


def _on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("`", "'")[-500:]
