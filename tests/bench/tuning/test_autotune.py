"""The tuner: which tiles it tries and, with a stand-in for the timer, how it finds and keeps the fastest."""

import json
import math
import re
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stopwatch import FORWARD_TINY, TINY, Stopwatch, measure
from triton import knobs

from bra_triton.bench import autotune, stand_in
from bra_triton.bench import measure as measuring
from bra_triton.bench.machine_code.launches import KERNEL_NAMES
from bra_triton.bench.problems import Problem
from bra_triton.bench.tuning import timing
from bra_triton.bench.tuning.search_space import candidates, problems, serves
from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import cache as tile_cache
from bra_triton.kernels.tiles import table as tile_table
from bra_triton.kernels.tiles.table import BITS, HEAD_DIMS, KERNELS, SIZES, Key, Tile


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_entry_has_something_to_try(kernel, bits, head_dim):
    space = candidates(kernel, bits, head_dim)
    assert len(space) == len(set(space))
    for size in SIZES:
        assert any(serves(tile, size) for tile in space) or head_dim > 64


def test_problems_are_of_their_size_class():
    for size in SIZES:
        for problem in problems(size, 32):
            assert Key.of(tiles.FORWARD, 16, 32, problem.grid.region_tokens).size == size


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", *"1 4 4 16".split()], "--shape needs --num-heads, --n-win, --topk"),
        ([*TINY[:6], "3", *TINY[7:]], "dim must be a multiple of num_heads=3, got 16"),
        ([*TINY[:-1], "2"], "topk must be at most the number of regions, 1 for n_win=1, got 2"),
        (["--shape", "4", "4", "16"], "--shape: expected 4 arguments"),
        (["--dtype", "float64"], "float64"),
        (["--arch", "sm_90", "--problem", "yolo_p3"], "--problem has no effect with --arch"),
        (["--arch", "sm_90", "--routing-weight", "soft"], "--routing-weight has no effect with --arch"),
        (["--arch", "sm_90", "--refine"], "--refine has no effect with --arch"),
        (["--head-dim", "32"], "--head-dim has no effect without --arch"),
        (["--n-win", "8"], "--n-win has no effect without --shape"),
        ([*TINY, "--problem", "yolo_p3"], "--problem has no effect with --shape"),
        (["--output", "tables"], "--output has no effect without --arch or --save"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        autotune.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        autotune.main(TINY)
    assert "no GPU" in capsys.readouterr().err


def test_the_fastest_is_kept_and_used(tried, device):
    best = tried[1]
    timer = Stopwatch({best: 0.5})
    measure(FORWARD_TINY, timer, device)
    assert timer.timed == tried
    card = timing.card_name(device)
    assert {key: entry.tile for key, entry in tile_cache.read(card).items()} == {
        Key(tiles.FORWARD, 16, 16, 16): best
    }


@pytest.mark.usefixtures("tried")
def test_every_dtype_is_timed_on_inputs_of_its_own(device, monkeypatch):
    drawn = []

    class Inputs(timing.Inputs):
        def __init__(self, problem, dtype, device):
            drawn.append(dtype)
            super().__init__(problem, dtype, device)

    monkeypatch.setattr(timing, "Inputs", Inputs)
    measure([*FORWARD_TINY, "--dtype", "float16", "float32"], Stopwatch(), device)
    assert drawn == [torch.float16, torch.float32]
    assert {key.bits for key in tile_cache.read(timing.card_name(device))} == {16, 32}


def test_saving_writes_what_was_measured_into_the_shipped_table(tried, device, monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "architecture_of", lambda device: "sm_90")
    best = tried[1]
    measure([*FORWARD_TINY, "--save", "--output", str(tmp_path)], Stopwatch({best: 0.5}), device)
    table = tile_table.parse_table((tmp_path / "sm_90.json").read_text())
    shipped, key = tile_table.packaged("sm_90"), Key(tiles.FORWARD, 16, 16, 16)
    entry = table.entries[key]
    assert (entry.tile, entry.cost) == (best, 0.5)
    assert entry.measured_on.startswith(f"{timing.card_name(device)}, torch {torch.__version__}, Triton ")
    assert table == replace(shipped, entries={**shipped.entries, key: entry})


def test_a_compiler_that_dies_does_not_end_the_run(monkeypatch, capsys):
    def die(*args):
        raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(timing, "in_processes", die)
    timing.compile_ahead([], "sm_90", 2)
    assert "compiled when timed: terminated abruptly" in capsys.readouterr().err


@pytest.mark.compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight", ["none", "soft"])
@pytest.mark.usefixtures("no_machine_code")
def test_what_is_timed_finds_what_was_compiled_ahead(kernel, weight, tmp_path):
    """A stand-in for the driver launches the timed kernel, which hits Triton's cache on disk."""
    problem = Problem("", 1, 4, 4, 16, 1, 2, 2, weight)
    trial = timing.Trial(problem, torch.float16, kernel, Tile(16, 32, 1, 2))
    hits = []
    with knobs.cache.scope(), knobs.compilation.scope(), stand_in.without_gpu():
        knobs.cache.dir = str(tmp_path)
        drawn = timing.Inputs(problem, torch.float16, torch.device("cpu"))
        timing.compile_ahead([trial], stand_in.ARCH, 1)
        knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit))
        with tiles.use_tiles({kernel: trial.tile}):
            drawn.run_of(kernel)()
    found = [hit for name, hit in hits if name == f"{KERNEL_NAMES[kernel]}_kernel"]
    assert found == [True]


