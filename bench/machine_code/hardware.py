"""Documented limits and rates of the GPUs in the kernel report.

Sources. Per-SM limits and rates: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities" (technical
specifications per compute capability; four warp schedulers per SM, each issues one instruction per clock) and
"Arithmetic Instructions" (base-2 exponential: 16 results per clock and SM on all of these). Whole GPU:
- sm_80: A100 SXM4 80 GB, whitepaper and datasheet: 108 SMs, 1.41 GHz, 312 TFLOP/s fp16, 156 TF32, 2039 GB/s.
- sm_90: H100 SXM5, whitepaper: 132 SMs, 989.4 TFLOP/s fp16 dense (so 1.83 GHz), 494.7 TF32, 3352 GB/s.
- sm_100: B200. HGX B200 datasheet: 2.25 PFLOP/s fp16 dense, half in TF32, 8 TB/s; 148 SMs and 8192 FLOP per
  clock and SM imply 1.85 GHz. Exponentials as on sm_90: FlashAttention-4 (2026), designed for this rate.
- sm_120: RTX 5090, RTX Blackwell whitepaper: 170 SMs, 2.407 GHz, 209.5 TFLOP/s fp16 dense with fp32 sums,
  104.8 TF32, 1792 GB/s.
"""

import math
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from bra_triton.kernels.tiles.table import nearest, packaged_archs

# While warps wait, issue slots go unused; with more resident warps, fewer do. The model: time is proportional
# to slots x (1 + LATENCY_WARPS / resident warps). It was fitted to the attention on an H200 on BiFormer's and
# YOLO's maps, and tested with 9 more problems. Over all 36 problems, the configuration that it ranks first
# takes 2.5 % longer than the fastest on average and 12 % at most; ranked by slots alone, 6.4 % and 38 %.
# Values from 6 to 16 are as good (Triton 3.6; docs/kernel_times.md).
LATENCY_WARPS = 8

SUBPARTITIONS = 4  # of an SM; each has a quarter of the registers, and a warp lives in one


@dataclass(frozen=True)
class Hardware:
    """One GPU: rates are per clock and SM."""

    gpu: str  # which GPU of the architecture
    sms: int  # streaming multiprocessors
    clock: float  # boost clock, Hz
    bandwidth: float  # device memory, bytes per second
    half_fma: int  # fp16 and bf16 multiply-adds of the matrix units, fp32 accumulation, dense
    tf32_fma: int  # TF32 multiply-adds of the matrix units, dense
    max_warps: int  # resident warps per SM
    max_blocks: int  # resident thread blocks per SM
    shared_bytes: int  # shared memory per SM; a block may have all of it except what the system reserves
    issue_slots: int = 128  # four warp instructions of 32 threads
    exponentials: int = 16
    registers: int = 65536
    register_unit: int = 256  # a warp gets registers in multiples of this
    reserved_shared_bytes: int = 1024  # for the system, in every block

    def resident_warps(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Warps that an SM holds at once if thread blocks need so much; 0 if not even one block fits.

        `registers` is per thread, `shared_bytes` and `num_warps` are per block.
        """
        per_warp = -(-max(registers, 1) * 32 // self.register_unit) * self.register_unit
        by_registers = self.registers // SUBPARTITIONS // per_warp * SUBPARTITIONS // num_warps
        by_shared = self.shared_bytes // (shared_bytes + self.reserved_shared_bytes)
        return num_warps * min(by_registers, by_shared, self.max_warps // num_warps, self.max_blocks)


def latency(resident_warps: int) -> float:
    """Factor by which issue slots cost more because warps wait; infinite for 0 resident warps per SM."""
    return 1 + LATENCY_WARPS / resident_warps if resident_warps else math.inf


# Targets that kernels can be compiled for; the last number is the threads of a warp.
TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
    **{arch: GPUTarget("hip", arch, 32) for arch in ("gfx1100", "gfx1201")},
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
    **dict.fromkeys(("sm_86", "sm_89"), 99 << 10),
    **dict.fromkeys(("gfx90a", "gfx942", "gfx1100", "gfx1201"), 64 << 10),
}


def table_shared_bytes(arch: str) -> int:
    """Bytes of shared memory that a thread block may have on all architectures with the tiles of `arch`."""
    tables = (*packaged_archs(), *HARDWARE, arch)  # also tables that do not exist yet
    return min(size for card, size in BLOCK_SHARED_BYTES.items() if nearest(card, tables) == arch)
