"""Token-to-token attention on the torch backend; its memory is linear in the size of the map.

The images of a batch are processed in parts, one part after the other. A part gathers keys and values
(`gathered`) or, where that takes less time, attends to all keys under a mask (`masked`). Temporary copies
exist for one part at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...kernels.problem import Gradients, Padding, RoutedAttention, statistic_dtype
from . import chunks, gathered, masked
from .autocast import outside_autocast
from .regions import of_images


@torch.no_grad()  # autograd must not record the writes into the buffers of the results
@outside_autocast
def attend_routed(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`; the statistic is the natural logarithm of the softmax's denominator."""
    query, kernel = problem.query, chunks.kernel_of(problem)
    out = query.new_empty(*query.shape[:3], problem.value.shape[-1])
    lse = out.new_empty((len(out), problem.num_heads, *out.shape[1:3]), dtype=statistic_dtype(out.dtype))
    most = chunks.regions_at_once(problem, kernel)
    _attend(problem, kernel.forward, most, out, lse, masked.is_cheaper(problem, kernel))
    if kernel.checked is not None and not chunks.is_softmax(lse):
        _attend(problem, kernel.checked, most, out, lse, is_masked=False)
    return out, lse


def _attend(
    problem: RoutedAttention[Tensor],
    forward: chunks.Forward,
    most: int,
    out: Tensor,
    lse: Tensor,
    is_masked: bool,
) -> None:
    """Writes the results of `attend_routed`; gathers for at most `most` query regions at a time."""
    for images in _parts(problem, most, is_masked):
        part, part_out, part_lse = of_images(problem, images), out[images], lse[images]
        if not (is_masked and masked.attend(part, part_out, part_lse)):
            gathered.attend(part, forward, most, part_out, part_lse)


@torch.no_grad()  # create_graph=True runs a backward with gradients enabled
@outside_autocast
def attend_routed_backward(
    grad_out: Tensor, problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor
) -> Gradients[Tensor]:
    """See `FusedKernels`."""
    gradients = Gradients(*(x.new_empty(x.shape) for x in (problem.query, problem.key, problem.value)))
    attention_backward(grad_out, problem, out, lse, gradients)
    return gradients


def attention_backward(
    grad_out: Tensor,
    problem: RoutedAttention[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Gradients[Tensor],
    needs_factor: bool = False,
) -> chunks.SmallGradients:
    """Writes the gradients of queries, keys and values, and returns the other gradients.

    The same input always gives the same bits.

    Args:
        grad_out: `(N, H, W, num_heads * v_head_dim)`.
        problem: the problem that `attend_routed` got.
        out: the output of `attend_routed`, without LePE.
        lse: the statistic that `attend_routed` returned.
        gradients: the maps to write to.
        needs_factor: whether to compute the gradient of the factor, too.
    """
    kernel = chunks.kernel_of(problem)
    is_masked = not needs_factor and masked.is_cheaper(problem, kernel)
    most = chunks.regions_at_once(problem, kernel, backward=True, needs_factor=needs_factor)
    found = []
    for images in _parts(problem, most, is_masked):
        part = of_images(problem, images)
        grad_part, out_part, lse_part = (x[images] for x in (grad_out, out, lse))
        targets = Gradients(*(x[images] for x in (gradients.query, gradients.key, gradients.value)))
        small = masked.attend_backward(grad_part, part, out_part, lse_part, targets) if is_masked else None
        if small is None:
            small = gathered.attend_backward(
                *(grad_part, part, out_part, lse_part, targets, kernel.backward, most, needs_factor)
            )
        found.append(small)
    return _of_all_parts(found)


def _of_all_parts(found: Sequence[chunks.SmallGradients]) -> chunks.SmallGradients:
    """Joins the gradients of all parts: concatenates those of the factor, adds up those of the padding."""
    if len(found) == 1:  # saves launches on a GPU
        return found[0]
    factors = [x.factor for x in found if x.factor is not None]
    paddings = [x.padding for x in found if x.padding is not None]
    padding = None
    if paddings:
        key = torch.stack([x.key for x in paddings]).sum(0)
        padding = Padding(key, torch.stack([x.value for x in paddings]).sum(0))
    return chunks.SmallGradients(torch.cat(factors) if factors else None, padding)


def _parts(problem: RoutedAttention[Tensor], most_regions: int, is_masked: bool) -> Iterator[slice]:
    """Slices of the batch, one for each part.

    A part has as many images as fit in a chunk, but at least one. A batch without images is one empty part.
    """
    batch, regions = problem.batch, problem.n_graphs * problem.query_grid.n_regions
    most = masked.images_at_once(problem) if is_masked else most_regions // regions
    step = chunks.even_step(batch, most)
    return (slice(at, min(at + step, batch)) for at in range(0, max(1, batch), step))
