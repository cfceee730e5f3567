"""What supervised fine-tuning does."""

import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from marco_train.config.stage import StageConfig
from marco_train.errors import require, require_positive


class LossTokens(Enum):
    """Which tokens of a conversation the SFT loss covers."""

    assistant = "assistant"
    all = "all"


@dataclass(kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on conversations."""

    num_steps: int | None = None
    """Updates. None: `num_epochs` says it."""
    num_epochs: float | None = None
    """Length in epochs, in place of `num_steps`. An epoch is as many samples as the sources have
    rows together, after `unique_prompts` and `data.num_rows`; the last update takes those that are
    left. None: `num_steps` says it."""
    global_batch_size: int = 64
    """Conversations of one update, over all ranks."""
    max_length: int = 4096
    """Tokens of one conversation; `data.overlong` says what becomes of longer ones."""
    loss_tokens: LossTokens = LossTokens.assistant
    eval_every: int | None = None
    """Steps between two measures of the held-out loss. None: off."""
    num_eval_examples: int = 512
    """Held-out conversations of one measure."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            global_batch_size=self.global_batch_size,
            max_length=self.max_length,
            eval_every=self.eval_every,
            num_eval_examples=self.num_eval_examples,
        )
        require(
            (self.num_steps is None) != (self.num_epochs is None),
            f"stage.num_steps is {self.num_steps} and stage.num_epochs is {self.num_epochs}: give "
            "one of them, and null for the other",
        )


def num_sft_steps(
    num_steps: int | None, num_epochs: float | None, batch_size: int, epoch_rows: int | None
) -> int:
    """Count the updates of a run, before `max_steps` caps them.

    Args:
        num_steps: Updates that were asked for, or None.
        num_epochs: Epochs that were asked for where updates were not.
        batch_size: Samples of an update.
        epoch_rows: Samples of an epoch; not needed where updates were asked for.
    """
    if num_steps is not None:
        return num_steps
    assert num_epochs is not None and epoch_rows is not None
    return math.ceil(Fraction(num_sft_samples(num_epochs, epoch_rows), batch_size))


def num_sft_samples(num_epochs: float, epoch_rows: int) -> int:
    """Count the samples of so many epochs.

    Args:
        num_epochs: As it was written.
        epoch_rows: Samples of an epoch.
    """
    # The decimal that was written: in floats, 1.1 epochs of 3000 rows are a little over 3300.
    return math.ceil(Fraction(str(num_epochs)) * epoch_rows)
