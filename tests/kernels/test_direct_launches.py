"""Direct launches are those of Triton's ordinary path, and the cache of plans shows in nothing but time.

Kernels are compiled as for a card of compute capability 9.0; a stand-in for the driver notes how they are
called.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bra_triton.bench import stand_in
from bra_triton.kernels import calls, plan, tiles
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.pooling.problem import WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Needs, PackedAttention, Padding, RoutedAttention, Settings
from bra_triton.kernels.tiles import choice

pytestmark = pytest.mark.compiled

HALF = torch.float16
_HEAD = 9  # arguments of Triton's launcher before the kernel's own


class _Log(threading.local):
    """What this thread has launched since `take`: launcher and arguments."""

    def __init__(self):
        self.launches = []

    def take(self):
        taken, self.launches = self.launches, []
        return taken


class _Streams(threading.local):
    current = 0


@pytest.fixture
def log(monkeypatch):
    noted = _Log()
    monkeypatch.setattr(
        stand_in._NoLauncher, "__call__", lambda self, *args: noted.launches.append((self, args))
    )
    with stand_in.without_gpu():
        yield noted


@pytest.fixture
def streams(monkeypatch):
    found = _Streams()
    monkeypatch.setattr(stand_in._Driver, "get_current_stream", lambda self, device=0: found.current)
    return found


def _settings(height, width, n_win, topk, **others):
    return Settings(32, 1, RegionGrid.of_windows(height, width, n_win), topk, 0.25, 0.25, **others)


def _attention(settings, dtype=HALF, lepe=3, pooled=None, router=False):
    grid, dim = settings.grid, 32
    packed_dim = 2 * settings.qk_dim + dim

    def random(*shape, dtype=dtype):
        return torch.randn(shape).to(dtype)

    return PackedAttention(
        random(2, grid.height, grid.width, packed_dim),
        None if pooled is None else random(2, grid.rows * pooled, grid.columns * pooled, packed_dim - 32),
        random(packed_dim) if grid.is_padded else None,
        random(2, grid.n_regions, 2 * settings.qk_dim, dtype=torch.float32) if router else None,
        random(dim, 1, lepe, lepe) if lepe else None,
        random(dim) if lepe else None,
        settings,
    )


def _regional(n_graphs=2):
    """Heads of 20 channels: slices of the packed map that start at no multiple of 16 bytes."""
    grid, kv_grid = RegionGrid.of_region_size(7, 9, (3, 4)), RegionGrid.of_region_size(5, 6, (2, 2))
    query = torch.randn(1, 7, 9, 80).to(HALF)[..., 20:60]
    key, value = torch.randn(1, 5, 6, 80).to(HALF).split(40, dim=-1)
    r_idx = torch.zeros(1, n_graphs, grid.n_regions, 2, dtype=torch.int32)
    padding = Padding(torch.zeros(40, dtype=HALF), torch.zeros(40, dtype=HALF))
    return RoutedAttention(query, key, value, r_idx, grid, kv_grid, 2, 0.25, padding=padding)


def _step(problem):
    """Launches all kernels of a forward and a backward."""
    if isinstance(problem, RoutedAttention):
        out, lse = calls.attend_routed(problem)
        calls.attend_routed_backward(torch.empty_like(out), problem, out, lse)
    elif isinstance(problem, RegionPooling):
        _pool(problem)
    else:
        needs = Needs(*(x is not None for x in problem.tensors))
        for own_form in (True, False):
            result = calls.attend(problem, trains=True, own_form=own_form)
            if problem.lepe_weight is None:
                result = result._replace(attention=result.out)
            calls.attend_backward(torch.empty_like(result.out), problem, result, needs)


def _pool(pooling):
    grid = pooling.grid
    packed, fill = torch.randn(2, grid.height, grid.width, 96).to(HALF), torch.zeros(64, dtype=HALF)
    x, weight, bias = packed[..., 32:], torch.zeros(64, 2, 2), torch.zeros(64)
    pooled, argmax = calls.pool(x, fill, pooling, weight, bias)
    calls.pool_backward(pooled, x, fill, argmax, pooling, weight, torch.empty_like(packed)[..., 32:])


_CELLS = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32)
PLAIN = _settings(8, 12, 4, 3)
FORMS = {
    "plain": lambda: _attention(PLAIN),
    "float32": lambda: _attention(PLAIN, torch.float32),
    "without LePE": lambda: _attention(PLAIN, lepe=0),
    "padded": lambda: _attention(_settings(7, 10, 4, 3)),
    "soft": lambda: _attention(replace(PLAIN, routing_weight="soft", diff_routing=True)),
    "padded hard": lambda: _attention(
        _settings(7, 10, 4, 3, routing_weight="hard", diff_routing=True), lepe=5
    ),
    "router": lambda: _attention(replace(PLAIN, routing_weight="hard", diff_routing=True), router=True),
    "masked": lambda: _attention(_settings(14, 14, 7, 16)),
    "whole": lambda: _attention(_settings(7, 10, 4, 16)),
    "pooled": lambda: _attention(PLAIN, pooled=1),
    "nchw": _regional,
    "pooling": lambda: RegionPooling(_CELLS, _CELLS, WEIGHTED, RegionGrid.of_windows(5, 6, 2)),
}


def _as_addresses(value):
    """An argument with addresses for tensors; those without elements have none."""
    if isinstance(value, Tensor):
        return value.data_ptr() if value.numel() else "nothing"
    return tuple(map(_as_addresses, value)) if isinstance(value, tuple) else value


def _without_empty(direct, ordinary):
    """Direct arguments, with addresses of arrays that have no elements left out as in the ordinary ones."""
    if ordinary == "nothing":
        return ordinary
    if isinstance(ordinary, tuple):
        return tuple(map(_without_empty, direct, ordinary))
    return direct


@pytest.mark.parametrize("form", FORMS)
def test_a_direct_launch_has_the_arguments_of_the_ordinary_one(form, log, monkeypatch):
    names = []
    launch = Plan._launch

    def launch_twice(self, tensors):
        launch(self, tensors)
        direct = log.take()
        self._launch_by_triton(tensors)
        ordinary = log.take()
        assert len(direct) == len(ordinary) == len(self.launches)
        for planned, (run, args), (ordinary_run, ordinary_args) in zip(
            self.launches, direct, ordinary, strict=True
        ):
            assert run is ordinary_run, planned.name  # of the same compiled kernel
            # Grid, stream, function and packed metadata; then come hooks, of which there are none.
            assert args[:6] == ordinary_args[:6]
            assert args[6:_HEAD] == (None,) * 3
            expected = tuple(map(_as_addresses, ordinary_args[_HEAD:]))
            actual = _without_empty(args[_HEAD:], expected)
            assert actual == expected, planned.name
            assert not _holds_tensors(args)
            names.append(planned.name)

    monkeypatch.setattr(Plan, "_launch", launch_twice)
    calls.forget_plans()
    _step(FORMS[form]())
    kinds = {"masked": "mark_choices_kernel", "nchw": "finish_gradients_kernel", "pooling": "pool_kernel"}
    kinds |= {"soft": "spread_means_kernel", "padded hard": "finish_gradients_kernel"}
    assert kinds.get(form, "attention_forward_kernel") in names


def _holds_tensors(value):
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_holds_tensors, value)))


def _are_direct(launches):
    direct = {not _holds_tensors(args) for _, args in launches}
    assert len(direct) == 1
    return direct.pop()


def _shifted(x):
    """The same values, 2 or 4 bytes past a multiple of 16."""
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("name", ["qkv", "kv", "padding", "means", "lepe_weight", "lepe_bias"])
def test_tensors_that_start_elsewhere_are_launched_by_triton(name, log):
    """Compiled for multiples of 16 bytes, a kernel would read them wrongly, or fault."""
    form = {"kv": "pooled", "padding": "padded", "means": "router"}.get(name, "plain")
    problem = FORMS[form]()
    calls.attend(problem, trains=True, own_form=True)
    aligned = log.take()
    assert _are_direct(aligned)
    shifted = replace(problem, **{name: _shifted(getattr(problem, name))})
    calls.attend(shifted, trains=True, own_form=True)
    misaligned = log.take()
    assert not _are_direct(misaligned)
    # Some kernel is another, compiled for any address.
    assert {id(run) for run, _ in aligned} != {id(run) for run, _ in misaligned}
    calls.attend(problem, trains=True, own_form=True)
    assert _are_direct(log.take())


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_whoever_watches_launches_gets_them_by_triton(which, log):
    problem, runtime = FORMS["plain"](), plan._runtime
    calls.attend(problem, trains=False, own_form=True)
    assert _are_direct(log.take())
    before = getattr(runtime, which)
    watch = print
    try:
        if hasattr(before, "add"):
            before.add(watch)
        else:  # Triton 3.4
            setattr(runtime, which, watch)
        calls.attend(problem, trains=False, own_form=True)
    finally:
        if hasattr(before, "remove"):
            before.remove(watch)
        else:
            setattr(runtime, which, before)
    watched = log.take()
    assert not _are_direct(watched)
    at = 7 if which == "launch_enter_hook" else 8
    assert all(args[at] is not None for _, args in watched)
    calls.attend(problem, trains=False, own_form=True)
    assert _are_direct(log.take())


def _seen(log):
    """What was launched, without addresses: compiled kernels, grids, streams, numbers."""
    launches = []
    for run, args in log.take():
        numbers = [x for x in args[_HEAD:] if isinstance(x, float) or hasattr(x, "_fields")]
        sizes = [x for x in args[_HEAD:] if isinstance(x, int) and x < 2**20]  # addresses are larger
        launches.append((id(run), args[:4], numbers, sizes))
    return launches


def _launched(log, problem):
    _step(problem)
    return _seen(log)


def _check_cache_is_invisible(log, states):
    """States are functions that enter a state and make a problem in it; each is visited twice."""

    def visit(state):
        with state() as problem:
            return _launched(log, problem)

    expected = []
    for state in states:
        calls.forget_plans()
        expected.append(visit(state))
    calls.forget_plans()
    for _ in range(2):
        assert [visit(state) for state in states] == expected
    for index, one in enumerate(expected):
        assert one not in expected[:index], "the states do not differ"


SIDES = (8, 12, 16, 20)


def test_sizes_dtypes_and_numbers(log):
    problems = [_attention(_settings(side, 8, 4, 3)) for side in SIDES]
    problems += [_attention(PLAIN, dtype) for dtype in (torch.bfloat16, torch.float32)]
    problems += [_attention(PLAIN, lepe=lepe) for lepe in (0, 5)]
    problems += [_attention(_settings(8, 12, 4, 3, **{"routing_weight": w})) for w in ("soft", "hard")]
    problems += [_attention(replace(PLAIN, **{name: 0.5})) for name in ("scale", "routing_scale")]
    problems += [FORMS[form]() for form in ("padded", "router", "pooled", "nchw", "pooling")]
    problems.append(replace(_attention(PLAIN), lepe_bias=None))
    problems.append(_attention(_settings(7, 10, 4, 3, counts_padding=False)))
    problems.append(_regional(n_graphs=1))
    _check_cache_is_invisible(log, [lambda problem=problem: nullcontext(problem) for problem in problems])


def test_tiles_and_architectures_that_are_set(log):
    problem = _attention(_settings(32, 32, 2, 2))
    small = dict.fromkeys(tiles.KERNELS, tiles.Tile(16, 32, 1, 1))
    contexts = [
        nullcontext,
        *(lambda arch=arch: tiles.use_architecture(arch) for arch in ("sm_80", "sm_120")),
        lambda: tiles.use_tiles(small),
        lambda: tiles.use_tiles({tiles.FORWARD: tiles.Tile(32, 32, 2, 1)}),
    ]
    _check_cache_is_invisible(log, [lambda make=make: _Within(make, problem) for make in contexts])


class _Within:
    """A context in which a problem is what one gets."""

    def __init__(self, make, problem):
        self.make, self.problem = make, problem

    def __enter__(self):
        self.context = self.make()
        self.context.__enter__()
        return self.problem

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def test_the_precision_of_float32_products(log):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("PyTorch 2.8 has no such setting")
    problem, before = FORMS["float32"](), matmul.fp32_precision

    class Precision:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            matmul.fp32_precision = self.name
            return problem

        def __exit__(self, *error):
            matmul.fp32_precision = before

    _check_cache_is_invisible(log, [lambda name=name: Precision(name) for name in ("ieee", "tf32")])


def test_forgotten_tables_and_plans(log, monkeypatch):
    """Whoever has written a table gets its tiles at the next launch, though the call was planned before."""
    problem, before = FORMS["plain"](), choice.packaged
    tiles.forget()
    first = _launched(log, problem)

    def changed(arch):
        table = before(arch)
        entries = {key: replace(entry, tile=tiles.Tile(16, 32, 1, 1)) for key, entry in table.entries.items()}
        return replace(table, entries=entries)

    changed.cache_clear = before.cache_clear
    with monkeypatch.context() as patch:
        patch.setattr(choice, "packaged", changed)
        assert _launched(log, problem) == first
        tiles.forget()
        assert _launched(log, problem) != first
    tiles.forget()
    assert not calls._plans
    assert _launched(log, problem) == first


def test_the_cache_is_bounded(log, monkeypatch):
    monkeypatch.setattr(calls, "_MOST_PLANS", 5)
    problems = [_attention(_settings(side, 8, 4, 3)) for side in SIDES]
    expected = [_launched(log, problem) for problem in problems]
    for _ in range(2):
        assert [_launched(log, problem) for problem in problems] == expected
        assert 0 < len(calls._plans) <= 5


N_THREADS = 8


def _in_threads(function):
    """What the function returns in each of 8 threads, which begin together; it gets the thread's number."""
    barrier = threading.Barrier(N_THREADS)

    def begin(index):
        barrier.wait()
        return function(index)

    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(begin, range(N_THREADS)))


