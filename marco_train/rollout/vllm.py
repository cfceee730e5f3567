"""The sampler in vLLM, in this process: one engine on each rank, for its own prompts.

An engine is built once, without weights; every sync brings all of them. With expert_parallel it
holds a share of the experts, and all ranks sample together; else it holds all, and each samples
alone. A response has a request and a seed of its own. On a CPU it does not depend on what else is
sampled beside it, when or where; on GPUs kernels round by the size of the batch, unless
`deterministic` is set, which has not run there.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.rollout import VLLMRolloutConfig, kv_cache_bytes
from marco_train.distributed import rank, reduce_max, world_size
from marco_train.errors import require
from marco_train.inference.engine import Generation, VLLMEngine, with_tied_head
from marco_train.models.hf_io import hf_config
from marco_train.models.weights import (
    ALL_EXPERTS,
    ExpertShare,
    accounted,
    joined_shapes,
    meta_model,
    single_experts,
    torch_dtype,
)
from marco_train.rollout.base import NO_WEIGHTS, Sampler, SamplerSpec, response_seed
from marco_train.types import FinishReason, Prompt, Rollout, no_experts

KV_CACHE_BYTES_ON_CPU = 4 * 2**30


class VLLMSampler(Sampler):
    """Samples on this rank; every rank builds one at the same time."""

    def __init__(
        self, cfg: VLLMRolloutConfig, sampling: SamplerSpec, teacher_bytes: int = 0
    ) -> None:
        """Build the engine of a model of this shape; `teacher_bytes` are left to teachers."""
        self._sampling = sampling
        if cfg.expert_parallel:
            self.share = ExpertShare(rank(), world_size())
        self._shapes = joined_shapes(meta_model(sampling.architecture), self.share)
        self._weight_version: int | None = None
        with tempfile.TemporaryDirectory() as directory:
            config = hf_config(sampling.architecture, torch_dtype(sampling.dtype))
            (Path(directory) / "config.json").write_text(json.dumps(config))
            self._engine = VLLMEngine(
                directory,
                sampling.dtype.value,
                max_length=sampling.max_length,
                max_tokens_per_batch=cfg.max_tokens_per_batch,
                kv_cache_bytes=_kv_cache_bytes(cfg, sampling, self._shapes.values(), teacher_bytes),
                max_sequences=cfg.batch_size,
                with_weights=False,
                with_experts=sampling.replay_routing,
                share_experts=cfg.expert_parallel,
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a complete stream of named weights, of the experts those of `share`.

        Raises:
            InputError: A weight is missing, doubled, unknown or misshapen.
        """
        self._weight_version = None
        stream = with_tied_head(accounted(weights, self._shapes), self._shapes)
        if self.share != ALL_EXPERTS:  # vLLM takes the first of joined experts for number 0
            stream = single_experts(stream, self.share)
        self._engine.load_weights(stream)
        self._weight_version = version

    def checksums(self) -> list[dict[str, int]]:
        """Digest what the engine keeps as a checkpoint has it, where it keeps it."""
        dtype = torch_dtype(self._sampling.dtype)
        return [self._engine.checksums(self._shapes, dtype, self.share)]

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; the first token of each has none.

        The last token of the longest sequence is sampled, so that a cache of other weights shows.
        """
        scored = self._engine.token_logprobs(sequences, num_topk=0)
        logprobs = [found[:, 0] for _, found in scored]
        place = max(range(len(sequences)), key=lambda i: len(sequences[i]))
        *prompt, token = sequences[place]
        logprobs[place][-1] = self._engine.next_logprob(prompt, token)
        return torch.cat(logprobs)

    def sample(
        self, prompts: Sequence[Prompt], num_responses: int, *, greedy: bool = False
    ) -> Iterator[Rollout]:
        """Sample responses of each prompt; see `Sampler.sample`.

        Raises:
            RuntimeError: No weights were loaded.
        """
        if self._weight_version is None:
            raise RuntimeError(NO_WEIGHTS)
        return self._sample(prompts, num_responses, self._weight_version, greedy)

    def _sample(
        self, prompts: Sequence[Prompt], num_responses: int, version: int, greedy: bool
    ) -> Iterator[Rollout]:
        asked = [(prompt, n) for prompt in prompts for n in range(num_responses)]
        requests = [
            (prompt.input_ids, response_seed(self._sampling.seed, prompt.index, n))
            for prompt, n in asked
        ]
        generations = self._engine.generate(
            requests,
            self._sampling.max_response_length,
            self._sampling.stop_ids,
            self._sampling.num_topk,
            greedy=greedy,
        )
        for number, generation in generations:
            prompt, sample_index = asked[number]
            yield rollout_of(prompt, sample_index, generation, version, self._sampling)

    def sleep(self) -> None:
        """Give up weights and memory until the next sync; nothing happens on a CPU."""
        if self._engine.sleep():
            self._weight_version = None

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()


def _kv_cache_bytes(
    cfg: VLLMRolloutConfig,
    spec: SamplerSpec,
    shapes: Iterable[tuple[int, ...]],
    teacher_bytes: int,
) -> int:
    """Memory for keys and values, the same on every rank."""
    if not isinstance(cfg.kv_cache_gib, str):
        return int(cfg.kv_cache_gib * 2**30)
    if not torch.cuda.is_available():
        return KV_CACHE_BYTES_ON_CPU
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    weights = sum(math.prod(shape) for shape in shapes) * spec.dtype.num_bytes
    least = -reduce_max(-free)
    one = kv_cache_bytes(spec.architecture, spec.dtype, spec.max_length)
    reserve = int(cfg.reserve_gib * 2**30) + teacher_bytes
    return share_for_keys(least, weights, reserve, one, cfg.batch_size)


def share_for_keys(free: int, weights: int, reserve: int, one: int, batch_size: int) -> int:
    """What free memory leaves for keys and values, all in bytes.

    Args:
        free: Of the device, beside the trainer, on the rank that has the least.
        weights: Of the engine.
        reserve: To leave free, for teachers too.
        one: What one sequence of the longest needs.
        batch_size: Sequences that are decoded together.

    Raises:
        InputError: It does not hold one sequence.
    """
    found = min(free - weights - reserve, batch_size * one)
    gib = 2**30
    require(
        found >= one,
        f"{free / gib:.1f} GiB of a GPU are free beside the trainer, of which vLLM's copy of the "
        f"weights takes {weights / gib:.1f}, and stage.rollout.reserve_gib with teachers in this "
        f"process {reserve / gib:.1f}; one sequence of the longest needs {one / gib:.4f} of keys "
        "and values: end what else has memory there, set parallel.offload_while_sampling=true, "
        "give fewer reserve_gib, or choose rollout@stage.rollout=vllm_server",
    )
    return found


def rollout_of(
    prompt: Prompt, sample_index: int, generation: Generation, version: int, spec: SamplerSpec
) -> Rollout:
    """Make a rollout of a response of vLLM.

    Raises:
        RuntimeError: Routing is to be replayed, and the experts are not there or cannot be.
    """
    stopped = generation.token_ids[-1] in spec.stop_ids
    experts = no_experts()
    if spec.replay_routing:
        num_inputs = len(prompt.input_ids) + len(generation.token_ids) - 1
        experts = check_experts(generation.routed_experts, num_inputs, spec.architecture)
    return Rollout(
        prompt=prompt,
        sample_index=sample_index,
        response_ids=generation.token_ids,
        sampler_logprobs=generation.logprobs,
        topk_ids=generation.topk_ids,
        finish_reason=FinishReason.stop if stopped else FinishReason.length,
        weight_version=version,
        routed_experts=experts,
    )


def check_experts(found: Any, num_inputs: int, architecture: ArchitectureConfig) -> Tensor:
    """Take the experts that vLLM names for the inputs of a sequence, or refuse them.

    Written after the sources of vLLM 0.32.0, where `CompletionOutput.routed_experts` is a numpy
    array [S - 1, L, K] of uint8 or uint16; they come on a GPU only, where this has not been run.
    A layer that was not watched is zeros there, which no token can take twice.

    Args:
        found: What vLLM gave.
        num_inputs: S - 1, for S tokens of prompt and response.
        architecture: Says L, K and how many experts there are.

    Returns:
        [S - 1, L, K] int16.

    Raises:
        RuntimeError: Says what came and what should have.
    """
    assert architecture.num_experts is not None and architecture.num_experts_per_tok is not None
    shape = (num_inputs, architecture.num_hidden_layers, architecture.num_experts_per_tok)
    if not isinstance(found, np.ndarray) or found.shape != shape:
        came = found.shape if isinstance(found, np.ndarray) else type(found).__name__
        raise RuntimeError(
            f"vLLM named the experts of a sequence as {came}, and should have as {shape}: inputs, "
            "layers, experts a token; set stage.rollout.replay_routing to false"
        )
    experts = np.sort(found.astype(np.int64), axis=-1)
    in_range = experts[..., 0].min() >= 0 and experts[..., -1].max() < architecture.num_experts
    if not in_range or bool((experts[..., 1:] == experts[..., :-1]).any()):
        raise RuntimeError(
            f"vLLM named experts from {experts.min()} to {experts.max()} for the tokens of a "
            f"sequence, which should be {shape[2]} different ones of {architecture.num_experts} "
            "in each layer; set stage.rollout.replay_routing to false"
        )
    return torch.from_numpy(found.astype(np.int16))
