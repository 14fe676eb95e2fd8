"""Runs the torch backend's path for NVIDIA on the CPU, with stand-ins for PyTorch's operators of that device.

A stand-in has the schema of PyTorch's operator, refuses the arguments that the operator refuses, and computes
by the definition, in float64.
"""

import math
import weakref
from contextlib import ExitStack, contextmanager
from typing import ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bra_triton.backend.torch import devices, efficient

LSE_BLOCK = 32
_in_stand_in = []  # the stand-ins that are running; `no_waits` refuses nothing in them


@contextmanager
def nvidia():
    """Context in which tensors on the CPU take the path for NVIDIA GPUs.

    It gives a list that collects the names of the stand-ins that are called.
    """
    calls = []

    def recorded(stand_in):
        def call(*args, **kwargs):
            calls.append(stand_in.__name__)
            for log in Launches.open_logs:
                log.names.append(stand_in.__name__)
            _in_stand_in.append(stand_in)
            try:
                with _disable_current_modes():
                    made = stand_in(*args, **kwargs)
            finally:
                _in_stand_in.pop()
            for count in LiveBytes.open_counts:
                count.note(made, _workspace(args[1]) if stand_in is efficient_backward else 0)
            return made

        return call

    with (
        mock.patch.object(devices, "kind", lambda x: "cuda" if x.device.type == "cpu" else x.device.type),
        mock.patch.object(efficient, "can_use_efficient_attention", _can_use),
        mock.patch.object(efficient, "_FORWARD", recorded(efficient_forward)),
        mock.patch.object(efficient, "_BACKWARD", recorded(efficient_backward)),
        mock.patch.object(torch.ops.aten, "_conv_depthwise2d", recorded(depthwise), create=True),
    ):
        yield calls


