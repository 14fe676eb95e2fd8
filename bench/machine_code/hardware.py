"""Documented limits and rates of the GPUs that the kernel report speaks of.

Sources. Per-SM limits and rates: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities" (technical
specifications per compute capability; four warp schedulers an SM, each issues one instruction a clock) and
"Arithmetic Instructions" (base-2 exponential: 16 results a clock and SM on all of these). Whole GPU:
- sm_80: A100 SXM4 80 GB. A100 whitepaper and datasheet: 108 SMs, 1.41 GHz, 312 TFLOP/s fp16, 156 TF32,
  2039 GB/s.
- sm_90: H100 SXM5. H100 whitepaper: 132 SMs, 989.4 TFLOP/s fp16 dense, 494.7 TF32, 3352 GB/s; the matrix
  peak implies 1.83 GHz.
- sm_100: B200. HGX B200 datasheet: 2.25 PFLOP/s fp16 dense, half in TF32, 8 TB/s; 148 SMs and 8192 FLOP a
  clock and SM imply 1.85 GHz. Exponentials as on sm_90: FlashAttention-4 (2026), which is built around it.
- sm_120: RTX 5090. RTX Blackwell whitepaper: 170 SMs, 2.407 GHz, 209.5 TFLOP/s fp16 with fp32 accumulation
  dense, 104.8 TF32, 1792 GB/s.
"""

import math
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from bra_triton.kernels.tiles.table import nearest, packaged_archs

# Issue slots go unused while warps wait, fewer with more warps beside each other: time goes with slots times
# 1 + LATENCY_WARPS / resident warps. Fitted to attention on an H200 at BiFormer's and YOLO's maps, and judged
# with 9 problems more: of 36, the configuration that it puts first takes on average 2.5 % longer than the
# fastest, 12 % at most; by slots alone 6.4 % and 38 %. 6 to 16 do as well (Triton 3.6; docs/kernel_times.md).
LATENCY_WARPS = 8

SUBPARTITIONS = 4  # of an SM; each has a quarter of the registers, and a warp lives in one


@dataclass(frozen=True)
class Hardware:
    """One GPU: rates are per clock and SM."""

    gpu: str  # which GPU of the architecture
    sms: int  # streaming multiprocessors
    clock: float  # boost clock, Hz
    bandwidth: float  # device memory, bytes a second
    half_fma: int  # fp16 and bf16 multiply-adds of the matrix units, fp32 accumulation, dense
    tf32_fma: int  # TF32 multiply-adds of the matrix units, dense
    max_warps: int  # resident warps an SM
    max_blocks: int  # resident thread blocks an SM
    shared_bytes: int  # shared memory an SM; a block may ask for all but what the system reserves
    issue_slots: int = 128  # four warp instructions of 32 threads
    exponentials: int = 16
    registers: int = 65536
    register_unit: int = 256  # a warp is given registers in such portions
    reserved_shared_bytes: int = 1024  # of every block, by the system

    def resident_warps(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Warps that an SM holds at once of thread blocks that take so much; 0 when not even one fits.

        `registers` is per thread, the others are per block.
        """
        per_warp = -(-max(registers, 1) * 32 // self.register_unit) * self.register_unit
        by_registers = self.registers // SUBPARTITIONS // per_warp * SUBPARTITIONS // num_warps
        by_shared = self.shared_bytes // (shared_bytes + self.reserved_shared_bytes)
        return num_warps * min(by_registers, by_shared, self.max_warps // num_warps, self.max_blocks)


def latency(resident_warps: int) -> float:
    """What issue slots have to be multiplied by for so many warps an SM; infinite for none."""
    return 1 + LATENCY_WARPS / resident_warps if resident_warps else math.inf


# What kernels can be compiled for; the last number is the threads of a warp.
TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HARDWARE = {
    "sm_80": Hardware("A100 SXM4 80 GB", 108, 1.41e9, 2039e9, 1024, 512, 64, 32, 164 << 10),
    "sm_90": Hardware("H100 SXM5", 132, 1.83e9, 3352e9, 2048, 1024, 64, 32, 228 << 10),
    "sm_100": Hardware("B200", 148, 1.85e9, 8000e9, 4096, 2048, 64, 32, 228 << 10),
    "sm_120": Hardware("RTX 5090", 170, 2.407e9, 1792e9, 256, 128, 48, 24, 100 << 10),
}

# Shared memory that one thread block may ask for, in bytes, by architecture.
BLOCK_SHARED_BYTES = {
    **{arch: card.shared_bytes - card.reserved_shared_bytes for arch, card in HARDWARE.items()},
    **{"sm_86": 99 << 10, "sm_89": 99 << 10, "gfx942": 64 << 10},
}


def table_shared_bytes(arch: str) -> int:
    """Shared memory in bytes that a thread block has on every card which takes the tiles of `arch`."""
    tables = (*packaged_archs(), *HARDWARE, arch)  # also those that are still to be made
    return min(size for card, size in BLOCK_SHARED_BYTES.items() if nearest(card, tables) == arch)
