"""What a teacher is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from marco_train.types import Rollout, ScoredRollout


class Teacher(Protocol):
    """Frozen; scores the tokens of rollouts, by their ids."""

    @property
    def head(self) -> Tensor:
        """Weights of the output head, [V, D]."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order."""
