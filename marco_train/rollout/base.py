"""What a sampler is, and the seed of a response."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

from torch import Tensor

from marco_train.distributed import reduce_sums
from marco_train.metrics import Metrics
from marco_train.types import FinishReason, Prompt, Rollout


class Sampler(Protocol):
    """Makes responses with the policy's weights."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a complete stream of named weights."""

    def sample(self, prompts: Sequence[Prompt], num_responses: int) -> list[Rollout]:
        """Sample responses of each prompt, in the order of prompts."""

    def score(self, input_ids: list[int]) -> Tensor:
        """Log-probability of each token of one sequence given those before it, [T - 1]."""

    def checksums(self) -> dict[str, int]:
        """Digest every weight that the sampler holds, under its checkpoint name."""


def response_seed(run_seed: int, prompt_index: int, sample_index: int) -> int:
    """Seed of one response, below 2**63.

    A function of what is asked and not of when or where, so that batching, retries, resume and
    the number of ranks change no sample.
    """
    key = f"{run_seed}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def summarize(rollouts: Sequence[Rollout]) -> Metrics:
    """Describe the responses of a step, over all ranks."""
    count, length, truncated, empty = reduce_sums(
        [
            len(rollouts),
            sum(len(r.response_ids) for r in rollouts),
            sum(r.finish_reason is FinishReason.length for r in rollouts),
            sum(
                len(r.response_ids) == 1 and r.finish_reason is FinishReason.stop for r in rollouts
            ),
        ]
    )
    names = ("rollout/response_length", "rollout/truncated", "rollout/empty")
    sums = (length, truncated, empty)
    return {name: total / max(1.0, count) for name, total in zip(names, sums, strict=True)}