def test_the_fastest_is_timed_again_with_what_else_the_table_decides(device, monkeypatch):
    monkeypatch.setattr(timing, "candidates", lambda *args: [Tile(16, 64, 1, 2)])
    monkeypatch.setattr(timing, "serves", lambda *args: True)
    fastest = Tile(16, 64, 1, 2, exp_share=8, fuses_lepe=False)
    timer = Stopwatch({Tile(16, 64, 1, 2): 0.5, fastest: 0.25})
    measure(FORWARD_TINY, timer, device)
    plain = Tile(16, 64, 1, 2)
    assert timer.timed[2:5] == [replace(plain, exp_share=8), replace(plain, fuses_lepe=False), fastest]
    (entry,) = tile_cache.read(timing.card_name(device)).values()
    assert entry.tile == fastest


def test_what_else_a_tile_can_be():
    tile, narrow = Tile(64, 64, 4, 2), Tile(64, 32, 4, 5)
    deep = [replace(tile, num_stages=n) for n in (5, 7)]
    assert len(timing.variants(tiles.FORWARD, 16, tile)) == 5
    assert timing.variants(tiles.FORWARD, 32, tile) == [replace(tile, fuses_lepe=False), *deep]
    assert timing.variants(tiles.QUERY_GRADIENT, 16, narrow) == [replace(narrow, num_stages=7)]
    assert timing.variants(tiles.KEY_VALUE_GRADIENT, 16, tile) == deep


def test_refining_starts_from_the_tiles_in_use(device):
    problem = Problem("", 2, 8, 8, 32, 1, 2, 2)
    (trial,) = timing.trials([problem], [torch.float16], [tiles.FORWARD], device, only_used=True)
    assert trial.tile == tiles.choose(tiles.FORWARD, torch.float16, 32, 16, device)


@pytest.mark.parametrize(("side", "dim", "form"), [(8, 16, "plain"), (7, 16, "padded"), (8, 12, "padded")])
def test_trials_compete_for_the_entry_that_launches_take(side, dim, form):
    argv = ["--shape", "1", f"{side}", f"{side}", f"{dim}", "--num-heads", "1", "--n-win", "2", "--topk", "1"]
    args = autotune._parser().parse_args(argv)
    trial = timing.Trial(autotune._problems(args)[0], torch.float16, tiles.FORWARD, Tile(16, 16, 1, 1))
    assert trial.key.form == form


def test_a_backward_pass_times_both_its_kernels(device, monkeypatch):
    monkeypatch.setattr(timing, "candidates", lambda *args: [])
    monkeypatch.setattr(timing, "variants", lambda *args: [])
    timer = Stopwatch()
    measure([*TINY, "--kernel", "query_gradient", "key_value_gradient", "--dtype", "bfloat16"], timer, device)
    assert len(timer.timed) == 2  # the tile in use for each kernel
    assert {key.kernel for key in tile_cache.read(timing.card_name(device))} == {
        tiles.QUERY_GRADIENT,
        tiles.KEY_VALUE_GRADIENT,
    }


