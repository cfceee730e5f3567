"""A sparse MLP: route -> dispatch -> grouped SwiGLU -> combine.

Legend: T tokens, D width, E experts, e experts of this rank, K experts a token, I expert width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from marco_train.models.dispatch import dispatch
from marco_train.models.grouped_swiglu import grouped_swiglu


class Router(nn.Module):
    """Choose K experts for each token and weigh them."""

    def __init__(self, width: int, num_experts: int, top_k: int, norm_topk_prob: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Route [T, D]; returns weights [T, K] in the type of hidden, and experts [T, K]."""
        # float32: a tie broken by rounding would send a token to another expert.
        probabilities = F.linear(hidden, self.weight).float().softmax(-1)
        weights, expert_ids = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(hidden.dtype), expert_ids


class Experts(nn.Module):
    """This rank's experts, fused as in transformers v5."""

    def __init__(self, num_local_experts: int, width: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, width, expert_width))


class SparseMLP(nn.Module):
    """Mixture of experts, shared over an expert-parallel group or whole on this rank."""

    def __init__(
        self,
        width: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        norm_topk_prob: bool,
        ep_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.ep_group = ep_group
        ep_size = 1 if ep_group is None else ep_group.size()
        self.gate = Router(width, num_experts, top_k, norm_topk_prob)
        self.experts = Experts(num_experts // ep_size, width, expert_width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        weights, expert_ids = self.gate(hidden)
        sent = dispatch(hidden, expert_ids, self.num_experts, self.ep_group)
        outputs = grouped_swiglu(
            sent.rows, sent.rows_per_expert, self.experts.gate_up_proj, self.experts.down_proj
        )
        return sent.combine(outputs, weights)
