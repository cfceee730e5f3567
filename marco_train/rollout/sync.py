"""The policy's weights into the sampler, proved by numbers each time.

Two proofs, since elsewhere this is where runs are silently lost: every weight's checksum as it
left the policy equals the checksum of what the sampler holds, and both give the same
log-probabilities of a fixed sequence.
"""

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from marco_train.rollout.base import Sampler

# Tokens of the canary: enough to touch most experts, few enough to cost nothing.
CANARY_TOKENS = 32
# Positions are weighed, so that a transposed or shifted weight changes its checksum.
POSITION_PERIOD = 65_521
CHECKSUM_CHUNK = 2**22  # elements multiplied at once


class WeightSyncError(RuntimeError):
    """Sampler and policy disagree after a hand-over; nothing may be sampled."""


class SyncSource(Protocol):
    """The part of a policy that a sync needs."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream all weights; all ranks take part."""

    def score(self, input_ids: list[int]) -> Tensor:
        """Log-probability of each token of one sequence; all ranks take part."""


def checksum(weight: Tensor) -> int:
    """Digest the bits and the order of a weight on its device, modulo 2**64."""
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    words = weight.detach().contiguous().view(bits).flatten()
    places = _places(words.device)
    starts = range(0, len(words), CHECKSUM_CHUNK)
    parts = [words[start : start + CHECKSUM_CHUNK] for start in starts]
    return int(torch.stack([(part * places[: len(part)]).sum() for part in parts]).sum())


@cache
def _places(device: torch.device) -> Tensor:
    return torch.arange(CHECKSUM_CHUNK, device=device) % POSITION_PERIOD + 1


def canary_ids(vocab_size: int) -> list[int]:
    """A fixed sequence spread over the vocabulary."""
    return [(7 + 7919 * place) % vocab_size for place in range(CANARY_TOKENS)]


def sync_weights(
    policy: SyncSource, sampler: Sampler, version: int, vocab_size: int, tolerance: float
) -> None:
    """Hand the policy's weights to the sampler and prove that they arrived.

    Raises:
        WeightSyncError: Names the weights that differ, or by how much the canary does.
    """
    sent: dict[str, int] = {}

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, weight in policy.named_weights():
            sent[name] = checksum(weight)
            yield name, weight

    sampler.load_weights(watched(), version)
    held = sampler.checksums()
    differing = sorted(
        name
        for name in sent.keys() | (held or {}).keys()
        if held is not None and sent.get(name) != held.get(name)
    )
    if differing:
        raise WeightSyncError(
            f"step {version}: {len(differing)} of {len(sent)} weights of the sampler are not the "
            f"policy's: {', '.join(differing[:10])}"
        )
    probe = canary_ids(vocab_size)
    difference = float((policy.score(probe) - sampler.score(probe)).abs().max())
    if not difference <= tolerance:
        raise WeightSyncError(
            f"step {version}: the canary's log-probabilities differ by {difference:.3g} nats "
            f"between policy and sampler, more than stage.rollout.canary_tolerance {tolerance:.3g}"
        )
