"""Attention to gathered keys and values, in chunks of query regions.

For each chunk, the keys and values of the chosen regions are copied side by side, attended to and dropped;
the backward gathers them again. A chunk reads its queries from their map, and writes its output to the
output's map. The size of a chunk depends on the device; see `chunks`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.problem import Gradients, Padding, RoutedAttention, statistic_dtype
from . import chunks
from .regions import by_region, empty_map, flat_index, sum_over_padding, whole_map, write_map
from .sums import Choices


def attend(
    problem: RoutedAttention[Tensor], forward: chunks.Forward, most: int, out: Tensor, lse: Tensor
) -> None:
    """Writes the results of `attention.attend_routed`, in chunks of at most `most` query regions."""
    grid, n_graphs = problem.query_grid, problem.n_graphs
    whole_out, whole_lse = out, lse.permute(0, 2, 3, 1)
    if grid.is_padded:
        whole_out, whole_lse = (empty_map(x, grid) for x in (whole_out, whole_lse))
    out_regions, lse_regions = (by_region(x, grid, n_graphs) for x in (whole_out, whole_lse))
    for chunk in _chunks(problem, most):
        out_chunk, lse_chunk = forward(chunk.query, *chunk.keys_values(), problem.scale)
        _write(out_regions[chunk.box], out_chunk)
        _write(lse_regions[chunk.box], lse_chunk.transpose(1, 2))
        del chunk, out_chunk, lse_chunk  # frees their memory before the next chunk is made
    if grid.is_padded:
        out.copy_(whole_out[:, : grid.height, : grid.width])
        lse.copy_(whole_lse[:, : grid.height, : grid.width].permute(0, 3, 1, 2))


def attend_backward(
    grad_out: Tensor,
    problem: RoutedAttention[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Gradients[Tensor],
    backward: chunks.Backward,
    most: int,
    needs_factor: bool,
) -> chunks.SmallGradients:
    """As `attention.attention_backward`, in chunks of at most `most` query regions."""
    grid, n_graphs = problem.query_grid, problem.n_graphs
    *maps, lse_regions = (
        by_region(whole_map(x, grid), grid, n_graphs) for x in (grad_out, out, lse.permute(0, 2, 3, 1))
    )
    lse_regions = lse_regions.permute(0, 1, 2, 3, 6, 4, 5)
    lse_shape = (-1, problem.num_heads // n_graphs, grid.region_tokens)
    grad_query = empty_map(problem.query, grid) if grid.is_padded else gradients.query
    grad_query_regions = by_region(grad_query, grid, n_graphs)
    n_regions = problem.batch * n_graphs * problem.kv_grid.n_regions
    grad_key: Tensor | None = None
    grad_value: Tensor | None = None
    dtype = statistic_dtype(grad_out.dtype)
    shape = (problem.batch, n_graphs, grid.rows, grid.columns, problem.topk)
    grad_factor = out.new_zeros(shape, dtype=dtype) if needs_factor else None
    for chunk in _chunks(problem, most):
        grad_rows, out_rows = (_read(x[chunk.box], chunk.num_heads) for x in maps)
        lse_rows = lse_regions[chunk.box].reshape(lse_shape)
        chunk_query, chunk_key, chunk_value = backward(
            grad_rows, chunk.query, *chunk.keys_values(), out_rows, lse_rows, problem.scale
        )
        _write(grad_query_regions[chunk.box], chunk_query)
        if grad_factor is not None:
            of_chunk = grad_factor[chunk.box]
            of_chunk.copy_(chunk.factor_gradient(chunk_key, chunk_value, dtype).view(of_chunk.shape))
        grad_key, grad_value = (
            chunk.choices.add(grad.reshape(len(grad) * problem.topk, -1), total, n_regions)
            for grad, total in ((chunk_key, grad_key), (chunk_value, grad_value))
        )
        # Free their memory before the next chunk is made.
        del chunk, grad_rows, out_rows, chunk_query, chunk_key, chunk_value
    if grid.is_padded:
        gradients.query.copy_(grad_query[:, : grid.height, : grid.width])
    factor = None if grad_factor is None else grad_factor.flatten(2, 3)
    return chunks.SmallGradients(factor, _write_keys_values(problem, gradients, grad_key, grad_value))


def _write_keys_values(
    problem: RoutedAttention[Tensor], gradients: Gradients[Tensor], *totals: Tensor | None
) -> Padding[Tensor] | None:
    """Writes the sums of the gradients of keys and values to their maps; returns the padding's gradients.

    `totals` are the sums for the keys and for the values, `(N*G*P_kv, S_kv*c)`, by region.
    """
    grid, n_graphs, sums = problem.kv_grid, problem.n_graphs, []
    for target, total in zip((gradients.key, gradients.value), totals, strict=True):
        if total is None:  # a batch without images
            total = target.new_zeros(0, grid.region_tokens * target.shape[-1] // n_graphs)
        whole = write_map(target, total, grid, n_graphs)
        if problem.padding is not None:
            sums.append(sum_over_padding(whole, grid))
    return Padding(*sums) if sums else None


@dataclass(frozen=True)
class _Chunk:
    """Some query regions with the keys and values that they attend to.

    A query region with several graphs counts once for each graph, with the channels of that graph's heads.

    Attributes:
        box: where the query regions lie in the view `by_region`: slices of images, graphs, rows and columns
            of regions. The last slices are missing where nothing is cut.
        choices: the key regions that they chose, as numbers of rows of `_key_value_regions`.
        query: `(R, S, m, c)`.
        gathered: keys and values of the chosen regions: one tensor `(R*topk, S_kv, c_k + c_v)`, or a tensor
            of the keys and one of the values.
        widths: `c_k` and `c_v`, channels of all heads of one graph.
    """

    box: chunks.Box
    choices: Choices
    query: Tensor
    gathered: list[Tensor]
    widths: list[int]

    @property
    def num_heads(self) -> int:
        """Heads of one graph, `m`."""
        return self.query.shape[2]

    @property
    def topk(self) -> int:
        """Number of key regions that each query region chose."""
        return self.gathered[0].shape[0] // self.query.shape[0]

    def keys_values(self, weighted: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values, `(R, topk*S_kv, m, c)`; if `weighted`, multiplied by the factor."""
        parts, factor = self.gathered, self.choices.factor
        if weighted and factor is not None:
            parts = [x * factor[:, None, None].to(x.dtype) for x in parts]
        if len(parts) == 1:
            parts = list(parts[0].split_with_sizes(self.widths, dim=-1))
        n_regions, _, num_heads, _ = self.query.shape
        list_length = self.topk * parts[0].shape[1]
        key, value = (x.view(n_regions, list_length, num_heads, x.shape[-1] // num_heads) for x in parts)
        return key, value

    def factor_gradient(self, grad_key: Tensor, grad_value: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of the factor, `(R, topk)`, from the gradients of the weighted keys and values."""
        pairs = zip((grad_key, grad_value), self.keys_values(weighted=False), strict=True)
        of_key, of_value = (
            (grad * x.to(dtype)).unflatten(1, (self.topk, -1)).sum((2, 3, 4)) for grad, x in pairs
        )
        return of_key + of_value


def _chunks(problem: RoutedAttention[Tensor], most: int) -> Iterator[_Chunk]:
    """Cuts the problem into chunks of at most `most` whole query regions, but of at least one."""
    grid, topk, n_graphs = problem.query_grid, problem.topk, problem.n_graphs
    num_heads, n_key_regions = problem.num_heads // n_graphs, problem.kv_grid.n_regions
    query = by_region(whole_map(problem.query, grid), grid, n_graphs)
    key_value, shape = _key_value_regions(problem), query.shape[:4]
    widths = [x.shape[-1] // n_graphs for x in (problem.key, problem.value)]
    r_idx = None
    if problem.r_idx is not None:
        r_idx = flat_index(problem.r_idx, n_key_regions).view(*shape, topk)
    factor = None if problem.factor is None else problem.factor.view(*shape, topk)
    buffers: list[Tensor] = []
    for box in chunks.boxes(shape, most):
        rows = query[box]
        sizes = rows.shape[:4]
        # `first` is correct only if the axis of images is not cut. It is cut only after `masked` has failed
        # for several images; that happens on the CPU, where nothing reads `reached`.
        first = n_key_regions * (box[1].start if len(box) > 1 else 0)
        choices = Choices(
            index=None if r_idx is None else r_idx[box].flatten(),
            factor=None if factor is None else factor[box].flatten(),
            reached=range(first, first + sizes[0] * sizes[1] * n_key_regions),
            is_complete=sizes[2:] == shape[2:],
        )
        if choices.index is None:
            gathered = [x[choices.reached.start : choices.reached.stop] for x in key_value]
        else:
            # All chunks use the memory of the first chunk, which is the largest.
            buffers = buffers or [x.new_empty(len(choices.index), *x.shape[1:]) for x in key_value]
            gathered = [_rows(*each, choices.index) for each in zip(key_value, buffers, strict=True)]
        yield _Chunk(box, choices, _read(rows, num_heads), gathered, widths)


def _rows(x: Tensor, buffer: Tensor, index: Tensor) -> Tensor:
    """The rows of `x` that `index` names, written to the first rows of `buffer`."""
    return torch.index_select(x, 0, index, out=buffer[: len(index)])


def _key_value_regions(problem: RoutedAttention[Tensor]) -> list[Tensor]:
    """Keys and values of every region, `(N*G*P_kv, S_kv, c)`: one tensor if they are slices of one map."""
    grid, n_graphs, padding = problem.kv_grid, problem.n_graphs, problem.padding
    maps = [problem.key, problem.value]
    fills = [] if padding is None else [padding.key, padding.value]
    if problem.key_value is not None and n_graphs == 1:
        maps, fills = [problem.key_value], [torch.cat(fills)] if fills else []
    wholes = [whole_map(x, grid, fill) for x, fill in itertools.zip_longest(maps, fills)]
    return [
        by_region(x, grid, n_graphs).reshape(-1, grid.region_tokens, x.shape[-1] // n_graphs) for x in wholes
    ]


def _read(regions: Tensor, num_heads: int) -> Tensor:
    """Reshapes a box of the view `by_region` to `(R, S, m, c)`."""
    height, width, channels = regions.shape[4:]
    return regions.reshape(-1, height * width, num_heads, channels // num_heads)


def _write(regions: Tensor, rows: Tensor) -> None:
    """Undoes `_read`: writes `rows` to a box of the view `by_region`."""
    regions.copy_(rows.reshape(regions.shape))
