"""The cache of plans changes only the time of a call; a stand-in for the driver gets the launches."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from launch_log import FORMS, HALF, PLAIN, attention, launched, regional, seen, settings, step

from bra_triton.bench import stand_in
from bra_triton.kernels import calls, tiles
from bra_triton.kernels.bounded import Bounded
from bra_triton.kernels.problem import Needs, PackedAttention
from bra_triton.kernels.tiles import choice

pytestmark = pytest.mark.compiled


class _Streams(threading.local):
    current = 0


@pytest.fixture
def streams(monkeypatch):
    found = _Streams()
    monkeypatch.setattr(stand_in, "current_stream", lambda device: found.current)
    return found


@pytest.fixture(params=[False, True], ids=["shared", "of the caller"])
def placed(request):
    """A function that gives a packed problem its own place for plans, or leaves it to the shared cache.

    Calls with a known signature have such a place.
    """

    def place(problem):
        if request.param and isinstance(problem, PackedAttention):
            return replace(problem, plans={})
        return problem

    return place


def _check_cache_is_invisible(log, states):
    """Checks that the cache changes no launch.

    States are functions that return a context with a problem. Each is visited once with an empty cache, then
    three times while the cache serves all states. A new plan's first run takes Triton's ordinary path.
    """

    def visit(state):
        with state() as problem:
            return launched(log, problem)

    expected = []
    for state in states:
        calls.forget_plans()
        expected.append(visit(state))
    calls.forget_plans()
    for _ in range(3):
        assert [visit(state) for state in states] == expected
    for index, one in enumerate(expected):
        assert one not in expected[:index], "the states do not differ"


SIDES = (8, 12, 16, 20)


def test_sizes_dtypes_and_numbers(log, placed):
    problems = [attention(settings(side, 8, 4, 3)) for side in SIDES]
    problems += [attention(PLAIN, dtype) for dtype in (torch.bfloat16, torch.float32)]
    problems += [attention(PLAIN, lepe=lepe) for lepe in (0, 5)]
    problems += [attention(settings(8, 12, 4, 3, **{"routing_weight": w})) for w in ("soft", "hard")]
    problems += [attention(replace(PLAIN, **{name: 0.5})) for name in ("scale", "routing_scale")]
    problems += [FORMS[form]() for form in ("plain", "padded", "router", "pooled", "nchw", "pooling")]
    problems.append(attention(replace(PLAIN, routing_weight="hard", diff_routing=True)))
    problems.append(replace(attention(PLAIN), lepe_bias=None))
    problems.append(attention(settings(7, 10, 4, 3, counts_padding=False)))
    problems.append(regional(n_graphs=1))
    problems = [placed(problem) for problem in problems]
    _check_cache_is_invisible(log, [lambda problem=problem: nullcontext(problem) for problem in problems])


def test_what_needs_a_gradient_and_whether_any_does(log, placed):
    problem = placed(FORMS["padded hard"]())
    everything = Needs(*(x is not None for x in problem.tensors))
    states = [everything._replace(**{name: False}) for name in ("padding", "lepe_weight", "lepe_bias")]
    grad_out = torch.empty(problem.qkv[..., :32].shape, dtype=HALF)

    def visit(needs):
        out, saved = calls.attend(problem, trains=needs is not None)
        if needs is not None:
            calls.attend_backward(grad_out, problem, out, saved, needs)
        return seen(log)

    visits = [None, everything, *states]
    expected = {}
    for needs in visits:
        calls.forget_plans()
        expected[needs] = visit(needs)
    calls.forget_plans()
    for needs in visits * 3:
        assert visit(needs) == expected[needs], needs


def test_tiles_and_architectures_that_are_set(log, placed):
    problem = placed(attention(settings(32, 32, 2, 2)))
    small = dict.fromkeys(tiles.KERNELS, tiles.Tile(16, 32, 1, 1))
    contexts = [
        nullcontext,
        *(lambda arch=arch: tiles.use_architecture(arch) for arch in ("sm_80", "sm_120")),
        lambda: tiles.use_tiles(small),
        lambda: tiles.use_tiles({tiles.FORWARD: tiles.Tile(32, 32, 2, 1)}),
    ]
    _check_cache_is_invisible(log, [lambda make=make: _Within(make, problem) for make in contexts])


class _Within:
    """The context that `make` returns, but `with ... as` gives the problem."""

    def __init__(self, make, problem):
        self.make, self.problem = make, problem

    def __enter__(self):
        self.context = self.make()
        self.context.__enter__()
        return self.problem

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def test_the_precision_of_float32_products(log, placed):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("PyTorch 2.8 has no such setting")
    problem, before = placed(FORMS["float32"]()), matmul.fp32_precision

    class Precision:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            matmul.fp32_precision = self.name
            return problem

        def __exit__(self, *error):
            matmul.fp32_precision = before

    _check_cache_is_invisible(log, [lambda name=name: Precision(name) for name in ("ieee", "tf32")])


def test_forgotten_tables_and_plans(log, placed, monkeypatch):
    """After `tiles.forget` a launch takes the tiles of the changed table, although its plan was cached."""
    problem, before = placed(attention(settings(32, 32, 2, 2))), choice.packaged
    tiles.forget()
    first = launched(log, problem)

    def changed(arch):
        table = before(arch)
        entries = {key: replace(entry, tile=tiles.Tile(16, 32, 1, 1)) for key, entry in table.entries.items()}
        return replace(table, entries=entries)

    changed.cache_clear = before.cache_clear
    with monkeypatch.context() as patch:
        patch.setattr(choice, "packaged", changed)
        assert launched(log, problem) == first
        tiles.forget()
        assert launched(log, problem) != first
    tiles.forget()
    assert not calls._plans
    assert launched(log, problem) == first


def test_the_cache_is_bounded(log, monkeypatch):
    monkeypatch.setattr(calls, "_plans", Bounded(5))
    problems = [attention(settings(side, 8, 4, 3)) for side in SIDES]
    expected = [launched(log, problem) for problem in problems]
    for _ in range(2):
        assert [launched(log, problem) for problem in problems] == expected
        assert 0 < len(calls._plans) <= 5


N_THREADS = 8


def _in_threads(function):
    """Calls the function with the thread's number in 8 threads that begin together; returns the results."""
    barrier = threading.Barrier(N_THREADS)

    def begin(index):
        barrier.wait()
        return function(index)

    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(begin, range(N_THREADS)))


