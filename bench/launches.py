"""What the package would launch on a GPU, recorded without one, ready to be compiled.

The launches themselves run, on tensors without data, and only the last step is replaced: where a kernel would
start, its arguments are noted. So tiles, warps and types are those of a real launch, not a second list.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.runtime import JITFunction

from bra_triton.bench.static_analysis import KernelSpecimen
from bra_triton.kernels import launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_COMPILER_OPTIONS = ("num_warps", "num_stages")


def record(run: Callable[[], object]) -> list[KernelSpecimen]:
    """The kernels that `run` launches, in order, without launching them.

    Raises:
        TypeError: under `TRITON_INTERPRET=1`, where kernels are not compiled.
    """
    specimens: list[KernelSpecimen] = []

    def note(kernel: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: specimens.append(_specimen(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "__getitem__", note):
        run()
    if not specimens:
        raise TypeError("no compiled kernel was launched; is TRITON_INTERPRET set?")
    return specimens


def record_attention(problem: launch.Problem, dtype: torch.dtype) -> list[KernelSpecimen]:
    """Every kernel of one forward and backward of a problem."""
    height, width = problem.n_win * problem.region_height, problem.n_win * problem.region_width
    qkv = torch.empty(problem.batch, height, width, problem.packed_dim, dtype=dtype, device="meta")
    grad_out = torch.empty(problem.batch, height, width, problem.dim, dtype=dtype, device="meta")

    def run() -> None:
        _, r_idx = launch.region_routing(qkv, problem)
        out, lse = launch.attention_forward(qkv, r_idx, problem)
        launch.attention_backward(grad_out, qkv, r_idx, out, lse, problem)

    return record(run)


def _specimen(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelSpecimen:
    options = {name: kwargs.pop(name) for name in _COMPILER_OPTIONS if name in kwargs}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constexprs = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
    signature = {name: _type(value) for name, value in bound.items() if name not in constexprs}
    return KernelSpecimen(kernel.fn.__name__, kernel, signature, constexprs, **options)


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"