@contextmanager
def no_waits():
    """Context that refuses to read values of a tensor, because the CPU would have to wait for a GPU."""

    def guarded(ask):
        def call(x, *args, **kwargs):
            assert _in_stand_in, f"asks for the values of a tensor of shape {tuple(x.shape)}"
            return ask(x, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ("__int__", "__bool__", "__float__", "__index__", "item", "tolist", "nonzero"):
            patch = mock.patch.object(torch.Tensor, name, guarded(getattr(torch.Tensor, name)))
            stack.enter_context(patch)
        yield


class Launches(TorchDispatchMode):
    """Dispatch mode that notes the names of operators that compute something.

    Of a stand-in it notes the name, and none of the operators that the stand-in calls.
    """

    open_logs: ClassVar[list["Launches"]] = []
    _VIEWS = frozenset(
        "permute view _unsafe_view expand select slice split split_with_sizes transpose unsqueeze t alias "
        "detach empty new_empty as_strided".split()
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __enter__(self):
        self.open_logs.append(self)
        return super().__enter__()

    def __exit__(self, *args):
        self.open_logs.remove(self)
        return super().__exit__(*args)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        if name not in self._VIEWS:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Within it the memory of living tensors is counted, as an allocator would, of those made within it.

    Attributes:
        peak: the most bytes at any time, with the workspace that a stand-in's kernel would take.
    """

    open_counts: ClassVar[list["LiveBytes"]] = []

    def __init__(self):
        super().__init__()
        self._live, self.now, self.peak = {}, 0, 0

    def __enter__(self):
        self.open_counts.append(self)
        return super().__enter__()

    def __exit__(self, *args):
        self.open_counts.remove(self)
        return super().__exit__(*args)

    def note(self, made, workspace=0):
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._live:
                storage = x.untyped_storage()
                self._live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.now + workspace)

    def _drop(self, key):
        self.now -= self._live.pop(key)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        self.note(made)
        return made


def _can_use(params):
    return params.query.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _check(*tensors):
    """Checks what PyTorch's `check_supported` demands of (B, M, H, K): address and strides of 16 bytes."""
    for x in tensors:
        assert x.dim() == 4
        assert x.dtype == tensors[0].dtype
        assert x.stride(3) == 1
        assert x.data_ptr() % 16 == 0
        # The stride of heads, too, even if there is one head: PyTorch's choice of a kernel looks at it.
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        assert x.shape[3] * x.element_size() % 16 == 0
        assert x.shape[0] < 2**16


def _workspace(query):
    regions, tokens, heads, channels = query.shape
    return regions * efficient.workspace_bytes(tokens, heads, channels)


def _scores(query, key, scale, bias):
    scores = torch.einsum("bmhk,bnhk->bhmn", query.double(), key.double()) * scale
    if bias is None:
        return scores
    assert bias.shape == scores.shape
    assert bias.dtype == query.dtype
    assert bias.stride(3) == 1
    assert bias.data_ptr() % 16 == 0
    assert all(stride * bias.element_size() % 16 == 0 for stride in bias.stride()[:3])
    # The kernels load rows to the start of the next, and the backward adds what it finds there: the lowest
    # finite numbers are safe.
    rows = torch.as_strided(bias, (*bias.shape[:3], bias.stride(2)), bias.stride(), bias.storage_offset())
    assert rows.isfinite().all()
    assert (rows[..., bias.shape[3] :] <= bias.min()).all()
    return scores + bias


def efficient_forward(
    query,
    key,
    value,
    bias,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    custom_mask_type,
    compute_log_sumexp=False,
    *,
    scale=None,
    seqlen_k=None,
    window_size=None,
):
    """Stand-in for `aten::_efficient_attention_forward`."""
    options = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_k, window_size)
    assert options == (None,) * len(options)
    assert (dropout_p, custom_mask_type, compute_log_sumexp) == (0.0, 0, True)
    _check(query, key, value)
    scores = _scores(query, key, scale, bias)
    # A row whose scores are all minus infinity counts as masked: PyTorch's kernel makes its output and lse 0.
    masked = (scores == -math.inf).all(-1)
    lse = scores.logsumexp(-1).masked_fill(masked, 0)
    lse = lse.masked_fill(lse == math.inf, math.nan)
    probs = (scores - lse[..., None]).exp()
    out = torch.einsum("bhmn,bnhk->bmhk", probs, value.double())
    out = out.masked_fill(masked.transpose(1, 2)[..., None], 0)
    rows = query.shape[1]
    padded = F.pad(lse.float(), (0, -rows % LSE_BLOCK), value=math.inf).contiguous()
    seed = torch.empty((), dtype=torch.int64)
    return out.to(value.dtype).contiguous(), padded, seed, seed, rows, key.shape[1]


def efficient_backward(
    grad_out,
    query,
    key,
    value,
    bias,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    logsumexp,
    dropout_p,
    philox_seed,
    philox_offset,
    custom_mask_type,
    bias_requires_grad,
    *,
    scale=None,
    num_splits_key=None,
    window_size=None,
    shared_storage_dqdkdv=False,
):
    """Stand-in for `aten::_efficient_attention_backward`."""
    assert (cu_seqlens_q, cu_seqlens_k, window_size) == (None,) * 3
    assert (max_seqlen_q, max_seqlen_k) == (query.shape[1], key.shape[1])
    assert (dropout_p, custom_mask_type, bias_requires_grad) == (0.0, 0, False)
    assert not shared_storage_dqdkdv
    assert num_splits_key == 1  # with more splits the kernel adds up by atomics
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    _check(grad_out, query, key, value, out)
    assert grad_out.is_contiguous()
    assert out.is_contiguous()  # the kernel does not look at its strides
    batch, rows, heads, _ = query.shape
    dtype = query.dtype
    assert logsumexp.dtype == torch.float32
    assert logsumexp.shape == (batch, heads, rows + -rows % LSE_BLOCK)
    assert logsumexp.is_contiguous()
    assert (logsumexp[..., rows:] == math.inf).all()
    probs = (_scores(query, key, scale, bias) - logsumexp[..., :rows, None].double()).exp()
    grad_out, query, key, value, out = (x.double() for x in (grad_out, query, key, value, out))
    delta = (grad_out * out).sum(-1).transpose(1, 2)[..., None]
    grad_scores = probs * (torch.einsum("bmhk,bnhk->bhmn", grad_out, value) - delta) * scale
    gradients = (
        torch.einsum("bhmn,bnhk->bmhk", grad_scores, key),
        torch.einsum("bhmn,bmhk->bnhk", grad_scores, query),
        torch.einsum("bhmn,bmhk->bnhk", probs, grad_out),
    )
    return *(x.to(dtype).contiguous() for x in gradients), None


def depthwise(x, weight, kernel_size, bias, stride, padding, dilation):
    """Stand-in for `aten::_conv_depthwise2d`; returns contiguous NCHW for any strides of `x`."""
    assert x.numel() > 0
    assert list(kernel_size) == list(weight.shape[2:])
    assert x.dtype == weight.dtype
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups=len(weight))
    return out.contiguous()
