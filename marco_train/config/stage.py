"""What the stages share."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.errors import require_positive


class StageKind(Enum):
    """What a run does."""

    sft = "sft"
    opd = "opd"
    evaluate = "evaluate"
    benchmark = "benchmark"


@dataclass(kw_only=True)
class StageConfig:
    """What all stages share."""

    kind: StageKind = MISSING
    max_steps: int | None = None
    """Cap on the steps of an SFT run and of each phase of a cascade, for trials.
    None: no cap."""

    def __post_init__(self) -> None:
        require_positive("stage", max_steps=self.max_steps)

    def capped(self, num_steps: int) -> int:
        """Steps to take of `num_steps`."""
        return num_steps if self.max_steps is None else min(num_steps, self.max_steps)


@dataclass(kw_only=True)
class UntrainedStageConfig(StageConfig):
    """A stage that makes no update: it has no optimizer and leaves no checkpoint."""
