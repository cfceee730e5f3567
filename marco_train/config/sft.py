"""What supervised fine-tuning does."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.config.stage import StageConfig
from marco_train.errors import require_positive


class LossTokens(Enum):
    """Which tokens of a conversation the SFT loss covers."""

    assistant = "assistant"
    all = "all"


@dataclass(kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on conversations."""

    num_steps: int = MISSING
    global_batch_size: int = 64
    """Conversations of one update, over all ranks."""
    max_length: int = 4096
    """Tokens of one conversation; longer ones are dropped and counted."""
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
            global_batch_size=self.global_batch_size,
            max_length=self.max_length,
            eval_every=self.eval_every,
            num_eval_examples=self.num_eval_examples,
        )
