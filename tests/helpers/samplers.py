"""Samplers that are given the weights of a policy, whole or at fault."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from marco_train.config.model import DType
from marco_train.config.opd import OPDConfig
from marco_train.losses.logprobs import sequence_logprobs
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.weights import ALL_EXPERTS, ExpertShare, named_weights, random_model
from marco_train.rollout.base import Sampler
from marco_train.rollout.build import build_sampler
from marco_train.rollout.sync import Canary, canary_sequences, sync_weights
from marco_train.types import Prompt
from tests.helpers.configs import compose_config
from tests.helpers.models import VOCAB_SIZE, WIDE, architecture

STOP_IDS = [2, 0, *range(100, 140)]
MAX_PROMPT_LENGTH = 150
PROBES = canary_sequences(VOCAB_SIZE, MAX_PROMPT_LENGTH)
CANARY = Canary(PROBES, DType.float32, num_layers=2)
SHAPE = architecture(**WIDE)


class Fixed:
    """The part of a policy that a sync needs, of a model that is not trained."""

    def __init__(self, model: Qwen3Moe) -> None:
        self.model = model

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.model, share)

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return sequence_logprobs(self.model, self.model.head, sequences)


def spread(seed: int) -> Fixed:
    """A model that is far from sure and far from uniform."""
    model = random_model(SHAPE, torch.float32, seed)
    with torch.no_grad():
        model.head.mul_(4)
    return Fixed(model)


def sampler_of(
    backend: str,
    limit: int = 12,
    batch_size: int = 64,
    top_k: int = 0,
    expert_parallel: bool = False,
) -> Sampler:
    """A sampler of `SHAPE` that waits for its first weights."""
    more = ["stage.objective=topk", f"stage.top_k={top_k}"] if top_k else []
    if backend == "vllm":
        more += ["stage.rollout.kv_cache_gib=0.0625", "stage.rollout.max_tokens_per_batch=256"]
        more += [f"stage.rollout.expert_parallel={expert_parallel}"]
    cfg: OPDConfig = compose_config(
        "quickstart_opd",
        f"rollout@stage.rollout={backend}",
        f"stage.rollout.batch_size={batch_size}",
        f"stage.max_prompt_length={MAX_PROMPT_LENGTH}",
        f"stage.max_response_length={limit}",
        *more,
    ).stage
    return build_sampler(cfg, SHAPE, DType.float32, STOP_IDS, seed=5)


def prompts(count: int = 6) -> list[Prompt]:
    """Prompts of many lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 40, 1, 17, 64, 9]
    return [
        Prompt(
            i,
            torch.randint(3, 320, (lengths[i % 6],), generator=generator).tolist(),
            "s",
            "c",
            "en",
        )
        for i in range(count)
    ]


def sync(policy: Fixed, sampler: Sampler, version: int = 1) -> None:
    """Hand the weights over, and prove them."""
    sync_weights(policy, sampler, version, CANARY)


Stream = Iterator[tuple[str, Tensor]]


def without_one(stream: Stream) -> Stream:
    """One name never comes."""
    return (item for item in stream if not item[0].endswith("layers.1.self_attn.k_proj.weight"))


def with_one_twice(stream: Stream) -> Stream:
    """One name comes twice."""
    for item in stream:
        yield item
        if item[0].endswith("layers.1.mlp.experts.gate_up_proj"):
            yield item


def transposed(stream: Stream) -> Stream:
    """Same names and shapes, and other numbers in one expert."""
    for name, weight in stream:
        sent = weight.clone()
        if name.endswith("layers.1.mlp.experts.down_proj"):
            sent[5] = weight[5].T
        yield name, sent
