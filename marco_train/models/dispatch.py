"""Bring each token to its experts and the results back.

    pairs of (token, expert), sorted by expert
      -> [all-to-all over the expert-parallel group, sorted again by local expert]
      -> rows grouped by this rank's experts

Legend: T tokens, K experts a token, E experts, e experts of this rank, P ranks of the group,
D width, N rows that reach this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Exchange rows; the gradient goes back the way the rows came."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows: Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.splits = sent, received, group  # type: ignore[attr-defined]
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.splits  # type: ignore[attr-defined]
        return _exchange(grad, received, sent, group), None, None, None


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[p]` neighbouring rows to each rank p and get `received[p]` from it."""
    out: Tensor = _AllToAll.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class Dispatch:
    """Rows grouped by this rank's experts, and the way back."""

    rows: Tensor  # [N, D]
    rows_per_expert: Tensor  # [e] int64
    _order: Tensor  # [T * K] int64, pairs sorted by expert
    _regroup: Tensor | None  # [N] int64, received rows sorted by local expert
    _sent: list[int]
    _received: list[int]
    _group: dist.ProcessGroup | None

    def combine(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Weigh the experts' outputs [N, D] by `weights` [T, K] and add up each token's."""
        if self._group is not None:
            assert self._regroup is not None
            outputs = torch.empty_like(outputs).index_copy(0, self._regroup, outputs)
            outputs = all_to_all(outputs, self._received, self._sent, self._group)
        num_tokens, top_k = weights.shape
        pairs = torch.empty_like(outputs).index_copy(0, self._order, outputs)
        pairs = pairs.view(num_tokens, top_k, -1)
        return (pairs * weights[..., None]).sum(1)


def dispatch(
    hidden: Tensor, expert_ids: Tensor, num_experts: int, group: dist.ProcessGroup | None
) -> Dispatch:
    """Group the tokens `hidden` [T, D] by the experts `expert_ids` [T, K] they are routed to.

    Every rank of the group takes part, also with T = 0.
    """
    pair_experts = expert_ids.flatten()
    order = pair_experts.argsort(stable=True)
    rows = hidden.index_select(0, order // expert_ids.shape[1])
    rows_per_expert = torch.bincount(pair_experts, minlength=num_experts)
    if group is None:
        return Dispatch(rows, rows_per_expert, order, None, [], [], None)

    # One small exchange tells every rank how many rows come for each of its experts.
    num_ranks = group.size()
    sent_counts = rows_per_expert.view(num_ranks, -1)  # [P, e]
    received_counts = torch.empty_like(sent_counts)
    dist.all_to_all_single(received_counts, sent_counts, group=group)
    sent, received = sent_counts.sum(1).tolist(), received_counts.sum(1).tolist()
    rows = all_to_all(rows, sent, received, group)

    # Rows come sorted by rank, then expert; the grouped GEMM wants them sorted by expert.
    local_experts = torch.arange(received_counts.shape[1], device=hidden.device)
    expert_of_row = local_experts.repeat(num_ranks).repeat_interleave(received_counts.flatten())
    regroup = expert_of_row.argsort(stable=True)
    return Dispatch(
        rows.index_select(0, regroup),
        received_counts.sum(0),
        order,
        regroup,
        sent,
        received,
        group,
    )
