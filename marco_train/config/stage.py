"""What the stages share."""

import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

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

    @property
    def leaves_files(self) -> bool:
        """Whether anything is written; else no directory is made."""
        return True

    def capped(self, num_steps: int) -> int:
        """Steps to take of `num_steps`."""
        return num_steps if self.max_steps is None else min(num_steps, self.max_steps)


def steps_of(
    num_steps: int | None, num_epochs: float | None, batch_size: int, epoch_rows: int | None
) -> int:
    """Count the updates of a run or of a phase, before `max_steps` caps them.

    Args:
        num_steps: Updates that were asked for, or None.
        num_epochs: Epochs that were asked for where updates were not.
        batch_size: Samples of an update.
        epoch_rows: Samples of an epoch; not needed where updates were asked for.
    """
    if num_steps is not None:
        return num_steps
    assert num_epochs is not None and epoch_rows is not None
    return math.ceil(Fraction(samples_of(num_epochs, epoch_rows), batch_size))


def samples_of(num_epochs: float, epoch_rows: int) -> int:
    """Count the samples of so many epochs.

    Args:
        num_epochs: As it was written.
        epoch_rows: Samples of an epoch.
    """
    # The decimal that was written: in floats, 1.1 epochs of 3000 rows are a little over 3300.
    return math.ceil(Fraction(str(num_epochs)) * epoch_rows)


@dataclass(kw_only=True)
class UntrainedStageConfig(StageConfig):
    """A stage that makes no update: it has no optimizer and leaves no checkpoint."""
