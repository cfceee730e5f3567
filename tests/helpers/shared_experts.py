"""Engines of vLLM that share their experts on a CPU, where vLLM lacks what they exchange with.

What is put in its place follows vLLM's own for GPUs: cuda_communicator.py for the collectives, and
kernels that leave out the experts of other ranks.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.rollout import build
from marco_train.stages.opd import run_opd


def share_experts_on_cpu() -> None:
    """Give vLLM what it lacks, for the rest of this process."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    of_all_experts = CPUUnquantizedExperts.apply

    def apply(self: Any, *, topk_weights: Tensor, topk_ids: Tensor, **given: Any) -> None:
        expert_map = given["expert_map"]  # -1 for those of other ranks
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            topk_weights = topk_weights * (local >= 0)
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        of_all_experts(self, topk_weights=topk_weights, topk_ids=topk_ids, **given)

    patch = pytest.MonkeyPatch()
    patch.setattr(CPUUnquantizedExperts, "apply", apply)
    patch.setattr(CpuCommunicator, "all_gatherv", all_gatherv, raising=False)
    patch.setattr(CpuCommunicator, "reduce_scatterv", reduce_scatterv, raising=False)
    patch.setattr(build, "require_shared_experts", lambda _: None)


def all_gatherv(self: Any, inputs: list[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
    """Join each tensor's rows of all ranks, which have `sizes` of them."""
    assert dim == 0
    found = []
    for mine in inputs:
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.device_group)
        found.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return found


def reduce_scatterv(self: Any, summand: Tensor, dim: int, sizes: list[int]) -> Tensor:
    """Sum over all ranks, of which each keeps its rows."""
    assert dim == 0
    total = summand.clone()
    dist.all_reduce(total, group=self.device_group)
    mine: Tensor = total.split(sizes)[self.rank_in_group]
    return mine.clone()


def run_opd_with_shared_experts(cfg: TrainConfig) -> None:
    """Distil, on a CPU."""
    share_experts_on_cpu()
    run_opd(cfg)