def test_many_threads_at_once(log, monkeypatch):
    """They plan, compile and drop the same plans, with tiles of their own in every other thread."""
    problems = [_attention(_settings(side, 8, 4, 3)) for side in SIDES]
    small = dict.fromkeys(tiles.KERNELS, tiles.Tile(16, 32, 1, 1))

    def work(index):
        with tiles.use_tiles(small if index % 2 else {}):
            order = [*problems[index % 4 :], *problems[: index % 4]] * 3
            return [(problems.index(problem), _launched(log, problem)) for problem in order]

    expected = [dict(work(index)) for index in range(2)]
    assert expected[0] != expected[1]
    calls.forget_plans()
    monkeypatch.setattr(calls, "_MOST_PLANS", 10)
    for index, results in enumerate(_in_threads(work)):
        assert all(launches == expected[index % 2][which] for which, launches in results)


def test_launches_go_to_the_stream_that_is_current_in_the_thread(log, streams):
    problem = FORMS["plain"]()
    _step(problem)
    log.take()

    def work(index):
        seen = []
        for step in range(20):
            streams.current = 1000 * index + step // 2
            calls.attend(problem, trains=False, own_form=True)
            seen += [args[3] == streams.current for _, args in log.take()]
        return seen

    for seen in _in_threads(work):
        assert len(seen) >= 60
        assert all(seen)


def test_after_a_fork(log):
    known, new = FORMS["plain"](), _attention(_settings(16, 12, 4, 3))
    expected = _launched(log, known), _launched(log, new)
    calls.forget_plans()
    _step(known)
    log.take()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int((_launched(log, known), _launched(log, new)) != expected)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert _launched(log, known) == expected[0]
