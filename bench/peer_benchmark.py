"""Times the kernels beside their peers: `python -m bra_triton.bench.peer_benchmark --help`.

Every peer is first held against the float64 definition; one that computes something else is refused and not
timed, and the exit status is 1. One that cannot run is reported, and the rest goes on. `peers` says what each
row includes. Of two times, `work` is how long the GPU works (with a cold cache, launches hidden) and `call`
what a caller waits who waits for every call; on the CPU both are wall time.
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bra_triton import functional
from bra_triton.bench import cost, versions
from bra_triton.bench.peers import Attention, Peer, peers_for
from bra_triton.kernels.grid import RegionGrid
from bra_triton.spec import AttentionSpec

HEAD_DIM = 32
INPUT_SETS = 4
# Norm of the difference over the norm, for outputs and gradients whose scores and sums are kept in float32 or
# rounded to the dtype; a region missed or mistaken gives 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-10}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
PASSES = ("forward", "training")
FAILURES = ("refused", "error")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Shape:
    """A map, its regions and what they attend to; heads are 32 wide."""

    side: int
    dim: int
    n_win: int
    topk: int

    @property
    def spec(self) -> AttentionSpec:
        """What is computed."""
        return AttentionSpec(self.dim, self.dim, max(1, self.dim // HEAD_DIM), self.n_win, self.topk)


SHAPES = {
    # BiFormer-T at 224 pixels, its four stages.
    "biformer-1": Shape(56, 64, 7, 1),
    "biformer-2": Shape(28, 128, 7, 4),
    "biformer-3": Shape(14, 256, 7, 16),
    "biformer-4": Shape(7, 512, 7, 49),
    # YOLO at 640 pixels; regions do not divide the last map.
    "yolo-p3": Shape(80, 64, 8, 4),
    "yolo-p4": Shape(40, 128, 8, 4),
    "yolo-p5": Shape(20, 256, 8, 4),
    # To see the benchmark run.
    "tiny": Shape(8, 32, 2, 2),
    "tiny-padded": Shape(7, 32, 2, 2),
}


class WrongResultError(Exception):
    """A peer computed something else than it is timed as."""


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: the packed projection, its routing and the output's gradient."""

    qkv: Tensor
    r_idx: Tensor
    grad_out: Tensor


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and writes one JSON file a row; returns 1 if `wrong` finds anything."""
    options = _parse(arguments)
    rows = []

    def save(row: dict[str, Any]) -> None:
        if options.out:
            _write(row, options.out / f"{row['shape']}-batch{row['batch']}-{row['dtype']}.json")

    for name in options.shapes:
        rows.append(measure(name, options, save))
    print(table(rows))
    found = [problem for row in rows for problem in wrong(row)]
    for problem in found:
        print(f"FAILED: {problem}")
    return 1 if found else 0


def measure(
    name: str, options: argparse.Namespace, save: Callable[[dict[str, Any]], object] = lambda row: None
) -> dict[str, Any]:
    """One row: a shape at a batch size and dtype, with all peers; `save` gets it again after every peer."""
    shape, dtype, device = SHAPES[name], DTYPES[options.dtype], torch.device(options.device)
    padding = (
        None if shape.side % shape.n_win == 0 else torch.zeros(3 * shape.dim, dtype=dtype, device=device)
    )
    torch.manual_seed(0)
    inputs = [_inputs(shape, options, dtype, device, padding) for _ in range(INPUT_SETS)]
    peers = peers_for(shape.spec, options.backend, padding, compile_flex=not options.no_compile)
    truths = {routed: _truth(inputs[0], shape.spec, padding, routed) for routed in (True, False)}
    row: dict[str, Any] = {
        **{"shape": name, "batch": options.batch, "dtype": options.dtype, "device": device.type},
        "problem": vars(shape),
        "versions": versions.describe(device),
        "peers": {},
    }
    for peer in peers.values():
        if options.peers and peer.name not in options.peers:
            continue
        figures: dict[str, Any] = {"includes": peer.includes, "compared_with": peer.compared_with}
        row["peers"][peer.name] = figures
        for which in PASSES:
            figures[which] = _figures_or_reason(peer, which, inputs, truths[peer.is_routed], device, options)
            save(row)
    return row


def _figures_or_reason(
    peer: Peer,
    which: str,
    inputs: list[Inputs],
    truth: list[Tensor],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of a pass, or why there are none: `refused` for a wrong result, `error` for any other."""
    try:
        runs = [_run(peer.prepare(x.qkv, x.r_idx), x, which) for x in inputs]
        check(runs[0](), truth, TOLERANCE[inputs[0].qkv.dtype])
        if options.check_only:
            return {"checked": True}
        return {
            "work_seconds": cost.median_device_seconds(runs, device, options.repeats),
            "call_seconds": cost.median_seconds(runs[0], device, options.repeats),
            "peak_bytes": cost.peak_bytes(runs[0], device),
        }
    except WrongResultError as error:
        return {"refused": str(error)}
    except Exception as error:
        message = re.sub(r"\s+", " ", str(error)).strip()[:200]
        return {"error": f"{type(error).__name__}: {message}", "traceback": traceback.format_exc()}


def _run(attend: Attention, x: Inputs, which: str) -> Callable[[], list[Tensor]]:
    """The pass as a function without arguments; returns the output, and in training the gradient."""
    if which == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [attend(x.qkv, x.r_idx)]

        return forward
    qkv = x.qkv.detach().requires_grad_()

    def training() -> list[Tensor]:
        out = attend(qkv, x.r_idx)
        return [out.detach(), *torch.autograd.grad(out, qkv, x.grad_out)]

    return training


