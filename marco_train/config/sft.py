"""What supervised fine-tuning does."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from marco_train.config.rollout import NativeRolloutConfig, RolloutConfig
from marco_train.config.stage import steps_of
from marco_train.config.trained import AnsweredStage, TrainedStageConfig
from marco_train.errors import require, require_positive


class LossTokens(Enum):
    """Which tokens of a conversation the SFT loss covers."""

    assistant = "assistant"
    all = "all"


@dataclass(kw_only=True)
class SFTConfig(TrainedStageConfig):
    """Supervised fine-tuning on conversations."""

    num_steps: int | None = None
    """Updates. None: `num_epochs` says it."""
    num_epochs: float | None = None
    """Length in epochs, in place of `num_steps`. An epoch is as many samples as the sources have
    rows together, after `unique_prompts` and `data.num_rows`; the last update takes those that are
    left. None: `num_steps` says it."""
    global_batch_size: int = 64
    """Conversations of one update, over all ranks."""
    max_length: int = MISSING
    """Tokens of one conversation; `data.overlong` says what becomes of longer ones. Not given: as
    many as the model has positions, 4096 at most."""
    loss_tokens: LossTokens = LossTokens.assistant
    rollout: RolloutConfig = field(default_factory=NativeRolloutConfig)
    """Who samples the answers to `eval.suite`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            global_batch_size=self.global_batch_size,
            max_length=self.max_length,
        )
        response = self.eval.max_response_length
        require(
            response is None or response < self.max_length,
            f"stage.eval.max_response_length is {response}, and stage.max_length "
            f"{self.max_length} leaves a question no room: give fewer, or raise stage.max_length",
        )
        require(
            (self.num_steps is None) != (self.num_epochs is None),
            f"stage.num_steps is {self.num_steps} and stage.num_epochs is {self.num_epochs}: give "
            "one of them, and null for the other",
        )

    @property
    def counts_epochs(self) -> bool:
        """Whether the length of the run depends on the rows of an epoch."""
        return self.num_steps is None

    def total_steps(self, epoch_rows: int | None) -> int:
        """Updates of the run.

        Args:
            epoch_rows: Conversations of an epoch; not needed where `num_steps` says it.
        """
        size = self.global_batch_size
        return self.capped(steps_of(self.num_steps, self.num_epochs, size, epoch_rows))

    @property
    def loss_metric(self) -> str:
        """What is measured on held-out conversations."""
        return "eval/cross_entropy"

    @property
    def answers(self) -> AnsweredStage:
        """The lengths and the sampler with which `eval.suite` is asked."""
        response = self.eval.max_response_length or max(1, self.max_length // 2)
        return AnsweredStage(self.rollout, self.max_length - response, response)
