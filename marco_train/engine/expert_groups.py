"""What DeepSpeed has to know of the experts, so that the model file need not know DeepSpeed.

DeepSpeed finds experts by the class of the module that holds them and by two attributes of their
parameters. Both are put on from outside, under expert parallelism only: with one rank to a group
the experts are ordinary parameters.
"""

from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from marco_train.distributed import expert_parallel_group
from marco_train.models.moe import SparseMLP


class MarkedSparseMLP(SparseMLP, MoE):  # type: ignore[misc]
    """A `SparseMLP` that DeepSpeed recognises; never constructed, see `mark_experts`."""

    num_local_experts: int
    ep_size: int
    expert_group_name: str

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Tell DeepSpeed of our groups of ranks and form those that it adds, once; called by it."""
        known = groups._get_expert_parallel_group_dict()
        if self.expert_group_name not in known:
            # A group of its own over the same ranks would have communicators and buffers again.
            known[self.expert_group_name] = expert_parallel_group(self.ep_size)
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )


def expert_group_name(expert_parallel_size: int) -> str:
    """Name DeepSpeed's group of ranks of this size."""
    return f"ep_size_{expert_parallel_size}"


def mark_experts(model: nn.Module, expert_parallel_size: int) -> None:
    """Tell DeepSpeed which parameters differ between the ranks of a group."""
    if expert_parallel_size == 1:
        return
    for module in model.modules():
        if not isinstance(module, SparseMLP):
            continue
        module.__class__ = MarkedSparseMLP
        assert isinstance(module, MarkedSparseMLP)
        module.num_local_experts = module.num_experts // expert_parallel_size
        module.ep_size = expert_parallel_size
        module.expert_group_name = expert_group_name(expert_parallel_size)
        for parameter in module.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = module.expert_group_name  # type: ignore[attr-defined]


def is_expert(parameter: Any) -> bool:
    """Whether `mark_experts` marked the parameter."""
    return getattr(parameter, "allreduce", True) is False