@pytest.mark.parametrize(("weight", "forward_form"), [("soft", "weighted"), ("hard", "plain")])
def test_routing_weights_are_timed_for_the_entries_that_launches_take(
    weight, forward_form, device, monkeypatch
):
    """The results of dQ and dK/dV are checked together with dR, the gradient of the routing weights. With
    hard routing only dQ is *weighted*, because there is no factor."""
    monkeypatch.setattr(timing, "candidates", lambda *args: [])
    monkeypatch.setattr(timing, "variants", lambda *args: [])
    timer, checked, good = Stopwatch(), [], timing.measure.check

    def check(found, expected, tolerance):
        checked.append(set(found))
        good(found, expected, tolerance)

    monkeypatch.setattr(timing.measure, "check", check)
    # `topk` is 2, because with one chosen region the routing weight is 1 and has no gradient.
    argv = ["--shape", *"1 4 4 16".split(), "--num-heads", "1", "--n-win", "2", "--topk", "2"]
    measure([*argv, "--routing-weight", weight], timer, device)
    kernels, forms = tiles.KERNELS, (forward_form, "weighted", forward_form)
    read = tile_cache.read(timing.card_name(device))
    assert {(key.kernel, key.form) for key in read} == set(zip(kernels, forms, strict=True))
    assert checked == [{"output"}, *2 * [{"dQ", "dK", "dV", "dR"}]]
    assert len(timer.timed) == 3


@pytest.mark.parametrize("fault", ["wrong", "nan", "error"])
def test_what_computes_something_else_is_refused(fault, tried, device, monkeypatch):
    good, broken = timing.Inputs.run_of, tried[1]

    def run_of(self, kernel):
        found = good(self, kernel)
        if tiles.choose(tiles.FORWARD, torch.float16, 16, 4, device) != broken:
            return found

        def faulty():
            if fault == "error":
                raise RuntimeError("out of resource: shared memory")
            out = found()["output"]
            return {"output": out.roll(1, dims=1) if fault == "wrong" else out * math.nan}

        return faulty

    monkeypatch.setattr(timing.Inputs, "run_of", run_of)
    timer = Stopwatch({broken: 0.1, tried[2]: 0.5})
    measure(FORWARD_TINY, timer, device)
    assert broken not in timer.timed
    (entry,) = tile_cache.read(timing.card_name(device)).values()
    assert entry.tile == tried[2]
    rows = [
        json.loads(line) for line in (tile_cache.folder() / "timings.jsonl").read_text().splitlines() if line
    ]
    assert [row["trial"].endswith(str(broken)) for row in rows if row["why"].startswith("refused")] == [True]


def test_a_broken_context_ends_the_run(device, monkeypatch):
    def run_of(self, kernel):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing.Inputs, "run_of", run_of)
    with pytest.raises(RuntimeError, match="broke the GPU's context"):
        measure(FORWARD_TINY, Stopwatch(), device)
    assert len((tile_cache.folder() / "timings.jsonl").read_text().strip().splitlines()) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_timed_launches_the_tile_in_force(kernel, device, monkeypatch):
    planned = []

    def plan(self, *inputs):
        planned.append(self)
        raise RuntimeError("enough is known")

    drawn = timing.Inputs(autotune._problems(autotune._parser().parse_args(TINY))[0], torch.float16, device)
    monkeypatch.setattr(timing.Plan, "run", plan)
    tile = Tile(16, 32, 2, 5)
    with tiles.use_tiles({kernel: tile}), pytest.raises(RuntimeError, match="enough"):
        drawn.run_of(kernel)()
    stages = {x.name: x.options.get("num_stages") for x in planned[0].launches}
    assert stages[f"{KERNEL_NAMES[kernel]}_kernel"] == 5


def test_what_is_timed_adds_to_lepes_gradient_as_launches_do(device):
    """With routed regions dK/dV adds to the gradient that LePE's backward wrote. The addition takes
    registers, so the timed kernel must do it, too."""
    drawn = timing.Inputs(Problem("", 1, 4, 4, 16, 1, 2, 2), torch.float16, device)
    _, backward = drawn._plans()
    names = [launch.name for launch in backward.launches]
    launch = backward.launches[names.index("key_value_gradient_kernel")]
    assert launch.numbers[-1].ADDS_TO_VALUE
    assert names.index("lepe_backward_kernel") < names.index("key_value_gradient_kernel")


