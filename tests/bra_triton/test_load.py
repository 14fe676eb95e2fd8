"""Under load: many threads, worker processes, and how much memory a call takes."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import torch

from bra_triton import BiLevelRoutingAttention, functional
from bra_triton.bench import measure

THREADS = 8


def step(seed):
    """Output and gradient of one call on the torch backend; the seed determines the map's size, too."""
    generator = torch.Generator().manual_seed(seed)
    side = 4 + seed % 5
    qkv = torch.randn(1, side, 12, 48, generator=generator).requires_grad_()
    padding = torch.randn(48, generator=generator)
    out = functional.bi_level_routing_attention(
        qkv,
        num_heads=2,
        n_win=4,
        topk=3,
        padding=padding,
        soft_routing=True,
        diff_routing=True,
        backend="torch",
    )
    return out.detach(), torch.autograd.grad(out.square().sum(), qkv)[0]


def _same(results, expected):
    return all(
        torch.equal(a, b)
        for found, truth in zip(results, expected, strict=True)
        for a, b in zip(found, truth, strict=True)
    )


def test_threads_find_the_same_bits():
    expected = [step(seed) for seed in range(20)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert _same(pool.map(step, list(range(20)) * 3), expected * 3)


def test_forked_workers_find_the_same_bits():
    """Data loaders fork workers, here from a process that has called the attention.

    That is a new process: PyTorch refuses backwards in a forked process if the first backward of its parent
    pretended to have a GPU, as those of other tests do.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        expected, found = pool.submit(_here_and_forked).result()
    assert found == expected


def test_a_spawned_worker_gets_a_module_that_was_called_before():
    """Data loaders and trainers on several GPUs pickle a module. This process's plans are not pickled."""
    modules = {
        backend: BiLevelRoutingAttention(32, 2, 2, topk=2, backend=backend) for backend in ("torch", "triton")
    }
    x = torch.randn(1, 4, 4, 32)
    expected = {backend: module(x).tolist() for backend, module in modules.items()}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_call, modules, x.tolist()).result() == expected


def _call(modules, x):
    torch.set_num_threads(1)
    return {backend: module(torch.tensor(x)).tolist() for backend, module in modules.items()}


def _here_and_forked():
    expected = [_as_lists(seed) for seed in range(4)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        return expected, list(pool.map(_as_lists, range(4)))


def _as_lists(seed):
    # Tensors would travel through shared memory, which a container may have little of.
    torch.set_num_threads(1)
    return tuple(x.tolist() for x in step(seed))


def test_peak_memory_is_linear_in_the_map_and_flat_in_topk():
    """Peak of a forward and a backward, without `qkv`, which is allocated before."""

    def peak(side, topk):
        qkv = torch.randn(1, side, side, 96).requires_grad_()

        def run():
            out = functional.bi_level_routing_attention(qkv, num_heads=1, n_win=8, topk=topk, backend="torch")
            torch.autograd.grad(out.sum(), qkv)

        return measure.peak_bytes(run, qkv.device)

    small, large = peak(64, 4), peak(128, 4)
    # The map is four times as large; the gathered keys of a chunk take the same memory in both.
    assert large < 4.2 * small
    assert peak(128, 12) < 1.2 * large
