"""Kernels are launched even if Triton's cache of compiled kernels cannot be written."""

import logging
import shutil

import pytest
import torch
import triton
import triton.language as tl

from bra_triton.kernels import code_cache
from bra_triton.kernels.plan import Plan

pytestmark = pytest.mark.compiled


@triton.jit
def fill_kernel(out, VALUE: tl.constexpr):
    tl.store(out, VALUE)


def launched(log, value):
    """Runs a plan whose kernel no other test compiles; returns how often it was launched."""
    plan = Plan((), torch.device("cpu"))
    plan.launch(fill_kernel, (1,), (plan.output((1,), torch.float32),), (value,), num_warps=1)
    plan.run()
    return len(log.take())


@pytest.fixture
def own_cache(log, tmp_path):
    """Path of the folder that Triton uses as cache instead of that of `log`; it does not exist yet."""
    folder = tmp_path / "triton"
    triton.knobs.cache.dir = str(folder)
    code_cache._warn_once.cache_clear()
    code_cache._folder.cache_clear()
    return folder


def test_a_missing_folder_is_made(log, own_cache, caplog):
    assert launched(log, 1) == 1
    assert list(own_cache.iterdir())
    assert not caplog.records


def test_a_folder_that_cannot_be_written(log, own_cache, caplog):
    own_cache.write_text("")  # a file and no folder, since root may write to any folder
    _check_a_temporary_folder_serves(log, own_cache, caplog, 2, "Not a directory")


def test_a_full_disk(log, own_cache, small_disk, caplog):
    (small_disk / "other files").write_bytes(bytes(12 << 10))
    triton.knobs.cache.dir = str(small_disk)
    _check_a_temporary_folder_serves(log, small_disk, caplog, 4, "No space left")


def _check_a_temporary_folder_serves(log, folder, caplog, value, reason):
    assert launched(log, value) == launched(log, value + 1) == 1
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert str(folder) in warning
    assert reason in warning
    assert code_cache._folder().name in warning
    assert triton.knobs.cache.dir == str(folder)


@triton.jit
def increment_kernel(out):
    tl.store(out, tl.load(out) + 1)


def test_what_was_launched_before_is_not_launched_again(log, own_cache):
    """Some kernels add to a map, such as `spread_means_kernel`: launched twice, they would add twice."""
    plan = Plan((torch.zeros(1),), torch.device("cpu"))
    plan.launch(increment_kernel, (1,), (plan.given[0],), (), num_warps=1)
    plan.launch(fill_kernel, (1,), (plan.output((1,), torch.float32),), (6,), num_warps=1)
    # Compiles the first kernel, so that the plan must compile only the second.
    increment_kernel.warmup(torch.zeros(1), grid=(1,), num_warps=1)
    shutil.rmtree(own_cache)
    own_cache.write_text("")
    plan.run(torch.zeros(1))
    assert len(log.take()) == 2


def test_another_error_is_raised_as_it_is():
    def missing():
        raise FileNotFoundError("no ptxas")

    with pytest.raises(FileNotFoundError, match="no ptxas"):
        code_cache.compiling(missing)
