"""The policy's weights into the sampler, proved by numbers each time.

A weight sync that fails silently is a common way to lose a run of distillation. Names, shapes and
count of the weights are accounted for; then both sides have to give the same log-probabilities of
fixed sequences, the canary. Where the sampler keeps its weights as they came, their checksums have
to be those of the policy's as well; one that packs them for kernels is proved by the canary alone.

What it takes for Mini (28 layers, 256 experts of 768, width 1,024) in bfloat16 with experts over 8
ranks: 34.6 GB in 21,759 tensors. Two matrices of experts a layer are gathered, 56 collectives in
all: 805 and 403 MB, of which a rank receives seven eighths, 29.6 GB in total, 0.1 s at 300 GB/s. Of
extra memory one gathered matrix and the parts that it is joined from, 1.6 GB. The canary is one
forward pass of 256 tokens on each side. Copying 34.6 GB within a GPU's memory takes some 0.02 s.
What remains is the engine's work for each tensor: 0.4 ms on a CPU (120 tensors in 50 ms), which
would be 9 s.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from marco_train.distributed import device
from marco_train.errors import WeightSyncError
from marco_train.metrics import Metrics
from marco_train.models.checksums import checksum
from marco_train.models.probe import probe_ids
from marco_train.rollout.base import Sampler

# Tokens of the canary's sequences: enough to touch most experts, few enough to cost little. The
# last is longer than a block of vLLM's prefix cache, 128 tokens on a CPU.
CANARY_LENGTHS = (32, 32, 32, 160)


class SyncSource(Protocol):
    """The part of a policy that a sync needs."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream all weights; all ranks take part."""

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; all ranks take part."""


def canaries(vocab_size: int, max_length: int) -> list[list[int]]:
    """Fixed sequences spread over the vocabulary, none longer than the run's."""
    ids = iter(probe_ids(sum(CANARY_LENGTHS), vocab_size))
    return [list(islice(ids, min(length, max_length))) for length in CANARY_LENGTHS]


def sync_weights(
    policy: SyncSource,
    sampler: Sampler,
    version: int,
    probes: Sequence[list[int]],
    tolerance: float,
) -> Metrics:
    """Hand the policy's weights to the sampler and prove that they arrived.

    Args:
        policy: Has the weights.
        sampler: Takes them.
        version: The policy's step.
        probes: The canary, as `canaries` makes it.
        tolerance: Largest difference of its log-probabilities, nats.

    Returns:
        How fast they went, with their checksums and without the canary.

    Raises:
        WeightSyncError: Names the weights that differ, or by how much the canary does.
    """
    sent: dict[str, int] = {}
    num_bytes = 0
    start = time.perf_counter()

    def watched() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_bytes
        for name, weight in policy.named_weights():
            num_bytes += weight.nbytes
            if sampler.gives_checksums:
                sent[name] = checksum(weight)
            yield name, weight

    sampler.load_weights(watched(), version)
    held = sampler.checksums() if sampler.gives_checksums else {}
    differing = sorted(n for n in sent.keys() | held.keys() if sent.get(n) != held.get(n))
    if differing:
        raise WeightSyncError(
            f"step {version}: {len(differing)} of {len(sent)} weights of the sampler are not the "
            f"policy's: {', '.join(differing[:10])}"
        )
    gib_per_second = num_bytes / 2**30 / (time.perf_counter() - start)
    difference = float((policy.score(probes) - sampler.score(probes).to(device())).abs().max())
    if not difference <= tolerance:
        raise WeightSyncError(
            f"step {version}: the canary's log-probabilities differ by {difference:.3g} nats "
            f"between policy and sampler, more than stage.rollout.canary_tolerance {tolerance:.3g}"
        )
    return {"rollout/sync_gib_per_s": gib_per_second}
