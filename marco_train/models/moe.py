"""A sparse MLP: route -> dispatch -> grouped SwiGLU -> combine.

Legend: T tokens, D width, E experts, e experts of this rank, K experts a token, I expert width.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from marco_train.config.parallel import Dispatch
from marco_train.models.dispatch import dispatch
from marco_train.models.grouped_swiglu import grouped_swiglu
from marco_train.models.routing import LayerRouting, Router


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
        self.dispatch = Dispatch.deduplicated
        ep_size = 1 if ep_group is None else ep_group.size()
        self.gate = Router(width, num_experts, top_k, norm_topk_prob)
        self.experts = Experts(num_experts // ep_size, width, expert_width)

    def forward(
        self, hidden: Tensor, given: Tensor | None = None, observe: bool = False
    ) -> tuple[Tensor, LayerRouting | None]:
        """Map [T, D] to [T, D]; `given` and `observe` are the router's."""
        weights, expert_ids, seen = self.gate(hidden, given, observe)
        arrived = dispatch(
            hidden, weights, expert_ids, self.num_experts, self.ep_group, self.dispatch
        )
        outputs = grouped_swiglu(
            arrived.tokens,
            arrived.weights,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            arrived.rows,
        )
        return arrived.bring_back(outputs), seen