def test_many_threads_at_once(log, monkeypatch):
    """The threads plan, compile and drop the same plans; every other thread uses other tiles."""
    problems = [attention(settings(4 * side, 32, 2, 3)) for side in SIDES]
    small = dict.fromkeys(tiles.KERNELS, tiles.Tile(16, 32, 1, 1))

    def work(index):
        with tiles.use_tiles(small if index % 2 else {}):
            order = [(index + turn) % len(problems) for turn in range(3 * len(problems))]
            return [(which, launched(log, problems[which])) for which in order]

    expected = [dict(work(index)) for index in range(2)]
    assert expected[0] != expected[1]
    calls.forget_plans()
    monkeypatch.setattr(calls, "_plans", Bounded(10))
    for index, results in enumerate(_in_threads(work)):
        assert all(launches == expected[index % 2][which] for which, launches in results)


def test_launches_go_to_the_stream_that_is_current_in_the_thread(log, streams):
    problem = FORMS["plain"]()
    # Compile before the threads begin: Python 3.11 fails now and then if several threads parse source.
    calls.attend(problem, trains=False)
    log.take()

    def work(index):
        are_current = []
        for turn in range(20):
            streams.current = 1000 * index + turn // 2
            calls.attend(problem, trains=False)
            are_current += [args[3] == streams.current for _, args in log.take()]
        return are_current

    for are_current in _in_threads(work):
        assert len(are_current) >= 60
        assert all(are_current)


def test_after_a_fork(log):
    known, new = FORMS["plain"](), attention(settings(16, 12, 4, 3))
    expected = launched(log, known), launched(log, new)
    calls.forget_plans()
    step(known)
    log.take()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int((launched(log, known), launched(log, new)) != expected)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert launched(log, known) == expected[0]
