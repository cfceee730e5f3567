"""The expert MLP as two grouped matrix products.

Legend: N rows, e experts, D width, I width of one expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(rows: Tensor, rows_per_expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply to each group of rows its own expert: down(silu(gate(x)) * up(x)).

    Args:
        rows: [N, D], sorted by expert.
        rows_per_expert: [e] int64, sums to N; zeros are fine.
        gate_up: [e, 2 I, D], the gate's rows first, as transformers v5 stores them.
        down: [e, D, I].

    Returns:
        [N, D].
    """
    if rows.shape[0] == 0:
        # Nothing came; keep the graph whole, so that backward reaches every parameter.
        return rows + 0.0 * (gate_up.sum() + down.sum())
    # Rows past the last offset would stay uninitialised: the offsets end exactly at N.
    offsets = rows_per_expert.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
