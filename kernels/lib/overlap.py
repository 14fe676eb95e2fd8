"""Launches that overlap: programmatic dependent launch, on NVIDIA GPUs of compute capability 9.0 and newer.

There a launch may begin while the one before it is ending, so that its programs are in place when their
inputs are: `wait_for_previous_launch` holds them until every launch before has ended and all it wrote can be
read. Without that, about 1.3 us pass between two launches (H100, 3 launches of a forward and 8 of a training
step, kernels of 1 to 50 us).

`griddepcontrol.wait` waits for the launch before alone; but that one has waited for its own predecessor, so
the whole chain has ended. A kernel that did not wait would break the chain, and so every kernel begins with
`wait_for_previous_launch`.
"""

from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq
except ImportError:  # Triton 3.4, where a kernel cannot ask what it is compiled for
    _IS_KNOWN = False

    @triton.jit
    def wait_for_previous_launch():
        """Does nothing: launches do not overlap."""

else:
    # The interpreter knows no such instruction, and runs one launch after the other.
    _IS_KNOWN = not triton.knobs.runtime.interpret
    _OVERLAPS = tl.constexpr(_IS_KNOWN)

    @triton.jit
    def wait_for_previous_launch():
        """To be called first in every kernel, before it reads or writes anything.

        The next launch may then begin: its programs take what room this one leaves.
        """
        if _OVERLAPS and cuda_capability_geq(9, 0):
            gdc_wait()
            gdc_launch_dependents()


def overlap_options() -> dict[str, Any]:
    """What a launch is to be given, beside warps and stages, so that it overlaps with the one before."""
    if not _IS_KNOWN:
        return {}
    target = driver.active.get_current_target()
    return {"launch_pdl": True} if target.backend == "cuda" and target.arch >= 90 else {}
