"""Bring tokens to the ranks that hold their experts, and the results back.

local         every expert is here: nothing moves.
all_to_all    a token crosses once for each of its experts.
deduplicated  a token crosses once to each rank that holds some of its experts, with the list of
              them; that rank adds their results up, and one row comes back. With 8 experts a token
              over 8 ranks that is about 5.3 rows each way instead of 8.

Either exchange waits for the device once: for the numbers of rows, which size every buffer
exactly.

Legend: T tokens, K experts a token, E experts, e experts of this rank, P ranks of the group,
R tokens that arrive at this rank, k their experts here at most, N pairs of token and expert here,
M rows sent, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.config.parallel import Dispatch
from marco_train.models.rows import RowMap, group_rows, spread_tokens, sum_rows


@dataclass(frozen=True)
class Arrived:
    """What reached this rank's experts."""

    tokens: Tensor  # [R, D]
    weights: Tensor  # [R, k] float32
    rows: RowMap  # the N pairs among [R, k], sorted by expert of this rank
    bring_back: Callable[[Tensor], Tensor]
    """Takes a result of each token that arrived, [R, D]; returns the sums of this rank's own,
    [T, D]."""


class _Exchange(torch.autograd.Function):
    """Exchange rows of some tensors; their gradients go back the way they came, in one order."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.splits = received, sent, group  # type: ignore[attr-defined]
        return tuple(_all_to_all(tensor, sent, received, group) for tensor in tensors)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        splits: tuple[list[int], list[int], dist.ProcessGroup] = ctx.splits  # type: ignore[attr-defined]
        return (None, None, None, *(_all_to_all(grad, *splits) for grad in grads))


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[p]` neighbouring rows to each rank p and get `received[p]` from it."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send row p of [P, n] to rank p and get its row for this rank."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received


def dispatch(
    hidden: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    group: dist.ProcessGroup | None,
    kind: Dispatch,
) -> Arrived:
    """Bring each token to its experts; every rank of the group takes part, also with T = 0.

    Args:
        hidden: [T, D].
        weights: [T, K] float32.
        expert_ids: [T, K] int64.
        num_experts: E.
        group: Ranks the experts are shared over, in order. None: all are here.
        kind: How tokens cross a group.
    """
    if group is None:
        rows = group_rows(expert_ids, num_experts, expert_ids.numel())
        return Arrived(hidden, weights, rows, lambda outputs: outputs)
    match kind:
        case Dispatch.all_to_all:
            return _dispatch_pairs(hidden, weights, expert_ids, num_experts, group)
        case Dispatch.deduplicated:
            return _dispatch_tokens(hidden, weights, expert_ids, num_experts, group)


def _dispatch_pairs(
    hidden: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    group: dist.ProcessGroup,
) -> Arrived:
    num_ranks = group.size()
    pairs = group_rows(expert_ids, num_experts, expert_ids.numel())
    sent_counts = pairs.rows_per_group.view(num_ranks, -1)  # [P, e]
    received_counts = _exchange_counts(sent_counts, group)
    sent, received = torch.stack([sent_counts.sum(1), received_counts.sum(1)]).tolist()
    tokens, arrived_weights = _Exchange.apply(  # type: ignore[no-untyped-call]
        sent, received, group, spread_tokens(hidden, pairs), weights.flatten()[pairs.cell_of_row]
    )
    # They come sorted by rank, then expert; the experts want them sorted by expert.
    num_local = num_experts // num_ranks
    experts = torch.arange(num_local, device=hidden.device).repeat(num_ranks)
    experts = experts.repeat_interleave(received_counts.flatten(), output_size=sum(received))

    def bring_back(outputs: Tensor) -> Tensor:
        (returned,) = _Exchange.apply(received, sent, group, outputs)  # type: ignore[no-untyped-call]
        return sum_rows(returned, pairs)

    rows = group_rows(experts[:, None], num_local, sum(received))
    return Arrived(tokens, arrived_weights[:, None], rows, bring_back)


def _dispatch_tokens(
    hidden: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    group: dist.ProcessGroup,
) -> Arrived:
    num_ranks = group.size()
    num_local = num_experts // num_ranks
    ranks = expert_ids // num_local  # [T, K]
    needed = torch.zeros(len(hidden), num_ranks, dtype=torch.bool, device=hidden.device)
    needed.scatter_(1, ranks, True)
    pairs_per_rank = torch.zeros(num_ranks, dtype=torch.int64, device=hidden.device)
    pairs_per_rank.scatter_add_(0, ranks.flatten(), torch.ones_like(ranks).flatten())
    counts = torch.stack([needed.sum(0), pairs_per_rank], 1)  # [P, 2]
    sent, received, pairs = (
        torch.cat([counts[:, :1], _exchange_counts(counts, group)], 1).T.contiguous().tolist()
    )

    everyone = torch.arange(num_ranks, device=hidden.device)
    crossing = group_rows(torch.where(needed, everyone, num_ranks), num_ranks, sum(sent))
    rank_of_row = crossing.cell_of_row % num_ranks
    # Of a token's K experts, those of the rank it goes to; e marks the others.
    local_ids = expert_ids[crossing.token_of_row] - (rank_of_row * num_local)[:, None]
    here = (local_ids >= 0) & (local_ids < num_local)
    local_ids = torch.where(here, local_ids, num_local)
    # Weights and experts in one message; float32 holds every whole number up to 2^24.
    routes = torch.cat([spread_tokens(weights, crossing) * here, local_ids.float()], 1)
    tokens, arrived_routes = _Exchange.apply(  # type: ignore[no-untyped-call]
        sent, received, group, spread_tokens(hidden, crossing), routes
    )
    arrived_weights, arrived_ids = arrived_routes.chunk(2, dim=1)

    def bring_back(outputs: Tensor) -> Tensor:
        (returned,) = _Exchange.apply(received, sent, group, outputs)  # type: ignore[no-untyped-call]
        return sum_rows(returned, crossing)

    rows = group_rows(arrived_ids.detach().long(), num_local, sum(pairs))
    return Arrived(tokens, arrived_weights.contiguous(), rows, bring_back)
