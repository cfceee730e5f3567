"""The policy's weights into the sampler, proved by numbers each time.

A weight sync that fails silently is a common way to lose a run of distillation. Three things are
seen to, in this order:

1. Names, shapes and count of what is sent are accounted for.
2. Wherever the sampler keeps a weight as a checkpoint has it, its checksum, made where it is held,
   is that of the policy's: a proof, bit for bit. `rollout/sync_proved` is their share of the bytes.
3. Both sides give the same log-probabilities of fixed sequences, the canary: an alarm for what is
   computed from the weights, and all there is for weights that an engine repacks for its kernels.
   In float32 it sees every fault. In bfloat16 two right implementations are as far apart as weights
   before and after some updates, and it sees gross faults only.

What it takes for Mini (28 layers, 256 experts of 768, width 1,024) in bfloat16 with experts over 8
ranks: 34.6 GB in 311 tensors. Two matrices of experts a layer are gathered, 56 collectives in all:
805 and 403 MB, of which a rank receives seven eighths, 29.6 GB in total, 0.1 s at 300 GB/s. Of
extra memory the gathered matrices of the layer that is being loaded, 1.2 GB, which an engine of
vLLM keeps until it is complete, and as much again where it then lays them out. With engines that
share the experts over the same 8 ranks nothing is gathered, and an eighth is kept and laid out.
Checksums read all bytes once more on each side; the canary is one forward pass of 256 tokens on
each side.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from torch import Tensor

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.model import DType
from marco_train.config.opd import OPDConfig
from marco_train.config.trained import AnsweredStage
from marco_train.distributed import device, gather_objects
from marco_train.errors import WeightSyncError
from marco_train.metrics import Metrics
from marco_train.models.agreement import Spread, noise, spread_of
from marco_train.models.checksums import Checksums
from marco_train.models.probe import probe_ids
from marco_train.models.weights import ExpertShare, name_first
from marco_train.rollout.base import Sampler

# Tokens of the canary's sequences: enough to touch most experts, few enough to cost little. The
# last is longer than a block of vLLM's prefix cache, 128 tokens on a CPU.
CANARY_LENGTHS = (32, 32, 32, 160)
# Nats that the canary may be off by at most in float32.
FLOAT32_TOLERANCE = 1e-4
# In bfloat16: how far a first sync may be off, in multiples of the noise of right implementations,
# and later ones, in multiples of what the first gave.
FIRST_SYNC, LATER_SYNCS = 4.0, 1.5


class SyncSource(Protocol):
    """The part of a policy that a sync needs."""

    def named_weights(self, share: ExpertShare) -> Iterator[tuple[str, Tensor]]:
        """Stream all weights, of the experts those of `share`, joined; all ranks take part."""

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; all ranks take part."""


@dataclass(frozen=True)
class Canary:
    """Fixed sequences, and how far apart policy and sampler may be on them."""

    sequences: list[list[int]]
    dtype: DType
    num_layers: int
    tolerance: float | None = None
    """Cap on the largest difference, nats. None: 1e-4 in float32, and in bfloat16 none."""

    def bound(self, first: Spread | None) -> Spread:
        """Bound of one sync; `first` is what the sampler's first one gave, None if this is it."""
        if self.dtype is DType.float32:
            return Spread(math.inf, math.inf, self.tolerance or FLOAT32_TOLERANCE)
        right = noise(self.num_layers)
        mean, p90, _ = right.times(FIRST_SYNC)
        if first is not None:
            mean = max(right.mean, LATER_SYNCS * first.mean)
            p90 = max(right.p90, LATER_SYNCS * first.p90)
        return Spread(mean, p90, self.tolerance or math.inf)


def canary_sequences(vocab_size: int, max_length: int) -> list[list[int]]:
    """Fixed sequences spread over the vocabulary, none longer than the run's."""
    ids = iter(probe_ids(sum(CANARY_LENGTHS), vocab_size))
    return [list(islice(ids, min(length, max_length))) for length in CANARY_LENGTHS]


def canary_of(
    stage: OPDConfig | EvaluateConfig | BenchmarkConfig | AnsweredStage,
    architecture: ArchitectureConfig,
    dtype: DType,
) -> Canary:
    """Make the canary of a stage's sampler for a model of this shape."""
    return Canary(
        canary_sequences(architecture.vocab_size, longest_sequence(stage)),
        dtype,
        architecture.num_hidden_layers,
        stage.rollout.canary_tolerance,
    )


def sync_weights(policy: SyncSource, sampler: Sampler, version: int, canary: Canary) -> Metrics:
    """Hand the policy's weights to the sampler and prove that they arrived.

    Args:
        policy: Has the weights.
        sampler: Takes them; keeps what its first canary gave.
        version: The policy's step.
        canary: Compared last.

    Returns:
        How fast they went, with their checksums and without the canary, and which share of them
        was proved bit for bit.

    Raises:
        WeightSyncError: Names the weights that differ, or says how far off the canary is; on all
            ranks, of the first where it is so.
    """
    sent = Checksums(sampler.share)
    start = time.perf_counter()

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, weight in policy.named_weights(sampler.share):
            sent.add(name, weight)
            yield name, weight

    sampler.load_weights(watched(), version)
    proved = _prove(sent, sampler, version)
    num_bytes = sum(sent.num_bytes.values())
    gib_per_second = num_bytes / 2**30 / (time.perf_counter() - start)

    sequences = canary.sequences
    found = spread_of(policy.score(sequences), sampler.score(sequences).to(device()))
    bound = canary.bound(sampler.first_canary)
    said = None
    if not found.within(bound):
        said = (
            f"step {version}: the canary's log-probabilities differ by {found} between policy and "
            f"sampler; bounds: {bound}; stage.rollout.canary_tolerance bounds the largest"
        )
    _end_all_ranks(said)
    sampler.first_canary = sampler.first_canary or found
    return {"rollout/sync_gib_per_s": gib_per_second, "rollout/sync_proved": proved / num_bytes}


def _prove(sent: Checksums, sampler: Sampler, version: int) -> int:
    """Compare the checksums of all that hold the sampler's weights; returns the bytes proved."""
    wanted, holders = sent.by_name(), sampler.checksums()
    differing = {n for held in holders for n, found in held.items() if wanted.get(n) != found}
    said = None
    if differing:
        said = (
            f"step {version}: {len(differing)} of {len(wanted)} weights of the sampler are not the "
            f"policy's: {name_first(sorted(differing))}"
        )
    _end_all_ranks(said)
    proved = min(holders, key=len, default={})  # of several, the one that proves the least
    return sum(sent.num_bytes[name] for name in proved)


def _end_all_ranks(said: str | None) -> None:
    """Raise where a rank has something to say, on all of them: the others would wait for it."""
    for of_rank in gather_objects(said):
        if of_rank is not None:
            raise WeightSyncError(of_rank)
