"""The experts' MLP for a sampler on a CPU: few rows, for which reading the weights is the work.

Small experts do all their rows, padded to as many each, in one batched product. Large ones are
left factors of a product each. For more rows see `grouped_swiglu`.

Legend: R tokens, k experts a token has here at most, N rows (pairs of token and expert), e experts,
D width, I width of one expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.models.rows import RowMap, add_up, gather

# Weights of the down projection from which on an expert is large.
LARGE_EXPERT = 2**14
# Where rows are padded: rows an expert on average, of small experts and of large ones; rows an
# expert at most; and padded rows to each real one.
MIN_PADDED_ROWS, MIN_PADDED_ROWS_OF_LARGE, MOST_PADDED_ROWS, MOST_PADDING = 2, 6, 64, 4
# Rows a large expert, on average, up to which it is a left factor where none are padded.
MOST_LEFT_ROWS = 32


def few_rows_swiglu(
    tokens: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows: RowMap
) -> Tensor | None:
    """`grouped_swiglu` without a gradient. None: grouped products are faster, or not on a CPU.

    Args:
        tokens: [R, D].
        weights: [R, k] float32.
        gate_up_proj: [e, 2 I, D].
        down_proj: [e, D, I].
        rows: The cells of [R, k] that are rows.

    Returns:
        [R, D].
    """
    num_rows, num_experts = len(rows.token_of_row), len(down_proj)
    if tokens.device.type != "cpu" or tokens.dtype != torch.float32 or num_rows == 0:
        return None
    is_large = down_proj[0].numel() >= LARGE_EXPERT
    least = MIN_PADDED_ROWS_OF_LARGE if is_large else MIN_PADDED_ROWS
    if _suits_padding(rows, most := int(rows.rows_per_group.max()), least):
        return _padded_swiglu(tokens, weights, gate_up_proj, down_proj, rows, most)
    if is_large and num_rows <= MOST_LEFT_ROWS * num_experts:
        return _left_swiglu(tokens, weights, gate_up_proj, down_proj, rows)
    return None


def _suits_padding(rows: RowMap, most: int, least: int) -> bool:
    """Whether one batched product of all experts, padded to `most` rows each, beats one of each.

    It does from `least` rows an expert on: a product of a few takes longer to start than to
    compute.
    """
    num_rows, num_experts = len(rows.token_of_row), len(rows.rows_per_group)
    enough = num_rows >= least * num_experts
    return enough and most <= MOST_PADDED_ROWS and most * num_experts <= MOST_PADDING * num_rows


def _padded_swiglu(
    tokens: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    rows: RowMap,
    most: int,
) -> Tensor:
    """One batched product of all experts, each with `most` rows."""
    counts = rows.rows_per_group
    first_of_group = counts.cumsum(0) - counts
    group = torch.repeat_interleave(counts)
    cells = group * most + torch.arange(len(group), device=group.device) - first_of_group[group]
    padded = tokens.new_zeros(len(counts) * most, tokens.shape[1])
    padded.index_copy_(0, cells, gather(tokens, rows))
    padded = padded.view(len(counts), most, -1)
    gate, up = torch.bmm(padded, gate_up_proj.transpose(1, 2)).chunk(2, dim=2)
    outputs = torch.bmm(F.silu(gate).mul_(up), down_proj.transpose(1, 2)).flatten(0, 1)
    row_weights = weights.flatten()[rows.cell_of_row]
    return add_up(outputs[cells].mul_(row_weights[:, None]), rows)


def _left_swiglu(
    tokens: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows: RowMap
) -> Tensor:
    """A product of each expert, whose matrix is the left factor.

    BLAS reads a matrix so in up to half the time for 2 to 32 rows, but not for one: that gets a
    second, of zeros.
    """
    counts = rows.rows_per_group
    seconds = (counts == 1).to(torch.int64)
    offsets = (counts + seconds).cumsum(0).to(torch.int32)
    shift = torch.repeat_interleave(seconds.cumsum(0) - seconds, counts)
    cells = torch.arange(len(shift), device=shift.device) + shift
    spread = tokens.new_zeros(int(offsets[-1]), tokens.shape[1])
    spread.index_copy_(0, cells, gather(tokens, rows))
    gate, up = F.grouped_mm(gate_up_proj, spread.T, offs=offsets).chunk(2, dim=0)
    activations = F.silu(gate).mul_(up).T.contiguous()
    outputs = F.grouped_mm(down_proj, activations.T, offs=offsets).T[cells]
    row_weights = weights.flatten()[rows.cell_of_row]
    return add_up(outputs.mul_(row_weights[:, None]), rows)
