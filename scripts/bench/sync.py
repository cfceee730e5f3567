"""What a weight sync costs beside its copies: names, shapes, checksums and their comparison.

    python scripts/bench/sync.py --repeats 7

A model with Mini's layers and experts, and so its number of weights, and a width of 8, whose bytes
are nearly nothing. It is synced to our own sampler, all but the canary; times are a weight of the
checkpoint, medians over the syncs after the first, in microseconds.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

import torch
from shapes import MINI
from torch import Tensor

from marco_train.config.model import DType
from marco_train.config.rollout import NativeRolloutConfig
from marco_train.models.weights import (
    ALL_EXPERTS,
    ExpertShare,
    named_weights,
    random_model,
    weight_shapes,
)
from marco_train.rollout.native import NativeSampler
from marco_train.rollout.sync import Canary, sync_weights

NARROW = replace(
    MINI,
    vocab_size=1024,
    hidden_size=8,
    head_dim=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=8,
)


class SilentPolicy:
    """Has weights; its canary costs nothing."""

    def __init__(self) -> None:
        self.model = random_model(NARROW, torch.bfloat16, seed=0)

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        """Stream them."""
        return named_weights(self.model, share)

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Say always the same."""
        return torch.zeros(1)


class SilentSampler(NativeSampler):
    """Our own; its canary costs nothing."""

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Say always the same."""
        return torch.zeros(1)


def microseconds(call: Callable[[], object], repeats: int, count: int) -> list[float]:
    """Times of calls after a first one, over a number of weights."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start) / count)
    return found[1:]


def main() -> None:
    """Time a whole sync, and its copies alone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="Syncs that are timed.")
    repeats = parser.parse_args().repeats
    policy = SilentPolicy()
    target = random_model(NARROW, torch.bfloat16, seed=1)
    sampler = SilentSampler(NativeRolloutConfig(), target, [2], 8, num_topk=0, seed=0)
    canary = Canary([[1, 2]], DType.bfloat16, NARROW.num_hidden_layers)
    count = len(weight_shapes(policy.model))

    def copy() -> None:
        for one, other in zip(policy.model.parameters(), target.parameters(), strict=True):
            other.detach().copy_(one.detach())

    times = {
        "sync": microseconds(lambda: sync_weights(policy, sampler, 0, canary), repeats, count),
        "of it copies": microseconds(copy, repeats, count),
        "of it checksums of one side": microseconds(sampler.checksums, repeats, count),
    }
    print(f"{count} weights in {len(list(policy.named_weights()))} tensors; microseconds a weight")
    for what, found in times.items():
        print(f"{what}: {median(found):.2f} ({min(found):.2f}-{max(found):.2f})")


if __name__ == "__main__":
    main()
