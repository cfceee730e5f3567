"""What a sampler is, and the seed of a response."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from torch import Tensor

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.model import DType
from marco_train.distributed import gather_objects
from marco_train.metrics import Metrics
from marco_train.models.agreement import Spread
from marco_train.models.weights import ALL_EXPERTS, ExpertShare
from marco_train.rollout.loops import ends_in_loop
from marco_train.types import FinishReason, Prompt, Rollout, rollout_groups


class Sampler:
    """Makes responses with the policy's weights."""

    first_canary: Spread | None = None
    """How far it was from the policy at its first sync; see `rollout/sync.py`."""
    share: ExpertShare = ALL_EXPERTS
    """Of the experts, which this rank's sampler holds."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a complete stream of named weights, of the experts those of `share`."""
        raise NotImplementedError

    def sample(
        self, prompts: Sequence[Prompt], num_responses: int, *, greedy: bool = False
    ) -> Iterator[Rollout]:
        """Sample responses of each prompt at temperature 1; yields each as it ends.

        With `greedy` each token is the likeliest instead, for measures alone. Servers are asked at
        once; a sampler in this process samples while it is iterated. Every rank takes part, with
        any number of prompts, and iterates to the end.
        """
        raise NotImplementedError

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; the first token of each has none."""
        raise NotImplementedError

    def checksums(self) -> list[dict[str, int]]:
        """Digest the weights just loaded, by checkpoint names, where they are held.

        Returns:
            For each that holds weights, such as an engine: those whose memory is as in a
            checkpoint and is what its kernels read. Others are proved by the canary alone.
        """
        raise NotImplementedError

    def drain(self) -> None:
        """Wait for what servers still sample, so that they may get other weights; collective."""

    def sleep(self) -> None:
        """Leave memory to others until `load_weights`, where there is a way to."""

    def close(self) -> None:
        """Let go of memory and connections."""


@dataclass(frozen=True)
class SamplerSpec:
    """What a run samples with an engine of vLLM, wherever it runs."""

    architecture: ArchitectureConfig
    dtype: DType
    stop_ids: list[int]
    max_length: int
    """Tokens of the longest sequence and one more, which scoring a sequence makes."""
    max_response_length: int
    num_topk: int
    """Likeliest tokens to name in each place."""
    replay_routing: bool
    """Whether rollouts have the experts that their tokens took."""
    seed: int


NO_WEIGHTS = "the sampler has no complete weights: load_weights comes first"


def response_seed(run_seed: int, prompt_index: int, sample_index: int) -> int:
    """Seed of one response, below 2**63.

    A function of what is asked and not of when or where, so that batching, retries, resume and
    the number of ranks change no sample where they change no probability: on a CPU, and on GPUs as
    far as `deterministic` goes, which has not run there.
    """
    key = f"{run_seed}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def in_order(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Sort rollouts by prompt and sample, whenever each of them ended."""
    return sorted(rollouts, key=lambda rollout: rollout.order)


InLanguage = Callable[[Rollout], bool | None]
"""Whether a response is in the language of its prompt; None: it cannot be told."""


def summarize(rollouts: Iterable[Rollout], in_language: InLanguage | None = None) -> Metrics:
    """Describe the responses of a step over all ranks, in all and by category and language.

    Without `in_language` nothing is said of the responses' languages, and no share that match where
    none could be judged.
    """
    sums: dict[str, list[float]] = {}  # of a group, "" for all: responses and what is averaged
    for rollout in rollouts:
        length = len(rollout.response_ids)
        stopped = rollout.finish_reason is FinishReason.stop
        matches = in_language(rollout) if in_language is not None else None
        found = [
            1.0,
            length,
            not stopped,
            stopped and length <= 1,
            ends_in_loop(rollout),
            matches is not None,
            matches is True,
        ]
        for group in ("", *(f"/{name}" for name in rollout_groups(rollout))):
            known = sums.get(group, [0.0] * len(found))
            sums[group] = [a + b for a, b in zip(known, found, strict=True)]
    totals: dict[str, list[float]] = {"": [0.0] * 7}
    for of_rank in gather_objects(sums):
        for group, found in of_rank.items():
            known = totals.get(group, [0.0] * len(found))
            totals[group] = [a + b for a, b in zip(known, found, strict=True)]
    names = (
        "rollout/response_length",
        "rollout/truncated",
        "rollout/empty",
        "rollout/repetition",
    )
    metrics: Metrics = {}
    for group, (count, *values, num_judged, num_matching) in sorted(totals.items()):
        for name, value in zip(names, values, strict=True):
            metrics[f"{name}{group}"] = value / max(1.0, count)
        if in_language is not None:
            metrics[f"rollout/lang_judged{group}"] = num_judged / max(1.0, count)
        if num_judged > 0:
            metrics[f"rollout/lang_match{group}"] = num_matching / num_judged
    return metrics
