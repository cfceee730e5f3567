"""From a rollout's config to the sampler."""

from collections.abc import Sequence

import torch

from marco_train.architecture import ArchitectureConfig
from marco_train.config import (
    DType,
    OPDConfig,
    RolloutConfig,
    SamplerBackend,
    check_replay,
    longest_sequence,
)
from marco_train.errors import require
from marco_train.inference.engine import require_vllm
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.models.weights import empty_model
from marco_train.rollout.base import Sampler, Sampling


def check_sampler(cfg: RolloutConfig, student: ArchitectureConfig) -> None:
    """Refuse a sampler that cannot be built here, before anything is loaded.

    Raises:
        InputError: Says what to install or to change.
    """
    check_replay(cfg, student)
    if cfg.backend is SamplerBackend.vllm:
        require_vllm()
        require(
            not cfg.replay_routing or torch.cuda.is_available(),
            "stage.rollout.replay_routing is true, and there is no GPU: vLLM says which experts it "
            "took with its V2 model runner only, which needs Triton; set it to false, or choose "
            "stage.rollout.backend=hf",
        )


def build_sampler(
    cfg: OPDConfig,
    architecture: ArchitectureConfig,
    dtype: DType,
    stop_ids: Sequence[int],
    seed: int,
    save_early: SaveEarly = nothing_to_save,
) -> Sampler:
    """Make the sampler of a run, without weights yet; every rank takes part.

    `save_early` saves the run while servers are away.
    """
    sampling = Sampling(
        architecture,
        dtype,
        list(stop_ids),
        longest_sequence(cfg) + 1,
        cfg.max_response_length,
        cfg.num_sampler_topk,
        seed,
    )
    match cfg.rollout.backend:
        case SamplerBackend.hf:
            from marco_train.rollout.native import HFSampler

            return HFSampler(
                cfg.rollout,
                empty_model(architecture, getattr(torch, dtype.value), ep_group=None),
                stop_ids,
                cfg.max_response_length,
                cfg.num_sampler_topk,
                seed,
            )
        case SamplerBackend.vllm:
            from marco_train.rollout.vllm import VLLMSampler

            return VLLMSampler(cfg.rollout, sampling)
        case SamplerBackend.vllm_server:
            from marco_train.rollout.vllm_server import ServerSampler

            return ServerSampler(cfg.rollout, sampling, save_early)