def check(results: Iterable[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Raises WrongResultError where results of a whole batch part from the truth of its outer images."""
    for label, actual, expected in zip(("output", "gradient"), results, truth, strict=False):
        of_images = _outer_images(actual).double()
        error = (torch.linalg.vector_norm(of_images - expected) / torch.linalg.vector_norm(expected)).item()
        if not error <= tolerance:  # NaN is refused
            raise WrongResultError(f"{label} is off by {error:.1e}, more than {tolerance:.0e}")


def _truth(x: Inputs, spec: AttentionSpec, padding: Tensor | None, routed: bool) -> list[Tensor]:
    """Output and gradient in float64, of the first and the last image."""
    qkv, grad_out = (_outer_images(t).double() for t in (x.qkv, x.grad_out))
    if routed:
        padding = None if padding is None else padding.double()
        attend = peers_for(spec, "torch", padding)["reference, regions given"].prepare(qkv, x.r_idx)
    else:

        def attend(qkv: Tensor, r_idx: Tensor) -> Tensor:
            return _dense(qkv, spec)

    qkv.requires_grad_()
    out = attend(qkv, _outer_images(x.r_idx))
    return [out.detach(), *torch.autograd.grad(out, qkv, grad_out)]


def _dense(qkv: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of every token to every token, with all scores in memory: not the function that is timed."""
    batch, height, width, _ = qkv.shape
    query, key, value = (
        t.reshape(batch, height * width, spec.num_heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=-1)
    )
    out = ((query @ key.transpose(-2, -1)) * spec.scale).softmax(-1) @ value
    return out.transpose(1, 2).reshape(batch, height, width, -1)


def _outer_images(x: Tensor) -> Tensor:
    return x if len(x) < 3 else torch.stack((x[0], x[-1]))


def _inputs(
    shape: Shape,
    options: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
    padding: Tensor | None,
) -> Inputs:
    """Random tokens around random means of their regions, as routing presumes."""
    grid = RegionGrid.of_windows(shape.side, shape.side, shape.n_win)
    means = torch.randn(options.batch, shape.n_win, shape.n_win, 3 * shape.dim, device=device)
    means = means.repeat_interleave(grid.region_height, 1).repeat_interleave(grid.region_width, 2)
    qkv = means[:, : shape.side, : shape.side]
    qkv = (qkv + torch.randn_like(qkv)).to(dtype).contiguous()
    _, r_idx = functional.region_routing(
        qkv, n_win=shape.n_win, topk=shape.topk, padding=padding, backend="torch"
    )
    return Inputs(qkv, r_idx, torch.randn_like(qkv[..., : shape.dim]))


def wrong(row: dict[str, Any]) -> list[str]:
    """The peers of a row that computed something else, and the fused ones that could not run."""
    return [
        f"{row['shape']}, {name}, {which}: {peer[which][key]}"
        for name, peer in row["peers"].items()
        for which in PASSES
        for key in FAILURES
        if key in peer.get(which, {}) and (key == "refused" or name.startswith("fused"))
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: times in ms, `x` how often the fused peer of the same work fits into them."""
    lines = []
    for row in rows:
        problem = row["problem"]
        lines += [
            f"### {row['shape']}: batch {row['batch']}, {problem['side']} x {problem['side']} x "
            f"{problem['dim']}, n_win {problem['n_win']}, topk {problem['topk']}, {row['dtype']}",
            "",
            ", ".join(f"{key} {value}" for key, value in row["versions"].items() if value),
            "",
            "| peer | includes | forward: work | x | call | peak | training: work | x | call | peak |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        reasons = []
        for name, peer in row["peers"].items():
            fused = row["peers"].get(peer["compared_with"], {})
            cells = []
            for which in PASSES:
                figures = peer.get(which, {})
                cells += _cells(figures, fused.get(which, {}))
                reasons += [f"- {name}, {which}: {figures[key]}" for key in FAILURES if key in figures]
            lines.append(f"| {name} | {peer['includes']} | " + " | ".join(cells) + " |")
        lines += ["", *reasons, ""] if reasons else [""]
    return "\n".join(lines)


def _cells(figures: dict[str, Any], fused: dict[str, Any]) -> list[str]:
    if "work_seconds" not in figures:
        text = next((key for key in (*FAILURES, "checked") if key in figures), NOT_RUN)
        return [text, "", "", ""]
    ratio = f"{figures['work_seconds'] / fused['work_seconds']:.2f}" if "work_seconds" in fused else ""
    return [
        f"{figures['work_seconds'] * 1e3:.3f}",
        ratio,
        f"{figures['call_seconds'] * 1e3:.3f}",
        f"{figures['peak_bytes'] / 2**20:.1f} MiB",
    ]


def _write(row: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", default=["tiny"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--backend", help="fused backend (default: triton on a GPU, torch on the CPU)")
    parser.add_argument("--peers", nargs="+", help="only these (default: all)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="FlexAttention uncompiled")
    parser.add_argument("--check-only", action="store_true", help="check every peer, time none")
    parser.add_argument("--out", type=Path, help="folder for the JSON files")
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    options.backend = options.backend or ("triton" if options.device.startswith("cuda") else "torch")
    return options


if __name__ == "__main__":
    sys.exit(main())
