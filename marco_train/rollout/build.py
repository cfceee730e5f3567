"""From a rollout's config to the sampler."""

from collections.abc import Sequence

import torch

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.model import DType
from marco_train.config.opd import OPDConfig
from marco_train.config.rollout import (
    NativeRolloutConfig,
    VLLMRolloutConfig,
    VLLMServerRolloutConfig,
    WeightsBy,
    check_expert_shares,
    check_kv_cache,
    check_replay,
)
from marco_train.config.trained import AnsweredStage
from marco_train.distributed import device, world_size
from marco_train.errors import require
from marco_train.inference.engine import require_shared_experts, require_vllm
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.models.weights import empty_model, torch_dtype
from marco_train.rollout.base import Sampler, SamplerSpec

SampledStage = OPDConfig | EvaluateConfig | BenchmarkConfig | AnsweredStage
"""Of which a sampler makes the responses."""


def check_sampler(stage: SampledStage, student: ArchitectureConfig, dtype: DType) -> None:
    """Refuse a sampler that cannot be built here, before anything is loaded.

    Raises:
        InputError: Says what to install or to change.
    """
    cfg = stage.rollout
    check_replay(cfg, student)
    check_expert_shares(cfg, student, world_size())
    if isinstance(cfg, VLLMRolloutConfig):
        check_kv_cache(cfg, student, dtype, longest_sequence(stage) + 1)
        require_vllm()
        require(
            not cfg.replay_routing or torch.cuda.is_available(),
            "stage.rollout.replay_routing is true, and there is no GPU: vLLM says which experts it "
            "took with its V2 model runner only, which needs Triton; set it to false, or choose "
            "rollout@stage.rollout=native",
        )
        if cfg.expert_parallel:
            require_shared_experts(device())
    if isinstance(cfg, VLLMServerRolloutConfig) and cfg.weights_by is WeightsBy.nccl:
        require_vllm()
        require(
            torch.cuda.is_available(),
            "stage.rollout.weights_by is nccl, and there is no GPU here to send from: set it to "
            "file",
        )


def build_sampler(
    cfg: SampledStage,
    architecture: ArchitectureConfig,
    dtype: DType,
    stop_ids: Sequence[int],
    seed: int,
    save_early: SaveEarly = nothing_to_save,
    teacher_bytes: int = 0,
) -> Sampler:
    """Make the sampler of a run, without weights yet; every rank takes part.

    Args:
        cfg: The stage.
        architecture: The student's.
        dtype: Of the weights.
        stop_ids: With which a response ends.
        seed: The run's.
        save_early: Saves the run while servers are away.
        teacher_bytes: Memory of this rank that is left to teachers, which are opened later.
    """
    sampling = SamplerSpec(
        architecture,
        dtype,
        list(stop_ids),
        longest_sequence(cfg) + 1,
        cfg.max_response_length,
        cfg.num_sampler_topk,
        cfg.rollout.replay_routing,
        seed,
    )
    match cfg.rollout:
        case NativeRolloutConfig() as rollout:
            from marco_train.rollout.native import NativeSampler

            return NativeSampler(
                rollout,
                empty_model(architecture, torch_dtype(dtype), ep_group=None),
                stop_ids,
                cfg.max_response_length,
                cfg.num_sampler_topk,
                seed,
            )
        case VLLMRolloutConfig() as rollout:
            from marco_train.rollout.vllm import VLLMSampler

            return VLLMSampler(rollout, sampling, teacher_bytes)
        case VLLMServerRolloutConfig() as rollout:
            from marco_train.rollout.vllm_server import ServerSampler

            return ServerSampler(rollout, sampling, save_early)
    raise TypeError(f"no such sampler: {type(cfg.rollout).__name__}")