def test_what_a_launch_leaves_unwritten_is_seen(device):
    """The check must fail for a kernel that writes nothing, also if its output gets the freed memory of a
    correct result."""
    drawn = timing.Inputs(autotune._problems(autotune._parser().parse_args(TINY))[0], torch.float16, device)
    right = drawn.run_of(tiles.FORWARD)
    drawn.check(right)

    def nothing_written():
        torch.full((1000,), 7.0)  # freed
        new = torch.empty(1000)
        assert new.isnan().all()
        return {"output": torch.empty_like(right()["output"])}

    with pytest.raises(measuring.WrongResultError, match="output is off by nan"):
        drawn.check(nothing_written)
    assert not torch.are_deterministic_algorithms_enabled()


def test_winners_weigh_problems_alike():
    """Relative times count: saving 10 % of a short problem's time beats saving 5 % of a long one's."""
    args = autotune._parser().parse_args(TINY)
    short = timing.Trial(autotune._problems(args)[0], torch.float16, tiles.FORWARD, Tile(16, 32, 1, 3))
    long = replace(short, problem=replace(short.problem, batch=100))
    other = Tile(16, 64, 1, 3)
    only_short = Tile(16, 64, 2, 3)
    times = {
        short: 0.9,
        long: 100.0,
        replace(short, tile=other): 1.0,
        replace(long, tile=other): 95.0,
        replace(short, tile=only_short): 0.1,
        replace(long, tile=only_short): math.inf,
    }
    assert timing.winners(times)[short.key].tile == short.tile


def test_what_the_shipped_table_says_was_measured_is_in_the_timings_kept():
    """An entry's cost is its tile's mean time in the kept timings, at most 8 % above the fastest tile's. The
    table leaves the fastest tile out if it spills under Triton 3.8."""
    means = {}
    for name in ("h200", "h100"):  # a later file replaces entries of an earlier one
        path = Path(__file__).parents[3] / "docs" / "measured" / f"{name}-timings.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        timed = {kept_trial(row["trial"]): row["milliseconds"] for row in rows}
        found = timing.means({trial: time for trial, time in timed.items() if math.isfinite(time)})
        means |= {key: (rows[0]["card"], by_tile) for key, by_tile in found.items()}
    entries = {key: e for key, e in tile_table.packaged("sm_90").entries.items() if e.measured_on}
    assert set(entries) == set(means)
    for key, entry in entries.items():
        card, by_tile = means[key]
        assert entry.measured_on.startswith(card), key
        assert entry.cost == pytest.approx(by_tile[entry.tile], abs=1e-4), key
        assert entry.cost < 1.08 * min(by_tile.values()), key


NEW_ROW = r"(\d+)x(\d+)x(\d+)x(\d+) heads (\d+) n_win (\d+) topk (\d+) (\w+) (\w+) (.*)"


def kept_trial(text):
    """The trial of a row of kept timings; old rows call a problem `Setting`."""
    if new := re.fullmatch(NEW_ROW, text):
        *numbers, dtype, kernel, tile = new.groups()
        problem = Problem("", *map(int, numbers))
        return timing.Trial(problem, getattr(torch, dtype), kernel, kept_tile(tile))
    sizes, dtype, kernel, tile = re.fullmatch(r"Setting\((.*)\) torch\.(\w+) (\w+) (.*)", text).groups()
    s = eval(f"dict({sizes})", {"__builtins__": {}}, {"dict": dict})
    problem = Problem(
        *("", s["batch"], s["height"], s["width"], s["num_heads"] * s["v_head_dim"], s["num_heads"]),
        *(s["n_win"], s["topk"], s["routing_weight"], s["kv_per_win"], s["kv_pooling"]),
        qk_dim=s["num_heads"] * s["qk_head_dim"],
    )
    return timing.Trial(problem, getattr(torch, dtype), kernel, kept_tile(tile))


def kept_tile(text):
    numbers = re.match(r"(\d+)x(\d+) (\d+)w (\d+)s(?: 1/(\d+) exp)?", text).groups(default=0)
    *sides, share = map(int, numbers)
    return Tile(*sides, exp_share=share, fuses_lepe="lepe apart" not in text)
