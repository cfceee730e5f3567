"""Held-out loss during training."""

from typing import Protocol

from marco_train.metrics import Metrics
from marco_train.types import LossFn, Microbatch


class Measurable(Protocol):
    """The part of a policy that an evaluation needs."""

    def measure(self, microbatches: list[Microbatch], loss_fn: LossFn) -> Metrics:
        """Mean metrics of a loss, without an update."""


def evaluate(policy: Measurable, held_out: list[Microbatch], loss_fn: LossFn) -> Metrics:
    """Mean held-out loss per token; all ranks take part."""
    if not held_out:
        return {}
    found = policy.measure(held_out, loss_fn)
    return {"eval/cross_entropy": found["loss/cross_entropy"]}
